"""Router healing: router rows and expert scales that bring a layer's output back to the original's."""

from __future__ import annotations

from compressor.plugin import hookimpl
from compressor_router_healing.method import RouterHealing, RouterHealingOptions

__all__ = ["RouterHealing", "RouterHealingOptions"]


@hookimpl
def compressor_methods() -> list[type[RouterHealing]]:
    """The one method of this plugin."""
    return [RouterHealing]
