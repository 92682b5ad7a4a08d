"""Checkpoints on disk: find, verify, load, and save so that what appears is whole.

A checkpoint here is a folder of safetensors files with a config.json, as transformers writes it. Pickled weights are
never read. What is saved starts from the source's own config.json, with only the changed integers patched, because
other readers know other spellings of the same key than the transformers of the day writes.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import struct
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from safetensors import SafetensorError

from compressor.errors import (
    CalibrationError,
    CheckpointError,
    DiskError,
    PluginError,
    RecipeError,
    UnsupportedModelError,
    VerificationError,
)
from compressor.files import (
    INDEX,
    SINGLE,
    each_name_once,
    files_beside,
    is_weights,
    names_of_weights,
    read_index,
    refuse_adapter,
)
from compressor.hub import download_side_files, download_weights, may_be_hub_id, missing_weights
from compressor.journal import Journal, force_to_disk, put_in_place
from compressor.moe import (
    KEY,
    Adapter,
    ConfigLeaf,
    MoEModel,
    read_entry,
    settle,
    structure_of,
    uneven_class,
    uneven_counts,
)
from compressor.quantised import (
    quantisation_of,
    quantiser,
    reading_problem,
    refusal,
    to_dequantise,
    without_quantisation,
)
from compressor.wording import human_bytes

DEMO = "demo"

_EXTRA = "mtp|nextn"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
)
_PLAIN_ROPE = {"rope_type", "rope_theta", "partial_rotary_factor"}
"""Rotary settings that the older spelling has outside `rope_scaling`."""
_SAMPLE_BYTES = 2**16
_LENGTH_BYTES = 8
"""What a safetensors file begins with: how long its header is."""
_FINAL = RecipeError | PluginError | UnsupportedModelError | CalibrationError | VerificationError
"""Errors that the same recipe meets again."""
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
_AUTO_FIRST = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMultimodalLM",
)

_T = TypeVar("_T", bound=Hashable)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint found: how the user called it, the local folder, whether its Python code may run, and whether the
    folder is the hub's cache of it.
    """

    reference: str
    folder: Path
    trust_remote_code: bool = False
    is_of_hub: bool = False

    @property
    def has_tokenizer(self) -> bool:
        """Whether the folder holds a tokenizer's files."""
        return any((self.folder / name).exists() for name in _TOKENIZER_FILES)

    @property
    def has_weights(self) -> bool:
        """Whether the folder holds weights: to look at a hub model, all but these is downloaded, and all or none of
        them count.
        """
        read = {*(read_index(self.folder) or {"": SINGLE}).values()} if self.is_of_hub else ()
        return all((self.folder / name).exists() for name in read) if read else any(self.folder.glob("*.safetensors"))

    @property
    def awaits_weights(self) -> bool:
        """Whether no weights are here yet, in any format; of a hub model, not all of them."""
        if self.is_of_hub:
            return not self.has_weights
        return not any(is_weights(path.name) for path in self.folder.iterdir())

    @property
    def quantisation(self) -> dict[str, Any] | None:
        """What its config.json says of quantisation; None where it is not quantised."""
        return quantisation_of(read_config(self.folder))


def find_checkpoint(reference: str, *, trust_remote_code: bool = False, weights: bool = True) -> Checkpoint:
    """Find a model: `demo`, a local folder, or a hub id, which is downloaded into the hub's cache.

    With `weights` False all but weights is needed and downloaded. Raises CheckpointError if there is no such folder, or
    the hub cannot be reached and its cache does not hold the model, or an adapter lies in it, or
    the hub has no weights of it that can be read.
    """
    if reference == DEMO:
        from compressor.demo import model_folder

        return Checkpoint(reference, model_folder())
    path = Path(os.path.expanduser(reference))
    if os.path.isdir(path):
        refuse_adapter(path, reference)
        return Checkpoint(reference, path, trust_remote_code)
    if os.path.exists(path):
        raise CheckpointError(
            f"{reference} is a file; expected the folder of a checkpoint (config.json and *.safetensors)."
        )
    if not may_be_hub_id(reference):
        raise CheckpointError(
            f"{reference}: there is no such folder, and it is not a hub id (`owner/name`) either. The built-in model "
            f"is called `{DEMO}`."
        )
    found = Checkpoint(reference, download_side_files(reference), trust_remote_code, is_of_hub=True)
    refuse_adapter(found.folder, reference)
    if weights:
        return with_weights(found)
    missing_weights(reference, found.folder)
    return found


def with_weights(found: Checkpoint) -> Checkpoint:
    """The checkpoint, its weights downloaded where they are on the hub. Raises CheckpointError as above."""
    if found.is_of_hub:
        download_weights(found.reference, found.folder)
    return found


def load_config(checkpoint: Checkpoint) -> Any:
    """The model's config as transformers reads it. Raises CheckpointError where there is none or it is damaged."""
    from transformers import AutoConfig

    raw = read_config(checkpoint.folder)
    code = raw.get("auto_map")
    if code and not checkpoint.trust_remote_code and not _known_to_transformers(raw.get("model_type")):
        raise CheckpointError(
            f"{checkpoint.reference}: the model's code comes with its checkpoint "
            f"({code.get('AutoConfig') if isinstance(code, dict) else code}). It "
            f"runs only with `trust_remote_code: true` in the recipe, or --trust-remote-code; read it first."
        )
    if raw.get("transformers_weights"):
        raise CheckpointError(
            f"{checkpoint.reference}: its config.json names a file of weights itself (`transformers_weights`), which "
            f"other readers do not know of. Save it once with transformers' `save_pretrained`."
        )
    try:
        return AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=checkpoint.trust_remote_code)
    except Exception as error:  # transformers raises many kinds for a config it does not know
        raise CheckpointError(
            f"{checkpoint.reference}: transformers cannot read config.json (model_type {raw.get('model_type')!r}): "
            f"{error}"
        ) from error


