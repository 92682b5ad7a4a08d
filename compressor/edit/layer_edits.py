"""Let a method edit one layer after another, wherever its weights are, and check every number that it writes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch

from compressor.checkpoint.conversion import is_by_expert
from compressor.checkpoint.extra_layers import spellings
from compressor.checkpoint.headers import read_header, torch_dtype
from compressor.checkpoint.layerwise_weights import StoredTensor, StreamedWeights, stored_tensors
from compressor.errors import UnsupportedModelError
from compressor.method import Decision, Method, OptionError
from compressor.model.config_entry import KEY
from compressor.model.constants import Replacements, problem, problem_of_all
from compressor.model.expert_products import expert_matrices
from compressor.model.layer_weights import Ending, LayerWeights, Tensors, live_tensors, refuse_damage, widened
from compressor.model.masking import masked_router
from compressor.model.modules import kind_of
from compressor.model.moe_model import Kept, MoEModel
from compressor.model.skipping.rule import SkipRule
from compressor.model.structure import MoELayer, Structure

Endings = Mapping[str, Ending]
"""Layer path → what its edit has asked for."""


class NotOnDiskError(UnsupportedModelError):
    """A layer is stored in a way in which edited numbers cannot be written back."""


class Weights(Protocol):
    """Where a layer's weights are. `read` brings them, to be written in place; `written` is told that they were."""

    @property
    def model(self) -> Any:
        """The model that has the weights of the layer read last."""

    def read(self, layer: MoELayer) -> Tensors: ...

    def written(self, layer: MoELayer) -> None: ...


class LiveWeights:
    """Those of a model in memory."""

    def __init__(self, moe: MoEModel) -> None:
        self._moe = moe

    @property
    def model(self) -> Any:
        return self._moe.model

    def read(self, layer: MoELayer) -> Tensors:
        return live_tensors(self.model, layer)

    def written(self, layer: MoELayer) -> None:
        """They are the model's own."""


class StoredWeights:
    """Those of a checkpoint, one decoder layer at a time. What was edited goes into files of `folder`, one a layer, as
    the checkpoint stores it; without a folder it is let go of, as in all processes but the first.
    """

    def __init__(self, opened: Callable[[], StreamedWeights], folder: Path | None, *, is_quantised: bool) -> None:
        """`opened` is asked once, when weights are first asked for."""
        self._opened, self._folder, self._is_quantised = opened, folder, is_quantised
        self.edited: dict[str, StoredTensor] = {}
        """Name on disk → the tensor as it shall be, with all experts that are there now."""

    def read(self, layer: MoELayer) -> Tensors:
        """Raises UnsupportedModelError where they are quantised, NotOnDiskError where they could not be written."""
        if self._is_quantised:
            raise UnsupportedModelError(
                f"{layer.path}: the checkpoint is quantised, and its numbers cannot be edited as they are stored. Edit "
                f"the unquantised checkpoint, then quantise the result."
            )
        weights = self._weights
        unit = weights.unit_of(layer.path)
        weights.load(unit)
        found = weights.as_stored(unit)
        for name, stored in weights.stored_in(unit).items():
            if name not in found or not _is_same(found[name], stored):
                raise NotOnDiskError(
                    f"{layer.path}: {name} is not stored as transformers would write it back, so edited weights cannot "
                    f"be written to disk. Run it in memory (`weights: memory`)."
                )
        return live_tensors(weights.model, layer)

    @property
    def model(self) -> Any:
        return self._weights.model

    @cached_property
    def _weights(self) -> StreamedWeights:
        return self._opened()

    def written(self, layer: MoELayer) -> None:
        unit = self._weights.unit_of(layer.path)
        found = self._weights.as_stored(unit)
        changed = {
            name: found[name].to(torch_dtype(stored.dtype)).contiguous()
            for name, stored in self._weights.stored_in(unit).items()
            if self._folder is not None and not _is_same(found[name], stored)
        }
        if self._folder is not None and changed:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{len(list(self._folder.iterdir()))}.safetensors"
            safetensors.torch.save_file(changed, path)
            as_edited = stored_tensors([read_header(path)])
            self.edited |= as_edited
            self._weights.replace(as_edited)
        self._weights.free(unit)


