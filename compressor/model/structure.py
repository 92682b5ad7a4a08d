"""What is known of a model's MoE layers: how they route, and where everything is that is indexed by expert."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch

Call = Literal["choices", "list", "masks", "scaled inputs", "pairs"]
"""How a block hands tokens to its experts:

choices         experts(hidden [T, H], ids [T, K], weights [T, K]), in any order
list            a loop of the block over a list of modules
masks           experts(hidden [T, H], one-hot mask [T, 1, E], weights [T, 1])
scaled inputs   experts(hidden [E·T, H]): every expert sees all tokens, times their scores, 0 where it is not chosen
pairs           lists of (token, expert) pairs, sorted by expert, through several modules
"""


@dataclass(frozen=True)
class RouterProbe:
    """What a router answered; positions of ids and weights [T, K] in its output are None where its block chooses."""

    class_name: str
    top_k: int
    call: Call
    index_position: int | None
    weights_position: int | None
    uses_groups: bool
    num_extra_choices: int
    reads_config: bool
    block_runs: bool
    """Whether the block's forward needs nothing but hidden states: not so where a decoder layer is the block."""
    watch_problem: str | None
    padding_problem: str | None
    experts_order: tuple[int, int, int] | None = None
    """Where hidden states, ids and weights are among the arguments of experts that are called with these."""
    experts_width: int | None = None
    """The size of the hidden states that the experts are given; both None where no block ran up to its experts."""


@dataclass(frozen=True)
class ExpertAxis:
    """A dimension indexed by expert, of size `stride × num_experts + extra`: `stride` > 1 where all are flattened in
    one, `extra` rows behind the experts', which pruning leaves.
    """

    dim: int
    stride: int = 1
    extra: int = 0

    def rows(self, kept: Sequence[int], num_experts: int) -> torch.Tensor:
        """Indices [stride × len(kept) + extra] int64 of the rows that stay when only `kept` experts do."""
        first = torch.tensor(kept, dtype=torch.int64)[:, None] * self.stride
        own = (first + torch.arange(self.stride)).reshape(-1)
        return torch.cat([own, torch.arange(num_experts * self.stride, num_experts * self.stride + self.extra)])

    def of_expert(self, tensor: torch.Tensor, expert: int) -> torch.Tensor:
        """One expert's part, a view; without the dimension where it would have one row."""
        own = tensor.narrow(self.dim, self.stride * expert, self.stride)
        return own.squeeze(self.dim) if self.stride == 1 else own

    def size(self, num_experts: int) -> int:
        """The dimension's size with that many experts."""
        return self.stride * num_experts + self.extra


Integers = Mapping[tuple[str, str], tuple[int, int]]
"""(module path, attribute) → (stride, extra) of an integer attribute: its value is `stride × count + extra`."""