def quantiser_of(checkpoint: Checkpoint) -> Any:
    """What dequantises the checkpoint's weights while they are read, None if they are not quantised.

    Raises UnsupportedModelError for a format that cannot be read so.
    """
    quantisation = checkpoint.quantisation
    return None if quantisation is None else quantiser(quantisation, checkpoint.reference)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as it stands. Raises CheckpointError if it is not there or no JSON object."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: no config.json, so this is no checkpoint.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(raw).__name__}.")
    return raw


def _known_to_transformers(model_type: object) -> bool:
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


# Classes ---------------------------------------------------------------------------------------------------


def model_class(checkpoint: Checkpoint, config: Any) -> Any:
    """The class to build: the checkpoint's own code if it may run, else the one that `architectures` of its config
    names, else the first that an Auto class of transformers knows for this config, language models first.

    Raises UnsupportedModelError where there is none, or it has no forward.
    """
    cls = _remote_class(checkpoint, config) or _named_class(config) or _first_class(config)
    if cls is None:
        raise UnsupportedModelError(
            f"{checkpoint.reference}: model type {config.model_type!r} has no model class in transformers."
        )
    if cls.forward is torch.nn.Module.forward:
        raise UnsupportedModelError(
            f"{checkpoint.reference}: {cls.__name__} has no forward, so it cannot be run.{_runnable_parts(config)}"
        )
    return cls


def auto_class(cls: Any, config: Any) -> str:
    """The Auto class that builds `cls` for this config: what a user of the checkpoint calls."""
    remote = getattr(config, "auto_map", None) or {}
    known = [name for name in _auto_names() if cls.__name__ == str(remote.get(name, "")).rpartition(".")[2]]
    known += [name for name, classes in _auto_classes(config) if any(cls.__name__ == one.__name__ for one in classes)]
    return known[0] if known else "AutoModel"


def next_token_problem(cls: Any, config: Any) -> str | None:
    """Why a model of this class does not predict the next token of a text, in words; None where it does."""
    if "decoder_input_ids" in inspect.signature(cls.forward).parameters:
        return "is an encoder-decoder" if config.is_encoder_decoder else "refines a whole block of tokens at a time"
    if cls.can_generate() or "CausalLM" in cls.__name__:
        return None
    return "has no language-model head"


def max_positions(config: Any) -> int | None:
    """The longest sequence that a model's config speaks of, None if it does not."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def _auto_names() -> list[str]:
    """Names of transformers' Auto classes, those that are tried first in front."""
    from transformers.models.auto import modeling_auto

    names = [name for name in vars(modeling_auto) if name.startswith("AutoModelFor") and name not in _AUTO_FIRST]
    return [*_AUTO_FIRST, *sorted(names), "AutoModel"]


def _auto_classes(config: Any) -> Iterator[tuple[str, list[Any]]]:
    """For each Auto class that knows this config, its name and the classes that it builds from it.

    A class that wants another config is left out: from that of a composite some Auto classes build the text model
    alone.
    """
    from transformers.models.auto import modeling_auto

    for name in _auto_names():
        mapping = getattr(modeling_auto, name)._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            classes = found if isinstance(found, tuple | list) else (found,)
            own = [one for one in classes if isinstance(config, getattr(one, "config_class", None) or object)]
            if own:
                yield name, own


def _remote_class(checkpoint: Checkpoint, config: Any) -> Any:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

    code = getattr(config, "auto_map", None) or {}
    name = next((name for name in _auto_names() if name in code), None)
    if name is None or not checkpoint.trust_remote_code:
        return None
    return add_generation_mixin_to_remote_model(get_class_from_dynamic_module(code[name], str(checkpoint.folder)))


def _named_class(config: Any) -> Any:
    wanted = (getattr(config, "architectures", None) or [None])[0]
    return next((one for _, classes in _auto_classes(config) for one in classes if one.__name__ == wanted), None)


def _first_class(config: Any) -> Any:
    return next((classes[0] for _, classes in _auto_classes(config)), None)


def _runnable_parts(config: Any) -> str:
    """A sentence that names the sub-models that can be run, where there are any."""
    parts = {name.removesuffix("_config"): _first_class(getattr(config, name, None)) for name in config.sub_configs}
    runnable = [
        f"its `{name}` (load it with {cls.__name__}, save it with `save_pretrained`)"
        for name, cls in parts.items()
        if cls is not None and cls.forward is not torch.nn.Module.forward and cls.can_generate()
    ]
    return f" What can be compressed is {' or '.join(runnable)}." if runnable else ""


# Verifying -------------------------------------------------------------------------------------------------


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
    """Read every shard's header and compare it with the file's size and with the index.

    Cheap: no weights are read. Raises CheckpointError, naming the file, for a missing, truncated or mismatched shard,
    and for weights in a format other than safetensors.
    """
    weight_map = read_index(folder)
    names = names_of_weights([path.name for path in folder.iterdir()], weight_map, str(folder))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise CheckpointError(
            f"{folder}: {INDEX} names {len(missing)} shard(s) that are not there: {', '.join(missing)}."
        )
    shards = [_read_header(folder / name) for name in names]
    if weight_map is not None:
        _compare_with_index(shards, weight_map, folder)
    return shards


