"""How far a model's answers are from the original's on the same tokens: divergence, first choices, losses.

The original's answers are kept while it is measured: all logits where the vocabulary is small, else the largest ones of
every token, and one for all other ids together, float32. Merged ids can only lower a divergence (the data-processing
inequality), so what is found by them is a lower bound of that of the whole vocabulary.

Dimensions: B sequences of a batch, S positions, N predicted tokens, V vocabulary, K ids that are told apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.data.sequences import Sequences, TokenBatch
from compressor.errors import EvaluationError
from compressor.evaluation.perplexity import CHUNK_ELEMENTS, Perplexity, Watch
from compressor.evaluation.result import Progress, Result
from compressor.machine.distributed import Processes
from compressor.observe.divergence import kl_divergences, ratio_standard_error

MOST_WHOLE = 2048
"""Ids of a vocabulary that is kept whole."""
NUM_KEPT = 1024
"""Ids that are kept of a larger one."""
_NUM_EXAMPLES, _CONTEXT = 3, 20
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Fidelity(Result):
    """How a model's answers to a text differ from the original's, a mean over ``tokens``: ``kl`` is KL(original ‖
    model) in nats, ``agreement`` the share of tokens whose likeliest id is the same, ``delta_nll`` by how many nats the
    text became less likely; each with its standard error over sequences, None for one. ``vocabulary``: the number of
    ids that were told apart, or `top 1024 and the rest`, and then ``kl`` is a lower bound. ``flips``: tokens
    whose likeliest id was the text's own before only (`lost`), and now only (`gained`), with examples as text.
    """

    name: str
    kl: float
    kl_error: float | None
    agreement: float
    agreement_error: float | None
    delta_nll: float
    delta_nll_error: float | None
    tokens: int
    vocabulary: int | str
    fingerprint: str
    flips: Mapping[str, Any] | None = None

    @property
    def exact(self) -> bool:
        """Whether ``kl`` is that of the whole vocabulary."""
        return isinstance(self.vocabulary, int)


def bytes_per_token(vocabulary: int) -> int:
    """What is kept of the original's answer to a token."""
    return 4 * (vocabulary if vocabulary <= MOST_WHOLE else 2 * NUM_KEPT + 1) + 8