def _is_same(tensor: torch.Tensor, stored: StoredTensor) -> bool:
    """Whether they are equal by the bit, in the precision that the model has."""
    held = stored[...].to(tensor.device, tensor.dtype)
    return held.shape == tensor.shape and torch.equal(held, tensor)


@contextmanager
def _refusing() -> Iterator[None]:
    """What is wrong within the context is an OptionError."""
    try:
        yield
    except ValueError as error:
        raise OptionError(None, f"what was decided cannot be carried out: {error}") from error


@torch.no_grad()
def edit_layers(
    method: Method[Any], decision: Decision, layers: Sequence[MoELayer], weights: Weights, ids: Kept | None = None
) -> tuple[Endings, dict[str, float]]:
    """Edit one layer after another; (what each has asked for, how the numbers written differ from the same edit in
    float32).

    `layers` are as their weights are; `ids` are the experts among them that the pass sees, all by default. Raises
    OptionError where the decision is of other layers, or an edit writes what cannot be.
    """
    endings: dict[str, Ending] = {}
    errors: list[float] = []
    with _refusing():
        _refuse_other_layers(decision, layers)
        for layer in layers:
            seen = range(layer.num_experts) if ids is None else ids[layer.path]
            endings[layer.path], error = _edit_layer(method, decision, layer, seen, weights)
            errors += error
    return endings, {"edited_against_float32": max(errors)} if errors else {}


def _edit_layer(
    method: Method[Any], decision: Decision, layer: MoELayer, ids: Sequence[int], weights: Weights
) -> tuple[Ending, list[float]]:
    tensors: dict[str, torch.Tensor] = {}
    exact: dict[str, torch.Tensor] = {}
    used = cache(lambda: expert_matrices(weights.model, layer, ids[0]))  # asked for when the weights are there

    def read() -> Tensors:
        tensors.update(weights.read(layer))
        exact.update(widened(tensors))
        method.edit(LayerWeights(layer, ids, lambda: exact, used), decision)  # before its own numbers are changed
        return tensors

    edited = LayerWeights(layer, ids, read, used)
    method.edit(edited, decision)
    if not edited.ending.wrote:
        return edited.ending, []
    error = refuse_damage(layer, tensors, exact)
    weights.written(layer)
    return edited.ending, [error]


def _refuse_other_layers(decision: Decision, layers: Sequence[MoELayer]) -> None:
    ours, named = {layer.path for layer in layers}, set(decision["layers"])
    if ours != named:
        other = min(named - ours or ours - named)
        whose = "the model has no such MoE layer" if other in named else "it says nothing of this layer"
        raise ValueError(
            f"the decision was made for {len(named)} MoE layers, the model has {len(ours)}: {other}: {whose}"
        )


@contextmanager
def edited_meanwhile(moe: MoEModel, method: Method[Any], decision: Decision, layer: MoELayer) -> Iterator[None]:
    """Within the context one layer, whose weights are there, computes what it will when edited. Raises OptionError
    where the edit writes what is outside the layer's block, which has run by then.
    """
    tensors: Tensors = {}
    before: dict[str, torch.Tensor] = {}

    def read() -> Tensors:
        nonlocal tensors
        tensors = live_tensors(moe.model, layer)
        before.update({name: tensor.clone() for name, tensor in tensors.items()})
        return tensors

    ids = range(layer.num_experts)
    edited = LayerWeights(layer, ids, read, cache(lambda: expert_matrices(moe.model, layer)))
    with ExitStack() as stack:
        stack.callback(lambda: [tensors[name].copy_(own) for name, own in before.items()])
        with _refusing():
            method.edit(edited, decision)
        outside = [name for name in before if not layer.holds(name) and not torch.equal(before[name], tensors[name])]
        if outside:
            raise OptionError(
                None, f"the edit writes {outside[0]}, which is outside the MoE block: it cannot be `progressive`"
            )
        stack.enter_context(as_finished(moe, {layer.path: edited.ending}))
        yield


@contextmanager
def as_finished(moe: MoEModel, endings: Endings) -> Iterator[None]:
    """Within the context a model with the edits' numbers computes what it will when `finish` has removed experts: they
    are masked, or answer constants, and those that it will skip have weight 0.
    """
    kept = {path: list(one.kept) for path, one in endings.items() if one.kept is not None}
    top_k = next((one.top_k for one in endings.values() if one.kept is not None), None)
    rules = {
        path: _of_all(one.rule, one.kept, moe.layer(path)) for path, one in endings.items() if one.rule is not None
    }
    with ExitStack() as stack:
        with _refusing():
            for path, one in endings.items():
                stack.enter_context(_replaced(moe, moe.layer(path), one.constants or {}))
            stack.enter_context(moe.masked(kept, top_k=top_k))
            if rules:
                stack.enter_context(moe.zeroed(rules))
        yield