def first_dtype(shards: Iterable[Shard]) -> torch.dtype | None:
    """The dtype of the first tensor of numbers: what transformers loads a checkpoint in whose config names none."""
    known = (TORCH.get(dtype) for shard in shards for dtype, _ in shard.tensors.values())
    return next((dtype for dtype in known if dtype is not None and dtype.is_floating_point), None)


def _read_header(path: Path) -> Shard:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            if size < _LENGTH_BYTES:
                raise ValueError(f"the file has {size} bytes: it is empty, or cut short. Download or copy it again")
            (length,) = struct.unpack("<Q", file.read(_LENGTH_BYTES))
            if length > min(size, 2**30):
                raise ValueError(f"its header says it is {length:,} bytes long, the file is {size:,}")
            text = file.read(length)
        header = json.loads(text, object_pairs_hook=each_name_once)
        metadata = header.pop("__metadata__", {})
        places = sorted((entry["data_offsets"], name) for name, entry in header.items())
        tensors = {name: (header[name]["dtype"], tuple(header[name]["shape"])) for _, name in places}
        for (begin, end), name in places:
            _check_entry(name, *tensors[name], begin, end)
        end = max((end for (_, end), _ in places), default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{path}: not a safetensors file, or damaged at its start: {error}") from error
    if size != 8 + length + end:
        raise CheckpointError(
            f"{path}: the header describes {8 + length + end:,} bytes, the file has {size:,}: it is truncated or "
            f"damaged. Download or copy it again."
        )
    at = 0
    for (begin, end), name in places:
        if begin != at:
            what = "overlaps the tensor before it" if begin < at else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: damaged at its start: {name} {what} (bytes {begin:,} to {end:,}, not {at:,})."
            )
        at = end
    sizes = {name: end - begin for (begin, end), name in places}
    offsets = {name: 8 + length + begin for (begin, _), name in places}
    return Shard(path, tensors, sizes, offsets, metadata, hashlib.sha256(text).hexdigest(), size)


def _check_entry(name: str, dtype: str, shape: tuple[int, ...], begin: int, end: int) -> None:
    if dtype not in BITS:
        raise ValueError(f"{name} has the unknown dtype {dtype!r}")
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"{name} has no proper shape and offsets: {list(shape)}, {begin} to {end}")
    if BITS[dtype] * math.prod(shape) != 8 * (end - begin):
        raise ValueError(f"{name} is {dtype} {list(shape)}, and {end - begin:,} bytes long")


def _compare_with_index(shards: list[Shard], weight_map: Mapping[str, str], folder: Path) -> None:
    held: dict[str, str] = {}
    for shard in shards:
        file = shard.path.relative_to(folder).as_posix()
        for name in shard.tensors:
            if name in held:
                raise CheckpointError(f"{folder}: {name} is in two shards, {held[name]} and {file}.")
            if name not in weight_map:
                raise CheckpointError(
                    f"{folder}: {file} holds {name}, which {INDEX} does not name: shards and index do not belong "
                    f"together."
                )
            held[name] = file
    for name, file in weight_map.items():
        if held.get(name) != file:
            where = f"is in {held[name]}" if name in held else "is in none of the shards"
            raise CheckpointError(
                f"{folder}: {INDEX} says that {name} is in {file}, but it {where}: shards and index do not belong "
                f"together."
            )


def torch_dtype(kind: str) -> torch.dtype:
    """The name in torch of a dtype in a safetensors header. Raises CheckpointError where this torch has none."""
    if kind not in TORCH:
        raise CheckpointError(f"tensors of type {kind} are not known to this version of torch.")
    return TORCH[kind]


