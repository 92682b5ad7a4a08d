"""The model that passes work on: `InMemory`, or `on_disk.OnDisk`, which gives the same answers, to the bit.

What is only measured may be `AsLoaded`: whatever transformers loads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.extra_layers import LeftOut
from compressor.checkpoint.find import Checkpoint
from compressor.checkpoint.layerwise_weights import StreamedWeights
from compressor.checkpoint.load import unquantised_skeleton
from compressor.checkpoint.output import OutputFolder
from compressor.data.lm_eval_tasks import LoadedTasks
from compressor.data.sequences import Sequences, TokenBatch
from compressor.edit.layer_edits import LiveWeights, as_finished, edit_layers, finish
from compressor.edit.verify import compare_answers, ids_left, refuse_not_finite_answers, save_verified
from compressor.errors import CheckpointError, VerificationError
from compressor.evaluation.lm_eval import TaskResult, run_tasks
from compressor.evaluation.perplexity import Perplexity, Watch, perplexity
from compressor.evaluation.size import RoutedSize, Size, size
from compressor.machine.distributed import Processes
from compressor.machine.progress import Progress, Update
from compressor.method import Decision, Method
from compressor.model.adapter import Adapter
from compressor.model.layer_weights import Ending
from compressor.model.moe_model import Kept, MoEModel
from compressor.model.skipping.usage import Counter
from compressor.model.structure import MoELayer
from compressor.observe import forward, layerwise
from compressor.observe.activation_offload import Parking
from compressor.observe.layerwise import Figures
from compressor.observe.measuring import Contexts
from compressor.observe.statistic import Statistic

TaskResults = dict[str, TaskResult]


@dataclass(eq=False, repr=False)
class Backend(ABC):
    """A model whose experts are known. `left_out`: what transformers does not build; `parking`: for hidden states."""

    moe: MoEModel = field(init=False)
    weights: StreamedWeights | None = field(init=False, default=None)
    """Where they are read from, one layer at a time; None where they are all there."""
    _: KW_ONLY
    progress: Progress
    processes: Processes
    left_out: LeftOut | None = None
    adapters: Sequence[Adapter] = ()
    parking: Parking | None = None

    def __post_init__(self) -> None:
        self.original_ids: Kept = {layer.path: list(range(layer.num_experts)) for layer in self.layers}
        """Layer path → what the original model calls the experts that are there now, in their order."""

    @property
    def model(self) -> Any:
        return self.moe.model

    @property
    def layers(self) -> Sequence[MoELayer]:
        return self.moe.layers

    def counted(self) -> AbstractContextManager[Counter]:
        """Within the context the experts that tokens use are counted, where a model skips some."""
        return self.moe.counted()

    @abstractmethod
    def perplexity(
        self, sequences: Sequences, batch_size: int, update: Update | None = None, watch: Watch | None = None
    ) -> Perplexity:
        """How well the model predicts a text; `watch` is shown its answers, see `fidelity`."""

    @abstractmethod
    def ask(self, tasks: LoadedTasks, tokenizer: Any, update: Update | None = None, **how: Any) -> TaskResults:
        """Answers to tasks; see `lm_eval.run_tasks`, which takes `limit`, `batch_size` and `seed` too."""

    @abstractmethod
    def size(self, routed: Sequence[RoutedSize] = ()) -> Size:
        """Parameters, and the bytes that they take as they are stored; see `size.size`."""

    def observe(self, batches: Sequence[TokenBatch], statistics: Mapping[str, Statistic], **how: Any) -> Figures:
        """The figures of these statistics; see `layerwise.observe`, which takes more."""
        how |= {"weights": self.weights, "processes": self.processes, "parking": self.parking}
        return layerwise.observe(self.moe, batches, statistics, self.progress, **how)

    def compared(
        self, batches: Sequence[TokenBatch], decisions: Sequence[Contexts], title: str
    ) -> list[dict[str, tuple[float, float]]]:
        """What the model's answers lose under each of these; see `layerwise.compared`."""
        how: dict[str, Any] = {"weights": self.weights, "processes": self.processes, "parking": self.parking}
        return layerwise.compared(self.moe, batches, decisions, self.progress, title=title, **how)

    def weigh(self, statistics: Mapping[str, Statistic], **how: Any) -> Figures:
        """The figures of statistics that are shown no text; see `layerwise.weigh`."""
        how |= {"weights": self.weights, "processes": self.processes}
        return layerwise.weigh(self.moe, statistics, self.progress, **how)

    @abstractmethod
    def previewed(self, preview: Callable[..., Any], decision: Decision) -> AbstractContextManager[object]:
        """A context in which the model computes what a decision would make of it, as a method's `preview` does."""

    @abstractmethod
    def edit(self, method: Method[Any], decision: Decision, probe: TokenBatch, name: str) -> dict[str, float]:
        """Carry a decision out; how answers on `probe` differ from the preview's. `name` tells a run's edits apart.
        Raises VerificationError where they are others, OptionError where it cannot be edited like this.
        """

    @contextmanager
    def _followed(self, moe: MoEModel) -> Iterator[None]:
        """What is removed within the context is gone from `original_ids`."""
        before = len(moe.removals)
        yield
        self.original_ids = ids_left(self.original_ids, moe.removals[before:])

    @abstractmethod
    def logits(self, batch: TokenBatch) -> Tensor:
        """The model's logits [N, V] at a batch's N real tokens."""

    @abstractmethod
    def stored(self, folder: OutputFolder, probe: TokenBatch, stage: Path) -> Checkpoint:
        """The model as files: those that it is read from, or else written into `stage`, in the output's work folder."""

    @abstractmethod
    def save(self, folder: OutputFolder, probe: TokenBatch) -> None:
        """Write the checkpoint into the output's folder."""


