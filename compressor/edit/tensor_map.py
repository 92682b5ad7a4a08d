"""What becomes of each tensor of a checkpoint when experts are removed: by names and shapes alone, no weight is read.

A checkpoint need not hold the tensors that the model has: transformers renames them while it loads, stacks tensors of
single experts, transposes. So what a name means is asked of transformers' own conversion mapping, and never assumed:

    name on disk ► renamings ► a tensor of the model, or a part of one ► one expert's, in a list: dropped or renamed
                                                                       ► all experts stacked: cut along one dimension
                               nothing in the model, quantised         ► what its weight's fate is

Which place of a list holds which expert is seen by sending the places' numbers through the converter instead of
weights. Which dimension of a stacked tensor counts experts, where a converter changes its shape, is found by cutting it
on the meta device: the one that leads to the smaller model's shapes.

A quantised tensor comes with others (scales, zero points, blocks) whose names lead nowhere in the model; each goes with
the weight that its name starts with. What is packed in a way that does not keep experts apart is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.conversion import Conversion, in_loading_order
from compressor.errors import CheckpointError, UnsupportedModelError
from compressor.model.constants import VALUE
from compressor.model.moe_model import Kept, MoEModel
from compressor.model.structure import ExpertAxis, MoELayer

Shape = tuple[int, ...]
"""Of a tensor on disk."""
_FEW = 2**22
"""Numbers in a tensor that are looked at one by one."""


@dataclass(frozen=True)
class Fate:
    """What becomes of a tensor: its new name (None: it goes), and the layer and dimension whose rows it loses."""

    name: str | None
    layer: MoELayer | None = None
    axis: ExpertAxis | None = None
    target: str | None = None
    """The model's tensor that it is, as it is."""
    gather: Tensor | None = None
    """Several layers' experts in one tensor: the new shape, and each number's place in the old one, seen flat."""
    constant: int | None = None
    """The expert, by its new id, whose constant stands in the place of this tensor of its own."""


@dataclass(frozen=True)
class _Owner:
    """The weight that a tensor on disk is, or goes with: by its name on disk, where it need not be. The tensor's own
    name is that, less `cut` at its end, and then `tail`.
    """

    name: str
    cut: str = ""
    tail: str = ""

    def companion_of(self, name: str) -> str:
        """The name of the same companion of another weight."""
        return name.removesuffix(self.cut) + self.tail


def fates(
    before: MoEModel,
    after: MoEModel,
    kept: Kept,
    shapes: Mapping[str, Shape],
    *,
    quantisation: Mapping[str, Any] | None,
) -> dict[str, Fate]:
    """What becomes of every tensor on disk when `before`, on the meta device, becomes `after`: name → Fate. `kept` are
    ids as `before` counts; `shapes` those on disk; `quantisation` is config.json's. Raises CheckpointError where names
    or counts do not fit, UnsupportedModelError where experts cannot be taken out.
    """
    change = _Change(before, after, kept, shapes, quantisation)
    names = in_loading_order(shapes)
    result = {name: Fate(None) for name in change.mapping.ignored(names)}
    found = {name: change.owner(name) for name in names if name not in result}
    leads_to = {owner.name: (target, pattern) for owner, target, pattern in filter(None, found.values())}
    groups: _Groups = {}
    for name in in_loading_order(leads_to):
        target, pattern = leads_to[name]
        groups.setdefault(target, {}).setdefault(pattern, []).append(name)
    of_owner = {name: fate for target in groups for name, fate in _of_group(change, groups, target).items()}
    result |= _of_strangers(change, [name for name, owned in found.items() if owned is None])
    result |= {name: _of_companion(change, name, own[0], of_owner[own[0].name]) for name, own in found.items() if own}
    taken: dict[str, str] = {}
    for name, fate in result.items():
        if fate.name is not None and taken.setdefault(fate.name, name) != name:
            raise UnsupportedModelError(f"{name} and {taken[fate.name]} would both be called {fate.name} afterwards.")
    return {name: result[name] for name in shapes}


_Groups = dict[str, dict[str | None, list[str]]]
"""A tensor of the model → a converter's pattern, None for the tensor itself → the names on disk that it is made of."""


