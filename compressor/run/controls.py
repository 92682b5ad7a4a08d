"""Random decisions beside a pass's own: would chance have done as well?

A random decision is its method's (`Method.control`), and is measured on the model that the pass saw, under the method's
preview, of which every edit is checked to do what it says. Losses on calibration text are those of masked experts, so
they are told where the preview does what masking does. A method that draws nothing, or has no preview, has no control,
and the record says so by name. The pass's own perplexities and divergences are those of the edited model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from compressor.data.sequences import Sequences, TokenBatch
from compressor.edit.backend import Backend
from compressor.edit.verify import compare_answers
from compressor.errors import VerificationError
from compressor.evaluation.fidelity import Answers, Fidelity, beside_original
from compressor.evaluation.perplexity import Perplexity
from compressor.method import Decision, Method
from compressor.model.moe_model import MoEModel
from compressor.recipe.schema import ResolvedPass
from compressor.run.job import Job
from compressor.selection.reference import SetLosses, relative_losses


@contextmanager
def beside(
    job: Job,
    piece: Backend,
    resolved: ResolvedPass,
    decision: Decision,
    batches: Sequence[TokenBatch],
    texts: Sequence[Sequences],
    answers: Mapping[str, Answers],
    probe: TokenBatch,
    name: str,
) -> Iterator[dict[str, Any]]:
    """Around a pass's edit: random decisions, measured before it, beside what it has made of the model. What is yielded
    has them afterwards, as the pass's entry says them: `random`, if the recipe asks for it. The last pass's own
    figures are those of the evaluation, see `with_ours`. `answers` are the original's to each text.
    """
    entry: dict[str, Any] = {}
    evaluation = job.recipe.evaluate
    if evaluation is None or not evaluation.random:
        yield entry
        return
    with job.timed("random decisions"):
        seeds = [job.recipe.seed + number for number in range(evaluation.random)]
        drawn = draw(piece, resolved.method, decision, seeds)
        if not isinstance(drawn, str):
            how = (piece, resolved.method, [decision, *drawn], probe, batches, texts, answers, evaluation.batch_size)
            found = job.noted(f"random {name}", lambda: {"seeds": seeds, **measure(*how)})
    yield entry
    if isinstance(drawn, str):
        entry["random"] = {"problem": f"{resolved.method.name} {drawn}"}
        return
    with job.timed("random decisions"):
        entry["random"] = found
        if resolved is not job.loaded.passes[-1]:

            def ours() -> dict[str, Any]:
                return {
                    text.name: figures(*beside_original(piece, text, evaluation.batch_size, answers[text.name]))
                    for text in texts
                }

            entry |= with_ours(entry, job.noted(f"beside random {name}", ours))


def figures(perplexity: Perplexity, fidelity: Fidelity) -> dict[str, float]:
    """What decisions are compared by on a text."""
    return {"perplexity": perplexity.perplexity, "kl": fidelity.kl}


def with_ours(entry: dict[str, Any], ours: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """A pass's entry with the edited model's `figures` by text, if it has those of random decisions."""
    random = entry.get("random", {})
    found = {
        key: {name: {"ours": ours[name][key], **values} for name, values in random[key].items()}
        for key in ("perplexity", "kl")
        if key in random
    }
    return {**entry, "random": random | found} if found else entry


def draw(piece: Backend, method: Method[Any], decision: Decision, seeds: Sequence[int]) -> list[Decision] | str:
    """The method's random decisions, or why there are none."""
    drawn = [method.control(decision, piece.layers, seed) for seed in seeds]
    if problem := next((one for one in drawn if isinstance(one, str)), None):
        return problem
    if method.preview(piece.moe, decision) is None:
        return "has no preview, under which random decisions could be measured"
    return [Decision.of(one) for one in drawn if not isinstance(one, str)]


def measure(
    piece: Backend,
    method: Method[Any],
    decisions: Sequence[Decision],
    probe: TokenBatch,
    batches: Sequence[TokenBatch],
    texts: Sequence[Sequences],
    answers: Mapping[str, Answers],
    batch_size: int,
) -> dict[str, Any]:
    """Random decisions, measured: losses on the calibration text, beside those of the pass's own, which comes first,
    and perplexities and divergences, which `with_ours` completes.
    """
    losses = _losses(piece, decisions, batches) if batches and _masks(piece, method, decisions, probe) else []
    if not losses:
        piece.progress.say("random decisions are compared by perplexity alone: no text tells their losses")
    by_text: dict[str, list[dict[str, float]]] = {}
    for text in texts:
        values = by_text[text.name] = []
        with piece.progress.task(f"random decisions: perplexity {text.name}") as update:
            for decision in decisions[1:]:
                with piece.previewed(method.preview, decision):
                    values.append(figures(*beside_original(piece, text, batch_size, answers[text.name])))
                update(len(values), len(decisions) - 1)
    found: dict[str, Any] = {"relative_loss": {"ours": losses[0], "random": losses[1:]}} if losses else {}
    for key in ("perplexity", "kl"):
        found[key] = {name: {"random": [one[key] for one in values]} for name, values in by_text.items()}
    return found


def _masked(moe: MoEModel, decision: Decision) -> AbstractContextManager[object]:
    """The preview of a method that drops experts and does no more."""
    return moe.masked({path: one["kept"] for path, one in decision["layers"].items()}, top_k=decision.get("top_k"))


def _masks(piece: Backend, method: Method[Any], decisions: Sequence[Decision], probe: TokenBatch) -> bool:
    """Whether the method's preview does what masking the experts that are not kept does."""
    if not all("kept" in layer for one in decisions for layer in one["layers"].values()):
        return False
    answers = []
    for preview in (method.preview, _masked):
        with piece.previewed(preview, decisions[0]):
            answers.append(piece.logits(probe))
    try:
        compare_answers(*answers)
    except VerificationError:
        return False
    return True


def _losses(piece: Backend, decisions: Sequence[Decision], batches: Sequence[TokenBatch]) -> list[float]:
    """Of each decision the mean relative loss of the layers; none where no text or no layer can tell."""
    statistics = {}
    for layer in piece.layers:
        sets = [decision["layers"][layer.path]["kept"] for decision in decisions]
        if layer.watch_problem is None and any(len(kept) < layer.num_experts for kept in sets):
            statistics[layer.path] = SetLosses(layer, sets, decisions[0].get("top_k"))
    if not statistics:
        return []
    figures = piece.observe(batches, statistics, title="random decisions: loss")
    relative_LS = torch.stack([relative_losses(one) for one in figures.values()])
    return relative_LS.mean(0).tolist()
