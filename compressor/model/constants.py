"""Constants that answer in the place of experts: the router stays as it is, and so do its ids and weights.

    config.json  "approximate_experts": {"0": [3, 7]}      decoder layer → experts that answer a constant
    tensors      EXPERTS.3.approx_value [hidden]           the constant; the other experts keep their own ids as names

This is vLLM's format (constant expert substitution, 0.33 and later). A choice of such an expert adds weight × constant,
and nothing is renormalised. Here the experts' module holds the weights of the others alone, one after another, and a
forward of ours: pairs of tokens and experts that meet a constant are taken out before it runs. Transformers alone
refuses such a checkpoint: it finds fewer experts than the config says.

Dimensions: T tokens, K experts chosen per token, E experts, R experts that answer constants, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import CheckpointError, UnsupportedModelError
from compressor.model.expert_outputs import CONSTANTS, evaluate_pairs, places_of_choices
from compressor.model.modules import forward_replaced, shared_tensors
from compressor.model.structure import MoELayer, Structure

KEY = "approximate_experts"
"""In the config that counts the experts."""
VALUE = "approx_value"
"""The last part of a constant's name."""
Constants = Mapping[int, Tensor]
"""Expert → what it answers [H]."""
Replacements = Mapping[int, Tensor | None]
"""The same; None where the router's bias sees to it that the expert is never chosen: then it is 0."""


def replaced_experts(config: Any) -> dict[str, list[int]]:
    """Decoder layer's number → ids of the experts that answer constants. Raises CheckpointError where damaged."""
    found = getattr(config.get_text_config(), KEY, None) or {}
    is_known = isinstance(found, Mapping) and all(
        isinstance(ids, list) and ids and all(type(one) is int for one in ids) for ids in found.values()
    )
    if not is_known:
        raise CheckpointError(f"config.json: `{KEY}` should be {{decoder layer: [expert ids]}}, found {found!r}.")
    return {str(number): sorted(ids) for number, ids in found.items()}


def write_replaced(config: Any, layers: Sequence[MoELayer]) -> None:
    """Say in the config which experts of these layers answer constants."""
    found = {layer.number: list(layer.constants) for layer in layers if layer.constants}
    setattr(config.get_text_config(), KEY, found)


def with_constants(structure: Structure, config: Any) -> Structure:
    """The structure where experts answer constants, as the config says. CheckpointError where that does not fit."""
    found = replaced_experts(config)
    known = {layer.number: layer for layer in structure.layers}
    for number, ids in found.items():
        layer = known.get(number)
        why = "there is no such MoE layer" if layer is None else None if layer.constants else problem(layer, ids)
        if why is not None:
            raise CheckpointError(f"config.json: `{KEY}` names {ids} in layer {number}: {why}.")
    return structure.with_constants({layer.path: found.get(layer.number or "", []) for layer in structure.layers})


def problem(layer: MoELayer, ids: Sequence[int] | None = None) -> str | None:
    """Why these experts of a layer, or any, cannot answer constants, in words; None where they can."""
    if layer.constants:
        return f"{len(layer.constants)} of its experts answer constants already, and no others can be added"
    if layer.number is None:
        return "it is in no list of decoder layers, so the config cannot name it"
    if layer.router_probe is not None and (
        layer.router_probe.call != "choices" or layer.is_list or layer.experts == layer.path
    ):
        return "its experts are not one module that is given tokens, ids and weights, so none can answer a constant"
    if layer.num_extra_choices:
        return "its router chooses things that are no experts"
    if ids is not None and (len(set(ids)) != len(ids) or not ids or min(ids) < 0 or max(ids) >= layer.num_experts):
        return f"different ids from 0 to {layer.num_experts - 1} were expected"
    if ids is not None and len(ids) == layer.num_experts:
        return "at least one expert has to stay"
    return None