class _Change:
    """A model becoming a smaller one: both on the meta device, who stays, what is on disk, and how names lead there."""

    def __init__(
        self,
        before: MoEModel,
        after: MoEModel,
        kept: Kept,
        shapes: Mapping[str, Shape],
        quantisation: Mapping[str, Any] | None,
    ) -> None:
        self.before, self.kept, self.shapes, self.quantisation = before, kept, shapes, quantisation
        self.mapping, self.smaller = Conversion(before.model), Conversion(after.model)
        self.constants = {layer.path: layer.constants for layer in after.layers}
        self.stacked: dict[str, tuple[MoELayer, ExpertAxis]] = {}
        self.children: dict[str, tuple[MoELayer, str, int]] = {}
        for layer in before.layers:
            in_lists = tuple(path + "." for path in layer.containers)
            for name, axis in layer.tensors.items():
                if not (in_lists and name.startswith(in_lists)):
                    self.stacked.setdefault(name, (layer, axis))
            for path, names in layer.containers.items():
                for expert, name in enumerate(names):
                    self.children.setdefault(f"{path}.{name}", (layer, path, expert))

    def owner(self, name: str) -> tuple[_Owner, str, str | None] | None:
        """(owner, the model's tensor, the converter's pattern), or None for a name that leads nowhere."""
        for owner in _owners(name) if self.quantisation is not None else [_Owner(name)]:
            target, pattern = self.mapping.rename(owner.name)
            if target in self.mapping.tensors:
                return owner, target, pattern
        return None

    def ids_with_weights(self, layer: MoELayer) -> list[int]:
        """New ids of the experts that stay and answer no constant. A layer that had some has no tensors to look at."""
        gone = () if layer.constants else self.constants[layer.path]
        return [new for new in range(len(self.kept[layer.path])) if new not in gone]

    def refuse_constants(self, target: str) -> None:
        """Raise UnsupportedModelError where a tensor that holds all experts would have to be taken apart."""
        layer = self.stacked[target][0]
        if self.constants[layer.path] and not layer.constants and layer.in_experts(target):
            raise UnsupportedModelError(
                f"{target}: its experts are in one tensor on disk, and experts that answer constants need one for each"
            )

    def child(self, target: str) -> tuple[MoELayer, str, int, str] | None:
        """(layer, list, expert, rest of the name) of a tensor of a module that is one expert."""
        parts = target.split(".")
        for end in range(len(parts) - 1, 0, -1):
            if found := self.children.get(".".join(parts[:end])):
                return *found, ".".join(parts[end:])
        return None


def _of_group(change: _Change, groups: _Groups, target: str) -> dict[str, Fate]:
    by_pattern = groups[target]
    if child := change.child(target):
        return _of_child(change, groups, by_pattern, *child)
    if None in by_pattern:
        if len(by_pattern) > 1:
            raise CheckpointError(f"{target}: the checkpoint holds it twice, stacked and by expert.")
        layer_axis = change.stacked.get(target)
        if layer_axis is None:
            return {name: Fate(name, target=target) for name in by_pattern[None]}
        change.refuse_constants(target)
        return {name: Fate(name, *layer_axis, target) for name in by_pattern[None]}
    pattern = next(iter(by_pattern))
    assert pattern is not None
    hit = [name for name in change.mapping.targets(target, pattern) if name in change.stacked]
    if not hit:
        return {name: Fate(name) for names in by_pattern.values() for name in names}
    sources = {key: names for key, names in by_pattern.items() if key is not None}
    if max(map(len, sources.values())) > 1:
        return _of_list(change, target, sources, hit)
    return _of_converted(change, target, {key: name for key, [name] in sources.items()}, hit)


def _of_child(
    change: _Change,
    groups: _Groups,
    by_pattern: Mapping[str | None, list[str]],
    layer: MoELayer,
    path: str,
    expert: int,
    rest: str,
) -> dict[str, Fate]:
    ids, children = list(change.kept[layer.path]), layer.containers[path]
    if expert not in ids:
        return {name: Fate(None) for names in by_pattern.values() for name in names}
    place = f"{path}.{children[ids.index(expert)]}.{rest}"
    there = groups.get(place, {})
    result: dict[str, Fate] = {}
    for pattern, names in by_pattern.items():
        if len(there.get(pattern, ())) != len(names):
            raise CheckpointError(f"{place} is not in the checkpoint, though {path}.{children[expert]}.{rest} is.")
        result |= {name: Fate(new, layer) for name, new in zip(names, there[pattern], strict=True)}
    return result


