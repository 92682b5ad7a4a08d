"""Figures gathered at MoE layers, and the file that keeps them.

A statistic adds up one batch after another. What it returns are raw sums, one row per batch or one number per expert,
so that figures of several files, processes or domains can be joined later.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from compressor.errors import CheckpointError
from compressor.moe import RoutedTokens

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
