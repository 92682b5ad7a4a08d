"""Losses where experts answer nearly alike, as those of upcycled models do: far smaller than what they are made of."""

from __future__ import annotations

import itertools

import pytest
import routers
import torch

from compressor.observe.statistic import Statistic
from compressor.selection.exact import SubsetErrors
from compressor.selection.pair_losses import PairLosses
from compressor.selection.token_grams import token_grams
from compressor.selection.token_state import TokenState
from compressor_dynamic_skipping.curves import SkipCurves

TOKENS, EXPERTS, TOP_K, WIDTH = 12, 5, 2, 64
ROUTERS = ["softmax", "sigmoid_biased_scaled", "sequential"]


@pytest.fixture
def alike(make_tokens):
    """Tokens whose experts answer a common vector and, of `spread` of its size, something of their own. Answers are
    looked up, so the slow version has the same numbers.
    """

    def make(router: str, spread: float, unlikely: tuple[int, ...] = ()):
        generator = torch.Generator().manual_seed(7)
        common_T1H = 30 * torch.randn(TOKENS, 1, WIDTH, generator=generator)
        own_TNH = torch.randn(TOKENS, EXPERTS, WIDTH, generator=generator)
        table_TNH = common_T1H * (1 + spread * own_TNH)
        logits_TN = torch.randn(TOKENS, EXPERTS, generator=generator)
        logits_TN[:, list(unlikely)] -= 9
        bias_N = torch.zeros(EXPERTS, dtype=torch.float64)
        tokens = make_tokens(
            torch.arange(TOKENS, dtype=torch.float32)[:, None].expand(-1, WIDTH).contiguous(),
            torch.zeros(EXPERTS, 1, 1),
            logits_TN,
            TOP_K,
            lambda logits, top_k: getattr(routers, router)(logits, top_k, bias_N),
            routers.rule(router, bias_N),
        )
        tokens.evaluate_experts = lambda x, e: table_TNH[x[:, 0].long()[:, None], e]
        return tokens

    return make


def slow(tokens, kept) -> float:
    """The squared error of a set: differences of weights first, then of outputs; float64."""

    def by_id(index_TK, weights_TK):
        return torch.zeros(TOKENS, EXPERTS, dtype=torch.float64).scatter_add_(1, index_TK, weights_TK.double())

    everything = torch.arange(EXPERTS).expand(TOKENS, -1)
    outputs_TNH = tokens.evaluate_experts(tokens.hidden_TH, everything).double()
    delta_TN = by_id(*tokens.replay(list(kept))) - by_id(tokens.index_TK, tokens.weights_TK)
    return float((delta_TN[:, None] @ outputs_TNH).square().sum())


def figures(statistic: Statistic, tokens) -> dict[str, torch.Tensor]:
    statistic.update(tokens)
    statistic.again()
    return statistic.tensors()


@pytest.mark.parametrize("spread", [1e-4, 1e-2])
@pytest.mark.parametrize("router", ROUTERS)
def test_every_set(alike, router, spread):
    tokens = alike(router, spread)
    found = figures(SubsetErrors(tokens.layer, [3]), tokens)["subsets.squared_error"][0].tolist()
    sets = [set(range(EXPERTS)) - set(gone) for gone in itertools.combinations(range(EXPERTS), 2)]
    assert found == pytest.approx([slow(tokens, kept) for kept in sets], rel=1e-5)


@pytest.mark.parametrize("spread", [1e-4, 1e-2])
@pytest.mark.parametrize("router", ROUTERS)
def test_single_experts(alike, router, spread):
    tokens = alike(router, spread)
    found = figures(PairLosses(tokens.layer), tokens)["pairs.loss"][0].diagonal().tolist()
    sets = [set(range(EXPERTS)) - {gone} for gone in range(EXPERTS)]
    assert found == pytest.approx([slow(tokens, kept) for kept in sets], rel=1e-5)


@pytest.mark.parametrize("spread", [1e-4, 1e-2])
def test_skipping(alike, spread):
    """The second of two goes, and the first has all the weight: w₂ (E₁ − E₂). Weights are those that the model will
    have, rounded to float32 when they are shared out anew: 2⁻²⁴ of what the experts have in common comes to it.
    """
    tokens = alike("softmax", spread)
    found = figures(SkipCurves(tokens.layer), tokens)["sums.skip.ratio"][0, :, 2].sum()
    outputs_TKH = tokens.evaluate_experts(tokens.hidden_TH, tokens.index_TK).double()
    error_TH = tokens.weights_TK.double()[:, 1:] * (outputs_TKH[:, 0] - outputs_TKH[:, 1])
    assert float(found) == pytest.approx(float(error_TH.square().sum()), rel=1e-6 + 2 * 2**-24 / spread)


@pytest.mark.parametrize("router", ["softmax", "softmax_not_renormalised"])
def test_the_search_loses_exactly_nothing_among_experts_that_are_alike(alike, router):
    """Its matrices are float32: what is alike stays alike. Where weights are not renormalised, they grow, a loss."""
    tokens = alike(router, 0.0)
    state = state_of(tokens)
    is_left_N = torch.tensor([True, False, True, False, True])
    state.keep(is_left_N)
    expected = slow(tokens, [0, 2, 4])
    size = float(routers.output(tokens, tokens.index_TK, tokens.weights_TK).square().sum())
    assert float(state.losses()[0]) == pytest.approx(expected, rel=1e-6, abs=1e-14 * size)


def state_of(tokens) -> TokenState:
    [chunk] = tokens.ranked_outputs(EXPERTS)
    return TokenState(token_grams(tokens, chunk, 0), tokens.rule, num_chosen=TOP_K, top_k=TOP_K, num_batches=1)


def test_what_a_removal_changes_where_all_tokens_are_rescaled(alike):
    """An expert that hardly matters, beside outputs that are large: the change is that of the losses themselves."""
    tokens = alike("softmax_not_renormalised", 0.3, unlikely=(3, 4))
    state = state_of(tokens)
    state.keep(torch.ones(EXPERTS, dtype=torch.bool))
    size = float(routers.output(tokens, tokens.index_TK, tokens.weights_TK).square().sum())
    for gone, left in ((3, [0, 1, 2, 4]), (4, [0, 1, 2])):
        before, change = float(state.losses()[0]), float(state.removal_BE[0, gone])
        state.set_left(gone, left=False)
        after = float(state.losses()[0])
        assert change == pytest.approx(after - before, rel=1e-5)
        # scores and matrices are kept in float32, so what all weights are divided by is right to one rounding a score
        rounding = EXPERTS * 2**-24 * size**0.5
        assert after**0.5 == pytest.approx(slow(tokens, left) ** 0.5, rel=1e-5, abs=rounding)