def _of_list(change: _Change, target: str, sources: Mapping[str, list[str]], hit: Sequence[str]) -> dict[str, Fate]:
    """One tensor an expert: which of them stay, and what they are called then."""
    first = next(iter(sources.values()))
    lengths = {pattern: len(names) for pattern, names in sources.items()}
    if len(set(lengths.values())) > 1:
        raise CheckpointError(f"{target}: the checkpoint holds {lengths} tensors for it, which should be as many.")
    places = _places_of_experts(change, target, sources, range(len(first)), change.mapping)
    wanted, others = {}, dict(places)
    for name in hit:
        layer, axis = change.stacked[name]
        others.pop(name)
        found = places[name]
        if len(found) != axis.size(layer.num_experts) or axis.stride != 1:
            raise CheckpointError(
                f"{layer.path}: by its config it has {layer.num_experts} experts, the checkpoint holds "
                f"{len(found) - axis.extra} ({first[0]} to {first[-1]})."
            )
        ids = [change.kept[layer.path][new] for new in change.ids_with_weights(layer)]
        wanted[name] = [found[row] for row in axis.rows(ids, layer.num_experts)]
    stay = sorted({place for found in [*wanted.values(), *others.values()] for place in found})
    if _places_of_experts(change, target, sources, stay, change.smaller) != wanted | others:
        layers = " and ".join(dict.fromkeys(change.stacked[name][0].path for name in hit))
        raise UnsupportedModelError(
            f"{layers}: their experts are one list on disk ({first[0]} …), so they must keep equally many."
        )
    result: dict[str, Fate] = {}
    layer = change.stacked[hit[0]][0]
    ids = change.ids_with_weights(layer) if change.constants[layer.path] else [*range(len(stay))]
    for names in sources.values():
        result |= {name: Fate(None) for name in names}
        result |= {names[place]: Fate(names[new], layer) for place, new in zip(stay, ids, strict=True)}
    if hit[0] == next(iter(layer.experts_tensors), None):
        for new in change.constants[layer.path]:
            name = next(iter(sources.values()))[new]
            module = name[: name.rindex(f".{new}.")]
            place = first[change.kept[layer.path][new]]
            result[place] = Fate(f"{module}.{new}.{VALUE}", layer, constant=new)
    return result


def _places_of_experts(
    change: _Change, target: str, sources: Mapping[str, list[str]], labels: Sequence[int], mapping: Conversion
) -> dict[str, list[int]]:
    """For each tensor of the model the places in the list of each expert's part, sent through the converter."""

    def number(name: str, label: int) -> Tensor:
        return torch.full((2,) * len(change.shapes.get(name, (0, 0))), float(label))

    numbered = {p: list(map(number, names, labels)) for p, names in sources.items()}
    try:
        made = mapping.convert(target, numbered)
    except Exception as error:  # an operation of transformers may refuse in any way
        raise UnsupportedModelError(f"{target}: what transformers makes it of cannot be followed: {error}") from error
    found = {}
    for name, label in made.items():
        dim = change.stacked[name][1].dim if name in change.stacked else 0
        rows = label.movedim(dim, 0).flatten(1)
        if not torch.equal(rows, rows[:, :1].expand_as(rows)):
            raise UnsupportedModelError(f"{name}: its converter mixes the experts that it reads from {sources}.")
        found[name] = rows[:, 0].int().tolist()
    return found


def _of_converted(change: _Change, target: str, sources: Mapping[str, str], hit: Sequence[str]) -> dict[str, Fate]:
    """All experts in one tensor whose shape, order or name a converter changes."""
    layer, axis = change.stacked[hit[0]]
    change.refuse_constants(hit[0])
    if any(change.stacked[name][0] is not layer for name in hit):
        return _of_several_layers(change, target, sources, hit)
    if axis.stride != 1 or axis.extra:
        raise UnsupportedModelError(f"{target}: its experts are flattened, and a converter changes their tensor.")
    present = {pattern: change.shapes[name] for pattern, name in sources.items() if name in change.shapes}
    if len(present) < len(sources):  # quantised: what is there are companions, which keep the experts apart or not
        return {name: Fate(name, layer, axis) for name in sources.values()}
    for dim in range(max(map(len, present.values()))):
        if _counts_experts(change, target, present, dim, layer, hit):
            cut = {p: _has(shape, dim, layer.num_experts) for p, shape in present.items()}
            one = ExpertAxis(dim)
            return {name: Fate(name, layer, one if cut[p] else None) for p, name in sources.items()}
    raise UnsupportedModelError(
        f"{target}: no dimension of {', '.join(sources.values())} ({[list(s) for s in present.values()]}) holds "
        f"{layer.num_experts} experts such that transformers makes the smaller model of the rest."
    )


