"""Scores of domains blended, experts kept by score, super experts: by hand."""

from __future__ import annotations

import math

import pytest
import torch

from compressor.selection.activation_sums import SUMS, ExpertSums
from compressor.selection.criteria import Criterion
from compressor.selection.objective import Blend
from compressor.selection.scores import (
    ChoiceError,
    blended_scores,
    expert_figures,
    kept_by_score,
    super_experts,
    unreached,
)

NAN = math.nan
FREQUENCY = Criterion("frequency", lambda figures: figures.tokens, "counts")
MEAN_NORM = Criterion("man", lambda figures: figures.mean(figures.norm), "means")


def made(tokens_DE: list[list[float]], norm_DE: list[list[float]] | None = None) -> dict[str, torch.Tensor]:
    """Figures of which only the tokens and the norms matter."""
    tokens = torch.tensor(tokens_DE, dtype=torch.float64)
    figures = {f"sums.{name}": torch.zeros_like(tokens) for name in (*SUMS, "largest")} | {"sums.tokens": tokens}
    if norm_DE is not None:
        figures["sums.norm"] = torch.tensor(norm_DE, dtype=torch.float64)
    return figures


# Domains ---------------------------------------------------------------------------------------------------

TWO = made([[6.0, 3.0, 1.0], [0.0, 10.0, 30.0]])
"""Shares: 0.6, 0.3, 0.1 of code and 0, 0.25, 0.75 of prose."""


@pytest.mark.parametrize(
    ("blend", "expected"),
    [
        ("mean", [0.3, 0.275, 0.425]),
        ("worst", [0.6, 0.3, 0.75]),
        ("pooled", [6.0, 13.0, 31.0]),
        ({"code": 3, "prose": 1}, [0.45, 0.2875, 0.2625]),
    ],
)
def test_blends(blend: Blend, expected: list[float]) -> None:
    assert blended_scores(FREQUENCY, TWO, ["code", "prose"], blend, num_kept=1).tolist() == pytest.approx(expected)


def test_one_domain_is_the_criterions_own_score() -> None:
    assert blended_scores(FREQUENCY, made([[6.0, 3.0, 1.0]]), ["code"], "worst", num_kept=1).tolist() == [6.0, 3.0, 1.0]


def test_absent_in_one_domain_counts_as_nothing_there_and_absent_in_all_stays_absent() -> None:
    # means 2, 6, absent of code (shares 1/4, 3/4) and absent, 4, absent of prose (share 1)
    figures = made([[1.0, 2.0, 0.0], [0.0, 1.0, 0.0]], [[2.0, 12.0, 0.0], [0.0, 4.0, 0.0]])
    scores = blended_scores(MEAN_NORM, figures, ["code", "prose"], "mean", num_kept=1)
    assert scores[:2].tolist() == pytest.approx([0.125, 0.875])
    assert math.isnan(scores[2])


def test_pooled_adds_the_sums_and_then_asks_the_criterion() -> None:
    # a mean over all tokens, not a mean of means: (2 + 0) / 1 and (12 + 4) / 3
    figures = made([[1.0, 2.0], [0.0, 1.0]], [[2.0, 12.0], [0.0, 4.0]])
    scores = blended_scores(MEAN_NORM, figures, ["code", "prose"], "pooled", num_kept=1)
    assert scores.tolist() == pytest.approx([2.0, 16 / 3])


def test_largest_of_domains_is_a_maximum() -> None:
    figures = made([[1.0], [1.0]]) | {"sums.largest": torch.tensor([[3.0], [2.0]])}
    assert expert_figures(figures, [0, 1], num_kept=1).largest.tolist() == [3.0]


def test_criteria_of_sets_see_blended_losses_of_pairs_or_figures_of_their_own() -> None:
    """Each domain's are fractions of its squared output: 8 / 4 and 30 / 10 are 2 and 3."""
    losses = torch.tensor([[[8.0]], [[30.0]]], dtype=torch.float64)
    figures = made([[1.0], [1.0]]) | {
        "pairs.loss": losses,
        "sums.sets.own": losses,
        "batch.domain": torch.tensor([0, 1, 0]),
        "batch.squared_output": torch.tensor([1.0, 10.0, 3.0]),
    }
    seen: list[float] = []

    def score(given):  # type: ignore[no-untyped-def]
        assert torch.equal(given.pairs, given.own["own"])
        seen.append(float(given.pairs[0, 0]))
        return given.tokens

    criterion = Criterion("sets", score, "test", of_sets=True, statistic=ExpertSums)
    for blend in ("mean", {"code": 1, "prose": 3}, "pooled"):
        blended_scores(criterion, figures, ["code", "prose"], blend, num_kept=1)  # type: ignore[arg-type]
    assert seen == pytest.approx([2.5, 2.75, 38.0])
    with pytest.raises(ChoiceError, match=r"^the criterion sets judges sets, not experts"):
        blended_scores(criterion, figures, ["code", "prose"], "worst", num_kept=1)


# Kept ------------------------------------------------------------------------------------------------------


def kept(scores: list[float], num_kept: int, **others: object) -> list[int]:
    found, dropped = kept_by_score(torch.tensor(scores), num_kept, **others)  # type: ignore[arg-type]
    assert sorted([*found, *dropped]) == list(range(len(scores)))
    return found


def test_the_largest_stay() -> None:
    assert kept([0.1, 0.5, 0.3, 0.4], 2) == [1, 3]


def test_of_equal_scores_the_lower_id_goes_first() -> None:
    assert kept([1.0, 1.0, 1.0, 1.0], 2) == [2, 3]


def test_experts_without_figures_go_first() -> None:
    assert kept([NAN, -5.0, -7.0, NAN], 2) == [1, 2]
    assert kept([NAN, -5.0, -7.0, NAN], 3) == [1, 2, 3]


def test_groups_keep_equally_many() -> None:
    assert kept([9.0, 8.0, 7.0, 1.0, 2.0, 3.0], 4, num_groups=2) == [0, 1, 4, 5]


def test_protected_stay_and_forbidden_go() -> None:
    assert kept([4.0, 3.0, 2.0, 1.0], 2, protected=[3]) == [0, 3]
    assert kept([4.0, 3.0, 2.0, 1.0], 2, forbidden=[0]) == [1, 2]
    assert kept([4.0, NAN, 2.0, 1.0], 2, protected=[1], forbidden=[0]) == [1, 2]


# Findings --------------------------------------------------------------------------------------------------


def test_super_experts_are_twenty_times_the_median() -> None:
    assert super_experts(torch.tensor([1.0, 2.0, 3.0, 41.0])) == [3]  # the lower median is 2
    assert super_experts(torch.tensor([1.0, 2.0, 3.0, 40.0])) == []
    assert super_experts(torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0, 41.0])) == [5]  # who saw no token does not count
    assert super_experts(torch.zeros(3)) == []


def test_unreached() -> None:
    assert unreached(torch.tensor([3.0, 0.0, 1.0, 0.0])) == [1, 3]
