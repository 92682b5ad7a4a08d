"""What a model's forward does with text, seen before any weight is read: its skeleton is run on the meta device."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.checkpoint.resume_state import tensors_in
from compressor.data.sequences import TokenBatch
from compressor.model.modules import kind_of, units_of
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
    for layer in structure.layers:
        model.get_submodule(layer.path).register_forward_pre_hook(_note(reached, layer.path))
        if layer.router_probe.call == "choices" and not layer.is_list:
            model.get_submodule(layer.experts).forward = _zeros
    units = _Units()
    for unit in units_of(model):
        module = model.get_submodule(unit)
        module.forward = units.forward(unit, module)
    try:
        model(**_inputs(model))
        first, units.is_first = dict(units.given), False
        model(**_inputs(model))
    except Exception:  # whatever the model's own code asks of numbers
        return Rehearsal()
    for unit, (ran, _) in units.answers.items():
        reached |= {unit + path[len(ran) :] for path in reached if f"{path}.".startswith(f"{ran}.")}
    carries = next((unit for unit in units.answers if first[unit] != units.given[unit]), None)
    return Rehearsal(frozenset(layer.path for layer in structure.layers) - reached, carries)


class _Units:
    """What decoder layers are given and answer, who ran for that, and the first of those that are alike."""

    def __init__(self) -> None:
        self.given: dict[str, list[torch.Size]] = {}
        self.answers: dict[str, tuple[str, Any]] = {}
        self.alike: dict[object, tuple[str, Any]] = {}
        self.is_first = True

    def forward(self, unit: str, module: nn.Module) -> Any:
        """What stands for a decoder layer's forward."""
        own, kind = module.forward, kind_of(module)

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.given[unit] = [tensor.shape for tensor in tensors_in((args, kwargs), depth=4)]
            if self.is_first:
                key = kind, *self.given[unit]
                if key not in self.alike:
                    self.alike[key] = unit, own(*args, **kwargs)
                self.answers[unit] = self.alike[key]
            return self.answers[unit][1]

        return forward


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
