"""Pruned for a task, and pruned on general text: what each keeps of the task, and what it loses elsewhere.

    python benchmarks/task_pruning.py --output task_pruning.json

The demo model is pruned to the same count by `task_pruning` (the task's training documents), and by `expert_pruning` on
the prose that stands for general text, and on a mix of all three domains, each for several seeds of the calibration
text. Measured on the task's own questions, which none of them saw, and by held-out perplexity.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import compressor

DOMAINS = ("code", "prose", "arithmetic")


def main() -> None:
    """Run all of it and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="demo_arithmetic")
    parser.add_argument("--keep", type=int, nargs="+", default=[6, 4])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("task_pruning.json"))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for keep in args.keep:
        for way, recipe in recipes(args.task, keep).items():
            for seed in range(args.seeds):
                record = compressor.compress({**recipe, "seed": seed}).record
                after = record["evaluation"]["after"]
                accuracies = {name: 100 * result["metrics"]["acc"]["value"] for name, result in after["tasks"].items()}
                perplexities = {name: result["perplexity"] for name, result in after["perplexity"].items()}
                rows.append({"way": way, "keep": keep, "seed": seed} | accuracies | perplexities)
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        args.output.write_text(json.dumps(rows, indent=1) + "\n")
    figures = [name for name in rows[0] if name not in ("way", "keep", "seed")]
    print("| kept | calibrated on | " + " | ".join(figures) + " |\n|--:|---" + "|--:" * len(figures) + "|")
    for keep in args.keep:
        for way in dict.fromkeys(row["way"] for row in rows):
            of = [row for row in rows if (row["way"], row["keep"]) == (way, keep)]
            cells = [_spread([row[name] for row in of]) for name in figures]
            print(f"| {keep} | {way} | " + " | ".join(cells) + " |")


def recipes(task: str, keep: int) -> dict[str, dict[str, Any]]:
    """Name → recipe."""
    common: dict[str, Any] = {
        "model": "demo",
        "evaluate": {
            "tasks": [f"demo_{domain}" for domain in DOMAINS],
            "limit": 400,
            "batch_size": 32,
            "perplexity": [{"demo": domain, "samples": 32, "length": 256, "name": domain} for domain in DOMAINS],
        },
    }

    def on(*domains: str) -> dict[str, Any]:
        samples = 48 // len(domains)
        data = [{"demo": domain, "samples": samples, "length": 256, "name": domain} for domain in domains]
        return {**common, "calibration": {"data": data}, "passes": [{"expert_pruning": {"keep": keep}}]}

    options = {"task": task, "keep": keep, "samples": 48, "length": 256}
    return {
        f"the task ({task})": {**common, "passes": [{"task_pruning": options}]},
        "general text (prose)": on("prose"),
        "general text (code, prose)": on("code", "prose"),
        "all three domains": on(*DOMAINS),
    }


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}–{max(values):.1f})"


if __name__ == "__main__":
    main()
