"""Whether a run could begin: device, output, text and tasks, looked at before any weight is read.

What a run refuses and the recipe, a tokenizer, the first rows of a source or the hub's answer can tell is refused here,
at its place in the recipe, and all of a kind together. `check` asks it for `compressor check` and for a run alike.

Not seen: what only the rest of a text or the weights tell.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from functools import reduce
from importlib.util import find_spec
from operator import or_
from pathlib import Path
from typing import Any

import torch

from compressor.checkpoint.find import Checkpoint
from compressor.checkpoint.output import OutputFolder, refuse_output_over_input
from compressor.data.images import check_images, image_reader
from compressor.data.lm_eval_tasks import LoadedTasks, TaskSources, set_fewshot
from compressor.data.packing import check_length, load_sequences
from compressor.data.sequences import check_vocabulary, tokenizer_of
from compressor.data.sources import SOURCE_KINDS, BaseSource, DatasetSource, Split, TaskSource, TokensSource
from compressor.errors import CalibrationError, EvaluationError, RecipeError
from compressor.evaluation.lm_eval import check_requests, refuse_without_tokenizer, writes_problem
from compressor.evaluation.served import look_at
from compressor.machine.progress import Progress
from compressor.recipe.document import KeyPath
from compressor.recipe.schema import Evaluation, LoadedRecipe, Refusals, ResolvedPass
from compressor.run.preview import Limits
from compressor.wording import counted

# Where a source stands -------------------------------------------------------------------------------------


def own_tasks(loaded: LoadedRecipe) -> list[tuple[KeyPath, TaskSource]]:
    """The tasks whose training text a method brings, which are measured too, with their places in the recipe."""
    return [(place, one) for place, one in _of_methods(loaded.passes) if isinstance(one, TaskSource)]


def evaluation_of(loaded: LoadedRecipe) -> Evaluation | None:
    """What is measured: as the recipe says, and the methods' own tasks in any case."""
    return loaded.recipe.evaluate or (Evaluation() if own_tasks(loaded) else None)


def _of_methods(passes: Sequence[ResolvedPass]) -> list[tuple[KeyPath, BaseSource]]:
    """The text that methods bring, with its place in the recipe: the option of its name, where there is one."""
    found: list[tuple[KeyPath, BaseSource]] = []
    for one in passes:
        for source in one.method.sources():
            known = type(source).model_fields.keys() & type(one.method.options).model_fields.keys()
            found.append(((*one.path, *(kind for kind in SOURCE_KINDS if kind in known)), source))
    return found


def _of_recipe(loaded: LoadedRecipe) -> list[tuple[KeyPath, BaseSource, Split]]:
    """Every source that a run reads, with its place, and the split that it is read for."""
    reading = [one for one in loaded.passes if loaded.sources_of(one)]
    shared = loaded.recipe.calibration.data if reading else ()
    measured = loaded.recipe.evaluate.texts if loaded.recipe.evaluate else {}
    return [
        *((("calibration", "data", n), one, "train") for n, one in enumerate(shared)),
        *((place, one, "train") for place, one in _of_methods(reading)),
        *((("evaluate", *place), one, "held-out") for place, one in measured.items()),
    ]


# Before the model ------------------------------------------------------------------------------------------


def check_surroundings(loaded: LoadedRecipe, folder: OutputFolder | None, model: Any, *, is_here: bool = True) -> None:
    """Raise where device (if `is_here`), output (None: written by another) or a file of text cannot be used."""
    refusals = Refusals(loaded)
    with refusals.at("device"):
        if is_here and model is None and loaded.recipe.device != "auto":  # a live model stays where it is
            _check_device(loaded.recipe.device)
    with refusals.at("output"):
        if folder is not None:
            for reference in (loaded.recipe.model, model.config._name_or_path if model is not None else ""):
                refuse_output_over_input(folder.target, reference)
            if not _is_done(loaded, folder):
                folder.check()
    for place, source, _ in _of_recipe(loaded):
        with refusals.at(*place):
            source.lengths()
    refusals.raise_all()


