"""Models that no class of transformers builds: other numbers of experts in other layers, constants in experts' places.

The standard key of the config keeps the count that the class is built with; `config.compressor` says which layer has
how many, `approximate_experts` (see `constants`) whose experts answer constants. A model is loaded by building its
class, on the meta device, and taking experts out of the layers before any weight is read: transformers' own loader does
the rest. Without this library such a checkpoint is refused, since its tensors do not have the shapes that the config
speaks of.

Where counts differ, two more things do: modules that look at the config while they run are given a config of their own,
and the load-balancing loss, which needs router logits of one width, is refused.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from compressor.errors import CheckpointError, UnsupportedModelError
from compressor.model.config_entry import KEY, read_entry, write_entry
from compressor.model.constants import replace_in_layer, replaced_experts, with_constants
from compressor.model.structure import MoELayer, Structure


def uneven_counts(config: Any) -> dict[str, int]:
    """Layer path → experts, where the config says more than one number for all. Raises CheckpointError."""
    counts = read_entry(config).get("num_experts", {})
    if not all(type(count) is int and count > 0 for count in counts.values()):
        raise CheckpointError(
            f'config.json: `{KEY}` should be {{"format": 1, "num_experts": {{layer path: count}}}}, found {counts!r}.'
        )
    return dict(counts)


def write_counts(model: Any, structure: Structure) -> None:
    """Put the layers' counts where the model and its config keep them."""
    counts = {layer.path: layer.num_experts for layer in structure.layers}
    leaf, config = structure.num_experts_leaf, model.config
    if len(set(counts.values())) == 1:
        leaf.set(config, next(iter(counts.values())))
        write_entry(config, "num_experts", None)
    else:
        write_entry(config, "num_experts", counts)
        _prepare_uneven(model, structure)
    for (path, attribute), (stride, extra) in structure.integers.items():
        below = [count for layer, count in counts.items() if not path or layer.startswith(path + ".")]
        setattr(model.get_submodule(path), attribute, stride * max(below or counts.values()) + extra)


def _prepare_uneven(model: Any, structure: Structure) -> None:
    leaf = structure.num_experts_leaf
    shared = leaf.holder(model.config)
    for layer in structure.layers:
        if layer.router_probe.reads_config:
            for module in model.get_submodule(layer.router).modules():
                own = module.__dict__.get("config")
                if own is not None and leaf.key in own.__dict__:
                    module.config = copy.copy(shared)
                    setattr(module.config, leaf.key, layer.num_experts)
    if getattr(shared, "output_router_logits", False):
        shared.output_router_logits = False
    if not getattr(model, "_compressor_uneven", False):
        model.register_forward_pre_hook(_refuse_router_logits, with_kwargs=True)
        model._compressor_uneven = True


def _refuse_router_logits(model: nn.Module, args: Any, kwargs: Any) -> None:
    if kwargs.get("output_router_logits") and uneven_counts(model.config):
        raise UnsupportedModelError(
            "output_router_logits=True: the load-balancing loss needs one number of experts; here layers differ."
        )


def slice_layer(model: nn.Module, layer: MoELayer, kept: Sequence[int], made: WeakTensorKeyDictionary) -> MoELayer:
    """Take all experts but `kept` out of a layer, which is returned; `made`: old tensor → new, where shared."""
    in_lists = tuple(path + "." for path in layer.containers)
    for name, axis in layer.tensors.items():
        if in_lists and name.startswith(in_lists):
            continue
        module_path, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_path)
        old = getattr(module, leaf)
        if old.shape[axis.dim] == axis.size(len(kept)) != axis.size(layer.num_experts):
            continue  # shared with a layer that was sliced before
        if old not in made:
            new = old.index_select(axis.dim, axis.rows(kept, layer.num_experts).to(old.device))
            made[old] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        new = made[old]
        if isinstance(old, nn.Parameter):
            module.register_parameter(leaf, new)
        else:
            module._buffers[leaf] = new
    containers = {}
    for path, names in layer.containers.items():
        container = model.get_submodule(path)
        modules = [container._modules[names[expert]] for expert in kept]
        for name in names:
            del container._modules[name]
        containers[path] = names[: len(kept)]
        container._modules.update(zip(containers[path], modules, strict=True))
    for (path, attribute), (stride, extra) in layer.integers.items():
        setattr(model.get_submodule(path), attribute, stride * len(kept) + extra)
    return dataclasses.replace(layer, num_experts=len(kept), containers=containers)


def is_uneven(config: Any) -> bool:
    """Whether the config speaks of layers that the model's class does not build. Raises CheckpointError."""
    return bool(uneven_counts(config) or replaced_experts(config))


def as_stored(structure: Structure, config: Any) -> Structure:
    """The structure of the model that the config speaks of, from the plain class's. Raises CheckpointError."""
    return with_constants(structure.with_counts(uneven_counts(config)), config)


def uneven_class(model_class: type[Any], config: Any, structure: Structure) -> type[Any]:
    """A class that builds what the config says beyond its class, for `from_pretrained`, then `settle`; `structure` is
    the plain class's. Raises CheckpointError where the class cannot have such layers or counts.
    """
    counts = uneven_counts(config)
    known = {layer.path: layer for layer in structure.layers}
    for path, count in counts.items():
        if path not in known or count > known[path].num_experts:
            raise CheckpointError(
                f"config.json: `{KEY}` gives {path} {count} experts; {model_class.__name__} has "
                f"{known[path].num_experts if path in known else 'no such layer'}."
            )

    after = as_stored(structure, config)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        model_class.__init__(self, *args, **kwargs)
        made = WeakTensorKeyDictionary()
        layers = [
            slice_layer(self, layer, range(counts.get(layer.path, layer.num_experts)), made) for layer in known.values()
        ]
        for layer in layers:
            if layer.is_list:  # some classes initialise experts by the config's count: nothing here needs it
                for module in self.get_submodule(layer.path).modules():
                    module._is_hf_initialized = True
        write_counts(self, dataclasses.replace(structure, layers=tuple(layers)))
        for layer, wanted in zip(layers, after.layers, strict=True):
            if wanted.constants:
                empty = torch.empty(structure.width_at(layer), device="meta")
                replace_in_layer(self, layer, dict.fromkeys(wanted.constants, empty))

    return type(
        model_class.__name__,
        (model_class,),
        {"__init__": __init__, "__module__": model_class.__module__, "__qualname__": model_class.__qualname__},
    )


def settle(model: Any) -> None:
    """Give a model that `uneven_class` built the class that it is of."""
    model.__class__ = type(model).__mro__[1]
