"""Raw sums per domain and expert: what every criterion is computed from, and nothing that cannot be added up.

Dimensions: c tokens of a chunk, K chosen per token, P = c·K pairs of a token and an expert, D domains, E experts,
H hidden size, B batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compressor.model.routed_tokens import RankedChunk, RoutedTokens
from compressor.model.structure import MoELayer
from compressor.observe.reductions import joined_spread
from compressor.observe.statistic import RankedStatistic

_PAIRS_AT_ONCE = 4096
SUMS = ("tokens", "weight", "share", "norm", "squared_norm", "weighted_norm", "squared_weighted_norm", "share_norm")
"""As in `criteria.ExpertFigures`."""


class ExpertSums(RankedStatistic):
    """Sums over the tokens that chose an expert, per domain, and each batch's domain and size of output; with `outputs`
    each expert's summed output [D, E, H] and its spread.
    """

    weight_norms = True

    def __init__(self, layer: MoELayer, *, outputs: bool = False) -> None:
        self.layer = layer
        self.outputs = outputs
        self._domains: dict[str, int] = {}
        self._sums: list[Tensor] = []
        """One [E, 8] a domain, in the order of SUMS."""
        self._largest: list[Tensor] = []
        self._outputs: dict[int, tuple[Tensor, ...]] = {}
        """A domain's Σ ‖f − mean f‖² [N], numbers of tokens [N] and Σ f [N, H]; float64."""
        self._squared_output_B: list[Tensor] = []
        self._num_tokens_B: list[int] = []
        self._domain_B: list[int] = []

    def num_ranks(self, tokens: RoutedTokens) -> int:
        return tokens.index_TK.shape[1]

    def _domain(self, tokens: RoutedTokens) -> int:
        index = self._domains.setdefault(tokens.domain, len(self._domains))
        if index == len(self._sums):
            device, size = tokens.hidden_TH.device, self.layer.num_choices
            self._sums.append(torch.zeros(size, len(SUMS), dtype=torch.float64, device=device))
            self._largest.append(torch.zeros(size, device=device))
        return index

    def add(self, tokens: RoutedTokens, chunk: RankedChunk) -> None:
        """Add some tokens: one pass over the outputs, the rest on one number for each pair."""
        domain = self._domain(tokens)
        index_P = chunk.order_cM.reshape(-1)
        outputs_PH = chunk.outputs_cMH.reshape(len(index_P), -1)
        weights_cK = tokens.weights_TK[chunk.start : chunk.stop].double()
        shares_cK = weights_cK / weights_cK.sum(1, keepdim=True).clamp_min(1e-300)
        weight_P, share_P = weights_cK.reshape(-1), shares_cK.reshape(-1)
        norm_P = torch.linalg.vector_norm(outputs_PH, dim=1).double()
        columns = (
            torch.ones_like(norm_P),
            weight_P,
            share_P,
            norm_P,
            norm_P.square(),
            weight_P * norm_P,
            (weight_P * norm_P).square(),
            share_P * norm_P,
        )
        self._sums[domain].index_add_(0, index_P, torch.stack(columns, dim=1))
        smallest_P, most_P = outputs_PH.aminmax(dim=1)
        magnitude_P = torch.maximum(-smallest_P, most_P)
        self._largest[domain].scatter_reduce_(0, index_P, magnitude_P, "amax")
        if self.outputs:
            for start in range(0, len(index_P), _PAIRS_AT_ONCE):
                part = slice(start, start + _PAIRS_AT_ONCE)
                self._add_outputs(domain, index_P[part], outputs_PH[part].double())

    def _add_outputs(self, domain: int, index_P: Tensor, outputs_PH: Tensor) -> None:
        """Add some outputs, float64, to Σ f, and their squared distances from the mean: first the mean, then those."""
        tokens_N = torch.bincount(index_P, minlength=self.layer.num_choices).double()
        summed_NH = outputs_PH.new_zeros(len(tokens_N), outputs_PH.shape[1]).index_add_(0, index_P, outputs_PH)
        mean_NH = summed_NH / tokens_N.clamp_min(1)[:, None]
        squared_P = (outputs_PH - mean_NH[index_P]).square_().sum(1)
        spread_N = torch.zeros_like(tokens_N).index_add_(0, index_P, squared_P)
        own = (spread_N, tokens_N, summed_NH)
        before = self._outputs.get(domain) or tuple(map(torch.zeros_like, own))
        both = [torch.stack(pair) for pair in zip(before, own, strict=True)]
        self._outputs[domain] = (joined_spread(*both), both[1].sum(0), both[2].sum(0))

    def end_batch(self, tokens: RoutedTokens) -> None:
        """Add what is known of a batch as a whole."""
        self._squared_output_B.append(tokens.squared_output)
        self._num_tokens_B.append(tokens.num_tokens)
        self._domain_B.append(self._domain(tokens))
        if self.outputs and self._domain_B[-1] not in self._outputs:  # a domain without a token
            self._add_outputs(self._domain_B[-1], tokens.index_TK.reshape(-1), tokens.wanted_TH.double())

    def largest(self) -> Tensor:
        """[E] float64: the largest magnitude of a number in each expert's outputs, over all tokens of all processes."""
        largest_N = torch.zeros(self.layer.num_choices, dtype=torch.float64)
        for of_domain_N in self._largest:
            largest_N = largest_N.maximum(of_domain_N.double().cpu())
        return self.processes.largest(largest_N)[: self.layer.num_experts]

    def tensors(self) -> dict[str, Tensor]:
        """sums.NAME [D, E] float64 for each of SUMS, sums.largest [D, E]; if asked for, sums.output [D, E, H] and
        sums.spread [D, E] float64; batch.squared_output [B] float64, batch.num_tokens and batch.domain [B] int64.
        Of no batch D and B are 0.
        """
        experts = slice(self.layer.num_experts)  # what else can be chosen stands behind them
        sums_DES = _stacked(self._sums, self.layer.num_choices, len(SUMS))[:, experts].cpu()
        found = {f"sums.{name}": sums_DES[..., place].contiguous() for place, name in enumerate(SUMS)}
        found["sums.largest"] = _stacked(self._largest, self.layer.num_choices)[:, experts].double().cpu()
        if self.outputs:
            outputs = [self._outputs[domain] for domain in range(len(self._sums))]
            found["sums.spread"] = torch.stack([spread_N for spread_N, _, _ in outputs])[:, experts].cpu()
            found["sums.output"] = torch.stack([summed_NH for _, _, summed_NH in outputs])[:, experts].cpu()
        return found | {
            "batch.squared_output": _stacked(self._squared_output_B),
            "batch.num_tokens": torch.tensor(self._num_tokens_B, dtype=torch.int64),
            "batch.domain": torch.tensor(self._domain_B, dtype=torch.int64),
        }


def _stacked(rows: Sequence[Tensor], *shape: int) -> Tensor:
    """Rows of this shape, one above the other; of none the empty tensor."""
    return torch.stack(list(rows)) if rows else torch.zeros(0, *shape, dtype=torch.float64)
