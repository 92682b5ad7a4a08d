"""The model card of a smaller model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from compressor.report.figures import (
    NOTHING,
    Figure,
    Json,
    alone_rows,
    as_yaml,
    decision_notes,
    experts_of,
    figures,
    ids_said,
    legend,
    random_rows,
    shown_layers,
)
from compressor.wording import counted, human_bytes

PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForMultimodalLM": "any-to-any",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModel": "feature-extraction",
}


def model_card(record: Json) -> str:
    """The output's README.md: front matter for the hub, how it was made, its figures, how to load it."""
    reference, output = record["model"]["reference"], record.get("output") or "FOLDER"
    auto_class = record["model"].get("auto_class", "AutoModelForCausalLM")
    front: dict[str, Any] = {"library_name": "transformers"}
    if auto_class in PIPELINES:
        front["pipeline_tag"] = PIPELINES[auto_class]
    if is_hub_id(reference):
        front["base_model"] = reference
    methods = [done["method"] for done in record.get("passes", [])]
    front["tags"] = ["moe", "moe-compressor", *dict.fromkeys(method.replace("_", "-") for method in methods)]
    name = str(output).rstrip("/").rsplit("/", 1)[-1]
    given = ", as it was in memory," if record["model"].get("live") else ""
    parts = [
        f"---\n{as_yaml(front)}---",
        f"# {name}",
        f"`{reference}`{given} compressed with moe-compressor ({', '.join(methods) or 'no pass'}). "
        "Everything that was decided and measured, exactly, is in `compressor/record.json`.",
    ]
    if rows := figures(record):
        parts += ["## Figures", _markdown_table(rows), "\n".join(legend(rows, record))]
    if alone := alone_rows(record):
        lines = [" | ".join(cells) for cells in alone]
        lines.insert(1, " | ".join(["---", *["--:"] * (len(alone[0]) - 1)]))
        parts += ["## Each pass alone", "\n".join(f"| {line} |" for line in lines)]
    for done in record.get("passes", []):
        if rows_of_random := random_rows(done.get("random") or {}):
            heading = f"## {done['method']}: does it beat chance?"
            parts += [heading, _random_markdown(rows_of_random)]
    if layers := _kept_lines(record):
        notes = [f"* {note}" for done in record.get("passes", []) for note in decision_notes(done)]
        parts += ["## Experts kept", layers, *(["\n".join(notes)] if notes else [])]
    if skipped := _skipped_lines(record):
        parts += ["## Experts skipped", skipped]
    if left_out := record.get("left_out"):
        parts.append(_left_out_sentence(left_out))
    parts += [
        *(["## Recipe", f"```yaml\n{as_yaml(record['recipe'])}```"] if "recipe" in record else []),
        "## Load it",
        f'```python\nimport compressor\n\nmodel, tokenizer = compressor.load("{output}")\n```',
        _who_reads_it(record, auto_class),
    ]
    if versions := record.get("versions"):
        parts.append("Made with " + ", ".join(f"{package} {version}" for package, version in versions.items()) + ".")
    return "\n\n".join(parts) + "\n"


def _who_reads_it(record: Json, auto_class: str) -> str:
    if "uneven" in record:
        skips = " They skip experts, by rules in its `config.json`." if "skipping" in record else ""
        return (
            "Its layers have different numbers of experts, which no class of transformers builds: `compressor.load` "
            f"reads it, `{auto_class}.from_pretrained` and serving software refuse it. With `padded: true` in the "
            "pass the checkpoint would load anywhere, where the router allows that, at the price of memory." + skips
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


def is_hub_id(reference: str) -> bool:
    """Whether a model's reference has the form of a name on the Hugging Face hub, ``owner/name``."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", reference) is not None


# --- what was kept ---


def _random_markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = [
        "| against random experts | chosen | random (median) | smallest–largest | better than |",
        "|---|--:|--:|--:|--:|",
    ]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _kept_lines(record: Json) -> str:
    """The experts that all passes together left and dropped, as a Markdown table; empty without any."""
    num_experts = experts_of(record)
    shown = [layer for done in record.get("passes", []) for layer in shown_layers(done, record).items()]
    kept = {path: layer["kept"] for path, layer in shown if "kept" in layer}
    lines = []
    for path, ids in kept.items():
        dropped = [expert for expert in range(num_experts.get(path, 0)) if expert not in set(ids)]
        lines.append(f"| `{path}` | {len(ids)} | {ids_said(ids)} | {ids_said(dropped) or NOTHING} |")
    return "\n".join(["| layer | experts | kept | dropped |", "|---|--:|---|---|", *lines]) if lines else ""


def _skipped_lines(record: Json) -> str:
    """How many experts a token uses in each layer, by the last pass that skips, as a Markdown table; empty without."""
    by_pass = [done["decision"].get("layers", {}) for done in record.get("passes", [])]
    decided = [layers for layers in by_pass if any("mean_experts" in layer for layer in layers.values())]
    lines = []
    for path, layer in decided[-1].items() if decided else ():
        held_out = layer.get("held_out", {}).get("mean_experts")
        numbers = [layer.get("mean_experts"), held_out, layer.get("relative_loss")]
        texts = [NOTHING if number is None else f"{number:.4g}" for number in (layer.get("beta"), *numbers)]
        lines.append(f"| `{path}` | {layer.get('rule') or 'none'} | {' | '.join(texts)} |")
    heading = "| layer | rule | β | experts a token uses | on held-out text | relative loss |"
    return "\n".join([heading, "|---|---|--:|--:|--:|--:|", *lines]) if lines else ""


# --- text ---


def _markdown_table(rows: Iterable[Figure]) -> str:
    lines = ["| figure | before | after | change |", "|---|--:|--:|--:|"]
    for row in rows:
        change = f"{row.change}; {row.note}" if row.note else row.change
        cells = (row.name, row.before, row.after, change)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
