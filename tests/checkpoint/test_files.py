"""What a checkpoint's folder holds beside the weights that are read: carried over, left behind and listed, refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_folder, token_ids, write_token_file

import compressor
from compressor import CheckpointError
from compressor.checkpoint.files import ADAPTER, Beside, files_beside
from compressor.checkpoint.find import find_checkpoint
from compressor.machine.progress import Progress
from compressor.plugins import load_plugins
from compressor.recipe.schema import load_recipe
from compressor.run import check
from compressor.run.apply import apply
from compressor.run.pipeline import evaluate

CARRIED = {
    "LICENSE": b"as you like",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "encoding/encoding.py": b"print('never run')",
    "encoding/tables/bytes.bpe": b"\x00\x01",
    "figures/README.md": b"of the figures",
    "notes.md": b"a link's content",
    "x.tiktoken": b"YQ== 0",
}
LEFT = {
    ".cache/huggingface/download/config.json.metadata": b"a",
    ".gitattributes": b"*.bin",
    "README.md": b"of the larger model",
    "adapters/fr/adapter_config.json": b"{}",
    "adapters/fr/adapter_model.safetensors": b"x",
    "compressor/record.json": b"{}",
    "consolidated.safetensors": b"x",
    "encoding/__pycache__/encoding.cpython-313.pyc": b"x",
    "onnx/model.onnx": b"x",
    "onnx/model.onnx_data": b"x",
    "original/consolidated.00.pth": b"x",
    "original/params.json": b"{}",
    "pytorch_model.bin": b"x",
    "pytorch_model.bin.index.json": b"{}",
    "step-5/model-00001-of-00001.safetensors": b"x",
    "step-5/model.safetensors.index.json": b"{}",
}
LISTED = (
    ".cache/", ".gitattributes", "README.md", "adapters/fr/", "compressor/", "consolidated.safetensors",
    "elsewhere/", "encoding/__pycache__/", "nowhere.txt", "onnx/", "original/", "pytorch_model.bin",
    "pytorch_model.bin.index.json", "step-5/",
)  # fmt: skip


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with everything around it that published ones have."""
    path = tmp_path / "source"
    shutil.copytree(tiny_folder("mixtral"), path)
    write(path, {**CARRIED, **LEFT})
    (path / "notes.md").unlink()
    write(tmp_path / "blobs", {"0a1b": CARRIED["notes.md"]})
    (path / "notes.md").symlink_to("../blobs/0a1b")
    (path / "elsewhere").symlink_to("../blobs")
    (path / "nowhere.txt").symlink_to("../blobs/gone")
    return path


def recipe_for(folder: Path, **changes: Any) -> dict[str, Any]:
    tokens = write_token_file(folder.parent / "tokens.jsonl", token_ids(6, 16).tolist())
    return {
        "model": str(folder),
        "calibration": {"batch_size": 4, "data": [{"tokens": str(tokens), "samples": 4}]},
        "passes": [{"expert_pruning": {"keep": 6}}],
        "output": str(folder.parent / "out"),
        **changes,
    }


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


class Said(Progress):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


SAYS = f"not carried over to the smaller checkpoint: {', '.join(LISTED)}"


def assert_carried(source: Path, out: Path) -> None:
    found = content(out)
    assert {name: found.get(name) for name in CARRIED} == CARRIED
    assert not [path for path in out.rglob("*") if path.is_symlink()]
    written = {"README.md", "compressor/record.json"}
    assert not [name for name in found if name in LEFT and name not in written]
    assert found["tokenizer.json"] == (source / "tokenizer.json").read_bytes()
    assert found.get("README.md") != LEFT["README.md"]
    assert found.get("compressor/record.json") != LEFT["compressor/record.json"]


def test_in_memory_what_is_no_weights_is_carried_over_and_the_rest_is_listed(folder: Path) -> None:
    before, said = content(folder), Said()
    result = compressor.compress(recipe_for(folder, weights="memory"), progress=said)
    assert_carried(folder, folder.parent / "out")
    assert result.record["left_behind"] == list(LISTED)
    assert SAYS in said.lines
    assert content(folder) == before


def test_so_it_is_from_disk_and_by_apply_and_check_says_it(folder: Path) -> None:
    recipe, said, again = recipe_for(folder, weights="disk"), Said(), folder.parent / "again"
    plugins = load_plugins()
    loaded = load_recipe(recipe, methods=plugins.methods, criteria=plugins.criteria)
    assert SAYS in check.check(loaded, plugins.adapters).plan["notes"]
    result = compressor.compress(recipe)
    assert_carried(folder, folder.parent / "out")
    assert result.record["left_behind"] == list(LISTED)
    apply(folder.parent / "out/compressor/decision.json", str(folder), again, progress=said)
    assert_carried(folder, again)
    assert SAYS in said.lines
    assert json.loads((again / "compressor/decision.json").read_text())["left_behind"] == list(LISTED)


