"""The table of architectures in docs/architectures.md, made from a run: `python tests/architectures_table.py`.

One row per model type of the installed transformers that has routed experts, from a tiny random model of it: what was
found, and what the checks of `check_model` said. Takes a minute or two on one core.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from compressor.checkpoint.headers import verify_files
from compressor.errors import UnsupportedModelError
from compressor.model.moe_model import MoEModel
from compressor.model.structure import MoELayer, Structure
from compressor.testing.checks import Report, check_model
from compressor.testing.tiny import auto_class, candidate_types, tiny_inputs, tiny_model

COLUMNS = (
    "type",
    "expert count",
    "experts per token",
    "router",
    "experts are given",
    "on disk",
    "pruning",
    "skipping",
    "uneven",
    "padded",
    "from disk",
    "notes",
)

INTRODUCTION = """# Architectures

Every model type of transformers {version} with routed experts: what the adapter finds by itself, and what the checks of
`compressor.testing.check_model` say of a tiny random model (float32, 8 experts). Made by
`python tests/architectures_table.py docs/architectures.md`; the tests compare every row with a run.

* **expert count**, **experts per token**: the integers of config.json, dots leading into sub-configs; *fixed* means
  that the class chooses a fixed number whatever the config says.
* **experts are given**: how the block hands tokens over (`compressor.model.structure.Call`).
* **on disk**: one tensor per expert, or all experts in one.
* **pruning**: keeping all changes no bit; removed equals masked; the checkpoint loads with the plain Auto class and
  answers the same to the bit; `generate()` too.
* **skipping**: skipped experts count as with a weight of 0, over every experts implementation, live, saved and read by
  `compressor.load`; the number is FLOPs saved over the FLOPs of the experts skipped, by torch's counter.
* **uneven**: other numbers of experts in other layers, saved, read back by `compressor.load`, saved and read again.
* **padded**: the same as a checkpoint that loads anywhere, surplus experts switched off by the router's bias.
* **from disk**: read one decoder layer at a time it answers as in memory, to the bit; edited on disk it holds the
  tensors that are saved after the same edit in memory, byte by byte.

"""


def row(model_type: str, report: Report | None = None, model: Any = None) -> tuple[str, ...]:
    """One row of the table; `report` and `model` are those of a tiny float32 model, made here if not given."""
    if model is None:
        refused = [model_type, *[""] * 5, "refused", *[""] * 4]
        try:
            model = tiny_model(model_type)
            MoEModel(model)
        except UnsupportedModelError as error:
            return (*refused, _reason(model_type, error))
        try:
            load = auto_class(model_type).from_pretrained
            report = check_model(model, tiny_inputs(model), load=load, statistics=False)
        except Exception as error:  # a class that does not run as it is
            refused[6] = "**fails**"
            return (*refused, f"its forward fails: {type(error).__name__}: {error}")
    assert report is not None
    structure = MoEModel(model).structure
    return (
        *structure_cells(model_type, structure),
        _on_disk(model),
        _passed(report, ("keep all", "removed = masked", "saved", "saved: generate")),
        _skipping(report),
        _passed(report, ("uneven", "uneven saved", "uneven saved twice", "uneven refused elsewhere")),
        _passed(report, ("padded", "padded saved")),
        _passed(report, ("read layer by layer", "edited on disk", "edited on disk (uneven)")),
        "; ".join(_notes(structure, report)),
    )


def structure_cells(model_type: str, structure: Structure) -> tuple[str, ...]:
    """The first cells of a row: what is found without weights."""
    layer = structure.layers[-1]
    return (
        model_type,
        f"`{structure.num_experts_leaf}`",
        f"`{structure.top_k_leaf}`" if structure.top_k_leaf else f"fixed ({layer.top_k})",
        _routers(structure.layers),
        layer.router_probe.call,
    )


def table() -> str:
    """The whole document."""
    import transformers

    rows = []
    for model_type in candidate_types():
        try:
            MoEModel(tiny_model(model_type))
        except UnsupportedModelError as error:
            if "no routed experts" in str(error) or "cannot tell how many" in str(error):
                continue
        except Exception:  # a candidate without experts, of which no tiny model can be made
            continue
        rows.append(row(model_type))
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS), *(" | ".join(cells) for cells in rows)]
    text = INTRODUCTION.format(version=transformers.__version__)
    return text + "\n".join(f"| {line} |" for line in lines) + f"\n\n{len(rows)} types.\n"


def _reason(model_type: str, error: UnsupportedModelError) -> str:
    return str(error).removeprefix(f"{model_type}: ").split(": given")[0].rstrip(".")


def _routers(layers: tuple[MoELayer, ...]) -> str:
    return ", ".join(dict.fromkeys(layer.router_kind for layer in layers))


def _on_disk(model: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        names = [name for shard in verify_files(Path(folder)) for name in shard.tensors]
    per_expert = any(re.search(r"experts\.(expert_)?\d+\.", name) for name in names)
    return "per expert" if per_expert else "stacked"


def _passed(report: Report, names: tuple[str, ...]) -> str:
    found = [check for check in report.checks if check.name in names]
    if any(check.passed is False for check in found):
        return "**fails**"
    return "yes" if any(check.passed for check in found) else "no"


def _skipping(report: Report) -> str:
    """`yes, 1.00`; or that there is nothing to skip."""
    found = [check for check in report.checks if check.name.startswith(("skip", "FLOPs", "unskipped"))]
    if any(check.passed is False for check in found):
        return "**fails**"
    flops = sorted({check.detail for check in found if check.name.startswith("FLOPs")})
    return f"yes, {', '.join(flops)}" if flops else "nothing to skip"


def _notes(structure: Any, report: Report) -> list[str]:
    layer = structure.layers[-1]
    notes = []
    if any(each.id_tensors for each in structure.layers):
        notes.append("expert ids looked up by token in some layers: dropped ones are redirected")
    if layer.num_extra_choices:
        notes.append("the router also chooses things that are no experts")
    if layer.router_probe.reads_config:
        notes.append("its router reads the config while it runs")
    if not layer.router_probe.block_runs and layer.router_probe.call == "choices":
        notes.append("no block of its own: losses are those of the experts' own output")
    if structure.other_leaves:
        notes.append("left alone: " + ", ".join(f"`{leaf}`" for leaf in structure.other_leaves))
    if layer.watch_problem:
        notes.append("its experts can be masked, removed and skipped, not judged")
    notes += [f"{check.name} fails: {check.detail}" for check in report.failed]
    return notes


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(table(), encoding="utf-8")
