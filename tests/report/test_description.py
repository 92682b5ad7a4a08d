"""How decisions are shown: all of them by default, our own methods' as they say; ids as the original model has them."""

from __future__ import annotations

from typing import Any

import pytest
from report.test_report import with_description

from compressor.plugin import Column, Decision, Description
from compressor.plugins import load_plugins
from compressor.report.figures import decision_notes, decision_table, shown_columns

PATHS = ("l.0", "l.1")


def entry(*layers: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"method": "mine", "decision": {"layers": dict(zip(PATHS, layers, strict=False))}, **others}


def test_by_default_all_of_a_decision_is_shown() -> None:
    """Numbers and words before lists, what stands in mappings on its own, and what is dropped where some are kept."""
    first = {"kept": [0, 1, 2, 5], "lost": 0, "way_of_it": "greedy", "of": {"prose": 0.12345, "code": None}}
    second = {"kept": [1], "lost": 12.34567, "sure": True, "of": {}, "pairs": [[0, 1, 2], [4]]}
    table = decision_table(entry(first, second))
    headings = [*("layer", ">lost", "way of it", ">of prose", "sure"), *("kept", "pairs")]
    assert list(table.columns) == headings
    assert table.rows == [
        ("l.0", "0", "greedy", "0.1235", "–", "0–2, 5", "–"),
        ("l.1", "12.35", "–", "–", "yes", "1", "0–2; 4"),
    ]
    record = {"layers": [{"path": path, "num_experts": 6, "top_k": 2} for path in PATHS]}
    assert [
        values for column, values in shown_columns(entry(first, second), record) if column.heading == "dropped"
    ] == [[[3, 4], [0, 2, 3, 4, 5]]]
    assert decision_table(entry()).rows == decision_table(entry({}, {})).rows == []
    assert list(decision_notes(entry(first))) == []


def test_a_description_by_hand() -> None:
    """Columns in its order, some only where there is room, ids of its own lists, those that no layer has left out."""
    columns = [Column("of mean", "μ"), Column("groups"), Column("why", detail=True), Column("nothing")]
    made = Description(columns, ["as it is"])
    layer = {"groups": [[0, 2], [1]], "ids": [0], "others": [0], "of": {"mean": 2.0}, "why": "so"}
    described = made.to_json() | {"ids": ["groups", "ids"]}
    done = entry(layer, description=described, original_ids={"l.0": [3, 5, 9]})
    assert described["columns"][:2] == [{"key": "of mean", "title": "μ"}, {"key": "groups"}]
    table = decision_table(done)
    assert (list(table.columns), table.rows) == (["layer", ">μ", "groups"], [("l.0", "2", "3, 9; 5")])
    assert decision_table(done, details=True).rows == [("l.0", "2", "3, 9; 5", "so")]
    assert list(decision_notes(done))[1:] == ["as it is"]


def test_lists_that_are_too_long_are_counted() -> None:
    layer = {"kept": [*range(0, 20, 2)], "sizes": [*range(0, 20, 2)], "clusters": [[0, 1], [2, 3]]}
    assert decision_table(entry(layer), room=5).rows == [("l.0", "10 experts", "10 values", "2 values")]
    assert decision_table(entry({"kept": [*range(1000)]}), room=5).rows == [("l.0", "0–999")]


@pytest.mark.parametrize("domains", [{}, {"domains": {"code": 0.5, "prose": 0.25}}])
def test_pruning(domains: dict[str, Any]) -> None:
    """Where each domain has a column, sums over all of them are for the page."""
    layer = {"kept": [0, 2], "dropped": [1], "loss": 4.0, "relative_loss": 0.25, "search": "greedy", "swaps": 3}
    layer |= {"uncovered": 0.0125, "loss_before_swaps": 5.0, **domains}
    odd = layer | {"unreached": [1], "super_experts": [1], "protected_super_experts": []}
    done = with_description(entry(layer, odd, method="expert_pruning", original_ids={"l.1": [4, 5, 6]}), keep=2)
    sums, of_each = ([], [">code", ">prose"]) if domains else ([">loss", ">swaps"], [])
    names = [*sums[:1], ">relative loss", *sums[1:], *of_each, "kept", "dropped"]
    assert list(decision_table(done).columns) == ["layer", *names]
    details = {"search", ">uncovered", ">loss before swaps", "unreached", "super experts", "protected super experts"}
    assert set(decision_table(done, details=True).columns) == {"layer", ">loss", ">swaps", *names, *details}
    assert decision_table(done).rows[1][-2:] == ("4, 6", "5")
    assert list(decision_notes(done))[1:] == [
        "no token of the calibration text reached 1 expert, so nothing is known of it; a criterion drops it first "
        "(l.1: 5)",
        "super experts, whose outputs are extreme: l.1: 5; dropped of these, which can ruin a model: l.1: 5",
        "up to 1.25% of a layer's tokens have fewer known ranks than they choose experts",
    ]


