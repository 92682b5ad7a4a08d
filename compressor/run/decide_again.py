"""Decide again from figures, without a model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compressor.errors import RecipeError, writing
from compressor.method import Decision, Method, OptionError
from compressor.model.structure import MoELayer
from compressor.observe.statistic import Gathered
from compressor.observe.statistics_file import load_statistics, merge_statistics
from compressor.plugins import load_plugins
from compressor.recipe.schema import parse_options
from compressor.report.html import page
from compressor.run.record import DECISION, FORMAT, decided_json, write_decision


def decide(
    statistics: str | Path | Sequence[str | Path],
    method: str = "expert_pruning",
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    overrides: Sequence[str] = (),
    without: Iterable[str] = (),
    plugin_files: Iterable[str | Path] = (),
    **options: Any,
) -> dict[str, Any]:
    """Decide again from figures gathered before: another count, criterion or blend, without the model.

    `statistics` is a `statistics.safetensors` that a run has left in its output's `compressor/` folder, or several of
    them, gathered on different text, which are added up. `options` are those of the method, such as `keep=64,
    criterion="reap"`; `overrides` are such options as texts (`keep=64`), read as a recipe's. Returns what decision.json
    holds, a decision's tensors with it: `apply` makes the smaller model from it. It is written to `output`, a file if
    that ends in .json, else a folder, with report.html beside it; tensors into a file of its name in .safetensors.

    Raises CheckpointError where the files do not belong together, RecipeError where options are wrong, the figures
    cannot answer them or the output exists (unless `overwrite`).
    """
    outputs = [] if output is None else [Path(output)]
    _refuse_existing(outputs, overwrite=overwrite)
    decided, experts = _decided(statistics, method, overrides, without, plugin_files, options)
    for one in outputs:
        _write_decision(one, decided, experts)
    return decided


def _decided(
    statistics: str | Path | Sequence[str | Path],
    method: str,
    overrides: Sequence[str],
    without: Iterable[str],
    plugin_files: Iterable[str | Path],
    options: Mapping[str, Any],
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """(what `decide` answers, what is said of each expert)."""
    files = [Path(statistics)] if isinstance(statistics, str | Path) else [Path(file) for file in statistics]
    plugins = load_plugins(without, files=plugin_files)
    named = ", ".join(map(str, files))
    if method not in plugins.methods:
        raise RecipeError(f"there is no method {method!r}; known are {', '.join(sorted(plugins.methods))}.")
    chosen = plugins.methods[method]
    made = chosen(parse_options(chosen.options_type, method, options, overrides), plugins.criteria)
    passes, about = merge_statistics([load_statistics(file) for file in files])
    names = _passes_to_decide_on(passes, about, named, method)
    layers = [MoELayer.described(layer) for layer in about["layers"]]
    try:
        made = _fitting(made, layers)
        wanted = made.measuring(layers)
        if wanted is not None and not wanted.candidates:
            raise OptionError(
                None, "what is asked for is chosen by what the model's answers lose: run a recipe for it."
            )
        usable = {name: passes[name] for name in names}
        decision, domains, experts = _decide_on_first(made, layers, usable, about, named)
    except OptionError as error:
        lost = ", ".join(about.get("dropped_figures", ()))
        lost = f" Of several files {lost} cannot be added up." if lost else ""
        raise RecipeError(f"{named}: {'.'.join(filter(None, (method, error.option)))}: {error}{lost}") from error
    entry = {
        "method": method,
        "version": made.version,
        "options": made.options.model_dump(mode="json"),
        "domains": domains,
    }
    done = decided_json(made, decision, entry)
    return {"format": FORMAT, "model": about["model"], "statistics": about["domains"], "passes": [done]}, experts


def _fitting(method: Method[Any], layers: Sequence[MoELayer]) -> Method[Any]:
    """The method, or its plainer one where these layers allow no more. Raises OptionError where neither can be."""
    try:
        method.check(layers)
    except OptionError:
        plainer = method.plainer()
        if plainer is None:
            raise
        method = plainer[0]
        method.check(layers)
    return method


def decide_each(
    keep: Sequence[str],
    output: Path,
    statistics: Sequence[Path],
    method: str,
    *,
    overwrite: bool,
    overrides: Sequence[str],
    without: Iterable[str],
    plugin_files: Iterable[str | Path],
) -> dict[str, dict[str, Any]]:
    """What `decide` answers for each `keep`, by its file: `output` with the count in its name. All or nothing."""
    stem = str(output).removesuffix(".json")
    asked = {f"{stem}-keep-{one}{str(output)[len(stem) :]}": [*overrides, f"--keep={one}"] for one in keep}
    _refuse_existing([*map(Path, asked)], overwrite=overwrite)
    found = {path: _decided(statistics, method, more, without, plugin_files, {}) for path, more in asked.items()}
    for path, (decided, experts) in found.items():
        _write_decision(Path(path), decided, experts)
    return {path: decided for path, (decided, _) in found.items()}


def _refuse_existing(outputs: Sequence[Path], *, overwrite: bool) -> None:
    for file in map(decision_file, outputs):
        if os.path.exists(file) and not overwrite:
            raise RecipeError(f"{file} exists. Choose another output, or say --overwrite.")


def _write_decision(output: Path, decided: Mapping[str, Any], experts: Mapping[str, Any]) -> None:
    """The decision, and a page beside it where the output is a folder."""
    file = decision_file(output)
    with writing(file, " Choose another output."):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_decision(file, decided)
        if file != output:
            [done] = decided["passes"]
            shown = {**decided, "passes": [{**done, "experts": experts}]}
            (file.parent / "report.html").write_text(page(shown), encoding="utf-8")


def decision_file(output: str | Path) -> Path:
    """Where a decision is written: the output itself, if its name ends in .json, else in that folder."""
    output = Path(output)
    return output if output.suffix == ".json" else output / DECISION


def _passes_to_decide_on(passes: Mapping[str, Any], about: Mapping[str, Any], named: str, method: str) -> list[str]:
    """The passes whose figures are of the original model's layers, this method's own first."""
    own = [name for name in about["passes"] if name.partition(".")[2] == method and passes.get(name)]
    names = [*own, *(name for name in about["passes"] if name not in own)]
    usable = [name for name in names if about["passes"][name]["layers"] == about["layers"] and passes.get(name)]
    if own and not set(own) & set(usable):
        raise RecipeError(
            f"{named}: the figures of {own[0]} are of what the passes before it left; run it on what those wrote."
        )
    if not usable:
        raise RecipeError(f"{named}: it holds no figures of the original model's layers.")
    if about["passes"][usable[0]]["progressive"]:
        raise RecipeError(
            f"{named}: its figures were gathered progressively, so answer nothing else; observe without `progressive`."
        )
    return usable


def _decide_on_first(
    method: Method[Any], layers: Sequence[MoELayer], passes: Mapping[str, Any], about: Mapping[str, Any], named: str
) -> tuple[Decision, list[str], Mapping[str, Any]]:
    """(decision, domains decided by, what is said of each expert), from the first pass that the method understands."""
    lacking: dict[str, KeyError] = {}
    for name, figures in passes.items():
        held_out = about["passes"][name].get("held_out", ())
        domains = [domain for domain in about["passes"][name]["domains"] if domain not in held_out]
        method.check_domains(domains)
        try:
            gathered = Gathered(figures, about["passes"][name]["domains"], held_out)
            decision = Decision.of(method.decide(layers, gathered))
            return decision, domains, method.by_expert(layers, gathered, decision)
        except KeyError as error:
            lacking[name] = error
    if lost := [str(error) for error in lacking.values() if error.args[0] in about.get("dropped_figures", ())]:
        raise RecipeError(f"{named}: {', '.join(lost)} of several files cannot be added up; decide by one of them.")
    lacks = "; ".join(f"{name} has no {error}" for name, error in lacking.items())
    raise RecipeError(f"{named}: its figures were gathered for another method than {method.name}: {lacks}.")
