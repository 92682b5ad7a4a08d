"""Experts run on tokens of one's choice: stacked ones, or modules in a list.

Dimensions: T tokens, K or M experts for each of them, P pairs of both, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_PAIRS_ON_CPU = 1024
CONSTANTS = "_compressor_constants"
"""The attribute of an experts' module some of whose experts answer constants, by a forward of ours: it is that."""


def places_of_choices(given: Sequence[Any]) -> tuple[int, int, int] | None:
    """Where among an experts module's arguments hidden states, ids and weights are; None if they are not these."""
    if len(given) != 3 or not all(isinstance(value, Tensor) for value in given):
        return None
    ids = [i for i, value in enumerate(given) if not value.is_floating_point()]
    if len(ids) != 1:
        return None
    weights = [i for i, value in enumerate(given) if i not in ids and value.shape == given[ids[0]].shape]
    if not weights:
        return None
    return ({0, 1, 2} - {ids[0], weights[-1]}).pop(), ids[0], weights[-1]


def evaluate_stacked(
    forward: Callable[[Tensor, Tensor, Tensor], Tensor], hidden_cH: Tensor, index_cM: Tensor, dtype: torch.dtype
) -> Tensor:
    """Outputs [c, M, H] of experts called as (hidden, ids [T, K], weights [T, K]), one pair per token and rank; by
    expert, on a CPU a thousand at a time: 1.1 to 1.5 times as fast, since inner activations stay near.
    """
    num_tokens, num_ranks = index_cM.shape
    expert_P = index_cM.reshape(-1)
    order_P = expert_P.argsort(stable=True)
    rows = _PAIRS_ON_CPU if hidden_cH.device.type == "cpu" else max(1, len(order_P))
    outputs_PH: Tensor | None = None
    for start in range(0, len(order_P), rows):
        pairs_p = order_P[start : start + rows]
        given_pH, index_p1 = hidden_cH[pairs_p // num_ranks], expert_P[pairs_p][:, None]
        ones_p1 = torch.ones(len(pairs_p), 1, dtype=dtype, device=hidden_cH.device)
        try:
            answered = forward(given_pH, index_p1, ones_p1)
        except (
            ValueError
        ):  # some lose a dimension where there is one id per token: give them it twice, once for nothing
            answered = forward(given_pH, index_p1.expand(-1, 2), torch.cat([ones_p1, 0 * ones_p1], dim=1))
        answered = answered.view(len(pairs_p), -1)
        if outputs_PH is None:
            outputs_PH = answered.new_empty(len(order_P), answered.shape[1])
        outputs_PH[pairs_p] = answered
    if outputs_PH is None:
        return hidden_cH.new_empty(num_tokens, num_ranks, hidden_cH.shape[-1])
    return outputs_PH.view(num_tokens, num_ranks, -1)


def evaluate_list(experts: Sequence[torch.nn.Module], hidden_cH: Tensor, index_cM: Tensor) -> Tensor:
    """Outputs [c, M, H] of experts that are modules in a list, each called with its tokens."""
    outputs_cMH = hidden_cH.new_empty(*index_cM.shape, hidden_cH.shape[-1])
    for expert, module in enumerate(experts):
        token, rank = torch.where(index_cM == expert)
        if len(token):
            outputs_cMH[token, rank] = module(hidden_cH[token])
    return outputs_cMH


def evaluate_pairs(
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
    kept_TK: Tensor,
    call: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    is_even: bool = False,
) -> Tensor:
    """The experts' output from the pairs that stay, each given to `call` as a token with one expert; `is_even`: as many
    of each token, which are given together. At least one pair stays.
    """
    index_TK, weights_TK = (value.reshape(kept_TK.shape) for value in (index, weights))
    hidden_TH = hidden.reshape(len(kept_TK), -1)
    if len(kept_TK) == 1 or is_even:
        shape = (*index.shape[:-1], -1)
        return call(hidden, index_TK[kept_TK].view(shape), weights_TK[kept_TK].view(shape))
    token_P, rank_P = kept_TK.nonzero(as_tuple=True)
    index_P1, weights_P1 = index_TK[token_P, rank_P][:, None], weights_TK[token_P, rank_P][:, None]
    if hidden.device.type == "cpu":
        return _by_parts(hidden_TH, token_P, index_P1, weights_P1, call).view(*hidden.shape[:-1], -1)
    outputs_PH = call(hidden_TH[token_P], index_P1, weights_P1).reshape(len(token_P), -1)
    padded_NH = outputs_PH.new_zeros(kept_TK.numel(), outputs_PH.shape[-1])
    padded_NH[kept_TK.reshape(-1)] = outputs_PH  # index_add_ would add in no fixed order
    return padded_NH.view(*kept_TK.shape, -1).sum(1).view(*hidden.shape[:-1], -1)


def _by_parts(
    hidden_TH: Tensor,
    token_P: Tensor,
    index_P1: Tensor,
    weights_P1: Tensor,
    call: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """[T, H]: each token's outputs added up in float32, pairs taken in the order of their experts, some at a time, so
    that what lies between an expert's matrices stays near the processor.
    """
    order_P = index_P1[:, 0].argsort(stable=True)
    total_TH: Tensor | None = None
    for part_p in torch.split(order_P, _PAIRS_ON_CPU):
        outputs_pH = call(hidden_TH[token_P[part_p]], index_P1[part_p], weights_P1[part_p]).reshape(len(part_p), -1)
        if total_TH is None:
            total_TH = outputs_pH.new_zeros(len(hidden_TH), outputs_pH.shape[-1], dtype=torch.float32)
        total_TH.index_add_(0, token_P[part_p], outputs_pH.float())
    assert total_TH is not None
    return total_TH.to(hidden_TH.dtype)
