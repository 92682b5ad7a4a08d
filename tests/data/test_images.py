"""Rows with images through a processor: what becomes of them, and what is refused, with its row."""

from __future__ import annotations

import base64
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vision
from pydantic import TypeAdapter

from compressor.data.images import UNSEEN, ImageReader, check_images, image_reader, images_json
from compressor.data.packing import load_sequences, load_with_held_out
from compressor.data.sequences import Sequences
from compressor.data.sources import Source
from compressor.errors import CalibrationError

needs_pillow = pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="images are read by pillow")
TEXT = {"type": "text", "text": "w1 w2 w3"}


def source(path: Path, **settings: Any) -> Any:
    how = {"jsonl": path, "images": True, "samples": 8, "length": 40, **settings}
    return TypeAdapter(Source).validate_python(how)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from PIL import Image

    for name, size, colour in (("red", (64, 64), "red"), ("wide", (96, 64), "blue"), ("green", (64, 64), "green")):
        Image.new("RGB", size, colour).save(tmp_path / f"{name}.png")
    return tmp_path


def read(folder: Path, *rows: Any, **settings: Any) -> Sequences:
    reader = ImageReader(vision.processor(), vision.model().config.image_token_id)
    return load_sequences(source(vision.lines(folder / "rows.jsonl", *rows), **settings), reader, seed=None)


