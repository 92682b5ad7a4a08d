"""Experts run on tokens of one's choice: stacked ones, or modules in a list.

Dimensions: T tokens, M experts for each of them, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_PAIRS_ON_CPU = 1024


def evaluate_stacked(
    forward: Callable[[Tensor, Tensor, Tensor], Tensor],
    hidden_cH: Tensor,
    index_cM: Tensor,
    dtype: torch.dtype,
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
