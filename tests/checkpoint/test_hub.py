"""What is fetched of a hub's model, from a stand-in for the hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_stand_in import Stand, hub_of
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tiny_models import tiny_folder

from compressor import CheckpointError
from compressor.checkpoint.find import find_checkpoint, with_weights
from compressor.checkpoint.headers import verify_files
from compressor.run import check

NOT_READ = {
    "consolidated.safetensors",
    "flax_model.msgpack",
    "model.fp16.safetensors",
    "model.gguf",
    "onnx/model.onnx",
    "onnx/model.onnx_data",
    "original/consolidated.00.pth",
    "original/model.safetensors",
    "pytorch_model.bin",
    "rust_model.ot",
    "tf_model.h5",
}
SIDE = {"assets/[1]*.txt", "encoding/encoding.py", "x.tiktoken"}


def publish(root: Path, name: str) -> Path:
    """A model as people publish it, with copies of its weights in every form."""
    folder = root / name
    shutil.copytree(tiny_folder("mixtral"), folder)
    for extra in NOT_READ | SIDE:
        (folder / extra).parent.mkdir(exist_ok=True)
        (folder / extra).write_text(extra)
    return folder


def shard(folder: Path) -> list[str]:
    """Cut its weights into two files with an index; their names."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    weight_map = {tensor: names[number % 2] for number, tensor in enumerate(sorted(tensors))}
    for name in names:
        save_file({tensor: tensors[tensor] for tensor in weight_map if weight_map[tensor] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return names


def small_files(folder: Path) -> list[str]:
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(name for name in files if name not in NOT_READ and not name.endswith(".safetensors"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    """An empty cache, and a hub that serves what is under `tmp_path / "hub"`."""
    (tmp_path / "hub").mkdir()
    with hub_of(tmp_path / "hub") as stand:
        monkeypatch.setattr(constants, "ENDPOINT", stand.address)
        template = stand.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield stand


def test_everything_but_weights_is_fetched_to_look_and_the_shards_of_the_index_to_work(hub: Stand) -> None:
    folder = publish(hub.root, "sharded")
    names = shard(folder)
    check.inspect("fake/sharded")
    found = find_checkpoint("fake/sharded", weights=False)
    assert sorted(hub.fetched) == small_files(folder)
    assert (found.folder / "x.tiktoken").exists()
    assert not found.has_weights
    hub.fetched.clear()
    with_weights(found)
    assert sorted(hub.fetched) == names
    assert found.has_weights
    assert len(verify_files(found.folder)) == 2


def test_one_file_of_weights(hub: Stand) -> None:
    folder = publish(hub.root, "single")
    found = find_checkpoint("fake/single")
    assert sorted(hub.fetched) == sorted([*small_files(folder), "model.safetensors"])
    hub.fetched.clear()
    assert find_checkpoint("fake/single") == found
    assert hub.fetched == []


def test_shards_that_the_hub_has_not_are_named(hub: Stand) -> None:
    names = shard(publish(hub.root, "lacking"))
    (hub.root / "lacking" / names[0]).unlink()
    with pytest.raises(CheckpointError) as refusal:
        find_checkpoint("fake/lacking")
    assert str(refusal.value) == f"fake/lacking: 1 file(s) of weights are not on the hub: {names[0]}."
    assert not set(names) & set(hub.fetched)


def test_an_interrupted_download_counts_as_no_weights(hub: Stand) -> None:
    names = shard(publish(hub.root, "sharded"))
    found = find_checkpoint("fake/sharded")
    (found.folder / names[1]).unlink()
    assert not found.has_weights


def test_weights_are_of_the_commit_that_was_looked_at(hub: Stand) -> None:
    publish(hub.root, "moving")
    found = find_checkpoint("fake/moving", weights=False)
    hub.commit = "b" * 40
    with_weights(found)
    assert found.folder.name == "a" * 40
    assert (found.folder / "model.safetensors").exists()
    assert find_checkpoint("fake/moving", weights=False).folder.name == "b" * 40


def test_without_a_network_the_cache_does(hub: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(hub.root, "cached")
    looked_at = find_checkpoint("fake/cached", weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_checkpoint("fake/cached", weights=False) == looked_at
    with pytest.raises(CheckpointError, match=r"^fake/cached: .*not in the hub's cache, and the hub cannot be"):
        with_weights(looked_at)
    shutil.copyfile(hub.root / "cached/model.safetensors", looked_at.folder / "model.safetensors")
    (looked_at.folder / "LICENSE").unlink()  # of a cache that others have filled, not everything is there
    assert find_checkpoint("fake/cached") == looked_at
    (looked_at.folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"^fake/cached: there is no folder .*not in the hub's cache"):
        find_checkpoint("fake/cached")


def test_no_weights_that_can_be_read_is_said_before_any_is_fetched(hub: Stand) -> None:
    (publish(hub.root, "pickled") / "model.safetensors").unlink()
    for name in ("model.fp16.safetensors", "original/model.safetensors", "consolidated.safetensors"):
        (hub.root / "pickled" / name).unlink()
    for look in (find_checkpoint, check.inspect):
        with pytest.raises(
            CheckpointError, match=r"^fake/pickled: expected model.safetensors or .*index.json, found f"
        ):
            look("fake/pickled")
    assert not set(hub.fetched) & NOT_READ


def test_two_models_are_refused_before_weights_are_fetched(hub: Stand) -> None:
    folder = publish(hub.root, "twice")
    shutil.copyfile(folder / "model.safetensors", folder.parent / "kept")
    shard(folder)
    (folder.parent / "kept").rename(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"^fake/twice: it holds both model.safetensors and "):
        find_checkpoint("fake/twice")
    assert not any(name.endswith(".safetensors") for name in hub.fetched)


def test_an_adapter_is_refused_before_weights_are_fetched(hub: Stand) -> None:
    folder = publish(hub.root, "adapted")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_text("an adapter")
    with pytest.raises(CheckpointError, match=r"^fake/adapted: it holds an adapter \(adapter_config.json\) beside a"):
        find_checkpoint("fake/adapted")
    assert not any(name.endswith(".safetensors") for name in hub.fetched)


def test_no_such_model(hub: Stand) -> None:
    with pytest.raises(CheckpointError, match=r"^fake/nothing: there is no folder .* no such model on the hub"):
        find_checkpoint("fake/nothing")
