"""One pass: observe → decide → edit, and the files that the first two leave."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from compressor.checkpoint.output import OutputFolder
from compressor.data.sequences import Sequences, TokenBatch
from compressor.edit.backend import Backend
from compressor.edit.layer_edits import edited_meanwhile
from compressor.errors import PluginError, RecipeError, answered
from compressor.method import Decision, Method
from compressor.model.moe_model import Kept, MoEModel
from compressor.model.structure import MoELayer
from compressor.observe.layerwise import Original
from compressor.observe.measuring import Candidate, Measured
from compressor.observe.statistic import (
    ExpertInputs,
    Gathered,
    ImageTokens,
    InputStatistic,
    JoinedStatistic,
    Statistic,
    linear_sites,
)
from compressor.observe.statistics_file import save_statistics
from compressor.recipe.schema import ResolvedPass
from compressor.run.job import Job
from compressor.run.record import DECISION, FORMAT, STATISTICS, agreed, decided_json, original_ids_json, write_decision
from compressor.run.texts import num_tokens, slice_of
from compressor.wording import counted

_DECIDED = ("method", "version", "options", "domains", "held_out", "original_ids", "decision", "tensors", "description")
"""What decision.json says of a pass; the record says more, such as how long it took."""


def observe(
    job: Job,
    piece: Backend,
    resolved: ResolvedPass,
    batches: Sequence[TokenBatch],
    original: Callable[[], Original],
    name: str | None = None,
) -> Gathered:
    """The pass's figures, kept by the journal under `name`; `original` is asked for where it is needed."""
    moe, method, num_idle = piece.moe, resolved.method, job.processes.size - len(batches)
    if num_idle > 0 and method.needs_text:
        job.progress.say(
            f"{counted(len(batches), 'calibration batch')}: {counted(num_idle, 'process')} with nothing to observe"
        )
    wanted, linears = statistics_of(method, moe)
    journal = job.observation(name)
    if not method.needs_text:
        title = f"{resolved.spec.method}: weighing experts, without text"
        return Gathered(piece.weigh(wanted, title=title, journal=journal), ())
    domains = list(dict.fromkeys(batch.domain for batch in batches))
    held_out = list(dict.fromkeys(batch.domain for batch in batches if batch.held_out))

    @contextmanager
    def edited(path: str, figures: Mapping[str, Tensor]) -> Iterator[None]:
        decision = decide(job, resolved, [moe.layer(path)], Gathered({path: figures}, domains, held_out))
        with job.loaded.at_pass(resolved):
            preview = method.preview(moe, decision)
            with edited_meanwhile(moe, method, decision, moe.layer(path)) if preview is None else preview:
                yield

    if any(batch.images for batch in batches):
        for path, one in wanted.items():
            parts = one.parts if isinstance(one, JoinedStatistic) else [one]
            wanted[path] = JoinedStatistic([*parts, ImageTokens(moe.layer(path))])
    measured = _measured(job, moe, resolved, batches, domains)
    if not (wanted or linears or measured):
        return Gathered({}, domains, held_out)
    figures = piece.observe(
        batches,
        wanted,
        title=f"{resolved.spec.method}: observing",
        edited=edited if method.progressive else None,
        journal=journal,
        linears=linears,
        original=original() if method.needs_original else None,
        measured=measured,
    )
    return Gathered(figures, domains, held_out)


def _measured(
    job: Job, moe: MoEModel, resolved: ResolvedPass, batches: Sequence[TokenBatch], domains: Sequence[str]
) -> Measured | None:
    """What is to be measured of the method's candidates, if they are. Raises PluginError where that cannot be."""
    method, wanted = resolved.method, resolved.method.measuring(moe.layers)
    if wanted is None or not wanted.candidates:
        return None
    if method.progressive or method.needs_original:
        raise PluginError(
            f"{method.name}: candidates are measured neither in progressive mode nor beside the original."
        )

    def candidates(path: str, figures: Mapping[str, Tensor]) -> list[Candidate]:
        with job.loaded.at_pass(resolved):
            offered = method.candidates(moe.layers, moe.layer(path), Gathered({path: figures}, domains))
        decisions = [agreed(Decision.of(one), job.processes) for one in offered]
        return [Candidate(one["layers"][path], {path: _context(method, moe, one)}) for one in decisions]

    text = slice_of(batches, wanted.tokens)
    if (tokens := num_tokens(text)) < _FEW_TOKENS:
        job.progress.say(
            f"{method.name}: what the answers lose is measured on {tokens:,} tokens, so it is known roughly, as the "
            f"standard errors in the record say: give {_FEW_TOKENS:,} or more"
        )
    return Measured(text, candidates, wanted.candidates)


