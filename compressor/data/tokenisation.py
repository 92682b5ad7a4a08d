"""Text → token ids, as many as are wanted and no more: a long document is cut off, and what its cut could have changed
is left out, so that the ids are those which the whole document begins with.

A cut is made where a word ends, and the tokens before it are dropped too. Where no word ends (one line of digits, a
script without blanks) those tokens are taken that two cuts agree on. Not covered: a tokenizer whose tokens depend on
text further away than that. None is known but for Unigram's ties, which rounding breaks, in one letter repeated.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from compressor.errors import CalibrationError

_SAMPLE = 16_384
"""Characters by which it is estimated how many a token has."""
_DROPPED = 100
"""Tokens before a cut that are dropped."""
_NEAR = 10_000
"""Characters before a cut within which the end of a word is looked for."""
_SHIFT = 7
"""Characters between two cuts; a prime, so that groups of digits are cut at other places."""


class Tokenisation:
    """One source's documents → one stream of token ids: each begun and ended as the tokenizer does, with
    `special_tokens`, and in any case followed by the end-of-text token where there is one.
    """

    def __init__(self, tokenizer: Any, title: str, *, special_tokens: bool) -> None:
        self._tokenizer, self._title = tokenizer, title
        self._is_to_find = special_tokens
        self.begin: list[int] = []
        """Ids that the tokenizer puts before a text; known once there was one."""
        self.end: list[int] = []
        """Ids that it puts behind a text."""
        self.stream = array("q")

    def add(self, pieces: Iterable[str], wanted: int, *, is_rendered: bool = False) -> None:
        """Add a document's ids until the stream has `wanted`; a template has begun one that `is_rendered`."""
        text = _Growing(pieces)
        if self._is_to_find and not is_rendered:
            self._find_borders(text.first(64) + " a")  # no special token, so that there is one place for it
        begin, end = ([], []) if is_rendered else (self.begin, self.end)
        ids = self._first_ids(text, wanted - len(self.stream))
        self.stream.extend([] if ids[: len(begin)] == begin else begin)
        self.stream.extend(ids)
        if text.is_whole:
            end_of_text = self._tokenizer.eos_token_id
            self.stream.extend(end or ([] if end_of_text is None else [end_of_text]))

    @property
    def special_tokens(self) -> dict[str, list[str]]:
        """The tokens that the tokenizer puts before and behind each text, as it spells them."""
        ends = {"begin": self.begin, "end": self.end}
        return {side: self._tokenizer.convert_ids_to_tokens(ids) if ids else [] for side, ids in ends.items()}

    def _find_borders(self, text: str) -> None:
        plain, whole = self._ids(text), self._ids(text, special_tokens=True)
        if not plain:
            return
        places = [start for start in range(len(whole)) if whole[start : start + len(plain)] == plain]
        if not places:
            raise CalibrationError(
                f"source {self._title!r}: special tokens change how a text is cut; say `special_tokens: false`."
            )
        self.begin, self.end = whole[: places[0]], whole[places[0] + len(plain) :]
        self._is_to_find = False

    def _ids(self, text: str, *, special_tokens: bool = False) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=special_tokens, verbose=False)["input_ids"])

    def _first_ids(self, text: _Growing, wanted: int) -> Sequence[int]:
        """The document's ids, at least as many as are wanted or all."""
        size = min(_SAMPLE, 8 * (wanted + _DROPPED))
        while True:
            part = text.first(size)
            if text.is_whole:
                return self._ids(part)
            settled = self._settled(part)
            if len(settled) >= wanted:
                return settled
            likely = size * (wanted + _DROPPED) / max(1, len(settled))
            size = int(min(max(1.1 * likely, 1.5 * size), 8 * size))

    def _settled(self, part: str) -> list[int]:
        """The ids of a document's beginning that do not change whatever follows."""
        near = part[-_NEAR:]
        blanks = [found.start() for found in re.finditer(r"(?<=\S)\s", near)]
        if blanks:
            lines = [at for at in blanks if near[at] == "\n"]
            cut = len(part) - len(near) + (lines or blanks)[-1]
            return self._ids(part[:cut])[:-_DROPPED]
        ids, others = self._ids(part), self._ids(part[:-_SHIFT])
        differ = (number for number, (one, other) in enumerate(zip(ids, others, strict=False)) if one != other)
        return ids[: max(0, next(differ, len(others)) - _DROPPED)]


class _Growing:
    """A text of which only the beginning is read."""

    def __init__(self, pieces: Iterable[str]) -> None:
        self._pieces: Iterator[str] = iter(pieces)
        self._text = ""
        self.is_whole = False
        """Whether the last beginning asked for was all."""

    def first(self, size: int) -> str:
        """The first `size` characters, or all if there are no more."""
        read, length = [self._text] if self._text else [], len(self._text)
        while length <= size and (piece := next(self._pieces, None)) is not None:
            read.append(piece)
            length += len(piece)
        self._text = "".join(read)
        self.is_whole = length <= size
        return self._text[:size]
