"""A page of charts, tables and samples as one HTML file, with plotly.js inside it.

Plotly draws from plain data, so that the file is made in no time and a reader can zoom, hover and hide curves without a
server; inlined, it makes the file 5 MB, and in exchange it opens anywhere and for ever.
"""

import html
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

MALFORMED = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError)
"""raised by what reads a file whose JSON is not of the form that is expected"""


@dataclass
class Chart:
    """A plotly figure: `data` and `layout` as plotly.js takes them."""

    id: str
    title: str
    data: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    """what to see in it, one sentence"""

    @property
    def empty(self) -> bool:
        """Whether no curve has a value."""
        return not any(any(v is not None for v in _values(trace)) for trace in self.data)


@dataclass
class Page:
    title: str
    subtitle: str
    figures: list[tuple[str, str]]
    """(name, value) of the summary"""
    charts: list[Chart]
    sections: list[tuple[str, str]] = field(default_factory=list)
    """(heading, HTML) below the charts"""
    scalars: dict[str, list[float | None]] = field(default_factory=dict)
    """name -> values by step, for the chart whose curve the reader chooses"""
    steps: list[int] = field(default_factory=list)


def render(page: Page) -> str:
    """The whole file."""
    from plotly.offline import get_plotlyjs

    charts = [chart for chart in page.charts if not chart.empty]
    data = {
        "charts": {chart.id: {"data": chart.data, "layout": chart.layout} for chart in charts},
        "scalars": page.scalars,
        "steps": page.steps,
    }
    folder = files("pipeline.telemetry.report")
    figures = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in page.figures)
    sections = "".join(f"<section><h2>{text(heading)}</h2>{body}</section>" for heading, body in page.sections)
    chooser = (
        '<section><h2>Any metric</h2><select id="metric" aria-label="metric"></select>'
        '<div class="plot" id="any-metric"></div></section>'
        if page.scalars
        else ""
    )
    return "\n".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{text(page.title)}</title><style>{(folder / 'report.css').read_text()}</style>",
            f"<script>{get_plotlyjs()}</script></head><body>",
            f"<header><h1>{text(page.title)}</h1><p>{text(page.subtitle)}</p></header>",
            f'<dl class="figures">{figures}</dl>',
            f'<div class="charts">{"".join(_chart(chart) for chart in charts)}</div>{chooser}{sections}',
            f'<script type="application/json" id="data">{_json(data)}</script>',
            f"<script>{(folder / 'report.js').read_text()}</script></body></html>",
        )
    )


def text(value: object) -> str:
    """For HTML: what a model or a file said must not become markup."""
    return html.escape(str(value))


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows with the same keys, more or less."""
    known = list(rows)
    columns = list(dict.fromkeys(key for row in known for key in row))
    head = "".join(f"<th>{text(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{text(_cell(row.get(column)))}</td>" for column in columns) + "</tr>" for row in known
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def definitions(values: Mapping[str, Any]) -> str:
    """Names and values below each other."""
    return table({"": name, "value": value} for name, value in values.items())


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value) if isinstance(value, dict | list) else str(value)


def _chart(chart: Chart) -> str:
    note = f"<p>{text(chart.note)}</p>" if chart.note else ""
    return f'<figure><h2>{text(chart.title)}</h2>{note}<div class="plot" id="{text(chart.id)}"></div></figure>'


def _json(data: Any) -> str:
    """Inside a script element: no tag can begin in it. A curve has a gap where a value is not finite."""
    return json.dumps(_finite(data), allow_nan=False).replace("<", "\\u003c")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _values(trace: Mapping[str, Any]) -> list[Any]:
    values = trace.get("y", trace.get("z", trace.get("values", [])))
    return list(values)