def fingerprint(folder: Path, shards: list[Shard]) -> str:
    """Tell checkpoints apart: `sha256:` and 16 hex digits of config.json and, for each shard, its header, its size
    and 64 KiB from five places. Not a proof against forgery; reading hundreds of gigabytes twice would cost more than
    it tells.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for shard in shards:
        digest.update(f"{shard.path.name}:{shard.num_bytes}:{shard.header_digest}".encode())
        with shard.path.open("rb") as file:
            for part in range(5):
                file.seek(max(0, shard.num_bytes - _SAMPLE_BYTES) * part // 4)
                digest.update(file.read(_SAMPLE_BYTES))
    return f"sha256:{digest.hexdigest()[:16]}"


# What transformers does not build --------------------------------------------------------------------------


@dataclass(frozen=True)
class LeftOut:
    """Extra prediction layers (multi-token prediction, next-n heads) that a checkpoint has and its class ignores.

    transformers drops them on loading without a word, so a checkpoint that it saves is without them, and its config
    must not announce them any more. Paths are those of config.json.
    """

    num_tensors: int
    num_bytes: int | None
    """None where only the index is at hand, not the weights."""
    layers: tuple[str, ...]
    announced: Mapping[tuple[str, ...], int]
    """Integers of config.json that announce the layers: they become 0."""
    padded: Mapping[tuple[str, ...], tuple[int, int]]
    """Lists of config.json with an entry for each of these layers too → their length, and the one that they get."""

    def to_json(self) -> dict[str, Any]:
        """What the record holds; a list that is cut appears by its lengths."""
        changed = {".".join(path): [value, 0] for path, value in self.announced.items()}
        lengths = {".".join(path): list(lengths) for path, lengths in self.padded.items()}
        found = {"tensors": self.num_tensors, "bytes": self.num_bytes, "layers": list(self.layers), "config": changed}
        return found | ({"list_lengths": lengths} if lengths else {})

    def patch(self, raw: dict[str, Any]) -> None:
        """Take what announces the layers out of a config.json, in place."""
        for path in self.announced:
            _holder(raw, path)[path[-1]] = 0
        for path, (_, length) in self.padded.items():
            holder = _holder(raw, path)
            holder[path[-1]] = holder[path[-1]][:length]


def find_left_out(folder: Path, config: Any, cls: Any) -> LeftOut | None:
    """The extra prediction layers in a checkpoint's folder that `cls` does not build; None where there are none.

    Reads names, from the index and the shards' headers, as far as they are there; no weights.
    """
    sizes = _tensor_sizes(folder)
    text = config.get_text_config()
    num_layers = getattr(text, "num_hidden_layers", None)
    prefixes = {name: prefix for name in sizes if (prefix := _extra_layer(name, num_layers))}
    if not prefixes:
        return None
    with torch.device("meta"):
        model = cls(copy.deepcopy(config))
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    names = [name for name in prefixes if any(re.search(pattern, name) for pattern in ignored)]
    if not names:
        return None
    known = [sizes[name] for name in names]
    raw = read_config(folder)
    announced = _announced(raw, config)
    return LeftOut(
        num_tensors=len(names),
        num_bytes=None if None in known else sum(size for size in known if size is not None),
        layers=tuple(dict.fromkeys(prefixes[name] for name in names)),
        announced=announced,
        padded=_padded(raw, text, num_layers, max(announced.values(), default=0)),
    )


def _tensor_sizes(folder: Path) -> dict[str, int | None]:
    """Tensor name → bytes, or None where its file is not there."""
    files = read_index(folder)
    shards = {*files.values()} if files else {SINGLE}
    known = [_read_header(folder / name) for name in sorted(shards) if (folder / name).exists()]
    return dict.fromkeys(files or (), None) | {name: size for shard in known for name, size in shard.sizes.items()}


def _extra_layer(name: str, num_layers: int | None) -> str | None:
    """The path of the extra prediction layer that a tensor belongs to by its name: a layer behind the model's last
    one, or anything that is called so (`mtp.`, `model.mtp_layers.`).
    """
    parts = name.split(".")[:-1]
    for position, part in enumerate(parts):
        if re.search(_EXTRA, part) or (part.isdigit() and num_layers is not None and int(part) >= num_layers):
            return ".".join(parts[: position + 1])
        if part.isdigit():
            return None
    return None


def _announced(raw: Mapping[str, Any], config: Any) -> dict[tuple[str, ...], int]:
    """Paths in config.json of the integers above 0 that announce extra prediction layers.

    With them those that the config's class sets by itself where config.json has no such key.
    """

    def walk(holder: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
        for key, value in holder.items():
            if isinstance(value, dict):
                yield from walk(value, (*path, key))
            elif _announces(key, value):
                yield (*path, key), value

    found = dict(walk(raw, ()))
    text = config.get_text_config()
    where = tuple(key for key, value in vars(config).items() if value is text and isinstance(raw.get(key), dict))
    for key, value in vars(text).items():
        if _announces(key, value) and not {path[-1] for path in found} & _spellings(text, key):
            found[*where, key] = value
    return found


def _announces(key: str, value: object) -> bool:
    return type(value) is int and value > 0 and bool(re.search(_EXTRA, key) and re.search("layer|module|^num_", key))


def _padded(
    raw: Mapping[str, Any], text: Any, num_layers: int | None, num_extra: int
) -> dict[tuple[str, ...], tuple[int, int]]:
    """Lists with an entry for each layer and each extra one, which the config's class cuts itself while the extra
    layers are announced, and finds too long when they are not.
    """
    found: dict[tuple[str, ...], tuple[int, int]] = {}
    if num_layers is None or not num_extra:
        return found
    for path in ((), *((key,) for key, value in raw.items() if isinstance(value, dict))):
        holder = _holder(raw, (*path, ""))
        if holder.get("num_hidden_layers") != num_layers:
            continue
        for key, value in holder.items():
            if isinstance(value, list) and len(value) == num_layers + num_extra and getattr(text, key, None) != value:
                found[*path, key] = (len(value), num_layers)
    return found


def _holder(raw: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """The object of config.json that holds the last name of a path."""
    for name in path[:-1]:
        raw = raw[name]
    return raw


def _spellings(config: Any, key: str) -> set[str]:
    """The names that an attribute of a config goes by: readers differ in the one they look for."""
    aliases = getattr(config, "attribute_map", None) or {}
    return {key, *(alias for alias, name in aliases.items() if name == key)}


# Loading ---------------------------------------------------------------------------------------------------


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: str = "auto",
    device: str | Mapping[str, Any] = "cpu",
    like: Any = None,
    adapters: Sequence[Adapter] = (),
    to_measure: bool = False,
) -> Any:
    """Load the model and refuse what transformers would only warn of.

    transformers initialises missing weights at random and goes on; here a missing, mismatched or unexpected expert
    tensor is an error. `like` is a live model whose attention and experts implementations are used. A model whose
    config says that it skips experts does. On `device` "meta" names, shapes and dtypes are checked and no weight is
    read. A quantised checkpoint's model is the dequantised one there, and `to_measure` wherever it can be, else as
    transformers' own quantiser loads it; `to_measure` no model skips by its config. A mapping, such as `stream.spread`
    makes, says which part of the model goes to which device. Raises CheckpointError.
    """
    config, quantisation = load_config(checkpoint), checkpoint.quantisation
    as_numbers = device == "meta" or (to_measure and quantisation is not None and not reading_problem(quantisation))
    is_packed = quantisation is not None and not as_numbers
    device_map = dict(device) if isinstance(device, Mapping) else {"": device}
    is_mapped = device == "meta" or is_packed or isinstance(device, Mapping)
    if quantisation is not None and as_numbers:
        to_dequantise(config, quantisation)
    cls = _class_to_load(checkpoint, config, adapters)
    tensors = _tensors_on_meta(checkpoint) if device == "meta" else None  # transformers would read the files
    implementations = _implementations_to_use(like, quantisation)
    try:
        with quiet_transformers():
            model, info = cls.from_pretrained(
                None if device == "meta" else checkpoint.folder,
                config=config,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                output_loading_info=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they come back in `info`, and are refused below by name
                device_map=device_map if is_mapped else None,
                state_dict=tensors,
                **implementations,
            )
    except Exception as error:  # many kinds: unreadable files, uneven experts, code that comes with the model
        why = uneven_experts(verify_files(checkpoint.folder)) or error
        if quantisation is not None and as_numbers and why is error:
            raise refusal(quantisation, checkpoint.reference, "transformers fails to dequantise them") from error
        raise CheckpointError(f"{checkpoint.reference}: transformers cannot load it: {why}") from error
    if uneven_counts(config):
        settle(model)
    refuse_bad_keys(checkpoint, info)
    if device == "meta":
        model.config.name_or_path = str(checkpoint.folder)
    elif not is_packed:
        align(model)
    try:
        model = model.eval() if is_mapped else model.eval().to(device)
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(f"{checkpoint.reference}: cannot be moved to device {device!r}: {error}") from error
    if "skipping" in read_entry(config) and not to_measure:
        MoEModel(model, structure_of(type(model), model.config, adapters)).restore_skipping()
    return model


def unquantised_skeleton(checkpoint: Checkpoint) -> Any:
    """The checkpoint's model on the meta device as its config alone has it, unquantised; nothing of it is checked."""
    config = without_quantisation(load_config(checkpoint))
    with torch.device("meta"), quiet_transformers():
        return model_class(checkpoint, config)(config)


