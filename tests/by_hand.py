"""What an MoE block computes, written out: plain loops over tokens and experts, from the weights alone, in float64.

Nothing here uses the library or the routers' own code, so it is what both are compared with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """How an architecture chooses: as its paper or its model card says."""

    score: str = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    bias: bool = False
    groups: tuple[int, int] | None = None
    """(groups, chosen groups)"""
    group_score: str = "max"
    """A group's score: the largest of its experts' scores, or the sum of the two largest."""


ROUTING = {
    "mixtral": Routing(),
    "qwen2_moe": Routing(renormalise=False),
    "qwen3_moe": Routing(),
    "qwen3_moe_not_normalised": Routing(renormalise=False),
    "olmoe": Routing(renormalise=False),
    "granitemoe": Routing(),
    "phimoe": Routing(score="sparsemixer"),
    "deepseek_v2": Routing(renormalise=False, scale=1.5),
    "deepseek_v2_groups": Routing(renormalise=False, groups=(2, 1)),
    "deepseek_v3": Routing(score="sigmoid", scale=2.5, bias=True, groups=(2, 1), group_score="sum of two"),
    "gpt_oss": Routing(),
    "glm4_moe": Routing(score="sigmoid", bias=True),
    "mixtral4": Routing(),
    "deepseek4": Routing(renormalise=False, scale=1.5),
}


def router_of(block: Any) -> Any:
    """The module that holds the router's weight."""
    return block.router if hasattr(block, "router") else block.gate


def correction_bias(block: Any) -> list[float] | None:
    """The numbers added to the scores for the choice only."""
    bias = getattr(router_of(block), "e_score_correction_bias", None)
    return None if bias is None else bias.double().tolist()


def router_logits(block: Any, hidden_TH: Tensor) -> Tensor:
    """[T, E] float64."""
    router = router_of(block)
    logits_TE = hidden_TH.double() @ router.weight.double().T
    bias = getattr(router, "bias", None)
    return logits_TE if bias is None else logits_TE + bias.double()


def choose(
    routing: Routing, logits: Sequence[float], bias: Sequence[float] | None, kept: Sequence[int], top_k: int = 2
) -> dict[int, float]:
    """Expert → weight, for one token that may choose among `kept`. `kept` is all there is: as if the others were
    never there.
    """
    if routing.score == "sparsemixer":
        return _sparsemixer(logits, kept)
    if routing.score == "softmax":
        top = max(logits[expert] for expert in kept)
        total = sum(math.exp(logits[expert] - top) for expert in kept)
        score = {expert: math.exp(logits[expert] - top) / total for expert in kept}
    else:
        score = {expert: 1 / (1 + math.exp(-logits[expert])) for expert in kept}
    rank = {expert: score[expert] + (bias[expert] if routing.bias and bias else 0.0) for expert in kept}
    if routing.groups:
        allowed = _experts_of_best_groups(routing, rank, len(logits))
        rank = {expert: value for expert, value in rank.items() if expert in allowed}
    chosen = sorted(rank, key=lambda expert: -rank[expert])[:top_k]
    total = sum(score[expert] for expert in chosen) if routing.renormalise else 1.0
    return {expert: routing.scale * score[expert] / total for expert in chosen}


def _experts_of_best_groups(routing: Routing, rank: dict[int, float], num_experts: int) -> set[int]:
    assert routing.groups is not None
    num_groups, num_chosen = routing.groups
    size = num_experts // num_groups
    members = [[e for e in rank if e // size == group] for group in range(num_groups)]
    largest = [sorted((rank[e] for e in group), reverse=True) for group in members]
    score = [values[0] if routing.group_score == "max" else sum(values[:2]) for values in largest]
    best = sorted(range(num_groups), key=lambda group: -score[group])[:num_chosen]
    return {expert for group in best for expert in members[group]}


def _sparsemixer(logits: Sequence[float], kept: Sequence[int], jitter: float = 0.01) -> dict[int, float]:
    """Phi-3.5-MoE (arXiv 2409.12136), at inference: twice the best expert; its weight is its share of the softmax over
    those within a relative distance of 2·jitter of it.
    """
    weights: dict[int, float] = {}
    for _ in range(2):
        left = [expert for expert in kept if expert not in weights]
        best = max(left, key=lambda expert: logits[expert])
        top = logits[best]
        near = [e for e in left if (top - logits[e]) / max(abs(logits[e]), top) <= 2 * jitter]
        weights[best] = 1 / sum(math.exp(logits[expert] - top) for expert in near)
    return weights


def routing_weights(
    name: str, block: Any, hidden_TH: Tensor, kept: Sequence[int] | None = None, top_k: int = 2
) -> Tensor:
    """[T, E] float64, 0 for experts that are not chosen."""
    logits_TE, bias = router_logits(block, hidden_TH), correction_bias(block)
    weights_TE = torch.zeros_like(logits_TE)
    for token, logits in enumerate(logits_TE.tolist()):
        chosen = choose(ROUTING[name], logits, bias, kept or range(len(logits)), top_k)
        for expert, weight in chosen.items():
            weights_TE[token, expert] = weight
    return weights_TE


def expert_outputs(name: str, block: Any, hidden_TH: Tensor) -> Tensor:
    """[T, E, H] float64: every expert's output for every token, not weighted."""
    x_TH = hidden_TH.double()
    num_experts = len(router_of(block).weight)
    return torch.stack([_expert_output(name, block.experts, expert, x_TH) for expert in range(num_experts)], dim=1)


def _expert_output(name: str, experts: Any, expert: int, x_TH: Tensor) -> Tensor:
    if name == "mixtral4":
        mlp = experts[expert]
        return _swiglu(x_TH, mlp.w1.weight, mlp.w3.weight, mlp.w2.weight)
    if name == "deepseek4":
        mlp = experts[expert]
        return _swiglu(x_TH, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
    if name == "gpt_oss":
        both_TI = x_TH @ experts.gate_up_proj[expert].double() + experts.gate_up_proj_bias[expert].double()
        gate_TI, up_TI = both_TI[:, 0::2].clamp(max=7.0), both_TI[:, 1::2].clamp(-7.0, 7.0)
        inner_TI = (up_TI + 1) * gate_TI / (1 + torch.exp(-1.702 * gate_TI))
        return inner_TI @ experts.down_proj[expert].double() + experts.down_proj_bias[expert].double()
    gate_IH, up_IH = experts.gate_up_proj[expert].chunk(2)
    return _swiglu(x_TH, gate_IH, up_IH, experts.down_proj[expert])


def _swiglu(x_TH: Tensor, gate_IH: Tensor, up_IH: Tensor, down_HI: Tensor) -> Tensor:
    gate_TI = x_TH @ gate_IH.double().T
    return (gate_TI / (1 + torch.exp(-gate_TI)) * (x_TH @ up_IH.double().T)) @ down_HI.double().T


def weighted_sum(weights_TE: Tensor, outputs_TEH: Tensor) -> Tensor:
    """[T, H]: Σ_e w_e E_e(x), token by token."""
    rows = []
    for weights_E, outputs_EH in zip(weights_TE, outputs_TEH, strict=True):
        total_H = torch.zeros_like(outputs_EH[0])
        for weight, output_H in zip(weights_E, outputs_EH, strict=True):
            total_H = total_H + weight * output_H
        rows.append(total_H)
    return torch.stack(rows)
