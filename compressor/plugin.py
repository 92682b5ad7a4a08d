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
    RecipeError,
    UnsupportedModelError,
)
from compressor.plugins import PLUGIN_API, hookimpl

if TYPE_CHECKING:
    from compressor.data.sources import FileName, FilePath, TaskSource
    from compressor.machine.distributed import Processes
    from compressor.method import Decision, Method, OptionError, Options, Plan, check_layer_names, fewer_experts
    from compressor.model.adapter import Adapter
    from compressor.model.find_structure import find_structure
    from compressor.model.layer_weights import LayerWeights
    from compressor.model.moe_model import MoEModel, count_problem
    from compressor.model.routed_tokens import RankedChunk, RoutedTokens
    from compressor.model.routing_rule import RoutingRule
    from compressor.model.skipping.rule import SkipRule
    from compressor.model.structure import ConfigLeaf, MoELayer, Structure
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

_HOME = {
    "Adapter": "model.adapter",
    "Column": "report.description",
    "ConfigLeaf": "model.structure",
    "Criterion": "selection.criteria",
    "Decision": "method",
    "Description": "report.description",
    "ExpertFigures": "selection.criteria",
    "ExpertSelection": "selection.expert_selection",
    "FileName": "data.sources",
    "FilePath": "data.sources",
    "Gathered": "observe.statistic",
    "InputStatistic": "observe.statistic",
    "JoinedStatistic": "observe.statistic",
    "LayerWeights": "model.layer_weights",
    "LinearSite": "observe.statistic",
    "Method": "method",
    "MoELayer": "model.structure",
    "MoEModel": "model.moe_model",
    "OptionError": "method",
    "Options": "method",
    "Plan": "method",
    "Processes": "machine.distributed",
    "RankedChunk": "model.routed_tokens",
    "RankedStatistic": "observe.statistic",
    "RoutedTokens": "model.routed_tokens",
    "RoutingRule": "model.routing_rule",
    "Rule": "observe.reductions",
    "SelectionOptions": "selection.options",
    "SkipRule": "model.skipping.rule",
    "Statistic": "observe.statistic",
    "Structure": "model.structure",
    "TaskSource": "data.sources",
    "allocate": "selection.allocation",
    "check_layer_names": "method",
    "count_problem": "model.moe_model",
    "fewer_experts": "method",
    "fewest_losses": "selection.pair_losses",
    "find_structure": "model.find_structure",
    "kept_at_random": "selection.reference",
}

__all__ = [
    "PLUGIN_API",
    "Adapter",
    "CalibrationError",
    "CheckpointError",
    "Column",
    "CompressorError",
    "ConfigLeaf",
    "Criterion",
    "Decision",
    "Description",
    "ExpertFigures",
    "ExpertSelection",
    "FileName",
    "FilePath",
    "Gathered",
    "InputStatistic",
    "JoinedStatistic",
    "LayerWeights",
    "LinearSite",
    "Method",
    "MoELayer",
    "MoEModel",
    "OptionError",
    "Options",
    "Plan",
    "PluginError",
    "Processes",
    "RankedChunk",
    "RankedStatistic",
    "RecipeError",
    "RoutedTokens",
    "RoutingRule",
    "Rule",
    "SelectionOptions",
    "SkipRule",
    "Statistic",
    "Structure",
    "TaskSource",
    "UnsupportedModelError",
    "allocate",
    "check_layer_names",
    "count_problem",
    "fewer_experts",
    "fewest_losses",
    "find_structure",
    "hookimpl",
    "kept_at_random",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'compressor.plugin' has no attribute {name!r}")
    return getattr(import_module(f"compressor.{_HOME[name]}"), name)
