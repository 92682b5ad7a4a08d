"""Where text and token ids come from: the entries of `calibration.data` and `evaluate.perplexity`.

A source is named by the one key that says where it comes from (`demo:`, `text:`, `jsonl:`, `tokens:`,
`dataset:`, `task:`). Nothing here imports torch, so that recipes are read without it; `compressor.data.packing`
makes batches of what is read.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

from compressor.data.lines import find_rows, from_json, read_rows, text_blocks
from compressor.errors import CalibrationError
from compressor.machine import network

Split = Literal["train", "held-out"]
Messages = list[dict[str, Any]]
"""`[{"role": "user", "content": "…"}, …]`"""


@dataclass(frozen=True)
class Text:
    """A document's text, in pieces that are read as they are wanted; and what says, as `str`, where it stands."""

    pieces: Iterable[str]
    where: object


@dataclass(frozen=True)
class Chat:
    """A chat, which the tokenizer's chat template renders; with it the row's other values, such as `tools`, of which
    the template gets those that it reads; and what says, as `str`, where it stands.
    """

    messages: Messages
    others: Mapping[str, Any]
    where: object


Document = Text | Chat

_BYTES_PER_TOKEN = 500
"""Bytes that making a token takes while a document is cut into tokens, about."""

MOST = 10_000_000
"""Sequences of a source, and tokens of a sequence: more is a slip of the pen."""


_NameT = TypeVar("_NameT", str, Path)


def _possible_name(name: _NameT) -> _NameT:
    """Refuses what no file can be called, so that nothing fails on it later."""
    try:
        lengths = [len(os.fsencode(part)) for part in Path(name).parts]
    except UnicodeEncodeError as error:
        raise ValueError("found half of a UTF-16 pair in a name, which no file can have") from error
    if "\0" in str(name):
        raise ValueError("found a NUL character in a name, which no file can have")
    if max(lengths, default=0) > 255 or sum(lengths) + len(lengths) > 4095:
        raise ValueError(
            f"found a name of {max(lengths):,} bytes in a path of {sum(lengths):,}; a file can have 255 and 4,095"
        )
    return name


FileName = Annotated[str, AfterValidator(_possible_name)]
"""A text that may be a path: a hub id or a folder, a task or its file."""
FilePath = Annotated[Path, AfterValidator(_possible_name)]
"""A path that a file can have."""


