"""One script a question; each takes its arguments in `main` and writes `results.json`, most of them a plot too."""
