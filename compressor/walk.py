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

Not covered yet: reading one layer at a time from disk, hidden states that are larger than memory. In a block-diffusion
model, padding counts towards the sliding window through which the decoder sees its prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from compressor.calibration import TokenBatch
from compressor.errors import CalibrationError, PluginError, UnsupportedModelError
from compressor.moe import MoEModel, RealTokens, RoutedTokens, expert_weight_norms
from compressor.processes import Processes
from compressor.progress import Progress, Update
from compressor.statistics import RULES, Statistic, joined_figures

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
    processes: Processes | None = None,
) -> Figures:
    """Feed every batch to every statistic, in order, and return their figures. The model is not changed.

    Several `processes` are given the same batches and the same model; each observes some of the batches, and all return
    the same figures.

    A model that skips experts is observed unskipped.

    With `edited` the walk is progressive: every layer is observed on the activations that come out of the edited layers
    before it, with the original model's output as `RoutedTokens.target_TH`.

    Raises CheckpointError, naming the layer, where activations are not finite; CalibrationError where a layer sees no
    token, unless its statistic is optional: then it has no figures; UnsupportedModelError where batches do not come to
    the layers in the same order.
    """
    model = moe.model
    body = getattr(model, "base_model", model)  # without the language-model head, whose output nobody reads
    was_training = model.training
    model.eval()
    try:
        with moe.unskipped(), progress.task(title) as update:
            return _Walk(moe, body, dict(statistics), edited, update, processes or Processes()).run(batches)
    finally:
        model.train(was_training)


class _Stream:
    """One batch on its way through the model."""

    def __init__(self, body: Any, batch: TokenBatch, number: int) -> None:
        self.batch, self.number = batch, number
        self.mask_T = batch.attention_mask.flatten().to(next(body.parameters()).device)
        self.path: str | None = None
        """The watched block that it stands before; None before the first step and at the end."""
        self.call: tuple[Any, Any] = ((), {})
        """The arguments that this block is about to get."""
        self.target_TH: Tensor | None = None
        self._greenlet = greenlet(lambda: body(**model_inputs(body, batch)))

    def stand(self, path: str, args: Any, kwargs: Any) -> None:
        """Called from within the forward: wait here until told to go on."""
        self.path, self.call = path, (args, kwargs)
        assert self._greenlet.parent is not None
        self._greenlet.parent.switch()
        self.call = ((), {})

    def go_on(self) -> None:
        """Run up to the next watched block, or to the end."""
        self.path = None
        self._greenlet.switch()

    def leave(self) -> None:
        """Give up: a stream that still stands somewhere is unwound."""
        if self._greenlet and not self._greenlet.dead:
            self._greenlet.throw()


