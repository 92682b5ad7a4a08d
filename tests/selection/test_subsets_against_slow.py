"""The search against the obvious slow version: mask the logits, route again, put the output together, compare."""

from __future__ import annotations

import itertools

import pytest
import routers
import torch
from routers import HIDDEN, ROUTERS, output

from compressor.model import routed_tokens as tokens_module
from compressor.plugin import RoutingRule
from compressor.selection import exact as subsets
from compressor.selection.exact import SubsetErrors, SubsetTables, dropped_subsets


@pytest.fixture
def random_tokens(make_tokens):
    return lambda *shape, **others: routers.random_tokens(make_tokens, *shape, **others)


def slow_errors(tokens, num_kept, top_k=None):
    full = output(tokens, tokens.index_TK, tokens.weights_TK) if tokens.target_TH is None else tokens.target_TH.double()
    experts = range(tokens.layer.num_experts)
    return torch.stack(
        [
            (output(tokens, *tokens.replay(list(kept), top_k)) - full).square().sum()
            for kept in reversed(list(itertools.combinations(experts, num_kept)))  # so the dropped ones ascend
        ]
    )


def fast_errors(tokens, *counts, top_k=None):
    errors = SubsetErrors(tokens.layer, counts, top_k)
    errors.update(tokens)
    return errors.tensors()["subsets.squared_error"][0]


def assert_close(tokens, found, expected, where):
    limit = 1e-6 * float(output(tokens, tokens.index_TK, tokens.weights_TK).square().sum())
    assert torch.allclose(found, expected, rtol=2e-5, atol=limit), where


SHAPES = [
    (num_experts, top_k, num_kept)
    for num_experts in (*range(2, 8), 10)
    for top_k in range(1, min(4, num_experts - 1) + 1)
    for num_kept in range(top_k, num_experts)
]


NIGHTLY = ("softmax_in_order_of_ids", "softmax_not_renormalised_scaled", "softmax_biased")
"""Of each of these another one has all that it has."""


@pytest.mark.parametrize(
    "router", [pytest.param(one, marks=pytest.mark.nightly) if one in NIGHTLY else one for one in ROUTERS]
)
def test_every_set_of_every_shape(random_tokens, router):
    for seed, (num_experts, top_k, num_kept) in enumerate(SHAPES):
        tokens = random_tokens(router, 7, num_experts, top_k, seed)
        found, expected = fast_errors(tokens, num_kept), slow_errors(tokens, num_kept)
        where = f"{num_experts} experts, {top_k} chosen, {num_kept} kept"
        assert_close(tokens, found, expected, where)


@pytest.mark.parametrize("router", ROUTERS)
def test_all_counts_at_once(random_tokens, router):
    for seed, (num_experts, top_k) in enumerate([(4, 1), (5, 2), (7, 3), (8, 2)]):
        tokens = random_tokens(router, 9, num_experts, top_k, seed)
        counts = range(top_k, num_experts + 1)
        expected = torch.cat([slow_errors(tokens, num_kept) for num_kept in counts])
        found = fast_errors(tokens, *counts)
        assert float(found[-1]) == 0.0  # all experts stay
        assert_close(tokens, found, expected, f"{num_experts} experts, {top_k} chosen")


LOWER = [
    (num_experts, top_k, lower, num_kept)
    for num_experts, top_k in [(3, 2), (5, 2), (6, 4), (8, 3), (6, 6)]
    for lower in range(1, top_k)
    for num_kept in range(lower, num_experts + 1)
]


@pytest.mark.parametrize("router", ROUTERS)
def test_fewer_experts_per_token(random_tokens, router):
    for seed, (num_experts, top_k, lower, num_kept) in enumerate(LOWER):
        tokens = random_tokens(router, 7, num_experts, top_k, seed)
        found, expected = fast_errors(tokens, num_kept, top_k=lower), slow_errors(tokens, num_kept, lower)
        assert_close(tokens, found, expected, f"{num_experts} experts, {num_kept} kept, {top_k} → {lower} chosen")


@pytest.mark.parametrize("router", ROUTERS)
def test_a_target_that_is_not_the_layers_own_output(random_tokens, router):
    """Progressive pruning: the original model's output is the target, on activations that are no longer its own."""
    for seed, (num_experts, top_k, num_kept, lower) in enumerate(
        [(4, 1, 2, None), (6, 2, 3, None), (7, 3, 5, None), (6, 2, 6, 1), (7, 3, 4, 2), (5, 4, 4, 3)]
    ):
        tokens = random_tokens(router, 9, num_experts, top_k, seed)
        tokens.target_TH = torch.randn(tokens.hidden_TH.shape, generator=torch.Generator().manual_seed(seed))
        found, expected = fast_errors(tokens, num_kept, top_k=lower), slow_errors(tokens, num_kept, lower)
        assert_close(tokens, found, expected, f"{num_experts} experts, {num_kept} kept, {top_k} → {lower} chosen")


