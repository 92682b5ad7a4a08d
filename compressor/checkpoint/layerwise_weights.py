"""A checkpoint's weights, of which one decoder layer at a time is in memory.

    skeleton    the model on the meta device, as transformers' own loader leaves it there, its computed buffers real
    unit        an element of one of the model's outermost module lists: a decoder layer, an encoder layer, a vision
                block; or of what is in no list (embeddings, final norm, head) all that a module holds

A unit's tensors are read from the safetensors files into fresh memory (not mapped: what is read is what is held), go
through transformers' own conversion of names and shapes, and are given back to the system when the unit is left. What
comes next the system is told to read into its own cache meanwhile: that takes no memory of ours.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.checkpoint.conversion import Conversion, in_loading_order, make_buffers
from compressor.checkpoint.find import Checkpoint, quantiser_of
from compressor.checkpoint.headers import Shard, refuse_not_finite, torch_dtype
from compressor.errors import DiskError, UnsupportedModelError
from compressor.machine.memory_estimate import shares
from compressor.model.modules import is_inside, named_tensors, tensor_at, units_of

_READ_AT_ONCE = 2**24
_LARGE = 2**18
_ADVISED_AT_ONCE = 2**21


def sizes_of(model: nn.Module) -> tuple[int, dict[str, int]]:
    """(bytes of the weights in no unit, bytes by unit); the model may be on the meta device."""
    by_unit, outside = dict.fromkeys(units_of(model), 0), 0
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        unit = next((unit for unit in by_unit if name.startswith(unit + ".")), None)
        size = tensor.numel() * tensor.element_size()
        if unit is None:
            outside += size
        else:
            by_unit[unit] += size
    return outside, by_unit


def spread(model: nn.Module, num_gpus: int) -> dict[str, int]:
    """Which GPU, by its number, each part of a model goes to, as a `device_map`: decoder layers whole, in order, evenly
    (`memory_estimate.shares`), all else on the first. Numbers, not names: accelerate picks the text's device from a
    set. Raises UnsupportedModelError where layers on different GPUs share weights.
    """
    outside, by_unit = sizes_of(model)
    found = dict(zip(by_unit, shares(outside, list(by_unit.values()), num_gpus)[0], strict=True))
    owners: dict[int, str] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        other = owners.setdefault(id(tensor), name)
        places = {next((found[u] for u in by_unit if is_inside(one, u)), 0) for one in (name, other)}
        if len(places) > 1:
            raise UnsupportedModelError(
                f"{type(model).__name__}: {other} and {name} are one weight, and would lie on two GPUs. Give one GPU "
                f"(`device: cuda`), or read it from disk (`weights: disk`)."
            )

    def rest(module: nn.Module, prefix: str) -> None:
        for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            found[prefix + name] = 0
        for name, child in module.named_children():
            path = prefix + name
            if not any(is_inside(unit, path) for unit in by_unit):
                found[path] = 0
            elif path not in by_unit:
                rest(child, f"{path}.")

    rest(model, "")
    return found


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, which is read when it is indexed, as transformers' loader does."""

    path: Path
    start: int
    num_bytes: int
    dtype: str
    shape: tuple[int, ...]

    def get_dtype(self) -> str:
        """Its dtype as safetensors writes it."""
        return self.dtype

    def __getitem__(self, _: object) -> Tensor:
        """The whole tensor, in memory of its own. Raises DiskError where the file ends early."""
        dtype, held = torch_dtype(self.dtype), _memory(self.num_bytes)
        view = memoryview(held.numpy().data)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            done = 0
            while done < self.num_bytes:
                count = file.readinto(view[done : done + _READ_AT_ONCE])
                if not count:
                    raise DiskError(f"{self.path}: it ends within a tensor: it was changed while it was read.")
                done += count
        return held.view(dtype).reshape(self.shape)


