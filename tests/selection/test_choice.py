"""From figures to the experts that stay: by hand."""

from __future__ import annotations

import pytest
import torch

from compressor.observe.statistic import Gathered
from compressor.report.description import SEARCH_LOSS
from compressor.selection import choose
from compressor.selection.activation_sums import SUMS
from compressor.selection.choose import Fixed
from compressor.selection.criteria import Criterion
from compressor.selection.deciding import by_expert
from compressor.selection.layer_plan import LayerPlan
from compressor.selection.objective import Objective
from compressor.selection.options import SelectionOptions
from compressor.selection.scores import ChoiceError

NONE = Fixed()
THREE = [[0.0, 16.0, 5.0], [0.0, 0.0, 5.0]]
"""Squared errors of two batches without expert 0, 1 or 2: losses 0, 4 and 2√5 = 4.47; summed squares 0, 16 and 10."""


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def by_subsets(
    make_layer, squared_BS, *, num_experts=3, keep=2, fixed=NONE, domains=("a", "a"), blend="mean", **others
):
    layer = make_layer(num_experts, 1, **others)
    figures = {"subsets.squared_error": float64(squared_BS), "subsets.counts": torch.tensor([keep])}
    objective = Objective.of_batches(domains, float64([100.0] * len(domains)))
    found, cost = choose.by_subsets(layer, figures, keep, objective, fixed)
    return found, cost


# All sets --------------------------------------------------------------------------------------------------


def test_norms_of_batches_are_added_not_squared_errors(make_layer):
    found, cost = by_subsets(make_layer, [[16.0, 5.0], [0.0, 5.0]], num_experts=2, keep=1)
    # without expert 0: 4 + 0; without expert 1: √5 + √5 = 4.47, though 16 > 10
    assert (found["kept"], found["dropped"]) == ([1], [0])
    assert cost == found["loss"] == 4.0
    assert found["relative_loss"] == pytest.approx(0.2)  # of 10 + 10
    assert found["median_loss"] == pytest.approx((4 + 2 * 5**0.5) / 2)


def test_ties_go_to_the_first_set_in_order_of_dropped_ids(make_layer):
    found, _ = by_subsets(make_layer, [[7.0, 3.0, 3.0], [1.0, 2.0, 2.0]])
    assert found["dropped"] == [1]
    found, _ = by_subsets(make_layer, [[1.0, 1.0, 1.0]], domains=("a",))
    assert found["dropped"] == [0]


def test_protected_stay_and_forbidden_go(make_layer):
    assert by_subsets(make_layer, THREE)[0]["dropped"] == [0]
    assert by_subsets(make_layer, THREE, fixed=Fixed(protected=(0,)))[0]["dropped"] == [1]
    assert by_subsets(make_layer, THREE, fixed=Fixed(supers=(0, 1)))[0]["dropped"] == [2]
    assert by_subsets(make_layer, THREE, fixed=Fixed(forbidden=(2,)))[0]["dropped"] == [2]


@pytest.mark.parametrize(("blend", "dropped"), [("pooled", [0]), ("mean", [0]), ("worst", [2]), ({"b": 1}, [1])])
def test_domains(make_layer, blend, dropped):
    """Roots of domain a, whose output has norm 10: 0, 8, 5; of domain b, norm 1: 0.7, 0.02, 0.6.

    pooled 0.7, 8.02, 5.6; relative a 0, 0.8, 0.5 and b 0.7, 0.02, 0.6: means 0.35, 0.41, 0.55; worst 0.7, 0.8, 0.6.
    """
    layer = make_layer(3, 1)
    figures = {
        "subsets.squared_error": float64([[0.0, 64.0, 25.0], [0.49, 0.0004, 0.36]]),
        "subsets.counts": torch.tensor([2]),
    }
    objective = Objective.of_batches(["a", "b"], float64([100.0, 1.0]), blend)
    found, cost = choose.by_subsets(layer, figures, 2, objective, NONE)
    assert found["dropped"] == dropped
    if blend == "worst":
        assert found["domains"] == {"a": pytest.approx(0.5), "b": pytest.approx(0.6)}
        assert found["objective"] == pytest.approx(0.6)
        assert cost == pytest.approx(0.6 * 5.5)  # in units of the output: mean of the norms 10 and 1


