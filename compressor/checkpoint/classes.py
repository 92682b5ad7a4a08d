"""Which of transformers' classes a checkpoint is a model of."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

from compressor.checkpoint.find import Checkpoint
from compressor.errors import UnsupportedModelError

_AUTO_FIRST = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMultimodalLM",
)


def model_class(checkpoint: Checkpoint, config: Any) -> Any:
    """The class to build: the checkpoint's own code if it may run, else what `architectures` names, else the first Auto
    class that knows the config, language models first. Raises UnsupportedModelError without one, or a forward.
    """
    _, first = first_class(config) or (None, None)
    cls = _remote_class(checkpoint, config) or _named_class(config) or first
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


def first_class(config: Any) -> tuple[str, Any] | None:
    """The first Auto class that knows a config, and what it makes of it, language models first; None without one."""
    return next(((name, classes[0]) for name, classes in _auto_classes(config)), None)


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
    """Each Auto class that knows this config, with its classes; none that is of a part of it (a composite's text)."""
    from transformers.models.auto import modeling_auto

    parts = [type(getattr(config, name, None)) for name in getattr(config, "sub_configs", ())]

    def is_of_it(cls: Any) -> bool:
        kind = getattr(cls, "config_class", None)  # of a model that another one's class builds, that other one's
        return isinstance(config, kind or object) or (is_of_transformers and kind not in parts)

    for name in _auto_names():
        mapping = getattr(modeling_auto, name)._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            classes = found if isinstance(found, tuple | list) else (found,)
            is_of_transformers = config.model_type in mapping._model_mapping
            if own := [one for one in classes if is_of_it(one)]:
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


def _runnable_parts(config: Any) -> str:
    """A sentence that names the sub-models that can be run, where there are any."""
    parts = {name.removesuffix("_config"): first_class(getattr(config, name, None)) for name in config.sub_configs}
    runnable = [
        f"its `{name}` (load it with {found[1].__name__}, save it with `save_pretrained`)"
        for name, found in parts.items()
        if found and found[1].forward is not torch.nn.Module.forward and found[1].can_generate()
    ]
    return f" What can be compressed is {' or '.join(runnable)}." if runnable else ""


def architecture(config: Any) -> str:
    return str((getattr(config, "architectures", None) or [config.model_type])[0])
