"""docs/reference.md: every key of a recipe, every option of each method, and what record.json holds.

    python tests/reference_pages.py > docs/reference.md

Recipes are read from their JSON Schema, figures of the record from the dataclasses that hold them; what other keys of
the record mean stands here. `test_docs.py` compares the page with what is generated, `cli/test_run.py` with a run.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from compressor.evaluation.fidelity import Fidelity
from compressor.evaluation.generation import Generation, Written
from compressor.evaluation.lm_eval import Metric, TaskResult
from compressor.evaluation.paired import Flips
from compressor.evaluation.perplexity import Perplexity
from compressor.evaluation.size import Size
from compressor.evaluation.speed import Ratio, Speed
from compressor.plugins import load_plugins
from compressor.recipe.json_schema import recipe_schema
from compressor.run.record import FORMAT

COMMAND = "python tests/reference_pages.py > docs/reference.md"
HEAD = f"""# Every key of a recipe, and of the record

Generated from the JSON Schema of recipes and from the sources by `{COMMAND}`;
[recipes, commands, Python](use.md) shows how they are used. `compressor schema` prints the schema with the plugins that
you have installed, `compressor methods NAME` one method's options. A default of – is none: leave the key out, or say
`null`; its meaning tells what holds then.
"""
RECORD: dict[str, dict[str, str]] = {
    "": {
        "format": f"of this file; {FORMAT}",
        "model": "the original, see below",
        "decided_on": "of `apply`: the model that the decision was made on",
        "tokenizer": "fingerprint of the tokenizer",
        "recipe": "the recipe with every default filled in",
        "recipe_as_written": "only what was given, without `output`",
        "recipe_fingerprint": "digest of the recipe",
        "run_fingerprint": "of a run into a folder: digest of recipe, model, tokenizer, text, processes and versions",
        "seed": "the recipe's",
        "calibration": "a list: the text of each source, see below",
        "images": "of a model that reads images: calibration `tokens`, how many are `image_tokens`, and that `said`",
        "layers": "a list: each MoE layer of the original, see below",
        "passes": "a list: each pass, in order, see below",
        "files_only": "if the last pass wrote a format that transformers does not load: that pass's method",
        "left_out": "if the checkpoint has layers that transformers does not load, which are left out: how many "
        "tensors and bytes, and what config.json says no more",
        "mtp": "if extra prediction layers are carried over: the `choice`, their `layers`, `tensors` and `bytes`, and "
        "the ids `kept` by layer of pruned ones",
        "left_behind": "if the original's folder has files that are not copied: their names",
        "evaluation": "if the recipe has `evaluate`: see below",
        "uneven": "if layers keep different counts: experts by the decoder layer's number",
        "constants": "if experts answer constants: their ids by the decoder layer's number",
        "skipping": "if tokens skip experts: the rule by layer",
        "serving": "if a checkpoint was written: what engines do with it, see below",
        "versions": "of Python, this library, its plugins, and the libraries that figures depend on",
        "date": "of the run's end",
        "hardware": "processor, threads, memory in bytes, and accelerators",
        "processes": "if there were several: how many",
        "seconds": "by step",
        "output": "the folder, or null",
        "origin": "what the card says of the original: its name on the hub, licence and languages by its own card, and "
        "how the output is `stored`, if quantised",
    },
    "model": {
        "reference": "as the recipe names it",
        "fingerprint": "digest of config.json, and of each file of weights: header, size, and samples of the bytes",
        "live": "true if it was given as an object, in Python",
        "architecture": "class of transformers",
        "model_type": "of its config",
        "auto_class": "of transformers, by which it is loaded",
        "routers": "kinds of router",
    },
    "calibration[], evaluation.text[], passes[].held_out[]": {
        "name": "of the domain",
        "sequences": "how many",
        "asked": "how many the recipe asks for, if it does",
        "tokens": "how many, of all sequences",
        "image_tokens": "how many of them stand where an image is, if rows have some",
        "special_tokens": "ids that begin and end each text, if they were added",
        "fingerprint": "digest of the ids",
    },
    "layers[]": {
        "path": "of the MoE block in the model",
        "num_experts": "routed experts",
        "top_k": "experts that a token chooses",
    },
    "serving[]": {
        "engine": "its name",
        "answer": "yes, no or unknown",
        "rules": "a list: `answer` (yes, no, unknown, note), `says`, `source` and `date` of each rule that says so",
        "nearest": "numbers of experts of which that is not said, where counts matter",
    },
    "passes[]": {
        "method": "its name",
        "version": "of the method",
        "options": "all of them, defaults too",
        "domains": "names of the text that it was decided by",
        "held_out": "if text was held out, by which the method judges its own work: as under `calibration`",
        "original_ids": "if passes before have removed experts: the original's ids of those this pass saw, by layer",
        "decision": "what the method decided: `layers`, by path, and what else it needs; `apply` carries it out again",
        "tensors": "if the decision has tensors, which stand beside decision.json: their shapes",
        "description": "how tables and the page show the decision",
        "experts": "if the method tells it: by layer, figures of every expert, such as its use, in percent",
        "checks": "how far the edited model's answers on a batch are from those expected",
        "random": "if `evaluate.random` is set: see below",
        "seconds": "of the whole pass",
    },
    "passes[].random": {
        "problem": "why there are none, instead of all else",
        "seeds": "one for each random decision",
        "relative_loss": "mean relative loss of the layers' outputs on calibration text: `ours`, and `random`, a list",
        "perplexity": "by text: `ours` and `random`",
        "kl": "by text, nats a token: `ours` and `random`",
    },
    "evaluation": {
        "text": "a list: what was measured on, as under `calibration`",
        "before": "figures of the original, see below",
        "after": "figures of the smaller model",
        "fidelity": "by text: how far its answers are from the original's",
        "paired": "by task and metric: answers that changed",
        "speed": "if `evaluate.speed` is set: both models in turn",
        "alone": "if `evaluate.each_pass` is set, a list: each pass on the original alone, with its `decision`, and "
        "all of `evaluation` for it, or the `problem` for which it could not be measured",
    },
    "evaluation.before, evaluation.after": {
        "experts_per_token": "by text and layer, a mean",
        "perplexity": "by text",
        "tasks": "by name",
        "size": "parameters and bytes",
        "peak_memory": "`host_bytes` and `device_bytes` at most",
        "bytes_on_disk": "of its files of weights, if it is in a folder",
        "generation": "if `evaluate.generation` is set: what it writes",
        "server": "if one has answered the tasks: its `url` and `model`, or the `command` that started it; `engine`, "
        "`version`, `max_model_len` as it has said",
    },
}  # fmt: skip
FIGURES: dict[str, dict[str, type[Any]]] = {
    "evaluation.fidelity.TEXT": {"": Fidelity},
    "evaluation.before.perplexity.TEXT": {"": Perplexity},
    "evaluation.before.tasks.TASK": {"": TaskResult, "metrics": Metric},
    "evaluation.paired.TASK.METRIC": {"": Flips},
    "evaluation.before.size": {"": Size},
    "evaluation.before.generation": {"": Generation, "greedy` and `sampled": Written},
    "evaluation.speed": {"": Speed, "prefill_ratio` and `decode_ratio": Ratio},
}
AS_JSON = {TaskResult: " Here `doc_ids` are ranges, and `correct` has a string of 1 (right) and 0 for each metric."}
SELECTING = "expert_pruning"
"""Whose options methods that choose experts have too."""
LINKS = {
    "Calibration": "[`calibration`](#calibration)",
    "Evaluation": "[`evaluate`](#evaluate)",
    "Push": "[`push`](#push)",
    "Server": "[`server`](#server)",
    "Serve": "[`serve`](#serve)",
    "Budget": "[a mean](#a-mean)",
    "Pass": "[passes](#methods)",
    **dict.fromkeys(
        ("DemoSource", "TextSource", "JsonLinesSource", "TokensSource", "DatasetSource", "TaskSource"),
        "[sources](#a-source-of-text)",
    ),
}
TYPES = {"string": "text", "boolean": "true or false", "integer": "whole number", "number": "number", "null": "null"}
BOUNDS = {
    "minimum": "{} or more",
    "maximum": "at most {}",
    "exclusiveMinimum": "above {}",
    "exclusiveMaximum": "below {}",
    "gt": "above {}",
}


def in_words(schema: Mapping[str, Any]) -> str:
    """What a value may be; null, which is the same as leaving the key out, goes without saying."""
    if "$ref" in schema:
        return LINKS[schema["$ref"].rpartition("/")[2]]
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if "anyOf" in schema:
        kinds = dict.fromkeys(
            in_words({**one, **bound_of(schema)}) for one in schema["anyOf"] if one != {"type": "null"}
        )
        return " or ".join(
            one for one in kinds if one.removeprefix("whole ") == one or one.removeprefix("whole ") not in kinds
        )
    if schema["type"] == "array":
        return f"list of {in_words(schema['items'])}"
    if schema["type"] == "object":
        return f"mapping to {in_words(schema['additionalProperties'])}"
    kind = "path" if schema.get("format") == "path" else TYPES[schema["type"]]
    return ", ".join([kind, *(said.format(schema[key]) for key, said in BOUNDS.items() if key in schema)])


def bound_of(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A bound that pydantic writes beside the types instead of within them."""
    return {key: schema[key] for key in BOUNDS if key in schema}


