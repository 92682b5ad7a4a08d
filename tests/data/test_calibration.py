"""Text and token ids → sequences → padded batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from compressor.data.packing import load_sequences, load_with_held_out
from compressor.data.sequences import Sequences, check_vocabulary, fingerprint, make_batches
from compressor.data.sources import Source
from compressor.errors import CalibrationError


class Letters:
    """A tokenizer of single letters: a is 1, b is 2, …; the end of text is 0."""

    def __init__(self, eos_token_id: int | None = 0) -> None:
        self.eos_token_id = eos_token_id

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - 96 for letter in text if letter.isalpha()]}


def source(**settings: Any) -> Any:
    return TypeAdapter(Source).validate_python(settings)


def rows(sequences: Sequences) -> list[list[int]]:
    return [ids.tolist() for ids in sequences.ids]


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_text_is_cut_from_its_start_and_the_rest_dropped(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abcdefgh")
    found = load_sequences(source(text=tmp_path / "text.txt", length=3), Letters(), seed=0)
    assert rows(found) == [[1, 2, 3], [4, 5, 6], [7, 8, 0]]
    assert found.name == "text"
    assert found.num_tokens == 9
    found = load_sequences(source(text=tmp_path / "text.txt", length=3), Letters(eos_token_id=None), seed=0)
    assert rows(found) == [[1, 2, 3], [4, 5, 6]]
    found = load_sequences(source(text=tmp_path / "text.txt", length=3, samples=1), Letters(), seed=0)
    assert rows(found) == [[1, 2, 3]]


def test_documents_are_joined_with_the_end_of_text(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "lines.jsonl", {"text": "ab"}, {"text": "ab"}, {"text": "ab"})
    assert rows(load_sequences(source(jsonl=path, length=4), Letters(), seed=0)) == [[1, 2, 0, 1], [2, 0, 1, 2]]


def test_documents_are_shuffled_by_the_seed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "lines.jsonl", *({"text": letter} for letter in "abcdefgh"))
    orders = [rows(load_sequences(source(jsonl=path, length=16), Letters(), seed=seed))[0] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == [0] * 8 + list(range(1, 9))


def test_json_lines_skip_empty_lines_and_take_another_field(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('\n{"words": "ab", "text": 3}\n\n')
    assert rows(load_sequences(source(jsonl=path, length=3, field="words"), Letters(), seed=0)) == [[1, 2, 0]]


def test_line_separators_inside_a_text_do_not_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"text": "a\u2028b\u0085c"}\n', encoding="utf-8")
    assert rows(load_sequences(source(jsonl=path, length=4), Letters(), seed=0)) == [[1, 2, 3, 0]]


def test_tokens_are_taken_as_they_are(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "ids.jsonl", {"input_ids": [5, 0, 7]}, {"input_ids": [1, 2]}, {"input_ids": [9, 9]})
    assert rows(load_sequences(source(tokens=path), None, seed=3)) == [[5, 0, 7], [1, 2], [9, 9]]
    assert rows(load_sequences(source(tokens=path, samples=2, length=2), None, seed=3)) == [[5, 0], [1, 2]]


@pytest.mark.slow  # whichever comes first parses the whole standard library
def test_demo_text_of_both_splits_differs() -> None:
    train, held_out = (
        load_sequences(source(demo="prose", samples=2, length=16), Letters(), seed=0, split=split)
        for split in ("train", "held-out")
    )
    assert train.fingerprint != held_out.fingerprint
    chosen = load_sequences(source(demo="prose", samples=2, length=16, split="held-out"), Letters(), seed=0)
    assert chosen.fingerprint == held_out.fingerprint


def test_fingerprint_tells_order_and_borders_apart() -> None:
    one = [torch.tensor([1, 2]), torch.tensor([3])]
    assert fingerprint(one) == fingerprint([ids.to(torch.int32) for ids in one])
    others = [
        [torch.tensor([3]), torch.tensor([1, 2])],
        [torch.tensor([1]), torch.tensor([2, 3])],
        [torch.arange(1, 4)],
    ]
    assert len({fingerprint(ids) for ids in [one, *others]}) == 4


def test_batches_are_padded_on_the_right() -> None:
    batches = make_batches([torch.tensor([1, 2, 3]), torch.tensor([4, 5]), torch.tensor([6, 7])], 2)
    assert [batch.input_ids.tolist() for batch in batches] == [[[1, 2, 3], [4, 5, 0]], [[6, 7]]]
    assert [batch.attention_mask.tolist() for batch in batches] == [
        [[True, True, True], [True, True, False]],
        [[True, True]],
    ]


def test_vocabulary() -> None:
    sequences = Sequences("mine", (torch.tensor([1, 9]),), "")
    check_vocabulary(sequences, 10)
    with pytest.raises(CalibrationError, match=r"'mine' holds token id 9, but the model has only 9 embeddings"):
        check_vocabulary(sequences, 9)


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="is text, but there is no tokenizer"):
        load_sequences(source(text=tmp_path / "text.txt"), None, seed=0)


# Held-out text


def held_out(*arguments: Any, **settings: Any) -> Any:
    """The held-out part; what it is held out from is what `load_sequences` gives."""
    own, others = load_with_held_out(*arguments, **settings)
    expected = load_sequences(*arguments, **settings)
    assert (rows(own), own.name, own.fingerprint) == (rows(expected), expected.name, expected.fingerprint)
    return others


def test_held_out_text_follows_what_is_calibrated_on(tmp_path):
    """Of ten sequences, four are asked for; a quarter as many that follow are held out."""
    path = write_lines(tmp_path / "ids.jsonl", *({"input_ids": [number, number + 1]} for number in range(10)))
    asked = source(tokens=str(path), samples=4)
    found = held_out(asked, None, seed=0)
    assert rows(found) == [[4, 5]]
    assert found.name == "held-out ids"
    assert found.fingerprint == fingerprint(found.ids)
    assert rows(load_sequences(asked, None, seed=0)) == [[0, 1], [1, 2], [2, 3], [3, 4]]


def test_held_out_text_of_documents(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefghijkl")
    asked = source(text=str(path), samples=2, length=4)
    assert rows(load_sequences(asked, Letters(), seed=0)) == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert rows(held_out(asked, Letters(), seed=0)) == [[9, 10, 11, 12]]


@pytest.mark.parametrize("samples", [None, 10])
def test_nothing_is_held_out_where_all_is_asked_for(tmp_path, samples):
    path = write_lines(tmp_path / "ids.jsonl", *({"input_ids": [number, 1]} for number in range(10)))
    settings = {} if samples is None else {"samples": samples}
    assert held_out(source(tokens=str(path), **settings), None, seed=0) is None


def test_held_out_text_of_the_demo_is_its_other_split():
    from compressor.checkpoint.find import find_checkpoint
    from compressor.checkpoint.load import load_tokenizer

    tokenizer = load_tokenizer(find_checkpoint("demo"))
    for split, other in ((None, "held-out"), ("train", "held-out"), ("held-out", "train")):
        asked = source(demo="prose", samples=8, length=16, **({"split": split} if split else {}))
        expected = load_sequences(source(demo="prose", samples=2, length=16, split=other), tokenizer, seed=3)
        assert rows(held_out(asked, tokenizer, seed=3)) == rows(expected)


def test_batches_say_that_they_are_held_out():
    assert [batch.held_out for batch in make_batches([torch.tensor([1, 2])], 1)] == [False]
    assert [batch.held_out for batch in make_batches([torch.tensor([1, 2])], 1, "x", held_out=True)] == [True]


@pytest.mark.slow  # whichever comes first parses the whole standard library
def test_a_mix_holds_out_something_of_each_domain():
    from compressor.checkpoint.find import find_checkpoint
    from compressor.checkpoint.load import load_tokenizer

    found = held_out(source(demo="mix", samples=6, length=16), load_tokenizer(find_checkpoint("demo")), seed=0)
    assert len(found.ids) == 3
