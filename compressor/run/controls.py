"""Random decisions beside a pass's own: would chance have done as well?

A random decision keeps as many experts of every layer, and is measured on the model that the pass saw, with the other
experts masked. That is what the method would have done with it as long as its edit does what masking does; a method
that changes more, such as one that merges experts, has no control, and the record says so by name. The pass's own
perplexities are those of the edited model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from compressor.data.sequences import Sequences, TokenBatch
from compressor.edit.in_memory import InMemory
from compressor.edit.verify import compare_answers
from compressor.errors import VerificationError
from compressor.method import Decision, Method
from compressor.model.moe_model import Kept, MoEModel
from compressor.recipe.schema import ResolvedPass
from compressor.run.job import Job
from compressor.selection.reference import SetLosses, random_kept, relative_losses


@contextmanager
def beside(
    job: Job,
    piece: InMemory,
    resolved: ResolvedPass,
    decision: Decision,
    batches: Sequence[TokenBatch],
    texts: Sequence[Sequences],
    probe: TokenBatch,
    name: str,
) -> Iterator[dict[str, Any]]:
    """Around a pass's edit: random decisions, measured before it, beside what it has made of the model. What is yielded
    has them afterwards, as the pass's entry says them: `random`, if the recipe asks for it. The last pass's own
    perplexities are those of the evaluation, see `with_evaluated`.
    """
    entry: dict[str, Any] = {}
    evaluation = job.recipe.evaluate
    if evaluation is None or not evaluation.random:
        yield entry
        return
    with job.timed("random decisions"):
        chosen, found = AsMasked(piece, resolved.method, decision, probe), {}
        if chosen.problem is None:
            seeds = [job.recipe.seed + number for number in range(evaluation.random)]
            how = (chosen, seeds, batches, texts, evaluation.batch_size)
            found = job.noted(f"random {name}", lambda: measure(piece, *how))
    yield entry
    with job.timed("random decisions"):
        chosen.after(piece)
        entry["random"] = found if chosen.problem is None else {"problem": chosen.problem}
        if chosen.problem is None and resolved is not job.loaded.passes[-1]:
            batch_size = evaluation.batch_size
            ours = job.noted(
                f"perplexity after {name}",
                lambda: {text.name: piece.perplexity(text, batch_size).perplexity for text in texts},
            )
            entry["random"] = with_ours(found, ours)


def with_evaluated(entry: dict[str, Any], perplexity: Mapping[str, float]) -> dict[str, Any]:
    """The last pass's entry with the perplexities of the evaluation, if it has random decisions beside it."""
    if "perplexity" not in entry.get("random", ()):
        return entry
    return {**entry, "random": with_ours(entry["random"], perplexity)}


class AsMasked:
    """Whether a pass does what masking the experts that it drops would do. `problem` says why not, None if it does; the
    last word is `after` the edit.
    """

    def __init__(self, piece: InMemory, method: Method[Any], decision: Decision, probe: TokenBatch) -> None:
        self.kept, self.top_k = _kept(piece.moe, decision), decision.get("top_k")
        self.probe, self.name = probe, method.name
        self._expected = _otherwise(piece.moe, self.kept, self.top_k)
        self._masked_NV: Tensor | None = None
        self.problem: str | None = None
        if all(len(self.kept[layer.path]) == layer.num_experts for layer in piece.moe.layers):
            self.problem = f"{self.name} drops no experts, so there is nothing to draw at random"
        else:
            with piece.masked(self.kept, top_k=self.top_k):
                self._masked_NV = piece.logits(probe)

    def after(self, piece: InMemory) -> None:
        """Look at what the edit has made of the model."""
        if self.problem is None and self._masked_NV is not None:
            self._compare(piece.answers(self.probe))
        if self.problem is None and _otherwise(piece.moe) != self._expected:
            self.problem = self._more

    def _compare(self, answers_NV: Tensor) -> None:
        assert self._masked_NV is not None
        try:
            compare_answers(self._masked_NV, answers_NV)
        except VerificationError:
            self.problem = self._more

    @property
    def _more(self) -> str:
        return (
            f"{self.name} changes more than which experts stay, and says of no random ones what it would do with them"
        )


def _kept(moe: MoEModel, decision: Decision) -> dict[str, list[int]]:
    """Layer path → the experts that stay; all of a layer of which the decision says nothing."""
    layers = decision["layers"]
    return {one.path: list(layers.get(one.path, {}).get("kept", range(one.num_experts))) for one in moe.layers}


def _otherwise(moe: MoEModel, kept: Kept | None = None, top_k: int | None = None) -> tuple[Any, ...]:
    """What a model does with its experts beside having them: how it skips them, and how many a token chooses; with
    `kept` and `top_k` as it will be when these are all that has changed.
    """
    rules = (
        moe.skip_rules if kept is None else {path: one.of_experts(kept[path]) for path, one in moe.skip_rules.items()}
    )
    return rules, [top_k or layer.top_k for layer in moe.layers]


def measure(
    piece: InMemory,
    chosen: AsMasked,
    seeds: Sequence[int],
    batches: Sequence[TokenBatch],
    texts: Sequence[Sequences],
    batch_size: int,
) -> dict[str, Any]:
    """Random decisions of the same size, measured: losses on the calibration text, beside the pass's own, and
    perplexities, which `with_ours` completes.
    """
    layers, top_k = piece.moe.layers, chosen.top_k
    others = [random_kept(layers, {path: len(ids) for path, ids in chosen.kept.items()}, seed) for seed in seeds]
    losses = _losses(piece, [chosen.kept, *others], batches, top_k)
    perplexity: dict[str, Any] = {}
    for text in texts:
        values = perplexity[text.name] = []
        with piece.progress.task(f"random decisions: perplexity {text.name}") as update:
            for kept in others:
                with piece.masked(kept, top_k=top_k):
                    values.append(piece.perplexity(text, batch_size).perplexity)
                update(len(values), len(others))
    found: dict[str, Any] = {"seeds": list(seeds)}
    if losses:
        found["relative_loss"] = {"ours": losses[0], "random": losses[1:]}
    return found | {"perplexity": {name: {"random": values} for name, values in perplexity.items()}}


def with_ours(found: Mapping[str, Any], perplexity: Mapping[str, float]) -> dict[str, Any]:
    """The same with the edited model's perplexities, by text."""
    by_text = {name: {"ours": perplexity[name], **values} for name, values in found["perplexity"].items()}
    return {**found, "perplexity": by_text}


def _losses(piece: InMemory, sets: Sequence[Kept], batches: Sequence[TokenBatch], top_k: int | None) -> list[float]:
    """Of each set the mean over the layers of the loss as a fraction of the layer's output; none where no text or no
    layer can tell.
    """
    statistics = {
        layer.path: SetLosses(layer, [kept[layer.path] for kept in sets], top_k)
        for layer in piece.moe.layers
        if layer.watch_problem is None and any(len(kept[layer.path]) < layer.num_experts for kept in sets)
    }
    if not batches:
        piece.progress.say("random decisions: there is no calibration text, so they are compared by perplexity alone")
    if not batches or not statistics:
        return []
    figures = piece.observe(batches, statistics, title="random decisions: loss")
    relative_LS = torch.stack([relative_losses(one) for one in figures.values()])
    return relative_LS.mean(0).tolist()
