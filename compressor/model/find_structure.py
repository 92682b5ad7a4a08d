"""Find everything that is indexed by expert, without knowing any architecture by name.

The model class is built twice on the meta device (no memory, no weights) from two configs that differ in ONE integer.
A tensor dimension, an integer attribute or a list of child modules that changes with it is, by construction, indexed by
expert. Which integer of the config is the number of experts is found the same way: it is the one whose change resizes
both expert weights and router rows. `router_probe` then runs one MoE block of each kind to learn how it routes.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import nn

from compressor.errors import UnsupportedModelError
from compressor.model.modules import is_inside, kind_of, named_tensors, units_of
from compressor.model.router_probe import probe_router
from compressor.model.structure import ConfigLeaf, ExpertAxis, Integers, MoELayer, RouterProbe, Structure

ModelFactory = Any
"""A callable that builds a model from a transformers config: usually the model's class."""


def find_structure(factory: ModelFactory, config: Any, *, count: ConfigLeaf | None = None) -> Structure:
    """Build the model on the meta device and find its MoE layers. `count` names the integer that counts the experts,
    where its name does not tell. Costs a build per integer that it could be (0.1 s Mixtral, 0.8 s DeepSeek-V3). Raises
    UnsupportedModelError without routed experts, or where what hangs on their number cannot be sliced.
    """
    name = getattr(config, "model_type", type(config).__name__)
    if isinstance(factory, type) and factory.forward is nn.Module.forward:  # type: ignore[attr-defined]
        raise UnsupportedModelError(f"{name}: {factory.__name__} has no forward, so it cannot be run.")
    base_model = _build(factory, config)
    base = _Snapshot.of(base_model)
    leaf, difference, other_leaves = _find_expert_count(factory, config, base, name, count)
    if difference.odd:
        raise UnsupportedModelError(
            f"{name}: changing {leaf} changes what cannot be sliced: {'; '.join(difference.odd[:3])}."
        )
    finder = _LayerFinder(factory, base_model, base, difference, leaf, config, name)
    blocks = finder.blocks()
    top_k, *groups = (
        _find_integer(config, leaf, pattern, tuple(blocks), base, factory)
        for pattern in (r"top_?k(?!.*group)|per_tok|(^|_)k$", r"^(n|num)_(expert_)?groups?$", r"top_?k_groups?$")
    )
    layers = finder.layers(blocks, top_k[0] if top_k else None, [found[0] if found else None for found in groups])
    top_k_leaf, top_k_integers = _effective_top_k(top_k, finder, blocks, layers)
    inside = [place for place in difference.integers if any(is_inside(place[0], layer.path) for layer in layers)]
    return Structure(
        layers=tuple(
            dataclasses.replace(
                layer, top_k_fixed=top_k_leaf is None, wider_problem=_wider_problem(layer, top_k_leaf, top_k_integers)
            )
            for layer in layers
        ),
        num_experts_leaf=leaf,
        top_k_leaf=top_k_leaf,
        shapes=base.shapes,
        num_parameters=base.num_parameters,
        integers={place: value for place, value in difference.integers.items() if place not in inside},
        top_k_integers=top_k_integers,
        other_leaves=other_leaves,
    )


def _find_expert_count(
    factory: ModelFactory, config: Any, base: _Snapshot, name: str, count: ConfigLeaf | None
) -> tuple[ConfigLeaf, _Difference, tuple[ConfigLeaf, ...]]:
    """The integer that resizes experts and router rows; of several the language model's, then the largest's."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found: list[tuple[tuple[bool, int, int], ConfigLeaf, _Difference]] = []
    for word in (r"expert(?!s?_per_tok)", "moe"):  # how many are chosen resizes nothing
        for leaf in _integer_leaves(config, word, at_least=2) if count is None else [count]:
            difference = _difference(factory, config, leaf, base)
            if difference is not None and difference.expert_weights(base) and difference.router_rows(base):
                rank = (leaf.holder(config) is text, len(difference.tensors), leaf.get(config))
                found.append((rank, leaf, difference))
        if found:
            break
    if not found:
        raise UnsupportedModelError(
            f"{name}: no routed experts found. No integer of the config resizes both expert weights and router rows, "
            f"so this is a dense model, or one whose structure needs an adapter from a plugin."
        )
    _, best, difference = max(found, key=lambda entry: entry[0])
    others = [
        leaf
        for _, leaf, other in found
        if leaf != best and not set(other.tensors) & set(difference.tensors) and not other.odd
    ]
    return best, difference, tuple(others)


def _effective_top_k(
    found: tuple[ConfigLeaf, _Difference] | None,
    finder: _LayerFinder,
    blocks: Mapping[str, tuple[str, str, tuple[str, ...]]],
    layers: Sequence[MoELayer],
) -> tuple[ConfigLeaf | None, Integers]:
    """The leaf and its followers, if routers choose as many experts as it says and no tensor's shape hangs on it."""
    if found is None:
        return None, {}
    leaf, difference = found
    top_k = leaf.get(finder.config)
    if difference.odd or difference.tensors or any(layer.top_k != top_k for layer in layers):
        return None, {}
    other = copy.deepcopy(finder.config)
    leaf.set(other, top_k - 1 if top_k > 1 else 2)
    try:
        changed = dataclasses.replace(finder, model=_build(finder.factory, other), config=other)
        probes: dict[object, RouterProbe] = {}
        for path in (layers[0].path, layers[-1].path):
            if changed.layer(path, *blocks[path], leaf, (1, 1), probes).top_k != leaf.get(other):
                return None, {}
    except Exception:  # a class may refuse the other number for any reason: then it is not to be changed
        return None, {}
    return leaf, difference.integers


