"""Where text and token ids come from: the entries of `calibration.data` and `evaluate.perplexity`.

A source is named by the one key that says where it comes from (`demo:`, `text:`, `jsonl:`, `tokens:`,
`dataset:`, `task:`). Nothing here imports torch, so that recipes are read without it; `compressor.calibration`
makes batches of what is read.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

from compressor import network
from compressor.errors import CalibrationError

Split = Literal["train", "held-out"]
Messages = list[dict[str, Any]]
"""A chat: `[{"role": "user", "content": "…"}, …]`, rendered by the tokenizer's chat template."""
Document = str | Messages
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
        """Tokens of each sequence, at most, as far as that is known before the text is read. Raises CalibrationError
        where a file is not there.
        """
        return [self.length] * self.samples

    def documents(self, *, seed: int, split: Split) -> Iterable[Document]:
        """The texts or chats, in the order in which they are to be used."""
        raise NotImplementedError


class DemoSource(BaseSource):
    """Text that every Python carries: `demo: code`, `prose`, `arithmetic`, or `mix` of the three."""

    demo: Literal["code", "prose", "arithmetic", "mix"] = Field(description="which text, or a mix of the three")
    split: Split | None = Field(default=None, description="default: train to calibrate, held-out to evaluate")

    def _default_title(self) -> str:
        return f"demo:{self.demo}"

    def documents(self, *, seed: int, split: Split) -> Iterable[str]:
        """One domain's documents of the split, shuffled by `seed`; a `mix` is read through its `parts`."""
        from compressor.demo.corpus import documents

        assert self.demo != "mix"
        return _shuffled(documents(self.demo, self.split or split), seed)

    def parts(self) -> list[DemoSource]:
        """One source for each domain, with equal shares of the sequences: the first ones get what is left over."""
        from compressor.demo.corpus import DOMAINS

        domains = DOMAINS if self.demo == "mix" else (self.demo,)
        shares = [self.samples // len(domains) + (i < self.samples % len(domains)) for i in range(len(domains))]
        return [
            self.model_copy(update={"demo": domain, "samples": share, "name": self.title})
            for domain, share in zip(domains, shares, strict=True)
            if share
        ]


class TextSource(BaseSource):
    """A UTF-8 text file, one document: `text: corpus.txt`. Sequences are cut from its start."""

    text: FilePath = Field(description="a UTF-8 text file")

    def _default_title(self) -> str:
        return self.text.stem

    def lengths(self) -> Sequence[int]:
        """Those asked for; the file is not read, but must be there."""
        _check_file(self.text, self.title)
        return super().lengths()

    def documents(self, *, seed: int, split: Split) -> Iterable[str]:
        """The whole file as one document."""
        return [_read_text(self.text, self.title)]


class JsonLinesSource(BaseSource):
    """A JSON-lines file with one document a line: `jsonl: corpus.jsonl`, its text or its chat under `field`.

    A chat is a list of messages, each with `role` and `content`. Without `field`, that is `text`, or else `messages`.
    """

    jsonl: FilePath = Field(description="a JSON-lines file, one document a line")
    field: str | None = Field(
        default=None, description="the key that holds the text, or the messages of a chat; default text or messages"
    )

    def _default_title(self) -> str:
        return self.jsonl.stem

    def lengths(self) -> Sequence[int]:
        """Those asked for; the file is not read, but must be there."""
        _check_file(self.jsonl, self.title)
        return super().lengths()

    def documents(self, *, seed: int, split: Split) -> Iterable[Document]:
        """The lines' texts or chats, shuffled by `seed`."""
        found = [
            _document(row, self.field, f"{self.jsonl}:{number}") for number, row in _json_lines(self.jsonl, self.title)
        ]
        return _shuffled(found, seed)


class DatasetSource(BaseSource):
    """A Hugging Face dataset, on the hub or in a folder, streamed: `dataset: allenai/c4, config: en`."""

    dataset: FileName = Field(description="hub id or local folder of a Hugging Face dataset")
    config: str | None = Field(default=None, description="the dataset's configuration, such as a language")
    split: str = Field(default="train", description="the dataset's split")
    field: str | None = Field(
        default=None, description="the column that holds the text, or the messages of a chat; default text or messages"
    )

    def _default_title(self) -> str:
        return self.dataset.rstrip("/").rsplit("/", 1)[-1]

    def documents(self, *, seed: int, split: Split) -> Iterable[Document]:
        """The rows' texts or chats, shuffled by `seed` through a buffer of 10,000 rows."""
        import datasets

        is_local = Path(self.dataset).exists()
        with nullcontext() if is_local else network.not_waited_for() as unreachable:
            try:
                rows = datasets.load_dataset(self.dataset, self.config, split=self.split, streaming=True)
            except Exception as error:
                why = f"the hub cannot be reached ({unreachable})" if unreachable else error
                raise CalibrationError(
                    f"dataset {self.dataset!r} cannot be opened: {why}. Without a network, give a local "
                    f"folder, or use a `text:`, `jsonl:` or `demo:` source."
                ) from error
        for row in self._rows_read(rows.shuffle(seed=seed, buffer_size=10_000)):
            yield _document(row, self.field, f"dataset {self.dataset!r}")

    def _rows_read(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The rows; streaming meets damaged files and lost connections only here."""
        try:
            yield from rows
        except Exception as error:  # every format has its own kinds
            raise CalibrationError(f"dataset {self.dataset!r} cannot be read: {error}") from error


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

    def sequences(self) -> list[list[int]]:
        """The file's sequences of token ids, in order."""
        sequences = []
        for number, row in _json_lines(self.tokens, self.title):
            ids = row.get("input_ids")
            if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**63 for i in ids):
                raise CalibrationError(f'{self.tokens}:{number}: expected {{"input_ids": [token ids ≥ 0]}}.')
            if len(ids) < 2:
                raise CalibrationError(f"{self.tokens}:{number}: a sequence needs at least 2 tokens, found {len(ids)}.")
            sequences.append(ids[: self.length])
        return sequences[: self.samples]


class TaskSource(BaseSource):
    """An lm-eval task's training documents, prompt and answer as the task renders them: `task: gsm8k`.

    Never the documents that the task is measured on, unless `split` names them.
    """

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
        """What lm-eval calls the task."""
        from compressor.tasks import named_in

        return named_in(Path(self.task)) if self.is_file else self.task

    @property
    def folder(self) -> Path | None:
        """Where lm-eval looks for the task first."""
        return Path(self.task).parent if self.is_file else self.task_path

    def documents(self, *, seed: int, split: Split) -> Iterable[str]:
        """The task's training documents, shuffled by `seed`."""
        from compressor.tasks import training_texts

        return training_texts(self.name_in_index, task_path=self.folder, split=self.split, seed=seed)


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


def _document(row: Mapping[str, Any], field: str | None, where: str) -> Document:
    """The text or the chat of one row."""
    name = field or next((one for one in ("text", "messages") if row.get(one) is not None), "text")
    value = row.get(name)
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise CalibrationError(
            f"{where}: no text under {name!r}; found the keys {sorted(row)}. Say `field:` to name the one that holds "
            f"the text, or the messages of a chat."
        )
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise CalibrationError(
                f'{where}: the chat under {name!r} is no list of messages such as {{"role": "user", "content": "…"}}; '
                f"found {str(message)[:80]!r}."
            )
    if not value:
        raise CalibrationError(f"{where}: the chat under {name!r} has no messages.")
    return value


_T = TypeVar("_T")


def _shuffled(documents: Iterable[_T], seed: int) -> list[_T]:
    documents = list(documents)
    random.Random(seed).shuffle(documents)
    return documents


def _check_file(path: Path, title: str) -> None:
    if not os.path.exists(path):
        raise CalibrationError(f"source {title!r}: there is no file {path}.")


def _read_text(path: Path, title: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CalibrationError(f"source {title!r}: there is no file {path}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"source {title!r}: {path} cannot be read as UTF-8 text: {error}.") from error


def _json_lines(path: Path, title: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_read_text(path, title).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}.") from error
        except RecursionError as error:
            raise CalibrationError(f"{path}:{number}: not a document: nested too deeply.") from error
        if not isinstance(row, dict):
            raise CalibrationError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}.")
        yield number, row