def problem_of_all(structure: Structure, config: Any) -> str | None:
    """Why no layer's experts can answer constants that the config could speak of, in words; None where it can."""
    numbers = [layer.number for layer in structure.layers]
    if twice := next((number for number in numbers if numbers.count(number) > 1), None):
        return f"two MoE layers have the number {twice}, by which the config would tell experts that answer constants"
    if structure.num_experts_leaf.holder(config) is not config.get_text_config():
        return f"its experts are counted by {structure.num_experts_leaf}, which is not where readers of constants look"
    return None


def never_chosen_problem(layer: MoELayer, ids: Sequence[int]) -> str | None:
    """Why these experts of a layer cannot be switched off by its router's bias, in words; None where they can."""
    if layer.padding_problem is not None:
        return layer.padding_problem
    if layer.num_experts - len(ids) < layer.top_k:
        return f"each token chooses {layer.top_k}, and {layer.num_experts - len(ids)} would be left"
    return None


class Constant(nn.Module):
    """What an expert answers. Its name in the model is the one in vLLM's checkpoints."""

    def __init__(self, like: Tensor, size: int) -> None:
        super().__init__()
        self.approx_value = nn.Parameter(like.new_empty(size), like.requires_grad)


@dataclass(eq=False)
class ConstantExperts:
    """The forward of an experts' module some of whose experts answer constants, on the instance, as it is given the
    original ids. It is copied and pickled with the model.
    """

    experts: nn.Module
    path: str
    """The layer's, for messages."""
    kept: tuple[int, ...]
    """Ids of the experts whose weights the module has, in their order."""
    replaced: tuple[int, ...]
    inner: Callable[..., Tensor] | None
    """The forward that stood on the instance before (accelerate's, for one)."""
    _places: dict[torch.device, Tensor] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden, index, weights, call = _given(self.experts, self.path, self._run, args, kwargs)
        place_E = self._place_on(index.device)
        place = place_E[index]  # the row of an expert with weights; the constants follow, from -R up
        is_kept_TK = (place >= 0).reshape(-1, index.shape[-1])
        if bool(is_kept_TK.all()):
            return call(hidden, place, weights)
        output = torch.zeros_like(hidden)
        if bool(is_kept_TK.any()):
            output = evaluate_pairs(hidden, place, weights, is_kept_TK, call)
        values = [self.experts.get_parameter(f"{expert}.{VALUE}") for expert in self.replaced]
        return output + _answers(values, place + len(values), weights, output)

    def _run(self, *given: Tensor) -> Tensor:
        if self.inner is not None:
            return self.inner(*given)
        return type(self.experts).forward(self.experts, *given)  # type: ignore[no-any-return]

    def _place_on(self, device: torch.device) -> Tensor:
        if device not in self._places:
            place_E = torch.empty(len(self.kept) + len(self.replaced), dtype=torch.int64)
            place_E[list(self.kept)] = torch.arange(len(self.kept))
            place_E[list(self.replaced)] = torch.arange(-len(self.replaced), 0)
            self._places[device] = place_E.to(device)
        return self._places[device]