def _tensors_on_meta(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Names, shapes and dtypes of all tensors, from the headers."""
    tensors = [entry for shard in verify_files(checkpoint.folder) for entry in shard.tensors.items()]
    return {name: torch.empty(shape, dtype=torch_dtype(kind), device="meta") for name, (kind, shape) in tensors}


def _implementations_to_use(like: Any, quantisation: Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings of `from_pretrained`: those of a live model, as far as there is one."""
    found: dict[str, Any] = {}
    for name in ("attn_implementation", "experts_implementation") if like is not None else ():
        found |= {name: of_like} if (of_like := _implementations(like.config, f"_{name}"))[""] else {}
    if quantisation is not None and quantisation.get("quant_method") == "torchao":
        found["experts_implementation"] = "eager"  # of its kinds of tensors not all know what the faster ones ask
    return found


def _implementations(config: Any, name: str) -> dict[str, Any]:
    """The implementation that a config names, under the empty key, and those of its sub-configs under theirs."""
    parts = {key: part for key in config.sub_configs if (part := getattr(config, key, None)) is not None}
    return {"": getattr(config, name, None)} | {key: _implementations(part, name) for key, part in parts.items()}


def _class_to_load(checkpoint: Checkpoint, config: Any, adapters: Sequence[Adapter]) -> Any:
    """The model's class, or for layers with different numbers of experts one that builds them so."""
    cls = model_class(checkpoint, config)
    if not uneven_counts(config):
        return cls
    return uneven_class(cls, config, structure_of(cls, config, adapters, plain=True))


@torch.no_grad()
def align(model: Any) -> None:
    """Move weights to addresses that 64 divides, in place.

    What is mapped from a file lies where the file has it. Matrix products on a CPU may sum in another order there, and
    differ in the last bit from those of the same weights elsewhere: then equal models would not answer equally.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def uneven_experts(shards: list[Shard]) -> str | None:
    """Which expert lacks a tensor that the others have, or has another than they; as far as names on disk tell."""
    experts: dict[tuple[str, str], dict[str, tuple[int, ...]]] = {}
    for name, (_, shape) in (entry for shard in shards for entry in shard.tensors.items()):
        parts = re.fullmatch(r"(.*experts)\.(\d+)\.(.+)", name)
        if parts:
            experts.setdefault((parts[1], parts[3]), {})[parts[2]] = shape
    if not experts:
        return None
    usual_ids = _most_common(frozenset(shapes) for shapes in experts.values())
    for (block, leaf), shapes in experts.items():
        for expert in sorted(usual_ids ^ shapes.keys(), key=int):
            problem = "is missing" if expert in usual_ids else "belongs to no expert that is whole"
            return f"{block}.{expert}.{leaf} {problem}."
        usual = _most_common(shapes.values())
        for expert, shape in shapes.items():
            if shape != usual:
                return f"{block}.{expert}.{leaf} is {list(shape)}, that of the other experts {list(usual)}."
    return None


def _most_common(values: Iterable[_T]) -> _T:
    [(value, _)] = Counter(values).most_common(1)
    return value


def refuse_bad_keys(checkpoint: Checkpoint, info: Mapping[str, Any]) -> None:
    """Raise CheckpointError, naming some, if transformers' loading info has keys missing, mismatched or unexpected."""
    missing = sorted(info["missing_keys"])
    mismatched = sorted(
        f"{name} ({list(found)}, by its config {list(expected)})" for name, found, expected in info["mismatched_keys"]
    )
    unexpected = sorted(key for key in info["unexpected_keys"])
    for kind, keys in (
        ("are missing from", missing),
        ("have other shapes in", mismatched),
        ("are not expected in", unexpected),
    ):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise CheckpointError(
                f"{checkpoint.reference}: {len(keys)} tensor(s) {kind} the checkpoint: {', '.join(keys[:3])}{more}. "
                f"transformers would go on with random weights, or without these; we do not."
            )


def load_tokenizer(checkpoint: Checkpoint) -> Any | None:
    """The tokenizer of the folder, or None if it holds none."""
    from transformers import AutoTokenizer

    if not checkpoint.has_tokenizer:
        return None
    try:
        found = AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=checkpoint.trust_remote_code)
        found.chat_template = _chat_templates(checkpoint.folder, found.chat_template)
        return found
    except Exception as error:  # many kinds, as for configs
        raise CheckpointError(f"{checkpoint.reference}: its tokenizer cannot be loaded: {error}") from error


