"""Find everything that is indexed by expert, without knowing any architecture by name.

The model class is built twice on the meta device (no memory, no weights) from two configs that differ in ONE integer.
A tensor dimension, an integer attribute or a list of child modules that changes with it is, by construction, indexed by
expert. Which integer of the config is the number of experts is found the same way: it is the one whose change resizes
both expert weights and router rows.

Not covered yet, and refused by name: expert ids stored as values of integer tensors; experts without a router beside
them; layers whose counts hang on different integers of the config.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compressor.errors import UnsupportedModelError
from compressor.moe.probe import RouterProbe, probe_router

ModelFactory = Any
"""A callable that builds a model from a transformers config: usually the model's class."""


@dataclass(frozen=True)
class ExpertAxis:
    """One dimension of a tensor that is indexed by expert: its size is `stride × num_experts + extra`.

    `stride` is 1 but for tensors that keep all experts flattened in one dimension; `extra` counts rows behind the
    experts' own, which pruning leaves alone.
    """

    dim: int
    stride: int = 1
    extra: int = 0

    def rows(self, kept: list[int], num_experts: int) -> torch.Tensor:
        """Indices [stride × len(kept) + extra] int64 of the rows that stay when only `kept` experts do."""
        first = torch.tensor(kept, dtype=torch.int64)[:, None] * self.stride
        own = (first + torch.arange(self.stride)).reshape(-1)
        return torch.cat([own, torch.arange(num_experts * self.stride, num_experts * self.stride + self.extra)])


@dataclass(frozen=True)
class MoELayer:
    """One MoE block of a model: where it is, how it routes, and everything in it that is indexed by expert.

    `path` is the block's module path in the model; the other paths are relative to the model too. `num_groups` is
    greater than 1 only where the router really limits the choice to `num_chosen_groups` groups of experts.
    """

    path: str
    num_experts: int
    top_k: int
    num_groups: int
    num_chosen_groups: int
    router: str
    experts: str
    tensors: Mapping[str, ExpertAxis]
    integers: Mapping[tuple[str, str], tuple[int, int]]
    """(module path, attribute) → (stride, extra) of an integer attribute that counts experts."""
    containers: Mapping[str, tuple[str, ...]]
    """Module lists with one child per expert → the children's names, in expert order."""
    parameters_per_expert: int
    """Parameters that go with one expert: its weights, its router row, its biases."""
    router_probe: RouterProbe
    num_extra_choices: int = 0
    """Things behind the experts that the router can choose and that pruning leaves alone: identity experts, a skip."""
    top_k_fixed: bool = False
    """Whether the class chooses a fixed number of experts, whatever the config says."""
    watch_problem: str | None = None
    """Why the layer's tokens cannot be watched, in words, or None."""
    padding_problem: str | None = None
    """Why surplus experts cannot be switched off by a bias of the router, in words, or None."""

    @property
    def num_choices(self) -> int:
        """How many things the router chooses among: the experts and whatever stands behind them."""
        return self.num_experts + self.num_extra_choices

    @property
    def is_list(self) -> bool:
        """Whether the experts are modules in a list (remote code of the transformers 4 era), not stacked tensors."""
        return bool(self.containers)

    @property
    def router_kind(self) -> str:
        """The router's class and what it does, for tables."""
        groups = f", {self.num_chosen_groups} of {self.num_groups} groups" if self.num_groups > 1 else ""
        return f"{self.router_probe.class_name}: top-{self.top_k}{groups}"


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


