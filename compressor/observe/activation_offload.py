"""Hidden states that wait in files instead of memory, or in memory instead of an accelerator's.

Between two stops, what a forward carries stands in the local variables of its frames. `Parking` moves the memory of
these tensors, in place: the tensor objects stay where they are, so nothing else has to know. What is in a file is
mapped: the process lets go of the pages, and takes them from there again when the forward goes on.

What shares its memory with other tensors is left alone, so what is written to through one of them is seen by all.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.resume_state import tensors_in

_SMALLEST = 2**16
_DEPTH = 3
_ALONE = 2
"""What torch counts for the memory of one tensor that is looked at: the tensor, and our look."""


@dataclass
class Parked:
    """What of one forward was moved: tensors with the device that they came from, and mapped files."""

    tensors: list[tuple[Tensor, torch.device]] = field(default_factory=list)
    files: list[mmap.mmap] = field(default_factory=list)

    def fetch(self) -> None:
        """Bring everything back to its device. What came from the CPU is read from its file as it is used."""
        for tensor, device in self.tensors:
            if tensor.device != device:
                tensor.data = tensor.data.to(device)
        self.tensors.clear()

    def let_go(self) -> None:
        """Let go of pages that were read since."""
        for mapped in self.files:
            _let_go(mapped)


class Parking:
    """Where hidden states wait: files in a folder, or memory where there is none. The files have no names: they are
    gone with the process, however it ends.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.num_bytes = 0
        """Bytes moved so far, in all."""

    def park(self, frame: FrameType | None, others: Any = ()) -> Parked:
        """Move the tensors of a waiting frame, of all that called it, and `others`."""
        parked = Parked()
        found: dict[int, Tensor] = {}
        for value in (*_locals(frame), others):
            found |= {id(tensor): tensor for tensor in tensors_in(value, _DEPTH) if self._can_move(tensor)}
        for tensor in found.values():
            parked.tensors.append((tensor, tensor.device))
            self.num_bytes += tensor.nbytes
            if self.folder is None:
                tensor.data = tensor.data.cpu()
            else:
                parked.files.append(self._put_into_file(tensor))
        return parked

    def _can_move(self, tensor: Tensor) -> bool:
        """Whether it is large, alone in its memory, no weight, and not where it would be moved to."""
        return (
            tensor.nbytes >= _SMALLEST
            and not tensor.is_meta
            and (self.folder is not None or tensor.device.type != "cpu")
            and not isinstance(tensor, torch.nn.Parameter)
            and tensor.is_contiguous()
            and tensor.untyped_storage().nbytes() == tensor.nbytes
            and torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) == _ALONE
        )

    def _put_into_file(self, tensor: Tensor) -> mmap.mmap:
        with tempfile.TemporaryFile(dir=self.folder) as file:
            file.truncate(tensor.nbytes)
            mapped = mmap.mmap(file.fileno(), tensor.nbytes)
        moved = torch.frombuffer(mapped, dtype=tensor.dtype).view(tensor.shape)
        moved.copy_(tensor.detach())
        tensor.data = moved
        _let_go(mapped)
        return mapped


def _let_go(mapped: mmap.mmap) -> None:
    """The pages are the file's, so the process can do without them."""
    if hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _locals(frame: FrameType | None) -> Iterator[Any]:
    while frame is not None:
        yield from frame.f_locals.values()
        frame = frame.f_back
