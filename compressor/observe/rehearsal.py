"""What a model's forward does with text, seen before any weight is read: its skeleton is run on the meta device."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.checkpoint.resume_state import tensors_in
from compressor.data.sequences import TokenBatch
from compressor.model.modules import is_inside, kind_of, units_of
from compressor.model.structure import Structure
from compressor.observe.forward import model_inputs

_TOKENS = 4


@dataclass(frozen=True)
class Rehearsal:
    """What is known of a forward: nothing where it asks for numbers, of which there are none on the meta device."""

    unreached: frozenset[str] = frozenset()
    """Paths of MoE layers that text does not come to: those for images, say."""
    carries: str | None = None
    """The first decoder layer that is given more than what follows from the outputs of those before it."""


@torch.no_grad()
def rehearse(model: nn.Module, structure: Structure) -> Rehearsal:
    """Run a copy of a model that is on the meta device twice: as it is, and with its decoder layers answering what they
    have answered, so that whatever else they hand on is missing. Experts answer zeros, and of decoder layers that are
    alike and given alike only the first is run: the others answer what it has.
    """
    model = copy.deepcopy(model).eval()
    reached: set[str] = set()
    given: dict[str, list[torch.Size]] = {}
    outputs: dict[str, Any] = {}
    first_of, alike = dict[object, str](), dict[str, str]()
    for layer in structure.layers:
        model.get_submodule(layer.path).register_forward_pre_hook(_note(reached, layer.path))
        if layer.router_probe.call == "choices" and not layer.is_list:
            model.get_submodule(layer.experts).forward = _zeros
    for unit in units_of(model):
        model.get_submodule(unit).register_forward_pre_hook(_keep_shapes(given, unit), with_kwargs=True)
        model.get_submodule(unit).register_forward_hook(_keep_output(outputs, unit))
        alike[unit] = first_of.setdefault(kind_of(model.get_submodule(unit)), unit)
        if alike[unit] != unit:
            model.get_submodule(unit).forward = _as_the_first(model, given, outputs, unit, alike)
    try:
        model(**_inputs(model))
        first = dict(given)
        for unit, output in outputs.items():
            model.get_submodule(unit).forward = _answering(output)
        model(**_inputs(model))
    except Exception:  # whatever the model's own code asks of numbers
        return Rehearsal()
    carries = next((unit for unit in outputs if first[unit] != given[unit]), None)
    reached |= {other + path[len(unit) :] for other, unit in alike.items() for path in reached if is_inside(path, unit)}
    return Rehearsal(frozenset(layer.path for layer in structure.layers) - reached, carries)


def _inputs(model: Any) -> dict[str, Any]:
    """Text, with a mask of all pairs of tokens: of another one the model's code would ask what it holds."""
    ids = torch.zeros(1, _TOKENS, dtype=torch.int64)
    inputs = model_inputs(model, TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool)))
    if "decoder_input_ids" not in inputs:
        inputs["attention_mask"] = torch.zeros(1, 1, _TOKENS, _TOKENS, dtype=torch.bool)
    return {name: one.to("meta") if isinstance(one, Tensor) else one for name, one in inputs.items()}


def _zeros(*args: Any, **kwargs: Any) -> Tensor:
    return torch.zeros_like((*args, *kwargs.values())[0])


def _note(reached: set[str], path: str) -> Any:
    return lambda module, args: reached.add(path)


def _keep_shapes(given: dict[str, list[torch.Size]], unit: str) -> Any:
    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        given[unit] = [tensor.shape for tensor in tensors_in((args, kwargs), depth=4)]

    return keep


def _keep_output(outputs: dict[str, Any], unit: str) -> Any:
    def keep(module: nn.Module, args: Any, output: Any) -> None:
        outputs[unit] = output

    return keep


def _as_the_first(
    model: nn.Module, given: dict[str, list[torch.Size]], outputs: dict[str, Any], unit: str, alike: dict[str, str]
) -> Any:
    """A forward that answers as the first decoder layer of its kind, if that was given the same; else its own."""
    own = model.get_submodule(unit).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if alike[unit] in outputs and given[alike[unit]] == given[unit]:
            return outputs[alike[unit]]
        alike[unit] = unit
        return own(*args, **kwargs)

    return forward


def _answering(output: Any) -> Any:
    return lambda *args, **kwargs: output
