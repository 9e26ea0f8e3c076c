"""The charts of a run."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.telemetry.report.page import Chart

Row = Mapping[str, Any]
WINDOW = 10
"""steps of a running mean"""


def run_charts(rows: Sequence[Row], config: Mapping[str, Any]) -> list[Chart]:
    """All of them; those without values are not drawn."""
    steps = [row["step"] for row in rows]
    draw = _Curves(rows, steps)
    return [
        _reward(draw),
        _entropy(draw, config),
        draw.chart(
            "erc", "Entropy ratio clipping", ("entropy_ratio_kept", "extra.erc/below", "extra.erc/above"),
            note=_band_note(config), yaxis={"rangemode": "tozero"},
        ),
        draw.chart("staleness", "Staleness", ("staleness_mean", "staleness_max"),
                   note="Publications between a token's policy and the newest."),
        draw.chart("importance", "Importance weights", ("importance_weight_mean", "importance_weight_ess"),
                   note="Effective sample size as a share of the tokens; 1 is on-policy."),
        draw.chart("mismatch", "mismatch_k3", ("mismatch_k3",), yaxis={"type": "log", "exponentformat": "power"},
                   note="Learner against engine at equal weights: the first number to look at."),
        draw.chart("speed", "Tokens per second", ("tokens_per_second",)),
        draw.chart("verification", "Tokens a verification", ("tokens_per_verification",)),
        _by_drafter(rows, steps, "acceptance", "Acceptance by drafter", lambda c: c["accepted"] / c["drafted"]),
        _shares(rows, steps),
        _depth(rows),
        _against_entropy(rows),
        _time(rows, steps, "learner_time", "learner-time", "Where the learner's time goes, seconds a step"),
        _time(rows, steps, "engine_time", "engine-time", "Where engines' time goes, seconds a step"),
        draw.chart("length", "Response length, tokens", ("response_length_mean", "response_length_max")),
        draw.chart("loss", "Loss and gradient norm", ("loss", "grad_norm")),
        draw.chart("signal", "Groups without signal, truncated share", ("groups_without_signal", "truncated_fraction")),
        _queue(rows, steps),
        _dropped(rows, steps),
    ]  # fmt: skip


class _Curves:
    """Curves over steps."""

    def __init__(self, rows: Sequence[Row], steps: list[int]) -> None:
        self.rows, self.steps = rows, steps

    def chart(self, id: str, title: str, names: Sequence[str], note: str = "", **layout: Any) -> Chart:
        curves = [self.curve(name) for name in names]
        shown = [curve for curve in curves if any(value is not None for value in curve["y"])]
        return Chart(id, title, shown, {"xaxis": {"title": {"text": "step"}}, **layout}, note)

    def curve(self, name: str) -> dict[str, Any]:
        """A key of the rows; `a.b` is key b of object a."""
        outer, _, inner = name.partition(".")
        values = [row.get(outer, {}).get(inner) if inner else row.get(outer) for row in self.rows]
        sparse = sum(value is not None for value in values) < len(values)
        mode = "lines+markers" if sparse or len(values) < 40 else "lines"
        return {"x": self.steps, "y": values, "name": inner or outer, "mode": mode, "connectgaps": True}


def _reward(draw: _Curves) -> Chart:
    chart = draw.chart("reward", "Reward", ("reward_mean", "reward_mean_unfiltered", "eval_reward_mean"))
    values = [row["reward_mean"] for row in draw.rows]
    smooth = []
    for end in range(1, len(values) + 1):
        known = [value for value in values[max(0, end - WINDOW) : end] if value is not None]
        smooth.append(statistics.fmean(known) if known else None)
    name = f"mean of {WINDOW} steps"
    chart.data.append({"x": draw.steps, "y": smooth, "name": name, "mode": "lines", "line": {"width": 3}})
    return chart


def _piece(config: Mapping[str, Any], kind: str, name: str) -> Mapping[str, Any] | None:
    pieces = config.get("objective", {}).get(kind, [])
    return next((piece for piece in pieces if piece.get("name") == name), None)


def _band(config: Mapping[str, Any]) -> tuple[float, float] | None:
    erc = _piece(config, "gates", "erc")
    return (erc.get("low", 0.95), erc.get("high", 1.05)) if erc is not None else None


def _band_note(config: Mapping[str, Any]) -> str:
    band = _band(config)
    return f"Share of tokens whose entropy ratio is between {band[0]:g} and {band[1]:g}, below, above." if band else ""


def _entropy(draw: _Curves, config: Mapping[str, Any]) -> Chart:
    """With the ratio's band around it where ERC is on, and the target where one is set."""
    chart = draw.chart("entropy", "Entropy, nats a token", ("entropy", "eval_entropy"), yaxis={"rangemode": "tozero"})
    if not chart.data:
        return chart
    entropy = chart.data[0]["y"]
    if band := _band(config):
        for factor, fill in ((band[0], None), (band[1], "tonexty")):
            chart.data.append(
                {
                    "x": draw.steps, "y": [None if value is None else value * factor for value in entropy],
                    "name": f"ERC x{factor:g}", "mode": "lines", "line": {"width": 0}, "fill": fill,
                    "fillcolor": "rgba(120,120,120,.25)", "showlegend": fill is not None, "hoverinfo": "skip",
                }
            )  # fmt: skip
        chart.note = "Shaded: the ratios of a token's entropy that ERC lets train."
    target = (_piece(config, "regularisers", "adaptive-entropy") or {}).get("target")
    if isinstance(target, int | float):
        line = {"dash": "dash"}
        chart.data.append(
            {"x": draw.steps, "y": [target] * len(entropy), "name": "target", "mode": "lines", "line": line}
        )
    return chart


