"""What it costs to see the inputs of linear maps, and to observe beside the original: ratios to observing the router.

OMP_NUM_THREADS=1 python benchmarks/linear_inputs.py

The demo model and OLMoE's shape (one layer, 64 experts of 2048 × 1024, random weights), in memory; alternated.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

import compressor
from compressor import MoEModel
from compressor.data.demo import model_folder
from compressor.data.sequences import TokenBatch
from compressor.machine.progress import Progress
from compressor.observe import layerwise
from compressor.plugin import RoutedTokens, Statistic
from compressor.plugins import load_plugins
from compressor.run.passes import statistics_of


class Choices(Statistic):
    """How often each expert is chosen: as little as a statistic can ask."""

    def __init__(self, num_experts: int) -> None:
        self.counts = torch.zeros(num_experts, dtype=torch.int64)

    def update(self, tokens: RoutedTokens) -> None:
        """Count."""
        self.counts += tokens.index_TK.flatten().bincount(minlength=len(self.counts))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The counts."""
        return {"same.counts": self.counts}


def observing(moe: MoEModel, batches: list[TokenBatch], name: str | None, **options: Any) -> Callable[[], None]:
    """What observes for a method, by its name; None: choices alone."""
    plugins = load_plugins()
    kind = plugins.methods[name] if name else None
    method = kind(kind.options_type(**options), plugins.criteria) if kind else None
    original = layerwise.Original(MoEModel(copy.deepcopy(moe.model))) if method and method.needs_original else None

    def run() -> None:
        if method is None:
            wanted, linears = {layer.path: Choices(layer.num_experts) for layer in moe.layers}, {}
        else:
            wanted, linears = statistics_of(method, moe)
        layerwise.observe(moe, batches, wanted, Progress(), linears=linears, original=original)

    return run


def models() -> dict[str, MoEModel]:
    """By name."""
    config = OlmoeConfig(
        hidden_size=2048, intermediate_size=1024, num_experts=64, num_experts_per_tok=8, num_hidden_layers=1,
        num_attention_heads=16, vocab_size=512,
    )  # fmt: skip
    torch.manual_seed(0)
    return {"demo": MoEModel(compressor.load(model_folder())[0]), "OLMoE layer": MoEModel(OlmoeForCausalLM(config))}


def main() -> None:
    """Print the ratios."""
    ways = {
        "wanda": ("wanda", {}),
        "wanda, attention": ("wanda", {"attention": True}),
        "reap": ("expert_pruning", {"keep": 0.5, "criterion": "reap"}),
        "output_scale (original too)": ("output_scale", {}),
        "router_healing (original too)": ("router_healing", {"min_tokens": 1}),
    }
    print("| model | " + " | ".join(ways) + " |\n|---|" + "--:|" * len(ways))
    for name, moe in models().items():
        ids = torch.randint(3, 256, (4, 256), generator=torch.Generator().manual_seed(0))
        batches = [TokenBatch(ids.roll(number, 0), torch.ones_like(ids, dtype=torch.bool)) for number in range(2)]
        runs = {None: observing(moe, batches, None)}
        runs |= {way: observing(moe, batches, of, **options) for way, (of, options) in ways.items()}
        seconds: dict[Any, list[float]] = {way: [] for way in runs}
        for number in range(4):
            for way, run in runs.items():
                started = time.process_time()
                run()
                if number:  # the first one warms up
                    seconds[way].append(time.process_time() - started)
        cells = []
        for way in ways:
            ratios = [one / base for one, base in zip(seconds[way], seconds[None], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
