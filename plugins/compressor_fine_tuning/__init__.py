"""Fine-tuning: what a pass has taken is learnt again, from the original's answers, and merged into the weights."""

from __future__ import annotations

from compressor.plugin import hookimpl
from compressor_fine_tuning.method import FineTuning, FineTuningOptions

__all__ = ["FineTuning", "FineTuningOptions"]


@hookimpl
def compressor_methods() -> list[type[FineTuning]]:
    """The one method of this plugin."""
    return [FineTuning]
