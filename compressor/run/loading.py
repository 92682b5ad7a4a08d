"""From a checkpoint, or a live model, to the model that is worked on: which device it goes to, and what it must be."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compressor.checkpoint.find import Checkpoint, find_checkpoint
from compressor.checkpoint.headers import refuse_not_finite, verify_files
from compressor.checkpoint.layerwise_weights import StreamedWeights, spread
from compressor.checkpoint.load import load_model, load_tokenizer, unquantised_skeleton
from compressor.checkpoint.save import as_savable
from compressor.errors import CheckpointError, RecipeError, UnsupportedModelError
from compressor.machine.distributed import Processes
from compressor.machine.environment import gpus
from compressor.machine.progress import Progress
from compressor.model.adapter import Adapter, structure_of
from compressor.model.moe_model import MoEModel
from compressor.observe import forward
from compressor.observe.layerwise import Original
from compressor.plugins import Plugins, load_plugins
from compressor.recipe.schema import LoadedRecipe, Recipe, load_recipe
from compressor.run.preview import Preview
from compressor.run.record import model_json
from compressor.wording import counted

# What a run has written, loaded ----------------------------------------------------------------------------


def load(
    folder: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    without: Iterable[str] = (),
    plugin_files: Iterable[str | Path] = (),
) -> tuple[Any, Any]:
    """Load (model, tokenizer or None) from a folder that `compress` has written: as `from_pretrained`, with missing or
    unexpected tensors refused and experts skipped as its config says; `auto` is spread over all GPUs. `dtype` is
    torch's, or its name. Raises CheckpointError.
    """
    dtype = str(dtype).removeprefix("torch.")
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise CheckpointError(f"dtype: found {dtype!r}, expected auto, or one of torch's, such as bfloat16.")
    found = find_checkpoint(str(folder), trust_remote_code=trust_remote_code)
    verify_files(found.folder)
    adapters = load_plugins(without, files=plugin_files).adapters
    place = _place_of(found, gpus() or ("cpu",), adapters) if device == "auto" else device
    return as_savable(load_model(found, dtype=dtype, device=place, adapters=adapters)), load_tokenizer(found)


def restore(model: Any, *, without: Iterable[str] = ()) -> Any:
    """Put back what a checkpoint cannot hold in a model loaded by other means, such as `from_pretrained` with a
    `device_map`: it skips as its config says, and is returned. Raises CheckpointError where that does not fit.
    """
    MoEModel(model, structure_of(type(model), model.config, load_plugins(without).adapters)).restore_skipping()
    return model


def _refuse_names(model: Any, tokenizer: Any) -> None:
    """Raise RecipeError for what is no live model, or no tokenizer."""
    if isinstance(model, str | Path):
        raise RecipeError(
            f"model: found the name {str(model)!r}, expected a live model; a hub id or folder is a model_reference."
        )
    if model is not None and not (isinstance(model, torch.nn.Module) and hasattr(model, "config")):
        raise RecipeError(f"model: found an object of type {type(model).__name__}, expected a live transformers model.")
    if tokenizer is not None and not callable(tokenizer):
        raise RecipeError(
            f"tokenizer: found an object of type {type(tokenizer).__name__}, expected a live transformers tokenizer."
        )


def recipe_for(
    live: Any, tokenizer: Any, plugins: Plugins, recipe: str | Path | Mapping[str, Any] | Recipe, **how: Any
) -> LoadedRecipe:
    """The recipe of a live model, which is called by its name or class, or of a checkpoint where that is None; `how`:
    see `load_recipe`. Raises RecipeError, also for what is no live model, or no tokenizer.
    """
    _refuse_names(live, tokenizer)
    name = None if live is None else live.config._name_or_path or f"live {type(live).__name__}"
    return load_recipe(recipe, live=name, methods=plugins.methods, criteria=plugins.criteria, **how)


# The model of a run ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """The model of a run before its weights are read: a checkpoint, or a live model and its folder, on `devices`."""

    checkpoint: Checkpoint | None
    live: Any
    config: Any
    preview: Preview
    fingerprint: str | None
    devices: tuple[str, ...]

    def about(self) -> dict[str, Any]:
        """What the record says of the model, beside the name that the user gave it."""
        about = model_json(self.config, self.preview.auto_class, self.preview.layers)
        is_live = {"live": True} if self.live is not None else {}
        return {"fingerprint": self.fingerprint, **is_live, **about}


def own_devices(loaded: LoadedRecipe, processes: Processes, planned: tuple[str, ...]) -> tuple[str, ...]:
    """Where this process's model goes: of several processes on a machine each takes a GPU of its own."""
    device, place = loaded.recipe.device, processes.local_rank
    if processes.size > 1 and device == "auto":
        raise loaded.error(
            ("device",),
            f"`auto` is for one process; with `device: cuda` each of {processes.size} takes a GPU of its own",
        )
    if processes.size == 1 or device != "cuda":
        return planned
    if place >= torch.cuda.device_count():
        raise loaded.error(
            ("device",),
            f"process {processes.rank} is number {place} on its machine, which has "
            f"{counted(torch.cuda.device_count(), 'GPU')}, numbered from 0. Start as many processes as GPUs",
        )
    return (f"cuda:{place}",)