@dataclass
class Answers:
    """What the original answers to one text, by batch: in memory, or a folder's files of a `run`; see `keep`."""

    folder: Path | None = None
    run: str = ""
    _held: dict[int, Mapping[str, Tensor]] = field(default_factory=dict)

    def keep(self, number: int, batch: TokenBatch, logits_BSV: Tensor, losses_BS: Tensor) -> None:
        """The original's answer to a batch."""
        parts: list[dict[str, Tensor]] = []
        for logits_NV, losses_N in _by_chunk(batch, logits_BSV, losses_BS):
            known = {"losses_N": losses_N.float(), "first_N": logits_NV.max(-1).indices.int().cpu()}
            if logits_NV.shape[1] <= MOST_WHOLE:
                parts.append({**known, "logits_NK": logits_NV.cpu()})
            else:
                ids_NK = logits_NV.topk(NUM_KEPT, sorted=False).indices
                parts.append({**known, "ids_NK": ids_NK.int().cpu(), "logits_NK": _merged(logits_NV, ids_NK).cpu()})
        found = {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}
        found["vocabulary"] = torch.tensor(logits_BSV.shape[-1])
        if self.folder is None:
            self._held[number] = found
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"{number}.partial"
        save_file(found, temporary, {"run": self.run})
        temporary.replace(self._file(number))

    def _file(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{number}.safetensors"

    def of(self, number: int) -> Mapping[str, Tensor]:
        """What was kept of a batch."""
        return self._held[number] if self.folder is None else load_file(self._file(number))

    def has(self, numbers: Iterable[int]) -> bool:
        """Whether these batches of this run are there, whole."""
        if self.folder is None:
            return all(number in self._held for number in numbers)
        return all(_run_of(self._file(number)) == self.run for number in numbers)


def _run_of(path: Path) -> str | None:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("run")
    except (OSError, safetensors.SafetensorError):  # it was never written, or not to its end
        return None


class Predicts(Protocol):
    """A model that can be measured: see `edit.backend`."""

    processes: Processes

    def perplexity(
        self, sequences: Sequences, batch_size: int, update: Progress | None = None, watch: Watch | None = None
    ) -> Perplexity: ...


def beside_original(
    model: Predicts,
    sequences: Sequences,
    batch_size: int,
    original: Answers,
    update: Progress | None = None,
    decode: Decode = str,
) -> tuple[Perplexity, Fidelity]:
    """A model's perplexity on a text, and its fidelity to the original's answers in the same batches: one forward.
    `decode` makes text of ids, for examples of flips. Raises EvaluationError as `perplexity` does, where the vocabulary
    is another one, and where a divergence is not finite.
    """
    found: list[tuple[list[list[float]], int, dict[str, list[Any]]]] = []

    def watch(number: int, batch: TokenBatch, logits_BSV: Tensor, losses_BS: Tensor) -> None:
        kept = original.of(number)
        vocabulary = int(kept["vocabulary"])
        if logits_BSV.shape[-1] != vocabulary:
            raise EvaluationError(
                f"source {sequences.name!r}: the model tells {logits_BSV.shape[-1]} ids apart, the original "
                f"{vocabulary}: only models of one vocabulary can be compared."
            )
        rows, now_N = _compared(kept, batch, logits_BSV, losses_BS)
        found.append((rows, vocabulary, _flipped(kept.get("first_N", now_N), now_N, batch, decode)))

    perplexity = model.perplexity(sequences, batch_size, update, watch)
    by_batch = model.processes.in_order(found)
    flips = {way: [one for *_, of in by_batch for one in of[way]] for way in ("lost", "gained")}
    said = {way: {"tokens": sum(number for number, _ in of), "examples": [one for _, one in of[:_NUM_EXAMPLES]]}
            for way, of in flips.items()}  # fmt: skip
    fidelity = _fidelity(sequences, [one for rows, *_ in by_batch for one in rows], by_batch[0][1])
    return perplexity, replace(fidelity, flips=said)


def _compared(
    kept: Mapping[str, Tensor], batch: TokenBatch, logits_BSV: Tensor, losses_BS: Tensor
) -> tuple[list[list[float]], Tensor]:
    """Of each sequence the divergence, same first choices, loss added: sums; and tokens. And first choices [N]."""
    kl, same, added = ([torch.zeros(0, dtype=torch.float64)] for _ in range(3))
    first = [torch.zeros(0, dtype=torch.int64)]
    start = 0
    for logits_NV, losses_N in _by_chunk(batch, logits_BSV, losses_BS):
        part = slice(start, start := start + len(losses_N))
        others_NK = logits_NV if "ids_NK" not in kept else _merged(logits_NV, kept["ids_NK"][part])
        kl.append(kl_divergences(kept["logits_NK"][part].to(logits_NV.device), others_NK))
        first.append(logits_NV.max(-1).indices.cpu())
        same.append(first[-1] == kept["first_N"][part])
        added.append(losses_N - kept["losses_N"][part])
    counts = _predicted(batch)
    sums = [[float(one.sum()) for one in torch.split(torch.cat(parts), counts)] for parts in (kl, same, added)]
    return [[*values, count] for *values, count in zip(*sums, counts, strict=True)], torch.cat(first)


def _flipped(before_N: Tensor, now_N: Tensor, batch: TokenBatch, decode: Decode) -> dict[str, list[Any]]:
    """First choices that were the text's own before only (`lost`), or are now only (`gained`): of each sequence that
    has some their number, and the last one, which has most text before it, as text.
    """
    found: dict[str, list[Any]] = {"lost": [], "gained": []}
    split = [torch.split(one_N, _predicted(batch)) for one_N in (before_N, now_N)]
    for ids, mask, *both in zip(batch.input_ids.cpu(), batch.text_mask.cpu(), *split, strict=True):
        places_N = mask[1:].nonzero()[:, 0]
        next_N = ids[1:][places_N]
        for way, (right_N, other_N) in (("lost", both), ("gained", both[::-1])):
            flips_N = (right_N == next_N) & (other_N != next_N)
            for at in flips_N.nonzero()[-1:, 0].tolist():
                shown = zip(("next", "before", "now"), (next_N, *both), strict=True)
                example = {name: decode(one[at : at + 1].tolist()) for name, one in shown}
                behind = int(places_N[at]) + 1
                example["text"] = decode(ids[max(0, behind - _CONTEXT) : behind].tolist())
                found[way].append([int(flips_N.sum()), example])
    return found


def _fidelity(sequences: Sequences, by_sequence: list[list[float]], vocabulary: int) -> Fidelity:
    kl, same, added, counts = ([row[column] for row in by_sequence] for column in range(4))
    bad = next((number for number, value in enumerate(kl) if not math.isfinite(value)), None)
    if bad is not None:
        raise EvaluationError(
            f"source {sequences.name!r}: the divergence from the original on sequence {bad} is {kl[bad]}: the model "
            f"excludes ids that the original does not."
        )
    tokens = int(sum(counts))
    means = [math.fsum(totals) / tokens for totals in (kl, same, added)]
    errors = [ratio_standard_error(totals, [int(count) for count in counts]) for totals in (kl, same, added)]
    return Fidelity(
        name=sequences.name,
        kl=means[0],
        kl_error=errors[0],
        agreement=means[1],
        agreement_error=errors[1],
        delta_nll=means[2],
        delta_nll_error=errors[2],
        tokens=tokens,
        vocabulary=vocabulary if vocabulary <= MOST_WHOLE else f"top {NUM_KEPT} and the rest",
        fingerprint=sequences.fingerprint,
    )


def _predicted(batch: TokenBatch) -> list[int]:
    """Predicted tokens of each sequence of a batch."""
    return [int(number) for number in batch.text_mask[:, 1:].sum(1)]


def _by_chunk(batch: TokenBatch, logits_BSV: Tensor, losses_BS: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [N, V] float32 and losses [N] of the predicted tokens, one sequence after another, some at a time."""
    chunk = max(1, CHUNK_ELEMENTS // logits_BSV.shape[-1])
    for row, mask in enumerate(batch.text_mask[:, 1:].cpu()):
        for places_N in mask.nonzero()[:, 0].split(chunk):
            if len(places_N):
                yield logits_BSV[row, places_N.to(logits_BSV.device)].float(), losses_BS[row, places_N]


def _merged(logits_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """The logits of these ids, and one of all others together, whose exponential is the sum of theirs: [N, K + 1]."""
    ids_NK = ids_NK.to(logits_NV.device, torch.int64)
    others_N1 = logits_NV.scatter(1, ids_NK, -math.inf).logsumexp(1, keepdim=True)
    return torch.cat([logits_NV.gather(1, ids_NK), others_N1], 1)
