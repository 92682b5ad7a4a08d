"""The model card of a smaller model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from compressor.report.description import Json
from compressor.report.figures import (
    NOTHING,
    as_yaml,
    decision_notes,
    decision_table,
    experts_of,
    random_table,
    shown_layers,
    summary_tables,
)
from compressor.report.tables import Table
from compressor.report.verdict import verdict
from compressor.wording import counted, human_bytes, ids_said

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
    front: dict[str, Any] = {} if "files_only" in record else {"library_name": "transformers"}
    if auto_class in PIPELINES and "files_only" not in record:
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
    parts += [f"**{said}**"] if (said := verdict(record)) else []
    passes = record.get("passes", [])
    tables = [*summary_tables(record), *map(random_table, passes), *_decided(passes, record)]
    parts += filter(None, [table.to_markdown() for table in tables])
    if left_out := record.get("left_out"):
        parts.append(_left_out_sentence(left_out))
    parts += [
        *(["## Recipe", f"```yaml\n{as_yaml(record['recipe'])}```"] if "recipe" in record else []),
        *_how_to_load(record, str(output), auto_class),
    ]
    if versions := record.get("versions"):
        parts.append("Made with " + ", ".join(f"{package} {version}" for package, version in versions.items()) + ".")
    return "\n\n".join(parts) + "\n"


def _how_to_load(record: Json, output: str, auto_class: str) -> list[str]:
    if "files_only" in record:
        by = record["files_only"]
        return [f"The files are what `{by}` has left. They were not loaded here, and nothing of them was measured."]
    code = f'```python\nimport compressor\n\nmodel, tokenizer = compressor.load("{output}")\n```'
    return ["## Load it", code, _who_reads_it(record, auto_class)]


def _who_reads_it(record: Json, auto_class: str) -> str:
    if "uneven" in record:
        skips = " They skip experts, by rules in its `config.json`." if "skipping" in record else ""
        return (
            "Its layers have different numbers of experts, which no class of transformers builds: `compressor.load` "
            f"reads it, `{auto_class}.from_pretrained` and serving software refuse it. With `padded: true` in the "
            "pass the checkpoint would load anywhere, where the router allows that, at the price of memory." + skips
        )
    if "constants" in record:
        number = sum(map(len, record["constants"].values()))
        skips = " They skip experts, by rules in its `config.json`." if "skipping" in record else ""
        return (
            f"{counted(number, 'expert')} of {counted(len(record['constants']), 'layer')} answer a constant, whatever "
            f"they are given, or are never chosen; no router has lost a row. `compressor.load` reads that, and vLLM "
            f"from 0.33 on (`approximate_experts` in `config.json`, unquantised, one device or tensor parallel); "
            f"`{auto_class}.from_pretrained` refuses it, since weights of these experts are missing." + skips
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


def _decided(passes: Sequence[Json], record: Json) -> Iterator[Table]:
    """The experts that all passes together left, and what those decided that drop none."""
    pruned = [done for done in passes if any("kept" in one for one in done["decision"].get("layers", {}).values())]
    yield _kept_table(pruned, record)
    for done in passes:
        if done not in pruned:
            table = decision_table(done, record, details=True)
            rows = [(f"`{path}`", *cells) for path, *cells in table.rows]
            yield dataclasses.replace(table, rows=rows, below=_bullets([done]))


def _bullets(passes: Sequence[Json]) -> list[str]:
    return [f"* {note}" for done in passes for note in decision_notes(done)]


def _kept_table(pruned: Sequence[Json], record: Json) -> Table:
    """The experts that all passes together left and dropped."""
    num_experts = experts_of(record)
    shown = [layer for done in pruned for layer in shown_layers(done, record).items()]
    kept = {path: layer["kept"] for path, layer in shown if "kept" in layer}
    rows = []
    for path, ids in kept.items():
        dropped = [expert for expert in range(num_experts.get(path, 0)) if expert not in set(ids)]
        rows.append((f"`{path}`", str(len(ids)), ids_said(ids), ids_said(dropped) or NOTHING))
    return Table("Experts kept", ("layer", ">experts", "kept", "dropped"), rows, _bullets(pruned))