def find_structure(factory: ModelFactory, config: Any) -> Structure:
    """Build the model on the meta device and find its MoE layers.

    `config` is not changed. Costs two builds per integer of the config that could be the number of experts (0.2 s for
    Mixtral, 0.7 s for DeepSeek-V3). Raises UnsupportedModelError where there are no routed experts or something that
    hangs on their number cannot be sliced.
    """
    name = getattr(config, "model_type", type(config).__name__)
    base_model = _build(factory, config)
    base = _Snapshot.of(base_model)
    found: tuple[ConfigLeaf, _Difference] | None = None
    for leaf in _integer_leaves(config, "expert", at_least=2):
        difference = _difference(factory, config, leaf, base)
        if difference is None or not (difference.expert_weights(base) and difference.router_rows(base)):
            continue
        if found is None or len(difference.tensors) > len(found[1].tensors):
            found = leaf, difference
    if found is None:
        raise UnsupportedModelError(
            f"{name}: no routed experts found. No integer of the config with 'expert' in its name resizes both expert "
            f"weights and router rows, so this is a dense model, or one whose structure needs a plugin."
        )
    leaf, difference = found
    if difference.odd:
        raise UnsupportedModelError(
            f"{name}: changing {leaf} changes the model in a way that cannot be sliced: "
            f"{'; '.join(difference.odd[:3])}."
        )
    top_k_leaf = _find_integer(config, leaf, r"top_?k(?!.*group)|per_tok", base_model, factory)
    groups = tuple(
        _find_integer(config, leaf, pattern, base_model, factory)
        for pattern in (r"^(n|num)_(expert_)?groups?$", r"top_?k_groups?$")
    )
    layers = _layers(base_model, base, difference, leaf.get(config), name, top_k_leaf, groups, config)
    return Structure(layers, leaf, _effective(top_k_leaf, config, layers), base.shapes, base.num_parameters)


def _effective(leaf: ConfigLeaf | None, config: Any, layers: tuple[MoELayer, ...]) -> ConfigLeaf | None:
    """The leaf, if the routers choose as many experts as it says."""
    return leaf if leaf is not None and all(layer.top_k == leaf.get(config) for layer in layers) else None


def _build(factory: ModelFactory, config: Any) -> nn.Module:
    with torch.device("meta"):
        model = factory(copy.deepcopy(config))
    assert isinstance(model, nn.Module)
    return model


def _is_count(value: object) -> bool:
    return type(value) is int


def _integer_leaves(config: Any, word: str, *, at_least: int = 1) -> Iterator[ConfigLeaf]:
    """The integers of a config and its sub-configs whose name contains `word`."""
    from transformers import PreTrainedConfig

    def walk(holder: Any, path: tuple[str, ...], seen: set[int]) -> Iterator[ConfigLeaf]:
        if id(holder) in seen:
            return
        seen.add(id(holder))
        for key, value in list(holder.__dict__.items()):
            if isinstance(value, PreTrainedConfig):
                yield from walk(value, (*path, key), seen)
            elif _is_count(value) and value >= at_least and re.search(word, key):
                yield ConfigLeaf(path, key)

    yield from walk(config, (), set())


@dataclass(frozen=True)
class _Snapshot:
    """What of a model can depend on the number of experts."""

    shapes: dict[str, tuple[int, ...]]
    integers: dict[tuple[str, str], int]
    children: dict[str, tuple[str, ...]]
    id_tensors: tuple[str, ...]
    num_parameters: int

    @classmethod
    def of(cls, model: nn.Module) -> _Snapshot:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        tensors = {**parameters, **dict(model.named_buffers(remove_duplicate=False))}
        modules = dict(model.named_modules(remove_duplicate=False))
        return cls(
            shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
            integers={
                (path, attribute): value
                for path, module in modules.items()
                for attribute, value in module.__dict__.items()
                if _is_count(value)
            },
            children={path: tuple(module._modules) for path, module in modules.items()},
            id_tensors=tuple(n for n, t in tensors.items() if not (t.is_floating_point() or t.is_complex())),
            num_parameters=sum(p.numel() for p in {id(p): p for p in parameters.values()}.values()),
        )