def said(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": [*parts]}


def refusal(folder: Path, *rows: Any, **settings: Any) -> str:
    with pytest.raises(CalibrationError) as error:
        read(folder, *rows, **settings)
    return str(error.value)


# What becomes of them --------------------------------------------------------------------------------------


@needs_pillow
def test_an_image_has_a_place_for_every_32_pixels_each_way(folder: Path) -> None:
    """64 × 64 are 2 × 2, and 96 × 64 are 3 × 2; pixels come in patches of 16 × 16, four a place."""
    config = vision.model().config
    [found] = read(folder, {"messages": [said({"type": "image", "path": "red.png"}, TEXT)]}).ids
    start, end, place = config.vision_start_token_id, config.vision_end_token_id, config.image_token_id
    assert found.tolist() == [2, start, *[place] * 4, end, 6, 7, 8]
    chat = [said({"type": "image", "path": "wide.png"}, TEXT), said(TEXT, role="assistant")]
    found = read(folder, {"messages": chat})
    assert found.num_image_tokens == 6
    assert found.ids[0][-4:].tolist() == [3, 6, 7, 8]
    assert found.images[0]["pixel_values"].shape[0] == 4 * 6
    assert found.images[0]["image_grid_thw"].tolist() == [[1, 4, 6]]


@needs_pillow
def test_each_way_to_say_the_same_row(folder: Path) -> None:
    data = base64.b64encode((folder / "red.png").read_bytes()).decode()
    parts = [
        {"path": "red.png"},
        {"image": str(folder / "red.png")},
        {"url": f"data:image/png;base64,{data}"},
        {"image": {"bytes": None, "path": "red.png"}},
    ]
    rows = [{"messages": [said({"type": "image", **part}, TEXT)]} for part in parts]
    rows += [
        {"text": "w1 w2 w3", "images": ["red.png"]},
        {"text": "w1 w2 w3", "images": "red.png"},
        {"text": "w1 w2 w3", "images": {"path": "red.png"}},
        {"messages": [{"role": "user", "content": "w1 w2 w3"}], "images": ["red.png"]},
        {"messages": [said({"type": "image"}, TEXT)], "images": ["red.png"]},
        {"messages": [said({"type": "image", "image": None}, TEXT)], "images": [{"path": "red.png"}]},
    ]
    for row in rows:
        assert read(folder, row, samples=1).fingerprint == read(folder, rows[0]).fingerprint, row
    alone = {"messages": [{"role": "user", "content": {"type": "image", "path": "red.png"}}]}
    assert read(folder, alone).num_image_tokens == 4


@needs_pillow
def test_a_dataset_hands_out_decoded_images(folder: Path) -> None:
    from datasets import Dataset, Features, Image, Value

    rows = {"text": ["w1 w2 w3", "w4"], "images": [[str(folder / "red.png")], []]}
    made = Dataset.from_dict(rows, features=Features({"text": Value("string"), "images": [Image()]}))
    made.save_to_disk(folder / "set")
    given = {"dataset": str(folder / "set"), "images": True, "samples": 1, "length": 40}
    reader = ImageReader(vision.processor(), vision.model().config.image_token_id)
    found = load_sequences(TypeAdapter(Source).validate_python(given), reader, seed=None)
    assert found.fingerprint == read(folder, {"text": "w1 w2 w3", "images": ["red.png"]}).fingerprint


@needs_pillow
def test_rows_without_an_image_are_sequences_too(folder: Path) -> None:
    found = load_sequences(
        source(vision.lines(folder / "rows.jsonl", {"text": "w1 w2"}, {"messages": [said(TEXT)]})),
        ImageReader(vision.processor(), vision.model().config.image_token_id),
        seed=0,
    )
    assert sorted(ids.tolist() for ids in found.ids) == [[2, 6, 7, 8], [6, 7]]
    assert found.images == (None, None)
    assert found.num_image_tokens == 0


@needs_pillow
def test_a_row_is_cut_behind_its_last_image_or_left_out(folder: Path) -> None:
    row, wide = {"text": "w1 w2 w3", "images": ["red.png"]}, {"text": "w1", "images": ["wide.png"]}
    reader = ImageReader(vision.processor(), vision.model().config.image_token_id)
    path = vision.lines(folder / "rows.jsonl", row, wide, row)
    found = load_sequences(source(path, length=7), reader, seed=0)
    assert [len(ids) for ids in found.ids] == [7, 7]
    assert found.images[0]["mm_token_type_ids"].tolist() == [[0, 0, 1, 1, 1, 1, 0]]
    assert found.notes == ("source 'rows': rows left out, whose images take over 7 tokens: 1",)
    assert refusal(folder, row, length=5) == (
        "source 'rows' has no row of 5 tokens or less: images take 6 tokens or more: raise `length:`."
    )


@needs_pillow
def test_held_out_rows_keep_their_images(folder: Path) -> None:
    rows = [{"text": f"w{n}", "images": ["red.png" if n % 2 else "green.png"]} for n in range(6)]
    reader = ImageReader(vision.processor(), vision.model().config.image_token_id)
    own, others = load_with_held_out(source(vision.lines(folder / "rows.jsonl", *rows), samples=4), reader, seed=0)
    assert (len(own.ids), len(others.ids), len(others.images)) == (4, 1, 1)
    assert others.num_image_tokens == 4
    assert others.name == "held-out rows"


# What is refused -------------------------------------------------------------------------------------------


@needs_pillow
def test_what_cannot_be_read_is_refused_with_its_row(folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"no image")
    whole = (folder / "red.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    where = f"source 'rows': {folder / 'rows.jsonl'}:1: "
    image, wanted = {"type": "image"}, 'expected a text or {"type": "image", "path": "cat.png"}, found '
    for part, images, says in (
        (image | {"path": "no.png"}, [], f"the image {folder}/no.png cannot be read: [Errno 2] No such file"),
        (image | {"path": "broken.png"}, [], f"the image {folder}/broken.png cannot be read: cannot identify"),
        (image | {"path": "half.png"}, [], f"the image {folder}/half.png cannot be read: "),
        (image | {"url": "data:image/png;base64,AAAA"}, [], "the image cannot be read: "),
        (image | {"url": "https://host/a.png"}, [], "the image is at https://host/a.png, and nothing is fetched"),
        (image | {"image": {"bytes": None, "path": None}}, [], "the image cannot be read: "),
        (image, 5, "the image cannot be read: "),
        (image, [], wanted + "{'type': 'image'}."),
        (image, ["red.png", "red.png"], "1 of its 2 images have no part of the chat."),
        ({"type": "video", "path": "a.mp4"}, [], wanted + "{'type': 'video'"),
    ):
        assert refusal(folder, {"messages": [said(part, TEXT)], "images": images}).startswith(where + says), part
    path = vision.lines(
        folder / "rows.jsonl", {"text": "w1", "images": ["red.png"]}, {"text": "w", "images": ["no.png"]}
    )
    with pytest.raises(CalibrationError, match=r"rows\.jsonl:2: the image .*no\.png cannot be read: "):
        check_images(source(path), seed=0)
    check_images(source(path, images=False), seed=0)


@needs_pillow
def test_a_template_that_leaves_images_out(folder: Path) -> None:
    processor = vision.processor()
    processor.chat_template = "{% for message in messages %}{{ message.content[-1].text }}{% endfor %}"
    path = vision.lines(folder / "rows.jsonl", {"text": "w1", "images": ["red.png"]})
    with pytest.raises(CalibrationError, match=r"rows\.jsonl:1: (its images leave no token 127|the model's processor)"):
        load_sequences(source(path), ImageReader(processor, 127), seed=0)


@needs_pillow
def test_what_a_model_must_have(tmp_path: Path) -> None:
    config, how = vision.model().config, {"trust_remote_code": False}
    with pytest.raises(CalibrationError, match=r"^the model reads no images \(its config has no `vision_config`\)"):
        image_reader(None, tmp_path, config.text_config, **how)
    with pytest.raises(CalibrationError, match=r"^the model's config does not say which token stands for an image"):
        image_reader(None, tmp_path, SimpleNamespace(vision_config={}), **how)
    with pytest.raises(
        CalibrationError, match=r"^there is no processor, which reads images: put processor_config\.json"
    ):
        image_reader(vision.tokenizer(), tmp_path, config, **how)
    (tmp_path / "processor_config.json").write_text("{")
    with pytest.raises(CalibrationError, match="its processor cannot be loaded: "):
        image_reader(vision.tokenizer(), tmp_path, config, **how)
    processor = vision.processor()
    assert image_reader(processor, None, config, **how) == ImageReader(processor, 127)
    assert ImageReader(processor, 127).tokenizer is processor.tokenizer


def test_pillow_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        CalibrationError, match=r"^images are read by pillow, which is not installed: pip install pillow\.$"
    ):
        image_reader(None, tmp_path, vision.model().config, trust_remote_code=False)


def test_what_a_record_says() -> None:
    config = vision.model().config
    rows = vision.by_hand([(2, 2), None])
    assert images_json(config, [rows]) == {
        "images": {"tokens": 20, "image_tokens": 4, "said": "4 of 20 calibration tokens stand for images (20.0%)"}
    }
    text = Sequences("text", (torch.arange(5),), "")
    assert images_json(config, [text]) == {"images": {"tokens": 5, "image_tokens": 0, "said": UNSEEN}}
    assert images_json(config, []) == images_json(SimpleNamespace(), [text]) == {}
