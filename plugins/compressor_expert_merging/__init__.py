"""Expert merging: experts that answer alike become one."""

from __future__ import annotations

from compressor.plugin import hookimpl
from compressor_expert_merging.method import ExpertMerging, ExpertMergingOptions

__all__ = ["ExpertMerging", "ExpertMergingOptions"]


@hookimpl
def compressor_methods() -> list[type[ExpertMerging]]:
    """The one method of this plugin."""
    return [ExpertMerging]
