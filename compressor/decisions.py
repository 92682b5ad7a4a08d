"""Decisions on their own: made again from figures gathered before, and applied to a checkpoint.

    statistics.safetensors ──► decide ──► decision.json ──► apply ──► a smaller checkpoint

Deciding needs no model. Applying is done on disk where it can be (`compressor.disk`): then nothing is loaded.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor import checkpoint as checkpoints
from compressor import disk, plan
from compressor.checkpoint import Checkpoint, LeftOut, OutputFolder
from compressor.errors import DiskError, RecipeError, UnsupportedModelError
from compressor.files import files_beside
from compressor.journal import write_json
from compressor.method import Decision, Method, OptionError
from compressor.moe import Adapter, Kept, MoELayer, MoEModel, structure_of
from compressor.page import page
from compressor.plugins import load_plugins
from compressor.progress import Progress
from compressor.recipe import parse_options
from compressor.record import (
    DECISION,
    FORMAT,
    CompressionResult,
    counts_and_rules_json,
    layers_json,
    left_out_json,
    model_json,
    original_ids_json,
    write_record,
)
from compressor.statistics import Gathered, load_statistics, merge_statistics
from compressor.workpiece import ids_left, random_batch, save_verified


def decide(
    statistics: str | Path | Sequence[str | Path],
    method: str = "expert_pruning",
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    overrides: Sequence[str] = (),
    without: Iterable[str] = (),
    **options: Any,
) -> dict[str, Any]:
    """Decide again from figures gathered before: another count, criterion or blend, without the model.

    `statistics` is a `statistics.safetensors` that a run has left in its output's `compressor/` folder, or several of
    them, gathered on different text, which are added up. `options` are those of the method, such as `keep=64,
    criterion="reap"`; `overrides` are such options as texts (`keep=64`), read as a recipe's. Returns what decision.json
    holds: `apply` makes the smaller model from it. It is written to `output`, a file if that ends in .json, else a
    folder, with report.html beside it.

    Raises CheckpointError where the files do not belong together, RecipeError where options are wrong, the figures
    cannot answer them or the output exists (unless `overwrite`).
    """
    file = None if output is None else decision_file(output)
    if file is not None and os.path.exists(file) and not overwrite:
        raise RecipeError(f"{file} exists. Choose another output, or say --overwrite.")
    files = [Path(statistics)] if isinstance(statistics, str | Path) else [Path(file) for file in statistics]
    plugins = load_plugins(without)
    named = ", ".join(map(str, files))
    if method not in plugins.methods:
        raise RecipeError(f"there is no method {method!r}; known are {', '.join(sorted(plugins.methods))}.")
    chosen = plugins.methods[method]
    made = chosen(parse_options(chosen.options_type, method, options, overrides), plugins.criteria)
    passes, about = merge_statistics([load_statistics(file) for file in files])
    names = _passes_to_decide_on(passes, about, named, method)
    layers = [MoELayer.described(layer) for layer in about["layers"]]
    try:
        made.check(layers)
        decision, domains = _decide_on_first(made, layers, {name: passes[name] for name in names}, about, named)
    except OptionError as error:
        raise RecipeError(f"{named}: {'.'.join(filter(None, (method, error.option)))}: {error}") from error
    done = {
        "method": method,
        "version": made.version,
        "options": made.options.model_dump(mode="json"),
        "domains": domains,
        "decision": decision,
    }
    decided = {"format": FORMAT, "model": about["model"], "statistics": about["domains"], "passes": [done]}
    if file is not None:
        _write_decision(file, decided, with_page=file != Path(output or ""))
    return decided


def _write_decision(file: Path, decided: Mapping[str, Any], *, with_page: bool) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, decided)
        if with_page:
            (file.parent / "report.html").write_text(page(decided), encoding="utf-8")
    except OSError as error:
        raise DiskError(f"{file}: it cannot be written there: {error.strerror}. Choose another output.") from error


def decision_file(output: str | Path) -> Path:
    """Where a decision is written: the output itself, if its name ends in .json, else in that folder."""
    output = Path(output)
    return output if output.suffix == ".json" else output / DECISION


def _passes_to_decide_on(passes: Mapping[str, Any], about: Mapping[str, Any], named: str, method: str) -> list[str]:
    """The passes whose figures are of the original model's layers, this method's own first."""
    own = [name for name in about["passes"] if name.partition(".")[2] == method]
    names = [*own, *(name for name in about["passes"] if name not in own)]
    usable = [name for name in names if about["passes"][name]["layers"] == about["layers"] and passes.get(name)]
    if own and not set(own) & set(usable):
        raise RecipeError(
            f"{named}: the figures of {own[0]} are of the model as the passes before it had left it, so they decide "
            f"nothing for the original. Run the pass again, on what those have written."
        )
    if not usable:
        raise RecipeError(f"{named}: it holds no figures of the original model's layers.")
    if about["passes"][usable[0]]["progressive"]:
        raise RecipeError(
            f"{named}: its figures were gathered progressively: each layer saw the layers before it as they were "
            f"pruned then, so they answer no other question. Observe again without `progressive`."
        )
    return usable


def _decide_on_first(
    method: Method[Any],
    layers: Sequence[MoELayer],
    passes: Mapping[str, Any],
    about: Mapping[str, Any],
    named: str,
) -> tuple[Decision, list[str]]:
    """(decision, domains decided by), from the first pass whose figures the method understands."""
    lacking: dict[str, KeyError] = {}
    for name, figures in passes.items():
        held_out = about["passes"][name].get("held_out", ())
        domains = [domain for domain in about["passes"][name]["domains"] if domain not in held_out]
        method.check_domains(domains)
        try:
            return method.decide(layers, Gathered(figures, about["passes"][name]["domains"], held_out)), domains
        except KeyError as error:
            lacking[name] = error
    lacks = "; ".join(f"{name} has no {error}" for name, error in lacking.items())
    raise RecipeError(f"{named}: its figures were gathered for another method than {method.name}: {lacks}.")


def apply(
    decision: str | Path | Mapping[str, Any],
    model: str,
    output: str | Path,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    other_model: bool = False,
    hard_link: bool = False,
    without: Iterable[str] = (),
    progress: Progress | None = None,
) -> CompressionResult:
    """Apply a decision made before, a decision.json, a record.json or what `decide` returns, to the original model.

    On disk, without loading the model, where no method of it needs weights (`Method.needs_weights`): then quantised
    models can be pruned too, and `hard_link` links files of weights that do not change, where the file system can.
    Otherwise the model is loaded, edited, saved, loaded again and compared. The output has a record, a page and a model
    card, as a run's has, with nothing measured.

    A model whose fingerprint is not that of the model decided on is refused, unless `other_model` says that this is
    meant: a fine-tuned version, say.
    """
    progress, plugins, output = progress or Progress(), load_plugins(without), Path(output)
    decided = _Decided.read(decision, plugins.methods)
    decided.refuse_original_ids()
    methods = [decided.method_of(done) for done in decided.passes]
    checkpoints.refuse_output_over_input(output, model)
    with OutputFolder(output, overwrite=overwrite) as folder, checkpoints.disk_errors_named(output):
        found = checkpoints.find_checkpoint(model, trust_remote_code=trust_remote_code)
        fingerprint = checkpoints.fingerprint(found.folder, checkpoints.verify_files(found.folder))
        if not other_model:
            decided.refuse_other_model(fingerprint, model)
        beside = files_beside(found.folder)
        if beside.left:
            progress.say(beside.note)
        application = _Application(decided, methods, plugins.adapters, found, folder, progress)
        record = application.on_disk(hard_link=hard_link)
        record["model"]["fingerprint"] = fingerprint
        record["versions"] = plugins.versions()
        record["output"] = str(output)
        if beside.left:
            record["left_behind"] = list(beside.left)
        about = {"model": decided.model} if decided.model else {}
        passes = {"passes": record["passes"]} | {
            key: record[key] for key in ("left_out", "left_behind") if key in record
        }
        write_json(folder.path / "compressor" / DECISION, {"format": FORMAT} | about | passes)
        write_record(folder.path, record)
        folder.finish()
    return CompressionResult(record, output, None, None)


@dataclass(frozen=True)
class _Application:
    """A decision that is applied to a checkpoint: its passes, one after another, on disk or in memory."""

    decided: _Decided
    methods: Sequence[Method[Any]]
    adapters: Sequence[Adapter]
    found: Checkpoint
    folder: OutputFolder
    progress: Progress

    def on_disk(self, *, hard_link: bool) -> dict[str, Any]:
        """Edit the checkpoint on disk, or in memory where that cannot be; returns the record."""
        needing = [method.name for method in self.methods if method.needs_weights]
        if needing:
            return self.in_memory(f"{needing[0]} needs weights")
        before = disk.meta_model(self.found, self.adapters)
        after = copy.deepcopy(before)
        passes = self._edit(after)
        left_out = self._left_out(type(after.model))
        is_quantised = self.found.quantisation is not None
        if is_quantised and after.skip_rules:
            raise UnsupportedModelError(
                f"{self.found.reference}: the checkpoint is quantised, and nothing reads one that skips experts: apply "
                f"the pruning passes alone."
            )
        try:
            edit = disk.plan_edit(self.found, before, after, left_out)
        except UnsupportedModelError as error:
            if is_quantised:
                raise
            return self.in_memory(str(error))
        beside = files_beside(self.found.folder).num_bytes
        self.folder.require_space(edit.num_bytes_to_write(hard_link=hard_link) + beside)
        with self.progress.task("editing on disk, without loading the model: bytes") as update:
            edit.write(self.folder.path, hard_link=hard_link, progress=update)
        return self._record(before.layers, after, passes, left_out)

    def in_memory(self, why: str) -> dict[str, Any]:
        """Load the model, edit it, save it, and compare; returns the record."""
        self.progress.say(f"loading {self.found.reference}: it cannot be edited on disk, because {why}")
        model = checkpoints.load_model(self.found, adapters=self.adapters)
        moe = MoEModel(model, structure_of(type(model), model.config, self.adapters))
        layers = moe.layers
        passes = self._edit(moe)
        left_out = self._left_out(type(model))
        save_verified(moe, self.found, self.folder, random_batch(model), left_out, self.adapters)
        return self._record(layers, moe, passes, left_out)

    def _edit(self, moe: MoEModel) -> list[dict[str, Any]]:
        """Carry the passes out; what the record says of them."""
        original_ids: Kept = {layer.path: list(range(layer.num_experts)) for layer in moe.layers}
        all_ids = original_ids
        passes = []
        for done, method in zip(self.decided.passes, self.methods, strict=True):
            num_removals = len(moe.removals)
            try:
                self._refuse_other_layers(done["decision"], moe)
                method.edit(moe, done["decision"])
            except (ValueError, UnsupportedModelError) as error:
                raise RecipeError(f"{self.decided.name} does not fit {self.found.reference}: {error}") from error
            decision = done["decision"]
            passes.append({**done, **original_ids_json(original_ids, all_ids), "decision": decision})
            original_ids = ids_left(original_ids, moe.removals[num_removals:])
        return passes

    def _refuse_other_layers(self, decision: Decision, moe: MoEModel) -> None:
        known = [layer.path for layer in moe.layers]
        for path in decision["layers"]:
            if path not in known:
                raise ValueError(f"it has no MoE layer {path!r}; its layers are {', '.join(known)}")

    def _left_out(self, cls: Any) -> LeftOut | None:
        left_out = checkpoints.find_left_out(self.found.folder, checkpoints.load_config(self.found), cls)
        if left_out:
            self.progress.say(plan.left_out_note(left_out))
        return left_out

    def _record(
        self, layers: Sequence[MoELayer], after: MoEModel, passes: list[dict[str, Any]], left_out: LeftOut | None
    ) -> dict[str, Any]:
        about = model_json(after.config, checkpoints.auto_class(type(after.model), after.config), layers)
        return {
            "format": FORMAT,
            "model": {"reference": self.found.reference, **about},
            **({"decided_on": self.decided.model} if self.decided.model else {}),
            "layers": layers_json(layers),
            "passes": passes,
            **left_out_json(left_out),
            **counts_and_rules_json(after),
        }


@dataclass(frozen=True)
class _Decided:
    """A decision.json or record.json that was read: what messages call it, its format, the model that it was decided
    on, and its passes.
    """

    name: str
    format: int
    model: Mapping[str, Any]
    passes: Sequence[Mapping[str, Any]]
    methods: Mapping[str, type[Method[Any]]]

    @classmethod
    def read(cls, source: str | Path | Mapping[str, Any], methods: Mapping[str, type[Method[Any]]]) -> _Decided:
        """From a file, or what would be in one. Raises RecipeError where it is none."""
        name = "the decision" if isinstance(source, Mapping) else str(source)
        try:
            data = source if isinstance(source, Mapping) else json.loads(Path(source).read_text(encoding="utf-8"))
            if data["format"] not in (1, FORMAT):
                raise ValueError(f"its format is {data['format']}, this version reads {FORMAT}")
            keys = ("method", "version", "options", "domains", "decision")
            passes = [{key: done[key] for key in keys if key in done or key != "domains"} for done in data["passes"]]
            if not passes:
                raise ValueError("it has no passes")
            for done in passes:
                if not all(isinstance(layer, dict) for layer in done["decision"]["layers"].values()):
                    raise ValueError("its layers are no mappings")
            return cls(name, data["format"], data.get("model") or {}, passes, methods)
        except KeyError as error:
            raise RecipeError(f"{name}: not a decision that a run has written: it has no key {error}") from error
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise RecipeError(f"{name}: not a decision that a run has written: {error}") from error

    def method_of(self, done: Mapping[str, Any]) -> Method[Any]:
        """The method that made a pass's decision, with the options it was made with."""
        if done["method"] not in self.methods:
            raise RecipeError(f"{self.name}: no installed plugin offers the method {done['method']!r}.")
        method = self.methods[done["method"]]
        try:
            return method(parse_options(method.options_type, done["method"], done["options"]))
        except RecipeError as error:
            raise RecipeError(f"{self.name}: options of {done['method']!r} that it does not know: {error}") from error

    def refuse_other_model(self, fingerprint: str, reference: str) -> None:
        """Raise RecipeError unless this is the model that was decided on, as far as that is known."""
        decided_on = self.model.get("fingerprint")
        if decided_on is not None and decided_on != fingerprint:
            raise RecipeError(
                f"{self.name} was decided on {self.model.get('reference')} ({decided_on}), and {reference} is another "
                f"model ({fingerprint}). If it should be applied all the same, say so with --other-model."
            )

    def refuse_original_ids(self) -> None:
        """Raise RecipeError where ids are not those that their pass saw: of a second pruning pass in format 1."""
        pruning = [done for done in self.passes if any("kept" in one for one in done["decision"]["layers"].values())]
        if self.format == 1 and len(pruning) > 1:
            raise RecipeError(
                f"{self.name}: it is of format 1, in which {len(pruning)} pruning passes name experts by the ids of "
                f"the original model; this version reads ids that each pass saw (format {FORMAT}). Run the recipe "
                f"again, or apply the decision with the version that wrote it."
            )