def _chat_templates(folder: Path, known: str | dict[str, str] | None) -> str | dict[str, str] | None:
    """A tokenizer's chat template, or its templates by name, with those that transformers does not read with a
    tokenizer: of `chat_template.json`, as processors have it, and a default beside `additional_chat_templates`.
    """
    if isinstance(known, str) or "default" in (known or {}):
        return known
    named = dict(known or {})
    for name in ("chat_template.json", "tokenizer_config.json"):
        file = folder / name
        more = json.loads(file.read_text(encoding="utf-8")).get("chat_template") if file.exists() else None
        if isinstance(more, list):
            more = {one["name"]: one["template"] for one in more}
        named = ({"default": more} if isinstance(more, str) else more or {}) | named
    return named["default"] if [*named] == ["default"] else named or None


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


# Saving ----------------------------------------------------------------------------------------------------


def journal_folder(target: Path) -> Path:
    """Where a run on this output keeps what it has done."""
    return target.parent / f".{target.name}.partial" / "journal"


def stages_folder(target: Path) -> Path:
    """Where a run on this output keeps the checkpoints between its passes."""
    return journal_folder(target).with_name("stages")


def waiting_folder(target: Path) -> Path:
    """Where hidden states wait that a run on this output does not keep in memory."""
    return journal_folder(target).with_name("waiting")


def refuse_output_over_input(output: Path, reference: str) -> None:
    """Raise RecipeError where the output would be the model's own folder, hold it, or be in it."""
    source = Path(reference).expanduser()
    if not reference or not source.is_dir():
        return
    inside, outside = output.resolve(), source.resolve()
    if inside.is_relative_to(outside) or outside.is_relative_to(inside):
        raise RecipeError(f"output {output} is the model's own folder, holds it, or is in it. Choose another one.")


