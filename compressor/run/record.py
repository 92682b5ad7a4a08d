"""What a run, or a decision that is applied, leaves behind: names of files, and pieces of the record as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from compressor.checkpoint import classes
from compressor.checkpoint.atomic_files import put_in_place, with_own_memory, write_json
from compressor.checkpoint.extra_layers import LeftOut
from compressor.checkpoint.find import Checkpoint, read_config
from compressor.checkpoint.headers import verify_files
from compressor.checkpoint.output import OutputFolder, kept_for
from compressor.checkpoint.quantization import format_of, quantisation_of
from compressor.checkpoint.resume_state import Journal
from compressor.data.sequences import Sequences
from compressor.errors import CheckpointError, shortened
from compressor.machine.distributed import Processes
from compressor.machine.progress import Progress
from compressor.method import Decision, Method
from compressor.model.constants import replaced_experts
from compressor.model.moe_model import Kept, MoEModel
from compressor.model.structure import MoELayer
from compressor.model.uneven import uneven_counts
from compressor.recipe.schema import LoadedRecipe
from compressor.report.card import carried_over, eval_results, model_card
from compressor.report.figures import shown_layers
from compressor.report.html import page, summary
from compressor.run.preview import Preview
from compressor.serving.facts import facts_of
from compressor.serving.rules import answers
from compressor.wording import digest

FORMAT = 2
"""Of record.json and decision.json."""
RECORD = "record.json"
DECISION = "decision.json"
TENSORS = ".safetensors"
"""How the file beside a decision ends that holds its tensors, if it has some."""
STATISTICS = "statistics.safetensors"


@dataclass(frozen=True)
class CompressionResult:
    """What `compress` returns: the record (as in record.json), the folder written, and the smaller model, which is None
    where its weights are on disk only, as is the tokenizer where a run before had written all of it already.
    """

    record: dict[str, Any]
    folder: Path | None
    model: Any
    tokenizer: Any | None

    def __repr__(self) -> str:
        passes = ", ".join(done["method"] for done in self.record.get("passes", []))
        reference = shortened(self.record["model"]["reference"], 60)
        return f"CompressionResult({reference} → {self.folder or 'in memory'}: {passes or 'no pass'})"

    def _repr_html_(self) -> str:
        return summary(self.record)


def original_ids_json(ids: Kept, all_ids: Kept) -> dict[str, Any]:
    """What the original model calls an entry's experts, in layers that have lost some to passes before."""
    fewer = {path: list(of_layer) for path, of_layer in ids.items() if of_layer != all_ids[path]}
    return {"original_ids": fewer} if fewer else {}


def agreed(decision: Decision, processes: Processes) -> Decision:
    """The first process's decision, in all of them."""
    tensors = decision.tensors
    if tensors:
        first = processes.gather({f"{path}/{name}": one for path, of in tensors.items() for name, one in of.items()})[0]
        tensors = {path: {name: first[f"{path}/{name}"] for name in of} for path, of in tensors.items()}
    return Decision(processes.exchange(decision)[0], tensors)


def decided_json(method: Method[Any], decision: Decision, entry: Mapping[str, Any]) -> dict[str, Any]:
    """A pass's entry with its decision, the shapes of its tensors, which stand in a file of their own, and how its
    method describes it to people, who read the original model's ids.
    """
    entry = {**entry, "decision": decision, **({"tensors": decision.shapes} if decision.tensors else {})}
    ids = {"ids": list(method.expert_ids)}
    layers = shown_layers({**entry, "description": ids})
    found = method.describe(Decision({**decision, "layers": layers}, decision.tensors))
    return {**entry, "description": ids | found.to_json()}


