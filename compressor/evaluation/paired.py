"""What changed between two models' answers to a task, document by document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compressor.errors import EvaluationError
from compressor.evaluation.lm_eval import TaskResult
from compressor.evaluation.result import Result


@dataclass(frozen=True)
class Flips(Result):
    """Documents by their answers before and after: ``gained`` became right, ``lost`` wrong. ``p_value``: McNemar's
    exact two-sided test, how often a fair coin thrown gained + lost times is as uneven.
    """

    gained: int
    lost: int
    both_right: int
    both_wrong: int
    p_value: float


def paired(before: Mapping[str, TaskResult], after: Mapping[str, TaskResult]) -> dict[str, dict[str, Flips]]:
    """Flips by task and metric, a group's summed. EvaluationError where a task was not asked the same twice."""
    flips: dict[str, dict[str, Flips]] = {}
    shared = [name for name in before if name in after]
    for name in shared:
        _check_same_documents(before[name], after[name])
        pairs = [(before[sub], after[sub]) for sub in before[name].subtasks or (name,)]
        counted = {metric for one, other in pairs for metric in {*one.correct} & {*other.correct}}
        metrics = [metric for metric in before[name].metrics if metric in counted]
        flips[name] = {metric: _flips(pairs, metric) for metric in metrics}
    return {name: by_metric for name, by_metric in flips.items() if by_metric}


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p: min(1, 2 · Σ_{i ≤ min(gained, lost)} C(n, i) / 2ⁿ), n = gained + lost, in whole numbers."""
    total = gained + lost
    tail = term = 1  # C(n, 0)
    for i in range(min(gained, lost)):
        term = term * (total - i) // (i + 1)  # C(n, i + 1)
        tail += term
    return min(1.0, float(2 * tail / 2**total))


def _flips(pairs: Sequence[tuple[TaskResult, TaskResult]], metric: str) -> Flips:
    answers = [
        answer
        for one, other in pairs
        if metric in one.correct and metric in other.correct
        for answer in zip(one.correct[metric], other.correct[metric], strict=True)
    ]
    gained, lost = answers.count((False, True)), answers.count((True, False))
    return Flips(
        gained=gained,
        lost=lost,
        both_right=answers.count((True, True)),
        both_wrong=answers.count((False, False)),
        p_value=mcnemar(gained, lost),
    )


def _check_same_documents(before: TaskResult, after: TaskResult) -> None:
    if before.documents != after.documents:
        difference = f"{before.documents} documents before and {after.documents} after"
    elif before.doc_ids != after.doc_ids or before.subtasks != after.subtasks:
        difference = "other documents before than after"
    elif before.fingerprint != after.fingerprint:
        difference = "the same documents' ids, but other texts or few-shot examples, before and after"
    else:
        return
    raise EvaluationError(
        f"task {before.name!r} had {difference}: evaluate both models with the same limit, num_fewshot and seed."
    )