class _Callable:
    """A model whose weights are all there, so that it is simply called."""

    model: Any
    processes: Processes

    def perplexity(
        self, sequences: Sequences, batch_size: int, update: Update | None = None, watch: Watch | None = None
    ) -> Perplexity:
        return perplexity(self.model, sequences, batch_size, update, self.processes, watch=watch)

    def ask(self, tasks: LoadedTasks, tokenizer: Any, update: Update | None = None, **how: Any) -> TaskResults:
        return run_tasks(self.model, tokenizer, tasks, progress=update, processes=self.processes, **how)

    def logits(self, batch: TokenBatch) -> Tensor:
        return forward.logits(self.model, batch)


@dataclass(eq=False, repr=False)
class InMemory(_Callable, Backend):
    """A model whose weights are all there. `source` is the checkpoint that it came from, if any."""

    moe: MoEModel
    source: Checkpoint | None
    _answered: tuple[TokenBatch, Tensor] | None = field(init=False, default=None)

    def size(self, routed: Sequence[RoutedSize] = ()) -> Size:
        return size(self.model, routed)

    def previewed(self, preview: Callable[..., Any], decision: Decision) -> AbstractContextManager[object]:
        context: AbstractContextManager[object] = preview(self.moe, decision)
        return context

    def edit(self, method: Method[Any], decision: Decision, probe: TokenBatch, name: str) -> dict[str, float]:
        untouched, self._answered = self.answers(probe), None
        with self._followed(self.moe):
            differences, answers = _edit_verified(self.moe, method, decision, probe, untouched)
        self._answered = probe, answers
        return differences

    def answers(self, batch: TokenBatch) -> Tensor:
        """The logits outside any mask; not computed again where the last edit was compared on this batch."""
        if self._answered is not None:
            known, logits_NV = self._answered
            same = map(torch.equal, (known.input_ids, known.attention_mask), (batch.input_ids, batch.attention_mask))
            if known.images is batch.images and all(same):
                return logits_NV
        return self.logits(batch)

    def stored(self, folder: OutputFolder, probe: TokenBatch, stage: Path) -> Checkpoint:
        self.progress.say("saving, and loading again to compare")
        how = (probe, self.left_out, self.adapters, self.answers(probe))
        return save_verified(self.moe, self.source, folder, *how, into=stage)

    def save(self, folder: OutputFolder, probe: TokenBatch) -> None:
        self.stored(folder, probe, folder.path)


def _edit_verified(
    moe: MoEModel, method: Method[Any], decision: Decision, probe: TokenBatch, untouched: Tensor
) -> tuple[dict[str, float], Tensor]:
    """Edit the live model and check it on one batch, whose logits `untouched` [N, V] are: no expert "removed" changes
    no bit, numbers written equal the same edit in float32, and the edited model equals the method's preview, or else
    the model with these numbers before anything is removed. Raises VerificationError; returns (differences, logits).
    """
    if not torch.isfinite(untouched).all():
        raise CheckpointError(
            "the model's logits on calibration text are not finite, though its weights are: its last ones are "
            f"damaged, or too large for {untouched.dtype}."
        )
    moe.keep({layer.path: range(layer.num_experts) for layer in moe.layers})
    if not torch.equal(forward.logits(moe.model, probe), untouched):
        raise VerificationError(
            "keeping all experts changed the model's logits: this architecture's edit is not sound."
        )
    preview = method.preview(moe, decision)
    expected = None
    if preview is not None:
        with preview:
            expected = forward.logits(moe.model, probe)
    endings, errors = edit_layers(method, decision, moe.layers, LiveWeights(moe))
    if preview is None and any(one != Ending(wrote=one.wrote) for one in endings.values()):
        with as_finished(moe, endings):
            expected = forward.logits(moe.model, probe)
    finish(moe, method, decision, endings)
    answers = forward.logits(moe.model, probe)
    refuse_not_finite_answers(answers, method.name)
    compared = {} if expected is None else compare_answers(expected, answers)
    return {"keep_all_difference": 0.0, **errors, **compared}, answers


class AsLoaded(_Callable):
    """A model as transformers loads it, to be measured alone. `layers` are the MoE layers that are known."""

    weights = None
    """They are all there."""

    def __init__(self, model: Any, layers: Sequence[MoELayer], source: Checkpoint, processes: Processes) -> None:
        self.model, self.layers, self.source, self.processes = model, layers, source, processes

    def counted(self) -> AbstractContextManager[Counter]:
        return nullcontext(Counter())

    def size(self, routed: Sequence[RoutedSize] = ()) -> Size:
        """Of a quantised checkpoint the parameters are those that its numbers stand for."""
        unquantised = unquantised_skeleton(self.source)
        found = replace(size(unquantised, routed), bytes=self.source.num_bytes)
        if self.source.quantisation is None:
            found = size(self.model, routed)
        is_known = routed or not any("expert" in name for name, _ in unquantised.named_parameters())
        return found if is_known else replace(found, active_parameters=None)


Measurable = AsLoaded | Backend