_FEW_TOKENS = 1000
"""On fewer, what is measured tells little: its standard error is about as large as what layers differ by."""


def _context(method: Method[Any], moe: MoEModel, decision: Decision) -> Callable[[], AbstractContextManager[object]]:
    def context() -> AbstractContextManager[object]:
        found = method.preview(moe, decision)
        assert found is not None, f"{method.name} has candidates and no preview"
        return found

    return context


def statistics_of(method: Method[Any], moe: MoEModel) -> tuple[dict[str, Statistic], dict[str, InputStatistic]]:
    """A method's accumulators, by layer path; and those that see what linear maps beside experts are given, by the
    map's path: their figures are among their layer's. Raises PluginError where they cannot be fed.
    """
    found: dict[str, Statistic] = {}
    linears: dict[str, InputStatistic] = {}
    for layer in moe.layers:
        sites = {site.name: method.input_statistic(site) for site in linear_sites(moe.model, layer)}
        inputs = {name: statistic for name, statistic in sites.items() if statistic is not None}
        beside = {name: statistic for name, statistic in inputs.items() if name in layer.linears}
        within = {name: statistic for name, statistic in inputs.items() if name not in beside}
        linears |= {layer.linears[name].removesuffix(".weight"): statistic for name, statistic in beside.items()}
        shown = [ExpertInputs(moe.model, within, beside)] if inputs else []
        own = answered(
            f"{method.name}: statistic(layer)", method.statistic(layer), Statistic | None, "a Statistic or None"
        )
        parts = [*([] if own is None else [own]), *shown]
        if parts:
            found[layer.path] = JoinedStatistic(parts) if len(parts) > 1 else parts[0]
    if linears and method.progressive:
        raise PluginError(
            f"{method.name}: it is progressive, and in progressive mode it cannot be seen what linear maps are given."
        )
    return found, linears


def decide(job: Job, resolved: ResolvedPass, layers: Sequence[MoELayer], figures: Gathered) -> Decision:
    """The pass's decision, which is the first process's."""
    with job.loaded.at_pass(resolved):
        return agreed(_decided(resolved.method, layers, figures), job.processes)


def _decided(method: Method[Any], layers: Sequence[MoELayer], figures: Gathered) -> Decision:
    """The method's decision. Raises PluginError for an answer that is none."""
    who, expected = f"{method.name}: decide(layers, statistics)", 'a mapping {"layers": {PATH: {…}}}'
    answer = answered(who, method.decide(layers, figures), Mapping, expected)
    if not isinstance(answer.get("layers"), Mapping):
        raise PluginError(
            f"{who} answers a mapping of {', '.join(map(repr, answer)) or 'nothing'}, expected {expected}."
        )
    decision = Decision.of(answer)
    try:
        json.dumps(decision)
    except (TypeError, ValueError) as error:
        raise PluginError(f"{who} answers what is no JSON: {error}. Tensors go into Decision(…, tensors).") from error
    return decision


