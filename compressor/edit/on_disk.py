"""The model that passes work on, with its weights on disk: a skeleton whose weights are read layer by layer.

Every edit writes a smaller checkpoint (`checkpoint_edit`), which the next pass reads; the last one is the output.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.find import Checkpoint
from compressor.checkpoint.layerwise_weights import StreamedWeights
from compressor.checkpoint.load import load_model
from compressor.checkpoint.output import OutputFolder
from compressor.checkpoint.resume_state import Journal
from compressor.data.lm_eval_tasks import LoadedTasks
from compressor.data.sequences import Sequences, TokenBatch
from compressor.edit.backend import Backend, TaskResults
from compressor.edit.checkpoint_edit import meta_model, plan_edit
from compressor.edit.layer_edits import StoredWeights, as_finished, edit_layers, finish
from compressor.edit.verify import compare_answers, refuse_not_finite_answers
from compressor.errors import CheckpointError
from compressor.evaluation.lm_eval import run_tasks
from compressor.evaluation.perplexity import Perplexity, Watch, perplexity
from compressor.evaluation.result import Run
from compressor.evaluation.size import RoutedSize, Size, size
from compressor.machine.progress import Update
from compressor.method import Decision, Method
from compressor.model.adapter import structure_of
from compressor.model.layer_weights import Ending
from compressor.model.moe_model import MoEModel
from compressor.observe import forward, layerwise
from compressor.observe.streams import Consume


@dataclass(eq=False, repr=False)
class OnDisk(Backend):
    """A model whose weights are read one decoder layer at a time. `work`: a folder for checkpoints between passes, None
    to measure only; `journal` knows which are whole; `tokens_at_once` of measured text pass a layer together.
    """

    source: Checkpoint
    work: Path | None
    weights: StreamedWeights = field(init=False)
    stage: Path | None = field(init=False, default=None)
    """The folder of the last checkpoint written; None where that is the source itself."""
    _: KW_ONLY
    device: str
    journal: Journal | None
    tokens_at_once: int

    def __post_init__(self) -> None:
        self._open(self.source)
        super().__post_init__()

    def _open(self, found: Checkpoint) -> None:
        model = load_model(found, device="meta", adapters=self.adapters)
        self.source, self.moe = found, MoEModel(model, structure_of(type(model), model.config, self.adapters))
        self.weights = StreamedWeights(model, found, device=self.device)

    def perplexity(
        self, sequences: Sequences, batch_size: int, update: Update | None = None, watch: Watch | None = None
    ) -> Perplexity:
        run = self._run_with(update)
        return perplexity(self.moe.model, sequences, batch_size, None, self.processes, run=run, watch=watch)

    def previewed(self, preview: Callable[..., Any], decision: Decision) -> AbstractContextManager[object]:
        """Every layer as long as it is there."""
        alone = decision.by_layer()
        return self.weights.within({path: partial(preview, self.moe, one) for path, one in alone.items()})

    def ask(self, tasks: LoadedTasks, tokenizer: Any, update: Update | None = None, **how: Any) -> TaskResults:
        """All requests of a kind pass the layers together. Raises EvaluationError where a task has the model write."""
        run = self._run_with(update)
        return run_tasks(self.moe.model, tokenizer, tasks, processes=self.processes, run=run, device=self.device, **how)

    def size(self, routed: Sequence[RoutedSize] = ()) -> Size:
        found = size(self.model, routed)
        if self.source.quantisation is None:
            return found
        return replace(found, bytes=self.source.num_bytes)

    def _run_with(self, update: Update | None) -> Run:
        def run(batches: Sequence[TokenBatch], consume: Consume) -> None:
            parts = _in_parts(batches, self.tokens_at_once)
            for number, part in enumerate(parts):
                spoken = partial(_tell_of_part, update, number, len(parts))
                layerwise.forward(self.moe.model, part, consume, spoken, weights=self.weights, parking=self.parking)

        return run

    def logits(self, batch: TokenBatch) -> Tensor:
        found: list[Tensor] = []
        self._run_with(None)([batch], lambda one, output: found.append(forward.answers_at(one, output)))
        return found[0]

    def edit(self, method: Method[Any], decision: Decision, probe: TokenBatch, name: str) -> dict[str, float]:
        """Write the smaller checkpoint and go on with it; compared as in memory. A run that goes on finds it there."""
        assert self.work is not None
        stage = self.work / name
        written = Checkpoint(str(stage), stage, self.source.trust_remote_code)
        noted = self.journal.noted(f"edited {name}") if self.journal is not None else None
        if self.processes.exchange(noted is not None and self._is_behind(stage))[0]:
            noted = self.processes.exchange(noted)[0]
            self._follow(method, decision, noted)  # its weights are not read any more
            return dict(noted["checks"])
        known = self.processes.exchange(self._noted_of(written))[0]
        if known is None:
            known = self._edit(method, decision, probe, stage)
            if self.journal is not None and self.processes.is_first:
                self.journal.note(f"edited {name}", known)
        else:
            self._follow(method, decision, known)
            self._open(written)
        before, self.stage = self.stage, stage
        self.processes.wait()
        if before is not None and self.processes.is_first:
            shutil.rmtree(before)
        return dict(known["checks"])

    def _follow(self, method: Method[Any], decision: Decision, known: Mapping[str, Any]) -> None:
        """Do to the skeleton what an edit noted before has done."""
        with self._followed(self.moe):
            endings = {path: Ending.from_json(one) for path, one in known["endings"].items()}
            finish(self.moe, method, decision, endings)

    def _is_behind(self, stage: Path) -> bool:
        """Whether a run that goes on has come further: the checkpoint was let go of when the next one was whole."""
        later = [one for one in stage.parent.glob("*") if _place(one) > _place(stage)]
        return not stage.exists() and any(self._noted_of(Checkpoint(str(one), one)) is not None for one in later)

    def _noted_of(self, left: Checkpoint) -> dict[str, Any] | None:
        """What a run before has noted of a checkpoint that it has left; None where it is to be written again."""
        if self.journal is None or not (left.folder / "config.json").exists():
            return None
        try:
            _ = left.shards
        except CheckpointError as error:
            self.progress.say(f"{left.folder}: this checkpoint is damaged, and is written again: {error}")
            return None
        return self.journal.noted(f"edited {left.folder.name}")

    def _edit(self, method: Method[Any], decision: Decision, probe: TokenBatch, stage: Path) -> dict[str, Any]:
        """Write the smaller checkpoint, and open it: how it was checked, and what each layer's edit has asked for."""
        expected = None
        has_preview = method.preview(self.moe, decision) is not None
        if has_preview:
            with self.previewed(method.preview, decision):
                expected = self.logits(probe)
            if not torch.isfinite(expected).all():
                raise CheckpointError(f"{self.source.reference}: its logits are not finite on calibration text.")
        before = meta_model(self.source, self.adapters)
        after = copy.deepcopy(before)
        values = stage.with_name(f"{stage.name}.values")
        shutil.rmtree(values, ignore_errors=True)
        weights, is_quantised = self.weights, self.source.quantisation is not None
        edited = StoredWeights(lambda: weights, values if self.processes.is_first else None, is_quantised=is_quantised)
        endings, checks = edit_layers(method, decision, self.moe.layers, edited)
        with self._followed(after):
            finish(after, method, decision, endings)
        if not has_preview and self.processes.is_first:  # the others' weights are as they were
            alone = {path: partial(as_finished, self.moe, {path: one}) for path, one in endings.items()}
            with weights.within(alone):
                expected = self.logits(probe)
        written = Checkpoint(str(stage), stage, self.source.trust_remote_code)
        if self.processes.is_first:
            shutil.rmtree(stage, ignore_errors=True)
            stage.mkdir(parents=True)
            edit = plan_edit(self.source, before, after, self.left_out, edited.edited)
            with self.progress.task(f"{method.name}: writing the smaller checkpoint, bytes") as update:
                # what lies between two passes is ours; the source's files are the user's, and are copied
                written = edit.write(stage, hard_link=self.stage is not None, progress=update)
            shutil.rmtree(values, ignore_errors=True)
        self.processes.wait()
        self.left_out = None
        self._open(written)
        if expected is not None or checks:
            answers = self.logits(probe)
            refuse_not_finite_answers(answers, method.name)
            checks |= {} if expected is None else compare_answers(expected, answers)
        return {"checks": checks, "endings": {path: one.to_json() for path, one in endings.items()}}

    def stored(self, folder: OutputFolder, probe: TokenBatch, stage: Path) -> Checkpoint:
        return self.source

    def save(self, folder: OutputFolder, probe: TokenBatch) -> None:
        """The last checkpoint written becomes the output."""
        assert self.stage is not None, "a recipe has a pass"
        folder.take(self.stage)
        shutil.rmtree(self.stage.parent)
        self.source = Checkpoint(str(folder.target), folder.path, self.source.trust_remote_code)


def _place(stage: Path) -> int:
    """The number of the pass that writes a checkpoint."""
    return int(stage.name.partition(".")[0])


def _in_parts(batches: Sequence[TokenBatch], most: int) -> list[list[TokenBatch]]:
    """The batches, in order, in lists of at most so many tokens, padding included, or of one batch."""
    parts: list[list[TokenBatch]] = []
    tokens = 0
    for batch in batches:
        tokens += batch.input_ids.numel()
        if not parts or tokens > most:
            parts.append([])
            tokens = batch.input_ids.numel()
        parts[-1].append(batch)
    return parts


def _tell_of_part(update: Update | None, number: int, num_parts: int, done: int, total: int) -> None:
    if update is not None:
        update(number * total + done, num_parts * total)
