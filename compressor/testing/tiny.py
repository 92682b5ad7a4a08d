"""Tiny random models of every model type with routed experts that the installed transformers has.

A type's own default config is shrunk by rules on the names of its keys (`_SIZES`), part by part, so that a type that
this file has never heard of comes out small as well; `_SETTINGS` adds what rules cannot know. Weights are drawn large:
routers choose differently from token to token, correction biases decide, experts matter.

    model = tiny_model("mixtral")
    logits = answers(model, tiny_inputs(model))

    model.save_pretrained(folder)
    same = auto_class("mixtral").from_pretrained(folder, attn_implementation="eager")
    align(same)  # of `compressor.checkpoint.quiet`: then it answers the same to the last bit

Not covered: images, sounds and videos (composites answer to text alone; their towers are built, and not run), and
qwen3_omni_moe, which builds and has no forward. The routers of nllb-moe and switch_transformers turn themselves into
float32 at their first forward, whatever the dtype.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from compressor.checkpoint.classes import first_class
from compressor.checkpoint.quiet import quiet_transformers

VOCAB_SIZE = 128
LARGEST_TEXT_ID = 99  # the ids above it are left to placeholders for images and the like
HIDDEN_SIZE = 64
HEAD_DIM = 16
ROTARY_HEAD_DIM = 8  # of each half of a head in latent attention
NUM_HEADS = 4
NUM_LAYERS = 3

_LEFT_ALONE = object()

# --- Which types, and their classes -----------------------------------------------------------------------------------


@functools.cache
def candidate_types() -> tuple[str, ...]:
    """Model types of the installed transformers, sorted, whose default config counts experts, itself or in a part."""
    return tuple(sorted(name for name in CONFIG_MAPPING_NAMES if _may_have_experts(name)))


def _may_have_experts(model_type: str) -> bool:
    try:
        with quiet_transformers():
            config = CONFIG_MAPPING[model_type]()
    except Exception:  # of some the default is none that the class takes
        return False
    return any(_counts_experts(part) for _, part in _parts(config)) and first_class(config) is not None


def auto_class(model_type: str) -> Any:
    """The Auto class for checkpoints of this type. Raises ValueError where transformers has none."""
    return getattr(transformers, _classes(model_type)[0])


def model_class(model_type: str) -> type[PreTrainedModel]:
    """The class that `auto_class` makes of this type's config. Raises ValueError as it does."""
    return _classes(model_type)[1]


def _classes(model_type: str) -> tuple[str, type[PreTrainedModel]]:
    found = first_class(CONFIG_MAPPING[model_type]()) if model_type in CONFIG_MAPPING_NAMES else None
    if found is None:
        raise ValueError(f"transformers {transformers.__version__} has no model class for the type {model_type!r}.")
    return found


# --- Configs ----------------------------------------------------------------------------------------------------------

_NUM_EXPERTS = re.compile(r"(moe_)?(num|n)(_local|_routed)?_experts")
_TOP_K = re.compile(r"num_experts_per_tok(en)?|(moe_)?(top_?k|k)(_experts)?")
_NUM_GROUPS = re.compile(r"n_group|num_expert_groups?")
_GROUPS_KEPT = re.compile(r"topk_group")
_NUM_LAYERS = re.compile(r"num_hidden_layers|n_layers?|num_layers")
_KEY_VALUE_HEADS = re.compile(r"num_key_value_heads|kv_n_heads|num_kv_heads")
_LAYER_NUMBERS = re.compile(r".*only_layers")
_SWITCHED_OFF = re.compile(r".*(dropout|pdrop|layerdrop|jitter|drop_path).*")
_TOKEN_ID = re.compile(r".*(token|codec|speaker).*_ids?|.*token_index")
_TOWER = re.compile(r".*(vision|audio|image|video|speech|wav|timestamp).*")

