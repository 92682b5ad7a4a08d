"""A live transformers model, seen as a stack of MoE layers whose experts can be masked, watched and removed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from compressor.errors import UnsupportedModelError
from compressor.model.adapter import structure_of
from compressor.model.capture import Visitor, tapped
from compressor.model.config_entry import write_entry
from compressor.model.constants import (
    Constants,
    Replacements,
    never_chosen_problem,
    previewed,
    refuse_constants,
    replace_in_layer,
    write_replaced,
)
from compressor.model.masking import masked_router, relabelled, router_weights, selection_biases, top_k_set, write_top_k
from compressor.model.modules import named_tensors, shared_tensors, tensor_at
from compressor.model.routed_tokens import RealTokens
from compressor.model.router_probe import SWITCHED_OFF
from compressor.model.skipping import install as skipping
from compressor.model.skipping.rule import SkipRule
from compressor.model.skipping.state import LayerSkip
from compressor.model.skipping.usage import Counter
from compressor.model.structure import MoELayer, Structure, layers_said
from compressor.model.uneven import as_stored, slice_layer, write_counts

Kept = Mapping[str, Sequence[int]]
"""Layer path → ids of the experts that stay, ascending."""


@dataclass(frozen=True)
class Removal:
    """What one `keep` did: the ids that stayed, as counted before, and new ids that a bias switches off (`padded`)."""

    kept: Kept
    switched_off: Kept


class MoEModel:
    """A transformers model with its MoE layers found; nothing changes until `keep`, whose calls are in `removals`.
    `structure` is an adapter's. Raises UnsupportedModelError for a dense or quantised model, or one that hangs on its
    experts in a way that cannot be sliced.
    """

    def __init__(self, model: nn.Module, structure: Structure | None = None) -> None:
        self.model = model
        self.config: Any = model.config
        self.removals: list[Removal] = []
        self.config_changes: dict[str, Any] = {}
        """Keys of config.json that methods have set."""
        refuse_quantised(self.config)
        self.structure = structure or structure_of(type(model), self.config)
        self.structure = as_stored(self.structure, self.config)
        self.constants: dict[str, Constants] = {}
        """What `replace` was given, by layer path: on the meta device the model cannot hold it."""
        self.never_chosen: dict[str, list[int]] = {}
        """Experts that `replace` has switched off by the router's bias, by layer path."""
        self._check_shapes()
        _refuse_bad_ids(self.model, self.layers)

    def __repr__(self) -> str:
        return f"MoEModel({type(self.model).__name__}: {layers_said(self.layers)})"

    def _check_shapes(self) -> None:
        live = named_tensors(self.model)
        for name, shape in self.structure.shapes.items():
            if name not in live or tuple(live[name].shape) != shape:
                found = tuple(live[name].shape) if name in live else "nothing"
                raise UnsupportedModelError(
                    f"{type(self.model).__name__}: by its config {name} should be {shape}, found {found}. Was the "
                    f"model changed after it was loaded?"
                )

    @property
    def layers(self) -> tuple[MoELayer, ...]:
        """The MoE layers, in the order in which the model has them."""
        return self.structure.layers

    def layer(self, path: str) -> MoELayer:
        """The layer at a module path. Raises KeyError with the known paths."""
        for layer in self.layers:
            if layer.path == path:
                return layer
        raise KeyError(f"no MoE layer at {path!r}; the layers are {[layer.path for layer in self.layers]}")

    @contextmanager
    def masked(self, kept: Kept, *, top_k: int | None = None) -> Iterator[None]:
        """Within the context only `kept` experts can be chosen in the layers named. `top_k` lowers experts per token in
        all layers, of which a rule for skipping takes its own. Raises ValueError where `keep` would.
        """
        kept = {path: check_kept(self.layer(path), ids, top_k=top_k) for path, ids in kept.items()}
        self._check_top_k(top_k)
        with ExitStack() as stack:
            for path, ids in kept.items():
                stack.enter_context(masked_router(self.model, self.layer(path), ids))
            stack.enter_context(top_k_set(self.model, self.structure, top_k))
            yield

    @contextmanager
    def watched(self, visitors: Mapping[str, Visitor], real: RealTokens) -> Iterator[None]:
        """Within the context, a layer's visitor is given its RoutedTokens when the model runs, which is unskipped."""
        for path in visitors:
            self.layer(path)
        with self.unskipped(), tapped(self.model, self.structure, visitors, real):
            yield

    @property
    def skip_rules(self) -> dict[str, SkipRule]:
        """Layer path → how it skips experts, as the config says, whether that is switched on or not."""
        return skipping.rules_of(self.config)

    @property
    def skips(self) -> bool:
        """Whether skipping is switched on."""
        return any(state.is_on for state in skipping.states(self.model).values())

    def skip(self, rules: Mapping[str, SkipRule]) -> None:
        """Skip experts by these rules and no others; without rules, no more. The config (`config.compressor`) says so
        too: a checkpoint saved from here skips by `compressor.load`, and runs unskipped elsewhere; so does another
        model that shares it. Raises ValueError or UnsupportedModelError, before anything is changed.
        """
        rules = dict(rules)
        skipping.refuse_rules(self.structure, rules)
        skipping.install(self.model, self.structure, rules)
        write_entry(self.config, "skipping", skipping.rules_json(rules))

    def restore_skipping(self) -> None:
        """Switch on what the config says. Raises CheckpointError where its rules do not fit the model."""
        skipping.restore(self.model, self.structure, self.config)

    @contextmanager
    def unskipped(self) -> Iterator[None]:
        """Within the context no expert is skipped."""
        with skipping.paused(self.model):
            yield

    @contextmanager
    def zeroed(self, rules: Mapping[str, SkipRule]) -> Iterator[None]:
        """Within the context, skipped experts are evaluated with weight 0: slow and plain, what skipping must equal."""
        skipping.refuse_rules(self.structure, rules)
        before = skipping.states(self.model)
        skipping.install(self.model, self.structure, rules, zeroed=True)
        try:
            yield
        finally:
            self._skip_again(before)

    @contextmanager
    def counted(self) -> Iterator[Counter]:
        """Within the context a counter adds up the experts used in each layer that skips, without padding where an
        `attention_mask` tells; `may_count_padding` says if it did not.
        """
        counter = Counter()
        with skipping.counting(self.model, counter):
            yield counter

    @torch.no_grad()
    def keep(self, kept: Kept, *, top_k: int | None = None, padded: bool = False) -> None:
        """Remove all experts but `kept`, in place: weights, router rows, biases, integers, and the count in the config.

        Layers that are not named keep all. With one count for all the result is an ordinary model of its class. With
        other counts in other layers, no class of transformers builds it: the config then says which layer has how many
        (`config.compressor`), and `compressor.load` reads it. `padded` keeps the largest count everywhere instead, with
        surplus experts switched off by the router's bias: that loads anywhere, and saves no memory in those layers.

        `top_k` lowers the number of experts per token, in every layer. Raises ValueError or UnsupportedModelError
        before anything is changed.
        """
        whole = {layer.path: range(layer.num_experts) for layer in self.layers}
        checked = {path: check_kept(self.layer(path), ids, top_k=top_k) for path, ids in {**whole, **kept}.items()}
        self._check_top_k(top_k)
        switched_off: dict[str, list[int]] = {}
        if padded:
            checked, switched_off = _padded(self.layers, checked)
        _refuse_shared_tensors(self.model, self.layers, checked)
        rules = self._rules_after(checked, top_k)
        skipped = skipping.states(self.model)
        skipping.remove(self.model)
        made = WeakTensorKeyDictionary()  # whatever no layer needs any more is gone
        layers = tuple(self._keep_in_layer(layer, checked[layer.path], made) for layer in self.layers)
        self.structure = dataclasses.replace(
            self.structure, layers=layers, shapes={n: tuple(t.shape) for n, t in named_tensors(self.model).items()},
            num_parameters=sum(p.numel() for p in self.model.parameters()),
        )  # fmt: skip
        for layer in layers:
            switch_off(self.model, layer, switched_off.get(layer.path, []))
        write_counts(self.model, self.structure)
        if top_k is not None:
            write_top_k(self.model, self.structure, top_k)
            self.structure = dataclasses.replace(
                self.structure, layers=tuple(dataclasses.replace(layer, top_k=top_k) for layer in layers)
            )
        write_entry(self.config, "skipping", skipping.rules_json(rules))
        if skipped:
            wanted = {path: (rule, False) for path, rule in rules.items()}
            skipping.reinstate(self.model, self.structure, wanted, skipped)
        self.removals.append(Removal(checked, switched_off))

    @torch.no_grad()
    def replace(self, replacements: Mapping[str, Replacements]) -> None:
        """Let experts answer a constant [hidden] each, in place, by layer path and id: their weights go, the router
        and all ids stay. Those with None are never chosen: the router's bias sees to that. The config says so too
        (`constants.KEY`), and `compressor.load` reads it. Raises ValueError or UnsupportedModelError before anything is
        changed.
        """
        off = {path: [e for e, value in of.items() if value is None] for path, of in replacements.items()}
        off = {path: ids for path, ids in off.items() if ids}
        for path, ids in off.items():
            if why := never_chosen_problem(self.layer(path), ids):
                raise ValueError(f"{path}: experts {ids} cannot be switched off: {why}")
        constants: dict[str, Constants] = {}
        for path, of in replacements.items():
            zero = torch.zeros(self.structure.width_at(self.layer(path)))
            constants[path] = {expert: zero if value is None else value for expert, value in of.items()}
        refuse_constants(self.model, self.structure, constants)
        before = skipping.states(self.model)
        skipping.remove(self.model)
        layers = [
            replace_in_layer(self.model, layer, constants[layer.path]) if constants.get(layer.path) else layer
            for layer in self.layers
        ]
        self.structure = self.structure.with_constants({layer.path: layer.constants for layer in layers})
        write_replaced(self.config, layers)
        self.constants |= constants
        self.never_chosen |= off
        for path, ids in off.items():
            switch_off(self.model, self.layer(path), ids)
        self._skip_again(before)

    @contextmanager
    def replaced(self, constants: Mapping[str, Constants]) -> Iterator[None]:
        """Within the context these experts answer constants, as after `replace`; no weight goes."""
        refuse_constants(self.model, self.structure, constants)
        before = skipping.states(self.model)
        with ExitStack() as stack:
            stack.callback(self._skip_again, before)
            skipping.remove(self.model)
            for path, of_layer in constants.items():
                stack.enter_context(previewed(self.model, self.layer(path), of_layer))
            stack.callback(skipping.remove, self.model)
            self._skip_again(before)
            yield

    def _skip_again(self, before: dict[str, LayerSkip]) -> None:
        """Switch skipping on as it was; `before` are what layers knew."""
        wanted = {path: (state.rule, state.zeroed) for path, state in before.items()}
        skipping.reinstate(self.model, self.structure, wanted, before | skipping.states(self.model))

    def _rules_after(self, kept: Kept, top_k: int | None) -> dict[str, SkipRule]:
        """The rules by which the layers will skip when they have fewer experts. Raises where they could not."""
        skipping.refuse_rules(self.structure, self.skip_rules)
        rules = {path: rule.of_experts(kept[path]) for path, rule in self.skip_rules.items()}
        smaller = tuple(
            dataclasses.replace(layer, num_experts=len(kept[layer.path]), top_k=top_k or layer.top_k)
            for layer in self.layers
        )
        try:
            skipping.refuse_rules(dataclasses.replace(self.structure, layers=smaller), rules)
        except (ValueError, UnsupportedModelError) as error:
            raise ValueError(f"the model skips experts, and could not go on like this: {error}") from error
        return rules

    def _check_top_k(self, top_k: int | None) -> None:
        if top_k is None:
            return
        fixed = next((layer for layer in self.layers if layer.top_k_fixed), None)
        if fixed is not None:
            raise UnsupportedModelError(
                f"{fixed.path}: its class always chooses {fixed.top_k} experts per token; `top_k` cannot be changed."
            )
        if not 1 <= top_k <= min(layer.top_k for layer in self.layers):
            raise ValueError(f"top_k can be lowered from {self.layers[0].top_k} to 1 at least, got {top_k}")
        rules = self.skip_rules if self.skips else {}
        for layer in self.layers:
            problem = rules[layer.path].problem(layer.num_experts, top_k) if layer.path in rules else None
            if problem:
                raise ValueError(f"the model skips experts, and could not go on like this: {layer.path}: {problem}")

    def _keep_in_layer(self, layer: MoELayer, kept: Sequence[int], made: WeakTensorKeyDictionary) -> MoELayer:
        for name in layer.id_tensors:
            table = tensor_at(self.model, name)
            if not table.is_meta:
                rows = router_weights(self.model, layer)[0][: layer.num_experts]
                table.copy_(relabelled(table, layer, kept, rows))
        return slice_layer(self.model, layer, kept, made)


