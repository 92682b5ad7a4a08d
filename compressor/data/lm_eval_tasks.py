"""Tasks of lm-evaluation-harness: found by name, loaded with their documents, and their training text.

A task is measured on its test split, or else on its validation split. What a model is pruned for is read from another
one: ``training_texts`` renders the documents as the task itself does, prompt and right answer.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import itertools
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from compressor.data.demo.tasks import task_configs
from compressor.errors import CalibrationError, EvaluationError, shortened
from compressor.machine import network

LocalTasks = Callable[[], Mapping[str, Mapping[str, Any]]]

DEMO_PREFIX = "demo_"


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their documents, ready to be asked of one model after another."""

    names: tuple[str, ...] = ()
    tasks: Mapping[str, Any] = field(default_factory=dict)
    """lm_eval.api.task.Task by name, the members of groups included."""
    groups: Mapping[str, Any] = field(default_factory=dict)
    """lm_eval.api.group.Group by name."""
    num_requests: int = 0
    """About how many a model will be asked, where that was found."""

    def __or__(self, others: LoadedTasks) -> LoadedTasks:
        names = tuple(dict.fromkeys((*self.names, *others.names)))
        return LoadedTasks(names, {**self.tasks, **others.tasks}, {**self.groups, **others.groups})

    def __repr__(self) -> str:
        return f"LoadedTasks({shortened(', '.join(self.names), 160)})"

    def group_of(self, name: str) -> str | None:
        """The group through which a task or subgroup came, None for one that was named itself or by a tag."""
        if name in self.names:
            return None
        named = [self.groups[group] for group in self.names if group in self.groups]
        within = {group.name: {*members(group), *(sub.name for sub in group.get_all_groups())} for group in named}
        return next((group for group, names in within.items() if name in names), None)


def load_tasks(
    names: Sequence[str],
    *,
    task_path: Path | None = None,
    num_fewshot: int | None = None,
    seed: int = 0,
    local_tasks: LocalTasks | None = None,
) -> LoadedTasks:
    """Find tasks, groups and tags by name and read their documents, without a model. ``demo_…`` are ``local_tasks``
    (name → configuration; default the demo's own), then come YAML files under ``task_path``, then lm-eval's index of
    14,000 tasks (7 to 30 seconds, only if still unknown), whose documents come from the hub or its cache.
    ``num_fewshot`` replaces a task's number unless that is fixed at 0. Raises EvaluationError for an unknown name (with
    the nearest), unreadable documents, a ``num_fewshot`` that no task takes, and tasks that run generated code or need
    more than text.
    """
    sources = TaskSources(task_path, local_tasks, seed=seed)
    loaded = reduce(or_, map(sources.load, names), LoadedTasks())
    set_fewshot(loaded.tasks, num_fewshot)
    return loaded


