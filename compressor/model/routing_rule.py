"""The rule that turns a router's logits into choices and weights.

Dimensions: T tokens, E experts of the layer, K experts chosen per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

Score = Literal["softmax", "sigmoid", "sqrtsoftplus"]


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