def write_decision(path: Path, decided: Mapping[str, Any]) -> None:
    """Write what decision.json holds, and its passes' tensors beside it, as `PASS/LAYER/NAME`, pass by number."""
    tensors = {
        f"{number}/{layer}/{name}": with_own_memory(tensor)
        for number, done in enumerate(decided["passes"])
        for layer, of in Decision.of(done["decision"]).tensors.items()
        for name, tensor in of.items()
    }
    beside = path.with_suffix(TENSORS)
    if tensors:
        temporary = beside.with_name(beside.name + ".partial")
        safetensors.torch.save_file(dict(sorted(tensors.items())), temporary)
        put_in_place(temporary, beside)
    else:
        beside.unlink(missing_ok=True)
    write_json(path, decided)


def read_tensors(path: Path, number: int) -> dict[str, dict[str, Tensor]]:
    """The tensors of a pass's decision, by layer path and name. Raises ValueError where the file cannot be read."""
    found: dict[str, dict[str, Tensor]] = {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            for full in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                place, layer, name = full.split("/")
                if place == str(number):
                    found.setdefault(layer, {})[name] = file.get_tensor(full)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"its tensors cannot be read from {path}: {error}") from error
    return found


def left_out_json(left_out: LeftOut | None) -> dict[str, Any]:
    return {"left_out": left_out.to_json()} if left_out and left_out.choice == "drop" else {}


def model_json(config: Any, auto_class: str, layers: Sequence[MoELayer]) -> dict[str, Any]:
    """What a record says of a model, beside its name and fingerprint."""
    return {
        "architecture": classes.architecture(config),
        "model_type": config.model_type,
        "auto_class": auto_class,
        "routers": sorted({layer.router_kind for layer in layers}),
    }


def layers_json(layers: Sequence[MoELayer]) -> list[dict[str, Any]]:
    return [{"path": layer.path, "num_experts": layer.num_experts, "top_k": layer.top_k} for layer in layers]


def origin_json(found: Checkpoint | None, output: Path) -> dict[str, Any]:
    """What the hub is told besides: the original's name there, licence, languages, how the output is stored."""
    if found is None:
        return {}
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/[^/]+$", found.folder.resolve().as_posix())
    hub = found.reference if found.is_of_hub else f"{cached[1]}/{cached[2]}" if cached else None
    stored = quantisation_of(read_config(output)) if (output / "config.json").exists() else None
    about = {"hub": hub, "stored": stored and format_of(stored)}
    return {"origin": {key: one for key, one in about.items() if one} | carried_over(found.folder / "README.md")}


def counts_and_rules_json(moe: MoEModel) -> dict[str, Any]:
    """What a reader of the checkpoint has to know: layers of different counts, experts that answer constants, by their
    decoder layers' numbers, and rules by which some are skipped.
    """
    counts, rules = uneven_counts(moe.config), moe.skip_rules
    skipping = {path: rule.to_json() for path, rule in rules.items()}
    constants = replaced_experts(moe.config)
    found = {"uneven": counts, "constants": constants, "skipping": skipping}
    return {name: part for name, part in found.items() if part}


def serving_json(folder: Path, moe: MoEModel, before: Sequence[MoELayer], **about: Any) -> dict[str, Any]:
    """Which engines run the checkpoint that was written, if one was; `before`: the original's layers."""
    about |= {"most": max(layer.num_experts for layer in before), "skipping": bool(moe.skip_rules)}
    there = (folder / "config.json").exists()
    return {"serving": answers(facts_of(read_config(folder), moe.layers, **about))} if there else {}


def recorded(folder: Path) -> dict[str, Any]:
    """The folder's record; empty where it has none."""
    path = folder / "compressor" / RECORD
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder; expected the output of a run, or a checkpoint.")
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: it cannot be read as a record: {error}.") from error
    if not isinstance(found, dict):
        return {}
    if (written := found.get("format", FORMAT)) != FORMAT:
        raise CheckpointError(f"{path}: it is a record of format {written}; this version reads format {FORMAT}.")
    return found


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """The record, its page, the model card, and what the hub reads of results, in an output's folder."""
    write_json(folder / "compressor" / RECORD, record)
    write_page(folder, record)
    (folder / "README.md").write_text(model_card(record), encoding="utf-8")
    if results := eval_results(record):
        (folder / ".eval_results").mkdir(exist_ok=True)
        (folder / ".eval_results" / "moe-compressor.yaml").write_text(results, encoding="utf-8")


