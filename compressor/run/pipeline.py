"""Run a recipe: observe, decide, edit, evaluate, save; and keep a record of all of it.

    recipe ──► check (config only) ──► load ──► evaluate before
           ──► for each pass: observe ──► statistics.safetensors
                              decide  ──► decision.json
                              edit, verified on a calibration batch
           ──► evaluate after ──► save ──► reload, compare bit by bit
           ──► record.json, report.html, README.md ──► the output's name

What the passes work on is in memory or on disk (`edit.backend`); what is done is kept
(`checkpoint.resume_state`), so that a run can go on.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from compressor.checkpoint import headers
from compressor.checkpoint.files import files_beside
from compressor.checkpoint.find import load_config, with_weights
from compressor.checkpoint.output import OutputFolder, disk_errors_named, kept_for
from compressor.checkpoint.save import as_savable
from compressor.data.images import images_json
from compressor.data.sequences import Sequences, TokenBatch, tokenizer_fingerprint
from compressor.edit.backend import AsLoaded, Backend, InMemory, Measurable
from compressor.edit.extra_layers import plan_extra_layers, uneven_problem
from compressor.edit.layer_edits import carry_out
from compressor.edit.on_disk import OnDisk
from compressor.errors import CompressorError, EvaluationError, PluginError, RecipeError
from compressor.evaluation.fidelity import Answers
from compressor.machine.distributed import Processes
from compressor.machine.environment import hardware
from compressor.machine.progress import Progress
from compressor.method import Decision, Training, is_external
from compressor.model.config_entry import read_entry
from compressor.model.moe_model import MoEModel
from compressor.observe.activation_offload import Parking
from compressor.observe.layerwise import Original
from compressor.plugins import Plugins, load_plugins
from compressor.recipe.schema import LoadedRecipe, Recipe, ResolvedPass, load_recipe
from compressor.run import check, controls, external, passes, readiness
from compressor.run.elsewhere import agreed
from compressor.run.job import Job, open_journal
from compressor.run.loading import Subject, devices_of, load_moe, load_original, load_weights, own_devices, recipe_for
from compressor.run.measure import Measured, Yardstick, ask_server, compared, compared_speed, measure
from compressor.run.preview import Preview
from compressor.run.push import check_push, push_as_asked
from compressor.run.record import (
    FORMAT,
    CompressionResult,
    about_json,
    counts_and_rules_json,
    fingerprint_of,
    identity_json,
    origin_json,
    record_before,
    run_json,
    serving_json,
    write_page,
    write_record,
)
from compressor.run.side_by_side import figures_of_all, side_by_side
from compressor.run.sweep import MOST_SEQUENCES, Total, left_out_notes, page_of, sweep_json, totals_of, write
from compressor.run.texts import Texts, batches_of, probe_of, read_texts
from compressor.run.trackers import track


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
    allow_commands: bool = False,
    push: bool = False,
    without: Iterable[str] = (),
    plugin_files: Iterable[str | Path] = (),
    progress: Progress | None = None,
    processes: Processes | None = None,
) -> CompressionResult:
    """Run a recipe: a YAML file's path, a mapping with the same keys, or a Recipe.

    `model` (a live transformers model, which is copied and never changed) and `tokenizer` replace what the recipe's
    `model:` would load; without it the record has the name in the model's config, or its class. Without an `output`
    nothing is written and the result lives in memory. `overrides` are texts such as `passes.0.expert_pruning.keep=4`;
    `model_reference` and `output` replace the recipe's own. With `resume` an interrupted run goes on in the layer that
    it was in, and ends with the same bytes. Passes run programs only with `allow_commands`, and push the output only
    with `push`. Plugins are those installed, but those `without`, and `plugin_files`, each a plugin of its name.
    Several `processes` (`Processes.joined()`), each of which calls this alike, share the text; the first one writes
    and speaks. Raises CompressorError for all that the user can mend; what was observed is kept beside the output then.
    """
    plugins = load_plugins(without, files=plugin_files)
    how: dict[str, Any] = {"overrides": overrides, "output": output, "allow_commands": allow_commands}
    loaded = recipe_for(model, tokenizer, plugins, recipe, model=model_reference, **how)
    job = Job.of(loaded, plugins, progress, processes)
    _refuse_several(job)
    if resume and (model is not None or job.recipe.output is None):
        raise RecipeError("a run goes on (`resume`) only where a checkpoint is read and an output is written.")
    folder = None
    if job.recipe.output is not None and job.processes.is_first:
        folder = OutputFolder(job.recipe.output, overwrite=overwrite, resume=resume)
        if not resume:
            folder.complete()
    record, first = job.processes.exchange(_record_before(job) if resume else None)[0], job.processes.is_first
    if record is not None:
        if first:
            push_as_asked(job.loaded, job.progress, may_push=push)
        return CompressionResult(record, job.recipe.output, None, None)
    with job.timed("check"):
        job, subject = _subject(job, model, tokenizer, folder)
        subject = dataclasses.replace(subject, preview=agreed(job.processes, subject.preview))
        notes = check_push(job.loaded, may_push=push, make=True) if first else []
    for sentence in (*subject.preview.said, *notes):
        job.progress.say(sentence)
    with nullcontext() if folder is None else _within(job, folder):
        result = _run(job, subject, folder)
        if folder is not None:
            folder.finish()
    if first:
        track(job.loaded, result.record, job.progress)
        push_as_asked(job.loaded, job.progress, may_push=push)
    job.processes.wait()
    return dataclasses.replace(result, folder=job.recipe.output)


def _refuse_several(job: Job) -> None:
    """Raise RecipeError where one of several processes would carry out what is done by one."""
    alone = next((one for one in job.loaded.passes if one.method.alone), None)
    if alone is not None and job.processes.size > 1:
        raise job.loaded.error(
            alone.path,
            f"{alone.method.name} cannot share its work out among {job.processes.size} processes; run it in one",
        )


def evaluate(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    model_reference: str,
    *,
    against: str | None = None,
    overrides: Sequence[str] = (),
    allow_commands: bool = False,
    without: Iterable[str] = (),
    plugin_files: Iterable[str | Path] = (),
    progress: Progress | None = None,
    processes: Processes | None = None,
) -> dict[str, Any]:
    """Measure one model as the recipe's `evaluate:` says. Returns a record with `evaluation.after` only; `against`
    another model, which is measured first and let go of, with `before` and what a run's evaluation says of both. A
    server is started only with `allow_commands`. Raises EvaluationError where `against` has another tokenizer or
    vocabulary.
    """
    plugins = load_plugins(without, files=plugin_files)
    how: dict[str, Any] = {"processes": processes, "allow_server": allow_commands}
    return _measuring(recipe, against, overrides, plugins, progress, **how)(model_reference)


def _measuring(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    against: str | None,
    overrides: Sequence[str],
    plugins: Plugins,
    progress: Progress | None,
    *,
    processes: Processes | None = None,
    allow_server: bool | None = None,
) -> Callable[[str], dict[str, Any]]:
    """What makes the record of one model after the other, as `evaluate` does; the original is measured once.
    `allow_server`: whether a server may be started; None where none is asked.
    """
    beside: tuple[Job, Preview] | None = None
    known: tuple[Texts, Yardstick | None, Measured | None, dict[str, Any]] | None = None

    def asked(reference: str) -> tuple[Job, Preview]:
        of_plugins: dict[str, Any] = {"methods": plugins.methods, "criteria": plugins.criteria}
        of_plugins |= {"allow_commands": True, "allow_server": allow_server is not False}
        loaded = load_recipe(recipe, overrides=overrides, model=reference, **of_plugins)
        if allow_server is None and loaded.recipe.evaluate and loaded.recipe.evaluate.server:
            raise loaded.error(("evaluate", "server"), "only `run` and `evaluate` ask a server; leave it out here")
        if loaded.recipe.evaluate is None:
            raise loaded.error((), "the recipe has no `evaluate:`, so there is nothing to measure")
        # it is measured as it is: nothing of it need be known but how it runs
        wanted = loaded.recipe.evaluate.model_copy(update={"random": 0, "speed": False, "each_pass": False})
        only = loaded.recipe.model_copy(update={"output": None, "evaluate": wanted})
        job = Job.of(dataclasses.replace(loaded, recipe=only, passes=()), plugins, progress, processes)
        return job, check.measuring(job.loaded, plugins.adapters, job.progress, is_compared=against is not None)

    def record_of(reference: str) -> dict[str, Any]:
        nonlocal beside, known
        job, preview = asked(reference)
        if against is not None:
            beside = beside or asked(against)
            _refuse_other_text(reference, preview, against, beside[1])
        subject = _in_checkpoint(job, preview)
        if known is None:
            texts = _read_texts(job, subject)
            yardstick, before = _yardstick(job, subject, texts, has_original=beside is not None), None
            about: dict[str, Any] = {}
            if beside is not None:
                original = _in_checkpoint(*beside)
                before = _alone_measured(beside[0], original, yardstick, is_original=True)
                about = {"against": {"reference": against, **original.about()}}
            known = texts, yardstick, before, about
        texts, yardstick, before, about = known
        gc.collect()  # the weights of others are not to be there beside these
        after = _alone_measured(job, subject, yardstick)
        alone = {"text": [one.to_json() for one in texts.perplexity], "after": after.to_json()}
        found = alone if before is None else compared(before, after, texts.perplexity)
        model = {"reference": reference, **subject.about()}
        return {"format": FORMAT, "model": model, **about, "evaluation": found}

    return record_of


def compare(
    folders: Sequence[str | Path],
    *,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    against: str | None = None,
    overrides: Sequence[str] = (),
    without: Iterable[str] = (),
    plugin_files: Iterable[str | Path] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Outputs side by side, by their records, as JSON: `original`, `text`, and `outputs` in the order given, each with
    `bytes` (of its files of weights), effective `bits` per weight of the original, `mean` fidelity over texts, and
    `on_front`: whether no other one is both smaller and closer to the original.

    With `recipe` and `against`, the original, a folder is measured by its `evaluate:` where it has no record, or one of
    other text or of another original. Without, CheckpointError and EvaluationError name these.
    """
    if recipe is None or against is None:
        if recipe is not against or any((overrides, [*without], [*plugin_files])):
            raise RecipeError("what is measured, the `recipe`, and its original, `against`, go together; give both.")
        return side_by_side(folders)
    plugins = load_plugins(without, files=plugin_files)
    return side_by_side(folders, against, _measuring(recipe, against, overrides, plugins, progress))


