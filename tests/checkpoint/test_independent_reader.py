"""A reader that shares no code with transformers reads a pruned checkpoint's config and tensors, and computes the same.

mlx-lm on the CPU. It reads `num_local_experts` or `num_experts`, and `rope_theta`; what transformers 5.23 writes by
itself lacks some of these, so this also shows that a pruned config.json has every spelling.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_folder, token_ids, write_token_file
from transformers import AutoModelForCausalLM

from compressor import compress

IDS = token_ids(2, 24, seed=11)


@pytest.fixture(scope="module", autouse=True)
def _mlx_lm() -> None:
    """There are wheels for Linux, where continuous integration must have them; elsewhere go without, and say so."""
    if find_spec("mlx_lm") is None or find_spec("mlx") is None:
        message = "mlx-lm is not installed; it comes with the `test` extra on Linux"
        if sys.platform == "linux" and os.environ.get("CI", "").lower() in ("1", "true"):
            pytest.fail(message)
        pytest.skip(message)


def log_probabilities_of_mlx(folder: Path) -> np.ndarray:
    """[B, S, V] float32, from mlx-lm's own reading of the folder; a tensor too many or too few is an error."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(folder, strict=True)
    logits = model(mx.array(IDS.numpy())).astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


@torch.no_grad()
def log_probabilities(model) -> np.ndarray:
    """The same, by transformers."""
    return model(IDS).logits.float().log_softmax(-1).numpy()


def pruned(source: Path, num_kept: int, tmp_path: Path) -> Path:
    """Pruned by a recipe."""
    tokens = write_token_file(tmp_path / "tokens.jsonl", [token_ids(32, seed=n).tolist() for n in range(4)])
    recipe = {
        "model": str(source),
        "calibration": {"batch_size": 2, "data": [{"tokens": str(tokens)}]},
        "passes": [{"expert_pruning": {"keep": num_kept}}],
        "output": str(tmp_path / "pruned"),
    }
    compress(recipe)
    return tmp_path / "pruned"


@pytest.mark.parametrize(
    ("name", "missing", "num_kept"),
    [("mixtral", {"rope_theta"}, 5), ("qwen3_moe", {"rope_theta", "num_experts"}, 6)],
)
def test_mlx_lm_reads_what_was_pruned(name, missing, num_kept, tmp_path):
    source = tiny_folder(name)
    assert not missing & json.loads((source / "config.json").read_text(encoding="utf-8")).keys()
    folder = pruned(source, num_kept, tmp_path)
    assert missing <= json.loads((folder / "config.json").read_text(encoding="utf-8")).keys()

    ours = log_probabilities(AutoModelForCausalLM.from_pretrained(folder).eval())
    theirs = log_probabilities_of_mlx(folder)
    original = log_probabilities(AutoModelForCausalLM.from_pretrained(source).eval())

    assert ours.shape == theirs.shape == (2, 24, 64)
    assert np.abs(ours - theirs).max() <= 1e-4
    assert np.abs(original - theirs).max() > 0.1  # there is something to see