def table(head: str, rows: Iterable[Iterable[str]]) -> Iterator[str]:
    yield from (f"| {head} |", "|---" * len(head.split(" | ")) + "|")
    for row in rows:
        cells = [" ".join(cell.split()).replace("|", "\\|") for cell in row]
        yield f"| {' | '.join(cells)} |"
    yield ""


def row_of(name: str, schema: Mapping[str, Any], required: Iterable[str] = ()) -> list[str]:
    """Its name, type, default and meaning."""
    default = schema.get("default")
    shown = default if isinstance(default, str) else json.dumps(default)
    said = "required" if name in required else "–" if default is None else f"`{shown}`"
    return [f"`{name}`", in_words(schema), said, schema.get("description", "")]


def keys(schema: Mapping[str, Any]) -> Iterator[str]:
    rows = [row_of(name, one, schema.get("required", ())) for name, one in schema["properties"].items()]
    return table("key | value | default | meaning", rows)


def sources(definitions: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The kinds of source, and their keys, each once for all that have it alike."""
    kinds = {one["required"][0]: one for name, one in definitions.items() if name.endswith("Source")}
    yield from table("source | what it is", [(f"`{name}`", one["description"]) for name, one in kinds.items()])
    found: dict[str, list[str]] = {}
    rows: dict[str, list[str]] = {}
    for kind, schema in kinds.items():
        for name, one in schema["properties"].items():
            row = row_of(name, one, schema["required"])
            rows[key := json.dumps(row)] = row
            found.setdefault(key, []).append(kind)
    said = {key: ", ".join(f"`{kind}`" for kind in of) if len(of) < len(kinds) else "all" for key, of in found.items()}
    yield from table(
        "key | of | value | default | meaning", [[row[0], said[key], *row[1:]] for key, row in rows.items()]
    )


def recipe() -> Iterator[str]:
    plugins = load_plugins()
    schema = recipe_schema(plugins.methods, plugins.criteria)
    schema["properties"]["passes"]["items"] = {"$ref": "Pass"}
    definitions = schema["$defs"]
    yield from ("## A recipe", "", *keys(schema))
    parts = {
        "calibration": "Calibration",
        "evaluate": "Evaluation",
        "serve": "Serve",
        "push": "Push",
        "server": "Server",
        "A mean": "Budget",
    }
    for title, name in parts.items():
        about = "" if title.islower() else f"{definitions[name]['description']}\n"
        yield from (f"### {f'`{title}`' if title.islower() else title}", "", about, *keys(definitions[name]))
    yield from ("### A source of text", "", *sources(definitions))
    yield from ("## Methods", "", "Each is a pass: `- NAME: {key: value}`.", "")
    before: dict[str, Mapping[str, Any]] = {}
    for name, method in plugins.methods.items():
        options, page = definitions[method.options_type.__name__], method.__module__.partition(".")[0]
        own = {key: one for key, one in options["properties"].items() if before.get(key) != one}
        same = [f"`{key}`" for key in options["properties"] if key not in own]
        yield from (f"### {name}", "", f"{inspect.cleandoc(method.__doc__ or '').partition(chr(10))[0]}")
        yield from (f"[More](../plugins/{page}/README.md).", "", *keys({**options, "properties": own}))
        if same:
            yield from (f"As of [`{SELECTING}`](#{SELECTING}): {', '.join(same)}.", "")
        if name == SELECTING:
            before = options["properties"]


def record() -> Iterator[str]:
    yield from (
        "## The record",
        "",
        "`compressor/record.json` in every output; `NAME[]` is each of a list. `apply` writes",
    )
    yield from ("one too, without what only a run knows: recipe, text, figures, seconds.", "")
    for path, meanings in RECORD.items():
        yield from ((f"### `{path}`", "") if path else ())
        yield from table("key | what it holds", [(f"`{key}`", meaning) for key, meaning in meanings.items()])
    for path, classes in FIGURES.items():
        yield from (f"### `{path}`", "")
        for within, one in classes.items():
            about = " ".join(inspect.cleandoc(one.__doc__ or "").replace("``", "`").replace("None", "null").split())
            names = ", ".join(f"`{field.name}`" for field in dataclasses.fields(one))
            yield from ((f"`{within}` have " if within else "") + f"{names}.", "", about + AS_JSON.get(one, ""), "")


def unexplained(found: Mapping[str, Any]) -> list[str]:
    """The keys of a record that the page says nothing about, as far as its tables go."""

    def at(path: str) -> Iterator[Any]:
        inside: list[Any] = [found]
        for name in path.split(".") if path else ():
            inside = [one[name.removesuffix("[]")] for one in inside if name.removesuffix("[]") in one]
            if name.endswith("[]"):
                inside = [one for several in inside for one in several]
        yield from inside

    return [
        f"{path}: {key}"
        for paths, meanings in RECORD.items()
        for path in paths.split(", ")
        for one in at(path)
        for key in one
        if key not in meanings
    ]


def reference() -> str:
    """The whole page."""
    return "\n".join([HEAD, *recipe(), *record()]).replace("\n\n\n", "\n\n").rstrip() + "\n"


if __name__ == "__main__":
    print(reference(), end="")
