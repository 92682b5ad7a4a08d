"""Write a checkpoint's shards from those of another, their tensors copied in pieces of bytes from file to file."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from compressor.checkpoint.atomic_files import force_to_disk
from compressor.checkpoint.headers import BITS, Shard
from compressor.errors import CheckpointError
from compressor.model.structure import ExpertAxis
from compressor.wording import runs

Becomes = Literal["copied", "renamed", "dropped", "cut", "rewritten"]
_CHUNK = 2**23
_CANNOT_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ETXTBSY, errno.EPERM)


@dataclass(frozen=True)
class TensorEdit:
    """What becomes of a tensor on disk: `axis` and `rows` that stay where `cut`; `values` where `rewritten`."""

    name: str
    becomes: Becomes
    new_name: str
    dtype: str
    shape: tuple[int, ...]
    new_shape: tuple[int, ...]
    axis: ExpertAxis | None = None
    rows: tuple[int, ...] = ()
    """Indices along the axis that stay, ascending."""
    values: Callable[[], Tensor] | None = field(default=None, compare=False)

    @property
    def num_bytes(self) -> int:
        """Bytes afterwards; 0 if it is dropped."""
        return 0 if self.becomes == "dropped" else BITS[self.dtype] * prod(self.new_shape) // 8


@dataclass(frozen=True)
class ShardEdit:
    """One file: its tensors in the order in which they will be written, the dropped ones too."""

    shard: Shard
    tensors: tuple[TensorEdit, ...]

    @property
    def unchanged(self) -> bool:
        """Whether no byte of the file changes."""
        return all(tensor.becomes == "copied" for tensor in self.tensors)

    @property
    def kept(self) -> list[TensorEdit]:
        return [tensor for tensor in self.tensors if tensor.becomes != "dropped"]

    @property
    def num_bytes(self) -> int:
        """The file's size afterwards; 0 if nothing is left in it."""
        if self.unchanged:
            return self.shard.num_bytes
        return len(self.header()) + sum(tensor.num_bytes for tensor in self.kept) if self.kept else 0

    def header(self) -> bytes:
        """The first bytes of the new file: its header's length, and the header."""
        entries: dict[str, Any] = {"__metadata__": dict(self.shard.metadata)} if self.shard.metadata else {}
        at = 0
        for tensor in self.kept:
            end = at + tensor.num_bytes
            entries[tensor.new_name] = {
                "dtype": tensor.dtype, "shape": list(tensor.new_shape), "data_offsets": [at, end],
            }  # fmt: skip
            at = end
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


# Writing ---------------------------------------------------------------------------------------------------


def write_shard(edit: ShardEdit, path: Path, *, hard_link: bool) -> Path | None:
    """Write one file under another name, which is returned; None if it is linked and there already."""
    source = edit.shard.path.resolve()
    if edit.unchanged and hard_link:
        with suppress(OSError):  # another file system, or one without links: then it is copied
            os.link(source, path)
            return None
    temporary = path.with_name(path.name + ".partial")
    reading = os.open(source, os.O_RDONLY)
    try:
        with temporary.open("wb", buffering=0) as file:
            if edit.unchanged:
                _copy_range(reading, file.fileno(), 0, edit.shard.num_bytes, source)
            else:
                file.write(edit.header())
                _write_tensors(edit, reading, file.fileno(), source)
    finally:
        os.close(reading)
    return temporary


def finish(temporary: Path, path: Path) -> None:
    """Have a file on the disk, and then give it its name; the folder follows when all are there."""
    force_to_disk(temporary)
    temporary.replace(path)


def _write_tensors(edit: ShardEdit, reading: int, writing: int, source: Path) -> None:
    start = end = 0  # bytes of the source that are still to be copied: neighbours are copied together
    for tensor in edit.kept:
        for data in _pieces(tensor, edit.shard.offsets[tensor.name], reading, source):
            if isinstance(data, range) and data.start == end:
                end = data.stop
                continue
            _copy_range(reading, writing, start, end - start, source)
            start = end = 0
            if isinstance(data, range):
                start, end = data.start, data.stop
            else:
                _write_all(writing, data)
    _copy_range(reading, writing, start, end - start, source)


def _pieces(tensor: TensorEdit, offset: int, reading: int, source: Path) -> Iterator[range | memoryview]:
    """The new tensor's bytes in their order: ranges of the source's, or the bytes themselves."""
    if tensor.values is not None:
        new = tensor.values().contiguous()
        yield memoryview(new.view(-1).view(torch.uint8).numpy().tobytes())
        return
    if tensor.axis is None:
        yield range(offset, offset + tensor.num_bytes)
        return
    dim = tensor.axis.dim
    outer, size = prod(tensor.shape[:dim]), tensor.shape[dim]
    row = BITS[tensor.dtype] * prod(tensor.shape[dim + 1 :]) // 8
    if outer == 1 or row * size > _CHUNK:
        for block in range(outer):
            at = offset + block * size * row
            yield from (range(at + run.start * row, at + run.stop * row) for run in runs(tensor.rows))
        return
    rows, blocks = np.array(tensor.rows), max(1, _CHUNK // (row * size or 1))
    for first in range(0, outer, blocks):
        many = min(blocks, outer - first)
        data = _read_range(reading, offset + first * size * row, many * size * row, source)
        data_RSB = np.frombuffer(data, np.uint8).reshape(many, size, row)
        yield memoryview(data_RSB[:, rows].tobytes())


def _copy_range(reading: int, writing: int, start: int, length: int, source: Path) -> None:
    """Append bytes of one file to another, within the kernel where it can."""
    end = start + length
    while start < end:
        try:
            done = os.copy_file_range(reading, writing, min(end - start, 2**30), offset_src=start)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _CANNOT_COPY:
                raise
            break
        if not done:
            raise _cut_short(source, start)
        start += done
    while start < end:
        data = _read_range(reading, start, min(_CHUNK, end - start), source)
        _write_all(writing, memoryview(data))
        start += len(data)


def _read_range(reading: int, start: int, length: int, source: Path) -> bytes:
    data = os.pread(reading, length, start)
    while len(data) < length:
        more = os.pread(reading, length - len(data), start + len(data))
        if not more:
            raise _cut_short(source, start + len(data))
        data += more
    return data


def _write_all(writing: int, data: memoryview) -> None:
    while data:
        data = data[os.write(writing, data) :]


def _cut_short(source: Path, at: int) -> CheckpointError:
    return CheckpointError(f"{source}: ends at byte {at:,}, its header says later: it was changed meanwhile.")


def sync_folder(folder: Path) -> None:
    """Have the names of its files on the disk too."""
    for path in folder.iterdir():
        if path.suffix == ".json":
            force_to_disk(path)
    force_to_disk(folder)