# A key of this name (in full) gets a size made from its default; the first that matches counts. Only positive whole
# numbers are changed: 0, None and flags say what a layer has, not how large it is.
_SIZES: tuple[tuple[str, Callable[[int], int]], ...] = (
    (r".*(mtp|nextn).*", lambda _: 0),
    (r".*shared_experts", lambda _: 1),
    (r"zero_expert_num", lambda _: 4),
    (r"num_dense_layers|moe_layer_start_index|.*_layer_offset", lambda old: min(old, 1)),
    (r".*(_sparse_step|_layer_period|_group_size|_every_n_layers|_pattern|_interval)", lambda old: min(old, 2)),
    (r"num_sparse_(en|de)coder_layers|depth", lambda old: min(old, 2)),
    (r"(en|de)coder_layers", lambda _: 4),
    (r".*vocab_size.*|codebook_size", lambda _: VOCAB_SIZE),
    (r".*(max_position_embeddings|max_seq_len|model_max_length)", lambda old: min(old, 512)),
    (r"num_position_embeddings|position_embedding_size", lambda old: min(old, 256)),
    (r".*shared.*intermediate_size|share_expert_dim", lambda _: 40),
    (r"moe_intermediate_size|expert_ffn_hidden_size", lambda _: 32),
    (r".*(intermediate_size|ffn_dim|ffn_hidden_size|mlp_dim|d_ff).*", lambda _: 48),
    (r"q_lora_rank", lambda _: 24),
    (r".*lora_rank|hc_lowrank|mamba_dt_rank", lambda _: 16),
    (r".*qk_(rope|nope)_head_dim", lambda _: ROTARY_HEAD_DIM),
    (r".*(head_dim|d_kv|kv_channels|d_head)", lambda _: HEAD_DIM),
    (r".*(hidden_size|d_model|hidden_dim).*", lambda _: HIDDEN_SIZE),
    (r".*(n_heads?|num_heads|attention_heads|(key|value|kv)_heads)", lambda old: min(old, NUM_HEADS)),
    (r"n_groups|mamba_n_groups", lambda old: min(old, 2)),
    (r"(mamba_)?expand", lambda _: 1),
    (r"sliding_window.*|attention_chunk_size|(mamba_)?chunk_size|block_size", lambda old: min(old, 8)),
)
# More of these, in towers for images and sounds alone: widths of layers, and not of what goes in.
_TOWER_SIZES: tuple[tuple[str, Callable[[int], int]], ...] = (
    *_SIZES,
    (r".*(output|input|in|out|decoder|embed)_(dim|size|channels)", lambda old: min(old, HIDDEN_SIZE)),
)
_TOWER_WIDTHS = re.compile(r".*(hidden_sizes|channels)")

# Only where a type's default is None, and its code takes no None.
_FILLED: dict[str, Any] = {"head_dim": HEAD_DIM, "moe_intermediate_size": 32, "n_shared_experts": 1}

# Experts are an option of these, off by default; full attention has wider heads.
_GEMMA = {"enable_moe_block": True, "per_layer_config": {layer: {"head_dim": 2 * HEAD_DIM} for layer in (1, 2)}}
# What rules cannot know, per model type of a config or of a part of it; `part.key` where the part has no own type.
_SETTINGS: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config.rope_theta": 10000.0,  # the model reads it, the config lacks it
        "attn_config.clip_qkv": 8.0,  # None by default, which does not run
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse", "sparse"]},  # None by default, which does not run
    "deepseek_v2": {"topk_method": "group_limited_greedy"},  # without it, groups do nothing
    "deepseek_v4": {"head_dim": 64},  # an eighth of it is rotated
    "diffusion_gemma": {"canvas_length": 8},
    "diffusion_gemma_text": _GEMMA,
    "dots3_note_text": {  # sliding layers have sizes of their own, given under these names
        "swa_num_attention_heads": NUM_HEADS,
        "swa_num_key_value_heads": NUM_HEADS,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 2 * ROTARY_HEAD_DIM,
        "swa_qk_nope_head_dim": ROTARY_HEAD_DIM,
        "swa_v_head_dim": HEAD_DIM,
        "per_layer_config": _LEFT_ALONE,
    },
    "dots3_note_vision_encoder": {"per_layer_config": {layer: {"num_local_experts": 4} for layer in (1, 2)}},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [32, 24],  # of experts for text, and for images
        # half of a head falls to height, width and time
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
    },
    "gemma4_text": _GEMMA,
    "glm4v_moe_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 2],  # half of what is rotated of a head falls to time, height and width
        }
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "inkling_vision": {"num_hidden_layers": 4, "patch_size": 4},  # each layer multiplies widths; patches must suit them
    "jamba": {"num_hidden_layers": 4},  # every other layer has experts
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},  # None by default, which does not run
    "qwen3_omni_moe": {
        "talker_config.spatial_merge_size": 2,  # the model reads it, the config lacks it
        "talker_config.text_config.shared_expert_intermediate_size": 40,  # likewise
    },
    "qwen4_exp_text": {  # None by default, which does not run
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "step3p5": {  # the text part of step3p7: layers of one kind by default, which does not run without a window either
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "sliding_window": 8,
        "num_sliding_attention_heads": 2,
    },
    "zaya": {"num_experts_per_tok": 1},  # takes no other number
}


