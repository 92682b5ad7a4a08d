"""What a search takes, against the formula by which memory is planned."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compressor.model.routing_rule import RoutingRule
from compressor.selection import greedy
from compressor.selection.greedy import GreedySearch, most_bytes_of_token
from compressor.selection.token_grams import TokenGrams
from compressor.selection.token_state import TokenState, bytes_of_token

TOKENS, EXPERTS, TOP_K, RANKS = 40, 16, 3, 7


def grams_of(rule: RoutingRule, num_columns: int, batch: int = 0) -> TokenGrams:
    generator = torch.Generator().manual_seed(batch)
    affinity_TN = torch.randn(TOKENS, EXPERTS, generator=generator).softmax(-1)
    order_TM = affinity_TN.argsort(1, descending=True)[:, :RANKS]
    outputs_TXH = torch.randn(TOKENS, num_columns, 12, generator=generator)
    return TokenGrams(
        order_TM.to(torch.int16),
        affinity_TN.gather(1, order_TM),
        torch.bmm(outputs_TXH, outputs_TXH.mT),
        torch.full((TOKENS,), batch, dtype=torch.int32),
        affinity_TN if rule.rescales_all else affinity_TN[:, :0].clone(),
    )


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("top_k", [TOP_K, 1])
def test_bytes_of_a_token_are_those_of_its_tensors(renormalise: bool, has_residual: bool, top_k: int) -> None:
    rule = RoutingRule("softmax", renormalise, 1.0)
    grams = grams_of(rule, RANKS + has_residual)
    state = TokenState(grams, rule, num_chosen=TOP_K, top_k=top_k, num_batches=1)
    state.keep(torch.ones(EXPERTS, dtype=torch.bool))
    tensors = [*vars(grams).values(), *(one for name, one in vars(state).items() if isinstance(one, torch.Tensor))]
    per_token = sum(one.untyped_storage().nbytes() for one in tensors if len(one) == TOKENS) / TOKENS
    kept = EXPERTS if rule.rescales_all else 0
    rescales_all = rule.rescales_all
    assert bytes_of_token(RANKS, RANKS + has_residual, kept, top_k, rescales_all=rescales_all) == per_token


def test_most_is_more_whatever_the_rule(make_layer: Any) -> None:
    layer = make_layer(EXPERTS, TOP_K)
    most = most_bytes_of_token(layer, RANKS, TOP_K, has_residual=False)
    twice = bytes_of_token(2 * RANKS, 2 * RANKS, EXPERTS, TOP_K, rescales_all=True)
    assert most == bytes_of_token(RANKS, RANKS, EXPERTS, TOP_K, rescales_all=True) + 0.1 * twice
    of_all = most_bytes_of_token(layer, EXPERTS, TOP_K, has_residual=False)
    assert of_all == bytes_of_token(EXPERTS, EXPERTS, EXPERTS, TOP_K, rescales_all=True)


@pytest.mark.parametrize("renormalise", [True, False])
def test_tokens_in_blocks_find_the_same(make_layer: Any, monkeypatch: pytest.MonkeyPatch, renormalise: bool) -> None:
    """Of many tokens there is never a second copy of all; those short of ranks get more in whatever block they are."""

    def found(block_bytes: int) -> GreedySearch:
        monkeypatch.setattr(greedy, "BLOCK_BYTES", block_bytes)
        rule = RoutingRule("softmax", renormalise, 1.0)
        search = GreedySearch(make_layer(EXPERTS, TOP_K), [8], num_ranks=RANKS)
        search._rule = rule
        for batch in range(6):
            search._put(grams_of(rule, RANKS, batch))
            search._domains.append("text")
            search._squared_output_B.append(torch.tensor(1000.0, dtype=torch.float64))
        search._num_batches = 6
        return search

    whole, parts = found(2**30), found(8_000)
    assert (len(whole._blocks), len(parts._blocks)) == (0, 6)
    assert whole.again()
    assert parts.again()
    assert (len(whole._states), len(parts._states)) == (1, 6)
    assert torch.equal(whole._again_T, parts._again_T)  # type: ignore[arg-type]
    assert sum(state.grams.num_tokens for state in parts._states) == whole._states[0].grams.num_tokens
    one, other = (search.tensors() for search in (whole, parts))
    assert one["greedy.ranks"].tolist() == other["greedy.ranks"].tolist() == [RANKS]
    for name in ("greedy.kept", "greedy.order"):
        assert torch.equal(one[name], other[name])
    assert torch.allclose(one["greedy.squared_error"], other["greedy.squared_error"], rtol=1e-9)
