"""Batches on their way through a model, one by one, each up to where it stops next.

A *stream* is the model's own forward on one batch in a greenlet: it stops before each watched block, and of a model
that is read from disk before each decoder layer, and goes on when it is told to. So whatever a model carries from layer
to layer (masks, caches, several residual streams) stays where its own code keeps it, and attention runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor

from compressor.checkpoint.resume_state import Standing
from compressor.data.sequences import TokenBatch
from compressor.errors import UnsupportedModelError
from compressor.machine.distributed import Processes
from compressor.machine.progress import Update
from compressor.model.routed_tokens import RealTokens, RoutedTokens
from compressor.observe.activation_offload import Parked, Parking
from compressor.observe.forward import device_of, model_inputs

Consume = Callable[[TokenBatch, Any], None]
"""(batch, the model's output for it)."""
Take = Callable[[RoutedTokens], None]
"""What is done with the tokens of the layer that is running."""


def list_of(unit: str) -> str:
    """The path of the module list that a decoder layer is in."""
    return unit.rpartition(".")[0]


def writes_cache(call: Any) -> bool:
    """Whether a block is given a cache, which it would write into once more if it ran again."""
    return any(call[1].get(name) is not None for name in ("cache", "past_key_values"))  # the latter before 5.24


@dataclass(frozen=True)
class Stop:
    """A place where streams stop: before a watched block, or before a decoder layer whose weights may not be there."""

    path: str
    is_unit: bool = False


class Stream:
    """One batch on its way through the model."""

    def __init__(
        self, body: Any, batch: TokenBatch, number: int, consume: Consume | None = None, *, is_observed: bool = True
    ) -> None:
        self.batch, self.number, self.is_observed = batch, number, is_observed
        self.mask_T = batch.attention_mask.flatten().to(device_of(body))
        self.stop: Stop | None = None
        """What it stands before; None before the first step and at the end."""
        self.call: tuple[Any, Any] = ((), {})
        """The arguments that the block is about to get."""
        self.target_TH: Tensor | None = None
        self.passed: list[str] = []
        """The decoder layers that it has come through; kept with a journal only."""
        self.outputs: dict[str, Any] = {}
        """What the last of them has put out, by the path of the list that it is in."""
        self.recorded: Standing | None = None
        """What it is to have come through already: see `resuming`."""
        self.parked = Parked()

        def run() -> None:
            output = body(**model_inputs(body, batch))
            if consume is not None:
                consume(batch, output)

        self._greenlet = greenlet(run)

    def park(self, parking: Parking) -> None:
        """Have what it carries wait elsewhere."""
        self.parked = parking.park(self._greenlet.gr_frame, (self.call, list(self.outputs.values()), self.target_TH))

    def stand(self, stop: Stop, args: Any, kwargs: Any) -> None:
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


class Streams:
    """All streams of this process; one of them runs at a time.

    `update` is told of every block that one has passed, of `num_blocks` for each. With `parking` what the others carry
    waits there.
    """

    def __init__(self, model: Any, body: Any, update: Update, num_blocks: int, parking: Parking | None) -> None:
        self.model, self.body, self.parking = model, body, parking
        self.real = RealTokens()
        self.originals: list[Stream] = []
        self.others: list[Stream] = []
        """Second streams of the same batches: in progressive mode through the layers already edited; through the model
        that is observed where the first ones go through its original."""
        self.original: tuple[Any, Any] | None = None
        """The original and its body."""
        self.answering: frozenset[str] = frozenset()
        """Decoder layers that answer from the journal, and before which nobody stops."""
        self.measured: list[Stream] = []
        """Streams that nobody observes, which stop before decoder layers alone; see `measuring`."""
        self.more_steps = 0
        """Decoder layers that these will have passed in all, as far as is known."""
        self.running: Stream | None = None
        self._take: Take | None = None
        self._update, self._num_blocks, self._num_steps = update, num_blocks, 0

    @property
    def all(self) -> list[Stream]:
        return [*self.originals, *self.others]

    def begin(
        self,
        batches: Sequence[TokenBatch],
        own: Sequence[int],
        consume: Consume | None,
        stack: ExitStack,
        *,
        twice: bool,
    ) -> None:
        """New streams of this process's `own` batches, none of which has started; they are left when the stack ends."""
        body = self.body if self.original is None else self.original[1]
        self.originals = [Stream(body, batches[number], number, consume) for number in own]
        self.others = [Stream(self.body, batches[number], number) for number in own] if twice else []
        for stream in self.all:
            stack.callback(stream.leave)

    # hooks

    def stop_before(self, stop: Stop, stack: ExitStack) -> None:
        """Have streams stop there until the stack ends."""

        def stand(module: Any, args: Any, kwargs: Any) -> None:
            is_passed = stop.is_unit and stop.path in self.answering
            stream = self.running if self.running and (self.running.is_observed or stop.is_unit) else None
            if stream is not None and getcurrent().parent is not None and not is_passed:
                stream.stand(stop, args, kwargs)

        for module in self.modules(stop.path):
            stack.callback(module.register_forward_pre_hook(stand, with_kwargs=True).remove)

    def keep_output_of(self, unit: str, stack: ExitStack) -> None:
        """Have streams remember what a decoder layer has put out, until the stack ends."""

        def keep(module: Any, args: Any, output: Any) -> None:
            if self.running is not None and getcurrent().parent is not None:
                self.running.outputs[list_of(unit)] = output
                self.running.passed.append(unit)

        for module in self.modules(unit):
            stack.callback(module.register_forward_hook(keep).remove)

    def show_inputs_of(self, path: str, take: Callable[[Tensor], None], stack: ExitStack) -> None:
        """Hand over the inputs [T, I] of a linear map of the model that is observed, until the stack ends."""

        def show(module: Any, args: Any, kwargs: Any) -> None:
            if self.running is None or self.real.deaf:
                return
            given = args[0] if args else kwargs["input"]
            mask_T = self.real.mask_T
            inputs_TI = given.detach().reshape(-1, given.shape[-1])
            if mask_T is None or len(mask_T) != len(inputs_TI):
                raise UnsupportedModelError(
                    f"{path}: it is given {len(inputs_TI)} rows where the batch has "
                    f"{None if mask_T is None else len(mask_T)} tokens, so padding cannot be told from text."
                )
            take(inputs_TI[mask_T.to(inputs_TI.device)])

        module = self.model.get_submodule(path)
        stack.callback(module.register_forward_pre_hook(show, with_kwargs=True).remove)

    def modules(self, path: str) -> list[Any]:
        """Those at a path: the model's, and the original's."""
        models = [self.model, *([self.original[0]] if self.original else [])]
        return [model.get_submodule(path) for model in models]

    def visit(self, tokens: RoutedTokens) -> None:
        """Called with the tokens of a watched layer that runs."""
        if self._take is not None:
            self._take(tokens)

    # running

    def go_on(self, stream: Stream, take: Take | None = None) -> None:
        """Let a stream run through the block that it stands before, and up to the next one."""
        has_passed = stream.stop is not None and stream.stop.is_unit != stream.is_observed
        self.running, self._take, self.real.mask_T = stream, take, stream.mask_T
        self.real.splits = stream.batch.images is not None
        is_listening, self.real.listening = self.real.listening, self.real.listening and stream.is_observed
        stream.parked.fetch()
        try:
            stream.go_on()
        finally:
            self.running = self._take = None
            self.real.listening = is_listening
        if self.parking is not None and stream.stop is not None:
            stream.park(self.parking)
        if has_passed:
            self._num_steps += 1
            self._update(self._num_steps, len(self.all) * self._num_blocks + self.more_steps)

    def run_again(self, path: str, stream: Stream, call: Any, take: Take) -> None:
        """Run one block alone on what a stream has brought it; the output is dropped."""
        args, kwargs = call
        if writes_cache(call):
            raise UnsupportedModelError(
                f"{path}: its block holds attention that writes a cache, so it cannot be run twice on the same text: "
                f"neither `progressive` nor a second look at tokens is possible here."
            )
        self._take, self.real.mask_T, self.real.splits = take, stream.mask_T, stream.batch.images is not None
        stream.parked.fetch()
        try:
            self.model.get_submodule(path)(*args, **kwargs)
        finally:
            self._take = None

    def common_stop(self, processes: Processes) -> Stop | None:
        """Where all streams of all processes stand, None at the end. UnsupportedModelError where that differs."""
        own = [[stop.path, stop.is_unit] if stop else None for stop in {stream.stop for stream in self.all}]
        stops = {Stop(*stop) if stop else None for of_one in processes.exchange(own) for stop in of_one}
        if len(stops) > 1:
            named = " and ".join(sorted(stop.path if stop else "the end" for stop in stops))
            advice = (
                " Where some rows have images, give none without." if any(one.batch.images for one in self.all) else ""
            )
            raise UnsupportedModelError(
                f"{type(self.model).__name__}: some batches come to {named} next: its layers do not run in one "
                f"order, so they cannot be observed one after another.{advice}"
            )
        return stops.pop() if stops else None
