"""Named data sources → batches of token ids with padding masks.

Every source yields *sequences*: 1-D int64 tensors of token ids. Text is tokenised document by document, as far as it is
wanted; each document begins as the tokenizer begins a text, ends as it ends one or with the end-of-text id (where it
has one), and all are cut into sequences of exactly `length` tokens; the remainder that does not fill a sequence is
dropped. Ready-made ids (`tokens:`) are taken as they are, in order.

Chats are rendered by the tokenizer's chat template, which begins them itself. Every source is a *domain*, whose figures
are kept apart.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from compressor.data.chats import render, unread
from compressor.data.sequences import Sequences, fingerprint, tokenizer_of
from compressor.data.sources import (
    BaseSource,
    Chat,
    DemoSource,
    Document,
    GivenSource,
    RowsSource,
    Split,
    Text,
    TextualSource,
    TokensSource,
)
from compressor.data.tokenisation import Tokenisation
from compressor.errors import CalibrationError


def load_sequences(source: BaseSource, reader: Any | None, *, seed: int | None, split: Split = "train") -> Sequences:
    """Read a source. `reader`: a tokenizer, or an ImageReader; None: only `tokens:` sources. `seed` orders the
    documents, without one it is a look at the first sequence; `split` is for `demo:` sources. Raises CalibrationError
    when it is missing, empty or too short.
    """
    if isinstance(source, TokensSource):
        ids = [torch.tensor(row, dtype=torch.int64) for row in source.sequences()]
        if not ids:
            raise CalibrationError(f"calibration source {source.title!r} ({source.tokens}) is empty.")
        return Sequences(source.title, tuple(ids), fingerprint(ids), source.samples)
    if reader is None:
        raise CalibrationError(
            f"calibration source {source.title!r} is text, but there is no tokenizer; add it, or give `tokens:`."
        )
    assert isinstance(source, TextualSource)
    parts: Sequence[TextualSource] = source.parts() if isinstance(source, DemoSource) else [source]
    if seed is None:
        parts = [part.model_copy(update={"samples": 1}) for part in parts]
    if isinstance(parts[0], RowsSource) and parts[0].images:
        found: Sequences = reader.read(parts[0], parts[0].documents(seed=seed, split=split))
        return found
    tokenizer = tokenizer_of(reader)
    packed = [_pack(part, tokenizer, part.documents(seed=seed, split=split)) for part in parts]
    turns = itertools.zip_longest(*(one.ids for one in packed))
    ids = [sequence for turn in turns for sequence in turn if sequence is not None]
    return dataclasses.replace(packed[0], ids=tuple(ids), fingerprint=fingerprint(ids), asked=source.samples)


def load_with_held_out(source: BaseSource, reader: Any | None, *, seed: int) -> tuple[Sequences, Sequences | None]:
    """What `load_sequences` gives, and a quarter as much held-out text, 32 sequences at most: the other split of a
    `demo:` source, else the sequences that follow; None where none are left.
    """
    if source.samples is None:  # ready-made ids, all of them
        return load_sequences(source, reader, seed=seed), None
    num_others = max(1, min(32, source.samples // 4))
    if isinstance(source, DemoSource):
        own = load_sequences(source, reader, seed=seed)
        update = {"samples": max(num_others, len(source.parts())), "split": None}
        split: Split = "train" if source.split == "held-out" else "held-out"
        found, start = load_sequences(source.model_copy(update=update), reader, seed=seed, split=split), 0
    else:
        longer = source.model_copy(update={"samples": source.samples + num_others})
        found, start = load_sequences(longer, reader, seed=seed), source.samples
        own = found.first(source.samples)
    about: dict[str, Any] = {"name": held_out_name(source.title), "asked": None, "special_tokens": None, "notes": ()}
    others = found.part(slice(start, None), **about)
    return own, others if others.ids else None


def held_out_name(title: str) -> str:
    """What the held-out text of a source is called."""
    return f"held-out {title}"


def check_length(source: BaseSource, max_positions: int | None) -> None:
    """Raise CalibrationError where sequences would be longer than the model's positions; reads ready-made ids."""
    longest = max(source.lengths(), default=0)
    if max_positions is not None and longest > max_positions:
        raise CalibrationError(
            f"source {source.title!r} has sequences of {longest} tokens, the limit is {max_positions}: lower `length:`."
        )


def missing_sequences(found: Sequence[Sequences]) -> Iterator[str]:
    """A sentence for each text that gave fewer sequences than were asked for."""
    for one in found:
        if one.asked is not None and len(one.ids) < one.asked:
            yield f"source {one.name!r} has text for {len(one.ids)} of the {one.asked} sequences asked for"


_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def _pieces(document: Document, tokenizer: Any, source: TextualSource) -> Iterator[str]:
    """The document's text; a chat as the tokenizer's template renders it. Raises CalibrationError for half a surrogate
    pair, which is no text, unless the source says to replace it.
    """
    pieces = document.pieces if isinstance(document, Text) else [_rendered(document, tokenizer, source)]
    for piece in pieces:
        if piece.isascii() or not (lone := _LONE_SURROGATE.search(piece)):
            yield piece
        elif isinstance(source, GivenSource) and source.errors == "replace":
            yield _LONE_SURROGATE.sub("\ufffd", piece)
        else:
            raise CalibrationError(
                f"source {source.title!r}: {document.where}: {lone[0]!r} after {piece[: lone.start()][-20:]!r} is "
                f"half of a surrogate pair, which is no text. Say `errors: replace` to have U+FFFD there."
            )


def _rendered(chat: Chat, tokenizer: Any, source: TextualSource) -> str:
    return render(tokenizer, chat, getattr(source, "template", None), source.title)


def _pack(source: TextualSource, tokenizer: Any, documents: Iterable[Document]) -> Sequences:
    """Join the documents' tokens and cut `samples` sequences of `length`."""
    wanted = source.samples * source.length
    tokens = Tokenisation(tokenizer, source.title, special_tokens=source.special_tokens)
    lost: dict[str, None] = {}
    for document in documents:
        is_chat = isinstance(document, Chat)
        tokens.add(_pieces(document, tokenizer, source), wanted, is_rendered=is_chat)
        if isinstance(document, Chat):
            lost |= dict.fromkeys(unread(tokenizer, document, getattr(source, "template", None), source.title))
        if len(tokens.stream) >= wanted:
            break
    stream = tokens.stream
    count = min(source.samples, len(stream) // source.length)
    if not count:
        what = "is empty" if len(stream) <= 1 else f"has only {len(stream)} tokens"
        raise CalibrationError(
            f"source {source.title!r} {what}, less than one sequence of {source.length} tokens: lower `length:`."
        )
    whole = torch.tensor(stream[: count * source.length], dtype=torch.int64)
    ids = tuple(whole.view(count, source.length))
    notes = tuple(f"source {source.title!r}: the chat template does not read the rows' {key}" for key in lost)
    return Sequences(source.title, ids, fingerprint(ids), source.samples, tokens.special_tokens, notes)
