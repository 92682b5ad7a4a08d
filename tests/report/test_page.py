"""The HTML report: every figure is there, everything is escaped, plots are right to the pixel."""

from __future__ import annotations

import copy
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest
from report.test_report import RECORD, with_description

from compressor.report.html import Series, page, plot

SKIPPING: dict[str, Any] = with_description(
    {
        "method": "dynamic_skipping",
        "options": {"mean_experts": 1.5, "rule": None},
        "decision": {
            "layers": {
                f"model.layers.{number}.mlp": {
                    "rule": "contribution",
                    "beta": 0.25,
                    "renormalise": True,
                    "expert_norms": [1.0] * 8,
                    "mean_experts": 1.5,
                    "relative_loss": 0.1,
                    "held_out": {"mean_experts": 1.6},
                }
                for number in range(3)
            }
        },
    }
)


class _Text(HTMLParser):
    """The text of a page, and whether its tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "br", "line", "rect", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "rect", "circle", "polyline") or self.open[-1] == tag:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def text_of(drawn: str) -> str:
    parser = _Text()
    parser.feed(drawn)
    assert parser.open == []
    return parser.text


def record(**changes: Any) -> dict[str, Any]:
    layers = [{"path": f"model.layers.{number}.mlp", "num_experts": 8, "top_k": 2} for number in range(3)]
    return {**copy.deepcopy(RECORD), "layers": layers, "passes": [*RECORD["passes"], SKIPPING], **changes}


def test_what_a_reader_finds() -> None:
    text = text_of(page(record()))
    for wanted in (
        "mistralai/Mixtral-8x7B-v0.1",
        "expert_pruning, dynamic_skipping",
        "Figures",
        "± one standard error.",
        "mean_experts: 1.5",
        "experts per token, by layer",
        "on held-out text",
        "model.layers.1.mlp",
        "contribution",
    ):
        assert wanted in text, wanted
    assert "expert_norms" not in text  # eight numbers for each layer are for the record
    assert "rule: None" not in text


def test_everything_is_escaped() -> None:
    spoilt = record(output="<script>alert(1)</script>")
    spoilt["passes"][1] = copy.deepcopy(SKIPPING)
    spoilt["passes"][1]["method"] = "<b>&"
    layers = spoilt["passes"][1]["decision"]["layers"]
    layers["<i>layer</i>"] = layers.pop("model.layers.2.mlp")
    drawn = page(spoilt)
    assert "<script" not in drawn
    assert "<i>" not in drawn
    assert "<b>" not in drawn
    text_of(drawn)


def test_needs_nothing_from_elsewhere() -> None:
    drawn = page(record())
    assert not re.search(r"https?://|src=|<link|@import", drawn)


def test_a_record_without_evaluation() -> None:
    bare = record()
    bare.pop("evaluation", None)
    assert "Figures" not in text_of(page(bare))


def test_bars_by_hand() -> None:
    """Axis from 0 to 2 over 200 pixels: 1.5 is 150 high and ends at the axis."""
    svg = ElementTree.fromstring(
        plot("experts", ["model.layers.0.mlp", "model.layers.1.mlp"], [Series("used", [1.5, 2.0])])
    )
    bars = [one for one in svg.iter("rect") if one.find("title") is not None]
    assert [float(bar.get("height")) for bar in bars] == [150.0, 200.0]
    assert {round(float(bar.get("y")) + float(bar.get("height")), 3) for bar in bars} == {214.0}
    assert [bar.find("title").text for bar in bars] == [
        "model.layers.0.mlp, used: 1.5",
        "model.layers.1.mlp, used: 2",
    ]
    marks = [one.text for one in svg.iter("text")]
    assert marks[:5] == ["0", "0.5", "1", "1.5", "2"]
    assert {"0", "1", "used"} <= set(marks[5:])


def test_lines_leave_out_what_is_not_there() -> None:
    svg = ElementTree.fromstring(plot("loss", ["a", "b", "c"], [Series("one", [0.1, None, 0.3], "line")]))
    (line,) = svg.iter("polyline")
    assert len(line.get("points").split()) == 2
    assert len(list(svg.iter("circle"))) == 2


@pytest.mark.parametrize(("value", "top"), [(0.0, "1"), (0.03, "0.04"), (1.0, "1"), (1.1, "2"), (9.0, "10")])
def test_the_axis_ends_at_a_round_number(value: float, top: str) -> None:
    svg = ElementTree.fromstring(plot("x", ["a"], [Series("one", [value])]))
    assert [one.text for one in svg.iter("text")][4] == top


def test_series_without_values_are_left_out() -> None:
    assert "nothing" not in plot("x", ["a"], [Series("one", [1.0]), Series("nothing", [None])])


def test_many_layers_are_labelled_now_and_then() -> None:
    labels = [f"model.layers.{number}.mlp" for number in range(94)]
    svg = ElementTree.fromstring(plot("x", labels, [Series("one", [1.0] * 94)]))
    shown = [one.text for one in svg.iter("text")][5:-1]
    assert shown[:3] == ["0", "4", "8"]
    assert len(shown) == 24