class OutputFolder:
    """A folder that appears under its name only when it is whole.

    Work goes into `hidden`, a folder beside it, which one run at a time may write to, and in it the output into `path`;
    `finish` moves that to `target`. Leaving the context without that removes all of it, unless the run's `journal`
    holds work that another run can go on from: then `resume` finds it. What a run with `resume` has found there no
    error removes. An existing target is refused unless `overwrite`, and then replaced at the very end.
    """

    def __init__(self, target: Path, *, overwrite: bool = False, resume: bool = False) -> None:
        """Raises RecipeError for what cannot be asked for together."""
        if resume and overwrite:
            raise RecipeError(
                "--resume goes on with an interrupted run, --overwrite starts anew: give one of them. A run that was "
                "started with --overwrite replaces the output when it goes on, too."
            )
        self.target = target
        self.overwrite = overwrite
        self.resume = resume
        self.hidden = journal_folder(target).parent
        self.path = self.hidden / "output"
        self.journal = Journal(journal_folder(target))
        self._lock = _Lock(self.hidden / "lock")
        self._old = self.hidden / "old"
        self._may_replace = self.hidden / "may-replace"
        """There where the run was told to replace an existing target."""
        self._made: Sequence[Path] = ()
        """Folders around the target that were not there."""
        self._whole = self.hidden / "whole"
        """There when the output is: only names are to be changed then, and the rest to be removed."""

    def __enter__(self) -> OutputFolder:
        try:
            self.complete()
            self._refuse_existing()
            self._made = [parent for parent in self.hidden.parents if not parent.exists()]
            self.hidden.mkdir(parents=True, exist_ok=True)
            self._lock.take(self.target)
            self._take_over()
            (self.path / "compressor").mkdir(parents=True)
            if self.overwrite:
                self._may_replace.touch()
        except OSError as error:
            self._lock.release()
            raise self._unwritable(error) from error
        return self

    def check(self) -> None:
        """Raise what entering the context would, as far as that can be told without writing anything."""
        try:
            if self._whole.exists() and self.resume:
                return  # it only lacks its name
            self._refuse_existing()
            self._refuse_unwritable()
            self._lock.refuse_held(self.target)
        except OSError as error:
            raise self._unwritable(error) from error
        self._refuse_work_of_others()

    def _refuse_unwritable(self) -> None:
        """Raise OSError where folders around the hidden one cannot be made, or written to."""
        there, missing = self._around()
        for part in missing:
            with suppress(FileNotFoundError):
                (there / part).lstat()
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))  # a link that leads nowhere
        if not os.access(there, os.W_OK | os.X_OK):
            is_read_only = hasattr(os, "statvfs") and os.statvfs(there).f_flag & os.ST_RDONLY
            number = errno.EROFS if is_read_only else errno.EACCES
            raise OSError(number, os.strerror(number))

    def _around(self) -> tuple[Path, tuple[str, ...]]:
        """The nearest folder around the hidden one, itself included, that is there, and the names that are missing."""
        parents = [self.hidden, *self.hidden.parents]
        there = next(parent for parent in parents if parent.exists())
        return there, self.hidden.relative_to(there).parts

    def _unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self.target}: the output cannot be written there: {error.strerror}.")

    def complete(self) -> bool:
        """Give the output of a run before its name, if that was stopped when it was whole. Returns whether it was."""
        with suppress(OSError):
            self.hidden.rmdir()  # the very last that a run does; no other leaves it empty
        if not os.path.exists(self._whole):
            return False
        try:
            self._lock.take(self.target)
            self._put_in_place()
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            self._lock.release()
        return True

    def _refuse_existing(self) -> None:
        exists = self.target.exists() or self._whole.exists()
        goes_on_to_replace = self.resume and self.journal.has_work and self._may_replace.exists()
        if exists and not (self.overwrite or goes_on_to_replace):
            raise CheckpointError(
                f"{self.target} exists already. Choose another output, or pass --overwrite to replace it."
            )
        if self.target.is_symlink():
            raise CheckpointError(f"{self.target} is a link. Give the folder that it should lead to as the output.")
        if exists and not (self.target / "compressor").is_dir():
            raise CheckpointError(
                f"{self.target} was not written by compressor, so --overwrite does not replace it. Remove it yourself."
            )

    def _take_over(self) -> None:
        """What a run before has left: gone on from, or removed where nothing is lost or nothing else is wanted."""
        try:
            self._refuse_work_of_others()
        except CheckpointError:
            self._lock.release()
            raise
        self.resume = self.resume and self.journal.has_work
        gone_on_from = (self.journal.folder, stages_folder(self.target), self._may_replace)
        for path in self.hidden.iterdir():
            if path == self._lock.path or (self.resume and path in gone_on_from):
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _refuse_work_of_others(self) -> None:
        if self.journal.has_work and not (self.resume or self.overwrite):
            raise CheckpointError(
                f"{self.target}: a run that was interrupted has left its work in {self.hidden}. Go on with it by "
                f"`compressor run` and --resume, choose another output, or throw that work away with --overwrite."
            )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._lock.is_held and self.hidden.exists() and not self.keeps_after(error):
            shutil.rmtree(self.hidden, ignore_errors=True)
            for parent in self._made:
                with suppress(OSError):  # where something else is in it by now
                    parent.rmdir()
        self._lock.release()

    def keeps_after(self, error: BaseException | None) -> bool:
        """Whether what was done so far is left to go on from: there is some, and the same recipe may end otherwise, or
        a run before has left it: the error may be of this command alone.
        """
        if error is None:
            return False
        is_final = isinstance(error, _FINAL) or (
            isinstance(error, CheckpointError) and not isinstance(error, DiskError)
        )
        return self._whole.exists() or (self.journal.has_work and (self.resume or not is_final))

    def require_space(self, num_bytes: int, *, who: str = "the smaller model") -> None:
        """Raise CheckpointError if the file system has less free."""
        there, _ = self._around()
        free = shutil.disk_usage(there).free
        if free < num_bytes:
            raise CheckpointError(
                f"{self.target}: {who} needs {human_bytes(num_bytes)} of disk, {human_bytes(free)} are free."
            )

    def finish(self) -> None:
        """Give the folder its name. Stopped anywhere in here, the journal is whole or `complete` does the rest."""
        mask = os.umask(0)
        os.umask(mask)
        for path in self.path.rglob("*"):
            if not path.is_file():
                continue
            # safetensors writes files that only their owner can read; a hard link is the source's file as well
            if path.stat().st_nlink == 1:
                path.chmod(0o666 & ~mask)
            force_to_disk(path)
        note = self._whole.with_name("whole.partial")
        note.touch()
        put_in_place(note, self._whole)
        self._put_in_place()

    def _put_in_place(self) -> None:
        """Give the whole output its name, and remove all else; what of this was done already is not done again."""
        if self.path.exists():
            if self.target.exists():
                if not self._may_replace.exists():
                    raise CheckpointError(
                        f"{self.target} exists, though it did not when the run began. The run's output is whole, in "
                        f"{self.path}: remove one of the two, and run it again."
                    )
                self.target.rename(self._old)
            self.path.rename(self.target)
        others = [path for path in self.hidden.iterdir() if path not in (self._lock.path, self._whole)]
        for path in others:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        self._lock.remove()
        if not any(path.exists() for path in others):
            self._whole.unlink(missing_ok=True)
        with suppress(OSError):
            self.hidden.rmdir()


