"""Two devices without having one: `sim:0` and `sim:1` keep their data in the CPU's memory and refuse to be mixed.

What a GPU forbids is forbidden here: an operation on tensors of two devices, and a view as a NumPy array. What it
allows is allowed: numbers (0-dimensional CPU tensors) beside tensors, CPU tensors as indices, copies from device to
device. Figures come from the CPU's kernels, so nothing is said about a GPU's speed, memory or rounding.

torch has room for one device type that is written in Python, and it is given to the whole process. Outside the context
of `simulated_devices()` nothing of it is to be seen: torch names no accelerator, and no operation is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "sim"
DEVICES = (f"{NAME}:0", f"{NAME}:1")

_COPIES = {"aten::copy_", "aten::_to_copy"}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


@contextmanager
def simulated_devices() -> Iterator[None]:
    """Within the context tensors and models can be moved to `DEVICES`."""
    module = _registered()
    module.active = True
    try:
        with _EveryOperation():
            yield
    finally:
        module.active = False


class OnDevice(Tensor):
    """A tensor that says it is on a simulated device; `held` is the CPU tensor that it stands for."""

    held: Tensor
    _lent: torch.device | None = None
    """Where its memory is meanwhile: see `data`."""

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device | str) -> OnDevice:
        device = torch.device(device)
        return Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            held.stride(),
            held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, device.index or 0),
            requires_grad=held.requires_grad,
        )

    def __init__(self, held: Tensor, device: torch.device | str) -> None:
        self.held = held.detach()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _carried_out(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            new: Tensor = OnDevice(self.held.clone(), self.device)
            memo[id(self)] = torch.nn.Parameter(new, self.requires_grad) if hasattr(self, "_is_param") else new
        return memo[id(self)]  # type: ignore[no-any-return]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.held}, device={self.device})"

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._lent or super().device

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, other: Tensor) -> None:
        """Other memory for the same object, also on another device, as torch allows between the CPU and a GPU."""
        assert other.shape == self.shape
        self.held = _held(other)
        self._lent = None if other.device == super().device else other.device

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __format__(self, how: str) -> str:
        return format(self.held, how)

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        """Tells `nn.Module.to` to exchange parameters in place: those that are tied stay so, as on a GPU."""
        return ["held"], self.device

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], device: Any, size: Any, stride: Any) -> OnDevice:
        return OnDevice(inner["held"], device)


class _EveryOperation(TorchDispatchMode):
    """Sees what makes tensors on a device out of none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _carried_out(func, args, kwargs or {})


def _carried_out(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU's memory, or refuse it as a GPU would; what comes out is on the right device."""
    given: list[Tensor] = []

    def taken(one: Tensor) -> Tensor:
        given.append(one)
        return _held(one)

    name, held = func._schema.name, [_mapped(taken, one) for one in args]
    others = {key: _mapped(taken, one) for key, one in kwargs.items()}
    on_device = [one for one in given if isinstance(one, OnDevice)]
    if on_device and name not in _COPIES:
        _refuse_mixed(name, args, given)
    target = others.get("device") or (on_device[0].device if on_device else torch.device("cpu"))
    is_here = torch.device(target).type == NAME
    if is_here and "device" in others:
        others["device"] = torch.device("cpu")
    if is_here and name == "aten::histc":  # of integers, too, on a GPU
        held[0] = held[0].float()

    same = {id(_held(one)): one for one in given}

    def put(one: Tensor) -> Tensor:
        if id(one) in same:  # written in place
            return same[id(one)]
        return OnDevice(one, target) if is_here else one

    return _mapped(put, func(*held, **others))


def _refuse_mixed(name: str, args: Any, given: list[Tensor]) -> None:
    """A CPU tensor may stand beside tensors of a device if it is a number, or an index into one of them."""
    indices = args[1] if name in _INDEXING and isinstance(args[0], OnDevice) else ()
    allowed = {id(one) for one in given if not one.dim()} | {id(one) for one in indices}
    devices = {one.device for one in given if isinstance(one, OnDevice) or id(one) not in allowed}
    if len(devices) > 1:
        found = ", ".join(f"{tuple(one.shape)} on {one.device}" for one in given)
        raise RuntimeError(f"Expected all tensors to be on the same device: {name} was given {found}")


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The value with every tensor in it changed: what operations take and return holds them in lists and tuples."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)([_mapped(change, one) for one in value]) if isinstance(value, (list, tuple)) else value


def _held(one: Any) -> Any:
    return one.held if isinstance(one, OnDevice) else one


class _Module:
    """What torch asks of a device type; it is there only while it is in use."""

    active = False

    def __init__(self) -> None:
        self.kernels = torch.library.Library("aten", "IMPL")

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return self.active

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return len(DEVICES) if self.active else 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def manual_seed_all(self, seed: int) -> None:
        """Nothing random is made there."""


@cache
def _registered() -> _Module:
    """Tell torch of the device type, once in the process."""
    module = _Module()
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=module)
    module.kernels.impl("empty.memory_format", _empty, "PrivateUse1")
    module.kernels.impl("empty_strided", _empty_strided, "PrivateUse1")
    module.kernels.impl("_copy_from", _copy_from, "PrivateUse1")
    return module


# What torch itself does where it hides its work from modes, as in `torch.tensor(…, device=…)`, and in other threads.


def _empty(size: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return OnDevice(torch.empty(size, dtype=dtype, device="cpu"), device)


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    return OnDevice(torch.empty_strided(size, stride, dtype=dtype, device="cpu"), device)


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _held(target).copy_(_held(source))
    return target