def _is_done(loaded: LoadedRecipe, folder: OutputFolder) -> bool:
    """Whether a run that is to go on has nothing left to do: the output is of this recipe."""
    try:
        record = json.loads((folder.target / "compressor" / "record.json").read_text(encoding="utf-8"))
        return folder.resume and record.get("recipe_fingerprint") == loaded.fingerprint
    except (OSError, ValueError, AttributeError):
        return False


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        count = torch.cuda.device_count()
        there = f"this machine has {count} GPU(s) that torch can use" if count else "torch can use no GPU here"
        raise RecipeError(
            f"{device!r} cannot be used: {str(error).splitlines()[0]} ({there}). Choose another device, such as cpu"
        ) from error


# With the model's config and tokenizer ---------------------------------------------------------------------


def reader_of(loaded: LoadedRecipe, found: Checkpoint | None, config: Any, given: Any | None) -> Any | None:
    """What text is read by: a tokenizer or processor `given`, or where rows have images an ImageReader."""
    for place in (place for place, source, _ in _of_recipe(loaded) if getattr(source, "images", False)):
        with loaded.at(*place):
            folder, code = (found.folder, found.trust_remote_code) if found else (None, False)
            return image_reader(given, folder, config, trust_remote_code=code)
    return tokenizer_of(given)


def check_text(loaded: LoadedRecipe, reader: Any | None, limits: Limits, progress: Progress) -> None:
    """Raise where the first sequence of a source cannot be read, or given to the model, or an image of another one."""
    tokenizer = tokenizer_of(reader)
    if tokenizer is not None and any(not isinstance(source, TokensSource) for _, source, _ in _of_recipe(loaded)):
        _check_tokenizer(loaded, tokenizer, limits)
    refusals = Refusals(loaded)
    for place, source, split in _of_recipe(loaded):
        if isinstance(source, DatasetSource | TaskSource):
            progress.say(f"looking at the first text of {source.title}")
        with refusals.at(*place):
            check_length(source, limits.max_positions)
            check_images(source, seed=loaded.recipe.seed)
            check_vocabulary(load_sequences(source, reader, seed=None, split=split), limits.num_embeddings)
    refusals.raise_all()


def _check_tokenizer(loaded: LoadedRecipe, tokenizer: Any, limits: Limits) -> None:
    """Raise CalibrationError where it knows more than the model, but for special tokens that were added."""
    if tokenizer.vocab_size > limits.num_embeddings:
        with loaded.at("model"):
            raise CalibrationError(
                f"its tokenizer knows {tokenizer.vocab_size} ids, but the model has only {limits.num_embeddings} "
                f"embeddings: it belongs to another model. Put the model's own tokenizer into its folder."
            )


