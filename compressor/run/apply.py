"""Apply a decision to a checkpoint: on disk where that can be (`checkpoint_edit`), and then nothing is loaded."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.checkpoint import headers
from compressor.checkpoint.classes import auto_class
from compressor.checkpoint.extra_layers import Choice, LeftOut, find_left_out
from compressor.checkpoint.files import files_beside
from compressor.checkpoint.find import Checkpoint, find_checkpoint, load_config
from compressor.checkpoint.layerwise_weights import StreamedWeights
from compressor.checkpoint.load import load_model
from compressor.checkpoint.output import OutputFolder, disk_errors_named, refuse_output_over_input
from compressor.edit.checkpoint_edit import meta_model, plan_edit
from compressor.edit.extra_layers import ExtraLayers, plan_extra_layers
from compressor.edit.layer_edits import LiveWeights, NotOnDiskError, StoredWeights, Weights, edit_layers, finish
from compressor.edit.verify import ids_left, random_batch, save_verified
from compressor.errors import RecipeError, UnsupportedModelError
from compressor.machine.progress import Progress
from compressor.method import Decision, Method, OptionError, is_external
from compressor.model.adapter import Adapter, structure_of
from compressor.model.moe_model import Kept, MoEModel
from compressor.model.structure import MoELayer
from compressor.plugins import load_plugins
from compressor.recipe.schema import parse_options
from compressor.run import check
from compressor.run.record import (
    DECISION,
    FORMAT,
    RECORD,
    TENSORS,
    CompressionResult,
    counts_and_rules_json,
    decided_json,
    layers_json,
    left_out_json,
    model_json,
    origin_json,
    original_ids_json,
    read_tensors,
    serving_json,
    write_decision,
    write_record,
)


def apply(
    decision: str | Path | Mapping[str, Any],
    model: str,
    output: str | Path,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    other_model: bool = False,
    hard_link: bool = False,
    mtp: Choice = "drop",
    without: Iterable[str] = (),
    plugin_files: Iterable[str | Path] = (),
    progress: Progress | None = None,
) -> CompressionResult:
    """Apply a decision made before, a decision.json, a record.json or what `decide` returns, to the original model.

    On disk, without loading the model: one decoder layer's weights are read where a method asks for them, and none of
    a quantised model. `hard_link` links files of weights that do not change, where the file system can. Where the files
    do not allow it, the model is loaded, edited, saved, loaded again and compared. The output has a record, a page and
    a model card, as a run's has, with nothing measured.

    `mtp`: what becomes of extra prediction layers, as in a recipe.

    A model whose fingerprint is not that of the model decided on is refused, unless `other_model` says that this is
    meant: a fine-tuned version, say.
    """
    progress, plugins, output = progress or Progress(), load_plugins(without, files=plugin_files), Path(output)
    decided = _Decided.read(decision, plugins.methods)
    methods = [decided.method_of(done) for done in decided.passes]
    refuse_output_over_input(output, model)
    with OutputFolder(output, overwrite=overwrite) as folder, disk_errors_named(output):
        found = find_checkpoint(model, trust_remote_code=trust_remote_code)
        fingerprint = headers.fingerprint(found.folder, found.shards)
        if not other_model:
            decided.refuse_other_model(fingerprint, model)
        beside = files_beside(found.folder)
        if beside.left:
            progress.say(beside.note)
        application = _Application(decided, methods, plugins.adapters, found, folder, progress, mtp)
        record = application.on_disk(hard_link=hard_link)
        record["model"]["fingerprint"] = fingerprint
        record["versions"] = plugins.versions()
        record["output"] = str(output)
        record |= origin_json(found, folder.path)
        if beside.left:
            record["left_behind"] = list(beside.left)
        about = {"model": decided.model} if decided.model else {}
        passes = {"passes": record["passes"]} | {
            key: record[key] for key in ("left_out", "left_behind") if key in record
        }
        write_decision(folder.path / "compressor" / DECISION, {"format": FORMAT} | about | passes)
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
    mtp: Choice

    def on_disk(self, *, hard_link: bool) -> dict[str, Any]:
        """Edit the checkpoint on disk, or in memory where that cannot be; returns the record."""
        before = meta_model(self.found, self.adapters)
        after = copy.deepcopy(before)
        is_quantised = self.found.quantisation is not None
        values = self.folder.path / ".values"
        weights = StoredWeights(self._streamed, values, is_quantised=is_quantised)
        try:
            passes = self._edit(after, weights, before.layers)
        except NotOnDiskError as error:
            return self.in_memory(str(error))
        left_out, extra = self._extra_layers(before.layers, after)
        if is_quantised and after.skip_rules:
            raise UnsupportedModelError(
                f"{self.found.reference}: no reader skips on a quantised checkpoint; apply the pruning passes alone."
            )
        try:
            edit = plan_edit(self.found, before, after, left_out, weights.edited)
        except UnsupportedModelError as error:
            if is_quantised:
                raise
            return self.in_memory(str(error))
        beside = files_beside(self.found.folder).num_bytes
        self.folder.require_space(edit.num_bytes_to_write(hard_link=hard_link) + beside)
        with self.progress.task("editing on disk, without loading the model: bytes") as update:
            edit.write(self.folder.path, hard_link=hard_link, progress=update)
        shutil.rmtree(values, ignore_errors=True)
        return self._record(before.layers, after, passes, left_out, extra)

    def in_memory(self, why: str) -> dict[str, Any]:
        """Load the model, edit it, save it, and compare; returns the record."""
        self.progress.say(f"loading {self.found.reference}: it cannot be edited on disk, because {why}")
        model = load_model(self.found, adapters=self.adapters)
        moe = MoEModel(model, structure_of(type(model), model.config, self.adapters))
        layers = moe.layers
        passes = self._edit(moe, LiveWeights(moe))
        left_out, extra = self._extra_layers(layers, moe)
        save_verified(moe, self.found, self.folder, random_batch(model), left_out, self.adapters)
        return self._record(layers, moe, passes, left_out, extra)

    def _streamed(self) -> StreamedWeights:
        return StreamedWeights(load_model(self.found, device="meta", adapters=self.adapters), self.found)

    def _edit(self, moe: MoEModel, weights: Weights, stored: Sequence[MoELayer] | None = None) -> list[dict[str, Any]]:
        """Carry the passes out, for the record; `stored`: the layers as they stay where weights are, if they do."""
        original_ids: Kept = {layer.path: list(range(layer.num_experts)) for layer in moe.layers}
        all_ids = original_ids
        passes = []
        for done, method in zip(self.decided.passes, self.methods, strict=True):
            num_removals = len(moe.removals)
            try:
                ids = None if stored is None else original_ids
                endings, _ = edit_layers(method, done["decision"], stored or moe.layers, weights, ids)
                finish(moe, method, done["decision"], endings)
            except NotOnDiskError:
                raise
            except OptionError as error:
                why = error.__cause__ or error
                raise RecipeError(f"{self.decided.name} does not fit {self.found.reference}: {why}") from error
            except (ValueError, UnsupportedModelError) as error:
                raise RecipeError(f"{self.decided.name} does not fit {self.found.reference}: {error}") from error
            entry = {**done, **original_ids_json(original_ids, all_ids)}
            passes.append(decided_json(method, done["decision"], entry))
            original_ids = ids_left(original_ids, moe.removals[num_removals:])
        return passes

    def _extra_layers(self, before: Sequence[MoELayer], after: MoEModel) -> tuple[LeftOut | None, ExtraLayers | None]:
        """Those that the model's class leaves out, and what becomes of them; refused before anything is written."""
        left_out = find_left_out(self.found, load_config(self.found), type(after.model), self.mtp)
        if left_out:
            self.progress.say(check.left_out_note(left_out))
        elif self.mtp != "drop":
            raise RecipeError(f"{self.found.reference}: mtp: {self.mtp}: it has {check.NO_EXTRA_LAYERS}.")
        return left_out, plan_extra_layers(left_out, before, after.layers, self.adapters)

    def _record(
        self,
        layers: Sequence[MoELayer],
        after: MoEModel,
        passes: list[dict[str, Any]],
        left_out: LeftOut | None,
        extra: ExtraLayers | None,
    ) -> dict[str, Any]:
        about = model_json(after.config, auto_class(type(after.model), after.config), layers)
        return {
            "format": FORMAT,
            "model": {"reference": self.found.reference, **about},
            **({"decided_on": self.decided.model} if self.decided.model else {}),
            "layers": layers_json(layers),
            "passes": passes,
            **left_out_json(left_out),
            **({"mtp": extra.write(self.folder.path)} if extra else {}),
            **counts_and_rules_json(after),
            **serving_json(self.folder.path, after, layers, extra_layers=bool(left_out_json(left_out))),
        }


