"""What a router does with tokens: masking experts, reading its logits, and the rule that turns logits into weights.

Dimensions: T tokens, E experts of the layer, K experts chosen per token, M ranks looked at, H hidden size.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.errors import UnsupportedModelError
from compressor.moe.logits import RouterLogits
from compressor.moe.modules import tensor_at
from compressor.moe.structure import MoELayer, Structure

Score = Literal["softmax", "sigmoid", "sqrtsoftplus"]


def dropped_experts(layer: MoELayer, kept: Sequence[int], device: torch.device) -> Tensor:
    """The ids that are not kept, ascending, int64."""
    return torch.tensor(sorted(set(range(layer.num_experts)) - set(kept)), dtype=torch.int64, device=device)


def router_weights(model: nn.Module, layer: MoELayer) -> list[Tensor]:
    """What the layer's logits are computed with; RouterLogits knows the router's linear map by them."""
    return [tensor_at(model, name) for name in layer.router_weights]


def selection_biases(model: nn.Module, layer: MoELayer) -> list[tuple[str, Tensor]]:
    """The tensors with one number per expert outside the experts: correction biases, and the biases of linear
    routers.
    """
    return [(name, tensor_at(model, name)) for name in layer.selection_biases]


@contextmanager
def experts_hidden(model: nn.Module, layer: MoELayer, dropped: Tensor) -> Iterator[None]:
    """Hide experts from everything but the logits, and put it all back afterwards, bit for bit.

    Selection biases, which some routers add to the scores after the linear map, become −inf. Look-up tables that hold
    expert ids are redirected to experts that stay.
    """
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        for name, tensor in selection_biases(model, layer):
            saved.append((tensor, tensor.detach().clone()))
            with torch.no_grad():
                tensor.index_fill_(layer.tensors[name].dim, dropped, float("-inf"))
        for name in layer.id_tensors:
            tensor = tensor_at(model, name)
            saved.append((tensor, tensor.detach().clone()))
            tensor.copy_(redirected(tensor, dropped, router_weights(model, layer)[0][: layer.num_experts]))
        yield
    finally:
        with torch.no_grad():
            for tensor, value in saved:
                tensor.copy_(value)


@torch.no_grad()
def redirected(ids: Tensor, dropped: Tensor, router_EH: Tensor) -> Tensor:
    """A table of expert ids [N, K] in which every dropped expert is replaced by one that stays.

    The stand-in is the kept expert whose router row is most alike (largest cosine), of those that the table's row does
    not name already, so a token still has K different experts. No source prescribes this; an expert with a similar
    router row was trained to be chosen for similar tokens.
    """
    if not len(dropped):
        return ids
    rows_EH = functional.normalize(router_EH.float(), dim=-1)
    alike_EE = (rows_EH @ rows_EH.T).index_fill(1, dropped, float("-inf"))
    is_dropped_E = torch.zeros(len(rows_EH), dtype=torch.bool, device=ids.device).index_fill(0, dropped, True)
    new = ids.clone()
    for column in range(ids.shape[-1]):
        where = is_dropped_E[new[:, column].long()].nonzero()[:, 0]
        for part in where.split(2**22 // len(rows_EH) + 1):  # type: ignore[no-untyped-call]
            alike = alike_EE[new[part, column].long()].scatter(1, new[part].long(), float("-inf"))
            new[part, column] = alike.argmax(-1).to(new.dtype)
    return new


def relabelled(ids: Tensor, layer: MoELayer, kept: Sequence[int], router_EH: Tensor) -> Tensor:
    """A table of expert ids [N, K] as it is when only `kept` experts stay: dropped ones redirected, ids counted anew.

    `router_EH` are the router's rows of all the layer's experts.
    """
    dropped = dropped_experts(layer, kept, ids.device)
    new_id = torch.zeros(layer.num_experts, dtype=ids.dtype, device=ids.device)
    new_id[torch.tensor(kept, device=ids.device)] = torch.arange(len(kept), dtype=ids.dtype, device=ids.device)
    return new_id[redirected(ids, dropped, router_EH).long()]


@contextmanager
def masked_router(model: nn.Module, layer: MoELayer, kept: Sequence[int]) -> Iterator[None]:
    """Within the context the layer's router cannot choose any expert but `kept`: dropped logits and biases are −inf.

    This is what removing the other experts means: the router's own softmax, top-k and renormalisation then see only the
    kept ones.
    """
    router, weights = model.get_submodule(layer.router), router_weights(model, layer)
    dropped = dropped_experts(layer, kept, weights[0].device)
    if not len(dropped):
        yield
        return
    active: list[RouterLogits] = []

    def enter(module: nn.Module, args: Any) -> None:
        mode = RouterLogits(weights, dropped=dropped)
        mode.__enter__()  # type: ignore[no-untyped-call]
        active.append(mode)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if not active:
            return
        mode = active.pop()
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if output is not None and mode.seen is None:  # no output: the forward has failed, and says why itself
            raise UnsupportedModelError(
                f"{layer.router}: saw no linear map with its weights inside its forward, so experts cannot be masked."
            )

    hooks = [router.register_forward_pre_hook(enter), router.register_forward_hook(leave, always_call=True)]
    try:
        with experts_hidden(model, layer, dropped):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        while active:
            active.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]


@contextmanager
def top_k_set(model: Any, structure: Structure, top_k: int | None) -> Iterator[None]:
    """Within the context every router chooses `top_k` experts; None leaves them as they are."""
    leaf = structure.top_k_leaf
    if top_k is None or leaf is None:
        yield
        return
    saved = leaf.get(model.config)
    write_top_k(model, structure, top_k)
    try:
        yield
    finally:
        write_top_k(model, structure, saved)


def write_top_k(model: Any, structure: Structure, top_k: int) -> None:
    """Set the number of experts per token in the config and in every module that keeps it; not in modules that have
    another one than the config for the time being (`SkipRule.normalise_over`).
    """
    assert structure.top_k_leaf is not None
    before = structure.top_k_leaf.get(model.config)
    structure.top_k_leaf.set(model.config, top_k)
    for (path, attribute), (stride, extra) in structure.top_k_integers.items():
        module = model.get_submodule(path)
        if getattr(module, attribute) == stride * before + extra:
            setattr(module, attribute, stride * top_k + extra)


@dataclass(frozen=True)
class GroupRule:
    """A router that first chooses groups of experts, and then experts of these groups only (DeepSeek-V2 and V3)."""

    num_groups: int
    num_chosen: int
    score: Literal["best", "best two"]
    """What a group is chosen by: the ranking of its best expert, or the sum of its best two."""
    elsewhere: float
    """The ranking that experts of other groups are given, −inf or 0: with 0 they may still be chosen, at a pinch."""

    def within(self, ranking_TE: Tensor) -> Tensor:
        """[T, E]: the ranking with the experts of groups that are not chosen put last."""
        size = ranking_TE.shape[-1] // self.num_groups
        by_group_TGX = ranking_TE.reshape(*ranking_TE.shape[:-1], self.num_groups, size)
        best_TGX = by_group_TGX.topk(1 if self.score == "best" else 2, dim=-1).values
        chosen_TC = best_TGX.sum(-1).topk(self.num_chosen, dim=-1).indices
        is_chosen_TG = torch.zeros(by_group_TGX.shape[:-1], dtype=torch.bool, device=ranking_TE.device)
        is_chosen_TG.scatter_(-1, chosen_TC, True)
        gone = by_group_TGX == float("-inf")
        elsewhere_TGX = by_group_TGX.masked_fill(~is_chosen_TG[..., None] & ~gone, self.elsewhere)
        return elsewhere_TGX.flatten(-2)


@dataclass(frozen=True)
class RoutingRule:
    """A router's rule in closed form: weights are `scale × affinity`, over the sum of the chosen ones if `renormalise`.

    affinity = softmax, sigmoid or √softplus of the logits; the K experts with the largest `affinity + bias` are chosen,
    of the chosen groups where there are `groups`.
    Where softmax is not renormalised, dropping any expert rescales every token: its sum runs over the kept experts
    only. The rule was compared with the router on the first calibration tokens, with all experts and with some masked,
    and explains what the router answered on these.
    """

    score: Score
    renormalise: bool
    scale: float
    bias: Tensor | None = field(default=None, repr=False)
    """[E] float64, or None."""
    groups: GroupRule | None = None

    def affinity(self, logits_TE: Tensor) -> Tensor:
        """[T, E] float64: each expert's score before choice and renormalisation."""
        logits_TE = logits_TE.double()
        if self.score == "softmax":
            return logits_TE.softmax(-1)
        if self.score == "sigmoid":
            return logits_TE.sigmoid()
        return functional.softplus(logits_TE).sqrt()

    def ranking(self, affinity_TE: Tensor) -> Tensor:
        """[T, E] float64: what the choice is made by."""
        return affinity_TE if self.bias is None else affinity_TE + self.bias

    @property
    def rescales_all(self) -> bool:
        """Whether dropping an expert changes the weights of tokens that never chose it."""
        return self.score == "softmax" and not self.renormalise

    def choose(self, logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """The chosen ids [T, K] int64 and their weights [T, K] float64; logits of experts that are gone are −inf."""
        affinity_TE = self.affinity(logits_TE)
        ranking_TE = self.ranking(affinity_TE).masked_fill(logits_TE == float("-inf"), float("-inf"))
        if self.groups is not None:
            ranking_TE = self.groups.within(ranking_TE)
        index_TK = ranking_TE.topk(top_k, dim=-1).indices
        weights_TK = affinity_TE.gather(-1, index_TK)
        if self.renormalise:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return index_TK, weights_TK * self.scale


class Replay(Protocol):
    """The router itself, run again on the same tokens with all but the kept experts masked."""

    def __call__(self, kept: Sequence[int], top_k: int | None = None) -> tuple[Tensor, Tensor]:
        """(index [T, K], weights [T, K]); `top_k` replaces the model's number of experts per token."""


def fit_rule(
    layer: MoELayer,
    logits_TE: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
    biases: Sequence[Tensor],
    replay: Replay,
) -> RoutingRule | None:
    """Find the closed form that explains what the router answered, or None where there is no such form.

    Tried on the tokens given and, through `replay`, on a few sets of masked experts.
    """
    if layer.id_tensors or (layer.num_groups > 1 and layer.num_extra_choices):
        return None
    tolerance = _tolerance(weights_TK)
    given_TE = _scatter(index_TK, weights_TK, layer.num_choices)
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
    """Whether these tokens leave open what experts of other groups are ranked by, and others could show it.

    It matters only where rankings are negative, which few tokens may not have led to.
    """
    if rule.groups is None or bool((rule.ranking(rule.affinity(logits_TE)) >= 0).all()):
        return False
    other = 0.0 if rule.groups.elsewhere else float("-inf")
    variant = dataclasses.replace(rule, groups=dataclasses.replace(rule.groups, elsewhere=other))
    return _agrees_masked(variant, layer, logits_TE, replay, tolerance)


def explains(rule: RoutingRule, layer: MoELayer, logits_TE: Tensor, index_TK: Tensor, weights_TK: Tensor) -> bool:
    """Whether the rule gives what the router answered on these tokens, ties within rounding aside."""
    given_TE = _scatter(index_TK, weights_TK, layer.num_choices)
    return _agrees(rule, layer, logits_TE, given_TE, _tolerance(weights_TK))


def renormalises(
    layer: MoELayer, rule: RoutingRule | None, index_TK: Tensor, weights_TK: Tensor, replay: Replay
) -> bool:
    """Whether the router divides the weights of the experts that it chose by their sum, or something that holds it.

    By the closed rule; without one, by asking for one expert less: the others' weights then grow. Where the router
    cannot be asked, weights differ and all tokens' sums are alike if it does.
    """
    if rule is not None:
        return rule.renormalise
    tolerance = _tolerance(weights_TK)
    if layer.top_k_fixed or layer.id_tensors or layer.watch_problem or layer.top_k < 2:
        sums_T = weights_TK.double().sum(-1)
        differ = bool(weights_TK.max() - weights_TK.min() > tolerance * weights_TK.max())
        return differ and bool((sums_T.max() - sums_T.min()) <= tolerance * sums_T.abs().max())
    fewer_TN = _scatter(*replay(range(layer.num_experts), top_k=layer.top_k - 1), layer.num_choices)
    given_TN = _scatter(index_TK, weights_TK, layer.num_choices)
    both_TN = (fewer_TN != 0) & (given_TN != 0)
    return bool((fewer_TN - given_TN)[both_TN].abs().max() > tolerance * given_TN.abs().max())


def _tolerance(weights_TK: Tensor) -> float:
    return 1e-4 if weights_TK.dtype == torch.float32 else 2e-2


def _scale(given_TK: Tensor, unscaled_TK: Tensor) -> float:
    """The factor between two sets of weights, rounded where it is a round number such as 2.5."""
    scale = float((given_TK.double().sum(-1) / unscaled_TK.sum(-1)).median())
    rounded = round(scale, 3)
    return rounded if abs(scale - rounded) < 1e-3 * abs(scale) else scale


def _scatter(index_TK: Tensor, weights_TK: Tensor, num_choices: int) -> Tensor:
    empty = torch.zeros(len(index_TK), num_choices, dtype=torch.float64, device=index_TK.device)
    return empty.scatter_(1, index_TK, weights_TK.double())


def _agrees(rule: RoutingRule, layer: MoELayer, logits_TE: Tensor, given_TE: Tensor, tolerance: float) -> bool:
    """Whether the rule gives these weights to all tokens but those whose choice is a tie within rounding."""
    index, weights = rule.choose(logits_TE, layer.top_k)
    difference_T = (_scatter(index, weights, layer.num_choices) - given_TE).abs().amax(-1)
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
        if not _agrees(rule, layer, masked, _scatter(index, weights, layer.num_choices), tolerance):
            return False
    return True
