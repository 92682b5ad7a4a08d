"""Load a checkpoint's model and tokenizer, and refuse what transformers would only warn of."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mode
from typing import Any

import torch

from compressor.checkpoint.classes import model_class
from compressor.checkpoint.conversion import wrong_experts
from compressor.checkpoint.find import Checkpoint, load_config
from compressor.checkpoint.headers import Shard, torch_dtype
from compressor.checkpoint.quantization import (
    global_scale_problem,
    reading_problem,
    refusal,
    to_dequantise,
    without_quantisation,
)
from compressor.checkpoint.quiet import quiet_transformers
from compressor.errors import CheckpointError
from compressor.model.adapter import Adapter, structure_of
from compressor.model.config_entry import read_entry
from compressor.model.skipping.install import restore
from compressor.model.uneven import is_uneven, settle, uneven_class


def load_model(
    checkpoint: Checkpoint,
    *,
    dtype: str = "auto",
    device: str | Mapping[str, Any] = "cpu",
    like: Any = None,
    adapters: Sequence[Adapter] = (),
    to_measure: bool = False,
) -> Any:
    """Load the model. What transformers only warns of, and initialises at random, is a CheckpointError here. `like`: a
    live model whose attention and experts implementations are used. It skips as its config says, but `to_measure`. On
    `device` "meta" no weight is read; a quantised checkpoint's model is the dequantised one there, and `to_measure`
    where it can be, else as transformers' quantiser loads it. A mapping says which part goes to which device.
    """
    config, quantisation = load_config(checkpoint), checkpoint.quantisation
    as_numbers = device == "meta" or (to_measure and quantisation is not None and not reading_problem(quantisation))
    is_packed = quantisation is not None and not as_numbers
    is_mapped = device == "meta" or is_packed or isinstance(device, Mapping)
    if quantisation is not None and as_numbers:
        to_dequantise(config, quantisation)
    names = [name for shard in checkpoint.shards for name in shard.tensors]
    problem = global_scale_problem(quantisation) if quantisation is not None and is_packed else None
    if quantisation is not None and problem and any(".experts." in name for name in names):
        raise refusal(quantisation, checkpoint.reference, problem)
    cls = _class_to_load(checkpoint, config, adapters)
    tensors = _tensors_on_meta(checkpoint) if device == "meta" else None  # transformers would read the files
    try:
        with quiet_transformers():
            model, info = cls.from_pretrained(
                None if device == "meta" else checkpoint.folder,
                config=config,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                output_loading_info=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they come back in `info`, and are refused below by name
                device_map=({"": device} if isinstance(device, str) else dict(device)) if is_mapped else None,
                state_dict=tensors,
                **_implementations_to_use(like, quantisation),
            )
    except Exception as error:  # many kinds: unreadable files, uneven experts, code that comes with the model
        why = uneven_experts(checkpoint.shards) or error
        if quantisation is not None and as_numbers and why is error:
            raise refusal(quantisation, checkpoint.reference, "transformers fails to dequantise them") from error
        raise CheckpointError(f"{checkpoint.reference}: transformers cannot load it: {why}") from error
    if is_uneven(config):
        settle(model)
    refuse_bad_keys(checkpoint, info)
    if problem := wrong_experts(model, names):
        raise CheckpointError(f"{checkpoint.reference}: {problem}.")
    if device == "meta":
        model.config.name_or_path = str(checkpoint.folder)
    elif not is_packed:
        align(model)
    try:
        model = model.eval() if is_mapped else model.eval().to(device)
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(f"{checkpoint.reference}: cannot be moved to device {device!r}: {error}") from error
    if "skipping" in read_entry(config) and not to_measure:
        restore(model, structure_of(type(model), model.config, adapters), model.config)
    return model


def unquantised_skeleton(checkpoint: Checkpoint) -> Any:
    """The checkpoint's model on the meta device as its config alone has it, unquantised; nothing of it is checked."""
    config = without_quantisation(load_config(checkpoint))
    cls = _class_to_load(checkpoint, config, ())
    with torch.device("meta"), quiet_transformers():
        return cls(config)


def _tensors_on_meta(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Names, shapes and dtypes of all tensors, from the headers."""
    tensors = [entry for shard in checkpoint.shards for entry in shard.tensors.items()]
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
    """The model's class, or one that builds layers as the config has them beyond it."""
    cls = model_class(checkpoint, config)
    if not is_uneven(config):
        return cls
    return uneven_class(cls, config, structure_of(cls, config, adapters, plain=True))


@torch.no_grad()
def align(model: Any) -> None:
    """Move weights to addresses that 64 divides, in place: elsewhere matrix products may sum in another order."""
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
    usual_ids = mode(frozenset(shapes) for shapes in experts.values())
    for (block, leaf), shapes in experts.items():
        for expert in sorted(usual_ids ^ shapes.keys(), key=int):
            problem = "is missing" if expert in usual_ids else "belongs to no expert that is whole"
            return f"{block}.{expert}.{leaf} {problem}."
        usual = mode(shapes.values())
        for expert, shape in shapes.items():
            if shape != usual:
                return f"{block}.{expert}.{leaf} is {list(shape)}, that of the other experts {list(usual)}."
    return None


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
                f"{checkpoint.reference}: {len(keys)} tensor(s) {kind} the checkpoint: {', '.join(keys[:3])}{more}."
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