def _counts_experts(
    change: _Change, target: str, shapes: Mapping[str, Shape], dim: int, layer: MoELayer, hit: Sequence[str]
) -> bool:
    """Whether sources cut along a dimension become what the smaller model has, with the experts in their order."""
    num_kept = len(change.kept[layer.path])
    has = {pattern: _has(shape, dim, layer.num_experts) for pattern, shape in shapes.items()}
    if not any(has.values()):
        return False

    def cut(shape: Shape) -> Shape:
        return (*shape[:dim], num_kept, *shape[dim + 1 :])

    meta = {p: torch.empty(cut(shape) if has[p] else shape, device="meta") for p, shape in shapes.items()}
    small = {p: (2,) * len(shape) for p, shape in shapes.items()}
    labels = {p: _row_numbers(cut(shape), dim) if has[p] else torch.zeros(shape) for p, shape in small.items()}
    try:
        made = change.smaller.convert(target, {p: [tensor] for p, tensor in meta.items()})
        sent = change.smaller.convert(target, {p: [tensor] for p, tensor in labels.items()})
    except Exception:  # with a wrong dimension operations fail in any way
        return False
    for name in hit:
        expert_dim = change.stacked[name][1].dim
        if made[name].shape != change.smaller.tensors[name].shape or sent[name].shape[expert_dim] != num_kept:
            return False
        rows = sent[name].movedim(expert_dim, 0).flatten(1)
        if not torch.equal(rows, torch.arange(num_kept)[:, None].expand_as(rows).to(rows.dtype)):
            return False
    return True


def _of_several_layers(change: _Change, target: str, sources: Mapping[str, str], hit: Sequence[str]) -> dict[str, Fate]:
    """One tensor on disk for several layers: its numbers' places are sent through the converter, for the tensor as
    it is and for a smaller one, and compared where they come out.
    """
    (pattern, name), *others = sources.items()
    shape = change.shapes.get(name)
    if others or shape is None or prod(shape) > _FEW:
        raise UnsupportedModelError(f"{target}: {', '.join(sources.values())} holds experts of several layers.")
    layers = [change.stacked[one][0] for one in hit]
    for dim, size in enumerate(shape):
        if size != layers[0].num_experts:
            continue
        new_shape = (*shape[:dim], len(change.kept[layers[0].path]), *shape[dim + 1 :])
        try:
            old = change.mapping.convert(target, {pattern: [_places(shape)]})
            new = change.smaller.convert(target, {pattern: [_places(new_shape)]})
        except Exception:  # with a wrong dimension operations fail in any way
            continue
        if any(new[one].shape != change.smaller.tensors[one].shape for one in hit):
            continue
        gather = torch.zeros(prod(new_shape), dtype=torch.int64)
        for one, places in old.items():
            stay = places
            if one in hit:
                layer, axis = change.stacked[one]
                stay = places.index_select(axis.dim, axis.rows(change.kept[layer.path], layer.num_experts))
            gather[new[one].flatten()] = stay.flatten()
        return {name: Fate(name, layers[0], gather=gather.reshape(new_shape))}
    raise UnsupportedModelError(
        f"{' and '.join(layer.path for layer in layers)}: their experts are in one tensor on disk ({name}), so "
        f"they must keep equally many."
    )


def _of_companion(change: _Change, name: str, owner: _Owner, fate: Fate) -> Fate:
    if fate.axis is None:
        return dataclasses.replace(fate, name=None if fate.name is None else owner.companion_of(fate.name))
    assert fate.layer is not None
    shape = change.shapes[name]
    itself = not owner.tail and name == owner.name
    if itself and (fate.target is None or change.mapping.tensors[fate.target].shape == shape):
        return fate
    if prod(shape) == 1 and not itself:
        return Fate(name)  # one number for all experts
    if len(change.kept[fate.layer.path]) == fate.layer.num_experts:
        return Fate(name)
    axis = _axis_of_companion(change, name, shape, fate.layer, fate.axis)
    return Fate(name, fate.layer, axis)


