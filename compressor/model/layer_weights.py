"""One MoE layer's weights, expert by expert, whatever the layout: stacked, flat, or modules in a list.

Tensors are called as the layer calls them, by their path in the block, with `*` in the place of an expert's own module:
`experts.gate_up_proj` of stacked experts, `experts.*.w1.weight` of a list. What is read are views of the model's own
memory, in the orientation and dtype that the model has; assigning to a name writes there. Which dimension of a matrix
its inputs are summed over structure does not tell, so one expert is run to see it (`expert_products`): `matrices` are
the same memory as [outputs, inputs].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import UnsupportedModelError
from compressor.model.constants import Replacements
from compressor.model.expert_products import ExpertMatrices, tensors_of_experts
from compressor.model.modules import named_tensors
from compressor.model.skipping.rule import SkipRule
from compressor.model.structure import MoELayer

_NUMBERS_AT_ONCE = 2**22
Tensors = Mapping[str, Tensor]
"""A layer's tensors that are indexed by expert, by their names in the model."""


class ExpertTensors(Mapping[str, Tensor]):
    """The tensors of one expert, or its rows of the router's: views, which may be written to in place or by name."""

    def __init__(self, owner: str, views: Tensors) -> None:
        self._owner, self._views = owner, views

    def __getitem__(self, name: str) -> Tensor:
        return self._views[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        """Write numbers, rounded to the layer's dtype. Raises ValueError for another shape, KeyError for a new name."""
        view = self._views[name]
        if view.shape != value.shape:
            raise ValueError(f"{self._owner}: {name} is {list(view.shape)}, and the edit wrote {list(value.shape)}")
        view.copy_(value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)


class Expert(ExpertTensors):
    """One expert's tensors."""

    def __init__(self, owner: str, views: Tensors, used: Callable[[], ExpertMatrices]) -> None:
        super().__init__(owner, views)
        self._used = used

    @property
    def matrices(self) -> ExpertTensors:
        """Those that inputs are multiplied with, as [outputs, inputs], in the order of their use. Raises
        UnsupportedModelError where that cannot be seen.
        """
        dims = self._used().input_dims
        return ExpertTensors(
            self._owner, {name: self._views[name] if dim else self._views[name].T for name, dim in dims.items()}
        )

    @property
    def neurons(self) -> ExpertTensors:
        """Those in which each neuron, an input of the last matrix, has numbers of its own, as [neurons, …]: experts in
        which the neurons stand in another order, in all of these, answer the same. Raises UnsupportedModelError where
        that cannot be seen.
        """
        used, matrices = self._used(), self.matrices
        found = {used.last: matrices[used.last].T}
        width = len(found[used.last])
        for name in {**used.input_dims, **used.neurons}:
            if name not in found and name not in used.neurons:
                raise UnsupportedModelError(f"{self._owner}: which rows of {name} are which neuron's cannot be seen.")
            if name not in found:
                rows = matrices[name] if name in used.input_dims else self._views[name]
                each = len(rows) // width
                sizes = (width, each) if used.neurons[name] else (each, width)
                found[name] = rows.view(*sizes, *rows.shape[1:]).transpose(0, 0 if used.neurons[name] else 1)
        return ExpertTensors(self._owner, found)

    def scale(self, factor: float) -> None:
        """Have the expert answer so many times as much: its last matrix, and what is added to it. Raises ValueError
        where a norm or the like behind them would undo it.
        """
        names = self._used().output
        if not names:
            raise ValueError(f"{self._owner}: what it answers is not linear in its last matrix, so it cannot be scaled")
        for name in names:
            self[name] = self[name].float() * factor


@dataclass(frozen=True)
class Ending:
    """What stays of a layer after an edit: these experts, so many a token, and how it skips; None as it was."""

    kept: tuple[int, ...] | None = None
    top_k: int | None = None
    padded: bool = False
    rule: SkipRule | None = None
    wrote: bool = False
    """Whether the edit asked for weights, which it may have changed."""
    constants: Replacements | None = None
    """What experts answer from then on, by id."""

    def to_json(self) -> dict[str, Any]:
        """Of constants it says how large they are."""
        sizes = {e: None if one is None else len(one) for e, one in (self.constants or {}).items()} or None
        return {**self.__dict__, "rule": self.rule.to_json() if self.rule else None, "constants": sizes}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Ending:
        """The inverse of `to_json`, but for the constants' numbers, which are on the meta device."""
        kept, rule, sizes = data["kept"], data["rule"], data["constants"] or {}
        constants = {int(e): None if size is None else torch.empty(size, device="meta") for e, size in sizes.items()}
        return cls(**{
            **data, "kept": None if kept is None else tuple(kept), "rule": SkipRule.of(rule) if rule else None,
            "constants": constants or None,
        })  # fmt: skip


class LayerWeights:
    """One MoE layer as an edit sees it. Ids are those that the pass saw.

    `experts[e]` and `router[e]` map names to views of expert e, `linears` those of all other linear maps in the decoder
    layer; weights are read when one of them is first asked for. `keep` and `skip` say what the core shall do when the
    edit is done.
    """

    def __init__(
        self, layer: MoELayer, ids: Sequence[int], read: Callable[[], Tensors], used: Callable[[], ExpertMatrices]
    ) -> None:
        """`ids`: the experts of `layer` that the pass saw; `read` brings the tensors, `used` says how they are used."""
        self.path, self.num_experts = layer.path, len(ids)
        self._layer, self._ids, self._read, self._used = layer, tuple(ids), read, used
        self._tensors: Tensors | None = None
        self._ending = Ending()

    def __repr__(self) -> str:
        return f"LayerWeights({self.path}: {self.num_experts} experts)"

    @cached_property
    def experts(self) -> Sequence[Expert]:
        """Each expert's tensors by name: all that are indexed by expert, but the router's."""
        owned = tensors_of_experts(self._all, self._layer)
        return [
            Expert(
                f"{self.path}: expert {new}",
                {own.name: own.of(old) for own in owned if own.expert in (None, old)},
                self._used,
            )
            for new, old in enumerate(self._ids)
        ]

    @cached_property
    def router(self) -> Sequence[ExpertTensors]:
        """Each expert's rows of the router's weights and of the biases that choose."""
        names = [*self._layer.router_weights, *self._layer.selection_biases]
        rows = {name: axis for name, axis in self._layer.tensors.items() if name in names}
        start = len(self.path) + 1 if self.path else 0
        return [
            ExpertTensors(
                f"{self.path}: router row {new}",
                {name[start:]: axis.of_expert(self._all[name], old) for name, axis in rows.items()},
            )
            for new, old in enumerate(self._ids)
        ]

    @cached_property
    def linears(self) -> ExpertTensors:
        """Weights [outputs, inputs] of the other linear maps in the decoder layer, such as `self_attn.q_proj.weight`:
        attention, shared experts, a dense part. None that is used elsewhere too.
        """
        return ExpertTensors(self.path, {name: self._all[at] for name, at in self._layer.linears.items()})

    def keep(self, ids: Sequence[int], *, top_k: int | None = None, padded: bool = False) -> None:
        """Remove all other experts; `top_k` and `padded` as of `MoEModel.keep`, alike in all layers."""
        self._ending = replace(self._ending, kept=tuple(ids), top_k=top_k, padded=padded)

    def skip(self, rule: SkipRule) -> None:
        """Skip experts by this rule from now on."""
        self._ending = replace(self._ending, rule=rule)

    def replace(self, constants: Replacements) -> None:
        """Have these experts, by id, answer a constant [hidden] each, whatever they are given, and remove their
        weights. The router stays as it is, and so do all ids; see `model.constants`. None instead of a constant: the
        expert is never chosen, where the router has a bias that sees to that.
        """
        self._ending = replace(self._ending, constants=dict(constants))

    @property
    def ending(self) -> Ending:
        """What the edit has asked for."""
        return replace(self._ending, wrote=self._tensors is not None)

    @property
    def _all(self) -> Tensors:
        if self._layer.constants:
            raise UnsupportedModelError(
                f"{self.path}: some of its experts answer constants, and weights are not edited after that; edit them "
                f"before."
            )
        if self._tensors is None:
            self._tensors = self._read()
        return self._tensors


def live_tensors(model: nn.Module, layer: MoELayer) -> Tensors:
    """A live model's own tensors of a layer and of the linear maps beside it, to be read and written in place. Raises
    UnsupportedModelError where the layer shares one with another, which an edit of this one would change too.
    """
    lists = tuple(f"{path}." for path in layer.containers)
    everything = named_tensors(model).items()
    found = {name: one for name, one in everything if name in layer.tensors or (lists and name.startswith(lists))}
    own = {id(one) for one in found.values()}
    for name, tensor in everything:
        if id(tensor) in own and not layer.holds(name) and name not in found:
            raise UnsupportedModelError(f"{layer.path}: its weights cannot be edited alone: {name} is one of them too.")
    found |= {name: one for name, one in everything if name in layer.linears.values()}
    return {name: one.detach() for name, one in found.items()}


def refuse_damage(layer: MoELayer, edited: Tensors, exact: Tensors) -> float:
    """How far an edit's numbers are from those of the same edit made in float32, relative to the largest of each
    tensor. Raises ValueError, naming the tensor, for NaN and infinity, and where they differ by more than rounding to
    the layer's dtype explains.
    """
    most = 0.0
    for name, tensor in edited.items():
        if not tensor.dtype.is_floating_point:
            continue
        scale = difference = 0.0
        for own, wanted in zip(_pieces(tensor), _pieces(exact[name]), strict=True):
            if not torch.isfinite(own).all():
                raise ValueError(f"{layer.path}: the edit wrote NaN or infinity into {name}")
            scale = max(scale, float(wanted.abs().max()))
            difference = max(difference, float((own.to(wanted.dtype) - wanted).abs().max()))
        error = difference / (scale or 1.0)
        if error > tolerance(tensor.dtype):
            raise ValueError(
                f"{layer.path}: the edit loses precision: {name} differs from the same edit in float32 by {error:.2g} "
                f"of its largest number, rounding to {str(tensor.dtype).removeprefix('torch.')} would explain "
                f"{tolerance(tensor.dtype):.2g}; compute in float32 or float64, and assign the result"
            )
        most = max(most, error)
    return most


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """A tensor some rows at a time, so that a comparison takes no memory to speak of."""
    rows = max(1, _NUMBERS_AT_ONCE * len(tensor) // max(1, tensor.numel())) if tensor.ndim else 1
    return torch.split(tensor if tensor.ndim else tensor.reshape(1), rows)


def tolerance(dtype: torch.dtype) -> float:
    """What rounding once explains, relative to the largest number."""
    return torch.finfo(dtype).eps


def widened(tensors: Tensors) -> dict[str, Tensor]:
    """Copies in float32, or float64 where they are."""
    return {
        name: tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
        if tensor.dtype.is_floating_point
        else tensor.clone()
        for name, tensor in tensors.items()
    }
