"""The least squares of a layer's output. Dimensions: T tokens, c of a chunk, E experts, K chosen, H hidden size.

The layer puts out Σ_k w_k f_k of the experts that a token chooses, and the original put out y. With a scale for each
expert the loss is Σ ‖y − Σ_k s_k w_k f_k‖² = Σ ‖y‖² − 2 bᵀs + sᵀAs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compressor.plugin import MoELayer, RankedChunk, RankedStatistic, RoutedTokens, Rule


class Terms(RankedStatistic):
    """A [E, E], b [E] and Σ ‖y‖² in float64, of calibration text (`fit.`) and of held-out text (`held_out.`)."""

    own_rules: Mapping[str, Rule] = {"fit.": "total", "held_out.": "total"}

    def __init__(self, layer: MoELayer) -> None:
        size = layer.num_experts
        self._terms = {
            text: {"A": torch.zeros(size, size).double(), "b": torch.zeros(size).double(), "y": torch.zeros(1).double()}
            for text in ("fit", "held_out")
        }

    def num_ranks(self, tokens: RoutedTokens) -> int:
        """The experts chosen."""
        return tokens.layer.top_k

    def add(self, tokens: RoutedTokens, chunk: RankedChunk) -> None:
        """Add the inner products of a chunk's outputs and of the original's output, the last row and column."""
        assert tokens.target_TH is not None
        part = slice(chunk.start, chunk.stop)
        target_c1H = tokens.target_TH[part, None].float()
        weights_cK = tokens.weights_TK[part].double()
        outputs_cXH = torch.cat([chunk.outputs_cMH, target_c1H], dim=1)
        gram_cXX = RankedChunk(chunk.start, chunk.stop, chunk.order_cM, outputs_cXH).gram()
        factors_cX = torch.cat([weights_cK, weights_cK.new_ones(len(weights_cK), 1)], dim=1)
        gram_cXX = (gram_cXX * factors_cX[:, :, None] * factors_cX[:, None]).cpu()
        order_cK, terms = chunk.order_cM.cpu(), self._terms["held_out" if tokens.held_out else "fit"]
        size = len(terms["b"])
        pairs_cKK = order_cK[:, :, None] * size + order_cK[:, None]
        terms["A"].view(-1).index_add_(0, pairs_cKK.flatten(), gram_cXX[:, :-1, :-1].flatten())
        terms["b"].index_add_(0, order_cK.flatten(), gram_cXX[:, :-1, -1].flatten())
        terms["y"] += gram_cXX[:, -1, -1].sum()

    def tensors(self) -> dict[str, Tensor]:
        """`fit.A`, `fit.b`, `fit.y`, and those of held-out text."""
        return {f"{text}.{name}": one for text, terms in self._terms.items() for name, one in terms.items()}


def scales(figures: Mapping[str, Tensor], ridge: float, *, per_layer: bool = False) -> Tensor:
    """[E] float64: the scales with the least loss on the text that they are fitted to, plus ridge · diag(A) times their
    squared distance from 1. An expert that no token has chosen keeps 1.
    """
    A_EE, b_E = figures["fit.A"], figures["fit.b"]
    if per_layer:
        A_EE, b_E = A_EE.sum().reshape(1, 1), b_E.sum().reshape(1)
    own_E = A_EE.diagonal()
    held_EE = torch.diag(torch.where(own_E > 0, ridge * own_E, 1.0))
    off_E = torch.linalg.lstsq(A_EE + held_EE, b_E - A_EE.sum(1), driver="gelsd").solution
    scale_E: Tensor = 1 + off_E
    return scale_E.expand(len(figures["fit.b"])).clone()


def relative_loss(figures: Mapping[str, Tensor], scale_E: Tensor) -> float:
    """The loss on held-out text with these scales, as a share of the original's output; 0 where that is nothing."""
    loss = figures["held_out.y"] - 2 * figures["held_out.b"] @ scale_E + scale_E @ figures["held_out.A"] @ scale_E
    return float(loss / figures["held_out.y"]) if figures["held_out.y"] else 0.0
