"""Run calibration batches through the model, one MoE layer at a time, and hand each layer's tokens to its statistic.

    batch 0   ──attention──►│ layer 0 │──attention──►│ layer 1 │──►        All batches pass a layer before the first
    batch 1   ──attention──►│         │──attention──►│         │──►        goes on to the next: so a layer's figures are
    …                       ▼         ▼              ▼         ▼           whole, and can be freed, before others begin.
                         its figures                its figures

Every batch is one of `streams`, which stop before each watched block and go on when they are told to. In memory are the
hidden states of all batches, and for the layer that is being observed its inputs.

Layer-wise: every layer sees the activations of the model as it is. Progressive: a second stream of every batch goes
through the layers already edited; a layer then sees these activations, and the original model's output is its target.
Two attention passes in all, where rerunning the model for each of L layers takes L + 1. Beside the original: the first
streams go through another model, the one that passes before have made smaller, and its output is the target.

Of a model that is read from disk (`weights`) the streams also stop before each decoder layer: when all are there, the
layer that they have left goes and the one that they come to is read. So `forward` runs a whole model of which one layer
is in memory.

In a block-diffusion model, padding counts towards the sliding window through which the decoder sees its prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.layerwise_weights import StreamedWeights
from compressor.checkpoint.resume_state import ObservationJournal, Snapshot
from compressor.data.sequences import TokenBatch
from compressor.errors import CalibrationError, PluginError, UnsupportedModelError, answered
from compressor.machine.distributed import Processes
from compressor.machine.progress import Progress, Update
from compressor.model.modules import evaluating, is_inside, tower_units, units_of
from compressor.model.moe_model import MoEModel
from compressor.model.routed_tokens import RoutedTokens
from compressor.model.weight_norms import expert_weight_norms
from compressor.observe.activation_offload import Parking
from compressor.observe.measuring import WHOLE, Candidate, Contexts, Measured, Measuring, measured_of
from compressor.observe.reductions import RULES, joined_figures
from compressor.observe.resuming import Resuming
from compressor.observe.statistic import InputStatistic, Statistic
from compressor.observe.streams import Consume, Stop, Stream, Streams, Take

Figures = dict[str, dict[str, Tensor]]
"""Layer path → name → figures."""
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
    linears: Mapping[str, InputStatistic] | None = None,
    original: Original | None = None,
    measured: Measured | None = None,
) -> Figures:
    """Feed every batch to every statistic, in order, and return their figures. The model is not changed.

    A model that skips experts is observed unskipped.

    With `edited` the walk is progressive: every layer is observed on the activations that come out of the edited layers
    before it, with the original model's output as `RoutedTokens.target_TH`. With `weights` the model is read layer by
    layer while it runs. With `journal` every layer's figures are kept when it is done, and where the batches stand
    before each decoder layer: those that all batches have passed are not run again.

    Several `processes` are given the same batches and the same model; each observes some of the batches, and all return
    the same figures. With `parking` hidden states wait there while other batches are at work. `linears` (path of a
    linear map → statistic) are shown what these maps are given. With an `original` every layer is observed with its
    output there, on its own activations, as `RoutedTokens.target_TH`. With `measured` a layer's figures say too what
    its candidates do to the answers (`measuring.measured_of`).

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
        streams = Streams(model, body, update, len(statistics), parking)
        resuming, others = Resuming(journal, processes), (statistics, linears or {}, edited, original)
        measuring = Measuring(measured, streams, processes, is_streamed=weights is not None) if measured else None
        return _Walk(model, streams, update, processes, resuming, weights, moe, *others, measuring).run(batches)


