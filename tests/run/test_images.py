"""A recipe whose rows have images: checked, run from memory and from disk, gone on with, and what its record says."""

from __future__ import annotations

import importlib.util
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import vision

import compressor
from compressor.data.images import UNSEEN
from compressor.errors import CompressorError
from compressor.machine.progress import Progress
from compressor.report.html import page
from compressor.run import passes

needs_pillow = pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="images are read by pillow")
needs_torchvision = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("PIL", "torchvision")),
    reason="Qwen's processor is loaded with pillow and torchvision",
)
Recipe = dict[str, Any]


def words(number: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(vision.WORDS, k=number))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, rows of which every other one has an image of four places, and a text."""
    found: Path = tmp_path_factory.mktemp("images")
    vision.model().save_pretrained(found / "model")
    vision.tokenizer().save_pretrained(found / "model")
    (found / "text.txt").write_text(words(200, 0))
    rows = [{"text": words(6, n), **({"images": [f"{n}.png"]} if n % 2 else {})} for n in range(8)]
    vision.lines(found / "rows.jsonl", *rows)
    return found


@pytest.fixture
def recipe(folder: Path, tmp_path: Path) -> Recipe:
    from PIL import Image

    for n in range(1, 8, 2):
        if not (path := folder / f"{n}.png").exists():
            Image.new("RGB", (64, 64), ("red", "green", "blue")[n % 3]).save(path)
    rows = {"jsonl": str(folder / "rows.jsonl"), "images": True, "samples": 8, "length": 16}
    return {
        "model": str(folder / "model"),
        "calibration": {"data": [rows, {"text": str(folder / "text.txt"), "samples": 3, "length": 8}], "batch_size": 2},
        "passes": [{"expert_pruning": {"keep": 4}}],
        "evaluate": {"perplexity": [{**rows, "name": "seen"}]},
        "output": str(tmp_path / "out"),
    }


def refusal(recipe: Recipe, tokenizer: Any = None) -> str:
    with pytest.raises(CompressorError) as error:
        compressor.compress(recipe, tokenizer=tokenizer)
    return str(error.value)


@needs_pillow
def test_from_memory_and_from_disk_it_is_the_same(recipe: Recipe, tmp_path: Path) -> None:
    found = {}
    for weights in ("memory", "disk"):
        how = {**recipe, "weights": weights, "output": str(tmp_path / weights)}
        found[weights] = compressor.compress(how, tokenizer=vision.processor()).record
    one, other = found["memory"], found["disk"]
    assert one["passes"][0]["decision"] == other["passes"][0]["decision"]
    assert one["evaluation"]["fidelity"] == other["evaluation"]["fidelity"]
    assert (tmp_path / "memory/model.safetensors").read_bytes() == (tmp_path / "disk/model.safetensors").read_bytes()
    # rows: 4 with a role, a border each way, 4 places and 6 words, 4 with 6 words and an end; 3 × 8 of text
    rows, text = one["calibration"]
    assert (rows["tokens"], rows["image_tokens"], text["tokens"]) == (4 * 13 + 4 * 6, 16, 24)
    assert one["images"] == {
        "tokens": 100,
        "image_tokens": 16,
        "said": "16 of 100 calibration tokens stand for images (16.0%)",
    }
    assert one["evaluation"]["fidelity"]["seen"]["tokens"] == 4 * (13 - 1 - 4) + 4 * 5
    for experts in one["passes"][0]["experts"].values():
        assert sum(experts["use, images %"]) == pytest.approx(100, abs=0.1)
        assert experts["use, images %"] != experts["use, text %"]
    assert one["images"]["said"] in page(one)


@needs_torchvision
def test_goes_on_with_the_processor_of_its_folder(
    recipe: Recipe, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe["model"] = str(shutil.copytree(folder / "model", tmp_path / "model"))
    vision.processor(videos=True).save_pretrained(tmp_path / "model")
    whole = compressor.compress({**recipe, "output": str(tmp_path / "whole")}).record

    def stops(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(passes, "edit", stops)
        with pytest.raises(KeyboardInterrupt):
            compressor.compress(recipe)
    found = compressor.compress(recipe, resume=True).record
    assert found["passes"][0]["decision"] == whole["passes"][0]["decision"]
    assert (tmp_path / "out/processor_config.json").exists()


def test_text_alone_is_warned_about(folder: Path, tmp_path: Path) -> None:
    text = {"text": str(folder / "text.txt"), "samples": 3, "length": 8}
    said: list[str] = []

    class Heard(Progress):
        def say(self, text: str) -> None:
            said.append(text)

    recipe = {
        "model": str(folder / "model"),
        "calibration": {"data": [text]},
        "passes": [{"expert_pruning": {"keep": 4}}],
    }
    record = compressor.compress(recipe, progress=Heard()).record
    assert UNSEEN in said
    assert record["images"] == {"tokens": 24, "image_tokens": 0, "said": UNSEEN}
    assert "0 image tokens were seen" in page(record)
    assert all("use, images %" not in experts for experts in record["passes"][0]["experts"].values())


@needs_pillow
def test_what_cannot_be_is_refused_where_the_recipe_says_it(recipe: Recipe, folder: Path) -> None:
    says = "recipe calibration.data[0]: there is no processor, which reads images: put processor_config.json or "
    assert refusal(recipe).startswith(says)
    training = {**recipe, "passes": [{"fine_tuning": {"steps": 1}}]}
    assert "fine_tuning reads text alone: calibrate it without `images`" in refusal(training, vision.processor())
    text = {**recipe, "model": "demo"}
    assert "the model reads no images (its config has no `vision_config`)" in refusal(text)
    lost = vision.lines(folder / "lost.jsonl", {"text": "w1"}, {"text": "w2", "images": ["lost.png"]})
    recipe["calibration"]["data"][0]["jsonl"] = str(lost)
    says = f"recipe calibration.data[0]: source 'lost': {lost}:2: the image {folder}/lost.png cannot be read: "
    assert refusal(recipe, vision.processor()).startswith(says)