def test_a_rule_that_does_not_hold_for_fewer(make_tokens):
    """Renormalised only where more than one is chosen, as in DeepSeek's own code: the router itself has to be asked."""

    def choose(logits, top_k):
        weights, index = logits.double().softmax(-1).topk(top_k, dim=-1)
        return index, weights / weights.sum(-1, keepdim=True) if top_k > 1 else weights

    generator = torch.Generator().manual_seed(0)
    tokens = make_tokens(
        torch.randn(20, HIDDEN, generator=generator),
        torch.randn(5, HIDDEN, HIDDEN, generator=generator),
        torch.randn(20, 5, generator=generator),
        3,
        choose,
        RoutingRule("softmax", True, 1.0),
    )
    for lower in (1, 2):
        assert_close(tokens, fast_errors(tokens, 3, 4, top_k=lower), torch.cat(
            [slow_errors(tokens, 3, lower), slow_errors(tokens, 4, lower)]), f"3 → {lower}")  # fmt: skip


@pytest.mark.parametrize("router", ROUTERS)
def test_what_else_can_be_chosen_always_stays(random_tokens, router):
    for seed, (num_experts, num_extra, top_k, num_kept) in enumerate(
        [(4, 1, 1, 2), (4, 1, 2, 2), (4, 1, 2, 3), (3, 4, 3, 2), (5, 2, 4, 3), (6, 1, 2, 3)]
    ):
        tokens = random_tokens(router, 9, num_experts, top_k, seed, num_extra)
        for lower in (None, *range(1, top_k)):
            found, expected = fast_errors(tokens, num_kept, top_k=lower), slow_errors(tokens, num_kept, lower)
            assert_close(tokens, found, expected, f"{num_experts} + {num_extra}, {num_kept} kept, {top_k} → {lower}")


@pytest.mark.parametrize("router", ["softmax", "sigmoid_biased_scaled", "sequential_ids"])
def test_a_token_whose_experts_all_stay_adds_exactly_nothing(make_tokens, random_tokens, router):
    def by_id(logits, top_k):  # weights that do not depend on who else is there, so only the replay can tell
        index = logits.topk(top_k, dim=-1).indices
        return index, 1.0 / (3.0 + index)

    seen = 0
    for seed in range(12):
        tokens = random_tokens("softmax" if router == "sequential_ids" else router, 1, 6, 2, seed)
        if router == "sequential_ids":
            experts = torch.randn(6, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(seed))
            tokens = make_tokens(tokens.hidden_TH, experts, tokens.logits_TE, 2, by_id, None)
        chosen = set(tokens.index_TK[0].tolist())
        for dropped, error in zip(dropped_subsets(tokens.layer, 3), fast_errors(tokens, 3).tolist(), strict=True):
            assert (error == 0.0) == chosen.isdisjoint(dropped)
            seen += error == 0.0
    assert seen == 12 * 4  # of the four others, three are dropped


def test_dropping_any_expert_rescales_where_softmax_is_not_renormalised(random_tokens):
    tokens = random_tokens("softmax_not_renormalised", 1, 6, 2, 0)
    assert (fast_errors(tokens, 5) > 0).all()


CUTS = {
    "chunks": {"tokens._ROWS_PER_EXPERT": 12},
    "parts of chunks": {"subsets._BYTES": 1, "subsets._TOKENS_PER_LOOKUP": 7},
    "look-ups": {"subsets._SMALL_TABLE": 0, "subsets._TOKENS_PER_LOOKUP": 3},
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("shape", [(7, 2, 4), (8, 5, 7)])
def test_however_the_work_is_cut_up(random_tokens, router, shape, cut, monkeypatch):
    num_experts, top_k, num_kept = shape
    tokens = random_tokens(router, 50, num_experts, top_k, 3)
    whole = fast_errors(tokens, num_kept)
    output_TH = tokens.output_TH
    for name, value in CUTS[cut].items():
        module, attribute = name.split(".")
        monkeypatch.setattr({"tokens": tokens_module, "subsets": subsets}[module], attribute, value)
    if cut == "chunks":
        chunks = [chunk.stop - chunk.start for chunk in tokens.ranked_outputs(num_experts)]
        assert len(chunks) > 3
        assert sum(chunks) == 50
        assert max(chunks) - min(chunks) <= len(chunks)
    torch.testing.assert_close(fast_errors(tokens, num_kept), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole, slow_errors(tokens, num_kept), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens.output_TH, output_TH, rtol=1e-5, atol=1e-5)


def test_both_ways_of_looking_up(random_tokens):
    """Few sets over many ranks look up the choice first, many sets over few ranks the error first."""
    for num_experts, top_k, num_kept, direct in ((8, 5, 7, False), (10, 2, 5, True)):
        tokens = random_tokens("softmax", 40, num_experts, top_k, 5)
        tables = SubsetTables.build(tokens.layer, [num_kept], torch.device("cpu"))
        assert (len(tables.choice_of_mask) <= 4 * len(tables.dropped)) == direct
        torch.testing.assert_close(fast_errors(tokens, num_kept), slow_errors(tokens, num_kept), rtol=1e-5, atol=1e-6)


def test_no_tokens_no_error(random_tokens):
    for router in ROUTERS:
        assert fast_errors(random_tokens(router, 0, 5, 2, 0), 3).tolist() == [0.0] * 10