class StreamedWeights:
    """The weights of a skeleton (`load_model(…, device="meta")`), which come to `device` and go, dequantised when read;
    elsewhere its tensors are meta. Raises UnsupportedModelError for a format that cannot be read so.
    """

    def __init__(self, model: Any, found: Checkpoint, *, device: str = "cpu") -> None:
        self.model, self.device = model, device
        self.units = units_of(model)
        self._held: dict[str, dict[str, Tensor]] = {}
        """What is loaded, by unit or module: tensor name → what stands on the meta device for it."""
        self._checked: set[str] = set()
        self._contexts: Mapping[str, Callable[[], AbstractContextManager[object]]] = {}
        self._entered: dict[str, ExitStack] = {}
        stored = stored_tensors(found.shards)
        self._conversion = Conversion(model, quantiser_of(found))
        self._sources: dict[str, dict[str, StoredTensor]] = {}
        """Name of the tensor in the model (of several made of one, the first) → what it is made of."""
        for key, tensor in stored.items():
            target, _ = self._conversion.rename(key)
            if target in self._conversion.tensors:
                self._sources.setdefault(target, {})[key] = tensor
        computed = {name for name, _ in model.named_non_persistent_buffers()}
        self._names = {name: tensor for name, tensor in named_tensors(model).items() if name not in computed}
        self._aliases: dict[int, list[str]] = {}
        """All names of each tensor of the skeleton, by its id; the skeleton's tensors live as long as `_names`."""
        for name, on_meta in self._names.items():
            self._aliases.setdefault(id(on_meta), []).append(name)
        self._stop_ahead = threading.Event()
        make_buffers(model)
        if device != "cpu":
            for name, buffer in model.named_buffers():
                if not buffer.is_meta:
                    _set(model, name, buffer.to(device))

    def load(self, unit: str) -> None:
        """Bring a unit's weights to the device. Raises CheckpointError for a damaged file, NaN or infinity."""
        self._load(unit, self._names_in(unit))
        if unit not in self._entered:
            stack = self._entered[unit] = ExitStack()
            for path, context in self._contexts.items():
                if is_inside(path, unit):
                    stack.enter_context(context())

    @contextmanager
    def within(self, contexts: Mapping[str, Callable[[], AbstractContextManager[object]]]) -> Iterator[None]:
        """Within the context each layer (by path) is in one of its own while its weights are there, as for masks."""
        before, self._contexts = self._contexts, contexts
        try:
            yield
        finally:
            self._contexts = before

    def free(self, unit: str) -> None:
        """Let go of a unit's weights; nothing is written, they are what the files hold."""
        if unit in self._entered:
            self._entered.pop(unit).close()
        for name, on_meta in self._held.pop(unit, {}).items():
            _set(self.model, name, on_meta)
        _give_back_memory()

    def prefetch(self, unit: str) -> None:
        """Have the system read a unit's files into its cache meanwhile, where it can."""
        self._stop_ahead.set()
        self._stop_ahead = stop = threading.Event()
        ranges = list(_ranges(self._stored_in(self._names_in(unit))))

        def ahead() -> None:
            for path, start, length in ranges:
                for at in range(start, start + length, _ADVISED_AT_ONCE):  # the system takes advice on small pieces
                    if stop.is_set():
                        return
                    _expect(path, at, min(_ADVISED_AT_ONCE, start + length - at))

        threading.Thread(target=ahead, name="prefetch", daemon=True).start()

    @contextmanager
    def around(self, module: nn.Module) -> Iterator[None]:
        """Within the context, all of a module's weights that are in no unit are there."""
        inside = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        in_unit = tuple(unit + "." for unit in self.units)
        names = [n for n, tensor in self._names.items() if id(tensor) in inside and not n.startswith(in_unit)]
        key = f"around {type(module).__name__}"
        try:
            self._load(key, names)
            yield
        finally:
            self.free(key)
            for unit in [*self._held, *self._entered]:
                self.free(unit)

    def unit_of(self, path: str) -> str:
        """The unit that a module is in. Raises UnsupportedModelError where it is in none."""
        for unit in self.units:
            if is_inside(path, unit):
                return unit
        raise UnsupportedModelError(f"{path} is in no list of layers that could be read one by one.")

    def stored_in(self, unit: str) -> dict[str, StoredTensor]:
        """All tensors of a unit by their names on disk."""
        return self._stored_in(self._names_in(unit))

    def as_stored(self, unit: str) -> dict[str, Tensor]:
        """A loaded unit's tensors as files have them, by transformers' way back: name on disk → tensor."""
        return self._conversion.as_stored({name: tensor_at(self.model, name) for name in self._names_in(unit)})

    def replace(self, stored: Mapping[str, StoredTensor]) -> None:
        """Read these instead of those of the same names from now on."""
        for made_of in self._sources.values():
            made_of.update({key: stored[key] for key in made_of if key in stored})

    def _names_in(self, unit: str) -> list[str]:
        return [name for name in self._names if name.startswith(unit + ".")]

    def _stored_in(self, names: Iterable[str]) -> dict[str, StoredTensor]:
        wanted = {other for name in names for other in self._same(name)}
        return {key: one for name in wanted for key, one in self._sources.get(name, {}).items()}

    def _same(self, name: str) -> list[str]:
        return self._aliases[id(self._names[name])]

    def _load(self, key: str, names: Sequence[str]) -> None:
        if key in self._held:
            return
        wanted = list(dict.fromkeys(other for name in names for other in self._same(name)))
        held = {name: tensor_at(self.model, name) for name in wanted if tensor_at(self.model, name).is_meta}
        if not held:
            return
        self._held[key] = held
        self._conversion.load(self._stored_in(held), self.device)
        for name in held:
            same = [tensor for other in self._same(name) if not (tensor := tensor_at(self.model, other)).is_meta]
            if not same:
                raise UnsupportedModelError(
                    f"{type(self.model).__name__}: {name} cannot be loaded with {key} alone, so its weights cannot be "
                    f"read layer by layer. Run it in memory."
                )
            _set(self.model, name, same[0])
        if key not in self._checked:
            loaded = ((name, tensor_at(self.model, name)) for name in held)
            refuse_not_finite(loaded, str(self.model.config._name_or_path))
            self._checked.add(key)


