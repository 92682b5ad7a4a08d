"""Kept experts: what another tool has chosen, or has counted, as a decision."""

from __future__ import annotations

from compressor.plugin import hookimpl
from compressor_kept_experts.method import KeptExperts
from compressor_kept_experts.options import KeptExpertsOptions

__all__ = ["KeptExperts", "KeptExpertsOptions"]


@hookimpl
def compressor_methods() -> list[type[KeptExperts]]:
    """The one method of this plugin."""
    return [KeptExperts]
