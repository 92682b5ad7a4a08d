"""Everything that a plugin may use, and what it was written for: `PLUGIN_API`.

    from compressor.plugin import Method, Options, Plan, Statistic, hookimpl

Importing this module does not import torch; its names do, on first use. What users call is in `compressor`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from compressor.errors import (
    CalibrationError,
    CheckpointError,
    CompressorError,
    PluginError,
    ProgramError,
    RecipeError,
    UnsupportedModelError,
)
from compressor.plugins import PLUGIN_API, hookimpl

if TYPE_CHECKING:
    from compressor.data.sources import FileName, FilePath, TaskSource
    from compressor.machine.distributed import Processes
    from compressor.machine.memory_estimate import Work
    from compressor.method import (
        Decision,
        Healing,
        Measuring,
        Method,
        OptionError,
        Options,
        Plan,
        Training,
        check_layer_names,
        fewer_experts,
    )
    from compressor.model.adapter import Adapter
    from compressor.model.find_structure import find_structure
    from compressor.model.layer_weights import LayerWeights
    from compressor.model.moe_model import MoEModel, count_problem
    from compressor.model.routed_tokens import RankedChunk, RoutedTokens
    from compressor.model.routing_rule import RoutingRule
    from compressor.model.skipping.rule import SkipRule
    from compressor.model.structure import ConfigLeaf, MoELayer, Structure
    from compressor.observe.measuring import measured_of
    from compressor.observe.reductions import Rule
    from compressor.observe.statistic import (
        Gathered,
        InputStatistic,
        JoinedStatistic,
        LinearSite,
        RankedStatistic,
        Statistic,
    )
    from compressor.report.description import Column, Description
    from compressor.selection.allocation import allocate
    from compressor.selection.criteria import Criterion, ExpertFigures
    from compressor.selection.expert_selection import ExpertSelection
    from compressor.selection.options import SelectionOptions
    from compressor.selection.pair_losses import fewest_losses
    from compressor.selection.reference import kept_at_random

_NAMES = {
    "data.sources": "FileName FilePath TaskSource",
    "machine.distributed": "Processes",
    "machine.memory_estimate": "Work",
    "method": "Decision Healing Measuring Method OptionError Options Plan Training check_layer_names fewer_experts",
    "model.adapter": "Adapter",
    "model.find_structure": "find_structure",
    "model.layer_weights": "LayerWeights",
    "model.moe_model": "MoEModel count_problem",
    "model.routed_tokens": "RankedChunk RoutedTokens",
    "model.routing_rule": "RoutingRule",
    "model.skipping.rule": "SkipRule",
    "model.structure": "ConfigLeaf MoELayer Structure",
    "observe.measuring": "measured_of",
    "observe.reductions": "Rule",
    "observe.statistic": "Gathered InputStatistic JoinedStatistic LinearSite RankedStatistic Statistic",
    "report.description": "Column Description",
    "selection.allocation": "allocate",
    "selection.criteria": "Criterion ExpertFigures",
    "selection.expert_selection": "ExpertSelection",
    "selection.options": "SelectionOptions",
    "selection.pair_losses": "fewest_losses",
    "selection.reference": "kept_at_random",
}
"""Module → what of it is here."""
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [
    "PLUGIN_API", "Adapter", "CalibrationError", "CheckpointError", "Column", "CompressorError", "ConfigLeaf",
    "Criterion", "Decision", "Description", "ExpertFigures", "ExpertSelection", "FileName", "FilePath", "Gathered",
    "Healing", "InputStatistic", "JoinedStatistic", "LayerWeights", "LinearSite", "Measuring", "Method", "MoELayer",
    "MoEModel", "OptionError", "Options", "Plan", "PluginError", "Processes", "ProgramError", "RankedChunk",
    "RankedStatistic", "RecipeError", "RoutedTokens", "RoutingRule", "Rule", "SelectionOptions", "SkipRule",
    "Statistic", "Structure", "TaskSource", "Training", "UnsupportedModelError", "Work", "allocate",
    "check_layer_names", "count_problem", "fewer_experts", "fewest_losses", "find_structure", "hookimpl",
    "kept_at_random", "measured_of",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'compressor.plugin' has no attribute {name!r}")
    return getattr(import_module(f"compressor.{_HOME[name]}"), name)