def _refuse_bad_ids(model: nn.Module, layers: Sequence[MoELayer]) -> None:
    """Tables of integers must hold what their shape makes us believe: different experts in every row."""
    for layer in layers:
        for name in layer.id_tensors:
            ids = tensor_at(model, name)
            if ids.is_meta:
                continue
            ordered = ids.sort(-1).values
            if int(ids.min()) < 0 or int(ids.max()) >= layer.num_experts or bool((ordered.diff(dim=-1) == 0).any()):
                raise UnsupportedModelError(
                    f"{name}: its integers were taken for expert ids, and are not: a row should name "
                    f"{ids.shape[-1]} different experts from 0 to {layer.num_experts - 1}."
                )


def _refuse_shared_tensors(model: nn.Module, layers: Sequence[MoELayer], kept: Mapping[str, Sequence[int]]) -> None:
    """Layers that share weights must keep the same experts."""
    for path, other, name in shared_tensors(model, {layer.path: layer.tensors for layer in layers}):
        if list(kept[other]) != list(kept[path]):
            raise UnsupportedModelError(
                f"{path} and {other} share their weights ({name}), so they must keep the same experts."
            )


def switch_off(model: nn.Module, layer: MoELayer, ids: Sequence[int]) -> None:
    """Have a layer's router never choose these experts, by its biases, in place."""
    off = torch.tensor(ids, dtype=torch.int64)
    for name, bias in selection_biases(model, layer) if len(off) else ():
        bias.index_fill_(layer.tensors[name].dim, off.to(bias.device), SWITCHED_OFF)