@dataclass(frozen=True)
class MoELayer:
    """One MoE block: where it is, how it routes, all in it that is indexed by expert. Paths are the model's;
    `num_groups` > 1 only where the choice is limited to `num_chosen_groups`.
    """

    path: str
    num_experts: int
    top_k: int
    num_groups: int
    num_chosen_groups: int
    router: str
    experts: str
    tensors: Mapping[str, ExpertAxis]
    integers: Integers
    containers: Mapping[str, tuple[str, ...]]
    """Module lists with one child per expert → the children's names, in expert order."""
    id_tensors: tuple[str, ...]
    """Integer tensors […, top_k] that hold expert ids as values: a token's experts are looked up, not computed."""
    parameters_per_expert: int
    """Parameters that go with one expert: its weights, its router row, its biases."""
    router_probe: RouterProbe
    linears: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Weights of the decoder layer's other linear maps (attention, shared experts): name in the decoder layer → name in
    the model. None that is used in several places."""
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """Of one expert's matrices and of `linears`, by their names in `LayerWeights`; empty where only statistics are."""
    router_weights: tuple[str, ...] = ()
    """The router's tensors with one row per expert: what its logits are computed with."""
    selection_biases: tuple[str, ...] = ()
    """Tensors with one number per expert that are added to logits or scores, wherever in the block they live."""
    num_extra_choices: int = 0
    """Things behind the experts that the router can choose and that pruning leaves alone: identity experts."""
    top_k_fixed: bool = False
    """Whether the class chooses a fixed number of experts, whatever the config says."""
    watch_problem: str | None = None
    """Why the layer's tokens cannot be watched, in words, or None."""
    padding_problem: str | None = None
    """Why surplus experts cannot be switched off by a bias of the router, in words, or None."""
    wider_problem: str | None = None
    """Why the router cannot be asked for more experts per token than the model takes, in words, or None."""
    constants: tuple[int, ...] = ()
    """Ids of its experts that answer a constant: they count among `num_experts`, and have no weights. In a method's
    `check` only their number is known.
    """
    skip_rule: Any = None
    """The SkipRule by which the layer will skip; None but in a method's `check`, as `zeros` and `bits`. What it asks
    of the layer is known there (`top_k`, `normalise_over`); of a threshold that will be found any will do.
    """
    zeros: str | None = None
    """The pattern of zeros in its experts that later passes must keep, such as `2:4` or `unstructured`."""
    bits: float | None = None
    """Bits that a weight of its experts is stored with, where a pass stores them otherwise than the model does."""

    def __repr__(self) -> str:
        return f"MoELayer({self.path}: {self.num_experts} experts, top-{self.top_k})"

    def description(self) -> dict[str, Any]:
        """What deciding needs to know of the layer, as JSON; `described` is the inverse."""
        return {name: getattr(self, name) for name in _DESCRIBED}

    @classmethod
    def described(cls, description: Mapping[str, Any]) -> MoELayer:
        """A layer to decide on, whose model is not at hand: it has no tensors and cannot be watched or edited."""
        known = {name: description[name] for name in _DESCRIBED if name in description}
        known["constants"] = tuple(known.get("constants", ()))
        nothing: dict[str, Any] = {"router_probe": None, "tensors": {}, "integers": {}, "containers": {}}
        return cls(router="", experts="", id_tensors=(), **nothing, **known)

    def with_count(self, num_experts: int) -> MoELayer:
        """The same layer with only so many experts; which of them stay does not matter."""
        containers = {path: names[:num_experts] for path, names in self.containers.items()}
        rule = self.skip_rule.of_experts(range(num_experts)) if self.skip_rule else None
        return dataclasses.replace(self, num_experts=num_experts, containers=containers, skip_rule=rule)

    def in_experts(self, name: str) -> bool:
        """Whether a module is the experts' own, or a tensor or module in it."""
        return f"{name}.".startswith(f"{self.experts}.")

    @property
    def experts_tensors(self) -> Mapping[str, ExpertAxis]:
        """Tensors of the experts' own module that are indexed by expert."""
        return {name: axis for name, axis in self.tensors.items() if self.in_experts(name)}

    @property
    def num_with_weights(self) -> int:
        """How many of its experts are run: the others answer constants."""
        return self.num_experts - len(self.constants)

    def with_constants(self, ids: Sequence[int]) -> MoELayer:
        """The same layer where these experts answer constants: nothing in its experts' module is indexed by its ids."""
        if not ids:
            return self
        return dataclasses.replace(
            self,
            constants=tuple(ids),
            tensors={name: axis for name, axis in self.tensors.items() if not self.in_experts(name)},
            integers={place: value for place, value in self.integers.items() if not self.in_experts(place[0])},
        )

    @property
    def num_choices(self) -> int:
        """How many things the router chooses among: the experts and whatever stands behind them."""
        return self.num_experts + self.num_extra_choices

    @property
    def number(self) -> str | None:
        """The decoder layer's number: the first integer in the block's path; `model.layers.3.mlp` → "3"."""
        return next((part for part in self.path.split(".") if part.isdecimal()), None)

    def holds(self, name: str) -> bool:
        """Whether a tensor or module is inside the block."""
        return not self.path or name.startswith(f"{self.path}.")

    def place_of(self, name: str) -> Literal["expert", "block", "layer"]:
        """Where one of its matrices is, by its name in `LayerWeights`: an expert's, beside the experts in their block,
        or elsewhere in the decoder layer, as attention is.
        """
        if name not in self.linears:
            return "expert"
        return "block" if self.holds(self.linears[name]) else "layer"

    @property
    def names(self) -> list[str]:
        """What a recipe may call the layer: the path of its block, or its number."""
        return [self.path, *filter(None, [self.number])]

    @property
    def is_list(self) -> bool:
        """Whether the experts are modules in a list or dictionary, not stacked tensors."""
        return bool(self.containers)

    @property
    def router_kind(self) -> str:
        """The router's class and what it does, for tables."""
        groups = f", {self.num_chosen_groups} of {self.num_groups} groups" if self.num_groups > 1 else ""
        return f"{self.router_probe.class_name}: top-{self.top_k}{groups}"


_DESCRIBED = (
    "path", "num_experts", "top_k", "num_groups", "num_chosen_groups", "num_extra_choices", "constants",
    "parameters_per_expert", "top_k_fixed", "watch_problem", "padding_problem", "wider_problem",
)  # fmt: skip


