"""Tiny random models of every architecture that the tests run through, made on the spot and kept for the session.

`tiny_folder(name)` is a checkpoint on disk, `tiny_model(name, dtype)` a fresh copy of what transformers loads from it.
Everything random is large: routers choose differently from token to token, correction biases decide, experts matter.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 64
REMOTE_CODE = Path(__file__).with_name("remote_code")

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
_LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
_DEEPSEEK = _LATENT_ATTENTION | {
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_QWEN = {"intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 8, "head_dim": 8}

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}

# name → (model type, settings)
_NATIVE: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"intermediate_size": 24, "num_local_experts": 8}),
    "qwen2_moe": ("qwen2_moe", _QWEN | {"shared_expert_intermediate_size": 40, "norm_topk_prob": False}),
    "qwen3_moe": ("qwen3_moe", _QWEN | {"norm_topk_prob": True}),
    "qwen3_moe_not_normalised": ("qwen3_moe", _QWEN | {"norm_topk_prob": False}),
    "olmoe": ("olmoe", {"intermediate_size": 24, "num_experts": 8}),
    "granitemoe": ("granitemoe", {"intermediate_size": 24, "num_local_experts": 8}),
    "phimoe": ("phimoe", {"intermediate_size": 24, "num_local_experts": 8}),
    "deepseek_v2": (
        "deepseek_v2",
        _DEEPSEEK | {"topk_method": "greedy", "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5},
    ),
    "deepseek_v2_groups": (
        "deepseek_v2",
        _DEEPSEEK | {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    ),
    "deepseek_v3": ("deepseek_v3", _DEEPSEEK | {"n_group": 2, "topk_group": 1}),
    "gpt_oss": ("gpt_oss", {"intermediate_size": 24, "num_local_experts": 8, "head_dim": 8, "rope_parameters": _YARN}),
    "glm4_moe": ("glm4_moe", _DEEPSEEK | {"n_group": 1, "topk_group": 1}),
}
_REMOTE = {"mixtral4": "mixtral4", "deepseek4": "deepseek4"}
ARCHITECTURES = (*_NATIVE, *_REMOTE)
FEW = ("mixtral", "qwen2_moe", "phimoe", "deepseek_v3", "gpt_oss", "mixtral4", "deepseek4")
"""One of each: the plain case; weights that are not renormalised, with a shared expert; no closed rule; groups with a
bias; biases of experts and router; experts in a list; a list with groups' code. What the checks of every architecture
prove of all (tests/testing) is looked at more closely on these.
"""
DTYPES = ("float32", "bfloat16")


def is_remote(name: str) -> bool:
    """Whether the model's code comes with its checkpoint."""
    return name in _REMOTE


def tiny_config(name: str, **changes: Any) -> Any:
    """A config of 8 experts, top-2, 3 layers; `changes` replace or add settings."""
    if is_remote(name):
        return AutoConfig.from_pretrained(REMOTE_CODE / _REMOTE[name], trust_remote_code=True, **changes)
    model_type, settings = _NATIVE[name]
    return AutoConfig.for_model(model_type, **(_COMMON | settings | changes))


def random_model(name: str, *, seed: int = 0, **changes: Any) -> Any:
    """A float32 model with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **changes), trust_remote_code=is_remote(name))
    randomise(model, seed=seed)
    return model.eval()


@torch.no_grad()
def randomise(model: torch.nn.Module, *, seed: int = 0) -> None:
    """Weights N(0, 1/fan-in), router rows three times that, biases of every kind N(0, 0.3²); norms stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) in seen or not tensor.is_floating_point() or "inv_freq" in name:
            continue
        seen.add(id(tensor))
        if "bias" in name.rpartition(".")[2]:
            tensor.normal_(0.0, 0.3, generator=generator)
        elif tensor.dim() >= 2:
            gain = 3.0 if name.endswith((".gate.weight", ".router.weight")) else 1.0
            tensor.normal_(0.0, gain * tensor.shape[-1] ** -0.5, generator=generator)


@cache
def _session_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="tiny-models-"))


def remove_session_folder() -> None:
    """Remove what `tiny_folder` has written; conftest does so at the end."""
    shutil.rmtree(_session_folder(), ignore_errors=True)


@cache
def tiny_folder(name: str) -> Path:
    """A checkpoint in float32 with a tokenizer, a chat template and, for remote code, its Python files. Do not write
    into it.
    """
    folder = _session_folder() / name
    return write_checkpoint(random_model(name), folder, code=REMOTE_CODE / name if is_remote(name) else None)


def write_checkpoint(model: Any, folder: Path, *, code: Path | None = None) -> Path:
    """Save a model as its authors would publish it."""
    model.save_pretrained(folder)
    if code is not None:
        shutil.copytree(code, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    words = ["w0", "</s>", *(f"w{number}" for number in range(2, VOCAB_SIZE))]
    word_tokenizer(words, unknown="w2").save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
    (folder / "LICENSE").write_text("as you like", encoding="utf-8")
    return folder


def word_tokenizer(words: Sequence[str], *, unknown: str) -> PreTrainedTokenizerFast:
    """One token for each word between spaces; `</s>` ends a text."""
    inner = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token=unknown))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


def small_mixtral(*, seed: int = 0, **changes: Any) -> MixtralForCausalLM:
    """The smallest model that runs do something with: two layers, 16 wide, weights as transformers draws them."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(**settings | changes))


@cache
def _loaded(name: str, dtype: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        tiny_folder(name), dtype=getattr(torch, dtype), trust_remote_code=is_remote(name)
    ).eval()


def tiny_model(name: str, dtype: str = "float32") -> Any:
    """A fresh copy of the model that transformers loads from `tiny_folder(name)`."""
    return copy.deepcopy(_loaded(name, dtype))


def token_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, int64."""
    return torch.randint(2, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def keep_six(moe: Any) -> dict[str, list[int]]:
    """Six of eight experts, others in every layer, three of each half (for routers that choose among two groups)."""
    kept = ([0, 2, 3, 5, 6, 7], [1, 2, 3, 4, 5, 7], [0, 1, 3, 4, 6, 7])
    return {layer.path: kept[number] for number, layer in enumerate(moe.layers)}


def write_token_file(path: Path, rows: list[list[int]]) -> Path:
    """A file for a `tokens:` source."""
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows), encoding="utf-8")
    return path
