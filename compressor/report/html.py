"""The record as one HTML page: what the terminal shows, a map of the experts, charts. It needs no network and no other
file; a script in it draws, and what it draws stands in tables too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from compressor.report import charts
from compressor.report.description import Json
from compressor.report.figures import as_yaml, decision_notes, decision_table, random_table, samples, summary_tables
from compressor.report.tables import Table
from compressor.report.verdict import verdict


def page(record: Json) -> str:
    """The whole page, as text. Everything from the record is escaped."""
    recipe = record.get("recipe_as_written", record.get("recipe"))
    return _rendered(
        record=record,
        title=str(record.get("output") or record["model"]["reference"]).rstrip("/").rsplit("/", 1)[-1],
        verdict=verdict(record),
        tables=summary_tables(record),
        experts=charts.experts(record),
        samples=samples(record),
        recipe=as_yaml(recipe) if recipe else "",
    )


def picture_page(title: str, tables: Sequence[Table], pictures: Iterable[Json]) -> str:
    return _rendered(title=title, tables=tables, pictures=[*pictures])


def _rendered(**given: Any) -> str:
    return _template().render(**given)


@cache
def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=loader)
    environment.globals.update(
        by_layer=charts.by_layer,
        quality=charts.quality,
        decision_notes=decision_notes,
        decision_table=decision_table,
        random_table=random_table,
    )
    return environment.get_template("page.html.jinja")


def summary(record: Json) -> str:
    """The tables of the page alone, for a notebook."""
    tables = (*summary_tables(record), *map(random_table, record.get("passes", [])))
    return Markup("\n").join(table for table in tables if table.rows) or str(escape(record["model"]["reference"]))
