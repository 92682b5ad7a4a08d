"""HC-SMoE's figures and formulas (arXiv 2410.08589). c tokens, M ranks, E experts, H hidden size, all sums float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compressor.plugin import MoELayer, RankedChunk, RankedStatistic, RoutedTokens, Rule


class MeanOutputs(RankedStatistic):
    """Σ of every expert's output over all tokens, chosen or not (equation 4), and how often each is chosen."""

    own_rules: Mapping[str, Rule] = {"outputs": "total", "chosen": "total", "seen": "total"}

    def __init__(self, layer: MoELayer) -> None:
        self._num_experts = layer.num_experts
        self._chosen_E = torch.zeros(layer.num_choices, dtype=torch.float64)
        self._outputs_EH: Tensor | None = None
        self._seen = 0

    def num_ranks(self, tokens: RoutedTokens) -> int:
        """All of them."""
        return tokens.layer.num_choices

    def add(self, tokens: RoutedTokens, chunk: RankedChunk) -> None:
        """Add the outputs of some tokens."""
        order_cM, outputs_cMH = chunk.order_cM, chunk.outputs_cMH
        if self._outputs_EH is None:
            self._outputs_EH = outputs_cMH.new_zeros(len(self._chosen_E), outputs_cMH.shape[-1], dtype=torch.float64)
        self._outputs_EH.index_add_(0, order_cM.flatten(), outputs_cMH.flatten(0, 1).double())
        chosen = order_cM[:, : tokens.index_TK.shape[1]].flatten()
        self._chosen_E += chosen.bincount(minlength=len(self._chosen_E)).cpu()
        self._seen += len(order_cM)

    def tensors(self) -> dict[str, Tensor]:
        """Sums: outputs [E, H], chosen [E], seen []."""
        assert self._outputs_EH is not None
        return {
            "outputs": self._outputs_EH[: self._num_experts].cpu(),
            "chosen": self._chosen_E[: self._num_experts].clone(),
            "seen": torch.tensor(float(self._seen), dtype=torch.float64),
        }


def average_linkage(points_EH: Tensor, num_clusters: int) -> list[list[int]]:
    """Clusters of points, each ascending, in the order of their first members: from single points on, the two whose
    members are closest on average (Euclidean, equation 5) are joined; of equal pairs the first.
    """
    distance_EE = torch.cdist(points_EH, points_EH, compute_mode="donot_use_mm_for_euclid_dist")
    clusters = [[expert] for expert in range(len(points_EH))]
    while len(clusters) > num_clusters:
        pairs = [(a, b) for a in range(len(clusters)) for b in range(a + 1, len(clusters))]
        a, b = min(pairs, key=lambda pair: float(distance_EE[clusters[pair[0]]][:, clusters[pair[1]]].mean()))
        clusters[a] = sorted(clusters[a] + clusters.pop(b))
    return clusters


def shares(chosen_E: Tensor, clusters: list[list[int]], *, by_use: bool) -> Tensor:
    """What each expert counts in its cluster's average (equation 7): its share of the choices, [E] float64, adding up
    to 1 in each cluster; equal shares where that is asked for, or none of them was ever chosen.
    """
    share_E = torch.zeros_like(chosen_E)
    for members in clusters:
        total = chosen_E[members].sum()
        share_E[members] = chosen_E[members] / total if by_use and total > 0 else 1 / len(members)
    return share_E