def write_page(folder: Path, record: Mapping[str, Any]) -> None:
    (folder / "compressor" / "report.html").write_text(page(record), encoding="utf-8")


def identity_json(
    loaded: LoadedRecipe,
    model: Mapping[str, Any],
    tokenizer: str,
    texts: Mapping[str, str],
    num_processes: int,
    versions: Mapping[str, Any],
) -> dict[str, Any]:
    """What a run is about: equal where two find the same. `tokenizer` and `texts` are fingerprints."""
    recipe = loaded.without_means()
    return {
        # whatever the model's path: its fingerprint tells whether it is the same
        "recipe": {key: value for key, value in recipe.items() if key != "model"},
        "model": model,
        "tokenizer": tokenizer,
        "text": texts,
        "processes": num_processes,
        "versions": versions,
    }


def fingerprint_of(identity: Mapping[str, Any]) -> str:
    return digest(json.dumps(identity, sort_keys=True))


def record_before(output: Path, fingerprint: Callable[[], str], progress: Progress) -> dict[str, Any] | None:
    """What a run before has recorded that did all of this: a whole output gets its name first, if it was stopped just
    then. None where something else is there, or work to go on with. `fingerprint` tells what this run is about.
    """
    if OutputFolder(output).complete():
        progress.say(f"{output}: a run was stopped when this output was whole; it has its name now")
    if Journal(kept_for(output, "journal")).has_work:
        return None
    try:
        record: dict[str, Any] = json.loads((output / "compressor" / RECORD).read_text(encoding="utf-8"))
        found = record.get("run_fingerprint")
    except (OSError, ValueError, AttributeError):  # whatever it is, it is in the way, and refused as that
        return None
    if found is None or found != fingerprint():
        return None
    try:
        if "files_only" not in record:
            verify_files(output)
    except CheckpointError as error:
        progress.say(f"what a run of this recipe has written is damaged: {error}")
        return None
    progress.say(f"{output}: a run of this recipe has written it already; nothing is left to do")
    return record


def about_json(
    loaded: LoadedRecipe,
    model: Mapping[str, Any],
    tokenizer: str,
    calibration: Sequence[Sequences],
    layers: Sequence[MoELayer],
) -> dict[str, Any]:
    """What figures and decisions are about: they can be used again for this model only."""
    return {
        "model": {"reference": loaded.recipe.model, **model},
        "tokenizer": tokenizer,
        "domains": [sequences.to_json() for sequences in calibration],
        "layers": [layer.description() for layer in layers],
        "recipe_fingerprint": loaded.fingerprint,
    }


def run_json(
    loaded: LoadedRecipe,
    run_fingerprint: str | None,
    about: Mapping[str, Any],
    preview: Preview,
    passes: list[dict[str, Any]],
) -> dict[str, Any]:
    """What was done, on what, with what; `about` is that of `about_json`."""
    return {
        "format": FORMAT,
        "model": about["model"],
        "tokenizer": about["tokenizer"],
        "recipe": loaded.to_mapping(),
        "recipe_as_written": loaded.recipe.model_dump(mode="json", exclude_unset=True, exclude={"output"}),
        "recipe_fingerprint": loaded.fingerprint,
        **({"run_fingerprint": run_fingerprint} if run_fingerprint else {}),
        "seed": loaded.recipe.seed,
        "calibration": about["domains"],
        "layers": layers_json(preview.layers),
        "passes": passes,
        **({} if loaded.passes[-1].method.leaves_model else {"files_only": loaded.passes[-1].spec.method}),
    } | left_out_json(preview.left_out)