def _wider_problem(layer: MoELayer, top_k_leaf: ConfigLeaf | None, top_k_integers: Integers) -> str | None:
    """Why the layer cannot be made to choose more experts while its config stays as it is."""
    if top_k_leaf is None or layer.id_tensors:
        return f"its router names {layer.top_k} experts, whatever it is asked"
    if not any(is_inside(path, layer.path) for path, _ in top_k_integers):
        return f"its router reads from the config that it is to name {layer.top_k} experts"
    if layer.router_probe.call != "choices":
        return (
            f"its block does not hand ids and weights to its experts, so they can be given no more than {layer.top_k}"
        )
    return None


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
    integer_tensors: tuple[str, ...]
    num_parameters: int

    @classmethod
    def of(cls, model: nn.Module) -> _Snapshot:
        tensors = named_tensors(model)
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
            integer_tensors=tuple(n for n, t in tensors.items() if not (t.is_floating_point() or t.is_complex())),
            num_parameters=sum(p.numel() for p in model.parameters()),
        )


@dataclass(frozen=True)
class _Difference:
    """What changed between two builds, as expert axes; `odd` says what changed in no way that we can express."""

    tensors: dict[str, ExpertAxis]
    integers: dict[tuple[str, str], tuple[int, int]]
    containers: dict[str, tuple[str, ...]]
    odd: list[str]

    def expert_weights(self, base: _Snapshot) -> set[str]:
        """Paths of the modules that own expert weights: stacked in ≥ 3-D, flattened, or one child each."""
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
            and axis.dim == 0
            and base.shapes[name][1] > 1
            and not any(name.startswith(owner + ".") for owner in owners)
        ]


