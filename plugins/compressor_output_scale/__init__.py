"""Output scale: what experts answer is scaled until the layer's output is the original's again."""

from __future__ import annotations

from compressor.plugin import hookimpl
from compressor_output_scale.method import OutputScale, OutputScaleOptions

__all__ = ["OutputScale", "OutputScaleOptions"]


@hookimpl
def compressor_methods() -> list[type[OutputScale]]:
    """The one method of this plugin."""
    return [OutputScale]
