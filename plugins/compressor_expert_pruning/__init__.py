"""Expert pruning: keep, in every MoE layer, the set of experts that changes the layer's output least."""

from __future__ import annotations

from compressor import hookimpl
from compressor_expert_pruning.method import ExpertPruning
from compressor_expert_pruning.options import ExpertPruningOptions

__all__ = ["ExpertPruning", "ExpertPruningOptions"]


@hookimpl
def compressor_methods() -> list[type[ExpertPruning]]:
    """The one method of this plugin."""
    return [ExpertPruning]