def compared(
    moe: MoEModel,
    batches: Sequence[TokenBatch],
    decisions: Sequence[Contexts],
    progress: Progress,
    *,
    title: str = "comparing",
    weights: StreamedWeights | None = None,
    processes: Processes | None = None,
    parking: Parking | None = None,
) -> list[dict[str, tuple[float, float]]]:
    """What the model's answers lose under each of several decisions, given as contexts by layer: domain → (KL in nats
    a token, standard error over sequences). The weights are read once. Raises UnsupportedModelError where a layer is in
    no decoder layer.
    """
    measured = Measured(batches, whole=[Candidate(number, contexts) for number, contexts in enumerate(decisions)])
    how: dict[str, Any] = {"title": title, "weights": weights, "processes": processes, "parking": parking}
    found = observe(moe, batches, {}, progress, measured=measured, **how)[WHOLE]
    names = list(dict.fromkeys(batch.domain for batch in batches))
    return [
        dict(zip(names, zip(kl_D.tolist(), error_D.tolist(), strict=True), strict=True))
        for _, kl_D, error_D in measured_of(found, len(names))
    ]


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
        streams, alone = Streams(model, model, update, 0, parking), Processes()
        _Walk(model, streams, update, alone, Resuming(None, alone), weights).run(batches, consume)


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
    units = [unit for unit in (weights.units if weights is not None else ()) if is_inside(path, unit)]
    with ExitStack() as stack:
        for unit in units:
            assert weights is not None
            stack.callback(weights.free, unit)
            weights.load(unit)
        return expert_weight_norms(moe.model, moe.layer(path))


@dataclass(frozen=True)
class Original:
    """The model that passes have made smaller, as it was: in memory, or read layer by layer from `weights`."""

    moe: MoEModel
    weights: StreamedWeights | None = None


