"""What the headers of a checkpoint's safetensors files say, verified before a weight is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from compressor.checkpoint.files import INDEX, each_name_once, names_of_weights, read_index
from compressor.errors import CheckpointError
from compressor.wording import digest

_SAMPLE_BYTES = 2**16
BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""Bits of one number, by the dtype's name in a safetensors header; files hold their tensors in the reverse order."""
TORCH = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
"""torch's dtypes by their names in a safetensors header."""


@dataclass(frozen=True)
class Shard:
    """The header of one safetensors file: tensor name → (dtype as safetensors writes it, shape), → bytes, and → where
    in the file they start. Tensors stand in the order of their bytes.
    """

    path: Path
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    sizes: Mapping[str, int]
    offsets: Mapping[str, int]
    metadata: Mapping[str, str]
    header_digest: str
    num_bytes: int


def verify_files(folder: Path) -> list[Shard]:
    """Read every shard's header and compare it with file and index; no weights. Raises CheckpointError, naming the
    file, for a missing, truncated or mismatched shard, and for weights that are no safetensors.
    """
    weight_map = read_index(folder)
    names = names_of_weights([path.name for path in folder.iterdir()], weight_map, str(folder))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise CheckpointError(
            f"{folder}: {INDEX} names {len(missing)} shard(s) that are not there: {', '.join(missing)}."
        )
    shards = [read_header(folder / name) for name in names]
    if weight_map is not None:
        _compare_with_index(shards, weight_map, folder)
    return shards


def first_dtype(shards: Iterable[Shard]) -> torch.dtype | None:
    """The dtype of the first tensor of numbers: what transformers loads a checkpoint in whose config names none."""
    known = (TORCH.get(dtype) for shard in shards for dtype, _ in shard.tensors.values())
    return next((dtype for dtype in known if dtype is not None and dtype.is_floating_point), None)


def read_header(path: Path) -> Shard:
    """One file's header. Raises CheckpointError where safetensors would not open it, or a name is listed twice."""
    try:
        with safe_open(path, "pt"):  # it refuses a header that does not fit together, or not the file
            pass
        text = _text(path)
        header = json.loads(text, object_pairs_hook=each_name_once)
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path}: damaged, cut short, or not a safetensors file: {error}. Download or copy it again."
        ) from error
    metadata = header.pop("__metadata__", {})
    places = sorted((entry["data_offsets"], name) for name, entry in header.items())
    tensors = {name: (header[name]["dtype"], tuple(header[name]["shape"])) for _, name in places}
    sizes = {name: end - begin for (begin, end), name in places}
    offsets = {name: 8 + len(text) + begin for (begin, _), name in places}
    return Shard(path, tensors, sizes, offsets, metadata, hashlib.sha256(text).hexdigest(), path.stat().st_size)


def _text(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def refuse_changed(shard: Shard) -> None:
    """Raise CheckpointError where a file's header is not what it was when it was read."""
    if hashlib.sha256(_text(shard.path)).hexdigest() != shard.header_digest:
        raise CheckpointError(f"{shard.path}: its header is another one than before: it was changed meanwhile.")


def _compare_with_index(shards: list[Shard], weight_map: Mapping[str, str], folder: Path) -> None:
    held: dict[str, str] = {}
    for shard in shards:
        file = shard.path.relative_to(folder).as_posix()
        for name in shard.tensors:
            if name in held:
                raise CheckpointError(f"{folder}: {name} is in two shards, {held[name]} and {file}.")
            if name not in weight_map:
                raise CheckpointError(
                    f"{folder}: {file} holds {name}, which {INDEX} does not name: they do not belong together."
                )
            held[name] = file
    for name, file in weight_map.items():
        if held.get(name) != file:
            where = f"is in {held[name]}" if name in held else "is in none of the shards"
            raise CheckpointError(
                f"{folder}: {INDEX} says that {name} is in {file}, but it {where}: they do not belong together."
            )


def torch_dtype(kind: str) -> torch.dtype:
    """The name in torch of a dtype in a safetensors header. Raises CheckpointError where this torch has none."""
    if kind not in TORCH:
        raise CheckpointError(f"tensors of type {kind} are not known to this version of torch.")
    return TORCH[kind]


def fingerprint(folder: Path, shards: list[Shard]) -> str:
    """Tell checkpoints apart: `sha256:` and 16 hex digits of config.json and, for each shard, header, size and 64 KiB
    from five places. No proof against forgery: reading hundreds of gigabytes twice costs more than it tells.
    """
    return digest(_samples(folder, shards))


def _samples(folder: Path, shards: list[Shard]) -> Iterator[str | bytes]:
    yield (folder / "config.json").read_bytes()
    for shard in shards:
        yield f"{shard.path.name}:{shard.num_bytes}:{shard.header_digest}"
        with shard.path.open("rb") as file:
            for part in range(5):
                file.seek(max(0, shard.num_bytes - _SAMPLE_BYTES) * part // 4)
                yield file.read(_SAMPLE_BYTES)


def refuse_not_finite(tensors: Iterable[tuple[str, torch.Tensor]], reference: str) -> None:
    """Raise CheckpointError, naming the first tensor that holds a NaN or an infinity. Reads every number once."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not _is_finite(tensor):
            num_bad = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(f"{reference}: tensor {name} holds {num_bad:,} value(s) that are NaN or infinite.")


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether no number is NaN or infinite: the smallest and the largest tell, without a tensor of answers."""
    if tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:  # the float8 types know no minimum
        return bool(torch.isfinite(tensor.float()).all())
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())