def test_losses_of_other_counts_are_not_there(make_layer):
    figures = {"subsets.squared_error": float64(THREE), "subsets.counts": torch.tensor([2])}
    objective = Objective.of_batches(["a", "a"], float64([1.0, 1.0]))
    with pytest.raises(ChoiceError) as error:
        choose.by_subsets(make_layer(3, 1), figures, 1, objective, NONE)
    assert str(error.value) == (
        "the losses of all sets were gathered for keeping 2 experts, not 1; decide by a criterion, or observe again"
    )


# The path of a search --------------------------------------------------------------------------------------

PATH = {
    "greedy.counts": torch.tensor([2]),
    "greedy.kept": torch.tensor([[False, True, True, False]]),
    "greedy.squared_error": float64([[4.0]]),
    "greedy.before_swaps": float64([[9.0]]),
    "greedy.num_swaps": torch.tensor([1]),
    "greedy.coverage": float64([0.25]),
    "greedy.order": torch.tensor([0, 1]),
    "greedy.path_squared_error": float64([[1.0], [9.0]]),
}


def by_greedy(make_layer, num_kept, fixed=NONE):
    objective = Objective.of_batches(["a"], float64([100.0]))
    return choose.by_greedy(make_layer(4, 1), PATH, num_kept, objective, fixed)[0]


def test_a_count_that_was_searched_for(make_layer):
    found = by_greedy(make_layer, 2)
    assert found == {
        "kept": [1, 2], "dropped": [0, 3], "loss": 2.0, "relative_loss": 0.2, "search": "greedy", "swaps": 1,
        "uncovered": 0.25, "loss_before_swaps": 3.0,
    }  # fmt: skip


def test_a_count_on_the_path(make_layer):
    found = by_greedy(make_layer, 3)
    assert (found["dropped"], found["loss"], found["search"]) == ([0], 1.0, "path")


def test_a_count_beyond_the_path(make_layer):
    with pytest.raises(ChoiceError, match=r"^the search went down to 2 experts, not to 1; decide"):
        by_greedy(make_layer, 1)


def test_other_protected_experts_than_in_the_search(make_layer):
    with pytest.raises(ChoiceError, match=r"without the present `protect` and `forbid` \(expert 3\); decide by"):
        by_greedy(make_layer, 2, Fixed(protected=(3,)))


# Criteria --------------------------------------------------------------------------------------------------


def figures_of(tokens):
    row = float64([tokens])
    return {f"sums.{name}": row for name in (*SUMS, "largest")} | {"batch.domain": torch.tensor([0])}


def test_by_criterion(make_layer):
    criterion = Criterion("frequency", lambda figures: figures.tokens, "counts")
    found, _ = choose.by_criterion(make_layer(4, 1), figures_of([4, 0, 1, 3]), 2, ["a"], "mean", criterion, NONE, 0)
    assert found == {"kept": [0, 3], "dropped": [1, 2], "search": "frequency", "score_kept": pytest.approx(7 / 8)}


def test_scores_that_are_not_one_for_each_expert(make_layer):
    criterion = Criterion("pair", lambda figures: figures.tokens[:2], "a test")
    with pytest.raises(ChoiceError, match=r"the criterion pair answers scores \[2\], expected \[4\]"):
        choose.by_criterion(make_layer(4, 1), figures_of([4, 0, 1, 3]), 2, ["a"], "mean", criterion, NONE, 0)