@dataclass
class _Walk:
    """One walk of all batches through all layers."""

    model: Any
    streams: Streams
    update: Update
    processes: Processes
    resuming: Resuming
    weights: StreamedWeights | None
    moe: MoEModel | None = None
    statistics: Mapping[str, Statistic] = field(default_factory=dict)
    linears: Mapping[str, InputStatistic] = field(default_factory=dict)
    edited: Edited | None = None
    original: Original | None = None
    measuring: Measuring | None = None
    figures: Figures = field(default_factory=dict)
    observed: set[str] = field(default_factory=set)
    """Layers that all batches have come through."""
    unit: str | None = None
    """The decoder layer that the streams are in."""

    def run(self, batches: Sequence[TokenBatch], consume: Consume | None = None) -> Figures:
        domains = [batch.domain for batch in batches]
        for statistic in self.statistics.values():
            statistic.share(self.processes)
        keeps_outputs = self.resuming.journal is not None or self.measuring is not None
        with ExitStack() as stack:
            if self.weights is not None:
                stack.enter_context(self.weights.around(self.model if self.measuring else self.streams.body))
            if self.original is not None:
                self._begin_beside(self.original, stack)
            towers = tower_units(self.model)
            units = [unit for unit in units_of(self.model) if unit not in towers]
            units = units if self._streamed or keeps_outputs else []
            for weights in self._streamed if any(batch.images for batch in batches) else ():
                for unit in towers:  # images pass them before text comes to the first layer
                    weights.load(unit)
            self._refuse_outside(units)
            stops = [*(Stop(unit, is_unit=True) for unit in units), *map(Stop, self.statistics)]
            for place in stops:  # before the taps' own hooks, which a stop must not cut
                self.streams.stop_before(place, stack)
            for unit in units if keeps_outputs else ():
                self.streams.keep_output_of(unit, stack)
            for path, inputs in self.linears.items():
                self.streams.show_inputs_of(path, partial(inputs.update, expert=None), stack)
            for moe in [one for one in (self.moe, self.original.moe if self.original else None) if one is not None]:
                stack.enter_context(moe.watched(dict.fromkeys(self.statistics, self.streams.visit), self.streams.real))
            self._start(batches, consume, stack)
            while stop := self.streams.common_stop(self.processes):
                if stop.is_unit:
                    self._enter(stop.path)
                else:
                    self._observe_layer(stop.path, domains)
            if self.measuring is not None and self.unit is not None:
                found = self.measuring.finish(self._layers_of(self.unit), self.figures, domains)
                for path, figures in found.items():
                    self.figures[path] = self.figures.get(path, {}) | figures
                    self.resuming.put_figures(path, self.figures[path])
        self._refuse_unseen()
        self.resuming.close(list(self.figures))
        return {path: self.figures[path] for path in (*self.statistics, WHOLE) if path in self.figures}

    @property
    def _streamed(self) -> list[StreamedWeights]:
        """Weights that are read layer by layer."""
        both = self.weights, self.original.weights if self.original else None
        return [one for one in both if one is not None]

    def _layers_of(self, *units: str) -> list[str]:
        """The MoE layers in some decoder layers."""
        paths = [layer.path for layer in self.moe.layers] if self.moe is not None else []
        return [path for unit in units for path in paths if is_inside(path, unit)]

    def _begin_beside(self, original: Original, stack: ExitStack) -> None:
        """Have the first streams go through the original."""
        model = original.moe.model
        self.streams.original = model, getattr(model, "base_model", model)
        stack.enter_context(evaluating(model))
        stack.enter_context(original.moe.unskipped())
        if original.weights is not None:
            stack.enter_context(original.weights.around(self.streams.original[1]))

    def _start(self, batches: Sequence[TokenBatch], consume: Consume | None, stack: ExitStack) -> None:
        """All streams, at their first stop, or where the journal says that they stood."""
        own, snapshot = self.processes.own(len(batches)), self.resuming.common_snapshot(bool(batches))
        streams = self.streams
        self._begin(batches, own, consume, stack)
        if snapshot is not None:
            self._take_over_figures(snapshot)
            if self.measuring is not None:
                self.measuring.take_up(self._layers_of(*snapshot.passed), self.figures)
            if self.processes.all(self.resuming.set_on_their_way(streams, snapshot)):
                return
            for stream in [*streams.all, *streams.measured]:
                stream.leave()
            self.observed.clear()
            self.figures.clear()
            self._begin(batches, own, consume, stack)
        for stream in [*streams.all, *streams.measured]:
            streams.go_on(stream)

    def _begin(
        self, batches: Sequence[TokenBatch], own: Sequence[int], consume: Consume | None, stack: ExitStack
    ) -> None:
        twice = self.edited is not None or self.original is not None
        self.streams.begin(batches, own, consume, stack, twice=twice)
        if self.measuring is not None:
            self.measuring.begin(stack, len(self.statistics))

    def _take_over_figures(self, snapshot: Snapshot) -> None:
        """Those of the layers that were passed."""
        for path in self.statistics:
            if is_inside(path, *snapshot.passed):
                self.observed.add(path)
                known = self.resuming.figures(path)
                if known is not None:
                    self.figures[path] = known

    def _enter(self, unit: str) -> None:
        """All streams stand before a decoder layer: let go of the one before it, read this one, go on."""
        if self.unit is not None:
            if self.measuring is not None:
                self.measuring.pass_unit(self._layers_of(self.unit), self.figures)
            self.resuming.put_streams(unit, [*self.streams.all, *self.streams.measured], list(self.figures))
        for weights in self._streamed:
            if self.unit is not None:
                weights.free(self.unit)
            weights.load(unit)
            if (number := weights.units.index(unit) + 1) < len(weights.units):
                weights.prefetch(weights.units[number])
            if not self.statistics:
                self.update(number, len(weights.units))
        self.unit = unit
        for stream in self.streams.all:
            self.streams.go_on(stream)

    def _observe_layer(self, path: str, domains: Sequence[str]) -> None:
        if path in self.observed:
            raise UnsupportedModelError(
                f"{path}: it runs more than once on the same text, so its tokens cannot be told apart; this needs a "
                f"plugin."
            )
        self.observed.add(path)
        streams, statistic = self.streams, self.statistics[path]
        # looked at also where its figures are known: its output is that of the experts' outputs as they were looked at
        known, seen = self.resuming.figures(path), self._look(path, statistic)
        if not any(seen):
            for other in streams.others if self.edited else ():
                streams.go_on(other)
            return
        self.figures[path] = known or self._figures(path, statistic, seen, domains)
        if known is None:
            self.resuming.put_figures(path, self.figures[path])
        self._pass_edited(path)

    def _figures(
        self, path: str, statistic: Statistic, seen: Sequence[Sequence[int]], domains: Sequence[str]
    ) -> dict[str, Tensor]:
        figures = _joined(path, statistic, seen, domains, self.processes)
        if statistic.weight_norms:
            assert self.moe is not None
            figures |= expert_weight_norms(self.model, self.moe.layer(path))
        return figures

    def _look(self, path: str, statistic: Statistic) -> list[list[int]]:
        """Show a layer's tokens to its statistic, as often as it wants them. Returns the numbers of the batches, among
        those of all processes, that came to the layer in each process, as they came.
        """
        streams, own = self.streams, list[int]()
        looking = streams.others or streams.originals
        calls = [(stream, stream.call) for stream in looking]
        for stream, original in zip(looking, streams.originals, strict=True):
            if stream is not original:
                streams.go_on(original, _keep_output(stream))
            if self.edited:
                streams.run_again(path, stream, stream.call, _give(statistic, stream, own))
            else:
                streams.go_on(stream, _give(statistic, stream, own))
        seen: list[list[int]] = self.processes.exchange(list(own))
        while any(seen) and _wanted_again(path, statistic, self.processes):
            for stream, call in calls:
                streams.run_again(path, stream, call, _give(statistic, stream, own))
        for stream in looking if not self.edited else ():
            stream.target_TH = None
        return seen

    def _pass_edited(self, path: str) -> None:
        """Let the second streams through a layer as if it had been edited by its figures."""
        if not self.edited:
            return
        with self.edited(path, self.figures[path]), ExitStack() as stack:
            self.streams.real.listening = False
            stack.callback(setattr, self.streams.real, "listening", True)
            for other in self.streams.others:
                self.streams.go_on(other)
                other.target_TH = None

    def _refuse_outside(self, units: Sequence[str]) -> None:
        """Raise UnsupportedModelError where a layer is to be measured that is in no decoder layer."""
        assert self.moe is not None or self.measuring is None
        paths = [layer.path for layer in self.moe.layers] if self.moe and self.measuring else []
        outside = [path for path in paths if not is_inside(path, *units)]
        if outside:
            raise UnsupportedModelError(
                f"{outside[0]} is in no list of layers, so what the model's answers lose by it cannot be measured "
                f"layer by layer; say `share: even` or `share: loss`."
            )

    def _refuse_unseen(self) -> None:
        wanted = [path for path, statistic in self.statistics.items() if not statistic.optional]
        unseen = [path for path in wanted if path not in self.figures]
        if unseen:
            raise CalibrationError(
                f"{unseen[0]}: no token of the calibration text comes to this layer (a layer for images, say), so its "
                f"experts cannot be judged. Prune the other layers only: name them under `keep:`."
            )


