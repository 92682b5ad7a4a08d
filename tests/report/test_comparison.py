"""Outputs side by side, as they are shown: in 80 columns, and as a page whose picture is right."""

from __future__ import annotations

import copy
import io
from typing import Any

from report.test_page import text_of
from rich.console import Console

from compressor.report.comparison import comparison_page, comparison_tables, picture
from compressor.report.terminal import print_comparison

Json = dict[str, Any]


def output(name: str, num_bytes: int, kl: float, *, on_front: bool) -> Json:
    fidelity = {
        text: {
            **{"kl": kl, "kl_error": 0.01, "agreement": 0.9, "agreement_error": 0.02},
            **{"delta_nll": -0.05, "delta_nll_error": None},
        }
        for text in ("code", "prose")
    }
    flips = {"gained": 3, "lost": 1, "both_right": 4, "both_wrong": 2, "p_value": 0.6, "difference": 0.2, "error": 0.19}
    return {
        "name": name,
        "bytes": num_bytes,
        "bits": num_bytes * 8 / 1000,
        "mean": fidelity["code"],
        "fidelity": fidelity,
        "tasks": {"arc": {"metrics": {"acc": {"value": 0.7, "standard_error": 0.1}}}},
        "paired": {"arc": {"acc": flips}},
        "on_front": on_front,
    }


FOUND: Json = {
    "original": {
        **{"reference": "demo", "parameters": 1000, "bytes": 2000, "bits": 16.0},
        "tasks": {"arc": {"metrics": {"acc": {"value": 0.5, "standard_error": 0.1}}}},
    },
    "outputs": [
        output("quarter-dropped-then-four-bits", 500, 0.1, on_front=True),
        output("half<b>", 1000, 1.0, on_front=False),
    ],
}
SPEED = {"speed": {"prefill_ratio": {"median": 1.25, "min": 1.1, "max": 1.3}, "decode_reason": "no cache"}}


def lines(found: Json, width: int = 80) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    print_comparison(found, console)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_in_80_columns() -> None:
    shown = lines(FOUND)
    assert max(map(len, shown)) <= 80
    rows = [line.split() for line in shown if " kB " in line or "500 B" in line]
    assert rows == [
        ["the", "original", "2.00", "kB", "16.00", "0", "100", "0"],
        ["quarter-dropped-then-four-bits", "*", "500", "B", "4.00", "0.1000", "90.0", "−0.0500"],
        ["half<b>", "1.00", "kB", "8.00", "1.0000", "90.0", "−0.0500"],
    ]
    assert "* no other is both smaller and closer to the original." in shown


def test_what_is_shown_of_texts_tasks_and_speed() -> None:
    tables = {table.title: table for table in comparison_tables(FOUND)}
    assert list(tables) == [
        "Beside demo",
        "KL to the original, nats a token",
        "Same likeliest token, %",
        "Loss, nats a token",
        "Tasks",
    ]
    assert tables["KL to the original, nats a token"].rows[1] == ("half<b>", "1.0000 ± 0.0100", "1.0000 ± 0.0100")
    assert tables["Loss, nats a token"].rows[1] == ("half<b>", "−0.0500", "−0.0500")
    assert tables["Tasks"].rows[0] == ("the original", "50.0 ± 10.0")
    assert tables["Tasks"].rows[2] == ("half<b>", "70.0 ± 10.0\n+20.0 ± 19.0")
    found = copy.deepcopy(FOUND)
    found["outputs"][1] |= SPEED
    assert comparison_tables(found)[-1].rows == [("half<b>", "×1.25 [1.10–1.30]", "–")]


def test_without_text_only_bytes_are_shown() -> None:
    found = copy.deepcopy(FOUND)
    for one in found["outputs"]:
        one |= {"mean": None, "fidelity": {}, "on_front": False}
    tables = comparison_tables(found)
    assert [table.title for table in tables] == ["Beside demo", "Tasks"]
    assert tables[0].rows[2] == ("half<b>", "1.00 kB", "8.00", "–", "–", "–")
    assert "data-chart" not in comparison_page(found)


def test_the_picture_is_right() -> None:
    """Two that have a logarithm, one of them on the line that no other beats; what chance has lost; the original."""
    found = copy.deepcopy(FOUND)
    found["outputs"][0]["random"] = [0.7, 0.5, 0.9]
    drawn = picture(found)
    assert drawn is not None
    assert (drawn["x"], drawn["log"]) == ("bytes", True)
    assert [(one["kind"], one["points"]) for one in drawn["series"]] == [
        ("line", [[500, 0.1, "quarter-dropped-then-four-bits"]]),
        ("points", [[1000, 1.0, "half<b>"]]),
        ("band", [[500, 0.5, 0.9]]),
        ("mark", [[2000, 0, "the original"]]),
    ]


def test_the_page_is_whole() -> None:
    text = text_of(comparison_page(FOUND))
    for said in ("2 outputs of demo", "half<b>", "1.00 kB", "+20.0 ± 19.0", "by bytes on disk"):
        assert said in text
