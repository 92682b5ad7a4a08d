"""What a recipe will do, and what a model is made of, from config and recipe alone: no weight is read."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compressor.checkpoint import classes
from compressor.checkpoint.classes import architecture, max_positions, model_class, next_token_problem
from compressor.checkpoint.conversion import is_by_expert
from compressor.checkpoint.extra_layers import LeftOut, find_left_out, spellings
from compressor.checkpoint.files import files_beside, indexed_bytes
from compressor.checkpoint.find import Checkpoint, find_checkpoint, load_config, quantiser_of, read_config
from compressor.checkpoint.headers import first_dtype
from compressor.checkpoint.load import load_model, load_tokenizer
from compressor.checkpoint.output import OutputFolder
from compressor.checkpoint.quantization import (
    format_of,
    loading_problem,
    reading_problem,
    what_helps,
    without_quantisation,
)
from compressor.checkpoint.quiet import quiet_transformers
from compressor.data.images import UNSEEN, reads_images
from compressor.data.packing import held_out_name
from compressor.data.sequences import tokenizer_of
from compressor.edit.checkpoint_edit import meta_model, plan_edit
from compressor.edit.extra_layers import plan_extra_layers
from compressor.edit.layer_edits import refuse_constants
from compressor.errors import CompressorError, PluginError, UnsupportedModelError, answered
from compressor.machine.environment import available_memory
from compressor.machine.memory_estimate import Placement
from compressor.machine.progress import Progress
from compressor.method import Method, OptionError, Plan, check_skipping, is_external
from compressor.model.adapter import Adapter, structure_of
from compressor.model.modules import shared_tensors
from compressor.model.moe_model import refuse_quantised
from compressor.model.skipping.install import fitting_rules
from compressor.model.skipping.rule import SkipRule
from compressor.model.structure import MoELayer, Structure
from compressor.observe.rehearsal import Rehearsal, rehearse
from compressor.recipe.schema import LoadedRecipe, Recipe, ResolvedPass
from compressor.report.figures import serving_said
from compressor.run import readiness
from compressor.run.elsewhere import HERE, Machine, computing
from compressor.run.memory import Problem, disk_problem, placement, work_of
from compressor.run.preview import Limits, Preview
from compressor.run.record import recorded
from compressor.run.trackers import check_trackers
from compressor.serving.facts import facts_of
from compressor.serving.rules import Serve, answers
from compressor.wording import counted, human_bytes


def check(
    loaded: LoadedRecipe,
    adapters: Sequence[Adapter] = (),
    *,
    folder: OutputFolder | None = None,
    model: Any = None,
    live_on: Sequence[str] = (),
    tokenizer: Any = None,
    progress: Progress | None = None,
    machine: Machine = HERE,
) -> Preview:
    """Whether the recipe can work, and what will be kept and dropped: reads no weights, writes nothing; a run begins
    with it. `folder`: the output, if this process writes it; `model` (on `live_on`) and `tokenizer` replace the
    recipe's; `machine`: another one to work on. Raises CompressorError, of its kinds, at the place in the recipe.
    """
    recipe, progress = loaded.recipe, progress or Progress()
    machine.require_budgets(loaded)
    check_trackers(loaded)
    readiness.check_surroundings(loaded, folder, model, is_here=machine.num_gpus is None)
    found: Checkpoint | None
    with loaded.at("model"):
        if model is None:
            found = find_checkpoint(recipe.model, trust_remote_code=recipe.trust_remote_code, weights=False)
            config = without_quantisation(load_config(found))
            quantiser_of(found)  # refuses what cannot be read
            cls = model_class(found, config)
        else:
            found, config, cls = origin_of(recipe, model), model.config, type(model)
            refuse_quantised(config)
        left_out = find_left_out(found, config, cls, recipe.mtp) if found else None
        if tokenizer is None and found is not None:
            tokenizer = load_tokenizer(found)
    reader = readiness.reader_of(loaded, found, config, tokenizer)
    tokenizer = tokenizer_of(tokenizer)
    preview = _preview(loaded, found, config, cls, left_out, adapters, live_on=live_on, machine=machine)
    needs, from_disk = preview.plan["needs"], preview.place.weights == "disk"
    if found is not None and model is None:
        preview.plan["notes"] += _check_weights(loaded, found, adapters, are_compared=from_disk, progress=progress)
    beside = files_beside(found.folder) if found else None
    if beside and beside.left:
        preview.plan["notes"].append(beside.note)
    with loaded.at("output"):
        if folder is not None:
            num_bytes = needs["disk"] + (beside.num_bytes if beside else 0)
            folder.require_space(num_bytes, who="the run, with what it keeps of the text,")
    readiness.check_text(loaded, reader, preview.limits, progress)
    tasks = readiness.read_tasks(loaded, tokenizer, preview.limits, config, from_disk=from_disk, progress=progress)
    has_folders = model is None and recipe.output is not None
    preview.plan["notes"] += readiness.check_server(loaded, tasks, tokenizer, has_folders=has_folders)
    return dataclasses.replace(preview, tokenizer=tokenizer, reader=reader, tasks=tasks)


def origin_of(recipe: Recipe, model: Any) -> Checkpoint | None:
    """The checkpoint that a live model came from, None where it is not there."""
    name = model.config._name_or_path
    if not name or not Path(name, "config.json").exists():
        return None
    return Checkpoint(recipe.model, Path(name), recipe.trust_remote_code)


def measuring(
    loaded: LoadedRecipe,
    adapters: Sequence[Adapter] = (),
    progress: Progress | None = None,
    *,
    is_compared: bool = False,
) -> Preview:
    """How the recipe's model is measured alone, known to us or not; from disk where it does not fit and can be read by
    layer; `is_compared`: beside another one. Reads no weights. Raises UnsupportedModelError for a quantised one that
    transformers cannot load.
    """
    recipe, progress = loaded.recipe, progress or Progress()
    readiness.check_surroundings(loaded, None, None)
    with loaded.at("model"):
        found = find_checkpoint(recipe.model, trust_remote_code=recipe.trust_remote_code, weights=False)
        quantisation, config = found.quantisation, without_quantisation(load_config(found))
        cls = model_class(found, config)
        tokenizer = load_tokenizer(found)
    reader = readiness.reader_of(loaded, found, config, tokenizer)
    _check_evaluation(loaded, cls, config)
    structure, unknown, devices = None, None, _devices(recipe, HERE)
    try:
        structure = structure_of(cls, config, adapters)
    except UnsupportedModelError as error:
        unknown = str(error)
    layers = structure.layers if structure else ()
    with loaded.at("model"):
        dtype = _dtype(recipe.dtype, config, found)
    model = _on_meta(cls, config, dtype)
    work = work_of(loaded, model, config, layers, dtype, (0, 0), is_compared=is_compared)
    problems: dict[str, Problem | None] = {"disk": (("weights",), unknown) if unknown else None, "memory": None}
    if structure:
        problems["disk"] = disk_problem(loaded, structure, work, config, is_live=False)
    if quantisation is not None and (why := reading_problem(quantisation)):
        problems["disk"] = (("weights",), why)
        if here := loading_problem(quantisation, devices[0]):
            raise UnsupportedModelError(
                f"{found.reference}: the checkpoint is quantised ({format_of(quantisation)}), and transformers cannot "
                f"load it here: {here}."
            )
    place, limits = placement(loaded, work, problems, devices), _limits(model)
    readiness.check_text(loaded, reader, limits, progress)
    tasks = readiness.read_tasks(
        loaded, tokenizer, limits, config, from_disk=place.weights == "disk", progress=progress
    )
    for sentence in readiness.check_server(loaded, tasks, tokenizer, has_folders=None):
        progress.say(sentence)
    read: dict[str, Any] = {"tokenizer": tokenizer, "reader": reader, "tasks": tasks}
    used, auto = devices[: place.num_gpus], classes.auto_class(cls, config)
    return Preview(found, structure, auto, None, {}, limits, place, used, work.tokens_at_once, **read)


def _check_weights(
    loaded: LoadedRecipe, found: Checkpoint, adapters: Sequence[Adapter], *, are_compared: bool, progress: Progress
) -> list[str]:
    """Raise CheckpointError where headers show damage, or another config, unless they `are_compared`. Returns notes."""
    if found.awaits_weights:
        return ["the model's weights are not here yet, so only its config was looked at"]
    with loaded.at("model"):
        num_tensors = sum(len(shard.tensors) for shard in found.shards)
        if num_tensors > _MANY_TENSORS:
            progress.say(f"comparing the names and shapes of {num_tensors:,} tensors with the config")
        if not are_compared:
            load_model(found, device="meta", adapters=adapters)
    return []


_MANY_TENSORS = 10_000
"""More take longer than a moment."""


def _check_external(loaded: LoadedRecipe, notes: list[str]) -> None:
    """Raise RecipeError where a checkpoint cannot be turned into another one, which the notes say."""
    evaluation = loaded.recipe.evaluate
    for resolved in (one for one in loaded.passes if is_external(one.method)):
        name = resolved.method.name
        if loaded.recipe.mtp != "drop":
            raise loaded.error(("mtp",), f"{name} turns a checkpoint into another one, without them; say `mtp: drop`")
        if loaded.recipe.output is None:
            raise loaded.error(
                resolved.path, f"{name} turns a checkpoint into another one, in files, so it needs an `output`"
            )
        if evaluation and evaluation.each_pass:
            raise loaded.error(
                ("evaluate", "each_pass"), f"{name} turns a checkpoint into another one, which is not measured alone"
            )
        if not resolved.method.leaves_model and resolved is not loaded.passes[-1]:
            raise loaded.error(
                resolved.path, f"{name} leaves what is not loaded here, so no pass goes on with it: put it last"
            )
        if not resolved.method.leaves_model and evaluation:
            raise loaded.error(
                ("evaluate",),
                f"{name} leaves what is not loaded here, so there is nothing to measure: leave `evaluate` out, and "
                f"measure what goes into it in a run of its own",
            )
        notes.append(f"{name} turns the checkpoint into another one; what that takes only {name} knows")


def _check_evaluation(loaded: LoadedRecipe, cls: Any, config: Any) -> None:
    """Raise RecipeError for what cannot be measured: how a model continues text that does not, one pass of one."""
    evaluation = loaded.recipe.evaluate
    if loaded.recipe.evaluate and loaded.recipe.evaluate.each_pass and len(loaded.passes) == 1:
        raise loaded.error(
            ("evaluate", "each_pass"), "the recipe has one pass, so this would have no effect; leave it out"
        )
    without_text = [one for one in loaded.passes if not loaded.sources_of(one)]
    if evaluation and evaluation.random and not evaluation.texts and without_text:
        raise loaded.error(
            ("evaluate", "random"),
            f"{without_text[0].method.name} reads no text, so there is nothing to compare random decisions on: give "
            f"`perplexity`, or calibration text",
        )
    problem = next_token_problem(cls, config)
    if evaluation and evaluation.generation and not problem and not cls.can_generate():
        raise loaded.error(("evaluate", "generation"), f"{cls.__name__} has no `generate`, by which it would write")
    if not problem:
        return
    cannot = f"{cls.__name__} {problem}, so it does not predict the next token of a text and cannot be measured"
    for key in ("perplexity", "fidelity", "tasks"):
        if evaluation and getattr(evaluation, key):
            raise loaded.error(
                ("evaluate", key),
                f"{cannot} like this; leave `{key}` out (an empty `evaluate: {{}}` still measures sizes)",
            )
    for place, source in readiness.own_tasks(loaded):
        raise loaded.error(place, f"{cannot} on {source.title}, as this method has it")


@dataclass(frozen=True)
class _Look:
    """What is known of a model by class, config and headers."""

    found: Checkpoint | None
    config: Any
    cls: Any
    left_out: LeftOut | None
    adapters: Sequence[Adapter]
    live_on: Sequence[str]
    """The devices that hold the weights already."""
    machine: Machine
    structure: Structure
    rules: Mapping[str, SkipRule]
    dtype: torch.dtype
    model: Any
    """On the meta device."""
    rehearsal: Rehearsal

    @property
    def stored(self) -> Checkpoint | None:
        """The checkpoint whose weights are read, if they are."""
        return None if self.live_on else self.found

    @property
    def quantisation(self) -> Mapping[str, Any] | None:
        return self.stored.quantisation if self.stored else None


def _preview(
    loaded: LoadedRecipe,
    found: Checkpoint | None,
    config: Any,
    cls: Any,
    left_out: LeftOut | None,
    adapters: Sequence[Adapter],
    *,
    live_on: Sequence[str],
    machine: Machine,
) -> Preview:
    """What follows from class, config and headers; `live_on`: the devices that hold the weights already."""
    _check_evaluation(loaded, cls, config)
    with loaded.at("model"):
        structure = structure_of(cls, config, adapters)
        rules = fitting_rules(structure, config)
        dtype = _dtype(loaded.recipe.dtype, config, None if live_on else found)
    model = _on_meta(cls, config, dtype)
    given = (found, config, cls, left_out, adapters, live_on, machine)
    return _as_can_be(loaded, _Look(*given, structure, rules, dtype, model, rehearse(model, structure)))


def _as_can_be(loaded: LoadedRecipe, look: _Look) -> Preview:
    """What a recipe does, with plainer methods if it is refused with theirs, which is noted then."""
    try:
        return _planned(loaded, look)
    except CompressorError as error:
        plainer = [(one, one.method.plainer()) for one in loaded.passes]
        without = {one.method.name: found[1] for one, found in plainer if found}
        if not without:
            raise
        passes = (dataclasses.replace(one, method=found[0]) if found else one for one, found in plainer)
        preview = _planned(dataclasses.replace(loaded, passes=tuple(passes)), look)
        preview.plan["notes"] += [f"{name} does without {what}: {error}" for name, what in without.items()]
        return preview


def _planned(loaded: LoadedRecipe, look: _Look) -> Preview:
    """What a recipe does with a model. Raises CompressorError where it cannot."""
    structure, is_live, quantisation = look.structure, bool(look.live_on), look.quantisation
    notes = [left_out_note(look.left_out)] if look.left_out else []
    notes += _skipping_notes(look.rules) + _constants_notes(structure.layers)
    read = [source for one in loaded.passes for source in loaded.sources_of(one)]
    if read and reads_images(look.config) and not any(getattr(source, "images", False) for source in read):
        notes.append(UNSEEN)
    layers, plans = _check_passes(loaded, look, notes)
    _check_external(loaded, notes)
    carried = _check_extra_layers(loaded, look, layers)
    _check_random(loaded, structure.layers, layers)
    about = _about(look.config, structure, layers, look.dtype)
    serving = _serving(loaded, look, layers, plans, notes)
    plan_json = {"model": loaded.recipe.model, **about, "serving": serving, "notes": notes}
    work = work_of(loaded, look.model, look.config, structure.layers, look.dtype, (*plan_json["bytes"].values(),))
    work = dataclasses.replace(work, changes_values=any(plan.changes_values for plan in plans), carried=carried)
    problems = {
        "disk": disk_problem(loaded, structure, work, look.config, look.rehearsal.carries, is_live=is_live),
        "memory": (("weights",), f"the checkpoint is quantised ({format_of(quantisation)})") if quantisation else None,
    }
    devices = tuple(look.live_on) or _devices(loaded.recipe, look.machine)
    place = placement(loaded, work, problems, devices, is_live=is_live)
    if place.weights == "disk":  # there tensors stay as they are stored; in memory all get one dtype
        with loaded.at("model"):
            stored = look.stored
            sizes = _stored(stored, structure, layers, look.left_out, look.adapters) if stored else None
            if stored and sizes is None and quantisation and (total := indexed_bytes(stored.folder)):
                sizes = total, round(total * plan_json["bytes"]["after"] / plan_json["bytes"]["before"])
        if sizes is not None:
            work = dataclasses.replace(
                work, bytes_stored=sizes[0], bytes_after=sizes[1], is_quantised=quantisation is not None
            )
            place = placement(loaded, work, problems, devices)
            plan_json["bytes"] = {"before": sizes[0], "after": sizes[1] + carried}
        if quantisation is not None:
            notes.append(_quantised_note(quantisation, look.dtype, loaded.recipe.model, is_estimate=sizes is None))
    used, limits = devices[: place.num_gpus], _limits(look.model)
    if loaded.recipe.device == "auto" and not is_live:
        notes.append(auto_note(used, place, look.machine))
    available = loaded.recipe.memory or available_memory()
    needs = work.to_json(place, device=used[0], available=available)
    embedding, head = look.model.get_input_embeddings().weight, look.model.get_output_embeddings()
    at_work = structure.num_parameters - (0 if getattr(head, "weight", None) is embedding else embedding.numel())
    plan_json["needs"] = needs | computing(loaded, structure.layers, at_work, needs, look.machine)
    auto_class = classes.auto_class(look.cls, look.config)
    found = (look.found, structure, auto_class, look.left_out, plan_json, limits)
    return Preview(*found, place, used, work.tokens_at_once, loaded=loaded)


def _about(config: Any, structure: Structure, after: Sequence[MoELayer], dtype: torch.dtype) -> dict[str, Any]:
    """What a plan says of a model, whose layers will be those of `after`, all in one dtype."""
    pairs = list(zip(structure.layers, after, strict=True))
    smaller = structure.with_counts({new.path: new.num_experts for new in after})
    smaller = smaller.with_constants({new.path: new.constants for new in after})
    sizes = {"before": structure.num_parameters, "after": smaller.num_parameters}
    return {
        "architecture": architecture(config),
        "dtype": str(dtype).removeprefix("torch."),
        "layers": [
            {
                "path": old.path,
                "num_experts": old.num_with_weights,
                "top_k": new.top_k,
                "kept": new.num_with_weights,
                "dropped": old.num_with_weights - new.num_with_weights,
            }
            for old, new in pairs
        ],
        "parameters": sizes,
        "expert_parameters": sum(layer.num_with_weights * layer.parameters_per_expert for layer in structure.layers),
        "bytes": {when: number * dtype.itemsize for when, number in sizes.items()},
    }


def _on_meta(cls: Any, config: Any, dtype: torch.dtype) -> Any:
    with torch.device("meta"), quiet_transformers():
        return cls(copy.deepcopy(config)).to(dtype)


def _limits(model: Any) -> Limits:
    return Limits(model.get_input_embeddings().weight.shape[0], max_positions(model.config))


def _check_random(loaded: LoadedRecipe, before: Sequence[MoELayer], after: Sequence[MoELayer]) -> None:
    """Raise RecipeError where random decisions are asked for, no pass drops an expert and none has others to draw."""
    evaluation, counts = loaded.recipe.evaluate, [[layer.num_experts for layer in layers] for layers in (before, after)]
    draws = any(type(one.method).control is not Method.control for one in loaded.passes)
    if loaded.passes and evaluation and evaluation.random and counts[0] == counts[1] and not draws:
        raise loaded.error(
            ("evaluate", "random"), "no pass drops experts, so there is nothing to draw at random; leave it out"
        )


def _serving(
    loaded: LoadedRecipe, look: _Look, layers: Sequence[MoELayer], plans: Sequence[Plan], notes: list[str]
) -> list[dict[str, Any]]:
    """Which engines will run the result; notes are added. Raises RecipeError where the one asked for will not."""
    leaf, found = look.structure.num_experts_leaf, {name for plan in plans for name in plan.found}
    raw = read_config(look.found.folder) if look.found else look.config.to_dict()
    raw |= dict.fromkeys({*spellings(leaf.holder(look.config), leaf.key), "rope_theta"} - raw.keys())  # as it is saved
    before, padded = [layer.num_experts for layer in look.structure.layers], any(plan.padded for plan in plans)
    about: dict[str, Any] = {"most": max(before), "found": found, "padded": padded, "serve": loaded.recipe.serve}
    raw["architectures"] = raw.get("architectures") or [look.cls.__name__]
    about["extra_layers"] = look.left_out is not None and look.left_out.choice == "drop"
    answered = answers(facts_of(raw, layers, **about))
    if "num_experts" in found and not padded:
        notes.append("what an even split would lose, which every engine reads, is said where counts are measured")
    wanted = loaded.recipe.serve.engine if loaded.recipe.serve else None
    for one in (one for one in answered if one["engine"] == wanted and one["answer"] != "yes"):
        if one["answer"] == "no":
            raise loaded.error(("serve",), f"{wanted} will not run the result: {serving_said(one)}")
        notes.append(f"serve: whether {wanted} will run the result is not known: {serving_said(one)}")
    return answered


def _check_passes(loaded: LoadedRecipe, look: _Look, notes: list[str]) -> tuple[Sequence[MoELayer], list[Plan]]:
    """The layers as they will be after all passes, whose notes are added, and the passes' plans. Raises RecipeError at
    the option that cannot be met by what the passes before it leave.
    """
    structure, is_quantised = look.structure, look.quantisation is not None
    layers, plans, turned = with_rules(structure.layers, look.rules), list[Plan](), ""
    for resolved in loaded.passes:
        plan = check_pass(loaded, resolved, layers)
        with loaded.at_pass(resolved):
            sees_images = any(getattr(source, "images", False) for source in loaded.sources_of(resolved))
            rehearsal = Rehearsal() if sees_images else look.rehearsal
            _refuse_undecidable(resolved.method, layers, plan, look.model, rehearsal)
            if sees_images and is_external(resolved.method):
                raise OptionError(None, f"{resolved.method.name} reads text alone: calibrate it without `images`")
            _refuse_packed(resolved.method, layers, look.model)
        if turned and (stored := next((layer.bits for layer in layers if layer.bits), None)):
            raise loaded.error(
                resolved.path,
                f"{turned} has stored weights with {stored:g} bits by then, in files that no pass goes on with: put "
                f"{resolved.method.name} before it",
            )
        turned = resolved.method.name if is_external(resolved.method) else turned
        if is_quantised and any(
            new.skip_rule not in (None, old.with_count(new.num_experts).skip_rule)
            for old, new in zip(layers, plan.layers, strict=True)
        ):
            raise loaded.error(
                resolved.path, "the checkpoint is quantised, and nothing reads a quantised one that skips experts"
            )
        if is_quantised and any(len(a.constants) < len(b.constants) for a, b in zip(layers, plan.layers, strict=True)):
            raise loaded.error(
                resolved.path, "the checkpoint is quantised, and no reader puts constants beside quantised experts"
            )
        if plan.changes_values and is_quantised:
            raise loaded.error(
                resolved.path,
                f"{resolved.method.name} changes numbers of experts, and the checkpoint is quantised: edit the "
                f"unquantised one, then quantise the result",
            )
        _check_domains(loaded, resolved)
        layers = plan.layers
        plans.append(plan)
        notes += plan.notes
    for zeros in dict.fromkeys(layer.zeros for layer in layers if layer.zeros):
        number = sum(layer.zeros == zeros for layer in layers)
        notes.append(f"weights of {counted(number, 'MoE layer')} will have {zeros} zeros, stored as numbers")
    with loaded.at("passes"):
        pairs = zip(structure.layers, layers, strict=True)
        refuse_constants(look.model, structure, [a.path for a, b in pairs if b.constants and not a.constants])
    return layers, plans


def _check_extra_layers(loaded: LoadedRecipe, look: _Look, after: Sequence[MoELayer]) -> int:
    """Bytes of extra prediction layers that the output gets. Raises where there are none, or they cannot be carried."""
    if loaded.recipe.mtp == "drop":
        return 0
    if look.left_out is None:
        raise loaded.error(("mtp",), f"the model has {NO_EXTRA_LAYERS}")
    if not look.left_out.found.has_weights:
        return look.left_out.num_bytes or 0
    with loaded.at("mtp"):
        extra = plan_extra_layers(look.left_out, look.structure.layers, after, look.adapters)
    return sum(extra.sizes) if extra else 0


def _refuse_undecidable(
    method: Method[Any], layers: Sequence[MoELayer], plan: Plan, model: Any, rehearsal: Rehearsal
) -> None:
    """Raise OptionError where text cannot tell which experts of a layer stay."""
    if not method.needs_text:
        return
    for layer in (layer for layer in layers if layer.path in rehearsal.unreached):
        statistic = method.statistic(layer)
        if statistic is not None and not statistic.optional:
            raise OptionError(
                None,
                f"{layer.path}: no text comes to this layer (a layer for images, say), so its experts cannot be "
                f"judged. Prune the other layers only: name them under `keep:`",
            )
    pairs = zip(layers, plan.layers, strict=True)
    smaller = {old.path for old, new in pairs if new.num_with_weights < old.num_with_weights}
    for path, other, name in shared_tensors(model, {layer.path: layer.tensors for layer in layers}):
        if {path, other} & smaller:
            raise OptionError(
                None,
                f"{path} and {other} share their weights ({name}), so they must keep the same experts, and each would "
                f"be decided by the text that comes to it. Decide without text (`criterion: aimer`), or leave both",
            )


def _refuse_packed(method: Method[Any], layers: Sequence[MoELayer], model: Any) -> None:
    """Raise OptionError where a method needs tensors of each expert, and files have none."""
    for layer in layers if method.needs_matrices else ():
        if not is_by_expert(model, layer):
            raise OptionError(
                None,
                f"{layer.path}: files hold the matrices of all its experts in one tensor, and only those with a tensor "
                f"of their own can be stored otherwise. Another program may, behind the run (docs/then-quantise.md)",
            )


def with_rules(layers: Sequence[MoELayer], rules: Mapping[str, SkipRule]) -> Sequence[MoELayer]:
    """The layers of a model that skips by these rules."""
    return [dataclasses.replace(layer, skip_rule=rules.get(layer.path)) for layer in layers]


def _stored(
    found: Checkpoint,
    structure: Structure,
    smaller: Sequence[MoELayer],
    left_out: LeftOut | None,
    adapters: Sequence[Adapter],
) -> tuple[int, int] | None:
    """Bytes of a checkpoint's files, now and afterwards, by headers; None where they are not here. Raises
    UnsupportedModelError where experts cannot be taken out.
    """
    if not found.has_weights:
        return None
    before = meta_model(found, adapters)
    after = copy.deepcopy(before)
    kept = {}
    for layer, left in zip(structure.layers, smaller, strict=True):
        size, per_group = layer.num_experts // layer.num_groups, left.num_experts // layer.num_groups
        kept[layer.path] = [expert for expert in range(layer.num_experts) if expert % size < per_group]
    after.keep(kept)
    after.replace({
        layer.path: {expert: torch.empty(structure.width_at(layer), device="meta") for expert in left.constants}
        for layer, left in zip(structure.layers, smaller, strict=True) if left.constants and not layer.constants
    })  # fmt: skip
    edit = plan_edit(found, before, after, left_out)
    return edit.bytes_before, edit.bytes_after


def _devices(recipe: Recipe, machine: Machine) -> tuple[str, ...]:
    """Devices that the recipe allows; by `auto` all GPUs of the machine, or its CPU."""
    return (machine.gpus or ("cpu",)) if recipe.device == "auto" else (recipe.device,)


# The same, in words ----------------------------------------------------------------------------------------


def _skipping_notes(rules: Mapping[str, SkipRule]) -> list[str]:
    """That the model skips experts already, if it does."""
    kinds = ", ".join(dict.fromkeys(rule.rule for rule in rules.values()))
    return (
        [f"the model skips experts in {counted(len(rules), 'layer')} ({kinds}), by `config.compressor`"]
        if rules
        else []
    )


def _constants_notes(layers: Sequence[MoELayer]) -> list[str]:
    """That experts of these layers answer constants, if some do."""
    there = [layer for layer in layers if layer.constants]
    number = sum(len(layer.constants) for layer in there)
    said = (
        f"{counted(number, 'expert')} of {counted(len(there), 'MoE layer')} answer constants, by `approximate_experts`"
    )
    return [said] if there else []


def _quantised_note(quantisation: Mapping[str, Any], dtype: torch.dtype, reference: str, *, is_estimate: bool) -> str:
    """What a quantised checkpoint is treated like, in one sentence or two."""
    kind = str(dtype).removeprefix("torch.")
    if why := reading_problem(quantisation):
        return (
            f"the checkpoint is quantised ({format_of(quantisation)}), and a recipe cannot work on it: {why}; the "
            f"bytes named are those of the unquantised model in {kind}. {what_helps(quantisation, reference)}"
        )
    sizes = "; the bytes named are those of such numbers, the checkpoint has fewer" if is_estimate else ""
    return (
        f"the checkpoint is quantised ({format_of(quantisation)}): it is observed as the {kind} numbers that its "
        f"weights stand for, and edited as it is stored{sizes}"
    )


def auto_note(used: Sequence[str], place: Placement, machine: Machine = HERE) -> str:
    """What `device: auto` has come to, in one sentence."""
    if tuple(used) == ("cpu",):
        seen = "torch sees no GPU on this machine" if machine.num_gpus is None else "a machine without GPUs is meant"
        return f"device auto: {seen}, so the CPU computes"
    named, there = ", ".join(used), len(machine.gpus)
    if place.weights == "disk":
        return f"device auto: {named} of {there} GPU(s), weights are read from disk one decoder layer at a time"
    each = ", each with some of the layers" if len(used) > 1 else ""
    return f"device auto: {named} of {there} GPU(s), all weights there{each}"


NO_EXTRA_LAYERS = "no extra prediction layers (mtp, nextn) to carry over; leave the option out"


def left_out_note(left_out: LeftOut) -> str:
    """What a compressed checkpoint will be without, in one sentence."""
    size = f" ({human_bytes(left_out.num_bytes)})" if left_out.num_bytes is not None else ""
    keys = " and ".join(f"`{'.'.join(path)}`" for path in left_out.announced)
    becomes = f" and {keys} {'become' if len(left_out.announced) > 1 else 'becomes'} 0" if keys else ""
    without, choice = f"the smaller checkpoint is written without them{becomes}", left_out.choice
    then = without if choice == "drop" else f"it gets them by `mtp: {choice}`, unmeasured"
    return (
        f"the checkpoint has {counted(len(left_out.names), 'tensor')}{size} of extra prediction layers, "
        f"{', '.join(left_out.layers)}, that transformers does not build; {then}"
    )


def check_pass(loaded: LoadedRecipe, resolved: ResolvedPass, layers: Sequence[MoELayer]) -> Plan:
    """The plan of one pass for layers as those before it leave them. Raises RecipeError with the option's place in the
    recipe, also where the pass would undo what they did; PluginError where the plan is of other layers.
    """
    with loaded.at_pass(resolved):
        resolved.method.model = loaded.recipe.model
        answer = resolved.method.check(layers)
        plan: Plan = answered(f"{resolved.method.name}: check(layers)", answer, Plan, "a Plan of these layers")
        _verify_plan(resolved.method.name, layers, plan)
        for layer in plan.layers:
            check_skipping(layer)
        _check_order(resolved.method.name, layers, plan)
    return plan


def _verify_plan(name: str, layers: Sequence[MoELayer], plan: Plan) -> None:
    """Raise PluginError unless a plan has the layers that were given, none with more experts or choices."""
    found = [layer.path if isinstance(layer, MoELayer) else repr(layer) for layer in plan.layers]
    wanted = [layer.path for layer in layers]
    if found != wanted:
        raise PluginError(
            f"{name}: the plan of its `check` should have the layers that it was given, {', '.join(wanted)}; found "
            f"{', '.join(found) or 'none'}."
        )
    for old, new in zip(layers, plan.layers, strict=True):
        if not (1 <= new.num_experts <= old.num_experts and 1 <= new.top_k <= min(old.top_k, new.num_choices)):
            raise PluginError(
                f"{name}: by the plan of its `check` {old} becomes {new}; a pass leaves no more experts and choices "
                f"than it finds, and as many experts as are chosen."
            )


def _check_order(name: str, layers: Sequence[MoELayer], plan: Plan) -> None:
    """Raise OptionError where a pass would lose what those before it have made: zeros, a storage format."""
    pairs = list(zip(layers, plan.layers, strict=True))
    filled = [old.zeros for old, new in pairs if old.zeros is not None and new.zeros is None]
    if filled:
        raise OptionError(
            None,
            f"there are {' and '.join(sorted(set(filled)))} zeros in {counted(len(filled), 'layer')} by then, and "
            f"{name} would fill them: put it before the pass that makes them",
        )
    fixed = [old.path for old in layers if old.constants]
    if plan.changes_values and fixed:
        raise OptionError(
            None,
            f"{fixed[0]}: some of its experts answer constants by then, and {name} would edit weights: put it "
            f"before the pass that replaces experts",
        )
    stored = {f"{old.bits:g}" for old, new in pairs if old.bits and (plan.changes_values or new.bits != old.bits)}
    if stored:
        raise OptionError(
            None,
            f"weights are stored with {' and '.join(sorted(stored))} bits by then, and nothing edits that: put {name} "
            f"before the pass that stores them so",
        )


def _check_domains(loaded: LoadedRecipe, resolved: ResolvedPass) -> None:
    """Whether the pass's text has different names, and those that its options speak of."""
    sources = loaded.sources_of(resolved)
    titles = [source.title for source in sources]
    twice = [title for title in titles if titles.count(title) > 1]
    if twice:
        raise loaded.error(resolved.path, f"two of its sources are called {twice[0]!r}; tell them apart with `name:`")
    clash = [title for title in titles if held_out_name(title) in titles] if resolved.method.held_out else []
    if clash:
        raise loaded.error(
            resolved.path,
            f"a source is called {held_out_name(clash[0])!r}, as the held-out text of {clash[0]!r} is; rename it",
        )
    with loaded.at_pass(resolved):
        resolved.method.check_domains(titles)
        if all(lengths := [source.lengths() for source in sources]):
            resolved.method.check_tokens(sum(map(sum, lengths)))


