"""Dynamic skipping: tokens that need fewer experts use fewer."""

from __future__ import annotations

from compressor.plugin import hookimpl
from compressor_dynamic_skipping.method import DynamicSkipping, DynamicSkippingOptions

__all__ = ["DynamicSkipping", "DynamicSkippingOptions"]


@hookimpl
def compressor_methods() -> list[type[DynamicSkipping]]:
    """The one method of this plugin."""
    return [DynamicSkipping]
