"""The text of a run: read once, whichever passes use it, and cut into batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compressor.data.packing import load_sequences, load_with_held_out, missing_sequences
from compressor.data.sequences import Sequences, TokenBatch, check_vocabulary, make_batches
from compressor.data.sources import BaseSource
from compressor.edit.verify import random_batch
from compressor.machine.progress import Progress
from compressor.recipe.schema import LoadedRecipe, ResolvedPass
from compressor.wording import counted

_PROBE_SEQUENCES, _PROBE_TOKENS = 4, 256
_SLICE_LENGTH = 256
"""Tokens of a sequence that candidates are measured on: many short ones tell more than a few long ones."""


@dataclass(frozen=True)
class Texts:
    """What a recipe's passes are calibrated on, and what the model is measured on."""

    by_pass: Sequence[Sequence[Sequences]]
    """The calibration text of every pass, one entry a domain."""
    held_out: Sequence[Sequence[Sequences]]
    """Held-out text of every pass that wants it."""
    perplexity: Sequence[Sequences]

    def calibration(self) -> list[Sequences]:
        """Every text that some pass is calibrated on, once."""
        return list({id(one): one for of_pass in self.by_pass for one in of_pass}.values())

    def fingerprints(self) -> dict[str, str]:
        """Name → fingerprint of every text."""
        held_out = [one for of_pass in self.held_out for one in of_pass]
        return {one.name: one.fingerprint for one in [*self.calibration(), *held_out, *self.perplexity]}


def read_texts(
    loaded: LoadedRecipe, measured: Iterable[BaseSource], reader: Any | None, num_embeddings: int, progress: Progress
) -> Texts:
    """Read calibration and `measured` text. Raises CalibrationError if unreadable or with ids ≥ `num_embeddings`."""
    seed = loaded.recipe.seed
    read, others = _read_calibration(loaded, reader)
    by_pass, held_out = [], []
    for one in loaded.passes:
        names = [repr(source) for source in loaded.sources_of(one)]
        by_pass.append([read[name] for name in names])
        found = [others[name] for name in names] if one.method.held_out else []
        held_out.append([sequences for sequences in found if sequences is not None])
        if one.method.needs_held_out and not held_out[-1]:
            raise loaded.error(
                one.path,
                f"{one.spec.method} judges by held-out text, and none is left: let its sources give fewer `samples` "
                f"than they have",
            )
    if others and not any(others.values()):
        progress.say("no text is left to hold out: what is decided is only known for the calibration text")
    perplexity = [load_sequences(source, reader, seed=seed, split="held-out") for source in measured]
    for one, fitted in zip(loaded.passes, by_pass, strict=True):
        if one.method.fits_weights:
            _refuse_measured(loaded, one, fitted, perplexity)
    texts = [*read.values(), *perplexity]
    for sentence in (*(note for one in texts for note in one.notes), *missing_sequences(texts)):
        progress.say(sentence)
    for sequences in [*read.values(), *filter(None, others.values()), *perplexity]:
        check_vocabulary(sequences, num_embeddings)
    return Texts(by_pass, held_out, perplexity)


def _refuse_measured(
    loaded: LoadedRecipe, resolved: ResolvedPass, fitted: Sequence[Sequences], measured: Sequence[Sequences]
) -> None:
    """Raise RecipeError where weights would be fitted to half of a text, or more, that the model is measured on."""
    names = {digest: one.name for one in fitted for digest in _digests(one)}
    for text in measured:
        shared = [names[digest] for digest in _digests(text) if digest in names]
        if 2 * len(shared) >= len(text.ids):
            raise loaded.error(
                resolved.path,
                f"{resolved.spec.method} would fit weights to {shared[0]!r}, which holds {len(shared)} of the "
                f"{counted(len(text.ids), 'sequence')} of {text.name!r} that the model is measured on: measure it on "
                f"other text",
            )


def _digests(text: Sequences) -> list[str]:
    return [text.part(slice(number, number + 1)).fingerprint for number in range(len(text.ids))]


def _read_calibration(
    loaded: LoadedRecipe, reader: Any | None
) -> tuple[dict[str, Sequences], dict[str, Sequences | None]]:
    """Source → its text, and its held-out text where a pass wants that (or None); each source is read once."""
    seed = loaded.recipe.seed
    with_held_out = {repr(source) for one in loaded.passes if one.method.held_out for source in loaded.sources_of(one)}
    read: dict[str, Sequences] = {}
    others: dict[str, Sequences | None] = {}
    for source in (source for one in loaded.passes for source in loaded.sources_of(one)):
        name = repr(source)
        if name in read:
            continue
        if name in with_held_out:
            read[name], others[name] = load_with_held_out(source, reader, seed=seed)
        else:
            read[name] = load_sequences(source, reader, seed=seed)
    return read, others


def batches_of(texts: Iterable[Sequences], batch_size: int, *, held_out: bool = False) -> list[TokenBatch]:
    """The batches of several texts, one text after another."""
    return [batch for one in texts for batch in one.batches(batch_size, held_out=held_out)]


def slice_of(batches: Sequence[TokenBatch], tokens: int) -> list[TokenBatch]:
    """About so many tokens of calibration text: beginnings of sequences, or whole ones where rows may have images, of
    every domain as many as of the others.
    """
    by_domain: dict[str, list[tuple[Tensor, TokenBatch]]] = {}
    for batch in (one for one in batches if not one.held_out):
        most = batch.input_ids.shape[1] if batch.image_token is not None else _SLICE_LENGTH
        rows = zip(batch.input_ids, batch.attention_mask.sum(1).tolist(), strict=True)
        by_domain.setdefault(batch.domain, []).extend((ids[: min(length, most)], batch) for ids, length in rows)
    taken, num_tokens = 0, 0
    while num_tokens < tokens and any(len(of) > taken for of in by_domain.values()):
        num_tokens += sum(len(of[taken][0]) for of in by_domain.values() if len(of) > taken)
        taken += 1
    size = max(len(batch.input_ids) for batch in batches)
    found: list[TokenBatch] = []
    for name, of in by_domain.items():
        found += make_batches([ids for ids, batch in of[:taken] if batch.image_token is None], size, name)
        found += [batch for _, batch in of[:taken] if batch.image_token is not None]
    return found


def num_tokens(batches: Iterable[TokenBatch]) -> int:
    return sum(int(batch.attention_mask.sum()) for batch in batches)


def probe_of(batches: Sequence[TokenBatch], model: Any) -> TokenBatch:
    """What answers are compared on: the shortest sequence with an image, the first tokens of the first sequences, or
    random ids without text.
    """
    if not batches:
        return random_batch(model)
    if shown := [batch for batch in batches if batch.images]:
        return min(shown, key=lambda batch: batch.input_ids.numel())
    rows, columns = slice(0, _PROBE_SEQUENCES), slice(0, _PROBE_TOKENS)
    return TokenBatch(batches[0].input_ids[rows, columns], batches[0].attention_mask[rows, columns])
