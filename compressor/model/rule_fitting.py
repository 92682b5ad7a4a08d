"""The closed rule that explains what a router answered, found on tokens and verified under masks, never assumed.

Dimensions: T tokens, E experts of the layer, K experts chosen per token, M ranks looked at.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from compressor.model.routing_rule import GroupRule, Replay, RoutingRule
from compressor.model.structure import MoELayer


def fit_rule(
    layer: MoELayer, logits_TE: Tensor, index_TK: Tensor, weights_TK: Tensor, biases: Sequence[Tensor], replay: Replay
) -> RoutingRule | None:
    """The closed form that explains the router's answers to these tokens and, by `replay`, to masked sets; or None."""
    if layer.id_tensors or (layer.num_groups > 1 and layer.num_extra_choices):
        return None
    tolerance = _tolerance(weights_TK)
    given_TE = weights_by_id(index_TK, weights_TK, layer.num_choices)
    for score in ("softmax", "sigmoid", "sqrtsoftplus"):
        # a small bias may have decided nothing yet, on so few tokens
        for bias, renormalise, groups in itertools.product((*biases, None), (True, False), _group_rules(layer)):
            flat = None if bias is None else bias.double().flatten()
            _, weights = RoutingRule(score, renormalise, 1.0, flat, groups).choose(logits_TE, layer.top_k)
            rule = RoutingRule(score, renormalise, _scale(weights_TK, weights), flat, groups)
            if _agrees(rule, layer, logits_TE, given_TE, tolerance) and _agrees_masked(
                rule, layer, logits_TE, replay, tolerance
            ):
                return None if _is_ambiguous(rule, layer, logits_TE, replay, tolerance) else rule
    return None


def _group_rules(layer: MoELayer) -> list[GroupRule | None]:
    if layer.num_groups == 1:
        return [None]
    scores: tuple[Literal["best", "best two"], ...] = ("best", "best two")
    size = layer.num_experts // layer.num_groups
    return [
        GroupRule(layer.num_groups, layer.num_chosen_groups, score, elsewhere)
        for score, elsewhere in itertools.product(scores, (float("-inf"), 0.0))
        if score == "best" or size >= 2
    ]


def _is_ambiguous(rule: RoutingRule, layer: MoELayer, logits_TE: Tensor, replay: Replay, tolerance: float) -> bool:
    """Whether what ranks experts of other groups is open here, and others could show it: negative rankings."""
    if rule.groups is None or bool((rule.ranking(rule.affinity(logits_TE)) >= 0).all()):
        return False
    other = 0.0 if rule.groups.elsewhere else float("-inf")
    variant = dataclasses.replace(rule, groups=dataclasses.replace(rule.groups, elsewhere=other))
    return _agrees_masked(variant, layer, logits_TE, replay, tolerance)


def explains(rule: RoutingRule, layer: MoELayer, logits_TE: Tensor, index_TK: Tensor, weights_TK: Tensor) -> bool:
    """Whether the rule gives what the router answered on these tokens, ties within rounding aside."""
    given_TE = weights_by_id(index_TK, weights_TK, layer.num_choices)
    return _agrees(rule, layer, logits_TE, given_TE, _tolerance(weights_TK))


def renormalises(
    layer: MoELayer, rule: RoutingRule | None, index_TK: Tensor, weights_TK: Tensor, replay: Replay
) -> bool:
    """Whether chosen weights are divided by their sum: by the rule, by asking for one less, or by equal sums."""
    if rule is not None:
        return rule.renormalise
    tolerance = _tolerance(weights_TK)
    if layer.top_k_fixed or layer.id_tensors or layer.watch_problem or layer.top_k < 2:
        sums_T = weights_TK.double().sum(-1)
        differ = bool(weights_TK.max() - weights_TK.min() > tolerance * weights_TK.max())
        return differ and bool((sums_T.max() - sums_T.min()) <= tolerance * sums_T.abs().max())
    fewer_TN = weights_by_id(*replay(range(layer.num_experts), top_k=layer.top_k - 1), layer.num_choices)
    given_TN = weights_by_id(index_TK, weights_TK, layer.num_choices)
    both_TN = (fewer_TN != 0) & (given_TN != 0)
    return bool((fewer_TN - given_TN)[both_TN].abs().max() > tolerance * given_TN.abs().max())


def _tolerance(weights_TK: Tensor) -> float:
    return 1e-4 if weights_TK.dtype == torch.float32 else 2e-2


def _scale(given_TK: Tensor, unscaled_TK: Tensor) -> float:
    """The factor between two sets of weights, rounded where it is a round number such as 2.5."""
    scale = float((given_TK.double().sum(-1) / unscaled_TK.sum(-1)).median())
    rounded = round(scale, 3)
    return rounded if abs(scale - rounded) < 1e-3 * abs(scale) else scale


def weights_by_id(index_TK: Tensor, weights_TK: Tensor, num_choices: int) -> Tensor:
    """[T, N] float64: every expert's weight by its id, 0 if not chosen."""
    empty_TN = torch.zeros(len(index_TK), num_choices, dtype=torch.float64, device=index_TK.device)
    return empty_TN.scatter_add_(1, index_TK, weights_TK.double())


def _agrees(rule: RoutingRule, layer: MoELayer, logits_TE: Tensor, given_TE: Tensor, tolerance: float) -> bool:
    """Whether the rule gives these weights to all tokens but those whose choice is a tie within rounding."""
    index, weights = rule.choose(logits_TE, layer.top_k)
    difference_T = (weights_by_id(index, weights, layer.num_choices) - given_TE).abs().amax(-1)
    ranking = rule.ranking(rule.affinity(logits_TE)).masked_fill(logits_TE == float("-inf"), float("-inf"))
    if rule.groups is not None:  # what stands in for other groups' rankings is the same for all, and no tie
        ranking = dataclasses.replace(rule.groups, elsewhere=float("-inf")).within(ranking)
    best = ranking.topk(min(layer.top_k + 1, layer.num_choices), dim=-1).values
    tie_T = (best[:, layer.top_k - 1] - best[:, -1]).abs() <= tolerance * best[:, -1].abs().clamp_min(1e-12)
    tie_T &= torch.tensor(best.shape[-1] > layer.top_k, device=tie_T.device)
    limit = tolerance * given_TE.abs().amax(-1).clamp_min(1e-12)
    return bool(((difference_T <= limit) | tie_T).all()) and bool((difference_T <= limit).float().mean() >= 0.5)


def _agrees_masked(rule: RoutingRule, layer: MoELayer, logits_TE: Tensor, replay: Replay, tolerance: float) -> bool:
    size = layer.num_experts // layer.num_groups
    least = max(-(-layer.top_k // layer.num_chosen_groups), 2 if layer.num_groups > 1 else 1)
    most = size - least  # of each group
    generator = torch.Generator().manual_seed(0)
    for draw in range(3 if layer.num_groups == 1 else 8):
        num_dropped = most if draw % 2 else (most + 1) // 2  # with few left, a rule has to say what it does then
        drawn = [torch.randperm(size, generator=generator)[:num_dropped] + g * size for g in range(layer.num_groups)]
        dropped = torch.cat(drawn)
        kept = sorted(set(range(layer.num_experts)) - set(dropped.tolist()))
        index, weights = replay(kept)
        masked = logits_TE.index_fill(-1, dropped.to(logits_TE.device), float("-inf"))
        if not _agrees(rule, layer, masked, weights_by_id(index, weights, layer.num_choices), tolerance):
            return False
    return True