def devices_of(model: Any) -> tuple[str, ...]:
    """Those of a live model's weights. Raises UnsupportedModelError where some of its weights are on none."""
    offloaded = next((name for name, tensor in model.named_parameters() if tensor.is_meta), None)
    if offloaded is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__}: {offloaded} is on no device, so it cannot be edited. Give the checkpoint: with "
            "`weights: disk` it is read one decoder layer at a time, with `device: auto` it is spread over all GPUs."
        )
    return forward.devices_of(model)


def load_moe(subject: Subject, recipe: Recipe, adapters: Sequence[Adapter], progress: Progress) -> MoEModel:
    """The model with all of its weights: read from its checkpoint, or a copy of the live one."""
    if subject.live is None:
        progress.say(f"loading {recipe.model}")
        return MoEModel(load_weights(subject, recipe, adapters), subject.preview.structure)
    moe = MoEModel(copy.deepcopy(subject.live).eval(), subject.preview.structure)
    if not moe.skips:
        moe.restore_skipping()
    return moe


def load_original(subject: Subject, recipe: Recipe, adapters: Sequence[Adapter]) -> Original:
    """The model that the recipe began with, to be observed beside what passes have made of it: the live one itself,
    which nothing changes, or the checkpoint's, of which one decoder layer at a time is read.
    """
    if subject.live is not None:
        return Original(MoEModel(subject.live, subject.preview.structure))
    found = subject.checkpoint
    assert found is not None
    model = load_model(found, dtype=recipe.dtype, device="meta", adapters=adapters)
    weights = StreamedWeights(model, found, device=subject.devices[0])
    return Original(MoEModel(model, structure_of(type(model), model.config, adapters)), weights)


def load_weights(subject: Subject, recipe: Recipe, adapters: Sequence[Adapter], *, to_measure: bool = False) -> Any:
    """The transformers model of a checkpoint. Raises where its weights are not finite, or it cannot run here."""
    found = subject.checkpoint
    assert found is not None
    place = _place_of(found, subject.devices, adapters)
    model = load_model(found, dtype=recipe.dtype, device=place, adapters=adapters, to_measure=to_measure)
    if found.quantisation is None:
        refuse_not_finite([*model.named_parameters(), *model.named_buffers()], recipe.model)
    else:
        _refuse_what_cannot_run(model, recipe.model)
    return model


def _place_of(found: Checkpoint, devices: Sequence[str], adapters: Sequence[Adapter]) -> str | dict[str, int]:
    """The device that a model goes to; or, of several, all from the first on, which part of it goes to which."""
    if len(devices) == 1:
        return devices[0]
    if found.quantisation is not None:
        return spread(unquantised_skeleton(found), len(devices))
    return spread(load_model(found, device="meta", adapters=adapters), len(devices))


@torch.no_grad()
def _refuse_what_cannot_run(model: Any, reference: str) -> None:
    """Raise UnsupportedModelError where a quantised model needs what is not here: some say so when they run."""
    try:
        model(torch.zeros(1, 2, dtype=torch.int64, device=model.device))
    except Exception as error:  # kernels fail in any way
        raise UnsupportedModelError(
            f"{reference}: transformers loads the quantised checkpoint, and cannot run it here: {error}"
        ) from error
