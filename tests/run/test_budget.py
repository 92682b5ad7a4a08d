"""What a run needs, in numbers worked out by hand, and how the budgets choose."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_folder, token_ids, write_token_file
from transformers import AutoConfig

import compressor
from compressor import CalibrationError, RecipeError
from compressor.data.sources import TokensSource
from compressor.machine.environment import available_memory
from compressor.machine.memory_estimate import ACCELERATOR, PLACEMENTS, PROCESS, TASKS, Placement, Work
from compressor.plugins import load_plugins
from compressor.recipe.schema import load_recipe
from compressor.run import check, memory
from compressor.run.preview import Preview
from compressor.wording import human_seconds

Recipe = dict[str, Any]

WORK = Work(
    bytes_total=14_000_000_000,
    bytes_stored=14_000_000_000,
    bytes_outside=400_000_000,
    bytes_by_layer={f"model.layers.{number}": 850_000_000 for number in range(16)},
    bytes_after=10_000_000_000,
    tokens=128 * 2048,
    batch_tokens=8 * 2048,
    hidden=2048,
    num_experts=64,
    vocabulary=50_000,
    itemsize=2,
    per_token=3000.0,
    streams=1,
    measured_tokens=0,
    num_passes=1,
    copies=2,
    has_tasks=False,
    measures_text=False,
)
IN_MEMORY, STATES_IN_FILES, FROM_DISK, BOTH = PLACEMENTS


def test_images_are_there_twice_in_two_dtypes() -> None:
    shown = dataclasses.replace(WORK, pixels=10**9)
    assert shown.text(IN_MEMORY) - WORK.text(IN_MEMORY) == 5 * 10**8  # for every batch at once, as the model takes it
    assert shown.memory(FROM_DISK) - WORK.memory(FROM_DISK) >= 15 * 10**8
    assert shown.device_memory(FROM_DISK) - WORK.device_memory(FROM_DISK) >= 5 * 10**8
    assert shown.text(BOTH) == WORK.text(BOTH)
    assert shown.disk(BOTH) - WORK.disk(BOTH) == 5 * 10**8


def test_memory_by_hand() -> None:
    tokens = 262_144
    states = 4 * tokens * 2048 * 2  # four vectors of 2048 numbers of two bytes
    assert WORK.hidden_states("memory") == states == 4_294_967_296
    search = 3000 * tokens
    batch = 2**28 + 16_384 * 12 * 4 * 2048
    assert WORK.batch == batch

    def said(num_bytes: int) -> int:
        return PROCESS + round(1.05 * num_bytes)

    assert WORK.memory(IN_MEMORY) == WORK.memory(STATES_IN_FILES) == said(28_000_000_000 + batch)  # while comparing
    much = dataclasses.replace(WORK, tokens=8 * tokens)
    assert much.memory(IN_MEMORY) == said(14_000_000_000 + 8 * (states + search) + batch)
    assert WORK.memory(FROM_DISK) == said(400_000_000 + 1_700_000_000 + states + search + batch)
    assert WORK.memory(BOTH) == said(2_100_000_000 + search + batch)
    words = dataclasses.replace(WORK, vocabulary=256_000, bytes_total=1_000_000_000, bytes_by_layer={}, tokens=0)
    words = dataclasses.replace(words, bytes_outside=1_000_000_000, batch_tokens=1024)
    assert words.memory(IN_MEMORY) == said(1_000_000_000 + 1024 * 256_000 * (3 * 2 + 2 * 8))  # logits, as float64
    small = dataclasses.replace(WORK, batch_tokens=10, tokens=10)
    assert small.memory(BOTH) == said(2_100_000_000 + 10 * 3000 + 2**28)  # a search


def test_on_an_accelerator_weights_and_text_are_there() -> None:
    assert WORK.memory(IN_MEMORY, device="cuda") == PROCESS + ACCELERATOR + 14_000_000_000
    assert WORK.memory(FROM_DISK, device="cuda") == PROCESS + ACCELERATOR + 850_000_000
    assert WORK.device_memory(FROM_DISK) == WORK.memory(FROM_DISK) - PROCESS


def test_a_small_batch_holds_few_outputs() -> None:
    small = dataclasses.replace(WORK, batch_tokens=100)
    assert small.batch == 100 * 64 * 4 * 2048 + 100 * 12 * 4 * 2048


def test_tasks_logits_and_second_streams_cost_more() -> None:
    other = dataclasses.replace(WORK, has_tasks=True, measures_text=True, streams=2)
    logits = 16_384 * 50_000 * (2 + 4)
    more = round(1.05 * (logits + WORK.hidden_states("memory")))
    assert other.memory(FROM_DISK) - WORK.memory(FROM_DISK) == pytest.approx(TASKS + more, abs=2)


def test_sums_of_constants_are_counted(recipe: Recipe) -> None:
    def sums(kind: str) -> list[int]:
        loaded = load_recipe(
            recipe, overrides=[f"passes.0.expert_pruning.replace={kind}"], methods=load_plugins().methods
        )
        layer = compressor.MoEModel(compressor.load(tiny_folder("mixtral"))[0]).layers[0]
        return [loaded.passes[0].method.bytes_of_sums(layer, 32, num_domains) for num_domains in (1, 3)]

    assert sums("constants") == sums("measured") == [8 * 8**2 * 32, 3 * 8 * 8**2 * 32]
    assert sums("none") == [0, 0]
    more = dataclasses.replace(WORK, sums=10**9).memory(BOTH) - WORK.memory(BOTH)
    assert more == pytest.approx(1.05 * 10**9, abs=2)


def test_a_quantised_layer_is_held_as_stored_and_as_numbers() -> None:
    packed = dataclasses.replace(WORK, bytes_stored=7_000_000_000, is_quantised=True)
    assert packed.memory(FROM_DISK) - WORK.memory(FROM_DISK) == pytest.approx(1.05 * 425_000_000, abs=2)
    assert packed.to_json(FROM_DISK, device="cpu", available=None)["bytes_read"] == 4 * 7_000_000_000


def test_text_that_is_measured_waits_too() -> None:
    measured = dataclasses.replace(WORK, tokens=0, has_tasks=True)
    assert measured.tokens_at_once == 65_536
    assert measured.text(FROM_DISK) == 4 * 65_536 * 2048 * 2
    assert measured.text(IN_MEMORY) == measured.text(BOTH) == 0
    assert dataclasses.replace(WORK, streams=2).tokens_at_once == 2 * 262_144


def test_disk_by_hand() -> None:
    states = WORK.hidden_states("memory")
    assert WORK.disk(IN_MEMORY) == 10_000_000_000 + states // 2
    assert WORK.disk(BOTH) == 10_000_000_000 + states // 2 + states
    twice = dataclasses.replace(WORK, num_passes=2)
    assert twice.disk(FROM_DISK) == 20_000_000_000 + states // 2  # a checkpoint between the passes
    assert twice.disk(IN_MEMORY) == WORK.disk(IN_MEMORY)


def test_readings() -> None:
    assert WORK.readings(IN_MEMORY) == 2
    assert WORK.readings(FROM_DISK) == 4
    assert dataclasses.replace(WORK, num_passes=2, measures_text=True).readings(FROM_DISK) == 10


def test_the_system_says_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 10**8 < available_memory() < 10**14
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * 10**6))
    assert available_memory() == 8 * 10**6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # so torchrun says how many share it
    assert available_memory() == 2 * 10**6


# --- what is chosen


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(["w1"] * 5000))
    return {
        "model": str(tiny_folder("mixtral")),
        "calibration": {"batch_size": 2, "data": [{"text": str(text), "samples": 8, "length": 64}]},
        "passes": [{"expert_pruning": {"keep": 6}}],
        "output": str(tmp_path / "out"),
    }


def preview(recipe: Recipe, *overrides: str) -> Preview:
    plugins = load_plugins()
    loaded = load_recipe(recipe, overrides=overrides, methods=plugins.methods, criteria=plugins.criteria)
    return check.check(loaded, plugins.adapters)


def needed(recipe: Recipe, place: Placement) -> int:
    """The memory that a placement needs, as the plan says when it is asked for."""
    asked = (f"weights={place.weights}", f"hidden_states={place.states}")
    found = preview(recipe, *asked).plan["needs"]["memory"]
    assert isinstance(found, int)
    return found


def test_fastest_way_that_keeps_the_budget(recipe: Recipe) -> None:
    by_place = {place: needed(recipe, place) for place in PLACEMENTS}
    ordered = sorted(by_place.items(), key=lambda entry: entry[1])
    assert ordered[0][0] == BOTH
    assert by_place[IN_MEMORY] == ordered[-1][1]
    for place in PLACEMENTS:
        fitting = [one for one in PLACEMENTS if by_place[one] <= by_place[place]]
        assert preview(recipe, f"memory={by_place[place]}").place == fitting[0]
    with pytest.raises(RecipeError, match=r"memory: about \S+ MB of memory are needed .* Smaller batches need less"):
        preview(recipe, f"memory={ordered[0][1] - 1}")


def test_ready_made_ids_are_counted(recipe: Recipe, tmp_path: Path) -> None:
    rows = [[5] * length for length in (10, 30, 20, 7, 40)]
    tokens = write_token_file(tmp_path / "tokens.jsonl", rows)
    recipe["calibration"]["data"] = [{"tokens": str(tokens)}]
    sizes = memory.batch_sizes([TokensSource(tokens=tokens)], 2)
    assert sizes == [2 * 30, 2 * 20, 1 * 40]  # padding included
    assert memory.batch_sizes([TokensSource(tokens=tokens, samples=3, length=15)], 2) == [2 * 15, 15]
    config = AutoConfig.from_pretrained(tiny_folder("mixtral"))
    assert preview(recipe).plan["needs"]["text"] == 4 * sum(sizes) * config.hidden_size * 4


def test_text_that_is_not_there_is_known_before_anything_is_read(recipe: Recipe, tmp_path: Path) -> None:
    for kind in ("tokens", "text", "jsonl"):
        recipe["calibration"]["data"] = [{kind: str(tmp_path / "nowhere")}]
        with pytest.raises(CalibrationError, match=r"there is no file .*nowhere"):
            preview(recipe)


def test_the_files_know_the_dtype_that_a_config_does_not_name(recipe: Recipe, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_folder("mixtral"), tmp_path / "model"))
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if "dtype" not in key}))
    recipe["model"] = str(model)
    assert preview(recipe).plan["dtype"] == "bfloat16"


def test_tensors_in_another_dtype_than_the_configs_stay_so_on_disk(recipe: Recipe, tmp_path: Path) -> None:
    """Loaded, they are what the config says; the plan counts what is written."""
    model = Path(shutil.copytree(tiny_folder("mixtral"), tmp_path / "model"))
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**raw, "dtype": "bfloat16"}))
    recipe["model"] = str(model)
    recipe["calibration"]["data"] = [{"tokens": str(write_token_file(tmp_path / "t.jsonl", token_ids(8, 12).tolist()))}]
    in_memory, on_disk = (preview(recipe, f"weights={weights}").plan["bytes"] for weights in ("memory", "disk"))
    assert on_disk["before"] == (model / "model.safetensors").stat().st_size > 1.9 * in_memory["before"]
    compressor.compress(recipe, overrides=["weights=disk"])
    written = tmp_path / "out" / "model.safetensors"
    assert written.stat().st_size == on_disk["after"]
    assert {tensor.dtype for tensor in load_file(written).values()} == {torch.float32}


def test_what_was_asked_for_is_done_or_refused(recipe: Recipe) -> None:
    assert preview(recipe, "weights=disk").place == FROM_DISK
    assert preview(recipe, "hidden_states=file").place == STATES_IN_FILES
    assert preview(recipe).place == IN_MEMORY
    with pytest.raises(RecipeError, match=r"with all weights in it, .* Leave `weights` out, to read one decoder layer"):
        preview(recipe, "weights=memory", "memory=1MB")
    with pytest.raises(RecipeError, match=r"disk: about \S+ kB of disk are needed .*, 10\.0 kB are there"):
        preview(recipe, "disk=10kB")
    del recipe["output"]
    with pytest.raises(RecipeError, match="they wait in files beside the output, so this needs an `output`"):
        preview(recipe, "hidden_states=file")


def test_why_it_cannot_be_read_from_disk_is_said_where_that_would_help(recipe: Recipe) -> None:
    says = (
        r"memory: .* They? .*|memory: about .* The weights cannot be read one decoder layer at a time.*: `speed` needs"
    )
    with pytest.raises(RecipeError, match=says):
        preview(recipe | {"evaluate": {"speed": True}}, "memory=1MB")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16GB", 16 * 10**9),
        ("512MiB", 512 * 2**20),
        ("1.5 TB", 15 * 10**11),
        ("7 B", 7),
        ("900 kB", 900_000),
        ("0.9gb", 9 * 10**8),
        ("2gib", 2 * 2**30),
        ("1e9", 10**9),
        ("1.5E+10", 15 * 10**9),
        (10**9, 10**9),
    ],
)
def test_sizes(recipe: Recipe, text: str | int, size: int) -> None:
    loaded = load_recipe(recipe | {"disk": text})
    assert loaded.recipe.disk == size


@pytest.mark.parametrize("text", ["16x", "16 gigabytes", "-1GB", "GB", "1e10GB", "e9", "1e-9", 0])
def test_sizes_that_are_none(recipe: Recipe, text: object) -> None:
    with pytest.raises(RecipeError, match="disk: "):
        load_recipe(recipe | {"disk": text})


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.25, "0.25 s"), (42.4, "42 s"), (90, "2 min"), (4980, "1 h 23 min"), (36000, "10 h 0 min")]
)
def test_seconds_in_words(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


def test_budgets_change_no_figure(recipe: Recipe, tmp_path: Path) -> None:
    tokens = write_token_file(tmp_path / "tokens.jsonl", token_ids(8, 24).tolist())
    recipe["calibration"] = {"batch_size": 2, "data": [{"tokens": str(tokens)}]}
    plain, bounded = (load_recipe(recipe, overrides=more) for more in ([], ["memory=64GB", "weights=disk"]))
    assert plain.fingerprint == bounded.fingerprint
    assert compressor.compress(recipe, output=tmp_path / "a").record["recipe_fingerprint"]
