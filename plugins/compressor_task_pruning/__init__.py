"""Task-specific pruning: keep the experts that one task needs."""

from __future__ import annotations

from compressor.plugin import hookimpl
from compressor_task_pruning.method import TaskPruning, TaskPruningOptions

__all__ = ["TaskPruning", "TaskPruningOptions"]


@hookimpl
def compressor_methods() -> list[type[TaskPruning]]:
    """The one method of this plugin."""
    return [TaskPruning]
