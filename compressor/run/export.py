"""What an output says to others: the ids that it keeps, the line by which another engine skips, its statistics."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from compressor.checkpoint.output import OutputFolder, disk_errors_named
from compressor.errors import CheckpointError, RecipeError
from compressor.observe.statistics_file import load_statistics
from compressor.report.figures import as_yaml, experts_of, short_labels, shown_layers
from compressor.run.record import RECORD, STATISTICS
from compressor.run.record import recorded as record_of
from compressor.wording import without_paths

Json = dict[str, Any]
FILE = "statistics.parquet"
NAMES = ("pass", "method", "layer", "path", "expert", "text", "held_out")
COLUMNS = """A row is an expert, by the original's id, on a text. Of the tokens that chose it: `tokens`, how many;
`choices`, their share of all; `mean_weight`; sums of g, the router's weight (`weight`), s, its share of the token's
(`share`), ‖f‖ of the answer (`norm`), ‖f‖², g‖f‖ (`weighted_norm`), …; the `largest` number in f."""


def recorded(folder: Path) -> Json:
    """The record of a run's output. Raises CheckpointError where it has none."""
    found = record_of(folder)
    if not (found.get("model") and all("layers" in one["decision"] for one in found["passes"]) and experts_of(found)):
        said = f"it is no output of a run, which has a compressor/{RECORD} of passes over layers"
        raise CheckpointError(f"{folder}: {said}.")
    return found


def kept_ids(folder: Path) -> Json:
    """Decoder layer → the original's ids that all passes together leave; by path where numbers tell not enough."""
    record = recorded(folder)
    kept = {path: [*range(count)] for path, count in experts_of(record).items()}
    for done in record["passes"]:
        kept |= {path: layer["kept"] for path, layer in shown_layers(done, record).items() if "kept" in layer}
    if "constants" in record or all(len(kept[path]) == count for path, count in experts_of(record).items()):
        found = "experts answer constants, of which ids say nothing" if "constants" in record else "all experts stay"
        raise RecipeError(f"{folder}: {found}; kept ids can be exported where passes have removed experts.")
    _, names = short_labels(list(kept))
    return {names[path]: ids for path, ids in kept.items()}


def ser(folder: Path) -> Json:
    """ik_llama.cpp's `line`, and what it does to the layers (`says`), as the method that skips has put it down."""
    found = [done["decision"]["ser"] for done in recorded(folder)["passes"] if "ser" in done["decision"]]
    if not found or "line" not in found[-1]:
        why = found[-1]["problem"] if found else "no decision of a pass says such a line"
        raise RecipeError(f"{folder}: {why}; ik_llama.cpp skips by dynamic_skipping's rule ratio, or by one top_k.")
    return dict(found[-1])


def publish_statistics(folder: Path, output: Path) -> int:
    """Write statistics.parquet and README.md of a run's output into a folder, whole or not at all; returns how many
    rows. No path of this machine is in them. Raises CheckpointError where no figures of experts are there.
    """
    if os.path.lexists(output):
        raise CheckpointError(f"{output} exists already, and is not replaced; name another folder.")
    record = recorded(folder)
    passes, about = load_statistics(folder / "compressor" / STATISTICS)
    tables = [table for name, of in passes.items() for table in _tables(name, of, about["passes"][name], record)]
    if not tables:
        raise CheckpointError(f"{folder}: its statistics say nothing of single experts, so nothing can be published.")
    with OutputFolder(output) as made, disk_errors_named(output):
        pyarrow.parquet.write_table(pyarrow.concat_tables(tables, promote_options="default"), made.path / FILE)
        (made.path / "README.md").write_text(_card(record, without_paths(about)), encoding="utf-8")
        (made.path / "compressor").rmdir()
        made.finish()
    return sum(map(len, tables))


def _tables(name: str, layers: Mapping[str, Any], about: Json, record: Json) -> Iterator[Any]:
    """A table for each layer of a pass: sums by text and expert, and figures of weights, the same for every text."""
    number, _, method = name.partition(".")
    counts = {layer["path"]: layer["num_experts"] for layer in about["layers"]}
    original, texts = record["passes"][int(number)].get("original_ids", {}), about["domains"] or [None]
    _, labels = short_labels(list(counts))
    for path, figures in layers.items():
        shape, layer = (len(texts), counts[path]), labels[path]
        found = {key[5:]: one for key, one in figures.items() if key.startswith("sums.") and one.shape == shape}
        if "tokens" in found:
            found["choices"] = found["tokens"] / found["tokens"].sum(1, keepdim=True).clamp_min(1)
            found["mean_weight"] = found["weight"] / found["tokens"]
        found |= {k: one.expand(shape) for k, one in figures.items() if k[:8] == "weights." and one.shape == shape[1:]}
        same, ids = (int(number), method, int(layer) if layer.isdecimal() else None, path), range(shape[1])
        by_text = [(without_paths(text), text in about.get("held_out", ())) for text in texts]
        by_row = [(*same, expert, *text) for text in by_text for expert in original.get(path, ids)]
        columns = dict(zip(NAMES, map(list, zip(*by_row, strict=True)), strict=True))
        if found:
            yield pyarrow.table(columns | {k.replace(".", "_"): one.flatten().tolist() for k, one in found.items()})


def _card(record: Json, about: Json) -> str:
    model = record["model"]
    title = f"Expert statistics of {record.get('origin', {}).get('hub') or Path(model['reference']).name}"
    of_hub = {"configs": [{"config_name": "default", "data_files": FILE}]}
    front = {"pretty_name": title, "tags": ["moe", "expert-statistics", "moe-compressor"], **of_hub}
    texts = [f"* {one['name']}: {one['tokens']:,} tokens ({one['fingerprint']})" for one in about["domains"]]
    made = ", ".join(f"{package} {version}" for package, version in record.get("versions", {}).items())
    whose = f"{model['architecture']}, {model['fingerprint']}; tokenizer {record['tokenizer']}; seed {record['seed']}."
    parts = [f"---\n{as_yaml(front)}---", f"# {title}", whose, "\n".join(texts), COLUMNS, f"Made with {made}."]
    return "\n\n".join(parts) + "\n"