def decide_measured(
    job: Job, piece: Backend, resolved: ResolvedPass, figures: Gathered, batches: Sequence[TokenBatch], name: str
) -> Decision:
    """The pass's decision; of several alternatives the one by which the model's answers lose least."""
    method, wanted = resolved.method, resolved.method.measuring(piece.layers)
    with job.loaded.at_pass(resolved):
        offered = method.alternatives(piece.layers, figures) if wanted else {}
    if len(offered) < 2:
        return decide(job, resolved, piece.layers, figures)
    assert wanted is not None
    decisions = {id(one): agreed(Decision.of(one), job.processes) for one in offered.values()}
    text = slice_of(batches, wanted.tokens_compared)

    def measured() -> dict[str, Any]:
        contexts = [
            {path: _context(method, piece.moe, alone) for path, alone in one.by_layer().items()}
            for one in decisions.values()
        ]
        found = piece.compared(text, contexts, title=f"{resolved.spec.method}: comparing {len(contexts)} choices")
        lost = {which: _lost(method, by_domain) for which, by_domain in zip(decisions, found, strict=True)}
        return {what: lost[id(one)] for what, one in offered.items()}

    found = job.noted(f"alternatives {name}", measured)
    best = min(offered, key=lambda what: found[what]["cost"])
    chosen = {"name": best, "tokens": num_tokens(text), "alternatives": found}
    decided = decisions[id(offered[best])]
    return Decision({**decided, "chosen": chosen}, decided.tensors)


def _lost(method: Method[Any], by_domain: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    kl = {domain: lost for domain, (lost, _) in by_domain.items()}
    errors = {domain: None if math.isnan(error) else error for domain, (_, error) in by_domain.items()}
    return {"cost": method.cost(kl), "kl": kl, "standard_error": errors}


def edit(
    job: Job, piece: Backend, resolved: ResolvedPass, decision: Decision, probe: TokenBatch, name: str
) -> dict[str, float]:
    """Carry the decision out; how far the answers on `probe` are from those expected."""
    with job.loaded.at_pass(resolved):
        return piece.edit(resolved.method, decision, probe, name)


def entry_json(
    resolved: ResolvedPass,
    figures: Gathered,
    held_out: Sequence[Sequences],
    decision: Decision,
    original_ids: Kept,
    all_ids: Kept,
) -> dict[str, Any]:
    """What the record says of a pass that has been decided on."""
    entry = {
        "method": resolved.spec.method,
        "version": resolved.method.version,
        "options": resolved.method.options.model_dump(mode="json"),
        "domains": [name for name in figures.domains if name not in figures.held_out],
        **({"held_out": [one.to_json() for one in held_out]} if held_out else {}),
        **original_ids_json(original_ids, all_ids),
    }
    return decided_json(resolved.method, decision, entry)


# The files -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PassFiles:
    """What passes leave in an output's folder, if there is one. `about`: the model and text it is about."""

    folder: OutputFolder | None
    about: Mapping[str, Any]
    gathered: dict[str, Gathered] = field(default_factory=dict)
    described: dict[str, Any] = field(default_factory=dict)

    def add_figures(self, name: str, resolved: ResolvedPass, layers: Sequence[MoELayer], figures: Gathered) -> None:
        """Write the statistics, of this pass and those before it."""
        if self.folder is None:
            return
        self.gathered[name] = figures
        self.described[name] = {
            "domains": list(figures.domains),
            **({"held_out": list(figures.held_out)} if figures.held_out else {}),
            "progressive": resolved.method.progressive,
            "layers": [layer.description() for layer in layers],
        }
        file = self.folder.path / "compressor" / STATISTICS
        save_statistics(file, self.gathered, {**self.about, "passes": self.described})

    def write_decisions(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Write the decisions of the passes so far, of which the record will say `entries`."""
        if self.folder is None:
            return
        passes = [{key: one[key] for key in _DECIDED if key in one} for one in entries]
        written = {"format": FORMAT, "model": self.about["model"], "passes": passes}
        write_decision(self.folder.path / "compressor" / DECISION, written)

    @contextmanager
    def kept_if_undecided(self, name: str, resolved: ResolvedPass) -> Iterator[None]:
        """Keep the original model's figures where an error ends the run: they may answer something else."""
        try:
            yield
        except RecipeError as error:
            is_of_original = self.described.get(name, {}).get("layers") == self.about["layers"]
            if self.folder is None or not is_of_original or resolved.method.progressive:
                raise
            kept = self.folder.target.with_name(f"{self.folder.target.name}.{STATISTICS}")
            shutil.copyfile(self.folder.path / "compressor" / STATISTICS, kept)
            raise RecipeError(
                f"{error} What was observed is kept: `compressor decide {kept} --method {resolved.spec.method} --set "
                f"…` decides by it without the model, and `compressor apply` carries that out."
            ) from error