@dataclass(frozen=True)
class _Difference:
    """What changed between two builds, as expert axes; `odd` says what changed in no way that we can express."""

    tensors: dict[str, ExpertAxis]
    integers: dict[tuple[str, str], tuple[int, int]]
    containers: dict[str, tuple[str, ...]]
    odd: list[str]

    def expert_weights(self, base: _Snapshot) -> set[str]:
        """Paths of the modules that own expert weights: stacked in ≥ 3-D tensors, flattened, or one child per
        expert.
        """
        owners = {
            _parent(name)
            for name, axis in self.tensors.items()
            if (len(base.shapes[name]) >= 3 and axis.dim == 0) or axis.stride > 1
        }
        return owners | set(self.containers)

    def router_rows(self, base: _Snapshot) -> list[str]:
        """Names of the 2-D tensors that have one row per expert and are not the experts' own."""
        owners = self.expert_weights(base)
        return [
            name
            for name, axis in self.tensors.items()
            if len(base.shapes[name]) == 2
            and axis.stride == 1
            and min(base.shapes[name]) > 1
            and not any(name.startswith(owner + ".") for owner in owners)
        ]


def _difference(factory: ModelFactory, config: Any, leaf: ConfigLeaf, base: _Snapshot) -> _Difference | None:
    """Build again with twice the value and compare; None where the class refuses the doubled value."""
    value = leaf.get(config)
    changed = copy.deepcopy(config)
    try:
        leaf.set(changed, 2 * value)
        other = _Snapshot.of(_build(factory, changed))
    except Exception:  # a config class may refuse a value for any reason; such a leaf cannot be the one we look for
        return None
    containers, odd = _grown_containers(base, other, value)
    tensors: dict[str, ExpertAxis] = {}
    for name, shape in base.shapes.items():
        new = other.shapes.get(name)
        if new == shape:
            continue
        dims = [i for i, (a, b) in enumerate(zip(shape, new, strict=False)) if a != b] if new else []
        if new is None or len(new) != len(shape) or len(dims) != 1 or (new[dims[0]] - shape[dims[0]]) % value:
            odd.append(f"tensor {name}: {shape} → {new}")
            continue
        stride = (new[dims[0]] - shape[dims[0]]) // value
        tensors[name] = ExpertAxis(dims[0], stride, shape[dims[0]] - stride * value)
    grown = tuple(path + "." for path in containers)
    odd += [f"tensor {name} appears" for name in other.shapes if name not in base.shapes and not name.startswith(grown)]
    integers: dict[tuple[str, str], tuple[int, int]] = {}
    for place, old in base.integers.items():
        delta = other.integers.get(place, old) - old
        if delta % value:
            odd.append(f"attribute {'.'.join(place)}: {old} → {old + delta}")
        elif delta:
            integers[place] = (delta // value, old - delta)
    return _Difference(tensors, integers, containers, odd)


def _grown_containers(base: _Snapshot, other: _Snapshot, value: int) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    containers: dict[str, tuple[str, ...]] = {}
    odd: list[str] = []
    for path, names in base.children.items():
        new = other.children.get(path, names)
        if new == names:
            continue
        if len(names) == value and len(new) == 2 * value and new[:value] == names:
            containers[path] = names
        else:
            odd.append(f"children of {path}: {len(names)} → {len(new)}")
    return containers, odd


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _inside(path: str, block: str) -> bool:
    return path == block or path.startswith(block + ".") or block == ""


def _find_integer(
    config: Any, count: ConfigLeaf, pattern: str, base_model: nn.Module, factory: ModelFactory
) -> ConfigLeaf | None:
    """The integer beside the expert count whose name fits and on which an attribute of the model hangs."""
    fitting = [leaf for leaf in _integer_leaves(config, pattern) if leaf.path == count.path and leaf != count]
    for leaf in fitting:
        changed = copy.deepcopy(config)
        leaf.set(changed, leaf.get(config) + 1)
        try:
            other = _Snapshot.of(_build(factory, changed))
        except Exception:  # as in _difference
            continue
        if other.integers != _Snapshot.of(base_model).integers:
            return leaf
    return None


def _layers(
    base_model: nn.Module,
    base: _Snapshot,
    difference: _Difference,
    num_experts: int,
    name: str,
    top_k_leaf: ConfigLeaf | None,
    group_leaves: tuple[ConfigLeaf | None, ...],
    config: Any,
) -> tuple[MoELayer, ...]:
    """One MoELayer per module that owns experts, together with the router nearest to it."""
    routers = difference.router_rows(base)
    found = []
    for experts in difference.expert_weights(base):
        block = _parent(experts)
        while block and not any(_inside(router, block) for router in routers):
            block = _parent(block)
        inside = [router for router in routers if _inside(router, block)]
        router = _parent(min(inside, key=lambda path: path.count(".")))
        while _parent(router) != block and not _inside(experts, _parent(router)):
            router = _parent(router)  # from the linear map to the module around it that also chooses
        found.append((block, experts, router))
    if len({block for block, _, _ in found}) != len(found):
        raise UnsupportedModelError(f"{name}: several modules share one router's block; this needs a plugin.")

    probes: dict[tuple[object, ...], RouterProbe] = {}
    layers = []
    order = {path: position for position, path in enumerate(base.children)}
    for block, experts, router in sorted(found, key=lambda entry: order[entry[0]]):
        id_tensors = [tensor for tensor in base.id_tensors if _inside(tensor, block)]
        if id_tensors:
            raise UnsupportedModelError(
                f"{name}: {id_tensors[0]} holds integers that may be expert ids; slicing would leave them wrong."
            )
        tensors = {path: axis for path, axis in difference.tensors.items() if _inside(path, block)}
        containers = {path: names for path, names in difference.containers.items() if _inside(path, block)}
        module = base_model.get_submodule(router)
        groups = tuple(leaf.get(config) if leaf else 1 for leaf in group_leaves)
        fallback_top_k = top_k_leaf.get(config) if top_k_leaf else None
        shape = tuple(base.shapes[path] for path in tensors if _inside(path, router))
        key = (type(module), shape, repr(module.__dict__.get("top_k")))
        if key not in probes:
            probes[key] = probe_router(module, num_experts, fallback_top_k, groups[0])
        probe = probes[key]
        if probe.top_k is None:
            raise UnsupportedModelError(
                f"{name}: cannot tell how many experts {router} ({type(module).__name__}) chooses per token; "
                f"its forward returned {probe.returned}."
            )
        layers.append(
            MoELayer(
                path=block,
                num_experts=num_experts,
                top_k=probe.top_k,
                num_groups=groups[0] if probe.uses_groups else 1,
                num_chosen_groups=groups[1] if probe.uses_groups else 1,
                router=router,
                experts=experts,
                tensors=tensors,
                integers={place: value for place, value in difference.integers.items() if _inside(place[0], block)},
                containers=containers,
                parameters_per_expert=_parameters_per_expert(base_model, tensors, containers),
                router_probe=probe,
            )
        )
    # integers above the blocks (a top-level `num_experts`, say) belong to the first layer, so that they are set once
    outside = {
        place: value
        for place, value in difference.integers.items()
        if not any(_inside(place[0], layer.path) for layer in layers)
    }
    stray = [path for path in difference.tensors if not any(_inside(path, layer.path) for layer in layers)]
    if stray:
        raise UnsupportedModelError(f"{name}: {stray[0]} is indexed by expert but belongs to no MoE layer.")
    layers[0] = dataclasses.replace(layers[0], integers={**layers[0].integers, **outside})
    return tuple(layers)


def _parameters_per_expert(
    model: nn.Module, tensors: Mapping[str, ExpertAxis], containers: Mapping[str, tuple[str, ...]]
) -> int:
    parameters = dict(model.named_parameters())
    total = 0
    for name, axis in tensors.items():
        if name in parameters:
            total += parameters[name].numel() // parameters[name].shape[axis.dim] * axis.stride
    for path, names in containers.items():
        total += sum(p.numel() for p in model.get_submodule(f"{path}.{names[0]}").parameters())
    return total