def stored_tensors(shards: Sequence[Shard]) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint, by name, in the order of transformers' loader."""
    found = {
        name: StoredTensor(shard.path, shard.offsets[name], shard.sizes[name], dtype, shape)
        for shard in shards
        for name, (dtype, shape) in shard.tensors.items()
    }
    return {name: found[name] for name in in_loading_order(found)}


def _memory(num_bytes: int) -> Tensor:
    """Memory of our own, [num_bytes] uint8: large pieces straight from the system, which has them back at once."""
    if num_bytes < _LARGE:
        return torch.empty(num_bytes, dtype=torch.uint8)
    flags = (
        {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE} if hasattr(mmap, "MAP_POPULATE") else {}
    )
    return torch.frombuffer(mmap.mmap(-1, num_bytes, **flags), dtype=torch.uint8)


def _set(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = tensor  # type: ignore[assignment]


def _expect(path: Path, start: int, length: int) -> None:
    """Tell the system, where it listens, that these bytes will be read."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_WILLNEED)


def _ranges(stored: dict[str, StoredTensor]) -> Iterator[tuple[Path, int, int]]:
    """(file, first byte, bytes) of what lies together."""
    ordered = sorted(stored.values(), key=lambda one: (str(one.path), one.start))
    path: Path | None = None
    start = end = 0
    for one in ordered:
        if path == one.path and one.start <= end + _READ_AT_ONCE:
            end = max(end, one.start + one.num_bytes)
            continue
        if path is not None:
            yield path, start, end - start
        path, start, end = one.path, one.start, one.start + one.num_bytes
    if path is not None:
        yield path, start, end - start


def _give_back_memory() -> None:
    """Have the C library hand freed pages back to the system, where it is one that keeps them."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