@dataclass(frozen=True)
class _Decided:
    """A decision.json or record.json that was read: what messages call it, the model decided on, and its passes."""

    name: str
    model: Mapping[str, Any]
    passes: Sequence[Mapping[str, Any]]
    methods: Mapping[str, type[Method[Any]]]

    @classmethod
    def read(cls, source: str | Path | Mapping[str, Any], methods: Mapping[str, type[Method[Any]]]) -> _Decided:
        """From a file, or what would be in one. Raises RecipeError where it is none."""
        name = "the decision" if isinstance(source, Mapping) else str(source)
        try:
            data = source if isinstance(source, Mapping) else json.loads(Path(source).read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise ValueError(f"its format is {data['format']}, this version reads {FORMAT}")
            keys = ("method", "version", "options", "domains", "decision")
            passes = [{key: done[key] for key in keys if key in done or key != "domains"} for done in data["passes"]]
            for number, done in enumerate(passes):
                found = data["passes"][number]
                done["decision"] = _with_tensors(found["decision"], found.get("tensors", {}), source, number)
            if not passes:
                raise ValueError("it has no passes")
            for done in passes:
                if not all(isinstance(layer, dict) for layer in done["decision"]["layers"].values()):
                    raise ValueError("its layers are no mappings")
            return cls(name, data.get("model") or {}, passes, methods)
        except KeyError as error:
            raise RecipeError(f"{name}: not a decision that a run has written: it has no key {error}") from error
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise RecipeError(f"{name}: not a decision that a run has written: {error}") from error

    def method_of(self, done: Mapping[str, Any]) -> Method[Any]:
        """The method that made a pass's decision, with the options it was made with."""
        if done["method"] not in self.methods:
            raise RecipeError(f"{self.name}: no installed plugin offers the method {done['method']!r}.")
        method = self.methods[done["method"]]
        if is_external(method):
            raise RecipeError(
                f"{self.name}: {method.name} turns a checkpoint into another one, which only a run does: run its "
                f"recipe, or apply the passes before it alone."
            )
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


def _with_tensors(decided: Mapping[str, Any], shapes: Any, source: Any, number: int) -> Decision:
    """A pass's decision with the tensors that it says it has. Raises ValueError where they are not there, or others."""
    if isinstance(decided, Decision) or not shapes:
        decision = Decision.of(decided)
    else:
        beside = _beside(source)
        if beside is None or not beside.exists():
            where = "they are not with it" if beside is None else f"{beside} is not there"
            raise ValueError(f"passes.{number} has tensors, and {where}")
        decision = Decision(decided, read_tensors(beside, number))
    for path, of_layer in decision.tensors.items():
        if bad := [name for name, tensor in of_layer.items() if not tensor.isfinite().all()]:
            raise ValueError(f"passes.{number}: the tensor {bad[0]} of {path} holds NaN or infinity")
    if decision.shapes != (shapes or {}):
        found, named = (
            {(p, n): s for p, of in one.items() for n, s in of.items()} for one in (decision.shapes, shapes)
        )
        path, name = min(key for key in found.keys() | named.keys() if found.get(key) != named.get(key))
        raise ValueError(
            f"passes.{number}: the tensor {name} of {path} should have the shape {named.get((path, name))}, found "
            f"{found.get((path, name))}"
        )
    return decision


def _beside(source: Any) -> Path | None:
    """The file that holds a decision's tensors: beside decision.json and record.json the same one."""
    if isinstance(source, Mapping):
        return None
    path = Path(source)
    return path.with_name(DECISION).with_suffix(TENSORS) if path.name == RECORD else path.with_suffix(TENSORS)
