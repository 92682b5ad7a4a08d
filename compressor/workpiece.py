"""The model that passes work on, one after another: with all of its weights in memory, or with its weights on disk.

    AsLoaded    a model that is only measured: whatever transformers loads
    InMemory    a live model: edited in place, compared with what was previewed, saved, loaded again, compared
    OnDisk      a skeleton whose weights are read layer by layer (`stream`): every edit writes a smaller checkpoint
                (`disk`), which the next pass reads; the last one is the output

The last two answer the same questions, to the bit.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor import checkpoint as checkpoints
from compressor import disk, walk
from compressor import evaluate as measure
from compressor.calibration import Sequences, TokenBatch
from compressor.checkpoint import Checkpoint, LeftOut, OutputFolder
from compressor.errors import CheckpointError, VerificationError
from compressor.evaluate import Perplexity, RoutedSize, Size
from compressor.journal import Journal, ObservationJournal
from compressor.method import Decision, Method, OptionError
from compressor.moe import Adapter, Counter, Kept, MoELayer, MoEModel, Removal, structure_of
from compressor.parking import Parking
from compressor.processes import Processes
from compressor.progress import Progress, Update
from compressor.statistics import Statistic
from compressor.stream import StreamedWeights
from compressor.tasks import LoadedTasks

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_TIES_ALLOWED = 0.25

TaskResults = dict[str, measure.TaskResult]


class AsLoaded:
    """A model as transformers loads it, quantised or not, to be measured alone. `layers` are its MoE layers, as far as
    something is known of them.
    """

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
        return measure.perplexity(self.model, sequences, batch_size, update, self.processes)

    def ask(self, tasks: LoadedTasks, tokenizer: Any, update: Update | None = None, **how: Any) -> TaskResults:
        """Answers to tasks; see `evaluate.run_tasks`, which takes `limit`, `batch_size` and `seed` too."""
        return measure.run_tasks(self.model, tokenizer, tasks, progress=update, processes=self.processes, **how)

    def size(self, routed: Sequence[RoutedSize] = ()) -> Size:
        """Parameters, and the bytes that they take; see `evaluate.size`. Of a quantised checkpoint the parameters are
        those that its numbers stand for, and the bytes those that are stored.
        """
        assert self.source is not None
        unquantised = checkpoints.unquantised_skeleton(self.source)
        found = dataclasses.replace(measure.size(unquantised, routed), bytes=_stored_bytes(self.source))
        if self.source.quantisation is None:
            found = measure.size(self.model, routed)
        is_known = routed or not any("expert" in name for name, _ in unquantised.named_parameters())
        return found if is_known else dataclasses.replace(found, active_parameters=None)


class InMemory(AsLoaded):
    """A model whose weights are all there, and whose experts are known. `source` is the checkpoint that it came from,
    if any; with `parking` hidden states wait there.
    """

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
        self,
        batches: Sequence[TokenBatch],
        statistics: Mapping[str, Statistic],
        *,
        title: str,
        edited: walk.Edited | None = None,
        journal: ObservationJournal | None = None,
    ) -> walk.Figures:
        """The figures of these statistics; see `walk.observe`."""
        return walk.observe(
            self.moe,
            batches,
            statistics,
            self.progress,
            title=title,
            edited=edited,
            weights=self.weights,
            journal=journal,
            processes=self.processes,
            parking=self.parking,
        )

    def weigh(
        self, statistics: Mapping[str, Statistic], *, title: str, journal: ObservationJournal | None = None
    ) -> walk.Figures:
        """The figures of statistics that are shown no text; see `walk.weigh`."""
        return walk.weigh(
            self.moe,
            statistics,
            self.progress,
            title=title,
            weights=self.weights,
            journal=journal,
            processes=self.processes,
        )

    def masked(self, kept: Kept, *, top_k: int | None = None) -> AbstractContextManager[object]:
        """Within the context only these experts can be chosen; see `MoEModel.masked`."""
        return self.moe.masked(kept, top_k=top_k)

    def size(self, routed: Sequence[RoutedSize] = ()) -> Size:
        """Parameters, and the bytes that they take; see `evaluate.size`."""
        return measure.size(self.model, routed)

    def edit(self, method: Method[Any], decision: Decision, probe: TokenBatch, name: str) -> dict[str, float]:
        """Carry a decision out, and compare the answers on `probe` with those of the method's preview; the differences.

        `name` tells the edits of a run apart. Raises VerificationError where the answers are others, OptionError where
        the model cannot be edited like this.
        """
        untouched, self._answered = self.answers(probe), None
        with self._followed(self.moe):
            differences, answers = edit_verified(self.moe, method, decision, probe, untouched)
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
        return walk.logits(self.moe.model, batch)

    def answers(self, batch: TokenBatch) -> Tensor:
        """The same, outside any context that masks experts; not computed again where the last edit was compared on this
        batch.
        """
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


class OnDisk(InMemory):
    """A model whose weights stay on disk, and are read one decoder layer at a time.

    `work` is a folder for the checkpoints between passes; without one it can be measured only. `journal` knows which of
    them are whole, in a run that goes on. While text is measured, `tokens_at_once` of it pass a layer together.
    """

    source: Checkpoint

    def __init__(
        self,
        source: Checkpoint,
        work: Path | None,
        *,
        device: str,
        journal: Journal | None,
        tokens_at_once: int,
        left_out: LeftOut | None = None,
        adapters: Sequence[Adapter] = (),
        progress: Progress,
        processes: Processes,
        parking: Parking | None = None,
    ) -> None:
        self.work, self.device, self.journal, self.tokens_at_once = work, device, journal, tokens_at_once
        self.stage: Path | None = None
        """The folder of the last checkpoint written; None where that is the source itself."""
        shared: dict[str, Any] = {
            "left_out": left_out,
            "progress": progress,
            "processes": processes,
            "parking": parking,
        }
        super().__init__(_skeleton(source, adapters), source, adapters=adapters, **shared)
        self._read(self.moe, source)

    def _open(self, found: Checkpoint) -> None:
        self._read(_skeleton(found, self.adapters), found)

    def _read(self, moe: MoEModel, found: Checkpoint) -> None:
        self.source, self.moe = found, moe
        self.weights = StreamedWeights(self.moe.model, found, device=self.device)

    def perplexity(self, sequences: Sequences, batch_size: int, update: Update | None = None) -> Perplexity:
        """How well the model predicts a text; as much of it as may wait passes a layer before the next one is read."""
        return measure.perplexity(
            self.moe.model, sequences, batch_size, None, self.processes, run=self._run_with(update)
        )

    def masked(self, kept: Kept, *, top_k: int | None = None) -> AbstractContextManager[object]:
        """Within the context only these experts can be chosen, in every layer as long as it is there."""
        assert self.weights is not None
        return self.weights.within(
            {path: partial(self.moe.masked, {path: ids}, top_k=top_k) for path, ids in kept.items()}
        )

    def ask(self, tasks: LoadedTasks, tokenizer: Any, update: Update | None = None, **how: Any) -> TaskResults:
        """Answers to tasks; all requests of a kind pass the layers together. Raises EvaluationError where a task has
        the model write.
        """
        run = self._run_with(update)
        return measure.run_tasks(
            self.moe.model, tokenizer, tasks, processes=self.processes, run=run, device=self.device, **how
        )

    def size(self, routed: Sequence[RoutedSize] = ()) -> Size:
        """Parameters, and the bytes that they take as they are stored: quantised ones less than the skeleton says."""
        found = super().size(routed)
        if self.source.quantisation is None:
            return found
        return dataclasses.replace(found, bytes=_stored_bytes(self.source))

    def _run_with(self, update: Update | None) -> measure.Run:
        def run(batches: Sequence[TokenBatch], consume: walk.Consume) -> None:
            assert self.weights is not None
            parts = _in_parts(batches, self.tokens_at_once)
            for number, part in enumerate(parts):
                spoken = partial(_tell_of_part, update, number, len(parts))
                walk.forward(self.moe.model, part, consume, spoken, weights=self.weights, parking=self.parking)

        return run

    def logits(self, batch: TokenBatch) -> Tensor:
        """The model's logits [N, V] at a batch's N real tokens."""
        found: list[Tensor] = []
        self._run_with(None)([batch], lambda one, output: found.append(walk.answers_at(one, output)))
        return found[0]

    def edit(self, method: Method[Any], decision: Decision, probe: TokenBatch, name: str) -> dict[str, float]:
        """Write the smaller checkpoint and go on with it; compared as in memory. A run that goes on finds it there."""
        assert self.work is not None
        stage = self.work / name
        noted = self.journal.noted(f"edited {name}") if self.journal is not None else None
        if self.processes.exchange(noted is not None and self._is_behind(stage))[0]:
            with self._followed(self.moe):
                carry_out(method, self.moe, decision)  # its weights are not read any more
            return dict(self.processes.exchange(noted)[0])
        known = self.processes.exchange(self._noted_of(stage))[0]
        if known is None:
            known = self._edit(method, decision, probe, stage)
            if self.journal is not None and self.processes.is_first:
                self.journal.note(f"edited {name}", known)
        else:
            with self._followed(self.moe):
                carry_out(method, self.moe, decision)
            self._open(Checkpoint(str(stage), stage, self.source.trust_remote_code))
        before, self.stage = self.stage, stage
        self.processes.wait()
        if before is not None and self.processes.is_first:
            shutil.rmtree(before)
        return dict(known)

    def _is_behind(self, stage: Path) -> bool:
        """Whether a run that goes on has come further: the checkpoint was let go of when the next one was whole."""
        assert self.work is not None
        later = [one for one in self.work.glob("*") if _place(one) > _place(stage)]
        return not stage.exists() and any(self._noted_of(one) is not None for one in later)

    def _noted_of(self, stage: Path) -> dict[str, float] | None:
        """What a run before has noted of a checkpoint that it has left; None where it is to be written again."""
        if self.journal is None or not (stage / "config.json").exists():
            return None
        try:
            checkpoints.verify_files(stage)
        except CheckpointError as error:
            self.progress.say(f"{stage}: this checkpoint is damaged, and is written again: {error}")
            return None
        return self.journal.noted(f"edited {stage.name}")

    def _edit(self, method: Method[Any], decision: Decision, probe: TokenBatch, stage: Path) -> dict[str, float]:
        assert self.weights is not None
        expected = None
        if method.preview(self.moe, decision) is not None:

            def previewed(path: str) -> AbstractContextManager[object]:
                context = method.preview(self.moe, {**decision, "layers": {path: decision["layers"][path]}})
                assert context is not None
                return context

            with self.weights.within({path: partial(previewed, path) for path in decision["layers"]}):
                expected = self.logits(probe)
            if not torch.isfinite(expected).all():
                raise CheckpointError(f"{self.source.reference}: its logits are not finite on calibration text.")
        before = disk.meta_model(self.source, self.adapters)
        after = copy.deepcopy(before)
        with self._followed(after):
            carry_out(method, after, decision)
        if self.processes.is_first:
            shutil.rmtree(stage, ignore_errors=True)
            stage.mkdir(parents=True)
            edit = disk.plan_edit(self.source, before, after, self.left_out)
            with self.progress.task(f"{method.name}: writing the smaller checkpoint, bytes") as update:
                # what lies between two passes is ours; the source's files are the user's, and are copied
                edit.write(stage, hard_link=self.stage is not None, progress=update)
        self.processes.wait()
        self.left_out = None
        self._open(Checkpoint(str(stage), stage, self.source.trust_remote_code))
        return {} if expected is None else compare_answers(expected, self.logits(probe))

    def save(self, folder: OutputFolder, probe: TokenBatch) -> None:
        """The last checkpoint written becomes the output. Its config goes first: without it the rest counts as gone."""
        assert self.stage is not None, "a recipe has a pass"
        assert self.work is not None
        paths = sorted(self.stage.iterdir(), key=lambda path: path.name != "config.json")
        for path in paths:
            path.rename(folder.path / path.name)
        shutil.rmtree(self.work)
        self.source = Checkpoint(str(folder.target), folder.path, self.source.trust_remote_code)


def _stored_bytes(found: Checkpoint) -> int:
    """Bytes of all tensors in a checkpoint's files."""
    return sum(sum(shard.sizes.values()) for shard in checkpoints.verify_files(found.folder))


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


