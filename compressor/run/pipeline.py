"""Run a recipe: observe, decide, edit, evaluate, save; and keep a record of all of it.

    recipe ──► check (config only) ──► load ──► evaluate before
           ──► for each pass: observe ──► statistics.safetensors
                              decide  ──► decision.json
                              edit, verified on a calibration batch
           ──► evaluate after ──► save ──► reload, compare bit by bit
           ──► record.json, report.html, README.md ──► the output's name

What the passes work on is in memory or on disk (`edit.in_memory`, `edit.on_disk`); what is done is kept
(`checkpoint.resume_state`), so that a run can go on.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint import headers
from compressor.checkpoint.atomic_files import write_json
from compressor.checkpoint.files import files_beside
from compressor.checkpoint.find import Checkpoint, find_checkpoint, load_config, with_weights
from compressor.checkpoint.headers import refuse_not_finite, verify_files
from compressor.checkpoint.layerwise_weights import spread
from compressor.checkpoint.load import load_model, load_tokenizer, unquantised_skeleton
from compressor.checkpoint.output import OutputFolder, disk_errors_named, journal_folder, stages_folder, waiting_folder
from compressor.checkpoint.resume_state import Journal
from compressor.data.lm_eval_tasks import LoadedTasks
from compressor.data.packing import load_sequences, load_with_held_out, missing_sequences
from compressor.data.sequences import Sequences, TokenBatch, check_vocabulary, make_batches, tokenizer_fingerprint
from compressor.edit.in_memory import AsLoaded, InMemory
from compressor.edit.on_disk import OnDisk
from compressor.edit.verify import carry_out, random_batch
from compressor.errors import CheckpointError, CompressorError, RecipeError, UnsupportedModelError
from compressor.evaluate.lm_eval import TaskResult
from compressor.evaluate.paired import paired
from compressor.evaluate.perplexity import Perplexity
from compressor.evaluate.size import RoutedSize, Size, bytes_on_disk
from compressor.evaluate.speed import peak_memory, speed
from compressor.machine.distributed import Processes
from compressor.machine.environment import gpus, hardware
from compressor.machine.progress import Progress
from compressor.method import Decision, OptionError
from compressor.model.adapter import Adapter, structure_of
from compressor.model.config_entry import read_entry
from compressor.model.moe_model import MoEModel
from compressor.model.skipping.usage import Counter
from compressor.model.structure import MoELayer
from compressor.observe import forward
from compressor.observe.activation_offload import Parking
from compressor.observe.statistic import Gathered
from compressor.observe.statistics_file import save_statistics
from compressor.plugins import Plugins, load_plugins
from compressor.recipe.schema import CHANGES_NO_FIGURE, Evaluation, LoadedRecipe, Recipe, ResolvedPass, load_recipe
from compressor.report.figures import cut_prompts
from compressor.run import check, controls, readiness
from compressor.run.record import (
    DECISION,
    FORMAT,
    RECORD,
    STATISTICS,
    CompressionResult,
    counts_and_rules_json,
    layers_json,
    left_out_json,
    model_json,
    original_ids_json,
    write_record,
)
from compressor.wording import counted, digest

_DECIDED = ("method", "version", "options", "domains", "held_out", "original_ids", "decision")
"""What decision.json says of a pass; the record says more, such as how long it took."""
_CHECK_SEQUENCES, _CHECK_TOKENS = 4, 256


def compress(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    model: Any = None,
    tokenizer: Any = None,
    *,
    overrides: Sequence[str] = (),
    model_reference: str | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    without: Iterable[str] = (),
    progress: Progress | None = None,
    processes: Processes | None = None,
) -> CompressionResult:
    """Run a recipe.

    `recipe` is a YAML file's path, a mapping with the same keys, or a Recipe. `model` (a live transformers model) and
    `tokenizer` replace what the recipe's `model:` would load, which may be left out then: the record calls the model by
    the name in its config, or else by its class. The model given is copied and never changed. Without an
    `output` nothing is written and the result lives in memory. `overrides` are texts such as
    `passes.0.expert_pruning.keep=4`; `model_reference` and `output` replace the recipe's own. With `resume` an
    interrupted run goes on in the layer that it was in, and ends with the same bytes; where there is none it starts at
    the beginning.

    Several `processes` (`Processes.joined()`), each of which calls this with the same arguments, share the text; the
    first one writes and speaks, and all return when the output is there.

    Raises CompressorError, one of its kinds, for everything that the user can mend; nothing is left under the
    output's name then. What was observed until then is kept in a hidden folder beside it.
    """
    _refuse_names(model, tokenizer)
    plugins = load_plugins(without)
    loaded = load_recipe(
        recipe,
        overrides=overrides,
        model=model_reference,
        output=output,
        live=None if model is None else model.config._name_or_path or f"live {type(model).__name__}",
        methods=plugins.methods,
        criteria=plugins.criteria,
    )
    run = _Run.of(loaded, plugins, progress, processes)
    return run.run(model, tokenizer, overwrite=overwrite, resume=resume)


def _refuse_names(model: Any, tokenizer: Any) -> None:
    """Raise RecipeError for what is no live model, or no tokenizer."""
    if isinstance(model, str | Path):
        raise RecipeError(
            f"model: found the name {str(model)!r}, expected a live transformers model. Say "
            f"model_reference={str(model)!r} for a hub id or a folder."
        )
    if model is not None and not (isinstance(model, torch.nn.Module) and hasattr(model, "config")):
        raise RecipeError(f"model: found an object of type {type(model).__name__}, expected a live transformers model.")
    if tokenizer is not None and not callable(tokenizer):
        raise RecipeError(
            f"tokenizer: found an object of type {type(tokenizer).__name__}, expected a live transformers tokenizer."
        )


def load(
    folder: str | Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    without: Iterable[str] = (),
) -> tuple[Any, Any]:
    """Load (model, tokenizer) from a folder that `compress` has written.

    The same as transformers' own `from_pretrained`, with missing or unexpected tensors refused, and skipping experts as
    its config says. By the device `auto` the model is spread over all GPUs of this machine. The tokenizer is None where
    there is none. Plugins that are named in `without` are not loaded.
    """
    found = find_checkpoint(str(folder), trust_remote_code=trust_remote_code)
    verify_files(found.folder)
    adapters = load_plugins(without).adapters
    place = _place_of(found, gpus() or ("cpu",), adapters) if device == "auto" else device
    model = load_model(found, dtype=dtype, device=place, adapters=adapters)
    return model, load_tokenizer(found)


def restore(model: Any, *, without: Iterable[str] = ()) -> Any:
    """Put back what a checkpoint cannot hold, in a model that was loaded by other means than `compressor.load`, such as
    `from_pretrained` with a `device_map`: the model skips experts as its config says. Returns the model.

    Raises CheckpointError where what the config says does not fit the model.
    """
    MoEModel(model, structure_of(type(model), model.config, load_plugins(without).adapters)).restore_skipping()
    return model


# Parts of a run on their own -------------------------------------------------------------------------------


def evaluate(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    model_reference: str,
    *,
    overrides: Sequence[str] = (),
    without: Iterable[str] = (),
    progress: Progress | None = None,
    processes: Processes | None = None,
) -> dict[str, Any]:
    """Measure one model as the recipe's `evaluate:` says. Returns a record with `evaluation.after` only."""
    plugins = load_plugins(without)
    loaded = load_recipe(
        recipe, overrides=overrides, model=model_reference, methods=plugins.methods, criteria=plugins.criteria
    )
    if loaded.recipe.evaluate is None:
        raise loaded.error((), "the recipe has no `evaluate:`, so there is nothing to measure")
    return _Run.of(loaded, plugins, progress, processes).evaluate_only()


