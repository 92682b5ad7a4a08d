"""The model that passes work on, one after another, with all of its weights in memory.

* `AsLoaded`: a model that is only measured, whatever transformers loads
* `InMemory`: a live model: edited in place, compared with what was previewed, saved, loaded again, compared
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from compressor.edit.layer_edits import carry_out
from compressor.edit.verify import edit_verified, ids_left, save_verified
from compressor.evaluate.lm_eval import TaskResult, run_tasks
from compressor.evaluate.perplexity import Perplexity, perplexity
from compressor.evaluate.size import RoutedSize, Size, size
from compressor.machine.distributed import Processes
from compressor.machine.progress import Progress, Update
from compressor.method import Decision, Method
from compressor.model.adapter import Adapter
from compressor.model.moe_model import Kept, MoEModel
from compressor.model.skipping.usage import Counter
from compressor.model.structure import MoELayer
from compressor.observe import forward, layerwise
from compressor.observe.activation_offload import Parking
from compressor.observe.statistic import Statistic

TaskResults = dict[str, TaskResult]


class AsLoaded:
    """A model as transformers loads it, to be measured alone. `layers` are the MoE layers that are known."""

    def __init__(self, model: Any, layers: Sequence[MoELayer], source: Checkpoint, processes: Processes) -> None:
        self._model, self._layers, self.source, self.processes = model, layers, source, processes

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self._model

    @property
    def layers(self) -> Sequence[MoELayer]:
        """Its MoE layers that are known of."""
        return self._layers

    def counted(self) -> AbstractContextManager[Counter]:
        """Within the context the experts that tokens use are counted, where a model skips some."""
        return nullcontext(Counter())

    def perplexity(self, sequences: Sequences, batch_size: int, update: Update | None = None) -> Perplexity:
        """How well the model predicts a text."""
        return perplexity(self.model, sequences, batch_size, update, self.processes)

    def ask(self, tasks: LoadedTasks, tokenizer: Any, update: Update | None = None, **how: Any) -> TaskResults:
        """Answers to tasks; see `lm_eval.run_tasks`, which takes `limit`, `batch_size` and `seed` too."""
        return run_tasks(self.model, tokenizer, tasks, progress=update, processes=self.processes, **how)

    def size(self, routed: Sequence[RoutedSize] = ()) -> Size:
        """Parameters and bytes, see `size.size`; quantised: parameters as numbers stand for them, bytes as stored."""
        assert self.source is not None
        unquantised = unquantised_skeleton(self.source)
        found = dataclasses.replace(size(unquantised, routed), bytes=stored_bytes(self.source))
        if self.source.quantisation is None:
            found = size(self.model, routed)
        is_known = routed or not any("expert" in name for name, _ in unquantised.named_parameters())
        return found if is_known else dataclasses.replace(found, active_parameters=None)


class InMemory(AsLoaded):
    """A model with all weights and known experts. `source`: its checkpoint; `parking`: where hidden states wait."""

    source: Checkpoint | None  # type: ignore[assignment]

    def __init__(
        self,
        moe: MoEModel,
        source: Checkpoint | None,
        *,
        left_out: LeftOut | None = None,
        adapters: Sequence[Adapter] = (),
        progress: Progress,
        processes: Processes,
        parking: Parking | None = None,
    ) -> None:
        self.moe, self.source, self.left_out, self.adapters = moe, source, left_out, adapters
        self.progress, self.processes, self.parking = progress, processes, parking
        self.original_ids: Kept = {layer.path: list(range(layer.num_experts)) for layer in moe.layers}
        """Layer path → what the original model calls the experts that are there now, in their order."""
        self._answered: tuple[TokenBatch, Tensor] | None = None

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self.moe.model

    @property
    def layers(self) -> Sequence[MoELayer]:
        """Its MoE layers."""
        return self.moe.layers

    def counted(self) -> AbstractContextManager[Counter]:
        """See `MoEModel.counted`."""
        return self.moe.counted()

    weights: StreamedWeights | None = None

    def observe(
        self, batches: Sequence[TokenBatch], statistics: Mapping[str, Statistic], **how: Any
    ) -> layerwise.Figures:
        """The figures of these statistics; see `layerwise.observe`, which takes more."""
        how |= {"weights": self.weights, "processes": self.processes, "parking": self.parking}
        return layerwise.observe(self.moe, batches, statistics, self.progress, **how)

    def weigh(self, statistics: Mapping[str, Statistic], **how: Any) -> layerwise.Figures:
        """The figures of statistics that are shown no text; see `layerwise.weigh`."""
        return layerwise.weigh(
            self.moe, statistics, self.progress, weights=self.weights, processes=self.processes, **how
        )

    def previewed(self, preview: Callable[..., Any], decision: Decision) -> AbstractContextManager[object]:
        """A context in which the model computes what a decision would make of it, as a method's `preview` does."""
        context: AbstractContextManager[object] = preview(self.moe, decision)
        return context

    def size(self, routed: Sequence[RoutedSize] = ()) -> Size:
        """Parameters, and the bytes that they take; see `size.size`."""
        return size(self.model, routed)

    def edit(self, method: Method[Any], decision: Decision, probe: TokenBatch, name: str) -> dict[str, float]:
        """Carry a decision out; how answers on `probe` differ from the preview's. `name` tells a run's edits apart.
        Raises VerificationError where they are others, OptionError where it cannot be edited like this.
        """
        untouched, self._answered = self.answers(probe), None
        with self._followed(self.moe):
            differences, answers = edit_verified(self.moe, method, decision, carry_out, probe, untouched)
        self._answered = probe, answers
        return differences

    @contextmanager
    def _followed(self, moe: MoEModel) -> Iterator[None]:
        """What is removed within the context is gone from `original_ids`."""
        before = len(moe.removals)
        yield
        self.original_ids = ids_left(self.original_ids, moe.removals[before:])

    def logits(self, batch: TokenBatch) -> Tensor:
        """The model's logits [N, V] at a batch's N real tokens."""
        return forward.logits(self.moe.model, batch)

    def answers(self, batch: TokenBatch) -> Tensor:
        """The same outside any mask; not computed again where the last edit was compared on this batch."""
        if self._answered is not None:
            known, logits_NV = self._answered
            if torch.equal(known.input_ids, batch.input_ids) and torch.equal(
                known.attention_mask, batch.attention_mask
            ):
                return logits_NV
        return self.logits(batch)

    def save(self, folder: OutputFolder, probe: TokenBatch) -> None:
        """Write the checkpoint into the output's folder."""
        self.progress.say("saving, and loading again to compare")
        save_verified(self.moe, self.source, folder, probe, self.left_out, self.adapters, self.answers(probe))


def stored_bytes(found: Checkpoint) -> int:
    """Bytes of all tensors in a checkpoint's files."""
    return sum(sum(shard.sizes.values()) for shard in found.shards)