@dataclass(frozen=True)
class ConfigLeaf:
    """An integer in a config: `path` leads to the sub-config (empty: the config itself), `key` names it there."""

    path: tuple[str, ...]
    key: str

    def holder(self, config: Any) -> Any:
        """The sub-config that holds the integer."""
        for name in self.path:
            config = getattr(config, name)
        return config

    def get(self, config: Any) -> int:
        """The integer's value."""
        return int(self.holder(config).__dict__[self.key])

    def set(self, config: Any, value: int) -> None:
        """Write the integer, in place."""
        setattr(self.holder(config), self.key, value)

    def __str__(self) -> str:
        return ".".join((*self.path, self.key))


@dataclass(frozen=True)
class Structure:
    """What the differential build found: the layers, and the integers of the config that count experts and choices."""

    layers: tuple[MoELayer, ...]
    num_experts_leaf: ConfigLeaf
    top_k_leaf: ConfigLeaf | None
    """None where the class chooses a fixed number of experts whatever the config says."""
    shapes: Mapping[str, tuple[int, ...]]
    """Every tensor of the model."""
    num_parameters: int
    integers: Integers = dataclasses.field(default_factory=dict)
    """Integer attributes outside the MoE blocks that count experts."""
    top_k_integers: Integers = dataclasses.field(default_factory=dict)
    """Integer attributes that follow the number of experts per token."""
    other_leaves: tuple[ConfigLeaf, ...] = ()
    """Expert counts of other parts of the model (a vision tower's, a talker's), which are left as they are."""

    def __repr__(self) -> str:
        return f"Structure({layers_said(self.layers)})"

    def counts_in(self, config: Any) -> dict[ConfigLeaf, int]:
        """What a config says of the number of experts, and of experts per token where the class heeds that."""
        return {leaf: leaf.get(config) for leaf in (self.num_experts_leaf, self.top_k_leaf) if leaf is not None}

    def with_counts(self, counts: Mapping[str, int]) -> Structure:
        """The structure of the same model with other numbers of experts in some layers, by layer path."""
        layers, shapes, num_parameters = [], dict(self.shapes), self.num_parameters
        for layer in self.layers:
            count = counts.get(layer.path, layer.num_experts)
            num_parameters -= (layer.num_experts - count) * layer.parameters_per_expert
            for path, names in layer.containers.items():
                gone = tuple(f"{path}.{name}." for name in names[count:])
                shapes = {name: shape for name, shape in shapes.items() if not (gone and name.startswith(gone))}
            for name, axis in layer.tensors.items():
                shape = list(shapes[name])
                shape[axis.dim] = axis.size(count)
                shapes[name] = tuple(shape)
            layers.append(layer.with_count(count))
        return dataclasses.replace(self, layers=tuple(layers), shapes=shapes, num_parameters=num_parameters)

    def width_at(self, layer: MoELayer) -> int:
        """The size of what a layer's experts are given, and answer."""
        return layer.router_probe.experts_width or self.shapes[layer.router_weights[0]][-1]

    def with_constants(self, replaced: Mapping[str, Sequence[int]]) -> Structure:
        """The structure of the same model where these experts of some layers, by layer path, answer constants."""
        layers, shapes, num_parameters = [], dict(self.shapes), self.num_parameters
        for layer in self.layers:
            ids = [] if layer.constants else list(replaced.get(layer.path, ()))
            for name, axis in layer.experts_tensors.items() if ids else ():
                old, width = shapes[name], axis.size(layer.num_experts - len(ids))
                shapes[name] = (*old[: axis.dim], width, *old[axis.dim + 1 :])
                num_parameters += prod(shapes[name]) - prod(old)
            for expert in ids:
                shapes[f"{layer.experts}.{expert}.approx_value"] = (self.width_at(layer),)
                num_parameters += self.width_at(layer)
            layers.append(layer.with_constants(ids))
        return dataclasses.replace(self, layers=tuple(layers), shapes=shapes, num_parameters=num_parameters)


def layers_said(layers: Sequence[MoELayer]) -> str:
    """`4 MoE layers of 8 experts, top-2`; the smallest and the largest where they differ."""
    numbers = ([layer.num_experts for layer in layers], [layer.top_k for layer in layers])
    experts, chosen = (f"{min(one)}–{max(one)}" if min(one) < max(one) else f"{one[0]}" for one in numbers)
    return f"{len(layers)} MoE layer{'s' * (len(layers) != 1)} of {experts} experts, top-{chosen}"
