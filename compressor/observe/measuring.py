"""What the model's answers lose by each of several candidates for a layer, measured while the layers are observed.

    plain        ──layer 0──►──layer 1──►──layer 2──► … ──► p        A small text goes along with the walk. When a layer
    layer 0, a   ──~~~~~~~──►──layer 1──►──layer 2──► … ──► q        has its figures, its candidates are known: each
    layer 0, b   ──~~~~~~~──►──layer 1──►──layer 2──► … ──► q        sets out from where the plain text stands, through
    layer 1, a               ──~~~~~~~──►──layer 2──► … ──► q        the layer under the candidate's context (~), and
                                                                     on through the layers behind as they are.

At the end every token has the Kullback–Leibler divergence of q from p, in nats. The weights are read no second time,
and C candidates for each of L layers cost C·(L + 1)/2 forwards of the small text.

Whole decisions are measured in the same way (`compared`): each sets out with the plain text, and is under its context
of every layer while it passes that.

A stream that sets out runs the model's own forward, the layers passed answering what they answered the plain text. A
model that carries more from layer to layer than their outputs is run from its beginning instead, where it is in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.resume_state import NotPlainError
from compressor.data.sequences import TokenBatch
from compressor.errors import CalibrationError, UnsupportedModelError
from compressor.machine.distributed import Processes
from compressor.observe.divergence import kl_divergences, ratio_standard_error
from compressor.observe.forward import answers_at
from compressor.observe.resuming import answering_from_record, comes_to_stand, standing_of
from compressor.observe.streams import Stream, Streams, writes_cache

WHOLE = ""
"""The path of a decision of all layers."""
KL, TOKENS, DOMAIN, CANDIDATES = "measured.kl", "measured.tokens", "measured.domain", "measured.candidates"


Contexts = Mapping[str, Callable[[], AbstractContextManager[object]]]
"""Layer path → a context in which the model computes what may become of the layer."""


@dataclass(frozen=True)
class Candidate:
    """What may become of one layer, or of all of them: as JSON, and how the model computes it."""

    decided: Any
    contexts: Contexts


@dataclass(frozen=True)
class Measured:
    """On which text; (a layer's path, its figures) → its candidates, `most` of one layer; and `whole` decisions."""

    batches: Sequence[TokenBatch]
    candidates: Callable[[str, Mapping[str, Tensor]], Sequence[Candidate]] = lambda path, figures: ()
    most: int = 0
    whole: Sequence[Candidate] = ()


@dataclass
class _Running:
    """A candidate on its way: one stream for each of this process's batches."""

    path: str
    candidate: Candidate
    streams: list[Stream]
    kl: list[list[float]] = field(default_factory=list)
    """By batch, by sequence: summed over its tokens."""

    @contextmanager
    def within(self, paths: Sequence[str]) -> Iterator[None]:
        """Under its contexts of these layers."""
        with ExitStack() as stack:
            for path in paths:
                if path in self.candidate.contexts:
                    stack.enter_context(self.candidate.contexts[path]())
            yield


class Measuring:
    """The small text and all candidates so far, beside the streams that are observed."""

    def __init__(self, wanted: Measured, streams: Streams, processes: Processes, *, is_streamed: bool) -> None:
        self._wanted, self._streams, self._processes, self._is_streamed = wanted, streams, processes, is_streamed
        self._own = [(number, wanted.batches[number]) for number in processes.own(len(wanted.batches))]
        self._plain: list[Stream] = []
        self._running: list[_Running] = []
        self._output: Tensor | None = None
        self._stack = ExitStack()

    def begin(self, stack: ExitStack, num_layers: int) -> None:
        """The plain streams, none of which has started; they are left when the stack ends."""
        self._stack, self._running = stack, []
        self._plain = self._new()
        self._streams.measured = list(self._plain)
        for candidate in self._wanted.whole:
            self._add(WHOLE, candidate, self._new())
        of_layers = self._wanted.most * num_layers * (num_layers + 1) // 2
        self._streams.more_steps = len(self._own) * (of_layers + (1 + len(self._wanted.whole)) * num_layers)

    def take_up(self, paths: Sequence[str], figures: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The streams of these layers' candidates, which a run before has set out; none of them has started."""
        for path in paths:
            for candidate in self._wanted.candidates(path, figures[path]) if path in figures else ():
                self._add(path, candidate, self._new())

    def pass_unit(self, paths: Sequence[str], figures: Mapping[str, Mapping[str, Tensor]]) -> None:
        """All stand before a decoder layer, of which the MoE layers at `paths` have figures now: let them pass."""
        self._set_out(paths, figures)
        for running in self._running:
            with running.within(paths):
                for stream in running.streams:
                    self._streams.go_on(stream)
        for stream in self._plain:
            self._streams.go_on(stream)

    def finish(
        self, paths: Sequence[str], figures: Mapping[str, Mapping[str, Tensor]], domains: Sequence[str]
    ) -> dict[str, dict[str, Tensor]]:
        """The same for the last decoder layer, and up to the answers: layer path → figures, see `measured_of`."""
        self._set_out(paths, figures)
        for number, plain in enumerate(self._plain):
            answers = self._answers(plain)
            for running in self._running:
                with running.within(paths):
                    others = self._answers(running.streams[number])
                running.kl.append(_by_sequence(kl_divergences(answers, others), plain.batch))
        found: dict[str, list[tuple[Any, list[float]]]] = {}
        for running in self._running:
            kl = [one for of_batch in self._processes.in_order(running.kl) for one in of_batch]
            if not all(map(math.isfinite, kl)):
                of = f"{running.path}: " if running.path else ""
                raise CalibrationError(f"{of}what the model's answers lose without some experts is not finite.")
            found.setdefault(running.path, []).append((running.candidate.decided, kl))
        return {path: self._figures(of_layer, domains) for path, of_layer in found.items()}

    def _figures(self, found: Sequence[tuple[Any, list[float]]], domains: Sequence[str]) -> dict[str, Tensor]:
        batches = self._wanted.batches
        names = list(dict.fromkeys(domains))
        decided = json.dumps([one for one, _ in found]).encode()
        return {
            KL: torch.tensor([kl for _, kl in found], dtype=torch.float64),
            TOKENS: torch.cat([batch.text_mask.sum(1) for batch in batches]),
            DOMAIN: torch.tensor([names.index(one.domain) for one in batches for _ in one.input_ids]),
            CANDIDATES: torch.frombuffer(bytearray(decided), dtype=torch.uint8),
        }

    def _new(self) -> list[Stream]:
        return [self._new_stream(number, batch) for number, batch in self._own]

    def _new_stream(self, number: int, batch: TokenBatch) -> Stream:
        stream = Stream(self._streams.model, batch, number, self._take_output, is_observed=False)
        self._stack.callback(stream.leave)
        return stream

    def _add(self, path: str, candidate: Candidate, streams: list[Stream]) -> None:
        self._running.append(_Running(path, candidate, streams))
        self._streams.measured += streams

    def _take_output(self, batch: TokenBatch, output: Any) -> None:
        self._output = answers_at(batch, output)

    def _answers(self, stream: Stream) -> Tensor:
        """Logits [N, V] at the batch's real tokens, behind the last layer."""
        self._streams.go_on(stream)
        answers, self._output = self._output, None
        if answers is None:
            raise UnsupportedModelError(f"{type(self._streams.model).__name__}: its layers run in no one order.")
        return answers

    def _set_out(self, paths: Sequence[str], figures: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The candidates of a decoder layer's MoE layers, standing before it like the plain text."""
        for path in paths:
            for candidate in self._wanted.candidates(path, figures[path]) if path in figures else ():
                self._add(path, candidate, [self._beside(plain) for plain in self._plain])

    def _beside(self, plain: Stream) -> Stream:
        """Another stream that stands before a decoder layer as the plain one does."""
        assert plain.stop is not None
        plain.parked.fetch()
        if not writes_cache(plain.call):
            stream = self._new_stream(plain.number, plain.batch)
            with suppress(NotPlainError), answering_from_record(self._streams, plain.passed):
                if comes_to_stand(self._streams, stream, plain.stop.path, standing_of(plain)):
                    return stream
            stream.leave()
        if self._is_streamed:
            raise UnsupportedModelError(
                f"{plain.stop.path}: the model carries more from layer to layer than their outputs, so from disk it "
                f"cannot be measured what a layer's experts are worth. Share the counts out otherwise (`share: "
                f"even`), or run it in memory."
            )
        stream = self._new_stream(plain.number, plain.batch)
        self._streams.go_on(stream)
        while stream.stop not in (None, plain.stop):
            self._streams.go_on(stream)
        return stream


def _by_sequence(kl_N: Tensor, batch: TokenBatch) -> list[float]:
    kl_BS = torch.zeros(batch.attention_mask.shape, dtype=torch.float64)
    kl_BS[batch.text_mask] = kl_N
    return kl_BS.sum(1).tolist()


def measured_of(figures: Mapping[str, Tensor], num_domains: int) -> list[tuple[Any, Tensor, Tensor]]:
    """(what was decided of the layer, KL in nats a token, its standard error over sequences) of every candidate that
    was measured; [D] float64 each, NaN for a domain of which no text was measured.
    """
    decided = json.loads(bytes(figures[CANDIDATES].tolist()))
    found_CD2 = torch.full((len(decided), num_domains, 2), math.nan, dtype=torch.float64)
    for domain in set(figures[DOMAIN].tolist()):
        is_of_S = figures[DOMAIN] == domain
        tokens = figures[TOKENS][is_of_S].tolist()
        for found_D2, kl_S in zip(found_CD2, figures[KL], strict=True):
            kl = kl_S[is_of_S].tolist()
            error = ratio_standard_error(kl, tokens)
            found_D2[domain] = torch.tensor([math.fsum(kl) / sum(tokens), math.nan if error is None else error])
    return [(one, *found_D2.unbind(-1)) for one, found_D2 in zip(decided, found_CD2, strict=True)]
