"""Make Mixture-of-Experts language models smaller.

    compressor.compress(recipe)         run a recipe: observe, decide, edit, evaluate, save
    compressor.load(folder)             load what a run has written, with whatever a checkpoint cannot hold put back
    compressor.MoEModel(model)          a live model's MoE layers: mask, watch and remove experts

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
    EvaluationError,
    PluginError,
    RecipeError,
    UnsupportedModelError,
    VerificationError,
)
from compressor.plugins import hookimpl

if TYPE_CHECKING:
    from compressor.engine import CompressionResult, compress, load
    from compressor.method import Decision, Method, OptionError, Options, Plan
    from compressor.moe import (
        Adapter,
        ConfigLeaf,
        MoELayer,
        MoEModel,
        RankedChunk,
        RoutedTokens,
        RoutingRule,
        Structure,
        count_problem,
        find_structure,
    )
    from compressor.statistics import Statistic

_HOME = {
    "Adapter": "moe",
    "CompressionResult": "engine",
    "ConfigLeaf": "moe",
    "Decision": "method",
    "Method": "method",
    "MoELayer": "moe",
    "MoEModel": "moe",
    "OptionError": "method",
    "Options": "method",
    "Plan": "method",
    "RankedChunk": "moe",
    "RoutedTokens": "moe",
    "RoutingRule": "moe",
    "Statistic": "statistics",
    "Structure": "moe",
    "compress": "engine",
    "count_problem": "moe",
    "find_structure": "moe",
    "load": "engine",
}

__all__ = [
    "Adapter",
    "CalibrationError",
    "CheckpointError",
    "CompressionResult",
    "CompressorError",
    "ConfigLeaf",
    "Decision",
    "EvaluationError",
    "Method",
    "MoELayer",
    "MoEModel",
    "OptionError",
    "Options",
    "Plan",
    "PluginError",
    "RankedChunk",
    "RecipeError",
    "RoutedTokens",
    "RoutingRule",
    "Statistic",
    "Structure",
    "UnsupportedModelError",
    "VerificationError",
    "__version__",
    "compress",
    "count_problem",
    "find_structure",
    "hookimpl",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'compressor' has no attribute {name!r}")
    return getattr(import_module(f"compressor.{_HOME[name]}"), name)