# The run ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Subject:
    """The model of a run, before its weights are read: a checkpoint, or a live model and the folder it came from."""

    checkpoint: Checkpoint | None
    live: Any
    config: Any
    preview: check.Preview
    fingerprint: str | None

    def about(self) -> dict[str, Any]:
        """What the record says of the model, beside the name that the user gave it."""
        about = model_json(self.config, self.preview.auto_class, self.preview.layers)
        is_live = {"live": True} if self.live is not None else {}
        return {"fingerprint": self.fingerprint, **is_live, **about}


@dataclass
class _Run:
    """One run of a recipe. The methods follow the drawing at the top of the module."""

    loaded: LoadedRecipe
    plugins: Plugins
    progress: Progress
    processes: Processes
    seconds: dict[str, float] = field(default_factory=dict)
    journal: Journal | None = None
    fingerprint: str | None = None
    """Of what the run is about, where it has an output and another one could be about the same."""
    devices: tuple[str, ...] = ()
    """Where this process's model goes; see `_own_devices`."""

    @classmethod
    def of(cls, loaded: LoadedRecipe, plugins: Plugins, progress: Progress | None, processes: Processes | None) -> _Run:
        """A run of this process; only the first one speaks."""
        processes = processes or Processes()
        if progress is None or not processes.is_first:
            progress = Progress()
        return cls(loaded, plugins, progress, processes)

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    def _own_devices(self, preview: check.Preview) -> tuple[str, ...]:
        """Where this process's model goes: of several processes on a machine each takes a GPU of its own."""
        device, place = self.recipe.device, self.processes.local_rank
        if self.processes.size > 1 and device == "auto":
            raise self.loaded.error(
                ("device",),
                f"`auto` is for one process, and this is one of {self.processes.size}: with `device: cuda` each takes "
                f"a GPU of its own",
            )
        if device == "auto":
            self.progress.say(check.auto_note(preview.devices, preview.place))
        if self.processes.size == 1 or device != "cuda":
            return preview.devices
        if place >= torch.cuda.device_count():
            raise self.loaded.error(
                ("device",),
                f"process {self.processes.rank} is number {place} on its machine, which has "
                f"{counted(torch.cuda.device_count(), 'GPU')}, numbered from 0. Start as many processes as GPUs",
            )
        return (f"cuda:{place}",)

    def run(self, model: Any, tokenizer: Any, *, overwrite: bool, resume: bool = False) -> CompressionResult:
        """All steps; in the first process within the output's hidden folder, if there is an output."""
        if resume and (model is not None or self.recipe.output is None):
            raise RecipeError("a run goes on (`resume`) only where a checkpoint is read and an output is written.")
        folder = None
        if self.recipe.output is not None and self.processes.is_first:
            folder = OutputFolder(self.recipe.output, overwrite=overwrite, resume=resume)
            if not resume:
                folder.complete()
        record = self.processes.exchange(self._record_before() if resume else None)[0]
        if record is not None:
            return CompressionResult(record, self.recipe.output, None, None)
        with self._timed("check"):
            subject = self._subject(model, tokenizer, folder)
        result = self._run_in_folder(subject, folder)
        self.processes.wait()
        return dataclasses.replace(result, folder=self.recipe.output)

    def _record_before(self) -> dict[str, Any] | None:
        """What a run before has recorded that did all of this: a whole output gets its name first, if it was stopped
        just then. None where something else is there, or work to go on with.
        """
        output = self.recipe.output
        if output is None or not self.processes.is_first:
            return None
        if OutputFolder(output).complete():
            self.progress.say(f"{output}: a run was stopped when this output was whole; it has its name now")
        if Journal(journal_folder(output)).has_work:
            return None
        try:
            record: dict[str, Any] = json.loads((output / "compressor" / RECORD).read_text(encoding="utf-8"))
            fingerprint = record.get("run_fingerprint")
        except (OSError, ValueError, AttributeError):  # whatever it is, it is in the way, and refused as that
            return None
        if fingerprint is None or fingerprint != self._fingerprint_now():
            return None
        try:
            verify_files(output)
        except CheckpointError as error:
            self.progress.say(f"what a run of this recipe has written is damaged: {error}")
            return None
        self.progress.say(f"{output}: a run of this recipe has written it already; nothing is left to do")
        return record

    def _fingerprint_now(self) -> str:
        """What a run would have for its `run_fingerprint`."""
        subject = self._subject(None, None, None)
        return _fingerprint(self._identity(subject, self._read_sources(subject)))

    def _run_in_folder(self, subject: _Subject, output: OutputFolder | None) -> CompressionResult:
        if output is None:
            return self._run(subject, None)
        resume = output.resume
        with output as folder:
            if resume and not folder.resume:
                self.progress.say(f"{folder.target}: there is nothing to go on from; the run starts at the beginning")
            try:
                with disk_errors_named(folder.target):
                    result = self._run(subject, folder)
                    folder.finish()
            except BaseException as error:
                if folder.keeps_after(error):  # said with the error, also where progress is quiet
                    error.add_note(
                        f"what was done so far is kept in {folder.hidden}: --resume goes on with it, --overwrite "
                        f"starts anew"
                    )
                raise
            return result

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - started

    def _run(self, subject: _Subject, folder: OutputFolder | None) -> CompressionResult:
        beside = files_beside(subject.checkpoint.folder) if folder and subject.checkpoint else None
        if subject.preview.left_out:
            self.progress.say(check.left_out_note(subject.preview.left_out))
        if beside and beside.left:
            self.progress.say(beside.note)
        with self._timed("read text"):
            sources = self._read_sources(subject)
        about = self._about(subject, sources)
        self._open_journal(folder, subject, sources)
        with self._timed("load"):
            piece = self._workpiece(subject)
        with self._timed("evaluate before"):
            before = self._evaluate(piece, sources, "before")
        passes = self._apply_passes(piece, sources, about, folder)
        with self._timed("evaluate after"):
            after = self._evaluate(piece, sources, "after")
        if after is not None and "perplexity" in passes[-1].get("random", ()):
            ours = {name: found.perplexity for name, found in after["perplexity"].items()}
            passes[-1]["random"] = controls.with_ours(passes[-1]["random"], ours)
        if folder:
            with self._timed("save"):
                piece.save(folder, _probe(piece, self._batches(sources.by_pass[0])))
        moe = piece.moe
        record = self._record(subject, sources, passes, about)
        if beside and beside.left:
            record["left_behind"] = list(beside.left)
        if before is not None and after is not None:
            if subject.checkpoint:
                before["bytes_on_disk"] = bytes_on_disk(subject.checkpoint.folder)
            if folder:
                after["bytes_on_disk"] = bytes_on_disk(folder.path)
            record["evaluation"] = self._compared(before, after, subject, moe, sources)
            if self.evaluation is not None and self.evaluation.each_pass:
                with self._timed("each pass alone"):
                    record["evaluation"]["alone"] = self._alone(subject, sources, passes, before)
        record |= counts_and_rules_json(moe) | self._circumstances()
        if folder:
            (folder.path / "compressor" / "recipe.yaml").write_text(self.loaded.to_yaml(), encoding="utf-8")
            write_record(folder.path, record)
        return CompressionResult(record, None, moe.model if piece.weights is None else None, sources.tokenizer)

    def _open_journal(self, folder: OutputFolder | None, subject: _Subject, sources: _Sources) -> None:
        """Begin the journal, or go on with it, if it is about the same."""
        if self.recipe.output is None or subject.fingerprint is None:
            return  # a live model could be another one next time
        identity = self._identity(subject, sources)
        self.fingerprint = _fingerprint(identity)
        self.journal = Journal(journal_folder(self.recipe.output), identity, self.progress.say)
        if folder and folder.resume:
            self.journal.go_on()
            self.progress.say(f"going on with what was done in {folder.hidden}")
        elif folder:
            self.journal.begin()
        self.processes.wait()

    def _identity(self, subject: _Subject, sources: _Sources) -> dict[str, Any]:
        """What a run is about: two of which this is the same find the same, wherever they put it."""
        recipe = self.loaded.to_mapping()
        # whatever the model's path: its fingerprint tells whether it is the same
        for key in (*CHANGES_NO_FIGURE, "model"):
            recipe.pop(key, None)
        texts = [*sources.all_calibration(), *sources.all_held_out(), *sources.perplexity]
        return {
            "recipe": recipe,
            "model": subject.about(),
            "tokenizer": tokenizer_fingerprint(sources.tokenizer),
            "text": {sequences.name: sequences.fingerprint for sequences in texts},
            "processes": self.processes.size,
            "versions": self.plugins.versions(),
        }

    def evaluate_only(self) -> dict[str, Any]:
        """Measure the recipe's model as it is."""
        subject = self._to_measure()
        assert subject.checkpoint is not None
        sources = self._read_sources(subject, calibrate=False)
        piece = self._piece_to_measure(subject)
        figures = self._evaluate(piece, sources, "measuring")
        assert figures is not None
        figures["bytes_on_disk"] = bytes_on_disk(subject.checkpoint.folder)
        about = {"reference": self.recipe.model, **subject.about()}
        text = [sequences.to_json() for sequences in sources.perplexity]
        return {"format": FORMAT, "model": about, "evaluation": {"text": text, "after": _evaluation_json(figures)}}

    # load

    def _to_measure(self) -> _Subject:
        """The same as `_subject` for a model that is measured as it is: nothing of it need be known but how it runs."""
        assert self.recipe.evaluate is not None
        evaluation = self.recipe.evaluate.model_copy(update={"random": 0, "speed": False, "each_pass": False})
        recipe = self.recipe.model_copy(update={"output": None, "evaluate": evaluation})
        loaded = dataclasses.replace(self.loaded, recipe=recipe, passes=())
        return self._in_checkpoint(check.measuring(loaded, self.plugins.adapters, self.progress))

    def _piece_to_measure(self, subject: _Subject) -> AsLoaded:
        """What is measured: a model whose experts we know, from memory or disk, or else as transformers loads it."""
        found, preview = subject.checkpoint, subject.preview
        assert found is not None
        if preview.place.weights == "disk" or (preview.structure is not None and found.quantisation is None):
            return self._workpiece(subject)
        self.progress.say(f"loading {self.recipe.model} as transformers loads it")
        if "skipping" in read_entry(subject.config):
            self.progress.say("its config says that it skips experts, which here it does not: it is measured unskipped")
        return AsLoaded(self._load_model(found, to_measure=True), preview.layers, found, self.processes)

    def _subject(self, given_model: Any, given_tokenizer: Any, folder: OutputFolder | None) -> _Subject:
        """Everything that can be known, or refused, before weights are read."""
        live_on = _devices_of(given_model) if given_model is not None else ()
        preview = check.check(
            self.loaded,
            self.plugins.adapters,
            folder=folder,
            model=given_model,
            live_on=live_on,
            tokenizer=given_tokenizer,
            progress=self.progress,
        )
        if given_model is None:
            return self._in_checkpoint(preview)
        self.devices = live_on
        return _Subject(preview.checkpoint, given_model, given_model.config, preview, None)

    def _in_checkpoint(self, preview: check.Preview) -> _Subject:
        assert preview.checkpoint is not None
        self.devices = self._own_devices(preview)
        found = with_weights(preview.checkpoint)
        fingerprint = headers.fingerprint(found.folder, verify_files(found.folder))
        return _Subject(found, None, load_config(found), preview, fingerprint)

    def _workpiece(self, subject: _Subject) -> InMemory:
        """The model that the passes work on."""
        shared: dict[str, Any] = {
            "left_out": subject.preview.left_out,
            "adapters": self.plugins.adapters,
            "progress": self.progress,
            "processes": self.processes,
        }
        if subject.preview.place.states == "file":
            assert self.recipe.output is not None
            waiting = waiting_folder(self.recipe.output)
            waiting.mkdir(parents=True, exist_ok=True)
            shared["parking"] = Parking(waiting)
        if subject.preview.place.weights == "memory":
            return InMemory(self._load(subject), subject.checkpoint, **shared)
        assert subject.checkpoint is not None
        self.progress.say(f"reading {self.recipe.model} one decoder layer at a time")
        work = stages_folder(self.recipe.output) if self.recipe.output else None
        return OnDisk(
            subject.checkpoint,
            work,
            device=self.devices[0],
            journal=self.journal,
            tokens_at_once=subject.preview.tokens_at_once,
            **shared,
        )

    def _load(self, subject: _Subject) -> MoEModel:
        if subject.live is not None:
            moe = MoEModel(copy.deepcopy(subject.live).eval(), subject.preview.structure)
            if not moe.skips:
                moe.restore_skipping()
            return moe
        assert subject.checkpoint is not None
        self.progress.say(f"loading {self.recipe.model}")
        return MoEModel(self._load_model(subject.checkpoint), subject.preview.structure)

    def _load_model(self, found: Checkpoint, *, to_measure: bool = False) -> Any:
        adapters, dtype = self.plugins.adapters, self.recipe.dtype
        place = _place_of(found, self.devices, adapters)
        model = load_model(found, dtype=dtype, device=place, adapters=adapters, to_measure=to_measure)
        if found.quantisation is None:
            refuse_not_finite([*model.named_parameters(), *model.named_buffers()], self.recipe.model)
        else:
            _refuse_what_cannot_run(model, self.recipe.model)
        return model

    def _read_sources(self, subject: _Subject, *, calibrate: bool = True) -> _Sources:
        seed, evaluation, tokenizer = self.recipe.seed, self.evaluation, subject.preview.tokenizer
        passes = self.loaded.passes if calibrate else ()
        with_held_out = {repr(s) for one in passes if one.method.held_out for s in self.loaded.sources_of(one)}
        read: dict[str, Sequences] = {}  # a source that several passes use is read once
        others: dict[str, Sequences | None] = {}
        for source in (source for one in passes for source in self.loaded.sources_of(one)):
            if repr(source) in with_held_out and repr(source) not in others:
                read[repr(source)], others[repr(source)] = load_with_held_out(source, tokenizer, seed=seed)
            elif repr(source) not in read:
                read[repr(source)] = load_sequences(source, tokenizer, seed=seed)
        by_pass, held_out = [], []
        for one in passes:
            names = [repr(source) for source in self.loaded.sources_of(one)]
            by_pass.append([read[name] for name in names])
            found = [others[name] for name in names] if one.method.held_out else []
            held_out.append([sequences for sequences in found if sequences is not None])
        if with_held_out and not any(others.values()):
            self.progress.say("no text is left to hold out: what is decided is only known for the calibration text")
        perplexity = [
            load_sequences(source, tokenizer, seed=seed, split="held-out")
            for source in (evaluation.perplexity if evaluation else ())
        ]
        texts = [*read.values(), *perplexity]
        for sentence in (*(note for one in texts for note in one.notes), *missing_sequences(texts)):
            self.progress.say(sentence)
        for sequences in [*read.values(), *filter(None, others.values()), *perplexity]:
            check_vocabulary(sequences, subject.preview.limits.num_embeddings)
        return _Sources(by_pass, held_out, perplexity, subject.preview.tasks, tokenizer)

    @property
    def evaluation(self) -> Evaluation | None:
        """What is measured."""
        return readiness.evaluation_of(self.loaded)

    def _batches(self, sequences: Sequence[Sequences], *, held_out: bool = False) -> list[TokenBatch]:
        batch_size = self.recipe.calibration.batch_size
        return [batch for one in sequences for batch in make_batches(one.ids, batch_size, one.name, held_out=held_out)]

    # record

    def _about(self, subject: _Subject, sources: _Sources) -> dict[str, Any]:
        """What figures and decisions are about: they can be used again for this model only."""
        return {
            "model": {"reference": self.recipe.model, **subject.about()},
            "tokenizer": tokenizer_fingerprint(sources.tokenizer),
            "domains": [sequences.to_json() for sequences in sources.all_calibration()],
            "layers": [layer.description() for layer in subject.preview.layers],
            "recipe_fingerprint": self.loaded.fingerprint,
        }

    def _record(
        self, subject: _Subject, sources: _Sources, passes: list[dict[str, Any]], about: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What was done, on what, with what."""
        return {
            "format": FORMAT,
            "model": about["model"],
            "tokenizer": about["tokenizer"],
            "recipe": self.loaded.to_mapping(),
            "recipe_fingerprint": self.loaded.fingerprint,
            **({"run_fingerprint": self.fingerprint} if self.fingerprint else {}),
            "seed": self.recipe.seed,
            "calibration": about["domains"],
            "layers": layers_json(subject.preview.layers),
            "passes": passes,
        } | left_out_json(subject.preview.left_out)

    def _circumstances(self) -> dict[str, Any]:
        return {
            "versions": self.plugins.versions(),
            "hardware": hardware(*self.devices),
            **({"processes": self.processes.size} if self.processes.size > 1 else {}),
            "seconds": {step: round(value, 3) for step, value in self.seconds.items()},
            "output": str(self.recipe.output) if self.recipe.output else None,
        }

    def _compared(
        self,
        before: Mapping[str, Any],
        after: Mapping[str, Any],
        subject: _Subject,
        moe: MoEModel,
        sources: _Sources,
    ) -> dict[str, Any]:
        """The record's `evaluation`: figures before and after, answers flipped, and speed side by side."""
        compared: dict[str, Any] = {
            "text": [sequences.to_json() for sequences in sources.perplexity],
            "before": _evaluation_json(before),
            "after": _evaluation_json(after),
            "paired": {
                task: {metric: flips.to_json() for metric, flips in by_metric.items()}
                for task, by_metric in paired(before["tasks"], after["tasks"]).items()
            },
        }
        if self.evaluation is not None and self.evaluation.speed:
            with self._timed("speed"):
                self.processes.wait()  # whoever is at work would disturb it
                speed = self._speed(subject, moe, sources) if self.processes.is_first else None
                compared["speed"] = self.processes.exchange(speed)[0]
        return compared

    # observe, decide, edit

    def _apply_passes(
        self, piece: InMemory, sources: _Sources, about: Mapping[str, Any], folder: OutputFolder | None
    ) -> list[dict[str, Any]]:
        """Observe, decide and edit for every pass; each step leaves its file in the output's folder."""
        all_ids = piece.original_ids
        gathered: dict[str, Gathered] = {}
        passes_about: dict[str, Any] = {}
        done: list[dict[str, Any]] = []
        for resolved, sequences, held_out in zip(self.loaded.passes, sources.by_pass, sources.held_out, strict=True):
            method, started, batches = resolved.method, time.perf_counter(), self._batches(sequences)
            name = f"{resolved.index}.{resolved.spec.method}"
            with self._timed("observe"):
                figures = self._observe(piece, resolved, [*batches, *self._batches(held_out, held_out=True)], name)
            gathered[name] = figures
            if folder:
                passes_about[name] = {
                    "domains": list(figures.domains),
                    **({"held_out": list(figures.held_out)} if figures.held_out else {}),
                    "progressive": method.progressive,
                    "layers": [layer.description() for layer in piece.moe.layers],
                }
                save_statistics(folder.path / "compressor" / STATISTICS, gathered, {**about, "passes": passes_about})
            with self._timed("decide"):
                try:
                    decision = self._decide(resolved, piece.moe.layers, figures)
                except RecipeError as error:
                    is_of_original = [layer.description() for layer in piece.moe.layers] == about["layers"]
                    if folder and is_of_original and not method.progressive:
                        raise self._with_figures_kept(folder, error, resolved) from error
                    raise
            entry: dict[str, Any] = {
                "method": resolved.spec.method,
                "version": method.version,
                "options": method.options.model_dump(mode="json"),
                "domains": [name for name in figures.domains if name not in figures.held_out],
                **({"held_out": [one.to_json() for one in held_out]} if held_out else {}),
                **original_ids_json(piece.original_ids, all_ids),
                "decision": decision,
            }
            done.append(entry)
            if folder:
                decided = [{key: one[key] for key in _DECIDED if key in one} for one in done]
                written = {"format": FORMAT, "model": about["model"], "passes": decided}
                write_json(folder.path / "compressor" / DECISION, written)
            probe = _probe(piece, batches)
            beside = self._random_beside(entry, piece, resolved, decision, probe, batches, sources, name)
            with beside, self._timed("edit"):
                entry["checks"] = self._edit(resolved, piece, decision, probe, name)
            entry["seconds"] = round(time.perf_counter() - started, 3)
        return done

    def _with_figures_kept(self, folder: OutputFolder, error: RecipeError, resolved: ResolvedPass) -> RecipeError:
        """Figures that do not answer what was asked may answer something else: they outlive the run."""
        kept = folder.target.with_name(f"{folder.target.name}.{STATISTICS}")
        shutil.copyfile(folder.path / "compressor" / STATISTICS, kept)
        return RecipeError(
            f"{error} What was observed is kept: `compressor decide {kept} --method {resolved.spec.method} --set …` "
            f"decides by it without the model, and `compressor apply` carries that out."
        )

    def _noted(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the journal has under a name, else what is made now, which it then has."""
        found = self.processes.exchange(self.journal.noted(name) if self.journal is not None else None)[0]
        if found is None:
            found = make()
            if self.journal is not None and self.processes.is_first:
                self.journal.note(name, found)
        return dict(found)

    def _observe(
        self, piece: InMemory, resolved: ResolvedPass, batches: Sequence[TokenBatch], name: str | None = None
    ) -> Gathered:
        """The pass's figures; under a `name` the journal keeps them layer by layer."""
        moe = piece.moe
        method, num_idle = resolved.method, self.processes.size - len(batches)
        if num_idle > 0 and method.needs_text:
            self.progress.say(
                f"{counted(len(batches), 'calibration batch')}: {counted(num_idle, 'process')} with nothing to observe"
            )
        statistics = {layer.path: method.statistic(layer) for layer in moe.layers}
        wanted = {path: statistic for path, statistic in statistics.items() if statistic is not None}
        journal = self.journal.observation(name, self.processes.rank) if self.journal and name else None
        if not method.needs_text:
            title = f"{resolved.spec.method}: weighing experts, without text"
            return Gathered(piece.weigh(wanted, title=title, journal=journal), ())
        domains = list(dict.fromkeys(batch.domain for batch in batches))
        held_out = list(dict.fromkeys(batch.domain for batch in batches if batch.held_out))

        def edited(path: str, figures: Mapping[str, Tensor]) -> AbstractContextManager[object]:
            decision = self._decide(resolved, [moe.layer(path)], Gathered({path: figures}, domains, held_out))
            context = method.preview(moe, decision)
            assert context is not None, f"{resolved.spec.method} is progressive and has no preview"
            return context

        figures = piece.observe(
            batches,
            wanted,
            title=f"{resolved.spec.method}: observing",
            edited=edited if method.progressive else None,
            journal=journal,
        )
        return Gathered(figures, domains, held_out)

    def _decide(self, resolved: ResolvedPass, layers: Sequence[MoELayer], figures: Gathered) -> Decision:
        with self._placed(resolved):
            decision = resolved.method.decide(layers, figures)
            return self.processes.exchange(decision)[0]  # type: ignore[no-any-return]

    def _edit(
        self, resolved: ResolvedPass, piece: InMemory, decision: Decision, probe: TokenBatch, name: str
    ) -> dict[str, float]:
        with self._placed(resolved):
            return piece.edit(resolved.method, decision, probe, name)

    @contextmanager
    def _random_beside(
        self,
        entry: dict[str, Any],
        piece: InMemory,
        resolved: ResolvedPass,
        decision: Decision,
        probe: TokenBatch,
        batches: Sequence[TokenBatch],
        sources: _Sources,
        name: str,
    ) -> Iterator[None]:
        """Around a pass's edit: random decisions, measured before it, beside what it has made of the model, in the
        pass's entry. The last pass's own perplexities are those of the evaluation.
        """
        evaluation = self.evaluation
        if evaluation is None or not evaluation.random:
            yield
            return
        with self._timed("random decisions"):
            chosen = controls.AsMasked(piece, resolved.method, decision, probe)
            found: dict[str, Any] = {}
            if chosen.problem is None:
                seeds = [self.recipe.seed + number for number in range(evaluation.random)]
                how = (chosen, seeds, batches, sources.perplexity, evaluation.batch_size)
                found = self._noted(f"random {name}", lambda: controls.measure(piece, *how))
        yield
        with self._timed("random decisions"):
            chosen.after(piece)
            entry["random"] = found if chosen.problem is None else {"problem": chosen.problem}
            if chosen.problem is None and resolved is not self.loaded.passes[-1]:
                ours = self._noted(f"perplexity after {name}", lambda: self._perplexities(piece, sources))
                entry["random"] = controls.with_ours(found, ours)

    def _perplexities(self, piece: InMemory, sources: _Sources) -> dict[str, float]:
        assert self.evaluation is not None
        batch_size = self.evaluation.batch_size
        return {text.name: piece.perplexity(text, batch_size).perplexity for text in sources.perplexity}

    @contextmanager
    def _placed(self, resolved: ResolvedPass) -> Iterator[None]:
        """Errors of a pass get its place in the recipe."""
        try:
            yield
        except OptionError as error:
            raise self.loaded.error((*resolved.path, *filter(None, [error.option])), str(error)) from error

    # evaluate

    def _evaluate(
        self, piece: AsLoaded, sources: _Sources, when: str, *, name: str | None = None
    ) -> dict[str, Any] | None:
        """Quality and size as evaluate's own objects; None if the recipe asks for no evaluation. The journal keeps them
        under a `name`, by default `when`.
        """
        if self.evaluation is None:
            return None
        measured = self._noted(f"evaluation {name or when}", lambda: self._measure(piece, sources, when))
        return _evaluation_from_json(measured)

    def _measure(self, piece: AsLoaded, sources: _Sources, when: str) -> dict[str, Any]:
        evaluation = self.evaluation
        assert evaluation is not None
        perplexities, used = {}, {}
        for sequences in sources.perplexity:
            with self.progress.task(f"{when}: perplexity {sequences.name}") as update, piece.counted() as counter:
                perplexities[sequences.name] = piece.perplexity(sequences, evaluation.batch_size, update)
            used[sequences.name] = _used(piece.layers, counter, self.processes)
        tasks = {}
        if sources.tasks is not None:
            with (
                self.progress.task(f"{when}: {counted(len(sources.tasks.names), 'task')}") as update,
                piece.counted() as counter,
            ):
                tasks = piece.ask(
                    sources.tasks,
                    sources.tokenizer,
                    update,
                    limit=evaluation.limit,
                    batch_size=evaluation.batch_size,
                    seed=self.recipe.seed,
                )
            for sentence in cut_prompts({name: result.to_json() for name, result in tasks.items()}):
                self.progress.say(f"{when}: {sentence}")
            if not used:  # lm-eval's padding is among the tokens then: nobody tells which they are
                used["tasks"] = _used(piece.layers, counter, self.processes)
        routed = [
            RoutedSize(
                layer.num_experts,
                statistics.mean([by_layer[layer.path] for by_layer in used.values()] or [layer.top_k]),
                layer.parameters_per_expert,
            )
            for layer in piece.layers
        ]
        found = {
            **({"experts_per_token": used} if any(used.values()) else {}),
            "perplexity": perplexities,
            "tasks": tasks,
            "size": piece.size(routed),
            "peak_memory": peak_memory(*self.devices),
        }
        return _evaluation_json(found)

    def _alone(
        self,
        subject: _Subject,
        sources: _Sources,
        passes: Sequence[Mapping[str, Any]],
        before: Mapping[str, Any],
    ) -> list[dict[str, Any]]:
        """Every pass on a fresh original, measured as all of them together are. The first one's decision is known."""
        found: list[dict[str, Any]] = []
        for resolved, done in zip(self.loaded.passes, passes, strict=True):
            entry = {"pass": resolved.index, "method": resolved.spec.method}
            try:
                entry |= self._measured_alone(resolved, done["decision"], subject, sources, before)
                self.processes.wait()
            except CompressorError as error:  # what works behind other passes need not work alone
                self.processes.tell(error)
                self.progress.say(f"{resolved.spec.method} alone cannot be measured: {error}")
                entry["problem"] = str(error)
            found.append(entry)
        return found

    def _measured_alone(
        self,
        resolved: ResolvedPass,
        decision: Decision,
        subject: _Subject,
        sources: _Sources,
        before: Mapping[str, Any],
    ) -> dict[str, Any]:
        moe = self._load(subject)
        piece = InMemory(moe, None, progress=self.progress, processes=self.processes)
        if resolved.index:  # what was decided is about the model that other passes had left
            check.check_pass(self.loaded, resolved, moe.layers)
            batches = self._batches(sources.by_pass[resolved.index])
            held_out = self._batches(sources.held_out[resolved.index], held_out=True)
            decision = self._decide(resolved, moe.layers, self._observe(piece, resolved, [*batches, *held_out]))
        with self._placed(resolved):
            carry_out(resolved.method, moe, decision)
        when = f"{resolved.spec.method} alone"
        figures = self._evaluate(piece, sources, when, name=f"{resolved.index} alone")
        assert figures is not None
        return {"decision": decision, **self._compared(before, figures, subject, moe, sources)}

    def _speed(self, subject: _Subject, moe: MoEModel, sources: _Sources) -> dict[str, Any]:
        """The original, loaded once more, against the smaller model, alternated; on text that quality is measured on,
        or calibration text.
        """
        self.progress.say("speed: original and smaller model in turn")
        original = self._load(subject).model
        vocabulary = _vocabulary(moe.model)
        models = {"before": original, "after": moe.model}
        text = next((one.ids for one in [*sources.perplexity, *sources.all_calibration()]), ())
        return speed(models, vocab_size=vocabulary, text=text, seed=self.recipe.seed).to_json()


@dataclass(frozen=True)
class _Sources:
    by_pass: list[list[Sequences]]
    """The calibration text of every pass, one entry a domain."""
    held_out: list[list[Sequences]]
    """Held-out text of every pass that wants it."""
    perplexity: list[Sequences]
    tasks: LoadedTasks | None
    tokenizer: Any | None

    def all_calibration(self) -> list[Sequences]:
        """Every text that some pass is calibrated on, once."""
        return list({id(one): one for of_pass in self.by_pass for one in of_pass}.values())

    def all_held_out(self) -> list[Sequences]:
        """Every text that some pass is shown and may not decide by."""
        return [one for of_pass in self.held_out for one in of_pass]


def _place_of(found: Checkpoint, devices: Sequence[str], adapters: Sequence[Adapter]) -> str | dict[str, int]:
    """The device that a model goes to; or, of several, all from the first on, which part of it goes to which."""
    if len(devices) == 1:
        return devices[0]
    if found.quantisation is not None:
        return spread(unquantised_skeleton(found), len(devices))
    return spread(load_model(found, device="meta", adapters=adapters), len(devices))


def _devices_of(model: Any) -> tuple[str, ...]:
    """Those of a live model's weights. Raises UnsupportedModelError where some of its weights are on none."""
    offloaded = next((name for name, tensor in model.named_parameters() if tensor.is_meta), None)
    if offloaded is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__}: {offloaded} is on no device: accelerate keeps it elsewhere, or it was never "
            f"loaded, so it cannot be edited. Give the checkpoint instead: with `weights: disk` it is read one decoder "
            f"layer at a time, with `device: auto` it is spread over all GPUs."
        )
    return forward.devices_of(model)


