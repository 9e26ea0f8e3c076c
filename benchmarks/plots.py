"""Plots of benchmarks, where matplotlib is installed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def pyplot() -> Any:
    """`matplotlib.pyplot`, drawing to files; None, said in a line, without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed; pip install 'rollahead[bench]'")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def training_curves(
    path: Path, runs: Sequence[tuple[str, Mapping[str, Sequence[float | None]]]], labels: Mapping[str, str]
) -> Path | None:
    """A panel for each metric of `labels`, a line in it for each run, by batch; None without matplotlib.

    Args:
        runs: name and metrics of each; those of one name have one colour.
        labels: what stands beside the axis, by metric; a run that lacks one has no line there.
    """
    plot = pyplot()
    if plot is None:
        return None
    figure, panels = plot.subplots(1, len(labels), figsize=(5.5 * len(labels), 4.5), squeeze=False)
    colours = {name: f"C{number % 10}" for number, name in enumerate(dict.fromkeys(name for name, _ in runs))}
    for axes, (key, label) in zip(panels[0], labels.items(), strict=True):
        for name, curves in runs:
            values = [float("nan") if value is None else value for value in curves.get(key, [])]
            axes.plot(values, color=colours[name], label=name, linewidth=1)
        axes.set(xlabel="batch", ylabel=label)
    handles = {text: handle for handle, text in zip(*panels[0][0].get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=min(5, len(handles)))
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plot.close(figure)
    return path