def read_tasks(
    loaded: LoadedRecipe, tokenizer: Any | None, limits: Limits, config: Any, *, from_disk: bool, progress: Progress
) -> LoadedTasks | None:
    """The tasks to measure, None where there are none. Raises where one is unknown, its documents cannot be read, or
    a model of this config cannot be asked it: without a tokenizer, to write while it is on disk, longer than it is.
    """
    wanted, evaluation = _tasks(loaded), evaluation_of(loaded)
    if not wanted or evaluation is None:
        return None
    from_disk = from_disk and evaluation.server is None
    if tokenizer is not None:
        _check_tokenizer(loaded, tokenizer, limits)
    progress.say(f"reading tasks: {', '.join(name for name, _ in wanted.values())}")
    refusals, found = Refusals(loaded), dict[KeyPath, LoadedTasks]()
    sources: dict[Path | None, TaskSources] = {}
    for place, (name, folder) in wanted.items():
        with refusals.at(*place):
            refuse_without_tokenizer([name], tokenizer)
        if tokenizer is not None and folder not in sources:
            with refusals.at(*place[:1], *(("task_path",) if place[0] == "evaluate" else place[1:])):
                how: dict[str, Any] = {"seed": loaded.recipe.seed, "runs_code": evaluation.confirm_run_unsafe_code}
                sources[folder] = TaskSources(folder, say=progress.say, **how)
        with refusals.at(*place):
            of_name = sources[folder].load(name) if folder in sources else LoadedTasks()
            writing = {task for task, one in of_name.tasks.items() if one.OUTPUT_TYPE == "generate_until"}
            if from_disk and writing and place[0] == "evaluate":
                raise EvaluationError(writes_problem(writing))
            if from_disk and writing:
                progress.say(f"not measured: {writes_problem(writing)}")
            else:
                found[place] = of_name
    refusals.raise_all()
    together, num_requests = reduce(or_, found.values(), LoadedTasks()), 0
    with loaded.at("evaluate", "num_fewshot"):
        set_fewshot(together.tasks, evaluation.num_fewshot)
    for place, of_name in found.items():
        with refusals.at(*place):
            asked: dict[str, Any] = {"limit": evaluation.limit, "seed": loaded.recipe.seed}
            num_requests += check_requests(of_name, tokenizer, config, **asked)
    refusals.raise_all()
    return dataclasses.replace(together, num_requests=num_requests) if together.names else None


def _tasks(loaded: LoadedRecipe) -> dict[KeyPath, tuple[str, Path | None]]:
    """Place in the recipe → name, and the folder in which it is looked for first; each task once."""
    evaluation = loaded.recipe.evaluate
    found: dict[KeyPath, tuple[str, Path | None]] = {}
    for n, name in enumerate(evaluation.tasks if evaluation else ()):
        found[("evaluate", "tasks", n)] = (name, evaluation.task_path if evaluation else None)
    for place, source in own_tasks(loaded):
        if source.name_in_index not in {name for name, _ in found.values()}:
            found[place] = (source.name_in_index, source.folder)
    return found


def check_server(
    loaded: LoadedRecipe, tasks: LoadedTasks | None, tokenizer: Any, *, has_folders: bool | None
) -> list[str]:
    """What a server will be asked, in a sentence; none without one. Raises where that cannot be. `has_folders`: whether
    model and result are there as files; None where nothing is compressed.
    """
    server = loaded.recipe.evaluate.server if loaded.recipe.evaluate else None
    if server is None or tasks is None:
        return []
    chosen = [name for name, task in tasks.tasks.items() if task.OUTPUT_TYPE != "generate_until"]
    missing = [name for name in ("tenacity", "aiohttp", "requests") if find_spec(name) is None]
    program = server.command[0] if server.command else ""
    with loaded.at("evaluate", "server"):
        for problem, is_there in {
            f'the package {"".join(missing[:1])} is missing (`pip install "moe-compressor[server]"`)': missing,
            "the server at `url` cannot have the smaller model before this run has made it: give the `command` that "
            "starts one, or ask afterwards with `compressor evaluate OUTPUT --against MODEL`": has_folders is not None
            and not program,
            "a server reads folders: give the model as one, and an `output`": has_folders is False,
            f"there is no program {program!r} here that can be run": program and shutil.which(program) is None,
            f"`chat` asks tasks that have the model write, and {''.join(chosen[:1])} has it choose": server.chat
            and chosen,
            "`chat` needs a template, and the model's tokenizer has none": server.chat and not tokenizer.chat_template,
        }.items():
            if is_there:
                raise RecipeError(problem)
        where = f"a server that {program} starts on each model's folder"
        if not program:
            where = "{url}, which answers and has {model}".format(**look_at(server, timeout=5))
    asked = f"about {counted(tasks.num_requests, 'request')} for tasks"
    return [f"{asked} will go to {where}; their tokens are those of the model's own tokenizer"]
