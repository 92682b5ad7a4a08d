"""Chats, datasets on the spot, sources that are too small: what is read, and what is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from pydantic import TypeAdapter
from tiny_models import word_tokenizer
from transformers import AutoTokenizer

from compressor.data.packing import load_sequences
from compressor.data.sequences import tokenizer_fingerprint
from compressor.data.sources import Source
from compressor.errors import CalibrationError

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s> {% endfor %}"
WORDS = ["<pad>", "</s>", "<user>", "<assistant>", "hello", "there", "bye"]
CHAT = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "bye"}]


def tokenizer(template: str | None = TEMPLATE, words: list[str] = WORDS) -> Any:
    made = word_tokenizer(words, unknown="<pad>")
    made.chat_template = template
    return made


def source(**settings: Any) -> Any:
    return TypeAdapter(Source).validate_python({"samples": 2, "length": 4, **settings})


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(sequences: Any) -> list[str]:
    return [WORDS[number] for ids in sequences.ids for number in ids.tolist()]


EXPECTED = ["<user>", "hello", "there", "</s>", "<assistant>", "bye", "</s>", "</s>"]  # the last one ends the document


@pytest.mark.parametrize(("key", "field"), [("messages", None), ("messages", "messages"), ("chat", "chat")])
def test_chats_are_rendered_by_the_template(tmp_path: Path, key: str, field: str | None) -> None:
    path = lines(tmp_path / "chats.jsonl", {key: CHAT})
    found = load_sequences(source(jsonl=path, field=field), tokenizer(), seed=0)
    assert words(found) == EXPECTED


def test_chats_of_a_dataset(tmp_path: Path) -> None:
    Dataset.from_list([{"messages": CHAT}]).to_parquet(tmp_path / "data" / "train.parquet")
    found = load_sequences(source(dataset=str(tmp_path / "data")), tokenizer(), seed=0)
    assert words(found) == EXPECTED


def test_text_comes_before_messages(tmp_path: Path) -> None:
    path = lines(tmp_path / "both.jsonl", {"text": "bye bye bye bye bye bye bye", "messages": CHAT})
    assert set(words(load_sequences(source(jsonl=path), tokenizer(), seed=0))) == {"bye", "</s>"}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": []}, ":1: the chat under 'messages' has no messages."),
        ({"messages": ["hello"]}, ":1: the chat under 'messages' is no list of messages such as "),
        ({"messages": [{"content": "hello"}]}, ":1: the chat under 'messages' is no list of messages such as "),
        ({"messages": [{"role": "user"}]}, ":1: the chat under 'messages' is no list of messages such as "),
        ({"messages": "hello", "text": None}, "less than one sequence of 4 tokens"),
        ({"words": "hello"}, ":1: no text under 'text'; found the keys ['words']. `field:` names the one that"),
        ({"text": 7}, ":1: the value under 'text' is 7; a text or the messages of a chat go there."),
    ],
)
def test_rows_that_are_neither(tmp_path: Path, row: Any, says: str) -> None:
    path = lines(tmp_path / "rows.jsonl", row)
    with pytest.raises(CalibrationError) as error:
        load_sequences(source(jsonl=path), tokenizer(), seed=0)
    assert says in str(error.value)


def test_chats_without_a_template(tmp_path: Path) -> None:
    path = lines(tmp_path / "chats.jsonl", {"messages": CHAT})
    with pytest.raises(CalibrationError) as error:
        load_sequences(source(jsonl=path), tokenizer(None), seed=0)
    assert str(error.value) == (
        "source 'chats' holds chats, but the tokenizer has no chat template; take a chat model's, or give text."
    )


def test_chats_that_the_template_refuses(tmp_path: Path) -> None:
    path = lines(tmp_path / "chats.jsonl", {"messages": CHAT})
    with pytest.raises(CalibrationError, match=r"chat template refuses a chat that begins with .*: no system message"):
        load_sequences(source(jsonl=path), tokenizer("{{ raise_exception('no system message') }}"), seed=0)


# Too small ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "is empty, less than one sequence of 4 tokens"),
        ([{"text": ""}], "is empty, less than one sequence of 4 tokens"),
        ([{"text": "hello"}], "has only 2 tokens, less than one sequence of 4 tokens"),
    ],
)
def test_a_domain_without_text(tmp_path: Path, rows: list[Any], says: str) -> None:
    path = lines(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(CalibrationError, match=f"source 'rows' {says}: lower `length:`."):
        load_sequences(source(jsonl=path), tokenizer(), seed=0)


def test_ready_made_sequences_of_one_token(tmp_path: Path) -> None:
    path = lines(tmp_path / "ids.jsonl", {"input_ids": [3]})
    with pytest.raises(CalibrationError, match=r"ids.jsonl:1: a sequence needs at least 2 tokens, found 1"):
        load_sequences(source(tokens=path), None, seed=0)


# The tokenizer's digest -----------------------------------------------------------------------------------------


def test_fingerprints_of_tokenizers(tmp_path: Path) -> None:
    prints = [tokenizer_fingerprint(one) for one in (tokenizer(), tokenizer(None), tokenizer(words=WORDS[::-1]), None)]
    assert prints[0] == prints[1]  # how chats are rendered is not how text is cut
    assert prints[0] != prints[2]
    assert prints[3] == "none"
    tokenizer().save_pretrained(tmp_path)
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == prints[0]
    assert prints[0] == "sha256:898c2d18a61a9bf1"  # in every process, on every day


def test_fingerprint_of_a_tokenizer_in_python() -> None:
    class Slow:
        def __init__(self, words: list[str]) -> None:
            self.words, self.special_tokens_map = words, {"eos_token": "</s>"}

        def get_vocab(self) -> dict[str, int]:
            return {word: number for number, word in enumerate(self.words)}

    assert tokenizer_fingerprint(Slow(WORDS)) == tokenizer_fingerprint(Slow(WORDS))
    assert tokenizer_fingerprint(Slow(WORDS)) != tokenizer_fingerprint(Slow(WORDS[::-1]))
