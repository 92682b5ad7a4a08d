"""Run calibration batches through the model, one MoE layer at a time, and hand each layer's tokens to its statistic.

    batch 0   ──attention──►│ layer 0 │──attention──►│ layer 1 │──►        All batches pass a layer before the first
    batch 1   ──attention──►│         │──attention──►│         │──►        goes on to the next: so a layer's figures are
    …                       ▼         ▼              ▼         ▼           whole, and can be freed, before others begin.
                         its figures                its figures

Every batch is a *stream*: the model's own forward in a greenlet, which stops before each watched block and goes on when
it is told to. So whatever a model carries from layer to layer (masks, caches, several residual streams) stays where its
own code keeps it, and attention runs once. In memory are the hidden states of all batches, and for the layer that is
being observed its inputs.

Layer-wise: every layer sees the activations of the model as it is. Progressive: a second stream of every batch goes
through the layers already edited; a layer then sees these activations, and the original model's output is its target.
Two attention passes in all, where rerunning the model for each of L layers takes L + 1.

Of a model that is read from disk (`weights`) the streams also stop before each decoder layer: when all are there, the
layer that they have left goes and the one that they come to is read. So `forward` runs a whole model of which one layer
is in memory.

In a block-diffusion model, padding counts towards the sliding window through which the decoder sees its prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from compressor.checkpoint.layerwise_weights import StreamedWeights, list_of, units_of
from compressor.checkpoint.resume_state import (
    NotPlainError,
    ObservationJournal,
    Snapshot,
    Standing,
    digest,
    flatten,
    unflatten,
)
from compressor.data.sequences import TokenBatch
from compressor.errors import CalibrationError, PluginError, UnsupportedModelError
from compressor.machine.distributed import Processes
from compressor.machine.progress import Progress, Update
from compressor.model.capture import RealTokens
from compressor.model.modules import evaluating
from compressor.model.moe_model import MoEModel
from compressor.model.routed_tokens import RoutedTokens
from compressor.model.weight_norms import expert_weight_norms
from compressor.observe.activation_offload import Parked, Parking
from compressor.observe.forward import device_of, model_inputs
from compressor.observe.reductions import RULES, joined_figures
from compressor.observe.statistic import Statistic

Figures = dict[str, dict[str, Tensor]]
"""Layer path → name → figures."""
Consume = Callable[[TokenBatch, Any], None]
"""(batch, the model's output for it)."""
Edited = Callable[[str, Mapping[str, Tensor]], AbstractContextManager[object]]
"""(a layer's path, its figures) → a context in which the model computes as if the layer had been edited by them."""


@torch.no_grad()
def observe(
    moe: MoEModel,
    batches: Sequence[TokenBatch],
    statistics: Mapping[str, Statistic],
    progress: Progress,
    *,
    title: str = "observing",
    edited: Edited | None = None,
    weights: StreamedWeights | None = None,
    journal: ObservationJournal | None = None,
    processes: Processes | None = None,
    parking: Parking | None = None,
) -> Figures:
    """Feed every batch to every statistic, in order, and return their figures. The model is not changed.

    A model that skips experts is observed unskipped.

    With `edited` the walk is progressive: every layer is observed on the activations that come out of the edited layers
    before it, with the original model's output as `RoutedTokens.target_TH`. With `weights` the model is read layer by
    layer while it runs. With `journal` every layer's figures are kept when it is done, and where the batches stand
    before each decoder layer; layers that it knows are not observed again.

    Several `processes` are given the same batches and the same model; each observes some of the batches, and all return
    the same figures. With `parking` hidden states wait there while other batches are at work.

    Raises CheckpointError, naming the layer, where activations are not finite; CalibrationError where a layer sees no
    token, unless its statistic is optional: then it has no figures; UnsupportedModelError where batches do not come to
    the layers in the same order.
    """
    processes = processes or Processes()
    if processes.exchange(journal is not None and journal.is_done)[0]:
        assert journal is not None
        kept = {path: processes.gather(journal.figures(path) or {})[0] for path in statistics}
        return {path: dict(figures) for path, figures in kept.items() if figures}
    model = moe.model
    body = getattr(model, "base_model", model)  # without the language-model head, whose output nobody reads
    with evaluating(model), moe.unskipped(), progress.task(title) as update:
        return _Walk(
            moe.model, body, update, processes, weights, moe, dict(statistics), edited, None, journal, parking
        ).run(batches)


@torch.no_grad()
def forward(
    model: Any,
    batches: Sequence[TokenBatch],
    consume: Consume,
    update: Update,
    *,
    weights: StreamedWeights,
    parking: Parking | None = None,
) -> None:
    """Run a model that is read layer by layer on all batches; `consume` is given each batch and the model's output.
    `update` is told how many layers were read.
    """
    with evaluating(model):
        _Walk(model, model, update, Processes(), weights, consume=consume, parking=parking).run(batches)


@torch.no_grad()
def weigh(
    moe: MoEModel,
    statistics: Mapping[str, Statistic],
    progress: Progress,
    *,
    title: str = "weighing",
    weights: StreamedWeights | None = None,
    journal: ObservationJournal | None = None,
    processes: Processes | None = None,
) -> Figures:
    """The figures of statistics that are shown no text: what they say of none, and norms of weights where they ask for
    them. With `weights` one layer at a time is read. Arguments as of `observe`, from which the journal's figures differ
    in nothing.
    """
    processes = processes or Processes()
    found: Figures = {}
    known = journal if processes.exchange(journal is not None and journal.is_done)[0] else None
    with progress.task(title) as update:
        for number, (path, statistic) in enumerate(statistics.items()):
            if known is not None:
                found[path] = dict(processes.gather(known.figures(path) or {})[0])
            else:
                found[path] = statistic.tensors() | _norms(moe, path, statistic, weights)
                if journal is not None and processes.is_first:
                    journal.put(path, found[path])
            update(number + 1, len(statistics))
    if journal is not None and known is None:
        journal.close(list(found), first=processes.is_first)
    return found


def _norms(moe: MoEModel, path: str, statistic: Statistic, weights: StreamedWeights | None) -> dict[str, Tensor]:
    """Those of a layer's experts, whose weights are there meanwhile."""
    if not statistic.weight_norms:
        return {}
    units = [unit for unit in (weights.units if weights is not None else ()) if f"{path}.".startswith(f"{unit}.")]
    with ExitStack() as stack:
        for unit in units:
            assert weights is not None
            stack.callback(weights.free, unit)
            weights.load(unit)
        return expert_weight_norms(moe.model, moe.layer(path))


@dataclass(frozen=True)
class _Stop:
    """A place where streams stop: before a watched block, or before a decoder layer whose weights may not be there."""

    path: str
    is_unit: bool = False


class _Stream:
    """One batch on its way through the model."""

    def __init__(self, body: Any, batch: TokenBatch, number: int, consume: Consume | None = None) -> None:
        self.batch, self.number = batch, number
        self.mask_T = batch.attention_mask.flatten().to(device_of(body))
        self.stop: _Stop | None = None
        """What it stands before; None before the first step and at the end."""
        self.call: tuple[Any, Any] = ((), {})
        """The arguments that the block is about to get."""
        self.target_TH: Tensor | None = None
        self.passed: list[str] = []
        """The decoder layers that it has come through; kept with a journal only."""
        self.outputs: dict[str, Any] = {}
        """What the last of them has put out, by the path of the list that it is in."""
        self.recorded: Standing | None = None
        """What it is to have come through already: see `_Walk._set_on_their_way`."""
        self.parked = Parked()

        def run() -> None:
            output = body(**model_inputs(body, batch))
            if consume is not None:
                consume(batch, output)

        self._greenlet = greenlet(run)

    def park(self, parking: Parking) -> None:
        """Have what it carries wait elsewhere."""
        self.parked = parking.park(self._greenlet.gr_frame, (self.call, list(self.outputs.values()), self.target_TH))

    def stand(self, stop: _Stop, args: Any, kwargs: Any) -> None:
        """Called from within the forward: wait here until told to go on."""
        self.stop, self.call = stop, (args, kwargs)
        assert self._greenlet.parent is not None
        self._greenlet.parent.switch()
        self.call = ((), {})

    def go_on(self) -> None:
        """Run up to the next stop, or to the end."""
        self.stop = None
        self._greenlet.switch()

    def leave(self) -> None:
        """Give up: a stream that still stands somewhere is unwound."""
        if self._greenlet and not self._greenlet.dead:
            self._greenlet.throw()


@dataclass
class _Walk:
    """One walk of all batches through all layers."""

    model: Any
    body: Any
    update: Update
    processes: Processes
    weights: StreamedWeights | None
    moe: MoEModel | None = None
    statistics: dict[str, Statistic] = field(default_factory=dict)
    edited: Edited | None = None
    consume: Consume | None = None
    journal: ObservationJournal | None = None
    parking: Parking | None = None
    real: RealTokens = field(default_factory=RealTokens)
    stream: _Stream | None = None
    """The stream that is running."""
    take: Callable[[RoutedTokens], None] | None = None
    """What is done with the tokens of the layer that is running."""
    figures: Figures = field(default_factory=dict)
    observed: set[str] = field(default_factory=set)
    """Layers that all batches have come through."""
    unit: str | None = None
    """The decoder layer that the streams are in."""
    passed_before: frozenset[str] = frozenset()
    """Decoder layers that answer from the journal, and before which nobody stops."""
    num_streams: int = 0
    num_steps: int = 0
    """Blocks passed by streams, in all."""
    seen: list[int] = field(default_factory=list)
    """Numbers of the batches, among those of all processes, that came to the present layer, as they came."""
    domains: list[str] = field(default_factory=list)
    """Of the batches of all processes."""

    def run(self, batches: Sequence[TokenBatch]) -> Figures:
        """All batches, layer by layer."""
        self.domains = [batch.domain for batch in batches]
        for statistic in self.statistics.values():
            statistic.share(self.processes)
        with ExitStack() as stack:
            if self.weights is not None:
                stack.enter_context(self.weights.around(self.body))
            units = units_of(self.model) if self.weights is not None or self.journal is not None else ()
            stops = [*(_Stop(unit, is_unit=True) for unit in units), *map(_Stop, self.statistics)]
            for place in stops:  # before the taps' own hooks, which a stop must not cut
                stack.callback(self._stop_before(place).remove)
            if self.journal is not None:
                for unit in units:
                    stack.callback(self._keep_output_of(unit).remove)
            if self.moe is not None:
                stack.enter_context(self.moe.watched(dict.fromkeys(self.statistics, self._visit), self.real))
            originals, others = self._start(batches, stack)
            streams = [*originals, *others]
            while stop := self._common_stop(streams):
                if stop.is_unit:
                    self._enter(stop.path, streams)
                else:
                    self._observe_layer(stop.path, originals, others)
        self._refuse_unseen()
        if self.journal is not None:
            self.processes.wait()
            self.journal.close(list(self.figures), first=self.processes.is_first)
        return {path: self.figures[path] for path in self.statistics if path in self.figures}

    def _start(self, batches: Sequence[TokenBatch], stack: ExitStack) -> tuple[list[_Stream], list[_Stream]]:
        """All streams, at their first stop, or where the journal says that they stood."""
        own, snapshot = self.processes.own(len(batches)), self._common_snapshot(bool(batches))
        for known in (snapshot, None) if snapshot else (None,):
            originals = [_Stream(self.body, batches[number], number, self.consume) for number in own]
            others = [_Stream(self.body, batches[number], number) for number in own] if self.edited else []
            streams = [*originals, *others]
            self.num_streams = len(streams)
            for stream in streams:
                stack.callback(stream.leave)
            if known is not None and self.processes.all(self._set_on_their_way(streams, known)):
                self._take_over_figures(known)
                break
            if known is None:
                for stream in streams:
                    self._go_on(stream)
            else:
                for stream in streams:
                    stream.leave()
        return originals, others

    def _common_snapshot(self, has_batches: bool) -> Snapshot | None:
        """Where the streams of all processes stood together last; None if that is not known."""
        if self.journal is None:
            return None
        snapshots = self.journal.snapshots()
        units = self.processes.exchange(list(snapshots) if has_batches else None)
        common = [unit for unit in units[0] or () if all(unit in found for found in units if found is not None)]
        return snapshots[common[-1]] if common else None

    def _set_on_their_way(self, streams: Sequence[_Stream], snapshot: Snapshot) -> bool:
        """Run the model's own forward with layers passed before answering what they answered then. Returns whether
        every stream is then given exactly what it was about to be given; if a model carries more from layer to layer
        than their outputs, it is not, and all layers have to be run again.
        """
        assert self.journal is not None
        if len(streams) != snapshot.num_batches:
            return False
        with ExitStack() as stack:
            for unit in dict.fromkeys(snapshot.passed):
                stack.enter_context(self._answering_from_record(unit))
            self.passed_before = frozenset(snapshot.passed)
            stack.callback(setattr, self, "passed_before", frozenset())
            for number, stream in enumerate(streams):
                stream.recorded = standing = self.journal.standing(snapshot.unit, number)
                if standing is None:
                    return False
                try:
                    self._go_on(stream)
                except Exception:  # whatever the model's own code says of answers that do not fit
                    return False
                stream.recorded = None
                if stream.stop != _Stop(snapshot.unit, is_unit=True) or digest(stream.call) != standing.digest:
                    return False
        return True

    def _take_over_figures(self, snapshot: Snapshot) -> None:
        """Those of the layers that were passed."""
        for path in self.statistics:
            if f"{path}.".startswith(tuple(f"{unit}." for unit in snapshot.passed)):
                self.observed.add(path)
                known = self._known(path)
                if known is not None:
                    self.figures[path] = known

    def _known(self, path: str) -> dict[str, Tensor] | None:
        """The figures of a layer that the first process's journal has."""
        if self.journal is None:
            return None
        return dict(self.processes.gather(self.journal.figures(path) or {})[0]) or None

    @contextmanager
    def _answering_from_record(self, unit: str) -> Iterator[None]:
        module = self.model.get_submodule(unit)

        def answer(*_: Any, **__: Any) -> Any:
            assert self.stream is not None
            assert self.stream.recorded is not None
            return unflatten(*self.stream.recorded.outputs[list_of(unit)])

        had_its_own = module.__dict__.get("forward")  # accelerate, for one, wraps forward on the instance
        module.forward = answer
        try:
            yield
        finally:
            del module.forward
            if had_its_own is not None:
                module.forward = had_its_own

    def _keep_output_of(self, unit: str) -> Any:
        def keep(module: Any, args: Any, output: Any) -> None:
            if self.stream is not None and getcurrent().parent is not None:
                self.stream.outputs[list_of(unit)] = output
                self.stream.passed.append(unit)

        return self.model.get_submodule(unit).register_forward_hook(keep)

    def _stop_before(self, stop: _Stop) -> Any:
        def stand(module: Any, args: Any, kwargs: Any) -> None:
            is_passed = stop.is_unit and stop.path in self.passed_before
            if self.stream is not None and getcurrent().parent is not None and not is_passed:
                self.stream.stand(stop, args, kwargs)

        return self.model.get_submodule(stop.path).register_forward_pre_hook(stand, with_kwargs=True)

    def _common_stop(self, streams: Sequence[_Stream]) -> _Stop | None:
        own = [[stop.path, stop.is_unit] if stop else None for stop in {stream.stop for stream in streams}]
        stops = {_Stop(*stop) if stop else None for of_one in self.processes.exchange(own) for stop in of_one}
        if len(stops) > 1:
            named = " and ".join(sorted(stop.path if stop else "the end" for stop in stops))
            raise UnsupportedModelError(
                f"{type(self.model).__name__}: some batches come to {named} next: its layers do not run in one "
                f"order, so they cannot be observed one after another."
            )
        return stops.pop() if stops else None

    def _enter(self, unit: str, streams: Sequence[_Stream]) -> None:
        """All streams stand before a decoder layer: let go of the one before it, read this one, go on."""
        if self.journal is not None and self.unit is not None:
            self._put_down(unit, streams)
        if self.weights is not None:
            units = self.weights.units
            if self.unit is not None:
                self.weights.free(self.unit)
            self.weights.load(unit)
            if (number := units.index(unit) + 1) < len(units):
                self.weights.prefetch(units[number])
            if not self.statistics:
                self.update(number, len(units))
        self.unit = unit
        for stream in streams:
            self._go_on(stream)

    def _put_down(self, unit: str, streams: Sequence[_Stream]) -> None:
        """Have the journal say where the streams stand, as far as that can be written down."""
        assert self.journal is not None
        passed = streams[0].passed if streams else []
        if passed and unit not in passed:
            with suppress(NotPlainError):
                self.journal.put_streams(unit, passed, _standings(streams), list(self.figures))
        self.processes.wait()  # where all stand is known of all before where they stood is forgotten
        self.journal.forget_streams(but=unit)

    def _observe_layer(self, path: str, originals: Sequence[_Stream], others: Sequence[_Stream]) -> None:
        if path in self.observed:
            raise UnsupportedModelError(
                f"{path}: it runs more than once on the same text, so its tokens cannot be told apart; this needs a "
                f"plugin."
            )
        self.observed.add(path)
        known = self._known(path)
        if known is not None:
            self.figures[path] = known
            for original in originals:
                self._go_on(original)
            self._pass_edited(path, others)
            return
        statistic, self.seen = self.statistics[path], []
        if not self.edited:
            calls = [(stream, stream.call) for stream in originals]
            for stream in originals:
                self._go_on(stream, self._give(statistic, stream))
        else:
            calls = [(stream, stream.call) for stream in others]
            for original, other in zip(originals, others, strict=True):
                self._go_on(original, _keep_output(other))
                self._run_again(path, other, other.call, self._give(statistic, other))
        seen = self.processes.exchange(list(self.seen))
        while any(seen) and self._wanted_again(path, statistic):
            for stream, call in calls:
                self._run_again(path, stream, call, self._give(statistic, stream))
        if not any(seen):
            for other in others:
                self._go_on(other)
            return
        self.figures[path] = self._joined(path, statistic, seen)
        if statistic.weight_norms:
            assert self.moe is not None
            self.figures[path] |= expert_weight_norms(self.model, self.moe.layer(path))
        if self.journal is not None and self.processes.is_first:
            self.journal.put(path, self.figures[path])
        self._pass_edited(path, others)

    def _pass_edited(self, path: str, others: Sequence[_Stream]) -> None:
        """Let the second streams through a layer as if it had been edited by its figures."""
        if not self.edited:
            return
        with self.edited(path, self.figures[path]), ExitStack() as stack:
            self.real.listening = False
            stack.callback(setattr, self.real, "listening", True)
            for other in others:
                self._go_on(other)
                other.target_TH = None

    def _wanted_again(self, path: str, statistic: Statistic) -> bool:
        wanted = statistic.again()
        if self.processes.any(wanted) and not self.processes.all(wanted):
            raise PluginError(
                f"{path}: {type(statistic).__name__} wants to see its tokens again in one process and not in another; "
                f"it should decide by figures of all of them (`self.processes`)."
            )
        return wanted

    def _joined(self, path: str, statistic: Statistic, seen: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """The figures of all processes' batches; `seen` are the numbers of those that came to the layer in each."""
        of_each = self.processes.gather(statistic.tensors() if seen[self.processes.rank] else {})
        parts = [(figures, numbers) for figures, numbers in zip(of_each, seen, strict=True) if numbers]
        if len(parts) == 1:
            return dict(parts[0][0])
        everywhere = self._domains_of(sorted(number for _, numbers in parts for number in numbers))
        figures, lost = joined_figures(
            [figures for figures, _ in parts],
            [[everywhere.index(domain) for domain in self._domains_of(numbers)] for _, numbers in parts],
            len(everywhere),
            rules={**RULES, **statistic.own_rules},
            order_B=torch.tensor([number for _, numbers in parts for number in numbers]).argsort(),
        )
        if lost:
            raise PluginError(
                f"{path}: what {len(parts)} processes found cannot be joined: {', '.join(lost)} of "
                f"{type(statistic).__name__}. Figures are joined by their names, such as `sums.` and `batch.`, or as "
                f"`own_rules` says (docs/processes.md). Run it in one process."
            )
        return figures

    def _domains_of(self, numbers: Sequence[int]) -> list[str]:
        """The domains of these batches, in the order in which they came."""
        return list(dict.fromkeys(self.domains[number] for number in numbers))

    def _give(self, statistic: Statistic, stream: _Stream) -> Callable[[RoutedTokens], None]:
        def give(tokens: RoutedTokens) -> None:
            tokens.domain, tokens.held_out = stream.batch.domain, stream.batch.held_out
            tokens.target_TH = stream.target_TH
            self.seen.append(stream.number)
            statistic.update(tokens)

        return give

    def _visit(self, tokens: RoutedTokens) -> None:
        if self.take is not None:
            self.take(tokens)

    def _go_on(self, stream: _Stream, take: Callable[[RoutedTokens], None] | None = None) -> None:
        """Let a stream run through the block that it stands before, and up to the next one."""
        has_passed = stream.stop is not None and not stream.stop.is_unit
        self.stream, self.take, self.real.mask_T = stream, take, stream.mask_T
        stream.parked.fetch()
        try:
            stream.go_on()
        finally:
            self.stream = self.take = None
        if self.parking is not None and stream.stop is not None:
            stream.park(self.parking)
        if has_passed:
            self.num_steps += 1
            self.update(self.num_steps, self.num_streams * len(self.statistics))

    def _run_again(self, path: str, stream: _Stream, call: Any, take: Callable[[RoutedTokens], None]) -> None:
        """Run one block alone on what a stream has brought it; the output is dropped."""
        args, kwargs = call
        if any(kwargs.get(name) is not None for name in ("cache", "past_key_values")):  # the latter before 5.24
            raise UnsupportedModelError(
                f"{path}: its block holds attention that writes a cache, so it cannot be run twice on the same text: "
                f"neither `progressive` nor a second look at tokens is possible here."
            )
        self.take, self.real.mask_T = take, stream.mask_T
        stream.parked.fetch()
        try:
            self.model.get_submodule(path)(*args, **kwargs)
        finally:
            self.take = None

    def _refuse_unseen(self) -> None:
        wanted = [path for path, statistic in self.statistics.items() if not statistic.optional]
        unseen = [path for path in wanted if path not in self.figures]
        if unseen:
            raise CalibrationError(
                f"{unseen[0]}: no token of the calibration text comes to this layer (a layer for images, say), so its "
                f"experts cannot be judged. Prune the other layers only: name them under `keep:`."
            )


def _standings(streams: Sequence[_Stream]) -> Iterator[Standing]:
    """Where streams stand, to be written down one by one. Raises NotPlainError where a layer's output cannot be."""
    for stream in streams:
        outputs = {path: flatten(output) for path, output in stream.outputs.items()}
        yield Standing(outputs, digest(stream.call))
        stream.parked.let_go()


def _keep_output(stream: _Stream) -> Callable[[RoutedTokens], None]:
    """Put a layer's output on one stream down as the target of another."""

    def keep(tokens: RoutedTokens) -> None:
        for _ in tokens.ranked_outputs(tokens.layer.top_k):
            pass
        stream.target_TH = tokens.output_TH

    return keep