def _difference(
    factory: ModelFactory, config: Any, leaf: ConfigLeaf, base: _Snapshot, *, by: int | None = None
) -> _Difference | None:
    """Build again with twice the value, or `by` more, and compare; None where the class refuses that value."""
    value = leaf.get(config)
    step = by or value
    changed = copy.deepcopy(config)
    try:
        leaf.set(changed, value + step)
        other = _Snapshot.of(_build(factory, changed))
    except Exception:  # a config class may refuse a value for any reason; such a leaf cannot be the one we look for
        return None
    containers, odd = _grown_containers(base, other, value, step)
    tensors: dict[str, ExpertAxis] = {}
    for name, shape in base.shapes.items():
        new = other.shapes.get(name)
        if new == shape:
            continue
        dims = [i for i, (a, b) in enumerate(zip(shape, new, strict=False)) if a != b] if new else []
        if new is None or len(new) != len(shape) or len(dims) != 1 or (new[dims[0]] - shape[dims[0]]) % step:
            odd.append(f"tensor {name}: {shape} → {new}")
            continue
        stride = (new[dims[0]] - shape[dims[0]]) // step
        if stride < 0 or shape[dims[0]] < stride * value:
            odd.append(f"tensor {name}: {shape} → {new}")
            continue
        tensors[name] = ExpertAxis(dims[0], stride, shape[dims[0]] - stride * value)
    grown = tuple(path + "." for path in containers)
    odd += [f"tensor {name} appears" for name in other.shapes if name not in base.shapes and not name.startswith(grown)]
    integers: dict[tuple[str, str], tuple[int, int]] = {}
    for place, old in base.integers.items():
        delta = other.integers.get(place, old) - old
        if delta % step:
            odd.append(f"attribute {'.'.join(place)}: {old} → {old + delta}")
        elif delta:
            integers[place] = (delta // step, old - delta // step * value)
    return _Difference(tensors, integers, containers, odd)


def _grown_containers(
    base: _Snapshot, other: _Snapshot, value: int, step: int
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    containers: dict[str, tuple[str, ...]] = {}
    odd: list[str] = []
    for path, names in base.children.items():
        new = other.children.get(path, names)
        if new == names:
            continue
        kinds = {re.sub(r"\d+", "#", name) for name in set(new) - set(names)}
        experts = tuple(name for name in names if re.sub(r"\d+", "#", name) in kinds)
        if len(kinds) == 1 and len(experts) == value and len(new) == len(names) + step and set(names) < set(new):
            containers[path] = experts
        else:
            odd.append(f"children of {path}: {len(names)} → {len(new)}")
    return containers, odd


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _find_integer(
    config: Any, count: ConfigLeaf, pattern: str, blocks: tuple[str, ...], base: _Snapshot, factory: ModelFactory
) -> tuple[ConfigLeaf, _Difference] | None:
    """The integer whose name fits: one that changes the MoE blocks' attributes, else one on which nothing hangs."""
    fitting = [leaf for leaf in _integer_leaves(config, pattern) if leaf.path == count.path and leaf != count]
    silent = []
    for leaf in fitting:
        difference = _difference(factory, config, leaf, base, by=1)
        if difference is None:
            continue
        if any(is_inside(path, block) for path, _ in difference.integers for block in blocks):
            return leaf, difference
        if not (difference.integers or difference.tensors or difference.odd):
            silent.append((leaf, difference))
    return silent[0] if len(silent) == 1 else None


@dataclass(frozen=True)
class _LayerFinder:
    """Groups what the differential build found into MoE layers, one per block that owns experts and a router."""

    factory: ModelFactory
    model: nn.Module
    base: _Snapshot
    difference: _Difference
    leaf: ConfigLeaf
    config: Any
    name: str

    def layers(
        self,
        blocks: Mapping[str, tuple[str, str, tuple[str, ...]]],
        top_k_leaf: ConfigLeaf | None,
        group_leaves: Sequence[ConfigLeaf | None],
    ) -> tuple[MoELayer, ...]:
        order = {path: position for position, path in enumerate(self.base.children)}
        probes: dict[object, RouterProbe] = {}
        groups = [leaf.get(self.config) if leaf else 1 for leaf in group_leaves]
        layers = [
            self.layer(block, *blocks[block], top_k_leaf, groups, probes)
            for block in sorted(blocks, key=order.__getitem__)
        ]
        stray = [path for path in self.difference.tensors if not any(is_inside(path, layer.path) for layer in layers)]
        if stray:
            raise UnsupportedModelError(f"{self.name}: {stray[0]} is indexed by expert but belongs to no MoE layer.")
        return tuple(layers)

    def blocks(self) -> dict[str, tuple[str, str, tuple[str, ...]]]:
        """Block → (experts, router, its weights): the smallest module around experts with router rows."""
        routers = self.difference.router_rows(self.base)
        owners: dict[str, list[str]] = {}
        for owner in self.difference.expert_weights(self.base):
            block = _parent(owner)
            while block and not any(is_inside(router, block) for router in routers):
                block = _parent(block)
            owners.setdefault(block, []).append(owner)
        blocks: dict[str, tuple[str, str, tuple[str, ...]]] = {}
        for block, owned in owners.items():
            inside = [router for router in routers if is_inside(router, block)]
            if not inside:
                raise UnsupportedModelError(f"{self.name}: {owned[0]} holds experts, and no router is beside them.")
            router = _parent(min(inside, key=lambda path: path.count(".")))
            while _parent(router) != block and not any(is_inside(owner, _parent(router)) for owner in owned):
                router = _parent(router)  # from the linear map to the module around it that also chooses
            prefix = f"{block}." if block else ""
            children = {owner[len(prefix) :].partition(".")[0] for owner in owned}
            experts = prefix + children.pop() if len(children) == 1 else block
            blocks[block] = experts, router, tuple(path for path in inside if is_inside(path, router))
        return blocks

    def layer(
        self,
        block: str,
        experts: str,
        router: str,
        router_weights: tuple[str, ...],
        top_k_leaf: ConfigLeaf | None,
        groups: Sequence[int],
        probes: dict[object, RouterProbe],
    ) -> MoELayer:
        tensors = {path: axis for path, axis in self.difference.tensors.items() if is_inside(path, block)}
        containers = {path: names for path, names in self.difference.containers.items() if is_inside(path, block)}
        top_k = top_k_leaf.get(self.config) if top_k_leaf else None
        id_tensors = [path for path in self.base.integer_tensors if is_inside(path, block)]
        for path in id_tensors:
            if self.base.shapes[path][-1:] != (top_k,) or path in tensors:
                raise UnsupportedModelError(
                    f"{self.name}: whether {path} holds expert ids cannot be told; this needs an adapter from a plugin."
                )
        shapes, own = self.base.shapes, f"{experts}." if experts != block else None
        biases = [name for name in tensors if "bias" in name.rpartition(".")[2] and not (own and name.startswith(own))]
        layer = MoELayer(
            path=block,
            num_experts=self.leaf.get(self.config),
            top_k=top_k or 0,
            num_groups=1,
            num_chosen_groups=1,
            router=router,
            experts=experts,
            tensors=tensors,
            integers={place: value for place, value in self.difference.integers.items() if is_inside(place[0], block)},
            containers=containers,
            id_tensors=tuple(id_tensors),
            parameters_per_expert=_parameters_per_expert(self, tensors, containers),
            linears=self._linears_beside(block, router),
            router_probe=None,  # type: ignore[arg-type] # it is asked next
            router_weights=router_weights,
            selection_biases=tuple(name for name in biases if prod(shapes[name]) == shapes[name][tensors[name].dim]),
        )
        layer = dataclasses.replace(layer, shapes=_matrix_shapes(self, layer))
        key = kind_of(self.model.get_submodule(block))
        if key not in probes:
            probes[key] = probe_router(self.model, layer, self.leaf, self.config, top_k, groups[0], self.name)
        probe = probes[key]
        return dataclasses.replace(
            layer,
            top_k=probe.top_k,
            num_groups=groups[0] if probe.uses_groups else 1,
            num_chosen_groups=groups[1] if probe.uses_groups else 1,
            router_probe=probe,
            num_extra_choices=probe.num_extra_choices,
            watch_problem=probe.watch_problem,
            padding_problem=probe.padding_problem,
        )

    def _linears_beside(self, block: str, router: str) -> dict[str, str]:
        """Linear maps of a block's decoder layer, less the router's: name in the layer → name in the model."""
        unit = next((unit for unit in self._units if is_inside(block, unit)), block)
        start = len(unit) + 1 if unit else 0
        return {name[start:]: name for name in self._linears if is_inside(name, unit) and not is_inside(name, router)}

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    @cached_property
    def _units(self) -> tuple[str, ...]:
        return units_of(self.model)

    @cached_property
    def _linears(self) -> list[str]:
        """Weights of all linear maps but those of experts and routers, and those that are used in several places."""
        uses = Counter(id(one) for _, one in self.model.named_parameters(remove_duplicate=False))
        return [
            f"{path}.weight"
            for path, module in self.model.named_modules()
            if isinstance(module, nn.Linear)
            and uses[id(module.weight)] == 1
            and f"{path}.weight" not in self.difference.tensors
            and not any(is_inside(path, experts) for experts in self.difference.containers)
        ]


def _parameters_per_expert(
    finder: _LayerFinder, tensors: Mapping[str, ExpertAxis], containers: Mapping[str, tuple[str, ...]]
) -> int:
    parameters = finder.parameters
    total = 0
    for name, axis in tensors.items():
        if name in parameters:
            total += parameters[name].numel() // parameters[name].shape[axis.dim] * axis.stride
    for path, names in containers.items():
        total += sum(p.numel() for p in finder.model.get_submodule(f"{path}.{names[0]}").parameters())
    return total


def _matrix_shapes(finder: _LayerFinder, layer: MoELayer) -> dict[str, tuple[int, ...]]:
    """Of one expert's matrices and of the linear maps beside them, as `LayerWeights` calls them."""
    parameters, start = finder.parameters, len(layer.path) + 1 if layer.path else 0
    found = {name: parameters[at] for name, at in layer.linears.items()}
    lists = tuple(f"{path}." for path in layer.containers)
    for name, axis in layer.tensors.items():
        if name in parameters and name not in layer.router_weights and not (lists and name.startswith(lists)):
            found[name[start:]] = axis.of_expert(parameters[name], 0)  # type: ignore[assignment] # a view
    for path, children in layer.containers.items():
        for name, parameter in finder.model.get_submodule(f"{path}.{children[0]}").named_parameters():
            found[f"{path[start:]}.*.{name}"] = parameter
    return {name: tuple(one.shape) for name, one in found.items() if one.ndim == 2}