@dataclass
class _Walk:
    """One walk of all batches through all layers."""

    moe: MoEModel
    body: Any
    statistics: dict[str, Statistic]
    edited: Edited | None
    update: Update
    processes: Processes
    real: RealTokens = field(default_factory=RealTokens)
    stream: _Stream | None = None
    """The stream that is running."""
    take: Callable[[RoutedTokens], None] | None = None
    """What is done with the tokens of the layer that is running."""
    figures: Figures = field(default_factory=dict)
    num_streams: int = 0
    num_steps: int = 0
    """Blocks passed by streams, in all."""
    seen: list[int] = field(default_factory=list)
    """Numbers of the batches, among those of all processes, that came to the present layer, as they came."""
    domains: list[str] = field(default_factory=list)
    """Of the batches of all processes."""

    def run(self, batches: Sequence[TokenBatch]) -> Figures:
        """All batches, layer by layer."""
        self.domains, own = [batch.domain for batch in batches], self.processes.own(len(batches))
        originals = [_Stream(self.body, batches[number], number) for number in own]
        others = [_Stream(self.body, batches[number], number) for number in own] if self.edited else []
        self.num_streams = len(originals) + len(others)
        for statistic in self.statistics.values():
            statistic.share(self.processes)
        hooks = [self._stop_before(path) for path in self.statistics]  # before the taps' own, which a stop must not cut
        try:
            with self.moe.watched(dict.fromkeys(self.statistics, self._visit), self.real):
                for stream in [*originals, *others]:
                    self._go_on(stream)
                while path := self._common_path([*originals, *others]):
                    self._observe_layer(path, originals, others)
        finally:
            for stream in [*originals, *others]:
                stream.leave()
            for hook in hooks:
                hook.remove()
        self._refuse_unseen()
        return {path: self.figures[path] for path in self.statistics if path in self.figures}

    def _stop_before(self, path: str) -> Any:
        def stop(module: Any, args: Any, kwargs: Any) -> None:
            if self.stream is not None and getcurrent().parent is not None:
                self.stream.stand(path, args, kwargs)

        return self.moe.model.get_submodule(path).register_forward_pre_hook(stop, with_kwargs=True)

    def _common_path(self, streams: Sequence[_Stream]) -> str | None:
        own = sorted({stream.path for stream in streams}, key=str)
        paths = {path for of_one in self.processes.exchange(own) for path in of_one}
        if len(paths) > 1:
            named = " and ".join(sorted(str(path or "the end") for path in paths))
            raise UnsupportedModelError(
                f"{type(self.moe.model).__name__}: some batches come to {named} next: its layers do not run in one "
                f"order, so they cannot be observed one after another."
            )
        return paths.pop() if paths else None

    def _observe_layer(self, path: str, originals: Sequence[_Stream], others: Sequence[_Stream]) -> None:
        if path in self.figures:
            raise UnsupportedModelError(
                f"{path}: it runs more than once on the same text, so its tokens cannot be told apart; this needs a "
                f"plugin."
            )
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
            self.figures[path] |= expert_weight_norms(self.moe.model, self.moe.layer(path))
        if self.edited:
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
        was_standing = stream.path is not None
        self.stream, self.take, self.real.mask_T = stream, take, stream.mask_T
        try:
            stream.go_on()
        finally:
            self.stream = self.take = None
        if was_standing:
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
        try:
            self.moe.model.get_submodule(path)(*args, **kwargs)
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


def _keep_output(stream: _Stream) -> Callable[[RoutedTokens], None]:
    """Put a layer's output on one stream down as the target of another."""

    def keep(tokens: RoutedTokens) -> None:
        for _ in tokens.ranked_outputs(tokens.layer.top_k):
            pass
        stream.target_TH = tokens.output_TH

    return keep


def model_inputs(model: Any, batch: TokenBatch) -> dict[str, Any]:
    """Arguments of a model's forward, or of its base model's, on its own device.

    The mask is left out where there is no padding, which lets fast attention run. A model with an encoder and a
    decoder reads the same ids in both, so every MoE layer sees as many tokens, padding in the same places.
    """
    device = next(model.parameters()).device
    ids = batch.input_ids.to(device)
    mask = None if batch.attention_mask.all() else batch.attention_mask.to(device, torch.int64)
    inputs: dict[str, Any] = {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask})
    if "decoder_input_ids" not in inspect.signature(model.forward).parameters:
        return inputs | {"use_cache": False}
    inputs["decoder_input_ids"] = ids
    if model.config.is_encoder_decoder:
        return inputs | ({} if mask is None else {"decoder_attention_mask": mask}) | {"use_cache": False}
    # Block diffusion: the decoder reads the encoder's cache, which must be there, and goes on behind its real tokens.
    if mask is not None:
        inputs["decoder_attention_mask"] = torch.cat([mask, mask], dim=1)
        inputs["decoder_position_ids"] = mask.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=device)
    return inputs


@torch.no_grad()
def logits(model: Any, batch: TokenBatch) -> Tensor:
    """The model's logits [N, V] at the batch's N real tokens, in the model's dtype.

    Of a class without a head these are its last hidden states, [N, H]: what it hands out instead.
    """
    was_training = model.training
    model.eval()
    try:
        output = model(**model_inputs(model, batch))
    finally:
        model.train(was_training)
    answers = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return answers[batch.attention_mask.to(answers.device)]  # type: ignore[no-any-return]
