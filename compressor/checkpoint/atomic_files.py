"""Files that are whole or not there, and on the disk when they have their name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file that is whole or not there."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    put_in_place(temporary, path)


def put_in_place(temporary: Path, path: Path) -> None:
    """Force a file to the disk and give it its name."""
    force_to_disk(temporary)
    temporary.replace(path)
    force_to_disk(path.parent)


def force_to_disk(path: Path) -> None:
    """Have the system write a file's content, or a folder's names, now."""
    if path.is_dir() and os.name != "posix":
        return  # only there a folder can be opened
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def with_own_memory(tensor: Tensor) -> Tensor:
    """The tensor as safetensors takes it: no view that shares its memory with others."""
    contiguous = tensor.contiguous()
    return contiguous if contiguous.untyped_storage().nbytes() == contiguous.nbytes else contiguous.clone()
