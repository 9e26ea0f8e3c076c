"""A short form of the end-to-end benchmark, with real runs."""

import json

import pytest

from benchmarks.end_to_end import main
from tests.e2e.conftest import SMALL
from tests.e2e.runs import ROOT, settings

pytestmark = pytest.mark.slow


def test_arms_are_trained_compared_and_not_done_twice(tmp_path, cache, capsys, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    small = settings(**{key: value for key, value in SMALL.items() if not key.startswith("run")})
    arguments = ["--arms", "synchronous,suffix-automaton", "--seeds", "0", "--steps", "4", "--eval-every", "2", *small]
    arguments += ["--target", "0", "--out", str(tmp_path)]
    assert main(arguments) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    plain, drafted = results["rows"]
    assert (plain["arm"], plain["steps"], drafted["arm"], drafted["steps"]) == (
        "synchronous", 4, "suffix-automaton", 4,
    )  # fmt: skip
    assert plain["acceptance_rate"] is None and drafted["acceptance_rate"] is not None
    assert plain["staleness"] == 0 and drafted["staleness"] > 0
    for row in results["rows"]:
        split = row["time_split"]
        assert {"learning", "weight update", "generation"} <= split.keys()
        assert sum(split.values()) == pytest.approx(row["mean_step_seconds"], rel=0.2)
        assert row["seconds_to_target"] > 0
    assert (tmp_path / "report.html").stat().st_size > 1_000_000
    capsys.readouterr()
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("done before") == 2
