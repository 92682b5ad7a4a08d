"""Three multiple-choice tasks over the demo's held-out text, for lm-evaluation-harness, without a download.

* ``demo_arithmetic``: four worked lines, then a sum; its value among three near misses.
* ``demo_code``: eight lines of code; the next line among three of the same indentation and like length.
* ``demo_prose``: a passage; how it goes on, among three continuations of other passages.

In code and prose the right choice takes up words of five or more letters from the text before (two in code,
one in prose) and the wrong ones take up none, so that a small model can tell them apart by reading.

Each question has four choices, so guessing gives 25 %. Every task has 400 questions from the held-out split
to evaluate and 400 from the train split (``training_docs``) for task-specific pruning.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import islice
from typing import Any, TypedDict

from compressor.data.demo.corpus import Split, documents
from compressor.errors import EvaluationError

NUM_QUESTIONS = 400
NUM_DISTRACTORS = 3

_WORKED_LINES = 4
_CODE_LINES = 8
_CODE_FILES = 60
_NUM_CANDIDATES = 150
_PROSE_PASSAGES = 600
_CONTEXT_CHARACTERS = 300
_CONTINUATION_CHARACTERS = 60


class Question(TypedDict):
    """One document of a task: the text before, four different choices, and the right one's index."""

    context: str
    choices: list[str]
    answer: int


def task_configs() -> dict[str, dict[str, Any]]:
    """Each task's name and its configuration for lm-eval; documents are built in memory, and cached nowhere."""
    return {name: _configuration(name) for name in _BUILDERS}


@cache
def build_documents(task: str, split: Split, count: int = NUM_QUESTIONS, seed: int = 0) -> list[Question]:
    """A task's first ``count`` questions, kept: do not change them. EvaluationError: unknown, or fewer."""
    if task not in _BUILDERS:
        raise EvaluationError(f"demo tasks: no task {task!r}; known: {', '.join(_BUILDERS)}")
    rng = random.Random(f"{task}/{split}/{seed}")
    questions: list[Question] = []
    contexts: set[str] = set()
    for context, right, wrong in _BUILDERS[task](split, rng):
        if len(questions) == count:
            break
        if context not in contexts and len({right, *wrong}) == 1 + NUM_DISTRACTORS:
            contexts.add(context)
            choices = rng.sample([right, *wrong], 1 + NUM_DISTRACTORS)
            questions.append({"context": context, "choices": choices, "answer": choices.index(right)})
    if len(questions) < count:
        raise EvaluationError(
            f"demo task {task!r}: {count} questions asked for, the {split} text gives {len(questions)}"
        )
    return questions


def _configuration(task: str) -> dict[str, Any]:
    def build_dataset(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {
            "train": Dataset.from_list(build_documents(task, "train")),
            "test": Dataset.from_list(build_documents(task, "held-out")),
        }

    return {
        "task": task,
        "custom_dataset": build_dataset,
        "training_split": "train",
        "test_split": "test",
        "fewshot_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
    }


# A builder gives (context, right choice, wrong choices) without end or until its text is used up.
_Draft = tuple[str, str, list[str]]


def _arithmetic(split: Split, rng: random.Random) -> Iterator[_Draft]:
    for document in documents("arithmetic", split, seed=1):
        lines = document.splitlines(keepends=True)
        left, value = lines[_WORKED_LINES].split("=")
        worked = "".join(lines[:_WORKED_LINES])
        if left in worked:
            continue
        yield f"{worked}{left}=", value, [f"{miss}\n" for miss in _near_misses(int(value), rng)]


def _near_misses(value: int, rng: random.Random) -> list[int]:
    """Other values that a careless reckoner could reach: one or two off, ten off, a carry forgotten."""
    others = [value + step for step in (-11, -10, -9, -2, -1, 1, 2, 9, 10, 11) if value + step >= 0]
    return rng.sample(others, NUM_DISTRACTORS)


def _code(split: Split, rng: random.Random) -> Iterator[_Draft]:
    drafts: list[tuple[str, str]] = []
    lines_by_indent: dict[int, list[str]] = defaultdict(list)
    for document in islice(documents("code", split), _CODE_FILES):
        lines = document.split("\n")
        for index in range(_CODE_LINES, len(lines)):
            if not _is_statement(lines[index]):
                continue
            lines_by_indent[_indent(lines[index])].append(lines[index])
            context = "\n".join(lines[index - _CODE_LINES : index]) + "\n"
            if len(_words(lines[index]) & _words(context)) >= 2:
                drafts.append((context, lines[index]))
    rng.shuffle(drafts)
    for context, right in drafts:
        alike = _alike(right, context, lines_by_indent[_indent(right)], rng)
        if len(alike) == NUM_DISTRACTORS:
            yield context, f"{right}\n", [f"{line}\n" for line in alike]


def _alike(right: str, context: str, candidates: Sequence[str], rng: random.Random) -> list[str]:
    """Up to three of the candidates, as long as the right choice and without a word of the context."""
    words = _words(context)
    drawn = rng.sample(candidates, min(_NUM_CANDIDATES, len(candidates)))
    fitting = (text for text in drawn if abs(len(text) - len(right)) <= 6 and not _words(text) & words)
    return list(islice(fitting, NUM_DISTRACTORS))


def _is_statement(line: str) -> bool:
    return len(line.strip()) >= 15 and not line.lstrip().startswith("#")


def _words(text: str) -> set[str]:
    """Words and names of five letters or more, which tell one text from another."""
    return set(re.findall(r"[a-z_]{5,}", text.lower()))


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _prose(split: Split, rng: random.Random) -> Iterator[_Draft]:
    passages = islice(documents("prose", split), _PROSE_PASSAGES)
    drafts = [draft for passage in passages for draft in _cuts(passage)]
    continuations = [continuation for _, continuation in drafts]
    rng.shuffle(drafts)
    for context, right in drafts:
        if _words(right) & _words(context):
            alike = _alike(right, context, continuations, rng)
            if len(alike) == NUM_DISTRACTORS:
                yield context, right, alike


def _cuts(passage: str) -> Iterator[tuple[str, str]]:
    """Places between two words of a passage: up to 300 characters before, 60 or more after."""
    position = 140
    while (cut := passage.find(" ", position)) >= 0:
        end = passage.find(" ", cut + _CONTINUATION_CHARACTERS)
        continuation = passage[cut:end] if end >= 0 else ""
        if continuation and "  " not in continuation and len(continuation) < 2 * _CONTINUATION_CHARACTERS:
            start = max(0, cut - _CONTEXT_CHARACTERS)
            if start:
                start = passage.find(" ", start) + 1
            yield passage[start:cut], continuation
        position = cut + 2 * _CONTINUATION_CHARACTERS


_BUILDERS: dict[str, Callable[[Split, random.Random], Iterator[_Draft]]] = {
    "demo_arithmetic": _arithmetic,
    "demo_code": _code,
    "demo_prose": _prose,
}