@contextmanager
def _replaced(moe: MoEModel, layer: MoELayer, constants: Replacements) -> Iterator[None]:
    answering = {expert: value for expert, value in constants.items() if value is not None}
    chosen = [e for e in range(layer.num_experts) if e not in constants or e in answering]
    with ExitStack() as stack:
        if answering:
            stack.enter_context(moe.replaced({layer.path: answering}))
        if len(chosen) < layer.num_experts:
            stack.enter_context(masked_router(moe.model, layer, chosen))
        yield


def _of_all(rule: SkipRule, kept: Sequence[int] | None, layer: MoELayer) -> SkipRule:
    """A rule of the experts that are left, as one of all."""
    if rule.expert_norms is None or kept is None:
        return rule
    norms = dict(zip(kept, rule.expert_norms, strict=True))
    return replace(rule, expert_norms=tuple(norms.get(expert, 1.0) for expert in range(layer.num_experts)))


def finish(moe: MoEModel, method: Method[Any], decision: Decision, endings: Endings) -> None:
    """Remove and skip what the edits have asked for; change the config as the method says. Raises OptionError."""
    kept = {path: list(one.kept) for path, one in endings.items() if one.kept is not None}
    rules = {path: one.rule for path, one in endings.items() if one.rule is not None}
    constants = {path: one.constants for path, one in endings.items() if one.constants}
    how = {(one.top_k, one.padded) for one in endings.values() if one.kept is not None}
    with _refusing():
        if len(how) > 1:
            raise ValueError("keep() was given other `top_k` or `padded` in other layers")
        if constants and kept:
            raise ValueError("keep() and replace() were both asked for, so ids would mean two things")
        for top_k, padded in how:
            moe.keep(kept, top_k=top_k, padded=padded)
        if constants:
            refuse_constants(moe.model, moe.structure, list(constants))
            moe.replace(constants)
        if rules:
            moe.skip(rules)
        _change_config(moe, method.config_changes(decision))
        if not kept and not rules and not constants and not any(one.wrote for one in endings.values()):
            raise ValueError("the decision says of every layer that nothing changes, so there is nothing to carry out")


def refuse_constants(model: Any, structure: Structure, paths: Sequence[str]) -> None:
    """Raise UnsupportedModelError where experts of these layers cannot answer constants, or no file could say so."""
    looked_at = set[object]()
    for layer in (layer for layer in structure.layers if layer.path in paths):
        why, kind = problem_of_all(structure, model.config) or problem(layer), kind_of(model.get_submodule(layer.path))
        if why is None and kind not in looked_at and not is_by_expert(model, layer):
            why = "its files hold all experts in one tensor, where constants have no place"
        looked_at.add(kind)
        if why is not None:
            raise UnsupportedModelError(f"{layer.path}: {why}.")


def _change_config(moe: MoEModel, changes: Mapping[str, Any]) -> None:
    """Set these keys of the model's config. Raises ValueError for one that the core sets itself, or what is no JSON."""
    leaves = moe.structure.counts_in(moe.config)
    counts = {name for leaf in leaves for name in leaf.path[:1] or spellings(leaf.holder(moe.config), leaf.key)}
    for key, value in changes.items():
        if key in {*counts, KEY, "dtype", "torch_dtype"}:
            raise ValueError(f"`config_changes` has {key!r}, which the core sets in config.json itself; leave it out")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`config_changes` has {key!r}, whose value is no JSON: {error}") from error
        setattr(moe.config, key, copy.deepcopy(value))
    moe.config_changes |= changes


def carry_out(method: Method[Any], moe: MoEModel, decision: Decision) -> dict[str, float]:
    """Edit a live model; how far its numbers are from the same edit in float32, if it wrote some. Raises OptionError
    where it cannot keep, skip or hold what was decided: only the figures could tell.
    """
    endings, errors = edit_layers(method, decision, moe.layers, LiveWeights(moe))
    finish(moe, method, decision, endings)
    return errors
