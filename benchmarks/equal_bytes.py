"""Fewer experts, fewer bits, zeros: how far the answers are from the original's, by bytes on disk.

python benchmarks/equal_bytes.py                         # the demo model
python benchmarks/equal_bytes.py MODEL --output FOLDER   # any other one

Each way is a recipe; what was made before is not made again. `compressor compare FOLDER/*` shows the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import compressor
from compressor.report.comparison import comparison_page, comparison_tables

DOMAINS = ("code", "prose", "arithmetic")
Pass = dict[str, Any]


def ways(num_experts: int, group_size: int) -> dict[str, list[Pass]]:
    """Each way's passes, by what its folder is called. `drop`: as many in every layer; `measured`: shared out
    by measured KL. Bits: of linear maps, attention too, not of routers, norms and embeddings.
    """
    drop, merge = (
        {share: {method: {"keep": num_experts * (100 - share) // 100}} for share in (25, 50)}
        for method in ("expert_pruning", "expert_merging")
    )
    ream = {share: {"expert_merging": {**merge[share]["expert_merging"], "grouping": "ream"}} for share in merge}
    measured: dict[int, Pass] = {
        share: {"expert_pruning": {"keep": {"mean": num_experts * (100 - share) // 100}, "replace": "none"}}
        for share in (25, 50)
    }
    how = {"group_size": group_size, "attention": True, "dense": True}
    int8, int4 = ({"quantization": {"scheme": f"W{n}A16", **how}} for n in (8, 4))
    scaled: Pass = {"output_scale": {}}
    tuned: Pass = {"fine_tuning": {"steps": 100}}
    zeros: Pass = {"wanda": {}}
    return {
        "int8": [int8],
        "int4": [int4],
        "drop25": [drop[25]],
        "drop25-int8": [drop[25], int8],
        "drop25-int4": [drop[25], int4],
        "drop25-scaled-int4": [drop[25], scaled, int4],
        "drop25-tuned-int4": [drop[25], tuned, int4],
        "measured25-int4": [measured[25], int4],
        "measured25-tuned-int4": [measured[25], tuned, int4],
        "measured50-int4": [measured[50], int4],
        "measured50-tuned-int8": [measured[50], tuned, int8],
        "drop50": [drop[50]],
        "drop50-int8": [drop[50], int8],
        "drop50-scaled-int8": [drop[50], scaled, int8],
        "drop50-tuned-int8": [drop[50], tuned, int8],
        "drop50-int4": [drop[50], int4],
        "merge25-int4": [merge[25], int4],
        "merge50-int8": [merge[50], int8],
        "ream25-int4": [ream[25], int4],
        "ream50-int8": [ream[50], int8],
        "2of4": [zeros],
        "2of4-int8": [zeros, int8],
        "2of4-int4": [zeros, int4],
    }


def recipe(model: str, passes: list[Pass], seed: int) -> dict[str, Any]:
    """Calibrated and measured on all three domains, on different text of each."""
    return {
        "model": model,
        "seed": seed,
        "calibration": {"data": [{"demo": name, "samples": 48, "length": 256} for name in DOMAINS]},
        "passes": passes,
        "evaluate": {"perplexity": [{"demo": name, "samples": 32, "length": 256} for name in DOMAINS]},
    }


def main() -> None:
    """Make what is not there yet, and print the table, the fewest bytes first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--output", type=Path, default=Path("runs/equal_bytes"))
    parser.add_argument("--only", nargs="+", help="ways by name; default all")
    parser.add_argument("--group-size", type=int, default=128, help="inputs that share a scale")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    known = ways(compressor.inspect(arguments.model)["layers"][0]["num_experts"], arguments.group_size)
    folders = [arguments.output / way for way in arguments.only or known]
    for folder in folders:
        if not folder.exists():
            print(folder.name, flush=True)
            compressor.compress(recipe(arguments.model, known[folder.name], arguments.seed), output=folder, resume=True)
    found = compressor.compare(folders)
    found["outputs"].sort(key=lambda one: (one["bytes"], one["mean"]["kl"]))
    for table in comparison_tables(found):
        print(table.to_markdown(), end="\n\n")
    (arguments.output / "compared.html").write_text(comparison_page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