def _skeleton(found: Checkpoint, adapters: Sequence[Adapter]) -> MoEModel:
    model = checkpoints.load_model(found, device="meta", adapters=adapters)
    return MoEModel(model, structure_of(type(model), model.config, adapters))


def ids_left(ids: Kept, removals: Sequence[Removal]) -> Kept:
    """Layer path → those of the ids, given in the experts' order, that are left after these removals."""
    for removal in removals:
        ids = {path: [of_layer[expert] for expert in removal.kept[path]] for path, of_layer in ids.items()}
    return ids


def carry_out(method: Method[Any], moe: MoEModel, decision: Decision) -> None:
    """Edit the model. Raises OptionError where it cannot keep or skip what was decided: only the figures could tell."""
    try:
        method.edit(moe, decision)
    except ValueError as error:
        raise OptionError(None, f"what was decided cannot be carried out: {error}") from error


def edit_verified(
    moe: MoEModel, method: Method[Any], decision: Decision, probe: TokenBatch, untouched: Tensor
) -> tuple[dict[str, float], Tensor]:
    """Edit the live model and check, on one batch, that it then computes what was decided. `untouched` are its logits
    [N, V] there.

    First no expert is "removed": no logit may change by a bit. Then the edited model is compared with the untouched one
    under the method's preview (removed experts masked, skipped ones with a weight of 0). Raises VerificationError;
    returns (the differences, the edited model's logits).
    """
    if not torch.isfinite(untouched).all():
        raise CheckpointError(
            "the model's logits are not finite on calibration text (NaN or infinity), though its weights are: the "
            f"last ones, such as the language-model head, are damaged, or too large for {untouched.dtype}."
        )
    moe.keep({layer.path: range(layer.num_experts) for layer in moe.layers})
    if not torch.equal(walk.logits(moe.model, probe), untouched):
        raise VerificationError(
            "keeping all experts changed the model's logits: this architecture's edit is not sound."
        )
    preview = method.preview(moe, decision)
    expected = None
    if preview is not None:
        with preview:
            expected = walk.logits(moe.model, probe)
    carry_out(method, moe, decision)
    answers = walk.logits(moe.model, probe)
    compared = {} if expected is None else compare_answers(expected, answers)
    return {"keep_all_difference": 0.0, **compared}, answers


