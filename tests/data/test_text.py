"""Text that people really have: what is read of it, what is refused with its place, what reaches the chat template."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from pydantic import TypeAdapter
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from compressor.data import chats
from compressor.data.packing import load_sequences, load_with_held_out, missing_sequences
from compressor.data.sources import Chat, Source
from compressor.errors import CalibrationError

CASES = Path(__file__).parents[1] / "cases"
TOOLS = (
    "{% if tools %}TOOLS {{ tools | tojson }} {% endif %}"
    "{% for document in documents or [] %}DOCUMENT {{ document.text }} {% endfor %}"
    "{% if style is defined %}STYLE {{ style }} {% endif %}"
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} "
    "{% for call in message.tool_calls or [] %}{{ 'CALL ' + call.function.name }}"
    "{% for key, value in call.function.arguments | items %} {{ key }}={{ value }}{% endfor %}{{ '. ' }}"
    "{% endfor %}{% endfor %}"
)
"""Reads arguments as a mapping, as most templates do."""
JOINED = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name + c.function.arguments }}{% endfor %}{% endfor %}"
)
PRINTED = JOINED.replace(" + ", " }}{{ ")
PLAIN = {"messages": [{"role": "user", "content": "hello"}]}
ITEM = {"type": "function", "function": {"name": "lookup", "parameters": {"type": "object"}}}


@pytest.fixture(autouse=True)
def _without_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library waits five seconds for its threads whenever it has read parquet files."""
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


class Words:
    """A tokenizer of words that keeps what it was given."""

    eos_token_id = None
    chat_template: Any = None

    def __init__(self, template: Any = TOOLS) -> None:
        inner = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
        inner.pre_tokenizer = WhitespaceSplit()
        self.own = PreTrainedTokenizerFast(tokenizer_object=inner)
        self.chat_template = self.own.chat_template = template
        self.apply_chat_template = self.own.apply_chat_template
        self.special_tokens_map = self.own.special_tokens_map
        self.texts: list[str] = []

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        self.texts.append(text)
        return {"input_ids": [0] * len(text.split())}


def source(**settings: Any) -> Any:
    return TypeAdapter(Source).validate_python({"samples": 1, "length": 2, "special_tokens": False, **settings})


def read(chat_template: Any = TOOLS, *, samples: int = 100_000, **settings: Any) -> list[str]:
    """The documents' texts as the tokenizer gets them, in order."""
    tokenizer = Words(chat_template)
    load_sequences(source(samples=samples, **settings), tokenizer, seed=0)
    return sorted(tokenizer.texts)


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refusal(**settings: Any) -> str:
    with pytest.raises(CalibrationError) as error:
        read(**settings)
    return str(error.value)


# Tools, arguments, nulls ---------------------------------------------------------------------------------------


def test_tools_reach_the_template() -> None:
    texts = read(jsonl=CASES / "tools_dict.jsonl")
    assert all(text.startswith('TOOLS [{"type": "function", "function": {"name": "lookup"') for text in texts)
    assert [text.split("<assistant>")[1] for text in texts] == [
        f"  CALL lookup city=T{n}. <tool> rain " for n in range(3)
    ]


