"""What a recipe needs of memory and disk, and where weights and hidden states are to be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from compressor.checkpoint.layerwise_weights import sizes_of
from compressor.data.sources import BaseSource, TaskSource
from compressor.evaluation.fidelity import bytes_per_token
from compressor.machine.environment import available_memory, available_on
from compressor.machine.memory_estimate import PLACEMENTS, Placement, Work
from compressor.method import is_external
from compressor.model.modules import is_inside, tower_units
from compressor.model.structure import MoELayer, Structure
from compressor.recipe.schema import LoadedRecipe, Recipe
from compressor.wording import human_bytes

Problem = tuple[tuple[str | int, ...], str]
"""Where the recipe says so, and what it is."""
_TASK_LENGTH = 512
"""Tokens of a task's request, for an estimate."""
_PIXELS_PER_TOKEN = 49_152
"""Bytes of what one place of an image stands for, at most: 9 to 49 kB (Aria: 980 × 980 pixels, a mask, 256 places)."""


def work_of(
    loaded: LoadedRecipe,
    model: Any,
    config: Any,
    layers: Sequence[MoELayer],
    dtype: torch.dtype,
    stored: tuple[int, int],
    *,
    is_compared: bool = False,
) -> Work:
    """What the recipe works on, in numbers; `model` is on the meta device, `stored` bytes of files before and after;
    `is_compared`: with an original, without a pass.
    """
    recipe, text = loaded.recipe, config.get_text_config()
    calibration = [loaded.sources_of(one) for one in loaded.passes]
    evaluation = recipe.evaluate
    measured = list(evaluation.texts.values()) if evaluation else []
    domains = [(one.method, len(sources)) for one, sources in zip(loaded.passes, calibration, strict=True)]
    measuring = [one.method.measuring(layers) for one in loaded.passes]  # all candidates are on their way at the end
    outside, by_layer = sizes_of(model)
    shown = [sum(source.lengths()) for of in (*calibration, measured) for source in of if getattr(source, "images", 0)]
    if shown:
        outside += sum(by_layer.pop(unit) for unit in tower_units(model))
    own_tasks = any(isinstance(source, TaskSource) for one in loaded.passes for source in one.method.sources())
    by_pass = [batch_sizes(sources, recipe.calibration.batch_size) for sources in calibration]
    batches = [size for sizes in by_pass for size in sizes] or [0]
    batches += batch_sizes(measured, evaluation.batch_size) if evaluation else []
    batches += [evaluation.batch_size * _TASK_LENGTH] if evaluation and evaluation.tasks else []
    vocabulary, hidden = getattr(text, "vocab_size", 0), getattr(text, "hidden_size", 0)
    tokens = sum(batch_sizes(measured, 1)) if is_compared or loaded.passes else 0
    work = Work(
        bytes_total=outside + sum(by_layer.values()),
        bytes_outside=outside,
        bytes_by_layer=by_layer,
        bytes_stored=stored[0],
        bytes_after=stored[1],
        tokens=max(map(sum, by_pass), default=0),
        batch_tokens=max(batches),
        hidden=hidden,
        num_experts=max((layer.num_experts for layer in layers), default=0),
        vocabulary=vocabulary,
        itemsize=dtype.itemsize,
        per_token=max((one.method.bytes_per_token(layer) for one in loaded.passes for layer in layers), default=0.0),
        sums=max((one.bytes_of_sums(layer, hidden, num) for one, num in domains for layer in layers), default=0),
        measured_tokens=max((one.tokens * (1 + one.candidates * len(layers)) for one in measuring if one), default=0),
        streams=2 if any(one.method.progressive or one.method.needs_original for one in loaded.passes) else 1,
        num_passes=max(1, len(loaded.passes)),
        copies=3 if evaluation and evaluation.each_pass else 2 if loaded.passes else 1,
        has_tasks=bool(evaluation and evaluation.tasks) or own_tasks,
        measures_text=bool(measured),
        answers=tokens * bytes_per_token(vocabulary),
        pixels=_PIXELS_PER_TOKEN * sum(shown),
        in_memory=recipe.output is None,
        has_original=any(one.method.needs_original for one in loaded.passes),
        num_turned=sum(is_external(one.method) for one in loaded.passes),
        reading=max((source.memory() for sources in (*calibration, measured) for source in sources), default=0),
    )
    training = max((one.method.bytes_of_training(layers, work) for one in loaded.passes), default=0)
    return dataclasses.replace(work, training=training)


def batch_sizes(sources: Sequence[BaseSource], batch_size: int) -> list[int]:
    """Tokens of each batch of these sources, padding included, as far as that is known before text is read."""
    found = []
    for source in sources:
        lengths = source.lengths()
        parts = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
        found += [len(part) * max(part) for part in parts]
    return found


