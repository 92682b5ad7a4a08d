"""A model's parameters, and the bytes that they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.checkpoint.files import names_of_weights, read_index
from compressor.evaluation.result import Result


@dataclass(frozen=True)
class RoutedSize:
    """One layer's routed experts: how many, how many a token uses (on average), and the parameters of each."""

    num_experts: int
    used: float
    parameters_per_expert: int


@dataclass(frozen=True)
class Size(Result):
    """``parameters`` in all and used by a token (None: not known), and what they take in memory, in ``bytes``."""

    parameters: int
    active_parameters: int | None
    bytes: int


def size(model: Any, routed: Sequence[RoutedSize] = ()) -> Size:
    """Count a model's parameters, tied ones once, packed ones as stored; the meta device will do. Active are total −
    Σ_layers (num_experts − used) · parameters_per_expert. Bytes are of parameters and saved buffers in their dtypes.
    """
    saved = set(model.state_dict())
    parameters = list(model.parameters())
    buffers = [buffer for name, buffer in model.named_buffers() if name in saved]
    total = sum(parameter.numel() for parameter in parameters)
    idle = sum((layer.num_experts - layer.used) * layer.parameters_per_expert for layer in routed)
    return Size(
        parameters=total,
        active_parameters=round(total - idle),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in [*parameters, *buffers]),
    )


def bytes_on_disk(folder: Path) -> int:
    """The files of weights that are read of a folder, together. Raises CheckpointError if there is none."""
    names = names_of_weights([path.name for path in folder.iterdir()], read_index(folder), str(folder))
    return sum((folder / name).stat().st_size for name in names)