def _used(layers: Sequence[MoELayer], counter: Counter, processes: Processes) -> dict[str, float]:
    """Layer path → experts that a token used: as counted where it skips some, else as many as it chooses."""
    whole = Counter()
    for sums in processes.exchange(counter.sums):
        whole.add_sums(sums)
    return {layer.path: float(layer.top_k) for layer in layers} | whole.experts_per_token


def _probe(piece: InMemory, batches: Sequence[TokenBatch]) -> TokenBatch:
    """What a model's answers are compared on: some of the text, or random ids where there is none."""
    return _check_batch(batches[0]) if batches else random_batch(piece.moe.model)


@torch.no_grad()
def _refuse_what_cannot_run(model: Any, reference: str) -> None:
    """Raise UnsupportedModelError where a quantised model needs what is not here: some say so when they run."""
    try:
        model(torch.zeros(1, 2, dtype=torch.int64, device=model.device))
    except Exception as error:  # kernels fail in any way
        raise UnsupportedModelError(
            f"{reference}: transformers loads the quantised checkpoint, and cannot run it here: {error}"
        ) from error


def _check_batch(batch: TokenBatch) -> TokenBatch:
    """The first few tokens of a batch's first few sequences."""
    rows, columns = slice(0, _CHECK_SEQUENCES), slice(0, _CHECK_TOKENS)
    return TokenBatch(batch.input_ids[rows, columns], batch.attention_mask[rows, columns])


def _vocabulary(model: Any) -> int:
    """Rows of the input embedding: the ids that the model knows."""
    return int(model.get_input_embeddings().weight.shape[0])


def _evaluation_json(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **figures,
        "perplexity": {name: value.to_json() for name, value in figures["perplexity"].items()},
        "tasks": {name: value.to_json() for name, value in figures["tasks"].items()},
        "size": figures["size"].to_json(),
    }


def _evaluation_from_json(data: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `_evaluation_json`."""
    return {
        **data,
        "perplexity": {name: Perplexity(**value) for name, value in data["perplexity"].items()},
        "tasks": {name: TaskResult.from_json(value) for name, value in data["tasks"].items()},
        "size": Size(**data["size"]),
    }


def _fingerprint(identity: Mapping[str, Any]) -> str:
    return digest(json.dumps(identity, sort_keys=True))
