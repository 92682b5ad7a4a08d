"""The method `expert_pruning`."""

from __future__ import annotations

from typing import ClassVar

from compressor.plugin import ExpertSelection, Options, SelectionOptions


class ExpertPruningOptions(SelectionOptions):
    """How many experts stay (`keep` or `drop`, one of them), how they are found, and which are not for the choosing."""


class ExpertPruning(ExpertSelection[ExpertPruningOptions]):
    """Keep the experts that change each MoE layer's output least on calibration text (arXiv 2402.14800)."""

    name = "expert_pruning"
    version = "3"
    api = 2
    options_type: ClassVar[type[Options]] = ExpertPruningOptions
