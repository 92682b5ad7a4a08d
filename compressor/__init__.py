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
    from compressor.decisions import apply, decide
    from compressor.engine import compress, load, restore
    from compressor.method import Decision, Method, OptionError, Options, Plan, check_layer_names
    from compressor.moe import (
        Adapter,
        ConfigLeaf,
        MoELayer,
        MoEModel,
        RankedChunk,
        RoutedTokens,
        RoutingRule,
        SkipRule,
        Structure,
        count_problem,
        find_structure,
    )
    from compressor.processes import Processes
    from compressor.record import CompressionResult
    from compressor.selection.budget import allocate
    from compressor.selection.criteria import Criterion, ExpertFigures
    from compressor.selection.method import ExpertSelection
    from compressor.selection.options import SelectionOptions
    from compressor.selection.pairs import fewest_losses
    from compressor.sources import FileName, FilePath, TaskSource
    from compressor.statistics import Gathered, JoinedStatistic, RankedStatistic, Rule, Statistic

_HOME = {
    "Adapter": "moe",
    "CompressionResult": "record",
    "ConfigLeaf": "moe",
    "Criterion": "selection.criteria",
    "Decision": "method",
    "ExpertFigures": "selection.criteria",
    "ExpertSelection": "selection.method",
    "FileName": "sources",
    "FilePath": "sources",
    "Gathered": "statistics",
    "JoinedStatistic": "statistics",
    "Method": "method",
    "MoELayer": "moe",
    "MoEModel": "moe",
    "OptionError": "method",
    "Options": "method",
    "Plan": "method",
    "Processes": "processes",
    "RankedChunk": "moe",
    "RankedStatistic": "statistics",
    "RoutedTokens": "moe",
    "RoutingRule": "moe",
    "Rule": "statistics",
    "SelectionOptions": "selection.options",
    "SkipRule": "moe",
    "Statistic": "statistics",
    "Structure": "moe",
    "TaskSource": "sources",
    "allocate": "selection.budget",
    "apply": "decisions",
    "check_layer_names": "method",
    "compress": "engine",
    "count_problem": "moe",
    "decide": "decisions",
    "fewest_losses": "selection.pairs",
    "find_structure": "moe",
    "load": "engine",
    "restore": "engine",
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
