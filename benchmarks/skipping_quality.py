"""What skipping costs in quality: every rule at the same mean number of experts, beside fixed numbers of experts.

    python benchmarks/train_demo.py prepare
    python benchmarks/train_demo.py train --experts 64 --top-k 8 --expert-width 64 --output fine-grained
    python benchmarks/skipping_quality.py demo fine-grained

Each model is calibrated once, on the training split of three domains, and decided many times from these figures. What
is shown is measured on the held-out split with all layers skipping: experts that a token used (counted); perplexity.

* ``ratio``, ``tail_mass``, ``contribution``: one threshold for all layers, for a mean (`mean_experts`)
* ``even``: each layer with a threshold of its own, such that all of them use the same number
* ``squared errors``: the mean shared out among the layers so that their squared errors add up to least
* ``median``: the paper's rule
* ``top-k c``: fewer experts for every token, renormalised as the model does (config's number lowered); ``over r``: with
  the weights that they have among the best r (`normalise_over`)
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from compressor import MoEModel, SkipRule
from compressor.checkpoint.find import find_checkpoint
from compressor.checkpoint.load import load_model, load_tokenizer
from compressor.data.packing import load_sequences
from compressor.data.sequences import Sequences, make_batches
from compressor.data.sources import DemoSource
from compressor.evaluation.perplexity import perplexity
from compressor.machine.environment import hardware, versions
from compressor.machine.progress import Progress
from compressor.observe import layerwise
from compressor.plugin import Gathered
from compressor.selection.allocation import allocate
from compressor_dynamic_skipping import DynamicSkipping, DynamicSkippingOptions
from compressor_dynamic_skipping.curves import FixedCount, SkipCurves
from compressor_dynamic_skipping.thresholds import Curve, beta_for_mean

DOMAINS = ("code", "prose", "arithmetic")


def read(domain: str, samples: int, split: str, tokenizer: Any) -> Sequences:
    """Sequences of 256 tokens."""
    source = DemoSource(demo=domain, samples=samples, length=256)  # type: ignore[arg-type]
    return load_sequences(source, tokenizer, seed=0, split=split)  # type: ignore[arg-type]


def decided(moe: MoEModel, gathered: Gathered, **options: Any) -> dict[str, SkipRule]:
    """The rules that the method decides on."""
    method = DynamicSkipping(DynamicSkippingOptions(**options))
    return {path: SkipRule.of(one) for path, one in method.decide(moe.layers, gathered)["layers"].items()}


def ways(moe: MoEModel, gathered: Gathered, means: list[float]) -> Iterator[tuple[str, dict[str, SkipRule]]]:
    """Name → rules."""
    yield "median", decided(moe, gathered, threshold="median")
    for rule in ("ratio", "tail_mass", "contribution"):
        curves = {path: Curve.of(rule, gathered[path], range(len(gathered.domains))) for path in gathered}
        for mean in means:
            rules = decided(moe, gathered, rule=rule, mean_experts=mean)
            yield f"{rule}, {mean:g}", rules
            for name, shares in (
                ("even", dict.fromkeys(curves, mean)),
                ("squared errors", by_squared_errors(curves, mean)),
            ):
                betas = {path: beta_for_mean([one], shares[path]) for path, one in curves.items()}
                yield f"{rule}, {mean:g}, {name}", {path: rules[path].at(beta) for path, beta in betas.items()}


def by_squared_errors(curves: dict[str, Curve], mean: float, steps: int = 32) -> dict[str, float]:
    """Layer path → experts per token, in steps of 1/32, such that the layers' squared errors add up to least."""
    most = round(max(one.most for one in curves.values()))
    table_Ld = torch.full((len(curves), most * steps + 1), torch.inf, dtype=torch.float64)
    for row_d, one in zip(table_Ld, curves.values(), strict=True):
        for dropped in range(int((one.most - one.fewest) * steps) + 1):
            place = int(torch.searchsorted(one.gone_N, dropped / steps * one.tokens).clamp_max(len(one.gone_N) - 1))
            row_d[dropped] = one.error_N[place] / one.tokens
    row_of_layer = allocate(table_Ld, round(sum(one.most - mean for one in curves.values()) * steps))
    return {
        path: max(one.fewest, one.most - dropped / steps)
        for (path, one), dropped in zip(curves.items(), row_of_layer, strict=True)
    }


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="demo, or a folder")
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences of each domain")
    parser.add_argument("--held-out", type=int, default=32, help="held-out sequences of each domain")
    parser.add_argument("--output", type=Path, default=Path("skipping_quality.json"))
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    found: dict[str, Any] = {"versions": versions({}), "hardware": hardware("cpu"), "results": {}}
    for reference in args.models:
        source = find_checkpoint(reference)
        model, tokenizer = load_model(source, dtype="float32"), load_tokenizer(source)
        moe = MoEModel(model)
        top_k = moe.layers[0].top_k
        batches = [
            batch
            for domain in DOMAINS
            for batch in make_batches(read(domain, args.samples, "train", tokenizer).ids, 8, domain)
        ]
        statistics = {layer.path: SkipCurves(layer, FixedCount(1, top_k)) for layer in moe.layers}
        gathered = Gathered(layerwise.observe(moe, batches, statistics, Progress()), DOMAINS)
        held_out = [read(domain, args.held_out, "held-out", tokenizer) for domain in DOMAINS]
        rows: dict[str, Any] = {}

        def measure(name: str, rows: dict[str, Any] = rows, moe: MoEModel = moe, texts: Any = held_out) -> None:
            with moe.counted() as counter:
                values = [perplexity(moe.model, one).perplexity for one in texts]
            used = counter.experts_per_token
            mean = sum(used.values()) / len(used) if used else None
            geometric = math.exp(sum(map(math.log, values)) / len(values))
            rows[name] = {"used": mean, "perplexity": values, "geometric_mean": geometric}
            shown = " | ".join(f"{value:.2f}" for value in [*values, geometric])
            print(f"| {name} | {'' if mean is None else f'{mean:.2f}'} | {shown} |", flush=True)

        print(f"\n**{reference}: top-{top_k} of {moe.layers[0].num_experts}**\n")
        print("| way | experts used | code | prose | arithmetic | geometric mean |\n|---|--:|--:|--:|--:|--:|")
        measure("(all)")
        means = [1.75, 1.5, 1.25] if top_k == 2 else [0.75 * top_k, 0.5 * top_k, 0.375 * top_k]
        for name, rules in ways(moe, gathered, means):
            moe.skip(rules)
            measure(name)
        moe.skip({})
        everything = {layer.path: range(layer.num_experts) for layer in moe.layers}
        for count in sorted({max(1, round(mean)) for mean in means if round(mean) < top_k}, reverse=True):
            with moe.masked(everything, top_k=count):
                measure(f"top-k {count}")
            for over in (top_k, 2 * top_k, 4 * top_k):
                rule = SkipRule("top_k", True, top_k=count, normalise_over=over)
                if over <= moe.layers[0].num_experts:
                    moe.skip({layer.path: rule for layer in moe.layers})
                    measure(f"top-k {count}, over {over}")
            moe.skip({})
        found["results"][reference] = rows
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
