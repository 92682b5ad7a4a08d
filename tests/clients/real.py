"""Software that serves reads what was written, and answers what `compressor.load` answers.

Not part of the suite: `tests/clients/environments.sh FOLDER` makes the clients' environments, and then
`COMPRESSOR_CLIENTS=FOLDER python -m pytest tests/clients/real.py` asks each. Figures: docs/serving.md.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from clients.read import by_logits
from tiny_models import random_model, token_ids, write_token_file
from transformers import AutoTokenizer

import compressor
from compressor.data import demo

MEAN = {"mean": 5, "min": 3}
PASSES: dict[str, list[dict[str, Any]]] = {
    "uniform": [{"expert_pruning": {"keep": 4}}],
    "constants": [{"expert_pruning": {"keep": MEAN, "replace": "constants"}}],
    "never chosen": [{"expert_pruning": {"keep": MEAN, "replace": "never_chosen"}}],
    "int4": [{"expert_pruning": {"keep": 4}}, {"quantization": {"scheme": "W4A16"}}],
}
CASES = [
    *[
        (client, name, "uniform")
        for client in ("transformers", "vllm", "llama_cpp")
        for name in ("mixtral", "qwen3_moe")
    ],
    *[(client, "glm4_moe", "uniform") for client in ("transformers", "vllm")],
    *[("vllm", name, "constants") for name in ("mixtral", "qwen3_moe", "glm4_moe")],
    ("vllm", "glm4_moe", "never chosen"),
    *[("vllm", name, "int4") for name in ("mixtral", "qwen3_moe")],
]
TEXTS = (
    "def add(left, right):\n    return left + right\n\n\nclass Tree:\n    pass\n",
    "When the ship came into the harbour, the captain went ashore. " * 3,
)
MODEL = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "vocab_size": 2048,
    "tie_word_embeddings": True,
}
"""Widths that kernels take; each architecture reads the keys that it knows."""


def written(name: str, kind: str, folder: Path) -> Path:
    """A compressed checkpoint with the demo's tokenizer, which clients have to read as well."""
    known = random_model(name).config.to_dict().keys()
    if name == "glm4_moe":  # vLLM has no tied head for it
        known -= {"tie_word_embeddings"}
    random_model(name, **{key: one for key, one in MODEL.items() if key in known}).save_pretrained(folder / "model")
    for path in (Path(demo.__file__).parent / "model").glob("tokenizer*"):
        shutil.copy(path, folder / "model")
    rows = [token_ids(64, seed=n).tolist() for n in range(8)]
    data = [{"tokens": str(write_token_file(folder / "tokens.jsonl", rows))}]
    calibration = {"batch_size": 4, "data": data}
    recipe = {"model": str(folder / "model"), "calibration": calibration, "passes": PASSES[kind]}
    compressor.compress(recipe, output=folder / "out")
    return folder / "out"


def answers_of(client: str, folder: Path, rows: list[list[int]]) -> list[dict[str, Any]]:
    """By the client's own environment."""
    home = Path(os.environ["COMPRESSOR_CLIENTS"])
    python = home / {"transformers": "transformers-4", "vllm": "vllm", "llama_cpp": "llama-cpp"}[client] / "bin/python"
    (folder.parent / "rows.json").write_text(json.dumps(rows))
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder.parent), "LLAMA_CPP": str(home / "llama.cpp")}
    environment |= {"PYTHONPATH": str(home / "vllm-0.33"), "VLLM_TARGET_DEVICE": "cpu"} if client == "vllm" else {}
    if (folder / "config.json").exists() and "quantization_config" in json.loads((folder / "config.json").read_text()):
        environment.pop("PYTHONPATH", None)  # 0.33 asks more of the kernel for 4 bits than 0.32's has
    asked = [python, Path(__file__).with_name("read.py"), client, folder, folder.parent / "rows.json"]
    done = subprocess.run(
        [*map(str, asked), str(folder.parent / "answers.json")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads((folder.parent / "answers.json").read_text())
    return found


@torch.no_grad()
def own_answers(folder: Path, rows: list[list[int]]) -> list[dict[str, Any]]:
    model, _ = compressor.load(folder, dtype="float32")
    return [by_logits(lambda ids: model(torch.tensor([ids])).logits[0], row) for row in rows]


@pytest.mark.parametrize(("client", "name", "kind"), CASES, ids=lambda one: one)
def test_answers_the_same(
    client: str, name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = written(name, kind, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(text)["input_ids"][:100] for text in TEXTS]
    ours, theirs = own_answers(folder, rows), answers_of(client, folder, rows)
    apart = torch.tensor(
        [
            abs(a - b)
            for one, two in zip(ours, theirs, strict=True)
            for a, b in zip(one["logprobs"], two["logprobs"], strict=True)
        ]
    )
    same = sum(
        a == b for one, two in zip(ours, theirs, strict=True) for a, b in zip(one["answer"], two["answer"], strict=True)
    )
    with capsys.disabled():
        print(f"\n{client} {name} {kind}: max |Δ log-probability| {apart.max():.1e}, {same} of 32 greedy tokens alike")
    if kind == "int4":  # computed in bfloat16
        assert apart.mean() < 0.05
    else:
        assert apart.max() < 1e-4
        assert same == 32
    original = own_answers(tmp_path / "model", rows)
    assert max(abs(a - b) for a, b in zip(original[0]["logprobs"], theirs[0]["logprobs"], strict=True)) > 0.05
