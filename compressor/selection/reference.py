"""The paper's objective for a few given sets of experts, computed the literal way; and random sets to compare with.

The router is run again for every set, the experts that it then chooses are evaluated, and the outputs are compared.
Slow (one forward of the layer a set) and right for any router: this is what searches are checked against.

Dimensions: T tokens, c tokens of a chunk, K chosen per token, H hidden size, S sets, B batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compressor.method import Decision
from compressor.model.routed_tokens import RankedChunk, RoutedTokens
from compressor.model.structure import MoELayer
from compressor.observe.reductions import Rule
from compressor.observe.statistic import RankedStatistic

_TOKENS_AT_ONCE = 4096


class SetLosses(RankedStatistic):
    """Squared errors of the layer's output for given sets of kept experts, per batch."""

    own_rules: Mapping[str, Rule] = {"squared_error": "batches", "squared_output": "batches"}

    def __init__(self, layer: MoELayer, sets: Sequence[Sequence[int]], top_k: int | None = None) -> None:
        self.layer = layer
        self.sets = sets
        self.top_k = top_k
        self._errors_BS: list[Tensor] = []
        self._squared_output_B: list[Tensor] = []

    def num_ranks(self, tokens: RoutedTokens) -> int:
        """Those that the layer chooses: its own output."""
        return tokens.index_TK.shape[1]

    def add(self, tokens: RoutedTokens, chunk: RankedChunk) -> None:
        """Nothing: whole batches are compared."""

    def end_batch(self, tokens: RoutedTokens) -> None:
        """Run the router once for every set, and the experts that it then chooses."""
        errors = [squared_error(tokens, kept, tokens.wanted_TH, self.top_k) for kept in self.sets]
        self._errors_BS.append(torch.stack(errors).cpu())
        self._squared_output_B.append(tokens.squared_output)

    def tensors(self) -> dict[str, Tensor]:
        """squared_error [B, S] and squared_output [B], float64."""
        return {"squared_error": torch.stack(self._errors_BS), "squared_output": torch.stack(self._squared_output_B)}


def squared_error(tokens: RoutedTokens, kept: Sequence[int], wanted_TH: Tensor, top_k: int | None = None) -> Tensor:
    """Σ over the tokens of ‖F(x; kept) − wanted‖², float64."""
    if len(kept) == tokens.layer.num_experts and top_k is None:
        index_TK, weights_TK = tokens.index_TK, tokens.weights_TK
    else:
        index_TK, weights_TK = tokens.replay(kept, top_k=top_k)
    total = torch.zeros((), dtype=torch.float64, device=wanted_TH.device)
    for start in range(0, tokens.num_tokens, _TOKENS_AT_ONCE):
        part = slice(start, start + _TOKENS_AT_ONCE)
        outputs_cKH = tokens.evaluate_experts(tokens.hidden_TH[part], index_TK[part]).float()
        if tokens.lift is not None:
            outputs_cKH = tokens.lift(outputs_cKH.flatten(0, 1)).view(*outputs_cKH.shape[:2], -1)
        output_cH = torch.bmm(weights_TK[part].float()[:, None], outputs_cKH)[:, 0]
        total += (output_cH - wanted_TH[part].float()).square().sum(dtype=torch.float64)
    return total


def relative_losses(figures: Mapping[str, Tensor]) -> Tensor:
    """[S]: Σ_batches √error over Σ_batches ‖output‖."""
    norm = figures["squared_output"].sqrt().sum()
    return figures["squared_error"].sqrt().sum(0) / norm.clamp_min(1e-300)


def kept_at_random(decision: Decision, layers: Sequence[MoELayer], seed: int) -> Decision | str:
    """A decision whose layers say which experts are `kept`, by chance: as many of each layer, equally many of each of
    the router's groups, and no more said of the layer. Where all are kept, that there is nothing to draw.
    """
    generator, drawn = torch.Generator().manual_seed(seed), {}
    for layer in layers:
        num_kept = len(decision["layers"][layer.path]["kept"])
        size, count = layer.num_experts // layer.num_groups, num_kept // layer.num_groups
        ids = [torch.randperm(size, generator=generator)[:count] + g * size for g in range(layer.num_groups)]
        drawn[layer.path] = {"kept": sorted(torch.cat(ids).tolist())}
    if all(len(drawn[layer.path]["kept"]) == layer.num_experts for layer in layers):
        return "drops no experts, so there is nothing to draw at random"
    return Decision({**decision, "layers": drawn})
