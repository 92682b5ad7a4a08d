"""Figures gathered at MoE layers, and the file that keeps them.

A statistic adds up one batch after another. What it returns are raw sums, one row per batch or one number per expert,
so that figures of several files, processes or domains can be joined later.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from compressor.errors import CheckpointError
from compressor.moe import RankedChunk, RoutedTokens

FORMAT = 1

Statistics = Mapping[str, Mapping[str, Tensor]]
"""Layer path → name → figures."""


class Statistic(ABC):
    """Accumulates figures over the calibration batches at one MoE layer."""

    @abstractmethod
    def update(self, tokens: RoutedTokens) -> None:
        """Add one batch. Padding tokens are not among `tokens`."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The figures so far, on the CPU; sums in float64."""

    def again(self) -> bool:
        """Whether every batch has to be seen once more, in the same order, before the figures are whole.

        Asked when all batches have been seen. A statistic that says True gets them all again through `update`.
        """
        return False


class RankedStatistic(Statistic):
    """A statistic of the outputs of each token's best-ranked experts. Several of them can share these outputs."""

    @abstractmethod
    def num_ranks(self, tokens: RoutedTokens) -> int:
        """How many of each token's ranks are needed; the first ones are the experts chosen."""

    @abstractmethod
    def add(self, tokens: RoutedTokens, chunk: RankedChunk) -> None:
        """Add some of a batch's tokens: exactly `num_ranks` ranks of them. Chunks come in order."""

    def end_batch(self, tokens: RoutedTokens) -> None:
        """All tokens of the batch have been added; `tokens.output_TH` is there."""

    def update(self, tokens: RoutedTokens) -> None:
        """Add one batch."""
        num_ranks = self.num_ranks(tokens)
        for chunk in tokens.ranked_outputs(num_ranks):
            self.add(tokens, chunk)
        self.end_batch(tokens)


class JoinedStatistic(RankedStatistic):
    """Several statistics of the same expert outputs, which are computed once. Their figures have different names."""

    def __init__(self, parts: Sequence[RankedStatistic]) -> None:
        self.parts = parts

    def num_ranks(self, tokens: RoutedTokens) -> int:
        """The most that one of them needs."""
        return max(part.num_ranks(tokens) for part in self._waiting())

    def add(self, tokens: RoutedTokens, chunk: RankedChunk) -> None:
        """Give each of them the ranks that it needs."""
        for part in self._waiting():
            part.add(tokens, chunk.first(part.num_ranks(tokens)))

    def end_batch(self, tokens: RoutedTokens) -> None:
        """Tell all of them."""
        for part in self._waiting():
            part.end_batch(tokens)

    def again(self) -> bool:
        """If one of them wants the batches again, only those that do will be given them."""
        self._again = [part for part in self.parts if part.again()]
        return bool(self._again)

    def tensors(self) -> dict[str, Tensor]:
        """The figures of all of them."""
        return {name: tensor for part in self.parts for name, tensor in part.tensors().items()}

    _again: Sequence[RankedStatistic] | None = None

    def _waiting(self) -> Sequence[RankedStatistic]:
        return self.parts if self._again is None else self._again


def save_statistics(path: Path, passes: Mapping[str, Statistics], about: Mapping[str, Any]) -> None:
    """Write the figures of all passes into one safetensors file; `about` (JSON) says where they come from.

    Tensors are named `PASS/LAYER/FIGURE`, a pass being `0.expert_pruning`.
    """
    tensors = {
        f"{name}/{layer}/{figure}": tensor.contiguous()
        for name, statistics in passes.items()
        for layer, figures in statistics.items()
        for figure, tensor in figures.items()
    }
    metadata = {"format": str(FORMAT), "about": json.dumps(about, sort_keys=True)}
    temporary = path.with_name(path.name + ".partial")
    safetensors.torch.save_file(tensors, temporary, metadata=metadata)
    temporary.replace(path)


def load_statistics(path: Path) -> tuple[dict[str, dict[str, dict[str, Tensor]]], dict[str, Any]]:
    """Read a file written by `save_statistics`: (pass → layer → figure → tensor, about)."""
    passes: dict[str, dict[str, dict[str, Tensor]]] = {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != str(FORMAT):
                raise CheckpointError(f"{path}: not a statistics file of format {FORMAT}.")
            for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                pass_name, layer, figure = name.split("/")
                passes.setdefault(pass_name, {}).setdefault(layer, {})[figure] = file.get_tensor(name)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as a statistics file: {error}") from error
    return passes, json.loads(metadata["about"])