def _padded(
    layers: Sequence[MoELayer], kept: Mapping[str, list[int]]
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """(kept ids, all counts equal; new ids of the surplus experts to be switched off)."""
    most = max(len(ids) for ids in kept.values())
    filled: dict[str, list[int]] = {}
    switched_off: dict[str, list[int]] = {}
    for layer in layers:
        own, size = set(kept[layer.path]), layer.num_experts // layer.num_groups
        if len(own) < most and layer.padding_problem:
            raise UnsupportedModelError(f"{layer.path}: cannot be padded: {layer.padding_problem}.")
        ids: list[int] = []
        for group in range(layer.num_groups):
            members = range(group * size, (group + 1) * size)
            mine = [expert for expert in members if expert in own]
            spare = [expert for expert in members if expert not in own]
            ids += sorted(mine + spare[: most // layer.num_groups - len(mine)])
        filled[layer.path] = ids
        switched_off[layer.path] = [position for position, expert in enumerate(ids) if expert not in own]
    return filled, switched_off


def check_kept(layer: MoELayer, kept: Sequence[int], *, top_k: int | None = None) -> list[int]:
    """The ids as an ascending list. Raises ValueError where this layer cannot keep exactly these experts."""
    if top_k is not None:
        layer = dataclasses.replace(layer, top_k=top_k)
    ids = sorted({int(expert) for expert in kept})
    if len(ids) != len(kept) or (ids and not 0 <= ids[0] <= ids[-1] < layer.num_experts):
        raise ValueError(
            f"{layer.path}: kept experts must be different ids from 0 to {layer.num_experts - 1}, got {kept}"
        )
    problem = count_problem(layer, len(ids))
    if problem:
        raise ValueError(f"{layer.path}: {problem}")
    size = layer.num_experts // layer.num_groups
    per_group = {sum(expert // size == group for expert in ids) for group in range(layer.num_groups)}
    if len(per_group) > 1:
        raise ValueError(
            f"{layer.path}: its {layer.num_groups} groups must keep equally many experts; got {sorted(per_group)}"
        )
    return ids


def count_problem(layer: MoELayer, num_kept: int) -> str | None:
    """Why a layer cannot keep so many experts, in words with the nearest possible count; None where it can."""
    if num_kept > layer.num_experts:
        return f"it has {layer.num_experts} experts and cannot keep {num_kept}"
    if num_kept == layer.num_experts:
        return None
    if layer.constants:
        return "some of its experts answer constants, so the others have to stay; prune before that"
    if _count_works(layer, num_kept):
        return None
    possible = [count for count in range(2, layer.num_experts + 1) if _count_works(layer, count)]
    if not possible:
        groups = f" in {layer.num_groups} groups of at least 2" if layer.num_groups > 1 else ""
        return f"none of its {layer.num_experts} experts can go: each token chooses {layer.top_k}{groups}"
    nearest = min(possible, key=lambda count: (abs(count - num_kept), count))
    if num_kept < max(2, layer.top_k):
        reason = f"cannot keep {num_kept} experts: each token chooses {layer.top_k}, and fewer than 2 is no choice"
    else:
        reason = (
            f"cannot keep {num_kept} experts: its router chooses {layer.num_chosen_groups} of {layer.num_groups} "
            f"groups, "
            f"so the groups need equally many experts, at least 2 each, and at least {layer.top_k} in the chosen ones"
        )
    return f"{reason}. The nearest possible count is {nearest}"


def possible_counts(layer: MoELayer) -> list[int]:
    """How many experts a layer can keep, ascending: those that `count_problem` has nothing to say of."""
    fewer = [] if layer.constants else [count for count in range(2, layer.num_experts) if _count_works(layer, count)]
    return [*fewer, layer.num_experts]


def _count_works(layer: MoELayer, count: int) -> bool:
    if count < max(2, layer.top_k):
        return False
    if layer.num_groups == 1:
        return True
    per_group, rest = divmod(count, layer.num_groups)
    return rest == 0 and per_group >= 2 and per_group * layer.num_chosen_groups >= layer.top_k


def refuse_quantised(config: Any) -> None:
    """Raise UnsupportedModelError for a quantised model: its packed tensors cannot be sliced by shape alone."""
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is not None:
        kind = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation.quant_method
        raise UnsupportedModelError(
            f"{config.model_type}: the model in memory is quantised ({getattr(kind, 'value', kind)}), and packed "
            "tensors are not edited there; give its folder to a recipe, or prune the unquantised model, then quantise "
            "the result."
        )
