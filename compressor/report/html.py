"""The record as one HTML page: what the terminal shows, and plots by layer. Needs no network, script or other file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from compressor.report.figures import as_yaml, decision_notes, random_table, shown_layers, summary_tables
from compressor.report.tables import Table
from compressor.wording import counted

Json = Mapping[str, Any]

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
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        record=record,
        title=str(record.get("output") or record["model"]["reference"]).rstrip("/").rsplit("/", 1)[-1],
        tables=summary_tables(record),
        passes=passes,
        recipe=as_yaml(record["recipe"]) if "recipe" in record else "",
        versions=record.get("versions", {}),
    )


def summary(record: Json) -> str:
    """The tables of the page alone, for a notebook."""
    compared = [random_table(done) for done in record.get("passes", [])]
    tables = [*summary_tables(record), *(table for table in compared if table.rows)]
    return Markup("\n").join(tables) or str(escape(record["model"]["reference"]))


def _pass(done: Json, record: Json) -> dict[str, Any]:
    layers = shown_layers(done, record)
    keys = [key for key in dict.fromkeys(key for one in layers.values() for key in one) if _is_shown(layers, key)]
    rows = [[path, *(_text(one.get(key)) for key in keys)] for path, one in layers.items()]
    return {
        "method": done["method"],
        "options": {key: value for key, value in done.get("options", {}).items() if value not in (None, {}, [])},
        "layers": Table("", ("layer", *keys), rows),
        "counted": counted(len(rows), "layer"),
        "notes": decision_notes(done),
        "random": random_table(done),
        "plots": [(title, Markup(drawn)) for title, drawn in _plots(layers, record)],
    }


def _is_shown(layers: Json, key: str) -> bool:
    """Numbers, texts and ids; not norms of every expert, and not mappings, which have plots of their own."""
    values = [one[key] for one in layers.values() if key in one]
    return key != "expert_norms" and not any(isinstance(value, Mapping) for value in values)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) if len(value) <= 64 else f"{len(value)} of them"
    return "–" if value is None else str(value)


def _plots(layers: Json, record: Json) -> list[tuple[str, str]]:
    """What a pass did, layer by layer: experts per token where it skips, losses where it prunes."""
    plots = []
    if any("mean_experts" in one for one in layers.values()):
        before, used = (
            ((record.get("evaluation") or {}).get(side) or {}).get("experts_per_token") or {}
            for side in ("before", "after")
        )
        series = [
            *(
                Series(f"before: {name}", [by.get(path) for path in layers], "line")
                for name, by in [*before.items()][:1]
            ),
            Series("used on calibration text", [one.get("mean_experts") for one in layers.values()]),
            Series("on held-out text", [one.get("held_out", {}).get("mean_experts") for one in layers.values()]),
            *(Series(f"counted: {name}", [by.get(path) for path in layers], "line") for name, by in used.items()),
        ]
        plots.append(("experts per token", plot("experts per token", list(layers), series)))
    if any("relative_loss" in one for one in layers.values()):
        domains = list(dict.fromkeys(name for one in layers.values() for name in one.get("domains", {})))
        series = [Series("relative loss", [one.get("relative_loss") for one in layers.values()])]
        for name in domains:
            series.append(Series(name, [one.get("domains", {}).get(name) for one in layers.values()], "line"))
        plots.append(("relative loss", plot("relative loss", list(layers), series)))
    return plots


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
