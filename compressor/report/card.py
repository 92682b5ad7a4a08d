"""The model card of a smaller model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from compressor.report import figures
from compressor.report.description import Json
from compressor.report.tables import Table
from compressor.report.verdict import verdict
from compressor.wording import counted, human_bytes, ids_said, is_hub_id, without_paths

PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForMultimodalLM": "any-to-any",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModel": "feature-extraction",
}
CARRIED = ("license", "license_name", "license_link", "language")
"""What the original's card says of a smaller model too."""


def model_card(record: Json) -> str:
    """The output's README.md: front matter, how it was made, figures, how to load it; no path of this machine."""
    record = without_paths(record)
    reference, output = record["model"]["reference"], record.get("output") or "FOLDER"
    auto_class = record["model"].get("auto_class", "AutoModelForCausalLM")
    methods = [done["method"] for done in record.get("passes", [])]
    name = str(output).rstrip("/").rsplit("/", 1)[-1]
    given = ", as it was in memory," if record["model"].get("live") else ""
    parts = [
        f"---\n{figures.as_yaml(_front_matter(record, reference, auto_class, methods))}---",
        f"# {name}",
        f"`{reference}`{given} compressed with moe-compressor ({', '.join(methods) or 'no pass'}). "
        "Everything that was decided and measured, exactly, is in `compressor/record.json`.",
    ]
    chosen_on = record.get("decided_on", record["model"])
    if chosen_on.get("fingerprint") != record["model"].get("fingerprint"):
        parts.append(f"What it keeps was chosen on `{chosen_on.get('reference')}`, another model of this structure.")
    parts += [f"**{said}**"] if (said := verdict(record)) else []
    passes = record.get("passes", [])
    tables = [*figures.summary_tables(record), *map(figures.random_table, passes), *_decided(passes, record)]
    parts += filter(None, [table.to_markdown() for table in tables])
    if left_out := record.get("left_out"):
        parts.append(_left_out_sentence(left_out))
    if extra := record.get("mtp"):
        parts.append(_extra_layers_sentence(extra))
    parts += [
        *(["## Recipe", f"```yaml\n{figures.as_yaml(record['recipe'])}```"] if "recipe" in record else []),
        *_how_to_load(record, str(output), auto_class),
    ]
    if versions := record.get("versions"):
        parts.append("Made with " + ", ".join(f"{package} {version}" for package, version in versions.items()) + ".")
    return "\n\n".join(parts) + "\n"


def _front_matter(record: Json, reference: str, auto_class: str, methods: Sequence[str]) -> dict[str, Any]:
    """What the hub reads of a card. For a pruned model's relation to its base it has no word."""
    origin = record.get("origin", {"hub": reference if is_hub_id(reference) else None})
    needs_ours = {"files_only", "uneven", "constants"} & record.keys()  # the hub would offer `from_pretrained`
    front: dict[str, Any] = {} if needs_ours else {"library_name": "transformers"}
    if auto_class in PIPELINES and "files_only" not in record:
        front["pipeline_tag"] = PIPELINES[auto_class]
    if origin.get("hub"):
        front["base_model"] = origin["hub"]
        front |= {"base_model_relation": "quantized"} if origin.get("stored") else {}
    front |= {key: origin[key] for key in CARRIED if key in origin}
    pruned = any("kept" in one for done in record.get("passes", []) for one in _layers(done))
    tags = ["moe", "moe-compressor", *(["pruning", "expert-pruning"] if pruned else ())]
    return front | {"tags": [*dict.fromkeys([*tags, *(method.replace("_", "-") for method in methods)])]}


def _layers(done: Json) -> Iterator[Json]:
    yield from done["decision"].get("layers", {}).values()


def carried_over(card: Path) -> dict[str, Any]:
    """What the card of an original says of a smaller model too; nothing where it is none, or cannot be read."""
    from huggingface_hub.repocard import metadata_load

    try:
        found = metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):  # whatever it is, it is no part of the model
        return {}
    return {key: found[key] for key in CARRIED if isinstance(found.get(key), str | list)}


