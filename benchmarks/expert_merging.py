"""Merged or dropped: held-out perplexity of the demo model with as many experts left.

python benchmarks/expert_merging.py

Six of eight experts, three seeds of the calibration text, which draw the held-out text too.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import compressor

DOMAINS = ("code", "prose", "arithmetic")


def recipe(pass_: dict[str, Any], seed: int) -> dict[str, Any]:
    """One pass on all three domains, measured on all three."""
    data = [{"demo": domain, "samples": 24, "length": 256, "name": domain} for domain in DOMAINS]
    held_out = [{"demo": domain, "samples": 32, "length": 256, "name": domain} for domain in DOMAINS]
    return {
        "model": "demo",
        "seed": seed,
        "calibration": {"batch_size": 8, "data": data},
        "passes": [pass_],
        "evaluate": {"perplexity": held_out},
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=int, nargs="+", default=[6])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="methods whose line begins with this")
    arguments = parser.parse_args()
    print("| left | method | " + " | ".join(f"ppl {domain}" for domain in DOMAINS) + " |\n|--:|---|" + "--:|" * 3)
    for keep in arguments.keep:
        ways = {
            "expert_pruning, searched": {"expert_pruning": {"keep": keep}},
            "expert_pruning, reap": {"expert_pruning": {"keep": keep, "criterion": "reap"}},
            "expert_merging": {"expert_merging": {"keep": keep}},
            "expert_merging, uniform": {"expert_merging": {"keep": keep, "weights": "uniform"}},
        }
        for way, pass_ in ((way, pass_) for way, pass_ in ways.items() if way.startswith(arguments.only)):
            found: dict[str, list[float]] = {domain: [] for domain in DOMAINS}
            for seed in range(arguments.seeds):
                after = compressor.compress(recipe(pass_, seed)).record["evaluation"]["after"]["perplexity"]
                for domain in DOMAINS:
                    found[domain].append(after[domain]["perplexity"])
            cells = [f"{statistics.median(v):.2f} ({min(v):.2f}–{max(v):.2f})" for v in found.values()]
            print(f"| {keep} | {way} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