def compare_answers(expected_NV: Tensor, found_NV: Tensor) -> dict[str, float]:
    """Relative error of each token's logits.

    Where two experts tie for a token within rounding, which is rare in float32 and common in half precision, the tie
    may fall anew: the token takes the other, equally good one, and what changes spreads to later tokens through
    attention. So a quarter of the tokens may differ; experts sliced wrongly would change nearly all of them.
    """
    expected, found = expected_NV.double(), found_NV.double()
    error_N = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
    tolerance = _TOLERANCE[expected_NV.dtype]
    share = float((~(error_N <= tolerance)).double().mean())
    if share > _TIES_ALLOWED:
        raise VerificationError(
            f"the edited model does not answer as decided (experts removed as if masked, experts skipped as with a "
            f"weight of 0): {share:.1%} of tokens differ by more than {tolerance:g} (largest relative difference "
            f"{float(error_N.max()):.3g})."
        )
    return {"edited_against_preview": float(error_N.max()), "tolerance": tolerance, "share_beyond": share}


def save_verified(
    moe: MoEModel,
    found: Checkpoint | None,
    folder: OutputFolder,
    probe: TokenBatch,
    left_out: LeftOut | None = None,
    adapters: Sequence[Adapter] = (),
    answers: Tensor | None = None,
) -> None:
    """Write the checkpoint and load it again: every tensor and every logit must be the live model's, bit by bit.
    `answers` are the latter [N, V], where they are known.

    Raises VerificationError if anything differs, CheckpointError if a tensor is missing or unexpected.
    """
    folder.require_space(measure.size(moe.model).bytes)
    leaves = (moe.structure.num_experts_leaf, moe.structure.top_k_leaf)
    counts = {leaf: leaf.get(moe.config) for leaf in leaves if leaf is not None}
    checkpoints.save_checkpoint(moe.model, found.folder if found else None, folder.path, counts, left_out)
    checkpoints.verify_files(folder.path)
    trust = found.trust_remote_code if found else False
    where = getattr(moe.model, "hf_device_map", None) or str(next(moe.model.parameters()).device)
    again = checkpoints.load_model(
        Checkpoint(str(folder.target), folder.path, trust), device=where, like=moe.model, adapters=adapters
    )
    live, loaded = moe.model.state_dict(), again.state_dict()
    different = [name for name in live if name not in loaded or not torch.equal(live[name], loaded[name])]
    if different or len(live) != len(loaded):
        raise VerificationError(
            f"{folder.target}: {len(different)} tensor(s) of the checkpoint, loaded again, are not what was saved "
            f"({', '.join(different[:3])}). Nothing was kept."
        )
    expected = walk.logits(moe.model, probe) if answers is None else answers
    answered = walk.logits(again, probe)
    if not torch.equal(expected, answered):
        difference = float((expected.float() - answered.float()).abs().max())
        raise VerificationError(
            f"{folder.target}: the checkpoint, loaded again, does not answer as the live model did (largest "
            f"difference of a logit: {difference:.3g}). Nothing was kept."
        )


def random_batch(model: Any) -> TokenBatch:
    """Random ids, where no text is at hand: enough to compare two models bit by bit."""
    ids = torch.randint(
        model.get_input_embeddings().weight.shape[0], (2, 64), generator=torch.Generator().manual_seed(0)
    )
    return TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool))
