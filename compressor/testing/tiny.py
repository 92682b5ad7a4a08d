"""Tiny random models of every model type with routed experts that the installed transformers has.

A type's own default config is shrunk by rules on the names of its keys (`_SCALARS`), recursively, so that a type that
this file has never heard of comes out small as well; `_SETTINGS` adds what rules cannot know. Weights are drawn large:
routers choose differently from token to token, correction biases decide, experts matter.

    model = tiny_model("mixtral")
    logits = answers(model, tiny_inputs(model))

Not covered: images, sounds and videos (composites answer to text alone; their towers are built, and not run).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES, model_type_to_module_name

VOCAB_SIZE = 128
HIDDEN_SIZE = 64
HEAD_DIM = 16
NUM_HEADS = 4
NUM_LAYERS = 3
LARGEST_TEXT_ID = 99  # ids above are left to placeholders for images and the like

# The Auto classes that are asked for a type's class, in this order.
_AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMultimodalLM",
    "AutoModelForTokenClassification",
    "AutoModel",
)


# --- Which types, and their classes -----------------------------------------------------------------------------------


@functools.cache
def candidate_types() -> tuple[str, ...]:
    """Model types of the installed transformers that may have routed experts, in alphabetical order.

    Those whose class is written in a file that speaks of experts, or that imports from such a file. Found by reading
    the source text; no model is imported. A few have no routed experts after all.
    """
    return tuple(sorted(name for name in CONFIG_MAPPING_NAMES if _class_names(name) and _mentions_experts(name)))


def auto_class(model_type: str) -> type:
    """The Auto class to load a checkpoint of this type with.

    The first, in the order of `_AUTO_CLASSES`, that has a class made for this type's whole config; if there is none,
    the first that has a class.

    Raises:
        ValueError: transformers has no such type, or no class for it.
    """
    return _auto_and_model_class(model_type)[0]


def model_class(model_type: str) -> type[PreTrainedModel]:
    """The class that `auto_class` makes for this type.

    Raises:
        ValueError: transformers has no such type, or no class for it.
    """
    return _auto_and_model_class(model_type)[1]


def _auto_and_model_class(model_type: str) -> tuple[type, type[PreTrainedModel]]:
    found = [
        (getattr(transformers, auto_name), getattr(transformers, class_name))
        for auto_name, class_name in _class_names(model_type).items()
    ]
    if not found:
        raise ValueError(f"transformers {transformers.__version__} has no model class for type {model_type!r}.")
    whole = CONFIG_MAPPING[model_type]
    # A composite's type may name its text model first (AutoModelForCausalLM, llama4): that takes only a part of it.
    return next((pair for pair in found if pair[1].config_class is whole), found[0])


def _class_names(model_type: str) -> dict[str, str]:
    """Auto class name → model class name."""
    found = {}
    for auto_name in _AUTO_CLASSES:
        names = getattr(modeling_auto, auto_name)._model_mapping._model_mapping.get(model_type)
        if names is not None:
            found[auto_name] = names if isinstance(names, str) else names[0]
    return found


def _mentions_experts(model_type: str) -> bool:
    return _text_mentions_experts(model_type_to_module_name(model_type))


@functools.cache
def _text_mentions_experts(module: str) -> bool:
    files = sorted((Path(transformers.__file__).parent / "models" / module).glob("modeling_*.py"))
    for file in files:
        text = file.read_text(encoding="utf-8")
        if re.search(r"expert|moe", text, re.IGNORECASE):
            return True
        if "AutoModel" in text:
            return True
    return False


# --- Configs ----------------------------------------------------------------------------------------------------------

# Keys that hold how many experts there are, how many a token gets, and how they are grouped.
_EXPERTS = re.compile(r"(moe_)?(num|n)(_local|_routed)?_experts")
_TOP_K = re.compile(r"(num_experts_per_tok(en)?|(moe_)?(top_?k|k)(_experts)?)")

# What a key of this name (in full) becomes, given its default; the first that matches counts. Only positive whole
# numbers are shrunk, None stays None.
_SCALARS: tuple[tuple[str, Callable[[int], int]], ...] = (
    (r"(n_group|num_expert_group)", lambda _: 2),
    (r"topk_group", lambda _: 1),
    (r".*(mtp|nextn).*", lambda _: 0),
    (r".*shared_experts?", lambda _: 1),
    (r"(first_k_dense_replace|num_dense_layers|moe_layer_start_index)", lambda old: min(old, 1)),
    (r"moe_layer_end_index", lambda _: NUM_LAYERS - 1),
    (r"(.*_sparse_step|.*_layer_period|layer_group_size|.*_every_n_layers|.*_pattern|no_rope.*interval)", lambda old: min(old, 2)),
    (r".*_layer_offset", lambda _: 1),
    (r"num_sparse_(en|de)coder_layers", lambda _: 2),
    (r"(num_)?((en|de)coder_)(layers)", lambda _: 4),
    (r"(num_hidden_layers|n_layers?|num_layers)", lambda _: NUM_LAYERS),
    (r"depth", lambda _: 2),
    (r".*vocab_size.*", lambda _: VOCAB_SIZE),
    (r".*shared.*intermediate_size|share_expert_dim", lambda _: 40),
    (r"(moe_intermediate_size|expert_ffn_hidden_size)", lambda _: 32),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|mlp_dim|d_ff).*", lambda _: 48),
    (r"qk_(rope|nope)_head_dim", lambda _: 8),
    (r".*(head_dim|d_kv|kv_channels|d_head)", lambda _: HEAD_DIM),
    (r".*lora_rank", lambda _: 16),
    (r".*(hidden_size|d_model|hidden_dim).*", lambda _: HIDDEN_SIZE),
    (r".*(n_heads?|num_heads|attention_heads|(key|value|kv)_heads)", lambda old: min(old, NUM_HEADS)),
    (r"sliding_window.*|attention_chunk_size", lambda _: 8),
)
_ZEROED = re.compile(r".*(dropout|pdrop|layerdrop|jitter|drop_path).*")
_TOKEN_ID = re.compile(r".*_(token_id|token_index|token_ids|id)|bo._.*|eo._.*")

# Per model type: settings that the rules cannot know. Keys of a part are written `text_config.key`.
_SETTINGS: dict[str, dict[str, Any]] = {}


def tiny_config(model_type: str, *, num_experts: int = 8, top_k: int = 2, **changes: Any) -> PreTrainedConfig:
    """A config of a few small layers, at least two of them with experts.

    Args:
        model_type: As in `candidate_types()`.
        num_experts: Routed experts in each layer.
        top_k: Experts that a token is sent to, where the type has a key for it.
        **changes: Settings that replace or add to these, in the part of the config that counts the experts.

    Raises:
        ValueError: transformers has no such type.
    """
    if model_type not in CONFIG_MAPPING_NAMES:
        raise ValueError(f"transformers {transformers.__version__} has no model type {model_type!r}.")
    shrink = _Shrink(num_experts, top_k, changes)
    config = shrink.config(CONFIG_MAPPING[model_type](), model_type)
    config._attn_implementation = "eager"
    return config


class _Shrink:
    """The rules, applied to one config with all of its parts."""

    def __init__(self, num_experts: int, top_k: int, changes: dict[str, Any]) -> None:
        self.num_experts = num_experts
        self.top_k = top_k
        self.changes = changes
        self.token_ids: dict[int, int] = {}

    def config(self, default: Any, model_type: str) -> Any:
        plain = type(default)()
        settings: dict[str, Any] = {}
        names = [field.name for field in dataclasses.fields(type(default))]
        class_defaults = {field.name: field.default for field in dataclasses.fields(type(default))}
        for name in names:
            old = getattr(default, name, None)
            if isinstance(old, PreTrainedConfig):
                settings[name] = self.config(old, old.model_type)
                continue
            new = self.value(name, old, class_defaults[name], default)
            if new is not _KEEP:
                settings[name] = new
            elif old != getattr(plain, name, None):
                settings[name] = old
        if any(_EXPERTS.fullmatch(name) for name in names):
            settings |= self.changes
        settings |= _SETTINGS.get(model_type, {})
        return type(default)(**settings)

    def value(self, name: str, old: Any, class_default: Any, config: Any) -> Any:
        if _EXPERTS.fullmatch(name):
            return self.num_experts
        if _TOP_K.fullmatch(name):
            return self.top_k
        if name in {"n_group", "num_expert_group"}:
            return 2
        if name == "topk_group":
            return 1
        if isinstance(old, (list, tuple)) and len(old) > 1:
            return self.list_value(name, list(old), config)
        if class_default is None:
            return _KEEP
        if isinstance(old, (int, float)) and not isinstance(old, bool) and _ZEROED.fullmatch(name):
            return type(old)(0)
        if isinstance(old, bool) or not isinstance(old, int) or old <= 0:
            return _KEEP
        if _TOKEN_ID.fullmatch(name):
            return self.token_id(old)
        for pattern, rule in _SCALARS:
            if re.fullmatch(pattern, name):
                new = rule(old)
                if "key_value_heads" in name or name == "kv_n_heads":
                    heads = getattr(config, "num_attention_heads", old)
                    new = NUM_HEADS if hasattr(config, "kv_lora_rank") or old == heads else min(old, 2)
                return new
        return _KEEP

    def token_id(self, old: int) -> int:
        if old <= 2:
            return old
        return self.token_ids.setdefault(old, VOCAB_SIZE - 1 - len(self.token_ids))

    def list_value(self, name: str, old: list[Any], config: Any) -> Any:
        num_layers = getattr(config, "num_hidden_layers", None)
        if len(old) != num_layers:
            return _KEEP
        if old == list(range(len(old))):
            return list(range(NUM_LAYERS))
        if "heads" in name:
            return [NUM_HEADS] * NUM_LAYERS
        kinds = list(dict.fromkeys(old))
        return [*kinds, *[kinds[-1]] * NUM_LAYERS][:NUM_LAYERS]


_KEEP = object()


# --- Models -----------------------------------------------------------------------------------------------------------


def tiny_model(
    model_type: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A model with random weights, in evaluation mode.

    Args:
        model_type: As in `candidate_types()`.
        dtype: Of the weights; those that transformers keeps in float32 at all times stay so.
        seed: Equal seeds give equal weights.
        **changes: As in `tiny_config`, its `num_experts` and `top_k` among them.
    """
    config = tiny_config(model_type, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(model_type)._from_config(config, dtype=dtype)
    randomise(model, seed=seed)
    return model.eval()


@torch.no_grad()
def randomise(model: torch.nn.Module, *, seed: int = 0) -> None:
    """Draw all weights anew, in place.

    Weights N(0, 1/fan-in), those of routers three times that, biases of every kind N(0, 0.3²); norms stay as they are.
    Whole numbers that name experts become other experts, distinct in each row.
    """
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) in seen or "inv_freq" in name:
            continue
        seen.add(id(tensor))
        if name.endswith("tid2eid"):
            num_experts = max(int(getattr(model.config, "n_routed_experts", 8)), tensor.shape[-1])
            tensor.copy_(torch.rand(tensor.shape[0], num_experts, generator=generator).argsort(-1)[:, : tensor.shape[-1]])
        if not tensor.is_floating_point():
            continue
        leaf = name.rpartition(".")[2]
        if "bias" in leaf:
            tensor.normal_(0.0, 0.3, generator=generator)
        elif tensor.dim() >= 2:
            gain = 3.0 if re.search(r"(gate|router)\.(\w+\.)?weight$", name) else 1.0
            tensor.normal_(0.0, gain * tensor.shape[-1] ** -0.5, generator=generator)


def tiny_inputs(model: PreTrainedModel, *, batch: int = 2, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Text that the model's forward takes: random token ids [batch, length], int64, no padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, LARGEST_TEXT_ID + 1, (batch, length), generator=generator)
    inputs = {"input_ids": ids.to(model.device)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(0, 1).to(model.device)
    return inputs


@torch.no_grad()
def answers(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Logits [batch, length, vocabulary], or the last hidden states [batch, length, hidden] of a model without a head.

    The same for the same weights and inputs.
    """
    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = model(**inputs, **extra)
    found = output.get("logits", None)
    return found if found is not None else output["last_hidden_state"]
