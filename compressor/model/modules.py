"""Modules and tensors of any torch model: by name, by decoder layer, and in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def tensor_at(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by its full name."""
    path, _, leaf = name.rpartition(".")
    tensor = getattr(model.get_submodule(path), leaf)
    assert isinstance(tensor, Tensor)
    return tensor


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by all of their names: what stands in two places has two."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(model.named_buffers(remove_duplicate=False))}


def shared_tensors(model: nn.Module, names: Mapping[str, Iterable[str]]) -> Iterator[tuple[str, str, str]]:
    """(a path, the first with the same tensor, the tensor's name), of tensors by path that stand in several places."""
    owners: dict[int, str] = {}
    for path, own in names.items():
        for name in own:
            if (other := owners.setdefault(id(tensor_at(model, name)), path)) != path:
                yield path, other, name


def is_inside(path: str, *outer: str) -> bool:
    """Whether a module or tensor is one of these modules, or in one; everything is in the one without a path."""
    return any(not one or f"{path}.".startswith(f"{one}.") for one in outer)


def units_of(model: nn.Module) -> tuple[str, ...]:
    """Paths of the elements of the model's outermost module lists, in the order in which the model has them."""
    found: list[str] = []

    def look(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            inside = f"{path}.{name}" if path else name
            if isinstance(child, nn.ModuleList):
                found.extend(f"{inside}.{number}" for number in child._modules)
            else:
                look(child, inside)

    look(model, "")
    return tuple(found)


def kind_of(module: nn.Module) -> object:
    """What modules share that compute alike: classes, shapes, and settings but the layer's number."""
    return (
        tuple((name, type(child)) for name, child in module.named_modules()),
        tuple((name, tuple(tensor.shape)) for name, tensor in named_tensors(module).items()),
        tuple(
            (name, key, value)
            for name, child in module.named_modules()
            for key, value in child.__dict__.items()
            if isinstance(value, int | float | str) and not (type(value) is int and "layer" in key)
        ),
    )


def tower_units(model: nn.Module) -> tuple[str, ...]:
    """Those of `units_of` that images alone come to, before any text does."""
    return tuple(unit for unit in units_of(model) if not _TOWERS.isdisjoint(unit.split(".")))


_TOWERS = frozenset(["vision_tower", "visual", "vision_model", "vision_encoder", "image_tower"])
"""What transformers calls it; see `PreTrainedModel.get_encoder`."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; after it, each module's own training flag as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context the module answers by another forward."""
    had_its_own = module.__dict__.get("forward")  # accelerate, for one, wraps forward on the instance
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if had_its_own is not None:
            module.forward = had_its_own
