"""Routers that sort (token, expert) pairs by expert and return lists of them (JetMoE).

Dimensions: T tokens, K experts chosen per token, E experts, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.errors import UnsupportedModelError


@dataclass(frozen=True)
class PairLists:
    """What a router that sorts pairs by expert returns: (place among T·K, token, weight, pairs of each expert, …)."""

    slot_P: Tensor
    token_P: Tensor
    weight_P: Tensor
    sizes: list[int]
    others: tuple[Any, ...]
    top_k: int

    @classmethod
    def of(cls, output: Any, path: str, num_tokens: int) -> PairLists:
        """What a router has returned for so many tokens. Raises UnsupportedModelError where it is something else."""
        kinds = tuple(type(value) for value in output) if isinstance(output, tuple) else ()
        is_known = kinds[:4] == (Tensor, Tensor, Tensor, list) and sum(output[3]) == len(output[0])
        if not is_known or len(output[0]) % num_tokens:
            raise UnsupportedModelError(
                f"{path}: its router does not return lists of pairs, tokens, weights and numbers by expert."
            )
        slot_P, token_P, weight_P, sizes, *others = output
        return cls(slot_P, token_P, weight_P, sizes, tuple(others), len(slot_P) // num_tokens)

    def _by_slot(self, values_P: Tensor) -> Tensor:
        return torch.zeros_like(values_P).scatter(0, self.slot_P, values_P).view(-1, self.top_k)

    def _expert_P(self) -> Tensor:
        counts_E = torch.tensor(self.sizes, device=self.slot_P.device)
        return torch.arange(len(self.sizes), device=self.slot_P.device).repeat_interleave(counts_E)

    def choices(self) -> tuple[Tensor, Tensor]:
        return self._by_slot(self._expert_P()), self._by_slot(self.weight_P)

    def replaced(self, kept_TK: Tensor, weights_TK: Tensor) -> tuple[Any, ...]:
        """The router's answer with only some of the pairs, and other weights."""
        kept_P = kept_TK.reshape(-1)[self.slot_P]
        weight_P = weights_TK.reshape(-1)[self.slot_P]
        sizes = self._expert_P()[kept_P].bincount(minlength=len(self.sizes)).tolist()
        return (self.slot_P[kept_P], self.token_P[kept_P], weight_P[kept_P], sizes, *self.others)