def _given(
    experts: nn.Module, path: str, forward: Callable[..., Tensor], args: Any, kwargs: Any
) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """(hidden, ids, weights) as experts are given them in their own order, and what calls `forward` like that."""
    given = (*args, *kwargs.values())
    places = places_of_choices(given)
    if places is None or getattr(experts, "_is_expert_parallel", False):
        raise UnsupportedModelError(
            f"{path}: its experts answer constants, and are not given tokens, ids and weights of all of them."
        )

    def call(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        values = dict(zip(places, (hidden, index, weights), strict=True))
        return forward(*(values[place] for place in range(3)))

    hidden, index, weights = (given[place] for place in places)
    return hidden, index, weights, call


def _answers(values: Sequence[Tensor], number_TK: Tensor, weights_TK: Tensor, like: Tensor) -> Tensor:
    """Σ weight × constant of each token, [T, H] shaped as `like`; numbers outside 0 to R - 1 answer nothing."""
    weights = weights_TK.reshape(-1, weights_TK.shape[-1]).float()
    number = number_TK.reshape(weights.shape)
    is_ours = (number >= 0) & (number < len(values))
    sums_TR = weights.new_zeros(len(weights), len(values))
    sums_TR.scatter_add_(1, number.clamp(0, len(values) - 1), weights.masked_fill(~is_ours, 0.0))
    values_RH = torch.stack([value.to(like.device) for value in values]).float()
    return (sums_TR @ values_RH).to(like.dtype).view(like.shape)


@torch.no_grad()
def replace_in_layer(model: nn.Module, layer: MoELayer, constants: Constants) -> MoELayer:
    """Take the weights of these experts out of a layer, which is returned, in place, and let them answer constants."""
    replaced = sorted(constants)
    experts = model.get_submodule(layer.experts)
    kept = [expert for expert in range(layer.num_experts) if expert not in constants]
    for name, axis in layer.experts_tensors.items():
        leaf = name.removeprefix(f"{layer.experts}.")
        module, _, leaf = leaf.rpartition(".")
        owner = experts.get_submodule(module)
        old = owner._parameters[leaf]
        assert old is not None
        new = old.index_select(axis.dim, axis.rows(kept, layer.num_experts).to(old.device))
        owner.register_parameter(leaf, nn.Parameter(new, old.requires_grad))
    for (path, attribute), (stride, extra) in layer.integers.items():
        if layer.in_experts(path):
            setattr(model.get_submodule(path), attribute, stride * len(kept) + extra)
    like = next(experts.parameters())
    for expert in replaced:
        constant = Constant(like, constants[expert].numel())
        if not like.is_meta:
            constant.approx_value.copy_(constants[expert])
        experts.register_module(str(expert), constant)
    ours = ConstantExperts(experts, layer.path, tuple(kept), tuple(replaced), experts.__dict__.get("forward"))
    experts.__dict__[CONSTANTS] = ours
    experts.__dict__["forward"] = ours
    return layer.with_constants(replaced)


@contextmanager
def previewed(model: nn.Module, layer: MoELayer, constants: Constants) -> Iterator[None]:
    """Within the context these experts answer constants; slow and plain: they are evaluated with weight 0."""
    experts = model.get_submodule(layer.experts)
    values, number_E = list(constants.values()), torch.full((layer.num_experts,), -1)
    number_E[list(constants)] = torch.arange(len(values))
    inner = experts.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        hidden, index, weights, call = _given(experts, layer.path, inner, args, kwargs)
        number = number_E.to(index.device)[index]
        output = call(hidden, index, weights.masked_fill(number >= 0, 0.0))
        return output + _answers(values, number, weights, output)

    experts.__dict__[CONSTANTS] = forward
    try:
        with forward_replaced(experts, forward):
            yield
    finally:
        del experts.__dict__[CONSTANTS]


def constant_experts(model: nn.Module) -> dict[str, ConstantExperts]:
    """Path of an experts' module → its forward, of the modules whose experts answer constants."""
    found = {path: module.__dict__.get(CONSTANTS) for path, module in model.named_modules()}
    return {path: one for path, one in found.items() if isinstance(one, ConstantExperts)}


def refuse_constants(model: nn.Module, structure: Structure, constants: Mapping[str, Constants]) -> None:
    """Raise ValueError or UnsupportedModelError where these experts cannot answer these constants, by layer path."""
    layers = {layer.path: layer for layer in structure.layers}
    for path, of_layer in constants.items():
        if path not in layers:
            raise KeyError(f"no MoE layer at {path!r}; the layers are {list(layers)}")
        layer, width = layers[path], structure.width_at(layers[path])
        if why := problem(layer, list(of_layer)):
            raise ValueError(f"{path}: constants cannot be put in the place of experts {list(of_layer)}: {why}")
        for expert, value in of_layer.items():
            if value.shape != (width,):
                raise ValueError(f"{path}: expert {expert} should answer [{width}], found {list(value.shape)}")
    if constants and (why := problem_of_all(structure, model.config)):
        raise UnsupportedModelError(f"{type(model).__name__}: {why}.")
    for path, other, name in shared_tensors(model, {layer.path: layer.experts_tensors for layer in structure.layers}):
        if {path, other} & constants.keys():
            raise UnsupportedModelError(f"{path} and {other} share their experts ({name}).")