def tiny_config(model_type: str, *, num_experts: int = 8, top_k: int = 2, **changes: Any) -> PreTrainedConfig:
    """A config of a few small layers, at least two with `num_experts` routed experts; in groups, where a type knows
    groups. `top_k` has no effect for types that fix it (switch_transformers, zaya: 1). `changes` replace settings in
    the part that counts the experts, or the nearest around it with such a key. Raises ValueError where transformers has
    no such type, or its config no such key.
    """
    if model_type not in CONFIG_MAPPING_NAMES:
        raise ValueError(f"transformers {transformers.__version__} has no model type {model_type!r}.")
    default = CONFIG_MAPPING[model_type]()
    shrinking = _Shrinking(num_experts, top_k, _placed(default, changes))
    config: PreTrainedConfig = shrinking.config(default)
    config._attn_implementation = "eager"
    return config


def _placed(default: Any, changes: Mapping[str, Any]) -> dict[tuple[str, ...], dict[str, Any]]:
    """Which part takes which change: path of the part → settings."""
    parts = dict(_parts(default))
    counting = [path for path, part in parts.items() if not _is_tower(path) and _counts_experts(part)] or [()]
    placed: dict[tuple[str, ...], dict[str, Any]] = {}
    for key, value in changes.items():
        takers = set()
        for path in counting:
            outwards = [path[:length] for length in range(len(path), -1, -1)]
            takers |= set([around for around in outwards if _knows(parts[around], key)][:1])
        if not takers:
            raise ValueError(f"The config of {default.model_type!r} has no key {key!r}.")
        for path in takers:
            placed.setdefault(path, {})[parts[path].attribute_map.get(key, key)] = value
    return placed


def _parts(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value, (*path, name))


def _counts_experts(config: Any) -> bool:
    return any(_NUM_EXPERTS.fullmatch(name) for name in vars(config))


def _knows(config: Any, key: str) -> bool:
    return key in vars(config) or key in config.attribute_map or isinstance(getattr(type(config), key, None), property)


def _is_tower(path: tuple[str, ...]) -> bool:
    return any(_TOWER.fullmatch(name) for name in path)


