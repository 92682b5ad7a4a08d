"""Named data sources → batches of token ids with padding masks.

Every source yields *sequences*: 1-D int64 tensors of token ids. Text is tokenised document by document, the
documents are joined with the tokenizer's end-of-text id (where it has one) and cut into sequences of exactly
`length` tokens; the remainder that does not fill a sequence is dropped. Ready-made ids (`tokens:`) are taken
as they are, in order.

Chats are rendered by the tokenizer's chat template. Every source is a *domain*, whose figures are kept apart.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.errors import CalibrationError
from compressor.sources import BaseSource, DemoSource, Document, Split, TokensSource


@dataclass(frozen=True)
class Sequences:
    """The token sequences of one source, and a digest of the ids by which a record can tell them apart."""

    name: str
    ids: tuple[Tensor, ...]
    fingerprint: str

    @property
    def num_tokens(self) -> int:
        """Tokens in all sequences together."""
        return sum(len(ids) for ids in self.ids)


@dataclass(frozen=True)
class TokenBatch:
    """Token ids [B, S] int64, padded on the right; a mask [B, S] that is True where a token is real; the name of the
    source that they come from, the *domain*; and whether it is held-out text, which nothing may be decided by.
    """

    input_ids: Tensor
    attention_mask: Tensor
    domain: str = ""
    held_out: bool = False


def load_sequences(source: BaseSource, tokenizer: Any | None, *, seed: int, split: Split = "train") -> Sequences:
    """Read a source.

    `tokenizer` is a transformers tokenizer, or None for a model without one (only `tokens:` sources work).
    `seed` orders the documents; `split` is what a `demo:` source uses unless it says otherwise.
    Raises CalibrationError when the source is missing, empty, or shorter than one sequence.
    """
    if isinstance(source, TokensSource):
        ids = [torch.tensor(row, dtype=torch.int64) for row in source.sequences()]
        if not ids:
            raise CalibrationError(f"calibration source {source.title!r} ({source.tokens}) is empty.")
    else:
        if tokenizer is None:
            raise CalibrationError(
                f"calibration source {source.title!r} is text, but the model's folder has no tokenizer. "
                f"Add the tokenizer's files, or give ready-made ids with a `tokens:` source."
            )
        parts = source.parts() if isinstance(source, DemoSource) else [source]
        packed = [_pack(part, tokenizer, part.documents(seed=seed, split=split)) for part in parts]
        ids = [sequence for turn in itertools.zip_longest(*packed) for sequence in turn if sequence is not None]
    return Sequences(source.title, tuple(ids), fingerprint(ids))


def load_with_held_out(source: BaseSource, tokenizer: Any | None, *, seed: int) -> tuple[Sequences, Sequences | None]:
    """What `load_sequences` gives, and text of the same kind that it does not give: a quarter as much, 32 sequences at
    most.

    That is the other split of a `demo:` source; of all others the sequences that follow. None where none are left.
    """
    if source.samples is None:  # ready-made ids, all of them
        return load_sequences(source, tokenizer, seed=seed), None
    num_others = max(1, min(32, source.samples // 4))
    if isinstance(source, DemoSource):
        own = load_sequences(source, tokenizer, seed=seed)
        update = {"samples": max(num_others, len(source.parts())), "split": None}
        split: Split = "train" if source.split == "held-out" else "held-out"
        others = load_sequences(source.model_copy(update=update), tokenizer, seed=seed, split=split).ids
    else:
        longer = source.model_copy(update={"samples": source.samples + num_others})
        ids = load_sequences(longer, tokenizer, seed=seed).ids
        own_ids, others = ids[: source.samples], ids[source.samples :]
        own = Sequences(source.title, own_ids, fingerprint(own_ids))
    return own, Sequences(held_out_name(source.title), others, fingerprint(others)) if others else None


def held_out_name(title: str) -> str:
    """What the held-out text of a source is called."""
    return f"held-out {title}"


def fingerprint(sequences: Iterable[Tensor]) -> str:
    """A digest of token ids, sensitive to order and to where sequences end: `sha256:` and 16 hex digits."""
    digest = hashlib.sha256()
    for ids in sequences:
        digest.update(f"{len(ids)}:".encode())
        digest.update(ids.to(torch.int64).numpy().tobytes())
    return f"sha256:{digest.hexdigest()[:16]}"


def make_batches(
    sequences: Sequence[Tensor], batch_size: int, domain: str = "", *, held_out: bool = False
) -> list[TokenBatch]:
    """Group sequences, in order, `batch_size` at a time; shorter ones are padded on the right with id 0."""
    batches = []
    for start in range(0, len(sequences), batch_size):
        group = sequences[start : start + batch_size]
        width = max(len(ids) for ids in group)
        input_ids = torch.zeros(len(group), width, dtype=torch.int64)
        attention_mask = torch.zeros(len(group), width, dtype=torch.bool)
        for row, ids in enumerate(group):
            input_ids[row, : len(ids)] = ids
            attention_mask[row, : len(ids)] = True
        batches.append(TokenBatch(input_ids, attention_mask, domain, held_out))
    return batches


def check_vocabulary(sequences: Sequences, vocab_size: int) -> None:
    """Raise CalibrationError when a token id has no row in the model's embedding of `vocab_size` rows."""
    largest = max(int(ids.max()) for ids in sequences.ids)
    if largest >= vocab_size:
        raise CalibrationError(
            f"source {sequences.name!r} holds token id {largest}, but the model has only {vocab_size} "
            f"embeddings (ids 0 to {vocab_size - 1}): these ids, or the tokenizer that made "
            f"them, belong to another model."
        )


def tokenizer_fingerprint(tokenizer: Any | None) -> str:
    """A digest of everything that decides how a tokenizer cuts text: `sha256:` and 16 hex digits; `none` for None."""
    if tokenizer is None:
        return "none"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        text = backend.to_str()
    else:
        special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
        text = json.dumps([sorted(tokenizer.get_vocab().items()), special], sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _as_text(document: Document, tokenizer: Any, source: BaseSource) -> str:
    """A text as it is; a chat as the tokenizer's template renders it."""
    if isinstance(document, str):
        return document
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            f"source {source.title!r} holds chats, but the tokenizer has no chat template to render them with. Take "
            f"the tokenizer of a chat model, or give the text itself."
        )
    try:
        return str(tokenizer.apply_chat_template(document, tokenize=False))
    except Exception as error:  # templates raise what they like
        raise CalibrationError(
            f"source {source.title!r}: the tokenizer's chat template refuses a chat that begins with "
            f"{str(document)[:80]!r}: {error}"
        ) from error


def _pack(source: BaseSource, tokenizer: Any, documents: Iterable[Document]) -> list[Tensor]:
    """Join the documents' tokens, separated by end-of-text, and cut `samples` sequences of `length`."""
    separator = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    wanted = source.samples * source.length
    stream: list[int] = []
    for document in documents:
        text = _as_text(document, tokenizer, source)
        stream += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + separator
        if len(stream) >= wanted:
            break
    count = min(source.samples, len(stream) // source.length)
    if not count:
        what = "is empty" if len(stream) <= 1 else f"has only {len(stream)} tokens"
        raise CalibrationError(
            f"source {source.title!r} {what}, less than one sequence of {source.length} tokens. "
            f"Give more text, or a smaller `length:`."
        )
    whole = torch.tensor(stream[: count * source.length], dtype=torch.int64)
    return list(whole.view(count, source.length))
