"""A live transformers model, seen as a stack of MoE layers whose experts can be masked, watched and removed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from compressor.errors import UnsupportedModelError
from compressor.moe.routing import masked_router
from compressor.moe.structure import MoELayer, Structure, find_structure
from compressor.moe.tap import RealTokens, Visitor, tapped

Kept = Mapping[str, Sequence[int]]
"""Layer path → ids of the experts that stay, ascending."""


class MoEModel:
    """A transformers model with its MoE layers found.

    Nothing is changed until `keep` is called. Raises UnsupportedModelError where the structure cannot be understood:
    a dense model, a quantised one, or one that hangs on its experts in a way that cannot be sliced.
    """

    def __init__(self, model: nn.Module, structure: Structure | None = None) -> None:
        self.model = model
        self.config: Any = model.config
        refuse_quantised(self.config)
        self.structure = structure or find_structure(type(model), self.config)
        self._check_shapes()

    def _check_shapes(self) -> None:
        live = dict(_tensors(self.model))
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
    def masked(self, kept: Kept) -> Iterator[None]:
        """Within the context, only `kept` experts can be chosen in the layers named; the others' logits are −inf."""
        kept = {path: check_kept(self.layer(path), ids) for path, ids in kept.items()}
        with ExitStack() as stack:
            for path, ids in kept.items():
                stack.enter_context(masked_router(self.model, self.layer(path), ids))
            yield

    @contextmanager
    def watched(self, visitors: Mapping[str, Visitor], real: RealTokens) -> Iterator[None]:
        """Within the context, a layer's visitor is given its RoutedTokens whenever the model runs."""
        with tapped(self.model, {path: self.layer(path) for path in visitors}, visitors, real):
            yield

    @torch.no_grad()
    def keep(self, kept: Kept) -> None:
        """Remove all experts but `kept`, in place: weights, router rows, biases, integers, and the count in the config.

        Every layer must be named, all with the same number of experts: a config holds one count. Raises ValueError or
        UnsupportedModelError before anything is changed.
        """
        missing = [layer.path for layer in self.layers if layer.path not in kept]
        if missing:
            raise ValueError(f"keep() must name every MoE layer; {missing[0]} is missing")
        checked = {path: check_kept(self.layer(path), ids) for path, ids in kept.items()}
        counts = {path: len(ids) for path, ids in checked.items()}
        if len(set(counts.values())) > 1:
            raise UnsupportedModelError(
                f"a checkpoint holds one expert count for all layers, found {sorted(set(counts.values()))}; "
                f"keep the same number everywhere."
            )
        layers = tuple(self._keep_in_layer(layer, checked[layer.path]) for layer in self.layers)
        self.structure.num_experts_leaf.set(self.config, next(iter(counts.values())))
        self.structure = dataclasses.replace(
            self.structure, layers=layers, shapes={n: tuple(t.shape) for n, t in _tensors(self.model)},
            num_parameters=sum(p.numel() for p in self.model.parameters()),
        )  # fmt: skip

    def _keep_in_layer(self, layer: MoELayer, kept: list[int]) -> MoELayer:
        in_lists = tuple(path + "." for path in layer.containers)
        for name, axis in layer.tensors.items():
            if name.startswith(in_lists):
                continue
            module_path, _, leaf = name.rpartition(".")
            module = self.model.get_submodule(module_path)
            old = getattr(module, leaf)
            new = old.index_select(axis.dim, axis.rows(kept, layer.num_experts).to(old.device))
            if isinstance(old, nn.Parameter):
                module._parameters[leaf] = nn.Parameter(new, requires_grad=old.requires_grad)
            else:
                module._buffers[leaf] = new
        containers = {}
        for path, names in layer.containers.items():
            container = self.model.get_submodule(path)
            modules = [container._modules[names[expert]] for expert in kept]
            for name in names:
                del container._modules[name]
            containers[path] = names[: len(kept)]
            container._modules.update(zip(containers[path], modules, strict=True))
        for (path, attribute), (stride, extra) in layer.integers.items():
            setattr(self.model.get_submodule(path), attribute, stride * len(kept) + extra)
        return dataclasses.replace(layer, num_experts=len(kept), containers=containers)


def check_kept(layer: MoELayer, kept: Sequence[int]) -> list[int]:
    """The ids as an ascending list. Raises ValueError where this layer cannot keep exactly these experts."""
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
            f"{layer.path}: its router chooses among {layer.num_groups} groups of experts, so every group must keep "
            f"equally many; got {sorted(per_group)}"
        )
    return ids


def count_problem(layer: MoELayer, num_kept: int) -> str | None:
    """Why a layer cannot keep so many experts, in words with the nearest possible count; None where it can."""
    if num_kept > layer.num_experts:
        return f"it has {layer.num_experts} experts and cannot keep {num_kept}"
    if num_kept == layer.num_experts:
        return None
    possible = [count for count in range(2, layer.num_experts + 1) if _count_works(layer, count)]
    if num_kept in possible:
        return None
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
            f"{config.model_type}: the checkpoint is quantised ({getattr(kind, 'value', kind)}). "
            f"Prune the unquantised checkpoint, then quantise the result."
        )


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
