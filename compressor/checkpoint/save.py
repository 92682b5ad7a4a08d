"""Write a checkpoint that the source's readers can read.

What is saved starts from the source's own config.json, with only the changed integers patched, because other readers
know other spellings of the same key than the transformers of the day writes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from compressor.checkpoint.conversion import tensors_to_save
from compressor.checkpoint.extra_layers import LeftOut, holder_of, spellings
from compressor.checkpoint.files import files_beside
from compressor.checkpoint.find import read_config
from compressor.checkpoint.quiet import quiet_transformers
from compressor.errors import CheckpointError
from compressor.model.config_entry import KEY, read_entry
from compressor.model.constants import KEY as CONSTANTS
from compressor.model.constants import replaced_experts
from compressor.model.structure import ConfigLeaf

_PLAIN_ROPE = {"rope_type", "rope_theta", "partial_rotary_factor"}
"""Rotary settings that the older spelling has outside `rope_scaling`."""


def save_checkpoint(
    model: Any,
    source: Path | None,
    folder: Path,
    counts: Mapping[ConfigLeaf, int],
    left_out: LeftOut | None = None,
    changes: Mapping[str, Any] | None = None,
) -> None:
    """Write a live model into `folder` for the source's readers: `source`'s config.json with `counts`, its other files
    byte by byte; without one transformers' own. `left_out` is announced no more; `changes`: see `write_beside_weights`.
    """
    named = model.config.dtype  # a tower may stay in float32, and the model's own word is its first parameter's
    is_there = any(one.dtype == named for one in model.parameters())
    dtype = str(named if is_there else model.dtype).removeprefix("torch.")
    with quiet_transformers():
        save_model(model, folder)  # which sets the config's dtype
    write_beside_weights(source, folder, model.config, dtype, counts, left_out, changes)


def save_model(model: Any, folder: str | Path, **options: Any) -> None:
    """Transformers' `save_pretrained`, and with experts that answer constants as well, whose names on disk it does not
    know: it would number those that stay anew, and other readers would take one for another.
    """
    if not replaced_experts(model.config):
        model.save_pretrained(folder, **options)
        return
    if options.get("state_dict") is not None:
        raise CheckpointError(
            f"{folder}: found a `state_dict` to save, and some experts answer constants: gather the weights into the "
            "model, and call `save_pretrained` without."
        )
    options |= {"state_dict": tensors_to_save(model), "save_original_format": False}
    type(model).save_pretrained(model, folder, **options)


def as_savable(model: Any) -> Any:
    """The model, which saves itself as `save_model` does where transformers alone would save it wrong."""
    if replaced_experts(model.config):
        model.save_pretrained = partial(save_model, model)
    return model


def write_beside_weights(
    source: Path | None,
    folder: Path,
    config: Any,
    dtype: str | None,
    counts: Mapping[ConfigLeaf, int],
    left_out: LeftOut | None = None,
    changes: Mapping[str, Any] | None = None,
) -> None:
    """Write all but weights. `config` is the smaller model's; `dtype` what all weights have now (None: as before);
    `changes` replace keys of the source's config.json first. For the others see `save_checkpoint`.
    """
    raw = read_config(source or folder) | copy.deepcopy(dict(changes or {}))
    for leaf, value in counts.items():
        for name in sorted(spellings(leaf.holder(config), leaf.key)):  # readers differ in the one they look for
            holder_of(raw, (*leaf.path, name))[name] = value
    raw.pop(KEY, None)
    if replaced := replaced_experts(config):
        holder_of(raw, (*next(iter(counts)).path, CONSTANTS))[CONSTANTS] = replaced
    if left_out:
        left_out.patch(raw)
    _patch_rope(raw, config.to_dict())
    _patch_dtype(raw, dtype)
    if read_entry(config):
        raw[KEY] = getattr(config, KEY)  # last, however many passes have written it
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    if source:
        files_beside(source).copy(folder)


def _patch_rope(raw: dict[str, Any], read: Mapping[str, Any]) -> None:
    """Add the other spelling of the rotary embedding's settings (`rope_parameters`, or `rope_theta` and
    `rope_scaling`), in every part; `read` is transformers' config. Of settings by kind of layer the older spelling is
    that of full attention, with nothing but the base of the others: a `rope_scaling` there would count for all.
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
    """Write the dtype by both of its names, in config.json and in each part that names one; None leaves them, and so
    does the dtype that it has: a part may have another.
    """
    dtype = None if dtype == (raw.get("dtype") or raw.get("torch_dtype")) else dtype
    for part in (raw, *_parts(raw)):
        named = part.get("dtype") or part.get("torch_dtype")  # null names none
        own = dtype or named
        if own and (part is raw or named):
            part |= {"dtype": own, "torch_dtype": own}


def _parts(raw: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The configs inside a config.json, at any depth; what it says of quantisation is none."""
    for key, value in raw.items():
        if isinstance(value, dict) and key not in ("quantization_config", KEY):
            yield value
            yield from _parts(value)