def _wanted_again(path: str, statistic: Statistic, processes: Processes) -> bool:
    wanted = statistic.again()
    if processes.any(wanted) and not processes.all(wanted):
        raise PluginError(
            f"{path}: {type(statistic).__name__} wants to see its tokens again in one process and not in another; "
            f"it should decide by figures of all of them (`self.processes`)."
        )
    return wanted


def _joined(
    path: str, statistic: Statistic, seen: Sequence[Sequence[int]], domains: Sequence[str], processes: Processes
) -> dict[str, Tensor]:
    """The figures of all processes' batches; `seen` are the numbers of those that came to the layer in each."""
    own = statistic.tensors() if seen[processes.rank] else {}
    of_each = processes.gather(
        answered(f"{path}: {type(statistic).__name__}.tensors()", own, Mapping, "tensors by name")
    )
    parts = [(figures, numbers) for figures, numbers in zip(of_each, seen, strict=True) if numbers]
    if len(parts) == 1:
        return dict(parts[0][0])
    everywhere = _domains_of(domains, sorted(number for _, numbers in parts for number in numbers))
    figures, lost = joined_figures(
        [figures for figures, _ in parts],
        [[everywhere.index(domain) for domain in _domains_of(domains, numbers)] for _, numbers in parts],
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


def _domains_of(domains: Sequence[str], numbers: Sequence[int]) -> list[str]:
    """The domains of these batches, in the order in which they came."""
    return list(dict.fromkeys(domains[number] for number in numbers))


def _give(statistic: Statistic, stream: Stream, seen: list[int]) -> Take:
    """Hand a stream's tokens to a statistic, and note its number."""

    def give(tokens: RoutedTokens) -> None:
        batch = stream.batch
        tokens.domain, tokens.held_out = batch.domain, batch.held_out
        tokens.is_image_T = ~batch.text_mask[batch.attention_mask] if batch.images else None
        tokens.target_TH = None if stream.target_TH is None else stream.target_TH.to(tokens.hidden_TH.device)
        seen.append(stream.number)
        statistic.update(tokens)

    return give


def _keep_output(stream: Stream) -> Take:
    """Put a layer's output on one stream down as the target of another."""

    def keep(tokens: RoutedTokens) -> None:
        for _ in tokens.ranked_outputs(tokens.layer.top_k):
            pass
        stream.target_TH = tokens.output_TH

    return keep