class TaskSources:
    """Where tasks come from, each source opened when a name is first looked for in it; see `load_tasks`."""

    def __init__(
        self,
        task_path: Path | None = None,
        local_tasks: LocalTasks | None = None,
        *,
        seed: int = 0,
        say: Callable[[str], None] | None = None,
        runs_code: bool = False,
    ) -> None:
        """`say` is told of what takes long; `runs_code`: also tasks that run what models write. Raises EvaluationError
        where there is no such folder.
        """
        if task_path is not None and not task_path.is_dir():
            raise EvaluationError(
                f"task_path {task_path}: there is no such folder; give one that holds tasks' YAML files."
            )
        self._task_path = task_path
        self._local_tasks: LocalTasks = local_tasks or task_configs
        self._seed, self._say, self._runs_code = seed, say, runs_code and os.environ.get("HF_ALLOW_CODE_EVAL") == "1"
        self._managers: dict[bool, Any] = {}

    def load(self, name: str) -> LoadedTasks:
        """The tasks of one name, of a task, a group or a tag. Raises EvaluationError."""
        is_local = name.startswith(DEMO_PREFIX)
        with quietly():
            needs_index = not is_local and name not in self._manager(False).task_index
        if needs_index and self._say is not None and True not in self._managers:
            self._say("reading lm-eval's index of tasks, which takes 7 to 30 seconds")
        with quietly(), seeded(self._seed):
            manager, local = self._manager(needs_index), self._local_tasks()
            others = () if is_local else manager.task_index
            if name not in (local if is_local else others):
                near = difflib.get_close_matches(name, [*local, *others], n=5, cutoff=0.5)
                hint = f"Did you mean {', '.join(near)}?" if near else "`lm-eval ls tasks` lists its tasks."
                raise EvaluationError(f"unknown task {name!r}. {hint}")
            found = manager.load([dict(local[name])]) if is_local else _load(manager, name)
        for one, task in found["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) and not self._runs_code:
                raise EvaluationError(
                    f"task {one!r} runs code that the model writes, with all that this account may do: that takes "
                    f"`confirm_run_unsafe_code: true` under `evaluate`, and HF_ALLOW_CODE_EVAL=1 in the environment."
                )
            if getattr(task, "MULTIMODAL", False):
                raise EvaluationError(f"task {one!r} needs images or sound; only text is supported here.")
        return LoadedTasks((name,), found["tasks"], found.get("groups", {}))

    def _manager(self, include_defaults: bool) -> Any:
        from lm_eval.tasks import TaskManager

        if include_defaults not in self._managers:
            self._managers[include_defaults] = TaskManager(
                include_path=self._task_path, include_defaults=include_defaults
            )
        return self._managers[include_defaults]


def _load(manager: Any, name: str) -> Any:
    with network.not_waited_for() as unreachable:
        try:
            return manager.load([name])
        except Exception as error:
            cannot = f", which cannot be reached ({unreachable})" if unreachable else ""
            raise EvaluationError(
                f"task {name!r}: its documents cannot be read: {type(error).__name__}: {error}. Those of lm-eval come "
                f"from the hub{cannot}: download them, give local data with `task_path`, or use {DEMO_PREFIX}… tasks."
            ) from error


def set_fewshot(tasks: Mapping[str, Any], num_fewshot: int | None) -> None:
    """As lm-eval's command does: a task that says 0 means it. Raises EvaluationError where that has no effect."""
    free = [task for task in tasks.values() if task.get_config("num_fewshot") != 0]
    if num_fewshot and not free:
        raise EvaluationError(
            f"num_fewshot: {num_fewshot} would have no effect: {', '.join(tasks)} fixed at 0. Leave it out."
        )
    for task in free:
        default = task.get_config("num_fewshot") or 0
        task.set_config(key="num_fewshot", value=default if num_fewshot is None else num_fewshot)


_ANSWER_LENGTH = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""lm-eval's names for how many tokens a task has the model write at most; the first one given counts."""


def refuse_long_answers(tasks: Mapping[str, Any], max_positions: int | None) -> None:
    """Raise EvaluationError for a task that has the model write as many tokens as it has positions (None: no limit), so
    that none are left for the question, or no number of tokens.
    """
    for name, task in tasks.items():
        if task.OUTPUT_TYPE != "generate_until" or max_positions is None:
            continue
        settings = task.get_config("generation_kwargs") or {}
        option = next((one for one in _ANSWER_LENGTH if settings.get(one) is not None), None)
        wanted = settings[option] if option else 256
        if not str(wanted).isdecimal() or int(wanted) < 1:
            raise EvaluationError(f"task {name!r}: `generation_kwargs: {option}: {wanted}` is no number of tokens.")
        if int(wanted) >= max_positions:
            said = f"`generation_kwargs: {option}: {wanted}`" if option else f"{wanted} tokens, as lm-eval has it"
            raise EvaluationError(
                f"task {name!r} has the model write {said}, but the model takes {max_positions} positions, question "
                f"and answer together. Give it a smaller `{option or _ANSWER_LENGTH[0]}`, or leave it out."
            )


def members(group: Any) -> list[str]:
    """Names of a group's tasks, those of its subgroups included."""
    return [task.task_name for task in group.get_all_tasks()]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, numpy's and torch's generators start from ``seed`` inside; after it they are as before."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(gpus, device_type="cuda"):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without lm-eval's and datasets' messages and bars, which obey no setting but where stderr goes."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# --- training text ------------------------------------------------------------------------------------------


def named_in(file: Path) -> str:
    """The name of the task or group that a YAML file defines. Raises CalibrationError if it names none."""
    try:
        config = yaml.load(file.read_text(encoding="utf-8"), Loader=_WithoutFunctions)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CalibrationError(f"task file {file} cannot be read: {error}") from error
    name = (config.get("task") if isinstance(config, dict) else None) or None
    if isinstance(config, dict) and isinstance(config.get("group"), str):
        name = config["group"]
    if not isinstance(name, str):
        raise CalibrationError(f"task file {file} names no task: expected `task: NAME` or `group: NAME`.")
    return name


class _WithoutFunctions(yaml.SafeLoader):
    """Reads lm-eval's task files; `!function` and other tags of theirs are left out, nothing is run."""


_WithoutFunctions.add_multi_constructor("!", lambda loader, suffix, node: None)


def training_texts(
    name: str, *, task_path: Path | None = None, split: str | None = None, seed: int = 0
) -> Iterator[tuple[str, str]]:
    """The training documents of a task, or of a group's tasks in turn, as (prompt and right answer, place), shuffled by
    ``seed``, rendered as they are wanted; without a training split those of a validation split that is not measured on,
    or of ``split``. Raises CalibrationError where there are none, or they cannot be read.
    """
    try:
        loaded = load_tasks([name], task_path=task_path, seed=seed)
    except EvaluationError as error:
        raise CalibrationError(f"calibration task {name!r}: {error}") from error
    found = []
    with quietly(), seeded(seed):
        for task_name, task in loaded.tasks.items():
            documents = _training_documents(task_name, task, split)
            order = list(range(len(documents)))
            random.Random(seed).shuffle(order)
            found.append([(task_name, task, documents, number) for number in order])
    return _rendered_in_turn(found, seed)


def _rendered_in_turn(
    found: Sequence[Sequence[tuple[str, Any, Sequence[Any], int]]], seed: int
) -> Iterator[tuple[str, str]]:
    for turn in itertools.zip_longest(*found):
        for name, task, documents, number in filter(None, turn):
            try:
                with quietly(), seeded(seed):
                    text = _rendered(task, documents[number])
            except Exception as error:  # a task's templates and functions may fail in any way
                raise CalibrationError(
                    f"task {name!r}: a document cannot be rendered with its answer: {type(error).__name__}: {error}. "
                    f"Its keys are {sorted(documents[number])}."
                ) from error
            yield text, f"task {name!r}, document {number}"


def _training_documents(name: str, task: Any, split: str | None) -> Sequence[Any]:
    config = task.config
    splits = {"train": config.training_split, "validation": config.validation_split, "test": config.test_split}
    measured = "test" if splits["test"] is not None else "validation"
    if split is None:
        others = [one for one in ("train", "validation") if splits[one] not in (None, splits[measured])]
        split = others[0] if others else None
        if split is None:
            has = ", ".join(f"{one} ({value})" for one, value in splits.items() if value is not None)
            raise CalibrationError(
                f"task {name!r} has no training documents, only {has}, which it is measured on. Take another task, or "
                f"say `split: {measured}` if its figures need not mean anything afterwards."
            )
    elif splits.get(split) is None:
        has = ", ".join(one for one, value in splits.items() if value is not None)
        raise CalibrationError(f"task {name!r} has no {split} split; it has {has}.")
    read = {"train": task.training_docs, "validation": task.validation_docs, "test": task.test_docs}[split]
    documents = read()
    if not hasattr(documents, "__getitem__"):
        documents = list(documents)
    if not documents:
        raise CalibrationError(f"task {name!r}: its {split} split has no documents.")
    return documents  # type: ignore[no-any-return]


def _rendered(task: Any, document: Any) -> str:
    """As the task puts them together when a model is measured."""
    context = task.fewshot_context(document, 0, gen_prefix=task.doc_to_prefix(document))
    delimiter = task.config.target_delimiter
    kind = task.OUTPUT_TYPE
    target = task.doc_to_target(document)
    if kind == "loglikelihood_rolling":
        return str(_first(target))
    if kind == "loglikelihood":
        return f"{context}{_first(target)}"
    if kind == "multiple_choice" and task.multiple_input:
        return f"{context[_first(task.doc_to_text(document))]}{delimiter}{_first(target)}"
    if kind == "multiple_choice":
        right, choices = _first(target), task.doc_to_choice(document)
        return f"{context}{delimiter}{choices[right] if isinstance(right, int) else right}"
    return f"{context}{delimiter}{_first(target)}"


def _first(value: Any) -> Any:
    """Of several right answers the first one."""
    return value[0] if isinstance(value, list | tuple) else value
