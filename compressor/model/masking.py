"""Watching a router, masking experts inside it, and removing them from the tables that name them.

Dimensions: T tokens, E experts of the layer, K experts chosen per token, H hidden size, N rows of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.errors import UnsupportedModelError
from compressor.model.modules import tensor_at
from compressor.model.router_logits import RouterLogits
from compressor.model.structure import MoELayer, Structure


def dropped_experts(layer: MoELayer, kept: Sequence[int], device: torch.device) -> Tensor:
    """The ids that are not kept, ascending, int64."""
    return torch.tensor(sorted(set(range(layer.num_experts)) - set(kept)), dtype=torch.int64, device=device)


def router_weights(model: nn.Module, layer: MoELayer) -> list[Tensor]:
    """What the layer's logits are computed with; RouterLogits knows the router's linear map by them."""
    return [tensor_at(model, name) for name in layer.router_weights]


def selection_biases(model: nn.Module, layer: MoELayer) -> list[tuple[str, Tensor]]:
    """Tensors with one number an expert outside the experts: correction biases, biases of linear routers."""
    return [(name, tensor_at(model, name)) for name in layer.selection_biases]


@contextmanager
def experts_hidden(model: nn.Module, layer: MoELayer, dropped: Tensor) -> Iterator[None]:
    """Hide experts from all but the logits, and put it back: selection biases −inf, tables redirected."""
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        for name, tensor in selection_biases(model, layer):
            saved.append((tensor, tensor.detach().clone()))
            with torch.no_grad():
                tensor.index_fill_(layer.tensors[name].dim, dropped, float("-inf"))
        for name in layer.id_tensors:
            tensor = tensor_at(model, name)
            saved.append((tensor, tensor.detach().clone()))
            tensor.copy_(redirected(tensor, dropped, router_weights(model, layer)[0][: layer.num_experts]))
        yield
    finally:
        with torch.no_grad():
            for tensor, value in saved:
                tensor.copy_(value)


@torch.no_grad()
def redirected(ids: Tensor, dropped: Tensor, router_EH: Tensor) -> Tensor:
    """A table of expert ids [N, K] with every dropped expert replaced by the kept one whose router row is most alike
    (cosine) and that the row does not name already. No source prescribes this; other ways were no better where it was
    measured (benchmarks/hash_layers.py).
    """
    if not len(dropped):
        return ids
    rows_EH = functional.normalize(router_EH.float(), dim=-1)
    alike_EE = (rows_EH @ rows_EH.T).index_fill(1, dropped, float("-inf"))
    is_dropped_E = torch.zeros(len(rows_EH), dtype=torch.bool, device=ids.device).index_fill(0, dropped, True)
    new = ids.clone()
    for column in range(ids.shape[-1]):
        where = is_dropped_E[new[:, column].long()].nonzero()[:, 0]
        for part in where.split(2**22 // len(rows_EH) + 1):  # type: ignore[no-untyped-call]
            alike = alike_EE[new[part, column].long()].scatter(1, new[part].long(), float("-inf"))
            new[part, column] = alike.argmax(-1).to(new.dtype)
    return new


def relabelled(ids: Tensor, layer: MoELayer, kept: Sequence[int], router_EH: Tensor) -> Tensor:
    """A table of ids [N, K] for `kept` alone: redirected by `router_EH` (all experts' rows), ids counted anew."""
    dropped = dropped_experts(layer, kept, ids.device)
    new_id = torch.zeros(layer.num_experts, dtype=ids.dtype, device=ids.device)
    new_id[torch.tensor(kept, device=ids.device)] = torch.arange(len(kept), dtype=ids.dtype, device=ids.device)
    return new_id[redirected(ids, dropped, router_EH).long()]


@contextmanager
def logits_watched(
    router: nn.Module,
    path: str,
    begin: Callable[[Any, Any], RouterLogits | None],
    end: Callable[[Tensor, Any], None] = lambda logits, output: None,
) -> Iterator[None]:
    """Within the context each forward of a router runs in the mode that `begin` makes of its arguments, if any; `end`
    gets logits and output. Raises UnsupportedModelError, naming its `path`, where the forward computes no logits.
    """
    active: list[RouterLogits | None] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        active.append(mode := begin(args, kwargs))
        if mode is not None:
            mode.__enter__()  # type: ignore[no-untyped-call]

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        mode = active.pop() if active else None
        if mode is None:
            return
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if output is None:  # the forward has failed, and says why itself
            return
        if mode.seen is None:
            raise UnsupportedModelError(
                f"{path}: saw no linear map with its weights inside its forward, so logits are unknown."
            )
        end(mode.seen, output)

    first = router.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with first, router.register_forward_hook(leave, always_call=True):
            yield
    finally:
        for mode in filter(None, reversed(active)):
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]


@contextmanager
def masked_router(model: nn.Module, layer: MoELayer, kept: Sequence[int]) -> Iterator[None]:
    """Within the context the router can choose `kept` only: dropped logits and biases are −inf, and its own softmax,
    top-k and renormalisation do the rest, which is what removing means.
    """
    router, weights = model.get_submodule(layer.router), router_weights(model, layer)
    dropped = dropped_experts(layer, kept, weights[0].device)
    if not len(dropped):
        yield
        return
    watched = logits_watched(router, layer.router, lambda args, kwargs: RouterLogits(weights, dropped=dropped))
    with watched, experts_hidden(model, layer, dropped):
        yield


@contextmanager
def top_k_set(model: Any, structure: Structure, top_k: int | None) -> Iterator[None]:
    """Within the context every router chooses `top_k` experts; None leaves them as they are."""
    leaf = structure.top_k_leaf
    if top_k is None or leaf is None:
        yield
        return
    saved = leaf.get(model.config)
    write_top_k(model, structure, top_k)
    try:
        yield
    finally:
        write_top_k(model, structure, saved)


def write_top_k(model: Any, structure: Structure, top_k: int) -> None:
    """Set experts per token in the config and in modules that keep the same number (see `normalise_over`)."""
    assert structure.top_k_leaf is not None
    before = structure.top_k_leaf.get(model.config)
    structure.top_k_leaf.set(model.config, top_k)
    for (path, attribute), (stride, extra) in structure.top_k_integers.items():
        module = model.get_submodule(path)
        if getattr(module, attribute) == stride * before + extra:
            setattr(module, attribute, stride * top_k + extra)