def inspect(
    reference: str, *, trust_remote_code: bool = False, adapters: Sequence[Adapter] = (), serve: Serve | None = None
) -> dict[str, Any]:
    """A model's MoE layers and sizes from its config alone, as `terminal.print_inspection` takes them."""
    found = find_checkpoint(reference, trust_remote_code=trust_remote_code, weights=False)
    quantisation = found.quantisation
    config = without_quantisation(load_config(found))
    cls = model_class(found, config)
    structure = structure_of(cls, config, adapters)
    left_out = find_left_out(found, config, cls)
    dtype = _dtype("auto", config, found)
    experts = sum(layer.num_with_weights * layer.parameters_per_expert for layer in structure.layers)
    notes = [f"the expert count is `{structure.num_experts_leaf}` in config.json"]
    if not structure.top_k_leaf:
        notes.append("the number of experts per token is fixed by the model's code")
    if structure.other_leaves:
        others = ", ".join(f"`{leaf}`" for leaf in structure.other_leaves)
        notes.append(f"experts counted by {others} (other parts of the model) are left as they are")
    if left_out:
        notes.append(left_out_note(left_out))
    notes += _skipping_notes(fitting_rules(structure, config)) + _constants_notes(structure.layers)
    if quantisation is not None:
        notes.append(_quantised_note(quantisation, dtype, reference, is_estimate=True))
    record = recorded(found.folder)
    about: dict[str, Any] = {"most": max([layer["num_experts"] for layer in record.get("layers", ())], default=0)}
    about |= {"skipping": bool(fitting_rules(structure, config)), "serve": serve}
    about["extra_layers"] = "left_out" in record
    return {
        "model": reference,
        "architecture": architecture(config),
        "dtype": str(dtype).removeprefix("torch."),
        "layers": [
            {
                "path": layer.path,
                "num_experts": layer.num_with_weights,
                "top_k": layer.top_k,
                "router": layer.router_kind,
                "parameters_per_expert": layer.parameters_per_expert,
            }
            for layer in structure.layers
        ],
        "parameters": structure.num_parameters,
        "bytes": structure.num_parameters * dtype.itemsize,
        "expert_parameters": experts,
        "expert_bytes": experts * dtype.itemsize,
        "serving": answers(facts_of(read_config(found.folder), structure.layers, **about)),
        "notes": notes,
    }


def _dtype(wanted: str, config: Any, found: Checkpoint | None) -> torch.dtype:
    """What the weights are loaded in. A config may name none: then the files' headers say it, where they are here."""
    if wanted != "auto":
        return getattr(torch, wanted)  # type: ignore[no-any-return]
    if isinstance(named := getattr(config, "dtype", None), torch.dtype):
        return named
    shards = found.shards if found is not None and found.has_weights else []
    return first_dtype(shards) or torch.float32
