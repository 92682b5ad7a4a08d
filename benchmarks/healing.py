"""Pruned, and healed: what the demo model's answers lose on held-out text, at even and at measured counts.

python benchmarks/healing.py

One seed; of each of three domains 66 sequences of 256 tokens to fit and train on, 16 to measure; nats a token.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import compressor

DOMAINS = ("code", "prose", "arithmetic")
HEALED: dict[str, list[dict[str, Any]]] = {
    "–": [],
    "output_scale": [{"output_scale": {}}],
    "router_healing": [{"router_healing": {}}],
    "fine_tuning": [{"fine_tuning": {"steps": 100}}],
}


def measured(passes: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """By domain, what the answers of the model that passes leave lose."""
    data, held_out = (
        [{"demo": domain, "samples": samples, "length": 256, "name": domain} for domain in DOMAINS]
        for samples in (66, 16)
    )
    with tempfile.TemporaryDirectory() as folder:
        recipe = {
            "model": "demo",
            "seed": seed,
            "calibration": {"batch_size": 8, "data": data},
            "passes": passes,
            "evaluate": {"perplexity": held_out},
            "output": str(Path(folder) / "out"),
        }
        found: dict[str, Any] = compressor.compress(recipe).record["evaluation"]["fidelity"]
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=int, nargs="+", default=[4, 6])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    titles = [f"{what} {domain}" for what in ("KL", "ΔNLL") for domain in DOMAINS]
    print("| left | healed by | " + " | ".join(titles) + " |\n|---|---|" + "--:|" * len(titles))
    for keep in arguments.keep:
        for counts, wanted in (("even", keep), ("measured", {"mean": keep})):
            for name, healing in HEALED.items():
                found = measured([{"expert_pruning": {"keep": wanted, "replace": "none"}}, *healing], arguments.seed)
                cells = [
                    f"{found[domain][what]:.3f} ± {found[domain][f'{what}_error']:.3f}"
                    for what in ("kl", "delta_nll")
                    for domain in DOMAINS
                ]
                print(f"| {keep} of 8, {counts} | {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
