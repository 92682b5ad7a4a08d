"""What should be summed when experts are shared out among layers: ``python benchmarks/shared_counts.py``.

Prunes the demo model to a mean number of experts per layer, with the counts shared out by each of several costs, and
prints held-out perplexity of code, prose and arithmetic. `expert_pruning` with ``keep: {mean: 6}`` uses the squared
loss. Takes about a minute on one core.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch

from compressor import MoEModel
from compressor.checkpoint.find import find_checkpoint
from compressor.checkpoint.load import load_model, load_tokenizer
from compressor.data.packing import load_sequences
from compressor.data.sequences import Sequences, make_batches
from compressor.evaluation.perplexity import perplexity
from compressor.machine.environment import hardware, versions
from compressor.machine.progress import Progress
from compressor.observe import layerwise
from compressor.plugin import Gathered
from compressor.recipe.schema import load_recipe
from compressor.selection.layer_plan import allocated
from compressor_expert_pruning import ExpertPruning, ExpertPruningOptions

DOMAINS = ("code", "prose", "arithmetic")
COSTS: dict[str, Callable[[dict[str, Any]], float]] = {
    "loss": lambda best: float(best["loss"]),
    "relative loss": lambda best: float(best["relative_loss"]),
    "squared loss": lambda best: float(best["loss"]) ** 2,
    "squared relative loss": lambda best: float(best["relative_loss"]) ** 2,
}


def text(tokenizer: Any, domain: str, samples: int, *, seed: int, split: Any) -> Sequences:
    """Demo text, 256 tokens a sequence, as recipes/quickstart.yaml reads it."""
    data = [{"demo": domain, "samples": samples, "length": 256}]
    recipe = load_recipe({"model": "demo", "calibration": {"data": data}, "passes": [{"none": {}}]}).recipe
    return load_sequences(recipe.calibration.data[0], tokenizer, seed=seed, split=split)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the calibration text (default: %(default)s)")
    parser.add_argument("--mean", type=float, nargs="+", default=[7, 6, 5], help="experts per layer (default: 7 6 5)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = find_checkpoint("demo")
    model, tokenizer = load_model(found), load_tokenizer(found)
    moe = MoEModel(model)
    held_out = {domain: text(tokenizer, domain, 32, seed=0, split="held-out") for domain in DOMAINS}

    def row(title: str, counts: str, kept: dict[str, list[int]]) -> str:
        with moe.masked(kept):  # removed equals masked
            found = [perplexity(model, held_out[domain], 8).perplexity for domain in DOMAINS]
        mean = math.exp(sum(map(math.log, found)) / len(found))
        return f"| {title} | {counts} | {' | '.join(f'{value:.2f}' for value in [*found, mean])} |"

    print(f"{hardware('cpu')['processor']}; {versions({})}; seed {arguments.seed}\n")
    print("| calibrated on | mean | cost summed | kept | code | prose | arithmetic | geometric mean |")
    print("|---|--:|---|---|--:|--:|--:|--:|")
    print(row("– | 8 | nothing dropped", "8 8 8 8", {}))
    for domain in ("mix", "code"):
        batches = make_batches(text(tokenizer, domain, 64, seed=arguments.seed, split="train").ids, 8)
        method = ExpertPruning(ExpertPruningOptions(keep={"mean": 6}))
        statistics = {layer.path: method.statistic(layer) for layer in moe.layers}
        figures = Gathered(
            layerwise.observe(moe, batches, {path: one for path, one in statistics.items() if one}, Progress())
        )
        best = {
            path: {count: one for count, (one, _) in method.best_of_counts(moe.layer(path), figures).items()}
            for path in figures
        }
        for mean in arguments.mean:
            uneven = {path: {count: (count - mean) ** 2 for count in of} for path, of in best.items()}
            tables = {"even split": uneven} | {
                name: {path: {count: cost(one) for count, one in of.items()} for path, of in best.items()}
                for name, cost in COSTS.items()
            }
            for name, costs in tables.items():
                counts = allocated(costs, int(mean * len(best) + 0.5))
                kept = {path: best[path][count]["kept"] for path, count in counts.items()}
                print(row(f"{domain} | {mean:g} | {name}", " ".join(map(str, counts.values())), kept), flush=True)


if __name__ == "__main__":
    main()