def disk_problem(
    loaded: LoadedRecipe, structure: Structure, work: Work, config: Any, carries: str | None = None, *, is_live: bool
) -> Problem | None:
    """Why weights cannot be read one layer at a time; None if they can. `carries`: see `Rehearsal`."""
    recipe, evaluation = loaded.recipe, loaded.recipe.evaluate
    if is_live:
        return ("weights",), "the model given is in memory already"
    if recipe.output is None and loaded.passes:
        return ("weights",), "every pass writes a checkpoint then, so it needs an `output`"
    stored = getattr(config, "dtype", None)
    if recipe.dtype != "auto" and recipe.dtype != str(stored).removeprefix("torch."):
        return ("dtype",), "tensors are copied from file to file then, as they are; leave `dtype` out"
    outside = [layer.path for layer in structure.layers if not is_inside(layer.path, *work.bytes_by_layer)]
    if outside:
        return ("weights",), f"{outside[0]} is in no list of layers that could be read one by one"
    wanted_of = [one.method.measuring(structure.layers) for one in loaded.passes] if carries else ()
    if any(wanted is not None and wanted.candidates for wanted in wanted_of):
        return ("passes",), (
            f"{carries} is given more than the outputs of the layers before it, so from disk it cannot be measured "
            f"what a layer's experts are worth (another `share`, such as `even`, measures nothing)"
        )
    for key, wanted in (
        ("speed", bool(evaluation and evaluation.speed)),
        ("each_pass", bool(evaluation and evaluation.each_pass)),
        ("generation", bool(evaluation and evaluation.generation)),
    ):
        if wanted:
            return ("evaluate", key), f"`{key}` needs a model that is in memory; the rest can be measured from disk"
    return None


def placement(
    loaded: LoadedRecipe,
    work: Work,
    problems: Mapping[str, Problem | None],
    devices: Sequence[str],
    *,
    is_live: bool = False,
) -> Placement:
    """Where weights and hidden states are to be: the fastest way that keeps the budgets, on as few devices as hold the
    weights. `problems`: why not on disk, or in memory. Raises RecipeError if no way is left.
    """
    recipe, problem = loaded.recipe, problems["disk"]
    if problem and problems["memory"]:
        raise loaded.error(
            problem[0],
            f"{problems['memory'][1]}, so its weights are read from disk, one decoder layer at a time, and written as "
            f"they are stored; and they cannot be read from disk: {problem[1]}",
        )
    if recipe.weights == "disk" and problem:
        raise loaded.error(problem[0], f"weights cannot be read from disk: {problem[1]}")
    if recipe.weights == "memory" and problems["memory"]:
        raise loaded.error(
            ("weights",),
            f"{problems['memory'][1]}: its weights are read from disk, one decoder layer at a time, and written as "
            f"they are stored. Leave `weights` out",
        )
    possible = [
        dataclasses.replace(place, num_gpus=number)
        for place in PLACEMENTS
        for number in _numbers_of_gpus(place, len(devices), is_live=is_live)
        if recipe.weights in ("auto", place.weights)
        and recipe.hidden_states in ("auto", place.states)
        and not problems[place.weights]
        and not (place.states == "file" and recipe.output is None)
    ]
    if not possible:
        raise loaded.error(("hidden_states",), "they wait in files beside the output, so this needs an `output`")
    lacking = {place: _lacking(recipe, work, place, devices) for place in possible}
    for place in possible:
        if not lacking[place]:
            return place
    least = possible[-1]
    key, what = lacking[least][0]
    advice = f"Smaller batches need less (here one takes {human_bytes(work.batch)})"
    if least.weights == "memory" and problem:
        advice = f"The weights cannot be read one decoder layer at a time, which would need less: {problem[1]}"
    elif least.weights == "memory":
        advice = "Leave `weights` out, to read one decoder layer at a time"
    raise loaded.error((key,), f"{what}. {advice}. The estimate is rough: where you know better, give a larger `{key}`")


def _numbers_of_gpus(place: Placement, available: int, *, is_live: bool) -> Sequence[int]:
    """Over how many GPUs weights can be spread; those of a live model are."""
    if place.weights == "disk":
        return (1,)
    return (available,) if is_live else range(1, available + 1)


def _lacking(recipe: Recipe, work: Work, place: Placement, devices: Sequence[str]) -> list[tuple[str, str]]:
    """Budgets that would not be kept: (key of the recipe, what is needed and what is there)."""
    device, found = devices[0], []
    held = "all weights in it" if place.weights == "memory" else "one decoder layer in it at a time"
    if place.num_gpus > 1:
        held = f"the weights spread over {place.num_gpus} GPUs"
    free = [size for gpu in devices[: place.num_gpus] if (size := available_on(gpu)) is not None]
    for key, needed, given in (
        ("memory", work.memory(place, device=device), recipe.memory or available_memory()),
        ("device_memory", work.device_memory(place), recipe.device_memory or min(free, default=None)),
        ("disk", work.disk(place), recipe.disk),
    ):
        if given is not None and needed > given and (key != "device_memory" or device != "cpu"):
            what = f"about {human_bytes(needed)} of {key.replace('_', ' ')} are needed with {held}"
            found.append((key, f"{what}, {human_bytes(given)} are there"))
    return found