class _Shrinking:
    """The rules, applied to one config in all its parts."""

    def __init__(self, num_experts: int, top_k: int, changes: dict[tuple[str, ...], dict[str, Any]]) -> None:
        self.num_experts = num_experts
        self.top_k = top_k
        self.changes = changes
        self.token_ids: dict[int, int] = {}  # default → tiny, the same in all parts

    def config(self, default: Any, path: tuple[str, ...] = (), given: Mapping[str, Any] | None = None) -> Any:
        """A small config of the class of `default`, made anew, so that the class derives and checks the rest."""
        kind = type(default)
        special = _SETTINGS.get(default.model_type, {}) | dict(given or {})
        part = _Part(default, is_tower=_is_tower(path))
        part.num_layers = special.get("num_hidden_layers", part.num_layers)
        fields = {field.name: field.default for field in dataclasses.fields(kind)}
        usual = _values(kind())
        settings = {}
        for name, old in part.values.items():
            if isinstance(old, PreTrainedConfig):
                inner = {key.partition(".")[2]: special[key] for key in special if key.startswith(f"{name}.")}
                settings[name] = self.config(old, (*path, name), inner)
            elif name in fields:
                new = self.value(name, old, part, is_derived=fields[name] is None)
                if new is not _LEFT_ALONE:
                    settings[name] = new
                elif old != usual.get(name):
                    settings[name] = old
        settings |= {key: value for key, value in special.items() if "." not in key}
        settings |= self.changes.get(path, {})
        return kind(**{key: value for key, value in settings.items() if value is not _LEFT_ALONE})

    def value(self, name: str, old: Any, part: _Part, *, is_derived: bool) -> Any:
        """What a key becomes, or `_LEFT_ALONE`; `is_derived`: the class works it out from other keys."""
        if _NUM_EXPERTS.fullmatch(name):
            return min(old, 8) if part.is_tower else self.num_experts
        if _TOP_K.fullmatch(name):
            return self.top_k
        if _NUM_GROUPS.fullmatch(name):
            return 2
        if _GROUPS_KEPT.fullmatch(name) or name == "first_k_dense_replace":
            return 1
        if old is None:
            return _FILLED.get(name, _LEFT_ALONE)
        if _TOKEN_ID.fullmatch(name):
            return [self.token_id(each) for each in old] if isinstance(old, list) else self.token_id(old)
        if isinstance(old, list | tuple):
            return part.shrunk_list(name, list(old))
        if is_derived or isinstance(old, bool) or not isinstance(old, int | float):
            return _LEFT_ALONE
        if _SWITCHED_OFF.fullmatch(name):
            return type(old)(0)
        return part.size(name, old) if isinstance(old, int) and old > 0 else _LEFT_ALONE

    def token_id(self, old: Any) -> Any:
        if not isinstance(old, int) or old <= 2:
            return old
        return self.token_ids.setdefault(old, VOCAB_SIZE - 1 - len(self.token_ids))


