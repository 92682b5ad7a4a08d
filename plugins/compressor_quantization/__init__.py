"""Quantization: experts, and on request attention and dense parts, stored in 4 or 8 bits (compressed-tensors)."""

from __future__ import annotations

from compressor.plugin import hookimpl
from compressor_quantization.method import Quantization, QuantizationOptions

__all__ = ["Quantization", "QuantizationOptions"]


@hookimpl
def compressor_methods() -> list[type[Quantization]]:
    """The one method of this plugin."""
    return [Quantization]
