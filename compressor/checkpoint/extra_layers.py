"""Extra prediction layers of a checkpoint (multi-token prediction, next-n heads), which transformers does not build."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from compressor.checkpoint.files import read_index
from compressor.checkpoint.find import Checkpoint, read_config

Choice = Literal["drop", "keep", "prune"]
"""What becomes of them: `edit.extra_layers` carries them over, kept or pruned."""
_EXTRA = "mtp|nextn"


@dataclass(frozen=True)
class LeftOut:
    """Extra prediction layers (multi-token prediction, next-n heads) that a checkpoint has and its class ignores. Where
    they are dropped, as transformers does, config.json must not announce them any more. Paths are config.json's.
    """

    found: Checkpoint = field(repr=False, compare=False)
    names: tuple[str, ...]
    """Of their tensors on disk."""
    num_bytes: int | None
    """None where only the index is at hand, not the weights."""
    layers: tuple[str, ...]
    announced: Mapping[tuple[str, ...], int]
    """Integers of config.json that announce the layers: they become 0."""
    padded: Mapping[tuple[str, ...], tuple[int, int]]
    """Lists of config.json with an entry for each of these layers too → their length, and the one that they get."""
    choice: Choice = "drop"

    def to_json(self) -> dict[str, Any]:
        """What the record holds; a list that is cut appears by its lengths."""
        changed = {".".join(path): [value, 0] for path, value in self.announced.items()}
        lengths = {".".join(path): list(lengths) for path, lengths in self.padded.items()}
        found = {"tensors": len(self.names), "bytes": self.num_bytes, "layers": list(self.layers), "config": changed}
        return found | ({"list_lengths": lengths} if lengths else {})

    def patch(self, raw: dict[str, Any]) -> None:
        """Take what announces the layers out of a config.json, in place, if they are dropped."""
        if self.choice != "drop":
            return
        for path in self.announced:
            holder_of(raw, path)[path[-1]] = 0
        for path, (_, length) in self.padded.items():
            holder = holder_of(raw, path)
            holder[path[-1]] = holder[path[-1]][:length]


def find_left_out(found: Checkpoint, config: Any, cls: Any, choice: Choice = "drop") -> LeftOut | None:
    """The extra prediction layers of a checkpoint that `cls` does not build, or None; by names alone, no weights."""
    shards = found.shards if found.has_weights else []
    sizes: dict[str, int | None] = dict.fromkeys(read_index(found.folder) or (), None)
    sizes |= {name: size for shard in shards for name, size in shard.sizes.items()}
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
    raw = read_config(found.folder)
    announced = _announced(raw, config)
    return LeftOut(
        found=found,
        names=tuple(names),
        num_bytes=None if None in known else sum(size for size in known if size is not None),
        layers=tuple(dict.fromkeys(prefixes[name] for name in names)),
        announced=announced,
        padded=_padded(raw, text, num_layers, max(announced.values(), default=0)),
        choice=choice,
    )


def _extra_layer(name: str, num_layers: int | None) -> str | None:
    """Path of the extra prediction layer of a tensor: behind the last layer, or called so (`mtp.`, `mtp_layers.`)."""
    parts = name.split(".")[:-1]
    for position, part in enumerate(parts):
        if re.search(_EXTRA, part) or (part.isdigit() and num_layers is not None and int(part) >= num_layers):
            return ".".join(parts[: position + 1])
        if part.isdigit():
            return None
    return None


def _announced(raw: Mapping[str, Any], config: Any) -> dict[tuple[str, ...], int]:
    """Paths in config.json of integers above 0 that announce extra layers; those that the config's class sets, too."""

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
        if _announces(key, value) and not {path[-1] for path in found} & spellings(text, key):
            found[*where, key] = value
    return found


def _announces(key: str, value: object) -> bool:
    return type(value) is int and value > 0 and bool(re.search(_EXTRA, key) and re.search("layer|module|^num_", key))


def _padded(
    raw: Mapping[str, Any], text: Any, num_layers: int | None, num_extra: int
) -> dict[tuple[str, ...], tuple[int, int]]:
    """Lists with an entry a layer that the config's class cuts itself only while extra layers are announced."""
    found: dict[tuple[str, ...], tuple[int, int]] = {}
    if num_layers is None or not num_extra:
        return found
    for path in ((), *((key,) for key, value in raw.items() if isinstance(value, dict))):
        holder = holder_of(raw, (*path, ""))
        if holder.get("num_hidden_layers") != num_layers:
            continue
        for key, value in holder.items():
            if isinstance(value, list) and len(value) == num_layers + num_extra and getattr(text, key, None) != value:
                found[*path, key] = (len(value), num_layers)
    return found


def holder_of(raw: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """The object of config.json that holds the last name of a path."""
    for name in path[:-1]:
        raw = raw[name]
    return raw


def spellings(config: Any, key: str) -> set[str]:
    """The names that an attribute of a config goes by: readers differ in the one they look for."""
    aliases = getattr(config, "attribute_map", None) or {}
    return {key, *(alias for alias, name in aliases.items() if name == key)}
