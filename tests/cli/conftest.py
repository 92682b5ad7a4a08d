"""One tiny Mixtral for the whole session, and commands that must refuse."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import VOCAB_SIZE, small_mixtral, word_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

MAX_POSITIONS = 32
WORDS = ["</s>", *(f"w{number}" for number in range(1, VOCAB_SIZE))]


Cli = Callable[..., Any]
WriteRecipe = Callable[..., Path]
MakeModel = Callable[..., Path]
CopyOf = Callable[[Path], Path]
Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every test works in its own folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """Save a tiny Mixtral with a tokenizer; `edit` may change the live model before it is saved."""

    def make(
        folder: Path,
        *,
        edit: Callable[[Any], Any] | None = None,
        tokenizer: bool = True,
        max_shard_size: str = "5GB",
        **changes: Any,
    ) -> Path:
        model: Any = small_mixtral(**{"max_position_embeddings": MAX_POSITIONS, **changes})
        if edit is not None:
            with torch.no_grad():
                model = edit(model) or model
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if tokenizer:
            word_tokenizer(WORDS, unknown="w1").save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory: pytest.TempPathFactory, make_model: MakeModel) -> Path:
    """A tiny Mixtral of 8 experts, top-2, in one file. Shared: never write into it."""
    return make_model(tmp_path_factory.mktemp("models") / "mixtral")


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory, make_model: MakeModel) -> Path:
    """The same in several shards with an index. Shared: never write into it."""
    folder = make_model(tmp_path_factory.mktemp("models") / "sharded", max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) >= 2
    return folder


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama: no experts."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def copy_of(tmp_path: Path) -> CopyOf:
    """A copy of a shared checkpoint, to spoil."""

    def copy(folder: Path) -> Path:
        target = tmp_path / "models" / folder.name
        shutil.copytree(folder, target)
        return target

    return copy


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six sequences of ready-made ids, of unequal lengths. Shared."""
    numbers = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "ids.jsonl"
    rows = [[numbers.randrange(VOCAB_SIZE) for _ in range(length)] for length in (16, 9, 16, 12, 5, 16)]
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe(tmp_path: Path, mixtral: Path, tokens: Path) -> WriteRecipe:
    """Write a recipe that works, with some of its top-level keys changed (None takes a key out)."""

    def write(*, passes: Any = None, data: Any = None, name: str = "recipe.yaml", **changes: Any) -> Path:
        settings: dict[str, Any] = {
            "model": str(mixtral),
            "calibration": {"batch_size": 2, "data": data or [{"tokens": str(tokens)}]},
            "passes": passes or [{"expert_pruning": {"keep": 6}}],
            "output": str(tmp_path / "out"),
            **{key: str(value) if isinstance(value, Path) else value for key, value in changes.items()},
        }
        path = tmp_path / name
        path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}))
        return path

    return write


def snapshot(*folders: Path) -> dict[Path, str]:
    """Everything below the folders, hidden or not: a digest of each file's bytes, `folder` for a folder."""
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for folder in folders
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refused(cli: Cli, tmp_path: Path, mixtral: Path, sharded: Path, dense: Path, tokens: Path) -> Refused:
    """Call a command that must end with one error saying `says`, status 2, and every file and folder as before. What
    a run will do may stand before it.
    """

    def check(*arguments: str | Path, says: str) -> str:
        inputs = (tmp_path, mixtral, sharded, dense, tokens.parent)
        before = snapshot(*inputs)
        answer = cli(*arguments)
        assert answer.status == 2, answer
        assert answer.out == ""
        assert sum(line.startswith("error: ") for line in answer.err.splitlines()) == 1, answer.err
        assert "Traceback" not in answer.err
        assert says in answer.err
        assert snapshot(*inputs) == before, "a file or folder was changed, made or left behind"
        return answer.err

    return check
