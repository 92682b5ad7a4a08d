"""How long observing will take: one decoder layer read from disk, and a few batches of random ids run through it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from compressor import checkpoint as checkpoints
from compressor import walk
from compressor.calibration import TokenBatch
from compressor.errors import RecipeError
from compressor.moe import MoEModel
from compressor.plan import Preview, batch_sizes
from compressor.progress import Progress
from compressor.recipe import LoadedRecipe
from compressor.stream import StreamedWeights


@dataclass(frozen=True)
class Rehearsal:
    """Seconds: to read a decoder layer, to observe it on one batch, and what observing a layer takes beside that; then
    of the whole run, for reading and for observing. Evaluation, writing, and what a search takes with the number of
    tokens come on top.
    """

    read_layer: float
    observe_batch: float
    observe_layer: float
    reading: float
    observing: float


class _EnoughError(Exception):
    """The layer is done."""


class _Timed(StreamedWeights):
    """Weights that say when a layer was read, and stop before the next one."""

    wanted: str
    times: list[float]

    def load(self, unit: str) -> None:
        if getattr(self, "times", None):
            self.times.append(time.perf_counter())
            raise _EnoughError
        if unit != self.wanted:
            super().load(unit)
            return
        self.forget_cached(unit)
        started = time.perf_counter()
        super().load(unit)
        self.times = [started, time.perf_counter()]


def rehearse(loaded: LoadedRecipe, preview: Preview, adapters: Any = ()) -> Rehearsal:
    """Measure, and extrapolate. Reads one MoE layer's weights, and those of the layers before it. Raises RecipeError
    where the weights cannot be read one layer at a time.
    """
    assert preview.checkpoint is not None
    recipe, found = loaded.recipe, checkpoints.with_weights(preview.checkpoint)
    moe = MoEModel(checkpoints.load_model(found, device="meta", adapters=adapters), preview.structure)
    weights = _Timed(moe.model, found, device=preview.devices[0])
    observed = [
        (one, layer)
        for one in loaded.passes
        for layer in moe.layers
        if one.method.needs_text and one.method.statistic(layer) is not None
    ]
    if not observed:
        raise RecipeError("no layer is observed, so there is nothing to rehearse.")
    resolved, layer = observed[0]
    units = [unit for unit in weights.units if f"{layer.path}.".startswith(f"{unit}.")]
    if not units:
        raise RecipeError(f"{layer.path} is in no list of layers that could be read one by one.")
    weights.wanted = units[0]
    lengths = [source.lengths() for source in loaded.sources_of(resolved)]
    length = max(length for of_source in lengths for length in of_source)
    model: Any = moe.model
    rows = model.get_input_embeddings().weight.shape[0]
    shape = (recipe.calibration.batch_size, length)
    ids = torch.randint(int(rows), shape, generator=torch.Generator().manual_seed(0))
    batch = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), "rehearsal")

    def seconds(num_batches: int) -> tuple[float, float]:
        """(to read the layer, to observe it)"""
        statistic = resolved.method.statistic(layer)
        assert statistic is not None
        weights.times = []
        try:
            walk.observe(moe, [batch] * num_batches, {layer.path: statistic}, Progress(), weights=weights)
            weights.times.append(time.perf_counter())
        except _EnoughError:
            pass
        started, read, done = weights.times
        return read - started, done - read

    seconds(1)  # what is done once in a process
    read, few = seconds(1)
    _, more = seconds(3)
    each = max(0.0, (more - few) / 2)
    return _whole(loaded, preview, read, each, max(0.0, few - each), len(weights.units))


def _whole(
    loaded: LoadedRecipe, preview: Preview, read: float, batch: float, layer: float, num_layers: int
) -> Rehearsal:
    """From one layer and one batch to all of them."""
    size, num_batches = loaded.recipe.calibration.batch_size, 0
    for one in loaded.passes:
        streams = 2 if one.method.progressive else 1
        num_batches += streams * len(batch_sizes(loaded.sources_of(one), size))
    readings = preview.plan["needs"]["readings"]
    observing = num_layers * (num_batches * batch + len(loaded.passes) * layer)
    return Rehearsal(read, batch, layer, readings * num_layers * read, observing)
