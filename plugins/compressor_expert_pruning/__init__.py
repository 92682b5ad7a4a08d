"""Expert pruning: keep, in every MoE layer, the experts that change the layer's output least."""

from __future__ import annotations

from compressor.plugin import Criterion, hookimpl
from compressor_expert_pruning.criteria import CRITERIA
from compressor_expert_pruning.method import ExpertPruning, ExpertPruningOptions

__all__ = ["CRITERIA", "ExpertPruning", "ExpertPruningOptions"]


@hookimpl
def compressor_methods() -> list[type[ExpertPruning]]:
    """The one method of this plugin."""
    return [ExpertPruning]


@hookimpl
def compressor_criteria() -> list[Criterion]:
    """The published criteria, which any method that scores experts can use."""
    return list(CRITERIA)
