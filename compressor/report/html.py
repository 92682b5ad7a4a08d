"""The record as one HTML page: what the terminal shows, and plots by layer. Needs no network, script or other file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from compressor.report.description import Json
from compressor.report.figures import (
    as_yaml,
    decision_notes,
    decision_table,
    random_table,
    samples,
    shown_columns,
    summary_tables,
)
from compressor.report.tables import Table
from compressor.report.verdict import verdict
from compressor.wording import counted

_TEMPLATE = Path(__file__).with_name("page.html.jinja")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 860, 260, 52, 46, 14
_COLOURS = ("#3266a8", "#d1662f", "#3c8a57", "#8a5aa8", "#a83252", "#5f6b73")


@dataclass(frozen=True)
class Series:
    """One value for each layer; None where there is none. `kind`: bars stand side by side, a line joins points."""

    name: str
    values: Sequence[float | None]
    kind: str = "bars"


def page(record: Json) -> str:
    """The whole page, as text. Everything from the record is escaped."""
    passes = [_pass(done, record) for done in record.get("passes", [])]
    return _rendered(
        record=record,
        title=str(record.get("output") or record["model"]["reference"]).rstrip("/").rsplit("/", 1)[-1],
        verdict=verdict(record),
        tables=summary_tables(record),
        samples=samples(record),
        passes=passes,
        recipe=as_yaml(record["recipe"]) if "recipe" in record else "",
        versions=record.get("versions", {}),
    )


def picture_page(title: str, tables: Sequence[Table], pictures: Sequence[tuple[str, str]]) -> str:
    """A page of tables, and of SVGs with what they are called."""
    return _rendered(title=title, tables=tables, pictures=[(name, Markup(drawn)) for name, drawn in pictures])


def _rendered(**given: Any) -> str:
    return _template().render(**given)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))


def summary(record: Json) -> str:
    """The tables of the page alone, for a notebook."""
    tables = (*summary_tables(record), *map(random_table, record.get("passes", [])))
    return Markup("\n").join(table for table in tables if table.rows) or str(escape(record["model"]["reference"]))


def _pass(done: Json, record: Json) -> dict[str, Any]:
    layers = decision_table(done, record, details=True)
    return {
        "method": done["method"],
        "options": {key: value for key, value in done.get("options", {}).items() if value not in (None, {}, [])},
        "layers": layers,
        "counted": counted(len(layers.rows), "layer"),
        "notes": decision_notes(done),
        "random": random_table(done),
        "plots": [(title, Markup(drawn)) for title, drawn in _plots(done, record)],
    }


def _plots(done: Json, record: Json) -> Iterator[tuple[str, str]]:
    """The columns that are to be drawn, layer by layer: two as bars, of more all but the first as lines. Beside
    experts per token as the calibration text tells them, those that were counted while the model was measured.
    """
    layers, by_plot = list(done["decision"].get("layers", {})), dict[str, list[Any]]()
    for column, values in shown_columns(done, record):
        numbers = [value if isinstance(value, int | float) else None for value in values]
        by_plot.setdefault(column.plot, []).append((column.heading, numbers))
    by_plot.pop("", None)
    for title, drawn in by_plot.items():
        series = [
            Series(name, values, "bars" if number == 0 or len(drawn) == 2 else "line")
            for number, (name, values) in enumerate(drawn)
        ]
        if title == "experts per token":
            before, after = _counted(record, "before", layers), _counted(record, "after", layers)
            series = [*before[:1], *series, *after]
        yield title, plot(title, layers, series)


def _counted(record: Json, side: str, layers: Sequence[str]) -> list[Series]:
    """Experts that a token used on each text that was measured."""
    used = ((record.get("evaluation") or {}).get(side) or {}).get("experts_per_token") or {}
    said = {"before": "before", "after": "counted"}[side]
    return [Series(f"{said}: {name}", [by.get(path) for path in layers], "line") for name, by in used.items()]


def plot(title: str, labels: Sequence[str], series: Sequence[Series]) -> str:
    """An SVG of values by layer. Series without any value are left out; the axis begins at 0."""
    shown = [one for one in series if any(value is not None for value in one.values)]
    top = _round_up(max((value for one in shown for value in one.values if value is not None), default=1.0))
    slot = (_WIDTH - _LEFT - 10) / max(1, len(labels))
    bars = [one for one in shown if one.kind == "bars"]
    rows = math.ceil(len(shown) / 3)
    height = _HEIGHT + 18 * rows

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - value / top)

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{_escape(title)} by layer">',
        f"<title>{_escape(title)} by layer</title>",
    ]
    for step in range(5):
        mark = top * step / 4
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 10}" y1="{y(mark):.1f}" y2="{y(mark):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y(mark) + 4:.1f}" text-anchor="end">{mark:.3g}</text>')
    every = max(1, math.ceil(len(labels) / 24))
    for number, label in enumerate(labels):
        if number % every == 0:
            middle = _LEFT + slot * (number + 0.5)
            at = f'x="{middle:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle"'
            parts.append(f"<text {at}>{_escape(_short(label))}</text>")
    for place, one in enumerate(shown):
        colour = _COLOURS[place % len(_COLOURS)]
        if one.kind == "bars":
            width = slot * 0.8 / len(bars)
            for number, value in enumerate(one.values):
                if value is not None:
                    x = _LEFT + slot * (number + 0.1) + width * bars.index(one)
                    parts.append(
                        f'<rect x="{x:.1f}" y="{y(value):.1f}" width="{max(0.5, width - 0.5):.1f}" '
                        f'height="{y(0) - y(value):.1f}" fill="{colour}">'
                        f"<title>{_escape(labels[number])}, {_escape(one.name)}: {value:.4g}</title></rect>"
                    )
        else:
            points = [
                (_LEFT + slot * (number + 0.5), y(value))
                for number, value in enumerate(one.values)
                if value is not None
            ]
            joined = " ".join(f"{x:.1f},{height_:.1f}" for x, height_ in points)
            parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
            parts += [f'<circle cx="{x:.1f}" cy="{height_:.1f}" r="2.5" fill="{colour}"/>' for x, height_ in points]
        x, legend_y = _LEFT + (place % 3) * 270, _HEIGHT - 6 + 18 * (place // 3)
        parts.append(f'<rect x="{x}" y="{legend_y - 9}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 15}" y="{legend_y}">{_escape(one.name)}</text>')
    return "\n".join([*parts, "</svg>"])


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 5, 8 times a power of ten."""
    if value <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return next((step * unit for step in (1, 2, 4, 5, 8) if value <= step * unit * (1 + 1e-9)), 10 * unit)


def _short(path: str) -> str:
    return next((part for part in path.split(".") if part.isdecimal()), path)


def _escape(text: str) -> str:
    return str(escape(text))
