"""Where streams stood when a run was interrupted, and how they come to stand there again.

The model's own forward runs again, with the decoder layers that were passed answering what they answered then. Where a
stream is then given anything else than it was about to be given (a model may carry more from layer to layer than their
outputs) all layers have to be run again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compressor.checkpoint.resume_state import (
    NotPlainError,
    ObservationJournal,
    Snapshot,
    Standing,
    digest,
    flatten,
    unflatten,
)
from compressor.machine.distributed import Processes
from compressor.model.modules import forward_replaced
from compressor.observe.streams import Stop, Stream, Streams, list_of


@dataclass(frozen=True)
class Resuming:
    """A journal, seen by one of several processes; without one nothing is known, and nothing is written down."""

    journal: ObservationJournal | None
    processes: Processes

    def common_snapshot(self, has_batches: bool) -> Snapshot | None:
        """Where the streams of all processes stood together last; None if that is not known."""
        if self.journal is None:
            return None
        snapshots = self.journal.snapshots()
        units = self.processes.exchange(list(snapshots) if has_batches else None)
        common = [unit for unit in units[0] or () if all(unit in found for found in units if found is not None)]
        return snapshots[common[-1]] if common else None

    def figures(self, path: str) -> dict[str, Tensor] | None:
        """The figures of a layer that the first process's journal has."""
        if self.journal is None:
            return None
        return dict(self.processes.gather(self.journal.figures(path) or {})[0]) or None

    def put_figures(self, path: str, figures: dict[str, Tensor]) -> None:
        """Write down those of a layer that is done."""
        if self.journal is not None and self.processes.is_first:
            self.journal.put(path, figures)

    def put_streams(self, unit: str, streams: Sequence[Stream], layers: Sequence[str]) -> None:
        """Write down where the streams stand, before a decoder layer, as far as that can be. `layers` have figures."""
        if self.journal is None:
            return
        passed = streams[0].passed if streams else []
        if passed and unit not in passed:
            with suppress(NotPlainError):
                self.journal.put_streams(unit, passed, _standings(streams), layers)
        self.processes.wait()  # where all stand is known of all before where they stood is forgotten
        self.journal.forget_streams(but=unit)

    def close(self, layers: Sequence[str]) -> None:
        """All is done; `layers` have figures."""
        if self.journal is not None:
            self.processes.wait()
            self.journal.close(list(layers), first=self.processes.is_first)

    def set_on_their_way(self, streams: Streams, snapshot: Snapshot) -> bool:
        """Have streams that have not started stand where they stood. Returns whether every one is then given exactly
        what it was about to be given; if not, they are to be left.
        """
        assert self.journal is not None
        everyone = [*streams.all, *streams.measured]
        if len(everyone) != snapshot.num_batches:
            return False
        with answering_from_record(streams, snapshot.passed):
            for number, stream in enumerate(everyone):
                standing = self.journal.standing(snapshot.unit, number)
                if standing is None or not comes_to_stand(streams, stream, snapshot.unit, standing):
                    return False
        return True


@contextmanager
def answering_from_record(streams: Streams, passed: Sequence[str]) -> Iterator[None]:
    """Within the context these decoder layers, before which nobody stops, answer what the stream's record says."""
    with ExitStack() as stack:
        for unit in dict.fromkeys(passed):
            stack.enter_context(_answering(streams, unit))
        streams.answering = frozenset(passed)
        stack.callback(setattr, streams, "answering", frozenset())
        yield


def comes_to_stand(streams: Streams, stream: Stream, unit: str, standing: Standing) -> bool:
    """Whether a stream that has not started is then about to be given, before a decoder layer, what another one was."""
    stream.recorded = standing
    try:
        streams.go_on(stream)
    except Exception:  # whatever the model's own code says of answers that do not fit
        return False
    stream.recorded = None
    return stream.stop == Stop(unit, is_unit=True) and digest(stream.call) == standing.digest


@contextmanager
def _answering(streams: Streams, unit: str) -> Iterator[None]:
    def answer(*_: Any, **__: Any) -> Any:
        assert streams.running is not None
        assert streams.running.recorded is not None
        tree, tensors = streams.running.recorded.outputs[list_of(unit)]
        return unflatten(tree, [tensor.clone() for tensor in tensors])  # a layer may write into what it is given

    with ExitStack() as stack:
        for module in streams.modules(unit):
            stack.enter_context(forward_replaced(module, answer))
        yield


def _standings(streams: Sequence[Stream]) -> Iterator[Standing]:
    """Where streams stand, to be written down one by one. Raises NotPlainError where a layer's output cannot be."""
    for stream in streams:
        yield standing_of(stream)
        stream.parked.let_go()


def standing_of(stream: Stream) -> Standing:
    """Where a stream stands. Raises NotPlainError where a layer's output cannot be written down."""
    return Standing({path: flatten(output) for path, output in stream.outputs.items()}, digest(stream.call))