def _axis_of_companion(change: _Change, name: str, shape: Shape, layer: MoELayer, axis: ExpertAxis) -> ExpertAxis:
    size = shape[axis.dim] if axis.dim < len(shape) else 0
    stride, rest = divmod(size, layer.num_experts)
    blocks = (change.quantisation or {}).get("weight_block_size") or [1]
    straddles = stride and axis.stride > 1 and (axis.stride % stride or axis.stride % blocks[0])
    if change.quantisation is None or not stride or rest or axis.extra or straddles or stride > axis.stride:
        raise UnsupportedModelError(
            f"{name} {list(shape)}: its {layer.num_experts} experts are packed together, so none can be taken out "
            f"of it. Prune the unquantised checkpoint, then quantise the result; or quantise experts one by one, "
            f"and no router."
        )
    return ExpertAxis(axis.dim, stride)


def _of_strangers(change: _Change, strangers: Sequence[str]) -> dict[str, Fate]:
    """Names that lead nowhere: in a quantised checkpoint stacked experts by number, and what is outside of MoE."""
    if strangers and change.quantisation is None:
        raise CheckpointError(f"{strangers[0]} is nothing of {type(change.before.model).__name__}.")
    numbered: dict[tuple[str, str], dict[int, str]] = {}
    result = {}
    for name in strangers:
        renamed, _ = change.mapping.rename(name)
        layer = next((layer for layer in change.before.layers if renamed.startswith(_under(layer.path))), None)
        if layer is None:
            result[name] = Fate(name)
            continue
        if (change.quantisation or {}).get("quant_method") == "torchao":
            raise UnsupportedModelError(
                f"{name}: a piece of a weight that torchao has taken apart, and its experts cannot be taken out of "
                f"that. Apply the decision to the unquantised model, then quantise the result."
            )
        number, _, rest = renamed.removeprefix(_under(layer.experts)).partition(".")
        if not renamed.startswith(_under(layer.experts)) or not number.isdecimal() or not rest:
            raise UnsupportedModelError(
                f"{name}: inside a MoE block, and neither the block nor what it is quantised from has anything of "
                f"that name, so whether it counts experts cannot be told."
            )
        numbered.setdefault((layer.path, rest), {})[int(number)] = name
    by_path = {layer.path: layer for layer in change.before.layers}
    for (path, rest), by_number in numbered.items():
        layer = by_path[path]
        if sorted(by_number) != list(range(layer.num_experts)):
            raise CheckpointError(
                f"{path}: by its config it has {layer.num_experts} experts, the checkpoint holds {rest} of "
                f"{len(by_number)}."
            )
        result |= {name: Fate(None) for name in by_number.values()}
        result |= {by_number[expert]: Fate(by_number[new], layer) for new, expert in enumerate(change.kept[path])}
    return result


def _owners(name: str) -> Iterator[_Owner]:
    """Whose companion a tensor may be by its name, the nearest first: `w1.weight_scale` of `w1.weight`, `w1.qweight` of
    `w1.weight`, `w1.weight.absmax` of `w1.weight`, `gate_up_proj_blocks` of `gate_up_proj`.
    """
    yield _Owner(name)
    stem = name
    while stem:
        path, _, leaf = stem.rpartition(".")
        parts = leaf.split("_")
        for end in range(len(parts) - 1, 0, -1):
            shorter = f"{path}." * bool(path) + "_".join(parts[:end])
            yield _Owner(shorter, "", name[len(shorter) :])
        stem = path
        if stem:
            yield _Owner(stem + ".weight", ".weight", name[len(stem) :])
            yield _Owner(stem, "", name[len(stem) :])


def _has(shape: Shape, dim: int, size: int) -> bool:
    return dim < len(shape) and shape[dim] == size


def _row_numbers(shape: Shape, dim: int) -> Tensor:
    """A tensor that holds each row's number along a dimension."""
    return torch.arange(float(shape[dim])).reshape(-1, *[1] * (len(shape) - dim - 1)).expand(shape).contiguous()


def _places(shape: Shape) -> Tensor:
    """A tensor that holds each number's own place in it, seen as flat."""
    return torch.arange(prod(shape)).reshape(shape)


def _under(path: str) -> str:
    return path + "." if path else ""
