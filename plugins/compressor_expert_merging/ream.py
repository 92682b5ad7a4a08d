"""REAM's figures and formulas (arXiv 2604.04356). c tokens, K chosen of M ranks, E experts, H hidden size, N neurons,
all sums float64. f: an expert's output, g: its weight, z: the router's logits, p: their softmax.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from compressor.plugin import MoELayer, RankedChunk, RoutedTokens, Rule
from compressor_expert_merging.clustering import MeanOutputs


class GatedOutputs(MeanOutputs):
    """Σ g‖f‖ of the tokens that chose an expert, and over all tokens Σ p f and Σ z zᵀ."""

    own_rules: Mapping[str, Rule] = {**MeanOutputs.own_rules, "weighted_norm": "total", "logits": "total"}

    def __init__(self, layer: MoELayer) -> None:
        super().__init__(layer)
        self._weighted_E = torch.zeros(layer.num_choices, dtype=torch.float64)
        self._logits_EE = torch.zeros(layer.num_experts, layer.num_experts, dtype=torch.float64)

    def add(self, tokens: RoutedTokens, chunk: RankedChunk) -> None:
        """Add the outputs of some tokens."""
        part = slice(chunk.start, chunk.stop)
        logits_cE, weights_cK = tokens.logits_TE[part], tokens.weights_TK[part]
        gates_cM = logits_cE.softmax(-1).gather(1, chunk.order_cM)
        super().add(tokens, replace(chunk, outputs_cMH=chunk.outputs_cMH * gates_cM[..., None]))
        chosen = chunk.first(weights_cK.shape[1])
        norms_c = (weights_cK.double() * chosen.outputs_cMH.double().norm(dim=-1)).flatten().cpu()
        self._weighted_E.index_add_(0, chosen.order_cM.flatten().cpu(), norms_c)
        own_cE = logits_cE[:, : self._num_experts].double()
        self._logits_EE += (own_cE.T @ own_cE).cpu()

    def tensors(self) -> dict[str, Tensor]:
        """Those of `MeanOutputs`, of outputs times p; weighted_norm [E], logits [E, E]."""
        return {**super().tensors(), "weighted_norm": self._weighted_E[: self._num_experts], "logits": self._logits_EE}


def saliency(figures: Mapping[str, Tensor]) -> Tensor:
    """[E]: REAP's, Σ g‖f‖ / N over the tokens that chose the expert; the least of all, 0.5 at most, where none did."""
    found_E = figures["weighted_norm"] / figures["chosen"]
    return found_E.nan_to_num(nan=float(found_E.nan_to_num(nan=0.5).min()))


def similarity(figures: Mapping[str, Tensor]) -> Tensor:
    """[E, E] from 0 to 1, the mean of two: how alike the directions of mean gated outputs are, (1 + cos)/2, and how
    near the router's logits, each over all tokens and of length 1: 1 − distance / the largest distance.
    """
    direction_EH = normalize(figures["outputs"], dim=-1)
    length_E = figures["logits"].diagonal().sqrt().clamp_min(1e-300)
    apart_EE = (2 - 2 * figures["logits"] / length_E[:, None] / length_E).clamp_min(0).sqrt().fill_diagonal_(0)
    near_EE = 1 - apart_EE / apart_EE.max().clamp_min(1e-300)
    return ((1 + direction_EH @ direction_EH.T) / 2 + near_EE) / 2


def pseudo_groups(saliency_E: Tensor, similarity_EE: Tensor, num_groups: int, size: int) -> list[list[int]]:
    """Groups, their centroids first: the most salient experts, of which, in that order, each takes the experts that are
    most like it and left, until it has `size` members. Of equals the first.
    """
    order = saliency_E.argsort(descending=True, stable=True).tolist()
    groups, left = [[centroid] for centroid in order[:num_groups]], order[num_groups:]
    for group in groups:
        nearest = sorted(left, key=lambda other: (-float(similarity_EE[group[0], other]), other))
        group.extend(nearest[: size - 1])
        left = nearest[size - 1 :]
    return groups


def aligned(own: Mapping[str, Tensor], to: Mapping[str, Tensor]) -> Tensor:
    """[N]: which neuron of an expert stands for each of another one's; tensors [N, …] of both. The distances between
    what belongs to a neuron, of length 1, add up to the least there is.
    """
    from scipy.optimize import linear_sum_assignment

    mine, theirs = (normalize(torch.cat([of[name].double().flatten(1) for name in to], 1)) for of in (own, to))
    return torch.from_numpy(linear_sum_assignment(torch.cdist(theirs, mine).cpu().numpy())[1])
