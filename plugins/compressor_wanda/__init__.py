"""Wanda: weights that matter least to what they are given become zero."""

from __future__ import annotations

from compressor.plugin import hookimpl
from compressor_wanda.method import Wanda, WandaOptions

__all__ = ["Wanda", "WandaOptions"]


@hookimpl
def compressor_methods() -> list[type[Wanda]]:
    """The one method of this plugin."""
    return [Wanda]