def test_experts_that_no_token_reached_are_named_for_three_layers() -> None:
    layers = {f"l.{number}": {"kept": [0], "dropped": [1, 2], "unreached": [1, 2]} for number in range(5)}
    done = {"method": "task_pruning", "decision": {"layers": layers}}
    (note,) = decision_notes(with_description(done, keep=2, task="t"))
    assert note == (
        "no token of the calibration text reached 10 experts, so nothing is known of them; a criterion drops them "
        "first (l.0: 1, 2; l.1: 1, 2; l.2: 1, 2; and 2 more layers)"
    )


def test_skipping() -> None:
    skipped = {"rule": "ratio", "renormalise": True, "beta": 0.25, "mean_experts": 1.5, "kept_mass": 0.9}
    skipped |= {"relative_loss": 0.125, "held_out": {"mean_experts": 1.75, "kept_mass": 0.8}}
    decision = {"mean_experts": 1.75, "held_out_mean_experts": 1.8}
    done = entry(skipped, {"rule": None, "mean_experts": 2.0, "kept_mass": 1.0}, method="dynamic_skipping")
    done["decision"] |= decision
    done = with_description(done)
    headings = [">β", ">experts a token", ">on held-out text", ">mass kept", ">relative loss"]
    table = decision_table(done)
    assert list(table.columns) == ["layer", *headings]
    assert table.rows == [("l.0", "0.25", "1.5", "1.75", "0.9", "0.125"), ("l.1", "–", "2", "–", "1", "–")]
    assert list(decision_table(done, details=True).columns) == ["layer", "rule", *headings, "renormalise"]
    assert list(decision_notes(done)) == [
        "by the rule ratio, in 1 of 2 layers; a token uses 1.75 experts on calibration text, 1.8 experts on held-out "
        "text, mean of the layers"
    ]
    fixed = {"rule": "top_k", "top_k": 4, "normalise_over": 6, "mean_experts": 4.0}
    (note,) = decision_notes(with_description(entry(fixed, method="dynamic_skipping"), top_k=4))
    assert note == "by the 4 largest normalised over 6, in 1 of 1 layer"


def test_merging() -> None:
    layer = {"kept": [0, 2], "dropped": [1], "clusters": [[0, 1], [2]]}
    done = with_description(entry(layer, method="expert_merging", original_ids={"l.0": [1, 3, 5]}), keep=2)
    assert decision_table(done).rows == [("l.0", "1, 5", "3", "1, 3; 5")]


def test_sparse_and_scaled_layers() -> None:
    done = with_description(entry({"without_tokens": [0, 2]}, method="wanda", original_ids={"l.0": [1, 3, 5]}))
    assert decision_table(done).rows == [("l.0", "1, 5")]
    everywhere = with_description(entry({"without_tokens": []}, method="wanda", original_ids={"l.0": [1, 3, 5]}))
    assert decision_table(everywhere).rows == []
    assert list(decision_notes(everywhere)) == ["2:4 of each output's weights are zero, as numbers: no bytes are saved"]
    scaled = {"loss": 0.5, "scaled": 0.25, "smallest": 0.5, "largest": 1.25, "scales": [1.25, 0.5]}
    left = {"loss": 0.5, "scaled": 0.5, "scales": None}
    done = with_description(entry(scaled, left, method="output_scale"))
    assert decision_table(done).rows == [("l.0", "0.5", "0.25", "0.5", "1.25"), ("l.1", "0.5", "0.5", "–", "–")]
    assert decision_table(done, details=True).rows[0][-1] == "1.25; 0.5"
    assert list(decision_notes(done)) == ["in 1 of 2 layers the loss does not fall, and nothing changes"]


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("expert_merging", {"keep": 2}, "averages experts, and random clusters cannot be measured without editing"),
        ("dynamic_skipping", {}, "draws nothing at random"),
    ],
)
def test_methods_of_which_chance_makes_nothing(method: str, options: dict[str, Any], reason: str) -> None:
    made = load_plugins().methods[method]
    answer = made(made.options_type(**options)).control(Decision({"layers": {}}), [], 0)
    assert isinstance(answer, str)
    assert answer.startswith(reason)