def eval_results(record: Json) -> str:
    """The hub's `.eval_results/*.yaml`: a figure of each task whose documents are a dataset there; "" without any."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    sides = [(record.get("evaluation") or {}).get(side, {}).get("tasks", {}) for side in ("before", "after")]
    found = []
    for name, task in sides[1].items():
        if not task.get("dataset"):
            continue
        metric = next(one for one in (*figures.ACCURACIES, *task["metrics"]) if one in task["metrics"])
        is_share = metric in figures.ACCURACIES or metric in task["correct"]
        original = figures.metric_said(sides[0].get(name, {}).get("metrics", {}).get(metric), is_share)
        notes = f"lm-eval {name}, {metric}{' in %' if is_share else ''}, {task['num_fewshot']}-shot, "
        notes += f"{counted(task['documents'], 'document')}; the original: {original}"
        value = round(task["metrics"][metric]["value"] * (100 if is_share else 1), 4)
        given = {"date": record.get("date"), "notes": notes}
        found.append(EvalResultEntry(task["dataset"], task["dataset_config"] or "default", value, **given))
    return figures.as_yaml(eval_result_entries_to_yaml(found)) if found else ""


def _how_to_load(record: Json, output: str, auto_class: str) -> list[str]:
    if "files_only" in record:
        by = record["files_only"]
        return [f"The files are what `{by}` has left. They were not loaded here, and nothing of them was measured."]
    refused = [one for one in record.get("serving", ()) if one["engine"] == "transformers" and one["answer"] == "no"]
    if refused and not {"uneven", "constants"} & record.keys():
        said = figures.serving_said(refused[0])
        return ["## Load it", f"Neither `compressor.load` nor transformers reads it: {said}."]
    code = f'```python\nimport compressor\n\nmodel, tokenizer = compressor.load("{output}")\n```'
    return ["## Load it", code, _who_reads_it(record, auto_class)]


def _who_reads_it(record: Json, auto_class: str) -> str:
    skips = " They skip experts, by rules in its `config.json`." if "skipping" in record else ""
    if "uneven" in record:
        return (
            "Its layers have different numbers of experts, which no class of transformers builds: `compressor.load` "
            f"reads it, `{auto_class}.from_pretrained` and serving software refuse it. With `padded: true` in the "
            "pass the checkpoint would load anywhere, where the router allows that, at the price of memory." + skips
        )
    if "constants" in record:
        number = sum(map(len, record["constants"].values()))
        return (
            f"{counted(number, 'expert')} of {counted(len(record['constants']), 'layer')} answer a constant, whatever "
            f"they are given, or are never chosen; no router has lost a row. `compressor.load` reads that, and vLLM "
            f"from 0.33 on (`approximate_experts` in `config.json`, unquantised, one device or tensor parallel); "
            f"`{auto_class}.from_pretrained` of transformers 5 refuses it, since weights of these experts are missing; "
            "version 4 only warns, and makes them up at random." + skips
        )
    if "skipping" in record:
        return (
            f"Tokens skip experts in {counted(len(record['skipping']), 'layer')}, by rules in `config.json` "
            f"(`compressor.skipping`) that `compressor.load` switches on. The folder is an ordinary Hugging Face "
            f"checkpoint: `{auto_class}.from_pretrained` and serving software read it too, and run it unskipped."
        )
    return (
        f"The folder is an ordinary Hugging Face checkpoint, so `{auto_class}.from_pretrained` and "
        "serving software read it too."
    )


def _left_out_sentence(left_out: Json) -> str:
    size = f" ({human_bytes(left_out['bytes'])})" if left_out["bytes"] is not None else ""
    set_to = " and ".join(f"`{key}` is {after}" for key, (_, after) in left_out["config"].items())
    return (
        f"The original's extra prediction layers, {', '.join(f'`{path}`' for path in left_out['layers'])}, with "
        f"{counted(left_out['tensors'], 'tensor')}{size}, are not in this checkpoint, because transformers does not "
        f"build them" + (f"; in its `config.json` {set_to}." if set_to else ".")
    )


def _extra_layers_sentence(extra: Json) -> str:
    number = f", with {len(next(iter(extra['kept'].values())))} experts each" if "kept" in extra else ""
    return (
        f"The extra prediction layers, {', '.join(f'`{path}`' for path in extra['layers'])}, are in it{number} "
        f"({human_bytes(extra['bytes'])}), unmeasured: what they draft, the model verifies."
    )


def _decided(passes: Sequence[Json], record: Json) -> Iterator[Table]:
    """The experts that all passes together left, and what those decided that drop none."""
    pruned = [done for done in passes if any("kept" in one for one in _layers(done))]
    yield _kept_table(pruned, record)
    for done in passes:
        if done not in pruned:
            table = figures.decision_table(done, record, details=True)
            rows = [(f"`{path}`", *cells) for path, *cells in table.rows]
            yield dataclasses.replace(table, rows=rows, below=_bullets([done]))


def _bullets(passes: Sequence[Json]) -> list[str]:
    return [f"* {note}" for done in passes for note in figures.decision_notes(done)]


def _kept_table(pruned: Sequence[Json], record: Json) -> Table:
    """The experts that all passes together left and dropped."""
    num_experts = figures.experts_of(record)
    shown = [layer for done in pruned for layer in figures.shown_layers(done, record).items()]
    kept = {path: layer["kept"] for path, layer in shown if "kept" in layer}
    rows = []
    for path, ids in kept.items():
        dropped = [expert for expert in range(num_experts.get(path, 0)) if expert not in set(ids)]
        rows.append((f"`{path}`", str(len(ids)), ids_said(ids), ids_said(dropped) or figures.NOTHING))
    return Table("Experts kept", ("layer", ">experts", "kept", "dropped"), rows, _bullets(pruned))