def test_a_folder_of_nothing_else_lists_nothing(tmp_path: Path) -> None:
    write(tmp_path, {"config.json": b"{}", "model.safetensors": b"", "tokenizer.json": b"{}"})
    assert files_beside(tmp_path) == Beside(tmp_path, ("tokenizer.json",), ())


def test_shards_in_a_sub_folder_are_weights_that_are_read(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "parts/one.safetensors"}}
    write(tmp_path, {"parts/one.safetensors": b"x", "parts/about.txt": b"y", "more/two.safetensors": b"z"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert files_beside(tmp_path) == Beside(tmp_path, ("parts/about.txt",), ("more/",))


def test_links_in_a_circle_and_what_cannot_be_read_stay_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"model.safetensors": b"", "a/b.txt": b"x", "secret.txt": b"x"})
    (tmp_path / "a/again").symlink_to(".")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "secret.txt")
    assert files_beside(tmp_path) == Beside(tmp_path, ("a/b.txt",), ("a/again/", "loop", "secret.txt"))


def test_another_form_of_the_model_is_known_where_its_weights_are_not(tmp_path: Path) -> None:
    """As in the cache of the hub, to which they were not fetched."""
    write(tmp_path, {"model.safetensors": b"", "assets/a.txt": b"x", "original/tokenizer.model": b"x"})
    write(tmp_path, {"original/params.json": b"x", "onnx/config.json": b"x", "fr/adapter_config.json": b"x"})
    assert files_beside(tmp_path) == Beside(tmp_path, ("assets/a.txt",), ("fr/", "onnx/", "original/"))


# --- adapters

ABOUT = {"peft_type": "LORA", "base_model_name_or_path": "somebody/base"}


def commands(folder: Path) -> list[Any]:
    recipe = recipe_for(folder, evaluate={})
    decision = folder.parent / "decision.json"
    done = {
        "method": "expert_pruning",
        "version": "1",
        "options": {"keep": 6},
        "domains": [],
        "decision": {"layers": {}},
    }
    decision.write_text(json.dumps({"format": 2, "passes": [done]}))
    return [
        lambda: compressor.compress(recipe),
        lambda: evaluate(recipe, str(folder)),
        lambda: apply(decision, str(folder), folder.parent / "out"),
        lambda: check.inspect(str(folder)),
        lambda: compressor.load(folder),
    ]


@pytest.mark.parametrize("names", [ADAPTER[:2], ADAPTER[::2], ADAPTER[:1]], ids=["safetensors", "bin", "config alone"])
def test_an_adapter_beside_the_weights_is_refused_by_name(names: tuple[str, ...], tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(tiny_folder("mixtral"), folder)
    write(folder, {name: json.dumps(ABOUT).encode() for name in names})
    files = " and ".join(names)
    for command in commands(folder):
        with pytest.raises(CheckpointError) as refusal:
            command()
        assert str(refusal.value).endswith(
            f"{folder}: it holds an adapter (LORA: {files}) beside a model, on top of which transformers puts it "
            f"where peft is installed only: merge it (peft's `merge_and_unload`, then `save_pretrained`), or move "
            f"{files} away."
        )
    assert not (tmp_path / "out").exists()


def test_an_adapter_alone_is_refused_with_its_base(tmp_path: Path) -> None:
    write(tmp_path, {ADAPTER[0]: json.dumps(ABOUT).encode(), ADAPTER[1]: b"x"})
    with pytest.raises(CheckpointError) as refusal:
        find_checkpoint(str(tmp_path))
    assert str(refusal.value) == (
        f"{tmp_path}: it holds an adapter (LORA: adapter_config.json and adapter_model.safetensors) and no model. Load "
        f"somebody/base, which it is for, with peft, merge the adapter into it (`merge_and_unload`, then "
        f"`save_pretrained`), and give that folder."
    )


def test_a_live_model_of_such_a_folder_is_saved_without_the_adapter(tmp_path: Path) -> None:
    write(tmp_path, {"config.json": b"{}", "model.safetensors": b"x", ADAPTER[0]: b"{}", ADAPTER[1]: b"x"})
    assert files_beside(tmp_path) == Beside(tmp_path, (), ADAPTER[:2])


def test_weights_of_an_adapter_whose_config_is_gone_mean_nothing(tmp_path: Path) -> None:
    write(tmp_path, {"config.json": b"{}", "model.safetensors": b"x", ADAPTER[1]: b"x"})
    assert files_beside(find_checkpoint(str(tmp_path)).folder).left == (ADAPTER[1],)
