"""Make Mixture-of-Experts language models smaller.

    compressor.compress(recipe)         run a recipe: observe, decide, edit, evaluate, save
    compressor.load(folder)             load what a run has written, with whatever a checkpoint cannot hold put back
    compressor.MoEModel(model)          a live model's MoE layers: mask, watch, remove and skip experts

Everything in `__all__` is what plugins may use. Importing this package does not import torch; its names do, on first
use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from compressor._version import __version__
from compressor.errors import (
    CalibrationError,
    CheckpointError,
    CompressorError,
    DiskError,
    EvaluationError,
    PluginError,
    ProcessError,
    RecipeError,
    UnsupportedModelError,
    VerificationError,
)
from compressor.plugins import hookimpl

if TYPE_CHECKING:
    from compressor.data.sources import FileName, FilePath, TaskSource
    from compressor.machine.distributed import Processes
    from compressor.method import Decision, Method, OptionError, Options, Plan, check_layer_names
    from compressor.model.adapter import Adapter
    from compressor.model.find_structure import find_structure
    from compressor.model.moe_model import MoEModel, count_problem
    from compressor.model.routed_tokens import RankedChunk, RoutedTokens
    from compressor.model.routing_rule import RoutingRule
    from compressor.model.skipping.rule import SkipRule
    from compressor.model.structure import ConfigLeaf, MoELayer, Structure
    from compressor.observe.reductions import Rule
    from compressor.observe.statistic import Gathered, JoinedStatistic, RankedStatistic, Statistic
    from compressor.run.apply import apply
    from compressor.run.decide_again import decide
    from compressor.run.pipeline import compress, load, restore
    from compressor.run.record import CompressionResult
    from compressor.selection.allocation import allocate
    from compressor.selection.criteria import Criterion, ExpertFigures
    from compressor.selection.expert_selection import ExpertSelection
    from compressor.selection.options import SelectionOptions
    from compressor.selection.pair_losses import fewest_losses

_HOME = {
    "Adapter": "model.adapter",
    "CompressionResult": "run.record",
    "ConfigLeaf": "model.structure",
    "Criterion": "selection.criteria",
    "Decision": "method",
    "ExpertFigures": "selection.criteria",
    "ExpertSelection": "selection.expert_selection",
    "FileName": "data.sources",
    "FilePath": "data.sources",
    "Gathered": "observe.statistic",
    "JoinedStatistic": "observe.statistic",
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
    "apply": "run.apply",
    "check_layer_names": "method",
    "compress": "run.pipeline",
    "count_problem": "model.moe_model",
    "decide": "run.decide_again",
    "fewest_losses": "selection.pair_losses",
    "find_structure": "model.find_structure",
    "load": "run.pipeline",
    "restore": "run.pipeline",
}

__all__ = [
    "Adapter",
    "CalibrationError",
    "CheckpointError",
    "CompressionResult",
    "CompressorError",
    "ConfigLeaf",
    "Criterion",
    "Decision",
    "DiskError",
    "EvaluationError",
    "ExpertFigures",
    "ExpertSelection",
    "FileName",
    "FilePath",
    "Gathered",
    "JoinedStatistic",
    "Method",
    "MoELayer",
    "MoEModel",
    "OptionError",
    "Options",
    "Plan",
    "PluginError",
    "ProcessError",
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
    "VerificationError",
    "__version__",
    "allocate",
    "apply",
    "check_layer_names",
    "compress",
    "count_problem",
    "decide",
    "fewest_losses",
    "find_structure",
    "hookimpl",
    "load",
    "restore",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'compressor' has no attribute {name!r}")
    return getattr(import_module(f"compressor.{_HOME[name]}"), name)
