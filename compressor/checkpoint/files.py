"""The files of a checkpoint's folder, told apart by name: weights that are read, what goes along, what stays behind.

Read are `model.safetensors` or the shards of the index, nothing else. Everything that is no weights goes along, in
sub-folders too. Weights that are not read (other formats, copies, adapters) stay behind, and with them the rest of a
sub-folder that holds some, or their config (of a hub's model the weights are not here): it is another form of the model
as it was.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from statistics import mode
from typing import Any

from compressor.errors import CheckpointError

INDEX = "model.safetensors.index.json"
"""The file that says which shard holds which tensor."""
SINGLE = "model.safetensors"
WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.gguf", "*.gguf.*", "*.onnx",
    "*.onnx_data*", "*.onnx.data*", "*.pkl", "*.pickle", "*.nemo", "*.tflite", "*.mlmodel", "*.llamafile", "*.keras",
    "*.pdparams", "*.engine",
)  # fmt: skip
"""Names of files that hold weights, of any format, as patterns; `/` is a character like any other."""
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_OURS = "compressor"
_WRITTEN_ANEW = ("config.json", INDEX)
_OF_WEIGHTS = ("config.json", "params.json", ADAPTER[0])
"""Names of files that say what weights beside them are."""
_STAYS = ("README.md", _OURS, *ADAPTER)


def is_weights(name: str) -> bool:
    """Whether a file holds weights, by its name."""
    return any(fnmatchcase(name.lower(), pattern) for pattern in WEIGHTS)


def names_of_weights(there: Collection[str], weight_map: dict[str, str] | None, where: str) -> list[str]:
    """The files of weights that are read, missing shards too. CheckpointError for none, or two models."""
    if weight_map is not None:
        names = sorted(set(weight_map.values()))
        if SINGLE not in names and SINGLE in there:
            raise CheckpointError(
                f"{where}: it holds both {SINGLE} and {INDEX}: two models; move the one away that is not meant."
            )
        return names
    if SINGLE in there:
        return [SINGLE]
    other = sorted(name for name in there if is_weights(name))
    found = f"found {', '.join(other[:3])}" if other else "found no weights at all"
    raise CheckpointError(
        f"{where}: expected {SINGLE} or {INDEX}, {found}; convert other formats with transformers' `save_pretrained`."
    )


def read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name → file, as the index of shards says; None where there is no index. Raises CheckpointError."""
    path = folder / INDEX
    if not path.exists():
        return None
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=each_name_once)["weight_map"]
        if not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError("`weight_map` does not map names of tensors to names of files")
        outside = [name for name in weight_map.values() if PurePath(name).is_absolute() or ".." in PurePath(name).parts]
        if outside:
            raise ValueError(f"it names {outside[0]}, which is outside the checkpoint's folder")
        return dict(weight_map)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as an index of shards: {error}") from error


def indexed_bytes(folder: Path) -> int:
    """Bytes of all weights, as the index of shards says; 0 where it does not. Raises CheckpointError."""
    said = json.loads((folder / INDEX).read_text(encoding="utf-8")).get("metadata") if read_index(folder) else None
    total = said.get("total_size") if isinstance(said, dict) else None
    return int(total) if isinstance(total, int | float) and total > 0 else 0


def each_name_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, in which every name may stand once only."""
    found = dict(pairs)
    if len(found) != len(pairs):
        name = mode(name for name, _ in pairs)
        raise ValueError(f"{name} is listed twice")
    return found


@dataclass(frozen=True)
class Beside:
    """What a checkpoint's folder holds beside the weights that are read, by paths within it."""

    folder: Path
    carried: tuple[str, ...]
    """Files that a smaller checkpoint gets too, as they are."""
    left: tuple[str, ...]
    """Files, and folders with a `/` at their end, that it does not get."""

    @property
    def note(self) -> str:
        """What stays behind, in one sentence."""
        return f"not carried over to the smaller checkpoint: {', '.join(self.left)}"

    @property
    def num_bytes(self) -> int:
        """Bytes of what is carried over."""
        return sum((self.folder / name).stat().st_size for name in self.carried)

    def copy(self, folder: Path) -> None:
        """Carry it over; of a link what it leads to."""
        for name in self.carried:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / name, folder / name)


def files_beside(folder: Path) -> Beside:
    """What becomes of everything in a checkpoint's folder but the weights that are read."""
    read = {*(read_index(folder) or {"": SINGLE}).values()}
    found = sorted(_walk(folder, "", read))
    return Beside(
        folder,
        tuple(name for name, is_carried in found if is_carried),
        tuple(name for name, is_carried in found if not is_carried),
    )


def _walk(folder: Path, inside: str, read: Collection[str]) -> Iterator[tuple[str, bool]]:
    """(path, whether it is carried over) of the files, and of folders that stay behind whole."""
    entries = [(inside + entry.name, entry) for entry in os.scandir(folder)]
    if inside and any((is_weights(name) and name not in read) or e.name in _OF_WEIGHTS for name, e in entries):
        yield inside, False
        return
    for name, entry in entries:
        stays = entry.name.startswith(".") or name in _STAYS or entry.name == "__pycache__"
        if os.path.isdir(entry):  # links may lead in a circle, which `entry.is_dir` raises for
            if stays or entry.is_symlink() or not os.access(entry, os.R_OK | os.X_OK):
                yield f"{name}/", False
            else:
                yield from _walk(folder / entry.name, f"{name}/", read)
        elif name not in read and name not in _WRITTEN_ANEW:
            can_copy = os.path.isfile(entry) and os.access(entry, os.R_OK)
            is_other = is_weights(name) or name.endswith(".index.json") or not can_copy
            yield name, not (stays or is_other)


def refuse_adapter(folder: Path, reference: str) -> None:
    """Raise CheckpointError for a folder with an adapter (LoRA): whether transformers applies it depends on peft."""
    files = [name for name in ADAPTER if (folder / name).exists()]
    if ADAPTER[0] not in files:
        return
    try:
        about = json.loads((folder / ADAPTER[0]).read_text(encoding="utf-8"))
        kind, base = about.get("peft_type"), about.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):  # whatever it says, it is there
        kind = base = None
    names = " and ".join(files)
    adapter = f"an adapter ({kind}: {names})" if kind else f"an adapter ({names})"
    if not (folder / "config.json").exists():
        what = f"{base}, which it is for," if base else "the model that it is for"
        raise CheckpointError(
            f"{reference}: it holds {adapter} and no model. Load {what} with peft, merge the adapter into it "
            f"(`merge_and_unload`, then `save_pretrained`), and give that folder."
        )
    raise CheckpointError(
        f"{reference}: it holds {adapter} beside a model, on top of which transformers puts it where peft is installed "
        f"only: merge it (peft's `merge_and_unload`, then `save_pretrained`), or move {names} away."
    )