class BaseSource(BaseModel):
    """What every source of text or tokens can say about itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str | None = Field(default=None, description="what the figures of this source are called")
    samples: int = Field(default=128, ge=1, le=MOST, description="number of sequences to take")
    length: int = Field(default=2048, ge=2, le=MOST, description="tokens per sequence")

    @property
    def title(self) -> str:
        """The name the figures go by: `name` if given, else what the source is."""
        return self.name or self._default_title()

    def _default_title(self) -> str:
        raise NotImplementedError

    def lengths(self) -> Sequence[int]:
        """Tokens of each sequence, at most, as far as known. Raises CalibrationError where a file is not there."""
        return [self.length] * self.samples

    def memory(self) -> int:
        """Bytes that reading it takes at most, about. Raises CalibrationError where a file cannot be read."""
        return _BYTES_PER_TOKEN * sum(self.lengths())

    def documents(self, *, seed: int | None, split: Split) -> Iterable[Document]:
        """Texts or chats in the order of use; without a `seed` in the order in which they stand."""
        raise NotImplementedError


class TextualSource(BaseSource):
    """What a source of text, which a tokenizer has to cut, can say beside that."""

    special_tokens: bool = Field(
        default=True,
        description="begin and end each text as the tokenizer does, such as with a beginning-of-text token; a chat is "
        "begun by its template",
    )


class GivenSource(TextualSource):
    """What a source of text from outside can say beside that."""

    errors: Literal["refuse", "replace"] = Field(
        default="refuse", description="what is no text, such as half a surrogate pair: refuse it, or read U+FFFD there"
    )


class RowsSource(GivenSource):
    """What a source of rows, each a text or a chat, can say beside that."""

    images: bool = Field(
        default=False,
        description="rows may have images, read by the model's processor: each row is a sequence, of `length` or less",
    )

    field: str | None = Field(
        default=None, description="the key that holds the text, or the messages of a chat; default text or messages"
    )
    template: str | None = Field(
        default=None,
        description="which of the tokenizer's named chat templates renders the chats; default its own choice",
    )

    @property
    def image_folder(self) -> Path | None:
        """Where paths of images begin: the file's folder, or the dataset's; None of one on the hub."""
        path = Path(str(getattr(self, "jsonl", None) or getattr(self, "dataset", "")))
        return path.parent if path.is_file() else path if path.exists() else None


class DemoSource(TextualSource):
    """Text that every Python carries: `demo: code`, `prose`, `arithmetic`, or `mix` of the three."""

    demo: Literal["code", "prose", "arithmetic", "mix"] = Field(description="which text, or a mix of the three")
    split: Split | None = Field(default=None, description="default: train to calibrate, held-out to evaluate")

    def _default_title(self) -> str:
        return f"demo:{self.demo}"

    def documents(self, *, seed: int | None, split: Split) -> Iterable[Text]:
        """One domain's documents of the split, shuffled by `seed`; a `mix` is read through its `parts`."""
        from compressor.data.demo.corpus import documents

        assert self.demo != "mix"
        return (Text([text], self.title) for text in _shuffled(documents(self.demo, self.split or split), seed))

    def parts(self) -> list[DemoSource]:
        """One source for each domain, with equal shares of the sequences: the first ones get what is left over."""
        from compressor.data.demo.corpus import DOMAINS

        domains = DOMAINS if self.demo == "mix" else (self.demo,)
        shares = [self.samples // len(domains) + (i < self.samples % len(domains)) for i in range(len(domains))]
        return [
            self.model_copy(update={"demo": domain, "samples": share, "name": self.title})
            for domain, share in zip(domains, shares, strict=True)
            if share
        ]


class TextSource(GivenSource):
    """A UTF-8 text file, one document: `text: corpus.txt`. Sequences are cut from its start."""

    text: FilePath = Field(description="a UTF-8 text file")

    def _default_title(self) -> str:
        return self.text.stem

    def lengths(self) -> Sequence[int]:
        """Those asked for; the file is not read, but must be there."""
        _check_file(self.text, self.title)
        return super().lengths()

    def documents(self, *, seed: int | None, split: Split) -> Iterable[Text]:
        """The whole file as one document."""
        return [Text(text_blocks(self.text, self.title, replace=self.errors == "replace"), self.text)]


class JsonLinesSource(RowsSource):
    """A JSON-lines file with one document a line: `jsonl: corpus.jsonl`, its text or its chat (a list of messages with
    `role` and `content`) under `field`, by default `text`, or else `messages`.
    """

    jsonl: FilePath = Field(description="a JSON-lines file, one document a line")

    def _default_title(self) -> str:
        return self.jsonl.stem

    def lengths(self) -> Sequence[int]:
        """Those asked for; the file is not read, but must be there."""
        _check_file(self.jsonl, self.title)
        return super().lengths()

    def memory(self) -> int:
        """As others, where rows begin, in two orders, and the longest row: its bytes, text and tokens."""
        rows = find_rows(self.jsonl, self.title)
        return super().memory() + 16 * len(rows.starts) + 8 * rows.longest

    def documents(self, *, seed: int | None, split: Split) -> Iterator[Document]:
        """The lines' texts or chats, shuffled by `seed`."""
        starts = None
        if seed is not None:
            starts = find_rows(self.jsonl, self.title).starts[:]
            random.Random(seed).shuffle(starts)
        for where, row in read_rows(self.jsonl, self.title, starts, replace=self.errors == "replace"):
            yield _document(row, self.field, where, has_images=self.images)


class DatasetSource(RowsSource):
    """A Hugging Face dataset, streamed: `dataset: allenai/c4, config: en`. It is on the hub, or in a folder (of data
    files, or as `save_to_disk` writes it), or a single `.parquet`, `.arrow`, `.json`, `.jsonl`, `.csv` or `.txt` file.
    """

    dataset: FileName = Field(description="hub id, local folder or local file of a Hugging Face dataset")
    config: str | None = Field(default=None, description="the dataset's configuration, such as a language")
    split: str | None = Field(default=None, description="the dataset's split; default train, or else the only one")

    def _default_title(self) -> str:
        return Path(self.dataset).stem if self._is_file else self.dataset.rstrip("/").rsplit("/", 1)[-1]

    @property
    def _is_file(self) -> bool:
        return Path(self.dataset).is_file()

    @property
    def _lines(self) -> JsonLinesSource | None:
        """A JSON-lines file's rows are read without the library, which names no lines and fills absent keys."""
        if not self._is_file or _suffix(self.dataset) not in (".jsonl", ".ndjson") or _is_packed(self.dataset):
            return None
        if self.config is not None or self.split not in (None, "train"):
            return None
        own = self.model_dump(exclude={"dataset", "config", "split"})
        return JsonLinesSource(jsonl=Path(self.dataset), **own)

    def memory(self) -> int:
        """As others, and the library with its buffers, and a JSON array, which it reads whole."""
        if self._lines is not None:
            return self._lines.memory()
        files = [Path(self.dataset)] if self._is_file else Path(self.dataset).glob("**/*.json")
        arrays = [file.stat().st_size for file in files if _suffix(file.name) == ".json" and _is_array(file)]
        return super().memory() + _LIBRARY + 4 * _BUFFER + 10 * max(arrays, default=0)

    def documents(self, *, seed: int | None, split: Split) -> Iterator[Document]:
        """The rows' texts or chats, shuffled by `seed` through a buffer of 10,000 rows, or of fewer that are large."""
        if self._lines is not None:
            yield from self._lines.documents(seed=seed, split=split)
            return
        rows = self._opened()
        if seed is not None:
            first = [len(str(row)) for row in itertools.islice(self._rows_read(rows), 16)]
            size = min(100 if self.images else 10_000, max(1, _BUFFER * len(first) // max(1, sum(first))))
            rows = rows.shuffle(seed=seed, buffer_size=size)
        for row in self._rows_read(rows):
            yield _document(row, self.field, _DatasetRow(self, row), is_arrow=True, has_images=self.images)

    def _opened(self) -> Any:
        """The split's rows, nothing read yet, in the file's order."""
        is_local = Path(self.dataset).exists()
        with nullcontext() if is_local else network.not_waited_for() as unreachable:
            try:
                found = self._load()
            except Exception as error:  # every format and place has its own kinds
                said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
                why = f"the hub cannot be reached ({unreachable})" if unreachable else said
                advice = "Without a network, give a local folder, or use a `text:`, `jsonl:` or `demo:` source."
                if is_local:
                    advice = "Give a file or folder of parquet, arrow, JSON or CSV, or as `save_to_disk` writes it."
                    advice = "Install `zstandard`, or unpack it." if "type zstd" in said else advice
                raise CalibrationError(f"dataset {self.dataset!r} cannot be opened: {why}. {advice}") from error
        if not isinstance(found, Mapping):
            return self._typed(found)
        name = self.split or ("train" if "train" in found or len(found) != 1 else next(iter(found)))
        if name not in found:
            raise CalibrationError(
                f"dataset {self.dataset!r} has no split {name!r}; it has {', '.join(map(str, found))}. Say `split:`."
            )
        return self._typed(found[name])

    def _typed(self, rows: Any) -> Any:
        """The rows; where the library has not looked at them yet, with the types of the first ones. It does not look
        at JSON arrays, and gives values of mixed types as JSON text then.
        """
        from datasets import Features

        first: list[Any] = list(self._rows_read(rows.with_format("arrow").take(1))) if rows.features is None else []
        return rows.cast(Features.from_arrow_schema(first[0].schema)) if first else rows

    def _load(self) -> Any:
        """An iterable dataset, or a mapping of them by split."""
        import datasets

        path = Path(self.dataset)
        is_saved = any((path / name).exists() for name in ("state.json", "dataset_dict.json"))
        if self.config is not None and (self._is_file or is_saved):
            raise ValueError(f"it has no configurations, such as {self.config!r}; leave `config` out")
        if self._is_file:
            suffix = _suffix(self.dataset)
            if suffix not in _FILE_KINDS:
                raise ValueError(f"files that can be read end in {', '.join(_FILE_KINDS)}")
            return datasets.load_dataset(_FILE_KINDS[suffix], data_files=str(path), streaming=True)
        if is_saved:
            saved = datasets.load_from_disk(path)
            by_split = saved if isinstance(saved, Mapping) else {str(saved.split or "train"): saved}
            return {name: one.to_iterable_dataset() for name, one in by_split.items()}
        # naming the split spares the others; without one, they have to be known
        return datasets.load_dataset(self.dataset, self.config, split=self.split, streaming=True)

    def _rows_read(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The rows; streaming meets damaged files and lost connections only here."""
        try:
            yield from rows
        except Exception as error:  # every format has its own kinds
            advice = " Give the file as a `jsonl:` source, which can name the line or replace it."
            raise CalibrationError(
                f"dataset {self.dataset!r} cannot be read: {error}.{advice if 'surrogate' in str(error) else ''}"
            ) from error


_FILE_KINDS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".txt": "text"} | dict.fromkeys(
    (".json", ".jsonl", ".ndjson"), "json"
)
_PACKED = (".gz", ".bz2", ".xz", ".zst")


def _is_packed(name: str) -> bool:
    return name.endswith(_PACKED)


def _is_array(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _suffix(name: str) -> str:
    """How a file's name ends, but for how it is packed."""
    path = Path(name)
    return path.with_suffix("").suffix if _is_packed(name) else path.suffix


_BUFFER = 64_000_000
"""Characters of rows that are held to be shuffled, about."""
_LIBRARY = 200_000_000
"""Bytes of the datasets library with what it reads ahead."""


@dataclass(frozen=True)
class _DatasetRow:
    """A row of a dataset; as text, its number if the dataset is here, which is looked through for it, or its start."""

    source: DatasetSource
    row: Mapping[str, Any]

    def __str__(self) -> str:
        if Path(self.source.dataset).exists():
            for number, row in enumerate(self.source._opened(), start=1):
                if row == self.row:
                    return f"dataset {self.source.dataset!r}, row {number}"
        return f"dataset {self.source.dataset!r}, the row that begins {str(self.row)[:80]!r}"


class TokensSource(BaseSource):
    """Ready-made ids, in order, without a tokenizer: `tokens: ids.jsonl`, lines of `{"input_ids": [...]}`."""

    tokens: FilePath = Field(description='a JSON-lines file of {"input_ids": [...]}')
    samples: int | None = Field(  # type: ignore[assignment]
        default=None, ge=1, le=MOST, description="number of sequences to take; default all"
    )
    length: int | None = Field(  # type: ignore[assignment]
        default=None, ge=2, le=MOST, description="cut sequences to so many tokens; default whole"
    )

    def _default_title(self) -> str:
        return self.tokens.stem

    def lengths(self) -> Sequence[int]:
        """Those of the file, which is read for it."""
        return [len(ids) for ids in self.sequences()]

    def memory(self) -> int:
        """Bytes of the ids, and of the longest line as it is read."""
        return 8 * sum(self.lengths()) + 16 * find_rows(self.tokens, self.title).longest

    def sequences(self) -> Iterator[list[int]]:
        """The file's sequences of token ids, in order."""
        for where, row in itertools.islice(read_rows(self.tokens, self.title), self.samples):
            ids = row.get("input_ids")
            if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**63 for i in ids):
                raise CalibrationError(f'{where}: expected {{"input_ids": [token ids ≥ 0]}}.')
            if len(ids) < 2:
                raise CalibrationError(f"{where}: a sequence needs at least 2 tokens, found {len(ids)}.")
            yield ids[: self.length]


class TaskSource(GivenSource):
    """An lm-eval task's documents, rendered by it, never those it is measured on without `split`: `task: gsm8k`."""

    task: FileName = Field(min_length=1, description="lm-eval task or group; or the path of a task's YAML file")
    task_path: FilePath | None = Field(
        default=None, description="a folder of lm-eval task files (YAML) in which the task is looked for first"
    )
    split: Literal["train", "validation", "test"] | None = Field(
        default=None, description="default train, or else a validation split that the task is not measured on"
    )

    def _default_title(self) -> str:
        return self.name_in_index

    @property
    def is_file(self) -> bool:
        """Whether `task` is a file and not a name."""
        return self.task.endswith((".yaml", ".yml"))

    @property
    def name_in_index(self) -> str:
        from compressor.data.lm_eval_tasks import named_in

        return named_in(Path(self.task)) if self.is_file else self.task

    @property
    def folder(self) -> Path | None:
        """Where lm-eval looks for the task first."""
        return Path(self.task).parent if self.is_file else self.task_path

    def lengths(self) -> Sequence[int]:
        """Those asked for; nothing is read, but a task's file must be there, and name it."""
        return super().lengths() if self.name_in_index else []

    def documents(self, *, seed: int | None, split: Split) -> Iterable[Text]:
        """The task's training documents, shuffled by `seed`."""
        from compressor.data.lm_eval_tasks import training_texts

        found = training_texts(self.name_in_index, task_path=self.folder, split=self.split, seed=seed or 0)
        return (Text([text], where) for text, where in found)


_KINDS = {
    "demo": DemoSource,
    "text": TextSource,
    "jsonl": JsonLinesSource,
    "tokens": TokensSource,
    "dataset": DatasetSource,
    "task": TaskSource,
}
SOURCE_KINDS = tuple(_KINDS)


def _class_name(value: Any) -> str | None:
    """The name of the class that a mapping is meant for; None without exactly one of the keys that tell."""
    if isinstance(value, BaseSource):
        return type(value).__name__
    kinds = [kind for kind in _KINDS if kind in value] if isinstance(value, dict) else []
    return _KINDS[kinds[0]].__name__ if len(kinds) == 1 else None


Source = Annotated[
    Annotated[DemoSource, Tag("DemoSource")]
    | Annotated[TextSource, Tag("TextSource")]
    | Annotated[JsonLinesSource, Tag("JsonLinesSource")]
    | Annotated[TokensSource, Tag("TokensSource")]
    | Annotated[DatasetSource, Tag("DatasetSource")]
    | Annotated[TaskSource, Tag("TaskSource")],
    Discriminator(
        _class_name,
        custom_error_type="source_kind",
        custom_error_message=(
            f"a source says where it comes from with exactly one of the keys {', '.join(SOURCE_KINDS)}"
        ),
    ),
]


def _document(
    row: Mapping[str, Any], field: str | None, where: object, *, is_arrow: bool = False, has_images: bool = False
) -> Document:
    """The text or the chat of one row. Arrow fills keys that a struct lacks with null: `is_arrow` leaves these out."""
    name = field or next((one for one in ("text", "messages") if row.get(one) is not None), "text")
    if name not in row:
        raise CalibrationError(
            f"{where}: no text under {name!r}; found the keys {sorted(row)}. `field:` names the one that holds it."
        )
    value = row[name]
    messages = value if name == "text" else from_json(value)
    if isinstance(messages, list) and all(_is_message(one) for one in messages):
        value = messages
    if has_images and isinstance(value, str) and row.get("images"):
        value = [{"role": "user", "content": value}]
    if isinstance(value, str):
        return Text([value], where)
    if not isinstance(value, list):
        found = json.dumps(value, default=str)[:80]
        raise CalibrationError(
            f"{where}: the value under {name!r} is {found}; a text or the messages of a chat go there."
        )
    for message in value:
        if not _is_message(message):
            raise CalibrationError(
                f'{where}: the chat under {name!r} is no list of messages such as {{"role": "user", "content": "…"}}; '
                f"found {str(message)[:80]!r}."
            )
    if not value:
        raise CalibrationError(f"{where}: the chat under {name!r} has no messages.")
    others = {key: one for key, one in row.items() if key != name and one is not None}
    if is_arrow:
        value, others = [{"content": None, **_without_nulls(message)} for message in value], _without_nulls(others)
    return Chat(value, others, where)


def _is_message(message: Any) -> bool:
    """Whether this has a role, and says something or calls a tool."""
    is_named = isinstance(message, dict) and isinstance(message.get("role"), str)
    return is_named and bool("content" in message or message.get("tool_calls") or message.get("function_call"))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


_T = TypeVar("_T")


def _shuffled(documents: Iterable[_T], seed: int | None) -> Iterable[_T]:
    if seed is None:
        return documents
    documents = list(documents)
    random.Random(seed).shuffle(documents)
    return documents


def _check_file(path: Path, title: str) -> None:
    if not os.path.exists(path):
        raise CalibrationError(f"source {title!r}: there is no file {path}.")
