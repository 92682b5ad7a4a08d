"""Finding, verifying and saving checkpoints: what the command line's tests do not reach."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor import checkpoint
from compressor.checkpoint import Checkpoint, OutputFolder
from compressor.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards with an index, and a config; no model."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "mixtral"}')
    save_file({"a": torch.arange(50_000.0), "b": torch.ones(2, 3)}, path / "one.safetensors")
    save_file({"c": torch.ones(4, dtype=torch.bfloat16)}, path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def digest(folder: Path) -> str:
    return checkpoint.fingerprint(folder, checkpoint.verify_files(folder))


def test_headers_are_read_without_weights(folder: Path) -> None:
    one, two = checkpoint.verify_files(folder)
    assert dict(one.tensors) == {"a": ("F32", (50_000,)), "b": ("F32", (2, 3))}
    assert dict(two.tensors) == {"c": ("BF16", (4,))}
    assert one.num_bytes == (folder / "one.safetensors").stat().st_size


def test_files_that_the_index_does_not_name_do_not_matter(folder: Path) -> None:
    (folder / "consolidated.safetensors").write_bytes(b"another format's copy")
    assert len(checkpoint.verify_files(folder)) == 2


def test_fingerprint_tells_checkpoints_apart(folder: Path) -> None:
    first = digest(folder)
    assert first == digest(folder)
    tensors = load_file(folder / "one.safetensors")
    tensors["a"][-1] += 1
    save_file(tensors, folder / "one.safetensors")
    second = digest(folder)
    (folder / "config.json").write_text('{"model_type": "qwen3_moe"}')
    assert len({first, second, digest(folder)}) == 3


def test_find(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoint.find_checkpoint(str(folder)) == Checkpoint(str(folder), folder)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert checkpoint.find_checkpoint("~/model").folder == folder
    monkeypatch.chdir(folder.parent)
    assert checkpoint.find_checkpoint("model").folder == Path("model")
    assert (checkpoint.find_checkpoint("demo").folder / "config.json").exists()


def test_tokenizer_files(folder: Path) -> None:
    found = Checkpoint("x", folder)
    assert not found.has_tokenizer
    assert checkpoint.load_tokenizer(found) is None
    (folder / "tokenizer.model").write_bytes(b"")
    assert found.has_tokenizer


def test_not_finite_buffers_are_named() -> None:
    module = torch.nn.Linear(2, 2)
    module.register_buffer("ids", torch.tensor([1, 2]))
    checkpoint.refuse_not_finite(module, "mine")
    module.register_buffer("scale", torch.tensor([1.0, float("-inf")]))
    with pytest.raises(CheckpointError, match=r"mine: tensor scale holds 1 value\(s\) that are NaN or infinite"):
        checkpoint.refuse_not_finite(module, "mine")


# --- the output folder


def test_output_appears_only_when_finished(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with OutputFolder(target) as output:
        (output.path / "file").write_text("x")
        assert not target.exists()
        assert output.path.parent == target.parent
        output.finish()
    assert (target / "file").read_text() == "x"
    assert list(target.parent.iterdir()) == [target]


def test_output_left_early_leaves_nothing(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out") as output:
        (output.path / "file").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_overwriting_swaps_whole_folders(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with OutputFolder(tmp_path / "out", overwrite=True) as output:
            (output.path / text).write_text(text)
            output.finish()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compressor", "second"]
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_link_to_our_own_folder_is_not_replaced(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out") as output:
        output.finish()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with (
        pytest.raises(CheckpointError, match="link is a link. Give the folder that it should lead to"),  # noqa: RUF043
        OutputFolder(tmp_path / "link", overwrite=True),
    ):
        pass
    assert (tmp_path / "out" / "compressor").is_dir()


def test_space_is_asked_of_the_outputs_file_system(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out") as output:
        output.require_space(1)
        with pytest.raises(CheckpointError, match=r"the smaller model needs 1000000000\.00 GB of disk, "):
            output.require_space(10**18)


def test_other_errors_of_the_system_are_not_dressed_up(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), checkpoint.disk_errors_named(tmp_path):
        os.open(tmp_path, os.O_WRONLY)