def sweep(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    keep: Sequence[Any],
    model: Any = None,
    tokenizer: Any = None,
    *,
    overrides: Sequence[str] = (),
    model_reference: str | None = None,
    output: Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    without: Iterable[str] = (),
    plugin_files: Iterable[str | Path] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """How far one can go: the recipe's one pass with a `keep`, observed once and decided for each of several, such as
    `[8, 12, 0.5]` (means, where its own is a mean). Each is measured under the method's preview, beside the original,
    on text of `evaluate`, or else on calibration text. As JSON of the same form as that of `compare`; an output has
    `counts` by layer, and with `evaluate.random` what as many experts by chance lose. Arguments as of `compress`.

    `output` is an HTML page, by default OUTPUT-sweep.html beside the recipe's output, with the JSON beside it; no model
    is written. Raises RecipeError, before any work, where a number cannot be kept, or no pass or several have a `keep`.
    """
    plugins = load_plugins(without, files=plugin_files)

    def loaded_with(page: Path | None, *more: str) -> LoadedRecipe:
        how: dict[str, Any] = {"overrides": [*overrides, *more], "model": model_reference, "allow_commands": True}
        return recipe_for(model, tokenizer, plugins, recipe, output=page and page.with_suffix(""), **how)

    def planned(loaded: LoadedRecipe) -> tuple[LoadedRecipe, dict[str, Any]]:
        job, subject = _subject(Job.of(loaded, plugins, None, None), model, tokenizer, None)
        return job.loaded, subject.preview.plan

    asked = loaded_with(None)
    page = page_of(output, asked.recipe.output, overwrite=overwrite)
    if resume and (model is not None or page is None):
        raise RecipeError("a sweep goes on (`resume`) only where a checkpoint is read and a page is written.")
    totals, together = totals_of(keep, asked, partial(loaded_with, page), planned)
    job, subject = _subject(Job.of(together, plugins, progress, None), model, tokenizer, None)
    target = job.recipe.output
    folder = None if target is None else OutputFolder(target, overwrite=overwrite, resume=resume)
    notes = left_out_notes(asked)
    for note in notes:
        job.progress.say(note)
    with nullcontext() if folder is None else _within(job, folder):
        found = _swept(job, subject, totals, folder)
        found["notes"] += notes
        if page is not None:
            found["page"] = str(page)
            write(page, found)
    return found


def _swept(job: Job, subject: Subject, totals: Sequence[Total], folder: OutputFolder | None) -> dict[str, Any]:
    """One walk for all of them, then each one's decision, and what the model answers under it."""
    [observed] = job.loaded.passes
    texts = _read_texts(job, subject)
    text = texts.perplexity or [one.first(MOST_SEQUENCES) for one in texts.calibration()]
    job = _with_journal(job, subject, texts, folder, keep=[total.name for total in totals])
    yardstick = _yardstick(job, subject, dataclasses.replace(texts, perplexity=text), has_original=True)
    assert yardstick is not None
    yardstick, piece = dataclasses.replace(yardstick, tasks=None), _workpiece(job, subject)

    def measured(when: str, name: str, sizes: str, total: Total, **how: Any) -> Measured:
        found, plan = measure(job, piece, yardstick, when, subject.devices, name=name, **how), total.plan
        assert found is not None
        size = dataclasses.replace(found.size, parameters=plan["parameters"][sizes], bytes=plan["bytes"][sizes])
        return dataclasses.replace(found, size=size, bytes_on_disk=plan["bytes"][sizes])

    before = measured("the original", "before", "before", totals[0], is_original=True)
    batches, held_out = _batches(job, texts.by_pass[0]), _batches(job, texts.held_out[0], held_out=True)
    figures = passes.observe(job, piece, observed, [*batches, *held_out], _original(job, subject), observed.name)
    records, seeds = dict[Path, Any](), range(job.recipe.seed, job.recipe.seed + yardstick.evaluation.random)
    for number, total in enumerate(totals):
        own, method = dataclasses.replace(job, loaded=total.loaded), total.resolved.method
        decision = passes.decide_measured(own, piece, total.resolved, figures, batches, f"total {number}")
        drawn, under = controls.draw(piece, method, decision, seeds), list[Measured]()
        for which, one in enumerate([decision, *(drawn if not isinstance(drawn, str) else ())]):
            said = total.name + (f" by chance, {which}" if which else "")
            with piece.previewed(method.preview, one):
                under.append(measured(said, f"total {number} {which}", "after", total))
        random = [statistics.fmean(text.kl for text in one.fidelity.values()) for one in under[1:]]
        records[Path(total.name)] = {
            "model": {"reference": job.recipe.model, **subject.about()},
            "passes": [{"method": method.name}],
            "evaluation": compared(before, under[0], text),
            "swept": total.swept(decision) | ({"random": random} if random else {}),
        }
    return sweep_json(figures_of_all(records), records, totals[0], is_calibration=not texts.perplexity)


def _alone_measured(job: Job, subject: Subject, yardstick: Yardstick | None, *, is_original: bool = False) -> Measured:
    """A checkpoint as it is."""
    assert subject.checkpoint is not None
    folder, when = subject.checkpoint.folder, f"measuring {job.recipe.model}"
    asked = ask_server(job, yardstick, folder, subject.config, when, is_original=is_original)
    figures = measure(job, _piece_to_measure(job, subject), yardstick, when, subject.devices, is_original=is_original)
    assert figures is not None
    return dataclasses.replace(figures.with_bytes_of(folder), **asked)


def _refuse_other_text(reference: str, preview: Preview, against: str, other: Preview) -> None:
    """Raise EvaluationError where a text is not the same tokens to both models, as far as both have tokenizers."""
    both: dict[str, list[Any]] = {"size of vocabulary": [one.limits.num_embeddings for one in (other, preview)]}
    if other.tokenizer is not None and preview.tokenizer is not None:
        both = {"tokenizer": [tokenizer_fingerprint(one.tokenizer) for one in (other, preview)]} | both
    for what, (theirs, ours) in both.items():
        if theirs != ours:
            raise EvaluationError(
                f"{against}: its {what} is {theirs}, that of {reference} is {ours}; only models that read the same "
                f"tokens can be compared."
            )


# The run ---------------------------------------------------------------------------------------------------


def _run(job: Job, subject: Subject, folder: OutputFolder | None) -> CompressionResult:
    """All steps, in the order of the drawing at the top. What is written goes into `folder`, if there is one."""
    beside = files_beside(subject.checkpoint.folder) if folder and subject.checkpoint else None
    if subject.preview.left_out:
        job.progress.say(check.left_out_note(subject.preview.left_out))
    if beside and beside.left:
        job.progress.say(beside.note)
    with job.timed("read text"):
        texts = _read_texts(job, subject)
    about = _about(job, subject, texts)
    job = _with_journal(job, subject, texts, folder)
    yardstick = _yardstick(job, subject, texts, has_original=True)
    original = subject.checkpoint.folder if subject.checkpoint else None
    asked = ask_server(job, yardstick, original, subject.config, "before", is_original=True)
    with job.timed("load"):
        piece = _workpiece(job, subject)
    with job.timed("evaluate before"):
        before = measure(job, piece, yardstick, "before", subject.devices, is_original=True)
    files, answers = passes.PassFiles(folder, about), yardstick.answers if yardstick else {}
    piece, smaller, done = _apply_passes(job, piece, texts, files, subject, answers)
    with job.timed("evaluate after"):
        after = measure(job, smaller, yardstick, "after", subject.devices, name=_name_after(job) if yardstick else None)
    if after:
        ours = {name: controls.figures(found, after.fidelity[name]) for name, found in after.perplexity.items()}
        done[-1] = controls.with_ours(done[-1], ours)
    if folder:
        with job.timed("save"):
            if is_external(job.loaded.passes[-1].method):
                folder.take(_turned_folder(job, job.loaded.passes[-1]))
            else:
                assert isinstance(smaller, Backend)
                smaller.save(folder, probe_of(_batches(job, texts.by_pass[0]), smaller.model))
    record = run_json(job.loaded, job.fingerprint, about, subject.preview, done)
    layers = subject.preview.layers, piece.layers
    if folder and (extra := plan_extra_layers(subject.preview.left_out, *layers, job.plugins.adapters)):
        record["mtp"] = extra.write(folder.path)
    if beside and beside.left:
        record["left_behind"] = list(beside.left)
    if yardstick and before and after:
        if asked:
            found = _served_after(job, yardstick, smaller, folder.path if folder else None)
            before, after = dataclasses.replace(before, **asked), dataclasses.replace(after, **found)
        if subject.checkpoint:
            before = before.with_bytes_of(subject.checkpoint.folder)
        if folder:
            after = after.with_bytes_of(folder.path)
        record["evaluation"] = _evaluation(job, subject, smaller.model, texts, yardstick, before, after)
        if yardstick.evaluation.each_pass:
            with job.timed("each pass alone"):
                record["evaluation"]["alone"] = _alone(job, subject, texts, yardstick, done, before)
    record |= counts_and_rules_json(piece.moe) | _circumstances(job, subject)
    record |= images_json(subject.config, texts.calibration())
    if folder:
        record |= origin_json(subject.checkpoint, folder.path)
        about = {"extra_layers": "left_out" in record, "serve": job.recipe.serve}
        record |= serving_json(folder.path, piece.moe, subject.preview.layers, **about)
        (folder.path / "compressor" / "recipe.yaml").write_text(job.loaded.to_yaml(), encoding="utf-8")
        write_record(folder.path, record)
    is_whole = smaller.weights is None and "files_only" not in record and not asked
    return CompressionResult(record, None, as_savable(smaller.model) if is_whole else None, subject.preview.tokenizer)


def _served_after(job: Job, yardstick: Yardstick, smaller: Measurable, folder: Path | None) -> dict[str, Any]:
    """What a server finds of the output, which lies in a folder. Weights go before, unless speed is measured."""
    if not yardstick.evaluation.speed:
        torch.nn.Module.to(smaller.model, "meta")
    return ask_server(job, yardstick, folder, smaller.model.config, "after")


@contextmanager
def _within(job: Job, folder: OutputFolder) -> Iterator[None]:
    """The output's hidden folder, which an error leaves to go on from."""
    resume = folder.resume
    with folder:
        if resume and not folder.resume:
            job.progress.say(f"{folder.target}: there is nothing to go on from; the run starts at the beginning")
        try:
            with disk_errors_named(folder.target):
                yield
        except BaseException as error:
            if folder.keeps_after(error):  # said with the error, also where progress is quiet
                error.add_note(
                    f"what was done so far is kept in {folder.hidden}: --resume goes on with it, --overwrite starts "
                    f"anew"
                )
            raise


def _apply_passes(
    job: Job, piece: Backend, texts: Texts, files: passes.PassFiles, subject: Subject, answers: Mapping[str, Answers]
) -> tuple[Backend, Measurable, list[dict[str, Any]]]:
    """Observe, decide and edit for every pass, each step leaving its file: what the last edit has made of the model,
    what is there in the end, and what the record says of the passes.
    """
    smaller: Measurable = piece
    all_ids = piece.original_ids
    done: list[dict[str, Any]] = []
    turned: Path | None = None
    for resolved, sequences, held_out in zip(job.loaded.passes, texts.by_pass, texts.held_out, strict=True):
        started, name = time.perf_counter(), resolved.name
        piece = _gone_on_with(job, resolved, smaller, piece)
        batches, others = _batches(job, sequences), _batches(job, held_out, held_out=True)
        with job.timed("observe"):
            shown = [*batches, *others]
            figures = passes.observe(job, piece, resolved, shown, _original(job, subject), name)
        files.add_figures(name, resolved, piece.layers, figures)
        with job.timed("decide"), files.kept_if_undecided(name, resolved):
            decision = passes.decide_measured(job, piece, resolved, figures, batches, name)
        entry = passes.entry_json(resolved, figures, held_out, decision, piece.original_ids, all_ids)
        if experts := resolved.method.by_expert(piece.layers, figures, decision):
            entry["experts"] = experts
        done.append(entry)
        files.write_decisions(done)
        if files.folder:  # a page that is there if the run is cut off
            write_page(files.folder.path, {**files.about, "passes": done, "unfinished": str(files.folder.target)})
        probe = probe_of(batches, piece.model)
        random = controls.beside(job, piece, resolved, decision, batches, texts.perplexity, answers, probe, name)
        with random as found, job.timed("edit"):
            if is_external(resolved.method):
                target = _turned_folder(job, resolved)
                training = external.training(job, (batches, others), subject.checkpoint, subject.devices[0], target)
                how = (probe, files.folder, target, training, turned)
                smaller, entry["checks"] = _turned(job, piece, resolved, decision, *how)
                turned = target
            else:
                smaller, turned = piece, None
                entry["checks"] = passes.edit(job, piece, resolved, decision, probe, name)
                if job.recipe.mtp != "drop" and (why := uneven_problem(piece.layers)):  # some are known only now
                    with files.kept_if_undecided(name, resolved):
                        raise job.loaded.error(("mtp",), why)
        entry |= found
        entry["seconds"] = round(time.perf_counter() - started, 3)
    return smaller if isinstance(smaller, Backend) else piece, smaller, done


# A checkpoint that becomes another one ---------------------------------------------------------------------


def _turned(
    job: Job,
    piece: Backend,
    resolved: ResolvedPass,
    decision: Decision,
    probe: TokenBatch,
    folder: OutputFolder | None,
    target: Path,
    training: Training,
    turned: Path | None,
) -> tuple[Measurable, dict[str, float]]:
    """What an external step has made of the model, in `target`, and how its logits on `probe` differ; `turned`: the
    files that the one before has left.
    """
    told: dict[str, float] = {}
    given = piece.logits(probe) if resolved.method.leaves_model else None
    if folder is not None:
        with job.loaded.at_pass(resolved), job.loaded.at(*resolved.path):
            told = external.carry_out(job, piece, resolved.method, decision, probe, folder, target, training, turned)
    job.processes.wait()
    torch.nn.Module.to(piece.model, "meta")  # its weights are not needed any more
    if given is None:
        return piece, told
    with job.loaded.at(*resolved.path), external.refused_by_name():
        smaller = _as_served(job, target)
        checks = told | external.difference(given, smaller.logits(probe), resolved.method.max_kl)
    job.processes.wait()  # its files are moved next
    return smaller, checks


def _gone_on_with(job: Job, resolved: ResolvedPass, smaller: Measurable, before: Backend) -> Backend:
    """What a pass works on: what the one before has left, where that is a model whose experts can be edited."""
    if smaller is before:
        return before
    if not isinstance(smaller, Backend):
        with job.loaded.at(*resolved.path):
            raise PluginError("the checkpoint that the pass before has left is quantised, and no pass goes on with it.")
    smaller.original_ids = before.original_ids
    if isinstance(smaller, OnDisk):
        assert job.recipe.output is not None
        smaller.work, smaller.journal = kept_for(job.recipe.output, "stages"), job.journal
    return smaller


def _turned_folder(job: Job, resolved: ResolvedPass) -> Path:
    """Where a pass leaves the checkpoint that it turns another one into."""
    assert job.recipe.output is not None
    return kept_for(job.recipe.output, "stages") / resolved.name


def _as_served(job: Job, folder: Path) -> Measurable:
    """A checkpoint of the run's own, loaded as `evaluate` loads it."""
    writes = bool(job.recipe.evaluate and job.recipe.evaluate.generation)  # and is measured by that
    as_it_is = {"hidden_states": "auto", "dtype": "auto", "evaluate": None, "output": None}
    as_it_is["weights"] = "memory" if writes else "auto"
    recipe = job.recipe.model_copy(update={"model": str(folder), **as_it_is})
    job = dataclasses.replace(job, loaded=load_recipe(recipe), journal=None)
    return _piece_to_measure(job, _in_checkpoint(job, check.measuring(job.loaded, job.plugins.adapters, job.progress)))


def _name_after(job: Job) -> str:
    """What the journal calls the last figures: those of a checkpoint that an external step has written are its own."""
    if not is_external(job.loaded.passes[-1].method):
        return "after"
    folder = _turned_folder(job, job.loaded.passes[-1])
    return f"after {headers.fingerprint(folder, headers.verify_files(folder)).rpartition(':')[2]}"


# What it begins with ---------------------------------------------------------------------------------------


def _record_before(job: Job) -> dict[str, Any] | None:
    """What a run before has recorded that did all of this; see `record_before`."""
    if job.recipe.output is None or not job.processes.is_first:
        return None

    def fingerprint() -> str:
        as_can_be, subject = _subject(job, None, None, None)
        return fingerprint_of(_identity(as_can_be, subject, _read_texts(as_can_be, subject)))

    return record_before(job.recipe.output, fingerprint, job.progress)


def _subject(job: Job, model: Any, tokenizer: Any, folder: OutputFolder | None) -> tuple[Job, Subject]:
    """Everything that can be known, or refused, before weights are read; the job as it can be carried out."""
    live_on = devices_of(model) if model is not None else ()
    preview = check.check(
        job.loaded,
        job.plugins.adapters,
        folder=folder,
        model=model,
        live_on=live_on,
        tokenizer=tokenizer,
        progress=job.progress,
    )
    assert preview.loaded is not None
    job = dataclasses.replace(job, loaded=preview.loaded)
    if model is None:
        return job, _in_checkpoint(job, preview)
    return job, Subject(preview.checkpoint, model, model.config, preview, None, live_on)


def _in_checkpoint(job: Job, preview: Preview) -> Subject:
    assert preview.checkpoint is not None
    devices = own_devices(job.loaded, job.processes, preview.devices)
    if job.recipe.device == "auto":
        job.progress.say(check.auto_note(devices, preview.place))
    found = with_weights(preview.checkpoint)
    fingerprint = headers.fingerprint(found.folder, found.shards)
    return Subject(found, None, load_config(found), preview, fingerprint, devices)


def _read_texts(job: Job, subject: Subject) -> Texts:
    evaluation, preview = readiness.evaluation_of(job.loaded), subject.preview
    measured = evaluation.texts.values() if evaluation else ()
    read = [source.title for one in job.loaded.passes for source in job.loaded.sources_of(one)]
    if titles := dict.fromkeys([*read, *(source.title for source in measured)]):
        job.progress.say(f"reading text: {', '.join(titles)}")
    return read_texts(job.loaded, measured, preview.reader, preview.limits.num_embeddings, job.progress)


def _batches(job: Job, texts: Sequence[Sequences], *, held_out: bool = False) -> list[TokenBatch]:
    return batches_of(texts, job.recipe.calibration.batch_size, held_out=held_out)


def _yardstick(job: Job, subject: Subject, texts: Texts, *, has_original: bool) -> Yardstick | None:
    """What is measured; None if nothing is. What the original answers is kept beside the output, if there is one."""
    evaluation, preview = readiness.evaluation_of(job.loaded), subject.preview
    if evaluation is None:
        return None
    folder = kept_for(job.recipe.output, "answers") if job.recipe.output else None
    answers = {
        text.name: Answers(folder and folder / str(number), job.fingerprint or "")
        for number, text in enumerate(texts.perplexity if has_original else ())
    }
    return Yardstick(evaluation, texts.perplexity, preview.tasks, preview.tokenizer, job.recipe.seed, answers)


def _workpiece(job: Job, subject: Subject) -> Backend:
    """The model that the passes work on."""
    recipe, preview = job.recipe, subject.preview
    shared: dict[str, Any] = {
        "left_out": preview.left_out,
        "adapters": job.plugins.adapters,
        "progress": job.progress,
        "processes": job.processes,
    }
    if preview.place.states == "file":
        assert recipe.output is not None
        waiting = kept_for(recipe.output, "waiting")
        waiting.mkdir(parents=True, exist_ok=True)
        shared["parking"] = Parking(waiting)
    if preview.place.weights == "memory":
        return InMemory(_load(job, subject), subject.checkpoint, **shared)
    assert subject.checkpoint is not None
    job.progress.say(f"reading {recipe.model} one decoder layer at a time")
    work = kept_for(recipe.output, "stages") if recipe.output else None
    device, tokens_at_once = subject.devices[0], preview.tokens_at_once
    return OnDisk(subject.checkpoint, work, device=device, journal=job.journal, tokens_at_once=tokens_at_once, **shared)


def _load(job: Job, subject: Subject) -> MoEModel:
    return load_moe(subject, job.recipe, job.plugins.adapters, job.progress)


def _original(job: Job, subject: Subject) -> Callable[[], Original]:
    return partial(load_original, subject, job.recipe, job.plugins.adapters)


def _piece_to_measure(job: Job, subject: Subject) -> Measurable:
    """What is measured: a model whose experts we know, from memory or disk, or else as transformers loads it."""
    found, preview = subject.checkpoint, subject.preview
    assert found is not None
    if preview.place.weights == "disk" or (preview.structure is not None and found.quantisation is None):
        return _workpiece(job, subject)
    job.progress.say(f"loading {job.recipe.model} as transformers loads it")
    if "skipping" in read_entry(subject.config):
        job.progress.say("its config says that it skips experts, which here it does not: it is measured unskipped")
    model = load_weights(subject, job.recipe, job.plugins.adapters, to_measure=True)
    return AsLoaded(model, preview.layers, found, job.processes)


# What it is about, and what it has measured ----------------------------------------------------------------


def _about(job: Job, subject: Subject, texts: Texts) -> dict[str, Any]:
    tokenizer = tokenizer_fingerprint(subject.preview.tokenizer)
    return about_json(job.loaded, subject.about(), tokenizer, texts.calibration(), subject.preview.layers)


def _identity(job: Job, subject: Subject, texts: Texts) -> dict[str, Any]:
    tokenizer = tokenizer_fingerprint(subject.preview.tokenizer)
    others = texts.fingerprints(), job.processes.size, job.plugins.versions()
    return identity_json(job.loaded, subject.about(), tokenizer, *others)


def _with_journal(job: Job, subject: Subject, texts: Texts, folder: OutputFolder | None, **others: Any) -> Job:
    """The job with its journal, begun or gone on with, if another run could go on with it. `others`: what it is about
    besides.
    """
    if job.recipe.output is None or subject.fingerprint is None:
        return job  # a live model could be another one next time
    identity = _identity(job, subject, texts) | others
    journal = open_journal(job, job.recipe.output, identity, folder)
    return dataclasses.replace(job, journal=journal, fingerprint=fingerprint_of(identity))


def _circumstances(job: Job, subject: Subject) -> dict[str, Any]:
    return {
        "versions": job.plugins.versions(),
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(*subject.devices),
        **({"processes": job.processes.size} if job.processes.size > 1 else {}),
        "seconds": {step: round(value, 3) for step, value in job.seconds.items()},
        "output": str(job.recipe.output) if job.recipe.output else None,
    }


def _evaluation(
    job: Job, subject: Subject, smaller: Any, texts: Texts, yardstick: Yardstick, before: Measured, after: Measured
) -> dict[str, Any]:
    """The record's `evaluation`: figures before and after, answers flipped, and speed side by side. For speed the
    original is loaded once more; text that quality is measured on, or calibration text, is read.
    """
    found = compared(before, after, texts.perplexity)
    if yardstick.evaluation.speed:
        with job.timed("speed"):
            job.processes.wait()  # whoever is at work would disturb it
            speed = None
            if job.processes.is_first:
                job.progress.say("speed: original and smaller model in turn")
                original, text = _load(job, subject).model, [*texts.perplexity, *texts.calibration()]
                speed = compared_speed(original, smaller, text, job.recipe.seed)
            found["speed"] = job.processes.exchange(speed)[0]
    return found


def _alone(
    job: Job, subject: Subject, texts: Texts, yardstick: Yardstick, done: Sequence[Mapping[str, Any]], before: Measured
) -> list[dict[str, Any]]:
    """Every pass on a fresh original, measured as all of them together are. The first one's decision is known."""
    found: list[dict[str, Any]] = []
    for resolved, together in zip(job.loaded.passes, done, strict=True):
        entry = {"pass": resolved.index, "method": resolved.spec.method}
        try:
            piece = InMemory(_load(job, subject), None, progress=job.progress, processes=job.processes)
            decision = together["decision"]
            if resolved.index:
                decision = _decided_alone(job, subject, piece, resolved, texts)
            with job.loaded.at_pass(resolved):
                carry_out(resolved.method, piece.moe, decision)
            when, name = f"{resolved.spec.method} alone", f"{resolved.index} alone"
            after = measure(job, piece, yardstick, when, subject.devices, name=name)
            assert after is not None
            entry |= {"decision": decision}
            entry |= _evaluation(job, subject, piece.model, texts, yardstick, before, after)
            job.processes.wait()
        except CompressorError as error:  # what works behind other passes need not work alone
            job.processes.tell(error)
            job.progress.say(f"{resolved.spec.method} alone cannot be measured: {error}")
            entry["problem"] = str(error)
        found.append(entry)
    return found


def _decided_alone(job: Job, subject: Subject, piece: Backend, resolved: ResolvedPass, texts: Texts) -> Decision:
    """What a pass decides on the original model; behind others it decides about what they have left."""
    check.check_pass(job.loaded, resolved, check.with_rules(piece.layers, piece.moe.skip_rules))
    batches = _batches(job, texts.by_pass[resolved.index])
    held_out = _batches(job, texts.held_out[resolved.index], held_out=True)
    figures = passes.observe(job, piece, resolved, [*batches, *held_out], _original(job, subject))
    return passes.decide_measured(job, piece, resolved, figures, batches, f"{resolved.index} alone")