class _Lock:
    """A file that one process at a time can hold; the system lets go of it when the process ends, however it does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    @property
    def is_held(self) -> bool:
        return self._file is not None

    def take(self, target: Path) -> None:
        """Raises CheckpointError where another process holds it."""
        file = self._held(self.path.open("a+", encoding="utf-8"), target)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        self._file = file

    def refuse_held(self, target: Path) -> None:
        """The same without taking it."""
        if self.path.exists():
            self._held(self.path.open("r+", encoding="utf-8"), target).close()

    def _held(self, file: IO[str], target: Path) -> IO[str]:
        try:
            _lock_file(file)
        except OSError as error:
            file.seek(0)
            who = file.read().strip()
            file.close()
            raise CheckpointError(
                f"{target}: another run is writing this output{f' (process {who})' if who else ''}. Wait for it, or "
                f"choose another output."
            ) from error
        return file

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Release it, and leave no file."""
        self.path.unlink(missing_ok=True)
        self.release()


def _lock_file(file: IO[str]) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def disk_errors_named(target: Path) -> Iterator[None]:
    """Turn the system's errors about writing into a CheckpointError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _errno_in(str(error))
        if number not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG):
            raise
        raise DiskError(f"{target}: writing failed: {os.strerror(number)}. Nothing is left under that name.") from error


def _errno_in(message: str) -> int | None:
    """Safetensors wraps the system's errors, and only its text tells which: `… (os error 28)`."""
    found = re.search(r"\(os error (\d+)\)", message)
    return int(found[1]) if found else None


def save_checkpoint(
    model: Any,
    source: Path | None,
    folder: Path,
    counts: Mapping[ConfigLeaf, int],
    left_out: LeftOut | None = None,
) -> None:
    """Write a live model into `folder` as a checkpoint that the source's readers can read.

    `source` is the folder that the model came from: its config.json is patched with `counts` and its other files
    (tokenizer, generation config, chat template, code) are copied byte by byte. Without one, transformers' own are
    written. `left_out` is what of the source transformers did not build: config.json announces it no more.
    """
    with quiet_transformers():
        model.save_pretrained(folder)
    dtype = str(model.dtype).removeprefix("torch.")
    write_beside_weights(source, folder, model.config, dtype, counts, left_out)


def write_beside_weights(
    source: Path | None,
    folder: Path,
    config: Any,
    dtype: str | None,
    counts: Mapping[ConfigLeaf, int],
    left_out: LeftOut | None = None,
    changes: Mapping[str, Any] | None = None,
) -> None:
    """Write all that a checkpoint holds beside its weights: config.json, and the source's other files.

    `config` is that of the smaller model. `dtype` is what all weights have now, None that they have what they had;
    `changes` replace keys of the source's config.json before the rest. For the others see `save_checkpoint`.
    """
    raw = read_config(source or folder) | copy.deepcopy(dict(changes or {}))
    for leaf, value in counts.items():
        _patch_count(raw, leaf, config, value)
    raw.pop(KEY, None)
    if left_out:
        left_out.patch(raw)
    _patch_rope(raw, config.to_dict())
    _patch_dtype(raw, dtype)
    if read_entry(config):
        raw[KEY] = getattr(config, KEY)  # last, however many passes have written it
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    if source:
        files_beside(source).copy(folder)


def _patch_count(raw: dict[str, Any], leaf: ConfigLeaf, config: Any, value: int) -> None:
    """Write an integer under every name that it goes by."""
    for name in sorted(_spellings(leaf.holder(config), leaf.key)):
        _holder(raw, (*leaf.path, name))[name] = value


def _patch_rope(raw: dict[str, Any], read: Mapping[str, Any]) -> None:
    """Add the other spelling of the rotary embedding's settings, in every part that has some: `rope_parameters`, or
    `rope_theta` and `rope_scaling`. `read` is the config as transformers reads it.

    Where kinds of layers have settings of their own, those of full attention are the ones without a name, and of the
    others only the base has an older one; a `rope_scaling` there would count for all of them.
    """
    for key, part in read.items():
        if isinstance(part, dict) and isinstance(own := raw.get(key), dict) and key != "rope_parameters":
            has_some = not own.keys().isdisjoint(("rope_parameters", "rope_theta", "rope_scaling"))
            _patch_rope(own, part if has_some else {**part, "rope_parameters": None})
    rope: dict[str, Any] = read.get("rope_parameters") or {}
    has_kinds = "rope_theta" not in rope
    main, local = (rope.get(kind) or {} if has_kinds else rope for kind in ("full_attention", "sliding_attention"))
    if "rope_theta" not in main:
        return
    found = {"rope_parameters": rope, "rope_theta": main["rope_theta"]}
    if has_kinds:
        found["rope_local_base_freq"] = local.get("rope_theta")
    else:
        found["partial_rotary_factor"] = rope.get("partial_rotary_factor")
    if not has_kinds and (rope.get("rope_type", "default") != "default" or not rope.keys() <= _PLAIN_ROPE):
        found["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    raw |= {key: value for key, value in found.items() if value is not None and raw.get(key) is None}


def _patch_dtype(raw: dict[str, Any], dtype: str | None) -> None:
    """Write the dtype by both of its names, in config.json itself and in every part that names one; None leaves each
    part's own.
    """
    for part in (raw, *_parts(raw)):
        own = dtype or part.get("dtype") or part.get("torch_dtype")
        if own and (part is raw or "dtype" in part or "torch_dtype" in part):
            part |= {"dtype": own, "torch_dtype": own}


def _parts(raw: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The configs inside a config.json, at any depth; what it says of quantisation is none."""
    for key, value in raw.items():
        if isinstance(value, dict) and key not in ("quantization_config", KEY):
            yield value
            yield from _parts(value)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars, and no reports on what we look at, and refuse, ourselves."""
    from transformers.utils import logging

    enabled, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if enabled:
            with suppress(AttributeError):
                logging.enable_progress_bar()
