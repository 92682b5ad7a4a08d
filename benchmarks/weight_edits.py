"""Experts dropped, merged, scaled, or with zeros in them: held-out perplexity of the demo model, at the same number of
weights that are left.

python benchmarks/weight_edits.py

Three seeds of the calibration text, which draw the held-out text too.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import compressor

DOMAINS = ("code", "prose", "arithmetic")


def recipe(passes: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Passes on all three domains, measured on all three."""
    data = [{"demo": domain, "samples": 24, "length": 256, "name": domain} for domain in DOMAINS]
    held_out = [{"demo": domain, "samples": 32, "length": 256, "name": domain} for domain in DOMAINS]
    return {
        "model": "demo",
        "seed": seed,
        "calibration": {"batch_size": 8, "data": data},
        "passes": passes,
        "evaluate": {"perplexity": held_out},
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=int, nargs="+", default=[6, 4])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="methods whose line begins with this")
    arguments = parser.parse_args()
    print("| left | method | " + " | ".join(f"ppl {domain}" for domain in DOMAINS) + " |\n|--:|---|" + "--:|" * 3)
    for keep in arguments.keep:
        searched, merging = {"expert_pruning": {"keep": keep}}, {"expert_merging": {"keep": keep}}
        reap = {"expert_pruning": {"keep": keep, "criterion": "reap"}}
        zeros = {"wanda": {"pattern": "unstructured", "sparsity": 1 - keep / 8}}
        uniform = {"expert_merging": {"keep": keep, "weights": "uniform"}}
        ream = {"expert_merging": {"keep": keep, "grouping": "ream"}}
        ways: dict[str, list[dict[str, Any]]] = {
            "expert_pruning, searched": [searched],
            "expert_pruning, searched + output_scale": [searched, {"output_scale": {}}],
            "expert_pruning, searched + output_scale, per layer": [searched, {"output_scale": {"per": "layer"}}],
            "expert_pruning, reap": [reap],
            "expert_pruning, reap + output_scale": [reap, {"output_scale": {}}],
            "expert_merging": [merging],
            "expert_merging, uniform": [uniform],
            "expert_merging, ream": [ream],
            "expert_merging + output_scale": [merging, {"output_scale": {}}],
            "wanda, unstructured": [zeros],
            **({"wanda, 2:4": [{"wanda": {}}]} if keep == 4 else {}),
        }
        for way, passes in ((way, passes) for way, passes in ways.items() if way.startswith(arguments.only)):
            found: dict[str, list[float]] = {domain: [] for domain in DOMAINS}
            for seed in range(arguments.seeds):
                after = compressor.compress(recipe(passes, seed)).record["evaluation"]["after"]["perplexity"]
                for domain in DOMAINS:
                    found[domain].append(after[domain]["perplexity"])
            cells = [f"{statistics.median(v):.2f} ({min(v):.2f}–{max(v):.2f})" for v in found.values()]
            print(f"| {keep} | {way} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
