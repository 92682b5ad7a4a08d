"""Text files and JSON-lines files, of which only what is asked for is in memory.

A text is read from its start, in blocks. Of a JSON-lines file it is first found where the rows begin (8 bytes each are
kept); then the rows that are wanted are read, in any order. What is wrong in a row that nobody wants is not seen.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from compressor.errors import CalibrationError

_BLOCK = 2**18
"""Characters of a text, or bytes of a file, that are read at one time."""


@dataclass(frozen=True)
class Line:
    """A line of a file, by its first byte; as text `FILE:NUMBER`, for which the file is read up to there."""

    path: Path
    start: int

    @property
    def number(self) -> int:
        """Which line it is, from 1."""
        number, left = 1, self.start
        with self.path.open("rb") as file:
            while block := file.read(min(_BLOCK, left)):
                number, left = number + block.count(b"\n"), left - len(block)
        return number

    def __str__(self) -> str:
        return f"{self.path}:{self.number}"


@dataclass(frozen=True)
class Rows:
    """Where the rows of a JSON-lines file begin, in bytes, blank lines left out; and the longest one's bytes."""

    starts: array[int]
    longest: int


def find_rows(path: Path, title: str) -> Rows:
    """Look through a file once for where its rows begin. Raises CalibrationError if it cannot be read, or only once."""
    try:
        state = path.stat()
        if not path.is_file() and not path.is_dir():
            raise CalibrationError(
                f"source {title!r}: {path} is a pipe or a device, and rows are read in any order. Give a file."
            )
        return _find_rows(path, state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise _unreadable(path, title, error) from error


@lru_cache(maxsize=16)  # a run that was checked before has no need to look again
def _find_rows(path: Path, size: int, changed: int) -> Rows:
    starts, longest, start, end, is_blank = array("Q"), 0, 0, 0, True
    with path.open("rb") as file:
        while piece := file.readline(_BLOCK):
            end += len(piece)
            is_blank = is_blank and piece.isspace()
            if piece.endswith(b"\n") or end == size:
                if not is_blank:
                    starts.append(start)
                    longest = max(longest, end - start)
                start, is_blank = end, True
    return Rows(starts, longest)


def read_rows(
    path: Path, title: str, starts: Iterable[int] | None = None, *, replace: bool = False
) -> Iterator[tuple[Line, dict[str, Any]]]:
    """(place, JSON object) of the lines that begin at `starts`, by default all in order, blank ones left out. `replace`
    puts U+FFFD for bad bytes. Raises CalibrationError for the first row that is no object, by file and line.
    """
    try:
        with path.open("rb") as file:
            _check_kind(file, path, title)
            for start, line in _all_lines(file) if starts is None else _lines_at(file, starts):
                where = Line(path, start)
                text = _decoded(line, where, title, replace=replace)
                if text.strip():
                    yield where, _parsed(text, where)
    except OSError as error:
        raise _unreadable(path, title, error) from error


def _all_lines(file: Any) -> Iterator[tuple[int, bytes]]:
    start = 0
    for line in file:
        yield start, line
        start += len(line)


def _lines_at(file: Any, starts: Iterable[int]) -> Iterator[tuple[int, bytes]]:
    for start in starts:
        file.seek(start)
        yield start, file.readline()


def _decoded(line: bytes, where: Line, title: str, *, replace: bool) -> str:
    try:
        return line.decode("utf-8" if where.start else "utf-8-sig", "replace" if replace else "strict")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"source {title!r}: {where.path} is no UTF-8: {error}, in line {where.number}; `errors: replace` puts "
            f"U+FFFD."
        ) from error


def _parsed(text: str, where: Line) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{where}: not JSON: {error.msg} at column {error.colno}.{_advice(text)}") from error
    except RecursionError as error:
        raise CalibrationError(f"{where}: not a document: nested too deeply.") from error
    except ValueError as error:  # a number of thousands of digits
        raise CalibrationError(f"{where}: not JSON that can be read: {error}.") from error
    if not isinstance(row, dict):
        raise CalibrationError(f"{where}: expected a JSON object, found {type(row).__name__}.{_advice(text)}")
    return row


def _advice(line: str) -> str:
    return " A `.json` file that is one array of rows is a `dataset:`." if line.lstrip().startswith("[") else ""


def text_blocks(path: Path, title: str, *, replace: bool = False) -> Iterator[str]:
    """A UTF-8 text by blocks; `replace` puts U+FFFD. Raises CalibrationError if unreadable, naming the line."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace" if replace else "strict") as file:
            _check_kind(file.buffer, path, title)
            while block := file.read(_BLOCK):
                yield block
    except UnicodeDecodeError:
        with path.open("rb") as file:
            for start, line in _all_lines(file):
                _decoded(line, Line(path, start), title, replace=False)
        raise
    except OSError as error:
        raise _unreadable(path, title, error) from error


_OTHERS = {
    b"\x1f\x8b": ("packed by gzip", "Unpack it"),
    b"(\xb5/\xfd": ("packed by zstd", "Unpack it"),
    b"\xfd7zX": ("packed by xz", "Unpack it"),
    b"PK\x03\x04": ("packed by zip", "Unpack it"),
    b"\xff\xfe": ("UTF-16", "Write it as UTF-8"),
    b"\xfe\xff": ("UTF-16", "Write it as UTF-8"),
}
"""How files begin that are no UTF-8 text: what they are, and what to do."""


def _check_kind(file: Any, path: Path, title: str) -> None:
    start = file.peek(4)
    for mark, (kind, advice) in _OTHERS.items():
        if start.startswith(mark):
            raise CalibrationError(f"source {title!r}: {path} is {kind}, and UTF-8 text is read. {advice} first.")


def from_json(value: Any) -> Any:
    """Lists and mappings that a data set keeps as JSON text, their elements included; anything else as it is."""
    if isinstance(value, list):
        return [from_json(one) for one in value]
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return from_json(json.loads(value))
    except (ValueError, RecursionError):
        return value


def _unreadable(path: Path, title: str, error: OSError) -> CalibrationError:
    if isinstance(error, IsADirectoryError):
        return CalibrationError(f"source {title!r}: {path} is a folder. Give a file, or the folder as `dataset:`.")
    if isinstance(error, FileNotFoundError):
        return CalibrationError(f"source {title!r}: there is no file {path}.")
    return CalibrationError(f"source {title!r}: {path} cannot be read: {error.strerror or error}.")
