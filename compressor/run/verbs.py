"""`check`, `inspect` and `serve_check` as Python has them: what a recipe will do, what a model is made of, which
engines run it. No weight is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compressor.checkpoint.output import OutputFolder
from compressor.machine.progress import Progress
from compressor.plugins import load_plugins
from compressor.recipe.schema import Recipe, parse_options
from compressor.run import check as checking
from compressor.run.loading import devices_of, recipe_for
from compressor.run.preview import Preview
from compressor.run.push import check_push
from compressor.serving.rules import Serve


def check(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    model: Any = None,
    tokenizer: Any = None,
    *,
    overrides: Sequence[str] = (),
    model_reference: str | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    allow_commands: bool = False,
    push: bool = False,
    without: Iterable[str] = (),
    plugin_files: Iterable[str | Path] = (),
    progress: Progress | None = None,
) -> Preview:
    """What `compress` with the same arguments would do, and what it needs: `.plan` as JSON, its layers and notes.

    Raises CompressorError, one of its kinds, where it could not work.
    """
    plugins = load_plugins(without, files=plugin_files)
    how: dict[str, Any] = {"overrides": overrides, "output": output, "allow_commands": allow_commands}
    loaded = recipe_for(model, tokenizer, plugins, recipe, model=model_reference, **how)
    target, notes = loaded.recipe.output, check_push(loaded, may_push=push)
    preview = checking.check(
        loaded,
        plugins.adapters,
        folder=None if target is None else OutputFolder(target, overwrite=overwrite),
        model=model,
        live_on=devices_of(model) if model is not None else (),
        tokenizer=tokenizer,
        progress=progress,
    )
    preview.plan["notes"] += notes
    return preview


def inspect(
    model_reference: str,
    *,
    trust_remote_code: bool = False,
    without: Iterable[str] = (),
    plugin_files: Iterable[str | Path] = (),
) -> dict[str, Any]:
    """A model's MoE layers, sizes and notes, as JSON, from its config alone. Raises UnsupportedModelError where its
    structure is not understood.
    """
    adapters = load_plugins(without, files=plugin_files).adapters
    return checking.inspect(model_reference, trust_remote_code=trust_remote_code, adapters=adapters)


def serve_check(
    folder: str | Path,
    engine: str | None = None,
    *,
    tensor_parallel: int = 1,
    expert_parallel: int = 1,
    trust_remote_code: bool = False,
    without: Iterable[str] = (),
    plugin_files: Iterable[str | Path] = (),
) -> dict[str, Any]:
    """Which engines run a checkpoint, all or `engine`, on so many devices, as JSON: `serving`, for each its `answer`
    and the `rules` that say so. Raises RecipeError for an engine or a number that cannot be.
    """
    asked = {"engine": engine or "vllm", "tensor_parallel": tensor_parallel, "expert_parallel": expert_parallel}
    serve, adapters = parse_options(Serve, "serve", asked), load_plugins(without, files=plugin_files).adapters
    about = checking.inspect(str(folder), trust_remote_code=trust_remote_code, adapters=adapters, serve=serve)
    return {"folder": str(folder), "serving": [one for one in about["serving"] if engine in (None, one["engine"])]}
