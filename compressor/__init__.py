"""Make Mixture-of-Experts language models smaller.

    compressor.check(recipe)            what a run would do, and what it needs; inspect(model): what it is made of
    compressor.compress(recipe)         run a recipe: observe, decide, edit, evaluate, save
    compressor.evaluate(recipe, model)  measure one model; compare(folders): several outputs side by side
    compressor.sweep(recipe, keep)      how far one can go: each of several totals, measured
    compressor.apply, decide            as the commands of these names
    compressor.load(folder)             load what a run has written, with whatever a checkpoint cannot hold put back
    compressor.push(folder, repo)       upload it to the Hugging Face hub
    compressor.MoEModel(model)          a live model's MoE layers: mask, watch, remove and skip experts

Everything in `__all__` is what users call; what plugins are written with is in `compressor.plugin`. Importing this
package does not import torch; its names do, on first use.
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
    ProgramError,
    RecipeError,
    UnsupportedModelError,
    VerificationError,
)

if TYPE_CHECKING:
    from compressor.machine.distributed import Processes
    from compressor.model.moe_model import MoEModel
    from compressor.model.skipping.rule import SkipRule
    from compressor.model.structure import MoELayer
    from compressor.run.apply import apply
    from compressor.run.decide_again import decide
    from compressor.run.loading import load, restore
    from compressor.run.pipeline import compare, compress, evaluate, sweep
    from compressor.run.push import push
    from compressor.run.record import CompressionResult
    from compressor.run.verbs import check, inspect, serve_check

_HOME = {
    "CompressionResult": "run.record",
    "MoELayer": "model.structure",
    "MoEModel": "model.moe_model",
    "Processes": "machine.distributed",
    "SkipRule": "model.skipping.rule",
    "apply": "run.apply",
    "check": "run.verbs",
    "compare": "run.pipeline",
    "compress": "run.pipeline",
    "decide": "run.decide_again",
    "evaluate": "run.pipeline",
    "inspect": "run.verbs",
    "load": "run.loading",
    "push": "run.push",
    "restore": "run.loading",
    "serve_check": "run.verbs",
    "sweep": "run.pipeline",
}

__all__ = [
    "CalibrationError", "CheckpointError", "CompressionResult", "CompressorError", "DiskError", "EvaluationError",
    "MoELayer", "MoEModel", "PluginError", "ProcessError", "Processes", "ProgramError", "RecipeError", "SkipRule",
    "UnsupportedModelError", "VerificationError", "__version__", "apply", "check", "compare", "compress", "decide",
    "evaluate", "inspect", "load", "push", "restore", "serve_check", "sweep",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'compressor' has no attribute {name!r}")
    return getattr(import_module(f"compressor.{_HOME[name]}"), name)
