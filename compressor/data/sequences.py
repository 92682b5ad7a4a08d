"""Token sequences and batches of them: what everything that runs a model is given.

Dimensions: B sequences of a batch, S positions.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.errors import CalibrationError
from compressor.wording import counted, digest


@dataclass(frozen=True)
class Sequences:
    """The token sequences of one source, and a digest of the ids. `asked`: sequences asked for, None for all;
    `special_tokens`: put around each document, None for ready-made ids; `notes`: sentences for the user. Where rows may
    have images: what the forward is given beside each sequence, or None, and the id that stands where an image is.
    """

    name: str
    ids: tuple[Tensor, ...]
    fingerprint: str
    asked: int | None = None
    special_tokens: Mapping[str, Sequence[str]] | None = None
    notes: tuple[str, ...] = ()
    images: tuple[Mapping[str, Tensor] | None, ...] = ()
    image_token: int | None = None

    def __repr__(self) -> str:
        return f"Sequences({self.name}: {counted(len(self.ids), 'sequence')}, {counted(self.num_tokens, 'token')})"

    @property
    def num_tokens(self) -> int:
        return sum(len(ids) for ids in self.ids)

    @property
    def num_image_tokens(self) -> int:
        """Those that stand where an image is."""
        return sum(int(torch.eq(ids, self.image_token).sum()) for ids in self.ids) if self.image_token else 0

    def to_json(self) -> dict[str, Any]:
        """What a record says of the text."""
        return {
            "name": self.name,
            "sequences": len(self.ids),
            **({"asked": self.asked} if self.asked is not None else {}),
            "tokens": self.num_tokens,
            **({"image_tokens": self.num_image_tokens} if self.images else {}),
            **({"special_tokens": self.special_tokens} if self.special_tokens is not None else {}),
            "fingerprint": self.fingerprint,
        }

    def first(self, asked: int) -> Sequences:
        """The first so many of these sequences, as if they had been asked for."""
        return self.part(slice(asked), asked=asked)

    def part(self, which: slice, **others: Any) -> Sequences:
        """Some of these sequences."""
        ids, images = self.ids[which], self.images[which]
        return dataclasses.replace(self, ids=ids, images=images, fingerprint=fingerprint(ids, images), **others)

    def batches(self, batch_size: int, *, held_out: bool = False) -> list[TokenBatch]:
        """All sequences, see `make_batches`: one at a time where there are images, which have shapes of their own."""
        found = make_batches(self.ids, 1 if self.images else batch_size, self.name, held_out=held_out)
        pairs = zip(found, self.images or [None] * len(found), strict=True)
        return [dataclasses.replace(one, images=of, image_token=self.image_token) for one, of in pairs]


@dataclass(frozen=True)
class TokenBatch:
    """Token ids [B, S] int64, padded on the right; a mask [B, S] that is True where a token is real; the name of the
    source that they come from, the *domain*; and whether it is held-out text, which nothing may be decided by.
    `images` and `image_token` are those of `Sequences`.
    """

    input_ids: Tensor
    attention_mask: Tensor
    domain: str = ""
    held_out: bool = False
    images: Mapping[str, Tensor] | None = None
    image_token: int | None = None

    @property
    def text_mask(self) -> Tensor:
        """[B, S], True where a token is real, and no image stands there."""
        if self.image_token is None:
            return self.attention_mask
        return self.attention_mask & (self.input_ids != self.image_token)

    def __repr__(self) -> str:
        return f"TokenBatch({' × '.join(map(str, self.input_ids.shape))} of {self.domain or 'no source'})"


def fingerprint(sequences: Iterable[Tensor], images: Iterable[Mapping[str, Tensor] | None] = ()) -> str:
    """A digest of token ids, and of images, by order and where sequences end: `sha256:` and 16 hex digits."""
    held = [*(ids.to(torch.int64) for ids in sequences), *(one for of in images if of for one in of.values())]
    numbers = (one.float() if one.is_floating_point() else one for one in held)  # numpy has no bfloat16
    return digest(part for one in numbers for part in (f"{one.numel()}:", one.numpy().tobytes()))


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


def tokenizer_of(reader: Any) -> Any:
    """That of a processor or an ImageReader, which read images; a tokenizer itself."""
    return reader.tokenizer if hasattr(reader, "image_processor") or hasattr(reader, "image_token") else reader


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
    return digest(text)