def _drafters(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["drafters"]))


def _by_drafter(
    rows: Sequence[Row], steps: list[int], id: str, title: str, value: Callable[[Mapping[str, int]], float]
) -> Chart:
    data = []
    for name in _drafters(rows):
        counts = [row["drafters"].get(name) for row in rows]
        y = [value(count) if count and count["drafted"] else None for count in counts]
        data.append({"x": steps, "y": y, "name": name, "mode": "lines"})
    return Chart(id, title, data, {"yaxis": {"range": [0, 1.02]}, "xaxis": {"title": {"text": "step"}}})


def _shares(rows: Sequence[Row], steps: list[int]) -> Chart:
    """Drafted tokens by drafter, stacked."""
    data = [
        {
            "x": steps, "y": [row["drafters"].get(name, {}).get("drafted", 0) for row in rows], "name": name,
            "mode": "lines", "stackgroup": "drafted",
        }
        for name in _drafters(rows)
    ]  # fmt: skip
    return Chart("drafted", "Tokens drafted, by drafter", data, {"xaxis": {"title": {"text": "step"}}})


def _depth(rows: Sequence[Row]) -> Chart:
    """In the first and the last fifth of the run."""
    part = max(1, len(rows) // 5)
    data = []
    for label, chosen in (("first steps", rows[:part]), ("last steps", rows[-part:])):
        for name in _drafters(rows):
            found = [row.get("acceptance_by_depth", {}).get(name, []) for row in chosen]
            deepest = max((len(values) for values in found), default=0)
            y = [statistics.fmean(v[depth] for v in found if depth < len(v)) for depth in range(deepest)]
            trace = {"x": list(range(1, deepest + 1)), "y": y, "name": f"{name}, {label}", "mode": "lines+markers"}
            data.append(trace if label == "last steps" else {**trace, "line": {"dash": "dot"}})
    layout = {"xaxis": {"title": {"text": "position in the draft"}}, "yaxis": {"range": [0, 1.02]}}
    return Chart("depth", "Acceptance by depth", data, layout, "Of drafts whose tokens before were all accepted.")


def _against_entropy(rows: Sequence[Row]) -> Chart:
    data = [
        {
            "x": [row["entropy"] for row in rows], "y": [row["acceptance_rate"] for row in rows], "mode": "markers",
            "text": [f"step {row['step']}" for row in rows], "name": "a step",
            "marker": {"color": [row["step"] for row in rows], "showscale": True},
        }
    ]  # fmt: skip
    layout = {"xaxis": {"title": {"text": "entropy, nats a token"}}, "yaxis": {"title": {"text": "acceptance"}},
              "hovermode": "closest"}  # fmt: skip
    return Chart(
        "acceptance-entropy", "Acceptance against entropy", data, layout, "A point a step; its colour is the step."
    )


def _time(rows: Sequence[Row], steps: list[int], key: str, id: str, title: str) -> Chart:
    states = list(dict.fromkeys(state for row in rows for state in row.get(key, {})))
    data = [
        {"x": steps, "y": [row.get(key, {}).get(state, 0.0) for row in rows], "name": state, "type": "bar"}
        for state in states
    ]
    return Chart(id, title, data, {"barmode": "stack", "bargap": 0, "xaxis": {"title": {"text": "step"}}})


def _queue(rows: Sequence[Row], steps: list[int]) -> Chart:
    data = [
        {
            "x": steps,
            "y": [row.get("samples", {}).get(key) for row in rows],
            "name": key.replace("_", " "),
            "mode": "lines",
        }
        for key in ("in_flight", "buffered")
    ]
    return Chart("queue", "Samples generating and waiting", data, {"xaxis": {"title": {"text": "step"}}})


def _dropped(rows: Sequence[Row], steps: list[int]) -> Chart:
    reasons = list(dict.fromkeys(reason for row in rows for reason in row["dropped_total"]))
    data = [
        {"x": steps, "y": [row["dropped_total"].get(reason, 0) for row in rows], "name": reason, "mode": "lines"}
        for reason in reasons
    ]
    return Chart("dropped", "Samples dropped so far, by reason", data, {"xaxis": {"title": {"text": "step"}}})