def test_the_template_gets_what_it_reads_of_a_row_and_no_more(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hello there"}]
    row = {"messages": chat, "documents": [{"title": "t", "text": "d"}], "style": "brief", "tokenize": True}
    more = {"range": 7, "label": "x", "chat_template": "x", "tools": json.dumps([ITEM])}
    path = lines(tmp_path / "rows.jsonl", row | more)
    [text] = read(jsonl=path)
    assert text == f"TOOLS {json.dumps([ITEM])} DOCUMENT d STYLE brief <user> hello there "
    lines(path, {"messages": chat, "chat_template_kwargs": {"style": "long"}})
    assert read(jsonl=path) == ["STYLE long <user> hello there "]


def test_tools_that_a_template_does_not_read_are_said() -> None:
    found = load_sequences(source(jsonl=CASES / "tools_dict.jsonl"), Words(PRINTED + "a b"), seed=0)
    assert found.notes == ("source 'tools_dict': the chat template does not read the rows' tools",)
    assert load_sequences(source(jsonl=CASES / "tools_dict.jsonl"), Words(), seed=0).notes == ()


@pytest.mark.parametrize("file", ["tools_dict", "tools_str"])
def test_arguments_have_the_form_that_the_template_takes(file: str) -> None:
    path = CASES / f"{file}.jsonl"
    assert "CALL lookup city=T1" in "".join(read(jsonl=path))
    for template in (JOINED, PRINTED):
        assert read(template + " x", jsonl=path) == [f'lookup{{"city": "T{number}"}} x' for number in range(3)]


def test_arguments_that_are_no_json_are_left_to_the_template(tmp_path: Path) -> None:
    calls = [{"function": {"name": "f", "arguments": text}} for text in ("", "{oops", "[1]")]
    path = lines(tmp_path / "calls.jsonl", {"messages": [{"role": "assistant", "tool_calls": calls}]})
    assert read(PRINTED + " x y", jsonl=path) == ["f{}f{oopsf[1] x y"]
    assert refusal(jsonl=path).startswith(f"source 'calls': {path}:1: the tokenizer's chat template refuses a chat")


def test_nulls_that_arrow_fills_in_are_left_out() -> None:
    texts = read(dataset=str(CASES / "tool_rows_parquet"))
    assert len(texts) == 40
    assert any("CALL lookup path=/tmp/x recursive=True. <" in text for text in texts)
    assert any("CALL lookup city=T1. <" in text for text in texts)
    assert "None" not in "".join(texts)


def test_nulls_that_a_person_wrote_stay(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": {"path": None}}}
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    [text] = read(jsonl=lines(tmp_path / "rows.jsonl", {"messages": chat}))
    assert text == "<user> hello <assistant>  CALL f path=None. "


def test_a_value_that_is_null_is_named(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", {"text": None})
    says = f"{path}:1: the value under {{!r}} is null; a text or the messages of a chat go there."
    assert refusal(jsonl=path) == says.format("text")
    lines(path, {"words": None, "text": "a"})
    assert refusal(jsonl=path, field="words") == says.format("words")


# What is no text -----------------------------------------------------------------------------------------------


def test_half_a_surrogate_pair_is_refused_by_line_or_replaced(tmp_path: Path) -> None:
    path = CASES / "surrogate.jsonl"
    says = refusal(jsonl=path)
    assert says.startswith(f"source 'surrogate': {path}:")
    assert says.endswith("' is half of a surrogate pair, which is no text. Say `errors: replace` to have U+FFFD there.")
    assert all("one. \ufffd tail" in text for text in read(jsonl=path, errors="replace"))
    assert read(dataset=str(path), errors="replace") == read(jsonl=path, errors="replace")


def test_in_chats_and_tools_too(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "\ud83d", "parameters": {}}}
    rows = [
        {"messages": [{"role": "user", "content": "a \udc00 b"}]},
        {"messages": [ITEM | {"role": "x", "content": "a b"}]},
    ]
    for number, row in enumerate([rows[0], rows[1] | {"tools": [tool]}]):
        path = lines(tmp_path / f"{number}.jsonl", {"messages": [{"role": "user", "content": "one two"}]}, row)
        assert f"{path}:2: " in refusal(jsonl=path)
        assert "\ufffd" in "".join(read(jsonl=path, errors="replace"))


def test_texts_of_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [("a b", "task 'x', document 4"), ("a \ud83d b", "task 'x', document 7")]
    monkeypatch.setattr("compressor.data.lm_eval_tasks.training_texts", lambda name, **_: iter(found))
    assert refusal(task="x").startswith("source 'x': task 'x', document 7: '\\ud83d' after 'a ' is half of")
    assert read(task="x", errors="replace") == ["a b", "a \ufffd b"]


def test_a_dataset_whose_library_refuses_it(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    lines(tmp_path / "data" / "train.json", {"text": "a \ud83d b"})
    says = refusal(dataset=str(tmp_path / "data"))
    assert says.startswith(f"dataset '{tmp_path}/data' cannot be read: ")
    assert says.endswith(" Give the file as a `jsonl:` source, which can name the line or replace it.")


def test_bytes_that_are_no_text_are_refused_by_line_or_replaced(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("é€🙂 a\n".encode() * 3 + b"a \xff b\n")
    says = f"source 'text': {path} is no UTF-8: 'utf-8' codec can't decode byte 0xff in position 2: "
    assert refusal(text=path) == f"{says}invalid start byte, in line 4; `errors: replace` puts U+FFFD."
    assert read(text=path, errors="replace") == ["é€🙂 a\n" * 3 + "a \ufffd b\n"]
    path.write_bytes(b'{"text": "a b"}\n{"text": "a \xff b"}\n')
    assert refusal(jsonl=path).endswith("in line 2; `errors: replace` puts U+FFFD.")
    assert read(jsonl=path, errors="replace") == ["a b", "a \ufffd b"]


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, mark: bytes) -> None:
    (tmp_path / "text.txt").write_bytes(mark + b"a b")
    assert read(text=tmp_path / "text.txt") == ["a b"]
    (tmp_path / "rows.jsonl").write_bytes(mark + b'{"text": "a b"}\r\n{"text": "c d"}')
    assert read(jsonl=tmp_path / "rows.jsonl") == ["a b", "c d"]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    says = f"source 'rows': {tmp_path}/rows.jsonl is a pipe or a device, and rows are read in any order. Give a file."
    assert refusal(jsonl=tmp_path / "rows.jsonl") == says


def test_a_number_of_thousands_of_digits(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a b"}\n{"text": ' + "7" * 5000 + "}")
    assert refusal(jsonl=tmp_path / "rows.jsonl").startswith(f"{tmp_path}/rows.jsonl:2: not JSON that can be read: ")


# Only as far as it is asked for --------------------------------------------------------------------------------


def test_characters_of_several_bytes_at_the_borders_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.data.lines._BLOCK", 5)
    text = "é€🙂 a\r\n漢字 🙃\n" * 20
    (tmp_path / "text.txt").write_bytes(text.encode())
    assert read(text=tmp_path / "text.txt") == [text.replace("\r", "")]
    rows = [{"text": f"{text}{number}"} for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n \n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\t\n")
    assert read(jsonl=tmp_path / "rows.jsonl") == sorted(row["text"] for row in rows)


def test_what_nobody_wants_is_not_read(tmp_path: Path) -> None:
    """A text of which the end is broken; rows of which all but the first few in the seed's order are."""
    path = tmp_path / "text.txt"
    path.write_bytes(b"some words here\n" * 100_000 + b"\xff")
    assert len("".join(read(text=path, samples=1))) < 100_000
    rows = [f'{{"text": "row {number}"}}\n' for number in range(50)]
    (tmp_path / "good.jsonl").write_text("".join(rows))
    tokenizer = Words()
    load_sequences(source(jsonl=tmp_path / "good.jsonl", samples=3), tokenizer, seed=5)
    kept = {int(text.split()[1]) for text in tokenizer.texts}
    assert len(kept) == 3
    (tmp_path / "bad.jsonl").write_text("".join(r if n in kept else "{oops\n" for n, r in enumerate(rows)))
    again = Words()
    load_sequences(source(jsonl=tmp_path / "bad.jsonl", samples=3), again, seed=5)
    assert again.texts == tokenizer.texts
    assert f"{tmp_path}/bad.jsonl:" in refusal(jsonl=tmp_path / "bad.jsonl", samples=4)


def test_rows_of_a_task_are_rendered_as_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    from compressor.data.lm_eval_tasks import training_texts

    rendered: list[dict[str, object]] = []
    monkeypatch.setattr("compressor.data.lm_eval_tasks._rendered", lambda task, row: rendered.append(row) or "a b")
    next(iter(training_texts("demo_arithmetic")))
    assert len(rendered) == 1


def test_the_memory_plan_follows_what_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a " * 10)
    small = source(text=path, samples=4, length=64).memory()
    path.write_text("a " * 1_000_000)
    assert source(text=path, samples=4, length=64).memory() == small
    assert source(text=path, samples=512, length=2048).memory() > 10 * small
    plain = lines(tmp_path / "rows.jsonl", *({"text": "a"} for _ in range(2000)))
    many = source(jsonl=plain).memory()
    lines(plain, {"text": "a" * 2_000_000})
    assert source(jsonl=plain).memory() > many + 2 * 2_000_000
    assert many > source(jsonl=lines(tmp_path / "few.jsonl", {"text": "a"})).memory()


def test_sequences_that_are_missing_are_said(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a " * 21)
    found = load_sequences(source(text=path, samples=512), Words(), seed=0)
    assert list(missing_sequences([found])) == ["source 'text' has text for 10 of the 512 sequences asked for"]
    assert (found.to_json()["sequences"], found.to_json()["asked"]) == (10, 512)
    own, others = load_with_held_out(source(text=path, samples=8), Words(), seed=0)
    assert (len(own.ids), own.asked, len(others.ids)) == (8, 8, 2)
    assert list(missing_sequences([own])) == []


# Datasets that are here ----------------------------------------------------------------------------------------


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return Dataset.from_list([{"text": f"row {number:02}"} for number in range(12)])


EXPECTED = [f"row {number:02}" for number in range(12)]


def test_folders_that_save_to_disk_wrote(rows: Any, tmp_path: Path) -> None:
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"a": rows.select([0]), "train": rows}).save_to_disk(tmp_path / "two")
    DatasetDict({"only": rows}).save_to_disk(tmp_path / "three")
    before = sorted(os.walk(tmp_path))
    for name in ("one", "two", "three"):
        assert read(dataset=str(tmp_path / name)) == EXPECTED
    assert read(dataset=str(tmp_path / "two"), split="a") == ["row 00"]
    assert sorted(os.walk(tmp_path)) == before
    assert refusal(dataset=str(tmp_path / "two"), split="b") == (
        f"dataset '{tmp_path}/two' has no split 'b'; it has a, train. Say `split:`."
    )


@pytest.mark.parametrize("name", ["x.parquet", "x.csv", "x.json", "x.jsonl", "x.arrow", "x.txt", "x.jsonl.gz"])
def test_files(name: str, rows: Any, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "x.arrow":
        rows.save_to_disk(tmp_path / "saved")
        next((tmp_path / "saved").glob("*.arrow")).rename(path)
    elif name == "x.txt":
        path.write_text("\n".join(EXPECTED))
    else:
        kind = {"x.parquet": "parquet", "x.csv": "csv"}.get(name, "json")
        getattr(rows, f"to_{kind}")(path, **({"compression": "gzip"} if name.endswith("gz") else {}))
    assert read(dataset=str(path)) == EXPECTED
    assert source(dataset=str(path)).title == ("x.jsonl" if name.endswith("gz") else "x")


def test_files_of_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "x.doc").write_text("x")
    says = refusal(dataset=str(tmp_path / "x.doc"))
    assert ".doc' cannot be opened: files that can be read end in .parquet, .arrow, .csv, .txt, .json" in says
    assert says.endswith("Give a file or folder of parquet, arrow, JSON or CSV, or as `save_to_disk` writes it.")


def test_rows_of_datasets_are_named_by_number(tmp_path: Path, rows: Any) -> None:
    Dataset.from_list([{"text": "a b"}, {"text": "c d"}, {"text": None}]).to_parquet(tmp_path / "x.parquet")
    says = (
        f"dataset '{tmp_path}/x.parquet', row 3: the value under 'text' is null; a text or the messages of a chat go "
    )
    assert refusal(dataset=str(tmp_path / "x.parquet")) == f"{says}there."


def test_large_rows_are_shuffled_through_a_small_buffer(tmp_path: Path, rows: Any, monkeypatch: Any) -> None:
    """In the order of 10,000 rows where they are small, as ever; of large ones few are in memory."""
    rows.to_parquet(tmp_path / "x.parquet")
    orders = []
    for buffer in (64_000_000, 60):
        monkeypatch.setattr("compressor.data.sources._BUFFER", buffer)
        tokenizer = Words()
        load_sequences(source(dataset=str(tmp_path / "x.parquet"), samples=12), tokenizer, seed=3)
        orders.append(tokenizer.texts)
    streamed = source(dataset=str(tmp_path / "x.parquet"))._opened().shuffle(seed=3, buffer_size=10_000)
    assert orders[0] == [row["text"] for row in streamed]
    assert orders[0] != orders[1]
    assert sorted(orders[1]) == EXPECTED


# Templates -----------------------------------------------------------------------------------------------------

NAMED = {"default": "by default", "tool_use": "with tools", "rag": "by name"}


def test_named_templates_are_chosen(tmp_path: Path) -> None:
    path = lines(tmp_path / "chats.jsonl", PLAIN)
    tools = lines(tmp_path / "tools.jsonl", PLAIN | {"tools": [ITEM]})
    assert read(NAMED, jsonl=path) == ["by default"]
    assert read(NAMED, jsonl=tools) == ["with tools"]
    assert read(NAMED, jsonl=tools, template="rag") == ["by name"]
    says = "source 'chats': there is no chat template 'x'; it has default, rag, tool_use. Say `template:`."
    with pytest.raises(CalibrationError) as error:
        load_sequences(source(jsonl=path, template="x"), Words(NAMED), seed=0)
    assert str(error.value) == says
    with pytest.raises(CalibrationError, match=r"none of the tokenizer's chat templates is the default; it has a, b."):
        load_sequences(source(jsonl=path), Words({"a": "x", "b": "y"}), seed=0)
    with pytest.raises(CalibrationError, match=r"but one without a name; leave `template` out"):
        load_sequences(source(jsonl=path, template="x"), Words(), seed=0)


def test_a_look_reads_the_first_row(tmp_path: Path) -> None:
    """Enough to tell that a template is missing, before weights are read."""
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(PLAIN) + "\n{oops\n")
    asked = source(jsonl=path, samples=512)
    assert len(load_sequences(asked, Words(), seed=None).ids) == 1
    with pytest.raises(CalibrationError, match=r"source 'chats' holds chats, but the tokenizer has no chat template"):
        load_sequences(asked, Words(None), seed=None)
    assert len(load_sequences(source(dataset=str(CASES / "tool_rows_parquet")), Words(), seed=None).ids) == 1


def test_a_name_that_a_template_gives_a_default(tmp_path: Path) -> None:
    template = (
        "{% if date is not defined %}{% set date = 'today' %}{% endif %}{% generation %}{{ date }} x{% endgeneration %}"
    )
    path = lines(tmp_path / "chats.jsonl", PLAIN, PLAIN | {"date": "then"})
    assert read(template, jsonl=path) == ["then x", "today x"]


def test_a_template_that_cannot_be_parsed(tmp_path: Path) -> None:
    chat = Chat(PLAIN["messages"], {}, "here")
    with pytest.raises(CalibrationError, match=r"^source 'x': here: the tokenizer's chat template refuses a chat"):
        chats.render(Words("{% if %}"), chat, None, "x")


def templates_of(folder: Path) -> Any:
    from compressor.checkpoint.find import Checkpoint
    from compressor.checkpoint.load import load_tokenizer

    return load_tokenizer(Checkpoint("x", folder)).chat_template


def test_templates_as_folders_have_them(tmp_path: Path) -> None:
    """A processor's file, files by name, a list in the tokenizer's config; none of it is lost."""
    Words(None).own.save_pretrained(tmp_path)
    assert templates_of(tmp_path) is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "one"}))
    assert templates_of(tmp_path) == "one"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("two")
    assert templates_of(tmp_path) == {"default": "one", "tool_use": "two"}
    (tmp_path / "chat_template.json").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for own in ("three", [{"name": "default", "template": "three"}, {"name": "tool_use", "template": "old"}]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": own}))
        assert templates_of(tmp_path) == {"default": "three", "tool_use": "two"}
    (tmp_path / "chat_template.jinja").write_text("four")
    assert templates_of(tmp_path) == {"default": "four", "tool_use": "two"}
