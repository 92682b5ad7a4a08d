"""How far an expert's outputs are from their mean: right where that is tiny beside the outputs, and however the text is
shared out; against exact fractions.
"""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from compressor.observe.reductions import RULES, joined_figures
from compressor.selection.activation_sums import ExpertSums
from compressor.selection.choose import Fixed, by_criterion
from compressor.selection.scores import ChoiceError, blended_scores, expert_figures
from compressor_expert_pruning import CRITERIA

MONE = next(criterion for criterion in CRITERIA if criterion.name == "mone")
WIDTH = 24


def adversary(kind: str, tokens: int = 40) -> Tensor:
    """[T, H] float32: outputs of one expert."""
    generator = torch.Generator().manual_seed(3)
    mean_H = 1000 * torch.randn(WIDTH, generator=generator)
    if kind == "tiny spread about a large mean":
        return mean_H * (1 + 1e-6 * torch.randn(tokens, WIDTH, generator=generator))
    if kind == "alike":
        return (mean_H / 3).expand(tokens, -1).clone()
    if kind == "one token":
        return mean_H[None] / 7
    if kind == "one token far away":
        return torch.cat([mean_H.expand(tokens - 1, -1), mean_H[None] + 1e-3])
    return torch.randn(tokens, WIDTH, generator=generator)


def exact_spread(outputs_TH: Tensor) -> float:
    """Σ ‖f − mean f‖² of the float32 numbers as they are, without rounding."""
    total = Fraction(0)
    for column in outputs_TH.T.tolist():
        values = [Fraction(value) for value in column]
        mean = sum(values) / len(values)
        total += sum((value - mean) ** 2 for value in values)
    return float(total)


@pytest.fixture
def gathered(make_tokens):
    """Figures of a layer whose first expert answers these outputs, one a token, in batches of (first, last, domain)."""

    def gather(outputs_TH: Tensor, *batches: tuple[int, int, str]) -> dict[str, Tensor]:
        statistic = None
        for first, last, domain in batches:
            rows_TH = outputs_TH[first:last]
            chosen = torch.zeros(len(rows_TH), 1, dtype=torch.int64), torch.ones(len(rows_TH), 1)
            tokens = make_tokens(
                rows_TH,
                torch.eye(WIDTH).expand(2, -1, -1),
                torch.zeros(len(rows_TH), 2),
                1,
                lambda *_, chosen=chosen: chosen,
                None,
            )
            tokens.evaluate_experts = lambda x, e: x[:, None].expand(-1, e.shape[1], -1)
            tokens.domain = domain
            statistic = statistic or ExpertSums(tokens.layer, outputs=True)
            statistic.update(tokens)
        return statistic.tensors()

    return gather


KINDS = ["tiny spread about a large mean", "alike", "one token", "one token far away", "ordinary"]


@pytest.mark.parametrize("kind", KINDS)
def test_against_fractions(gathered, kind):
    """Within the rounding of float64, relative to the spread itself; exactly 0 where it is 0."""
    outputs_TH = adversary(kind)
    found = float(gathered(outputs_TH, (0, len(outputs_TH), "a"))["sums.spread"][0, 0])
    expected = exact_spread(outputs_TH)
    assert found == pytest.approx(expected, rel=1e-9, abs=0.0)
    naive = outputs_TH.double().square().sum() - outputs_TH.double().sum(0).square().sum() / len(outputs_TH)
    if kind.startswith("tiny"):  # what is tested for is there: the difference of sums has lost half its digits
        assert float(naive) != pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_however_the_text_is_shared_out(gathered, kind):
    """Batches, processes or files, and domains: all give what one look at everything gives."""
    outputs_TH = adversary(kind)
    end = len(outputs_TH)
    third = end // 3
    expected = exact_spread(outputs_TH)
    in_batches = gathered(outputs_TH, (0, third, "a"), (third, third, "a"), (third, end, "a"))
    parts = [gathered(outputs_TH, (0, third, "a")), gathered(outputs_TH, (third, end, "a"))]
    joined, lost = joined_figures(parts, [[0], [0]], 1, rules=RULES)
    assert not lost
    assert float(joined["sums.spread"][0, 0]) == pytest.approx(expected, rel=1e-9, abs=0.0)
    assert float(in_batches["sums.spread"][0, 0]) == pytest.approx(expected, rel=1e-9, abs=0.0)
    by_domain = gathered(outputs_TH, (0, third, "a"), (third, end, "b"))
    pooled = expert_figures(by_domain, range(len(by_domain["sums.spread"])), num_kept=1)
    assert float(pooled.spread[0]) == pytest.approx(expected, rel=1e-9, abs=0.0)


def test_domains_stand_side_by_side_when_files_are_joined(gathered):
    outputs_TH = adversary("ordinary")
    one = gathered(outputs_TH, (0, 10, "a"), (10, 20, "b"))
    other = gathered(outputs_TH, (20, 30, "b"), (30, 40, "c"))
    joined, _ = joined_figures([one, other], [[0, 1], [1, 2]], 3, rules=RULES)
    expected = [exact_spread(outputs_TH[part]) for part in (slice(0, 10), slice(10, 30), slice(30, 40))]
    assert joined["sums.spread"][:, 0].tolist() == pytest.approx(expected, rel=1e-9)
    assert joined["sums.spread"][:, 1].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", ["alike", "one token"])
def test_mone_of_an_expert_without_spread_is_0_and_of_one_without_tokens_absent(gathered, kind):
    outputs_TH = adversary(kind)
    figures = gathered(outputs_TH, (0, len(outputs_TH), "a"))
    score_E = blended_scores(MONE, figures, ["a"], "mean", num_kept=1)
    assert score_E[0] == 0.0
    assert score_E[1].isnan()


def test_figures_of_older_versions_are_refused_by_name(gathered, make_layer):
    figures = gathered(adversary("ordinary"), (0, 40, "a"))
    del figures["sums.spread"]
    with pytest.raises(ChoiceError) as error:
        by_criterion(make_layer(2, 1), figures, 1, ["a"], "mean", MONE, Fixed(), 0)
    assert str(error.value) == (
        "the criterion mone needs `outputs`, which an older version gathered without `sums.spread`; observe again with "
        "`gather: [outputs]`"
    )
