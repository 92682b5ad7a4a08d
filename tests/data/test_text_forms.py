"""Forms in which people keep chats and rows beside the usual ones: read as what they mean, or refused by name."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from compressor.data.packing import load_sequences
from compressor.data.sources import Source
from compressor.errors import CalibrationError

TEMPLATE = (
    "{% if tools %}TOOLS {{ tools | tojson }} {% endif %}"
    "{% for message in messages %}{{ message.role }} {{ message.content or '' }} "
    "{% for call in message.tool_calls or [] %}{{ call.function.name }} "
    "{% for key, value in call.function.arguments.items() %}{{ key }}={{ value }} {% endfor %}{% endfor %}{% endfor %}x"
)
"""Takes contents that are text, and arguments that are mappings."""
DROPS = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% endif %} x y{% endfor %}"
"""Leaves out contents that are no text, as templates of text models do."""
PARTS = "{% for m in messages %}{% for part in m.content %}{{ part.text }}|{% endfor %} x y{% endfor %}"
USER = {"role": "user", "content": "hello"}


@pytest.fixture(autouse=True)
def _library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


class Recorder:
    """A tokenizer that keeps the texts it was given."""

    eos_token_id = None

    def __init__(self, template: str) -> None:
        inner = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
        inner.pre_tokenizer = WhitespaceSplit()
        own = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")
        self.chat_template = own.chat_template = template
        self.apply_chat_template, self.special_tokens_map = own.apply_chat_template, own.special_tokens_map
        self.texts: list[str] = []

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        self.texts.append(text)
        return {"input_ids": [0] * len(text.split())}


def read(*rows: Any, template: str = TEMPLATE, path: Path, **settings: Any) -> list[str]:
    if rows:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_source(template, **{"jsonl": path, **settings})


def read_source(template: str = TEMPLATE, **settings: Any) -> list[str]:
    fixed = {"samples": 1000, "length": 2, "special_tokens": False}
    tokenizer = Recorder(template)
    load_sequences(TypeAdapter(Source).validate_python({**fixed, **settings}), tokenizer, seed=0)
    return sorted(tokenizer.texts)


def refusal(*rows: Any, **settings: Any) -> str:
    with pytest.raises(CalibrationError) as error:
        read(*rows, **settings)
    return str(error.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "f"} if arguments is ... else {"name": "f", "arguments": arguments}
    return {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"function": function}]}]}


@pytest.mark.parametrize("tools", [None, "", "null", "[]", []])
def test_no_tools(path: Path, tools: Any) -> None:
    assert read({"messages": [USER], "tools": tools}, path=path) == ["user hello x"]


@pytest.mark.parametrize("arguments", [None, "", "  ", "null", {}, "{}", ...])
def test_no_arguments(path: Path, arguments: Any) -> None:
    assert read(call(arguments), path=path) == ["assistant  f x"]


@pytest.mark.parametrize("arguments", ["{oops", "[1]", [], 5])
def test_arguments_that_are_no_mapping_are_shown(path: Path, arguments: Any) -> None:
    says = refusal(call(arguments), path=path)
    assert says.startswith(f"source 'rows': {path}:1: the tokenizer's chat template refuses a chat that begins with ")
    assert says.endswith(f". The arguments of a tool call are no JSON object: {str(arguments)!r}")


def test_contents_in_parts_have_the_form_that_the_template_takes(path: Path) -> None:
    content = [{"type": "text", "text": "one "}, {"type": "text", "text": "two's"}]
    row = {"messages": [{"role": "user", "content": content}]}
    assert read(row, path=path) == ["user one two's x"]
    assert read(row, path=path, template=DROPS) == ["one two's x y"]
    assert read(row, path=path, template=PARTS) == ["one |two's| x y"]


def test_a_part_that_is_no_text(path: Path) -> None:
    content = [{"type": "image", "text": "a b"}, {"type": "image", "url": "y"}]
    row = {"messages": [{"role": "user", "content": content}]}
    for template in (TEMPLATE, DROPS):
        assert refusal(row, path=path, template=template).endswith(
            "it takes no parts, and one of them is no text: \"{'type': 'image', 'url': 'y'}\""
        )
    assert refusal(row, path=path, template=PARTS).endswith(
        f"{path}:1: the chat has an image, and its text alone would be read: say `images: true`, and the model's "
        f"processor reads both."
    )


def test_chats_that_are_kept_as_json_text(path: Path) -> None:
    chat = json.dumps([USER])
    assert read({"messages": chat}, path=path) == ["user hello x"]
    assert read({"chat": [json.dumps(USER)]}, path=path, field="chat") == ["user hello x"]
    assert read({"text": chat}, path=path) == [chat]
    assert read({"notes": "[1] see there"}, path=path, field="notes") == ["[1] see there"]


@pytest.mark.parametrize("key", ["messages", "eos_token", "conversation"])
def test_columns_that_have_the_name_of_something_else(path: Path, key: str) -> None:
    row = {"chat": [USER], key: "other"}
    assert read(row, path=path, field="chat", template="{{ eos_token }} {{ messages[0].content }}") == ["<end> hello"]


def test_settings_of_a_template_are_a_mapping(path: Path) -> None:
    row = {"messages": [USER], "chat_template_kwargs": '{"style": "long"}'}
    assert read(row, path=path, template="{{ style }} x") == ["long x"]
    says = refusal(row | {"chat_template_kwargs": ["style"]}, path=path)
    assert says == f"{path}:1: expected a mapping under 'chat_template_kwargs', found \"['style']\"."


def test_tools_that_are_nested_too_deeply(path: Path) -> None:
    assert "the tokenizer's chat template refuses" in refusal({"messages": [USER], "tools": "[" * 100_000}, path=path)


def test_what_a_template_says_can_be_printed(path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "\ud83d"}]}
    says = refusal(row, path=path, template="{{ raise_exception('no ' + messages[0].content) }}")
    assert says.endswith(": no \\ud83d")
    says.encode()


@pytest.mark.parametrize("value", [7, {"role": "user"}, False])
def test_a_value_of_another_kind_is_shown(path: Path, value: Any) -> None:
    says = refusal({"text": value}, path=path)
    assert (
        says == f"{path}:1: the value under 'text' is {json.dumps(value)}; a text or the messages of a chat go there."
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (gzip.compress(b'{"text": "a b"}', mtime=0), "packed by gzip, and UTF-8 text is read. Unpack it first."),
        (b"(\xb5/\xfd$\x0f", "packed by zstd, and UTF-8 text is read. Unpack it first."),
        ('{"text": "a b"}'.encode("utf-16"), "UTF-16, and UTF-8 text is read. Write it as UTF-8 first."),
    ],
    ids=["gzip", "zstd", "utf-16"],
)
@pytest.mark.parametrize("kind", ["text", "jsonl"])
@pytest.mark.parametrize("errors", ["refuse", "replace"])
def test_files_that_are_no_utf_8_text(path: Path, content: bytes, says: str, kind: str, errors: str) -> None:
    path.write_bytes(content)
    with pytest.raises(CalibrationError) as error:
        read_source(**{kind: path, "errors": errors})
    assert str(error.value) == f"source 'rows': {path} is {says}"


def test_a_folder_and_an_array_go_elsewhere(path: Path, tmp_path: Path) -> None:
    says = f"source '{tmp_path.name}': {tmp_path} is a folder. Give a file, or the folder as `dataset:`."
    for kind in ("text", "jsonl"):
        with pytest.raises(CalibrationError) as error:
            read_source(**{kind: tmp_path})
        assert str(error.value) == says
    for text in ('[{"text": "a b"}]', '[\n{"text": "a b"}\n]'):
        path.write_text(text)
        assert refusal(path=path).endswith(" A `.json` file that is one array of rows is a `dataset:`.")


def test_values_of_mixed_types_in_a_json_array(tmp_path: Path) -> None:
    """The library gives them as JSON text, quotation marks and all, where it has not looked at the file before."""
    parts = [{"type": "text", "text": "two"}]
    rows = [{"messages": [USER]}, {"messages": [{"role": "user", "content": parts}, call({"a": 1})["messages"][0]]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    expected = ["user hello x", "user two assistant  f a=1 x"]
    assert read_source(dataset=str(tmp_path / "rows.json")) == expected
    (tmp_path / "folder").mkdir()
    (tmp_path / "rows.json").rename(tmp_path / "folder" / "train.json")
    assert read_source(dataset=str(tmp_path / "folder")) == expected


def test_the_plan_knows_that_a_json_array_is_read_whole(tmp_path: Path) -> None:
    file, folder = tmp_path / "rows.json", tmp_path
    plans = []
    for rows in (10, 20_000):
        file.write_text(json.dumps([{"text": "a b"}] * rows))
        plans.append([TypeAdapter(Source).validate_python({"dataset": str(one)}).memory() for one in (file, folder)])
    assert [after - before for before, after in zip(*plans, strict=True)] == [10 * 17 * 19_990] * 2


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_setting_without_an_effect(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"text": "a b"}\n')
    assert read_source(dataset=str(tmp_path / name), split="train") == ["a b"]
    for settings, says in (({"split": "test"}, "has no split 'test'; it has train"), ({"config": "en"}, "leave `con")):
        with pytest.raises(CalibrationError, match=says):
            read_source(dataset=str(tmp_path / name), **settings)
