"""Plots of benchmarks, where matplotlib is installed."""

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
