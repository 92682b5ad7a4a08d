"""What HOPE judges sets of experts by: the sizes of what two experts of one token add to the layer's output.

Dimensions: c tokens, K chosen per token, M ranks, N choices (experts and what else there is), E experts, D domains.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.plugin import MoELayer, RankedChunk, RankedStatistic, RoutedTokens


class PairSizes(RankedStatistic):
    """Σ a_i a_j over the tokens that chose both, a = g‖f‖, and how many tokens these are: [D, E, E] each."""

    def __init__(self, layer: MoELayer, criterion: str) -> None:
        self.layer, self.criterion = layer, criterion
        self._sums: dict[str, Tensor] = {}

    def _of_domain(self, tokens: RoutedTokens) -> Tensor:
        size = self.layer.num_choices
        empty_2NN = tokens.weights_TK.new_zeros(2, size, size, dtype=torch.float64)
        return self._sums.setdefault(tokens.domain, empty_2NN)

    def num_ranks(self, tokens: RoutedTokens) -> int:
        """The experts chosen."""
        return tokens.index_TK.shape[1]

    def add(self, tokens: RoutedTokens, chunk: RankedChunk) -> None:
        """Add some tokens: two products of [N, c] with [c, N]."""
        weights_cK = tokens.weights_TK[chunk.start : chunk.stop].double()
        norms_cK = torch.linalg.vector_norm(chunk.outputs_cMH, dim=-1).double()
        empty_cN = weights_cK.new_zeros(len(weights_cK), self.layer.num_choices)
        sizes_cN = empty_cN.scatter(1, chunk.order_cM, weights_cK * norms_cK)
        chosen_cN = empty_cN.scatter(1, chunk.order_cM, 1.0)
        self._of_domain(tokens).add_(torch.stack([sizes_cN.T @ sizes_cN, chosen_cN.T @ chosen_cN]))

    def end_batch(self, tokens: RoutedTokens) -> None:
        """A domain without a token has its row too."""
        self._of_domain(tokens)

    def tensors(self) -> dict[str, Tensor]:
        """sums.CRITERION.products and sums.CRITERION.together [D, E, E] float64."""
        experts = slice(self.layer.num_experts)
        products_DEE, together_DEE = torch.stack(list(self._sums.values()), dim=1)[..., experts, experts].cpu()
        return {
            f"sums.{self.criterion}.products": products_DEE.contiguous(),
            f"sums.{self.criterion}.together": together_DEE.contiguous(),
        }