class _Part:
    """A default config, or a part of one, and how many layers are left of it."""

    def __init__(self, default: Any, *, is_tower: bool) -> None:
        self.values = _values(default)
        self.is_tower = is_tower
        total = next((old for name, old in self.values.items() if _NUM_LAYERS.fullmatch(name)), None)
        # name → kinds of layers, in the order in which they first appear
        self.per_layer = {
            name: [] if list(old) == list(range(len(old))) else list(dict.fromkeys(old))
            for name, old in self.values.items()
            if isinstance(old, list | tuple) and (len(old) == total or name == "layers_block_type")
        }
        kinds = [len(kinds) + (_with_experts(kinds) != kinds[-1]) for kinds in self.per_layer.values() if kinds]
        self.num_layers = max([NUM_LAYERS, *kinds])

    def shrunk_list(self, name: str, old: list[Any]) -> Any:
        if self.is_tower and _TOWER_WIDTHS.fullmatch(name):
            return [width * HIDDEN_SIZE // max(old) for width in old]
        if name in self.per_layer:
            return self.per_layer_list(name)
        if _LAYER_NUMBERS.fullmatch(name) and old:
            return [0]
        return _LEFT_ALONE

    def per_layer_list(self, name: str) -> list[Any]:
        """A value for each layer: every kind of layer once, then more of those with experts."""
        kinds = self.per_layer[name]
        if "heads" in name:
            return [NUM_HEADS] * self.num_layers
        if not kinds:
            return list(range(self.num_layers))
        return [*kinds, *[_with_experts(kinds)] * self.num_layers][: self.num_layers]

    def size(self, name: str, old: int) -> Any:
        if _NUM_LAYERS.fullmatch(name):
            return self.num_layers
        if _KEY_VALUE_HEADS.fullmatch(name):
            return NUM_HEADS if old == self.values.get("num_attention_heads") else min(old, 2)
        if name == "head_dim" and old == self.values.get("qk_rope_head_dim"):
            return ROTARY_HEAD_DIM
        sizes = _TOWER_SIZES if self.is_tower else _SIZES
        return next((size(old) for pattern, size in sizes if re.fullmatch(pattern, name)), _LEFT_ALONE)


def _values(config: Any) -> dict[str, Any]:
    """A config's settings by the names of its fields; read past the guard of those that differ between layers."""
    alias = {kept: name for name, kept in config.attribute_map.items()}
    fields = {field.name for field in dataclasses.fields(config)}
    values = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    return {name if name in fields else alias.get(name, name): value for name, value in values.items()}


def _with_experts(kinds: list[Any]) -> Any:
    """The kind of layer that has experts; the last where names do not tell."""
    return next((kind for kind in reversed(kinds) if re.search("moe|sparse$", str(kind))), kinds[-1])


# --- Models -----------------------------------------------------------------------------------------------------------

_ROUTER_WEIGHT = re.compile(r"(.*\.)?(gate|router)(\.\w+)*\.weight")


def tiny_model(
    model_type: str,
    *,
    num_experts: int = 8,
    top_k: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: Any,
) -> PreTrainedModel:
    """A model with random weights on the CPU, in evaluation mode, of a `tiny_config`. `dtype` is that of the weights,
    but of those that transformers keeps in float32; equal seeds give equal weights, rounded to it.
    """
    config = tiny_config(model_type, num_experts=num_experts, top_k=top_k, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class(model_type)._from_config(config, dtype=dtype)
    _keep_in_float32(model, dtype)
    randomise(model, seed=seed)
    return model.eval()


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Turn into float32, in place, what `from_pretrained` keeps so and a freshly made model does not."""
    patterns = [re.compile(pattern.replace("*", ".*")) for pattern in model._get_dtype_plan(dtype)]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and any(pattern.search(name) for pattern in patterns):
            tensor.data = tensor.data.float()


@torch.no_grad()
def randomise(model: torch.nn.Module, *, seed: int = 0) -> None:
    """Draw all weights anew, in place.

    Weights N(0, 1/fan-in) with the last dimension as fan-in, those of routers three times that; biases of every kind
    N(0, 0.3²), but of what all tokens carry on 0.03², lest they be all alike; scales of single experts uniform in
    [0.5, 1.5]. Norms and all other vectors stay as they are. A table that names experts (`tid2eid`, int64
    [vocabulary, K]) gets random ones, distinct in each row.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if "bias" in leaf:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        elif "per_expert" in leaf:
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
        elif parameter.dim() >= 2:
            gain = 3.0 if _ROUTER_WEIGHT.fullmatch(name) else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * gain * parameter.shape[-1] ** -0.5)
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        if leaf == "balancing_biases":  # zaya writes the last one, for skipping all experts, anew on every load
            buffer[:-1] = torch.randn(buffer[:-1].shape, generator=generator) * 0.3
        elif "bias" in leaf:
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
        elif leaf == "tid2eid":
            rows, top_k = buffer.shape
            num_experts = int(model.get_submodule(owner).num_experts)  # type: ignore[arg-type]
            buffer.copy_(torch.rand(rows, num_experts, generator=generator).argsort(dim=-1)[:, :top_k])


def tiny_inputs(model: PreTrainedModel, *, batch: int = 2, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Text that the model's forward takes: random token ids, int64 [batch, length], without padding or placeholders."""
    generator = torch.Generator().manual_seed(seed)

    def token_ids() -> Tensor:
        return torch.randint(3, LARGEST_TEXT_ID + 1, (batch, length), generator=generator).to(model.device)

    inputs = {"input_ids": token_ids()}
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        inputs["decoder_input_ids"] = token_ids()
    return inputs


@torch.no_grad()
def answers(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """What the model says: logits [batch, length, vocabulary], or hidden states of a class without a head."""
    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = model(**inputs, **extra)
    found: Tensor = output["logits"] if "logits" in output else output["last_hidden_state"]
    return found