def test_figures_that_a_criterion_needs(make_layer):
    criterion = Criterion("mone", lambda figures: figures.tokens, "x", frozenset({"outputs"}))
    with pytest.raises(ChoiceError) as error:
        choose.by_criterion(make_layer(4, 1), figures_of([4, 0, 1, 3]), 2, ["a"], "mean", criterion, NONE, 0)
    assert str(error.value) == (
        "the criterion mone needs `outputs`, which were not gathered; observe again with `gather: [outputs]`"
    )


def test_experts_without_tokens_are_told(make_layer):
    assert choose.notes(figures_of([4, 0, 1, 0]), NONE) == {"unreached": [1, 3]}
    extreme = figures_of([4, 2, 1, 1]) | {"sums.largest": float64([[1.0, 1.0, 50.0, 1.0]])}
    assert choose.notes(extreme, Fixed(supers=(2,))) == {"super_experts": [2], "protected_super_experts": [2]}
    assert choose.notes(extreme, NONE) == {"super_experts": [2], "protected_super_experts": []}  # reported all the same


# Fixed -----------------------------------------------------------------------------------------------------


def fixed(layer, largest, num_kept, **options):
    given = {"protected": (), "forbidden": (), "protect_supers": True} | options
    return choose.fixed_experts(layer, float64(largest), num_kept, **given)


def test_super_experts_are_protected_unless_told_otherwise(make_layer):
    layer, largest = make_layer(4, 1), [1.0, 50.0, 1.0, 1.0]
    assert fixed(layer, largest, 2) == Fixed(supers=(1,))
    assert fixed(layer, largest, 2, protect_supers=False) == Fixed()
    assert fixed(layer, largest, 2, forbidden=(1,)) == Fixed(forbidden=(1,))
    assert fixed(layer, largest, 2, protected=(0, 1)).staying == [0, 1]


def test_super_experts_take_no_more_room_than_there_is(make_layer):
    """Largest first; a list that the user gave goes before."""
    layer, largest = make_layer(5, 1), [1.0, 50.0, 60.0, 1.0, 1.0]
    assert fixed(layer, largest, 1) == Fixed(supers=(2,))
    assert fixed(layer, largest, 2, protected=(0,)) == Fixed(protected=(0,), supers=(2,))
    groups = make_layer(6, 1, num_groups=2, num_chosen_groups=1)
    assert fixed(groups, [50.0, 60.0, 1.0, 1.0, 1.0, 1.0], 2) == Fixed(supers=(1,))


# What is said of each expert -------------------------------------------------------------------------------


def test_of_each_expert(make_layer):
    """Shares in percent, of all and by domain; a score, None where no token came; or the loss when a search lets go."""
    layer = make_layer(4, 1)
    figures = {f"sums.{name}": float64([[4, 0, 1, 3], [0, 0, 0, 2]]) for name in SUMS}
    figures |= {
        "sums.largest": torch.ones(2, 4),
        "batch.domain": torch.tensor([0]),
        "batch.squared_output": float64([100]),
    }
    statistics = Gathered({layer.path: figures | PATH}, ["a", "b"])
    plan = LayerPlan(layer, SelectionOptions(keep=2, blend="pooled"))
    mean = Criterion("mean", lambda figures: figures.weight / figures.tokens, "here")
    shares = {
        "use %": [40.0, 0.0, 10.0, 50.0],
        "use on a %": [50.0, 0.0, 12.5, 37.5],
        "use on b %": [0.0, 0.0, 0.0, 100.0],
        "output %": [40.0, 0.0, 10.0, 50.0],
    }
    found = by_expert(plan, statistics, {"kept": [0, 2], "search": "mean"}, {"mean": mean})
    assert found == shares | {"score by mean": [1.0, None, 1.0, 1.0]}
    found = by_expert(plan, statistics, {"kept": [2, 3], "search": "path"}, {})
    assert found == shares | {SEARCH_LOSS: [0.1, 0.3, None, None]}  # 1 and 3 of 10
    assert by_expert(plan, statistics, {"kept": [2, 3], "search": "exact"}, {}) == shares
