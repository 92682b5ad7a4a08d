"""What the search for many experts costs, at the true shapes of two models, as ratios in one run.

    OMP_NUM_THREADS=1 python benchmarks/greedy_search.py

* ``observe and search``: everything that a recipe does at one layer (expert outputs of all ranks looked at, Gram
  matrices, sums, greedy removal and swaps for half of the experts), over one ordinary forward of transformers' own
  block on the same tokens. Alternated; median and range.
* ``criteria only``: the same with sums alone.
* ``search alone``: seconds and bytes a token on many tokens, whose Gram matrices are made up (rank 8 plus a diagonal).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, OlmoeConfig, Qwen3MoeConfig

from compressor import MoELayer, MoEModel
from compressor.machine.environment import hardware, versions
from compressor.model.capture import RealTokens
from compressor.plugin import JoinedStatistic, RoutingRule
from compressor.selection.activation_sums import ExpertSums
from compressor.selection.greedy import GreedySearch, Search
from compressor.selection.objective import Objective
from compressor.selection.token_grams import TokenGrams, num_ranks
from compressor.selection.token_state import TokenState, bytes_of_token

COMMON = {"num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 64}


@dataclass(frozen=True)
class Shape:
    """One layer."""

    name: str
    config: Any
    rule: RoutingRule


SHAPES = (
    Shape(
        "OLMoE 64 × 2048 × 1024, top-8, not renormalised",
        OlmoeConfig(hidden_size=2048, intermediate_size=1024, num_experts=64, num_experts_per_tok=8, **COMMON),
        RoutingRule("softmax", False, 1.0),
    ),
    Shape(
        "Qwen3-30B-A3B 128 × 2048 × 768, top-8, renormalised",
        Qwen3MoeConfig(
            hidden_size=2048,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            **COMMON,
        ),
        RoutingRule("softmax", True, 1.0),
    ),
)


def main() -> None:
    """Measure all shapes and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--search-tokens", type=int, default=262_144)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    found: dict[str, Any] = {"versions": versions({}), "hardware": hardware("cpu"), "settings": vars(args)}
    for shape in SHAPES:
        layer, ratios = against_forward(shape, args.tokens, args.rounds)
        found[shape.name] = ratios | search_alone(layer, shape.rule, args.search_tokens)
        print(json.dumps({shape.name: found[shape.name]}, indent=1), flush=True)
    print(json.dumps(found))


def against_forward(shape: Shape, num_tokens: int, rounds: int) -> tuple[MoELayer, dict[str, Any]]:
    """Ratios to an ordinary forward of the block."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape.config, dtype=torch.float32).eval()
    moe = MoEModel(model)
    (layer,) = moe.layers
    block = model.get_submodule(layer.path)
    router = model.get_submodule(layer.router)
    torch.nn.init.normal_(router.weight, std=2 / shape.config.hidden_size**0.5)
    hidden = torch.randn(1, num_tokens, shape.config.hidden_size)
    real = RealTokens(torch.ones(num_tokens, dtype=torch.bool))

    def watched(make: Callable[[], Any]) -> None:
        statistic = make()
        with moe.watched({layer.path: statistic.update}, real):
            block(hidden)
        statistic.tensors()

    half = layer.num_experts // 2
    runs: dict[str, Callable[[], object]] = {
        "forward": lambda: block(hidden),
        "criteria only": lambda: watched(lambda: JoinedStatistic([ExpertSums(layer)])),
        "observe and search": lambda: watched(
            lambda: JoinedStatistic([ExpertSums(layer), GreedySearch(layer, [half])])
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if round_:  # the first one warms up
                times[name].append(time.perf_counter() - started)
    ratios = {
        name: [a / b for a, b in zip(times[name], times["forward"], strict=True)] for name in runs if name != "forward"
    }
    figures = {
        name: {"median": round(statistics.median(of), 3), "range": [round(min(of), 3), round(max(of), 3)]}
        for name, of in ratios.items()
    }
    return layer, {"tokens": num_tokens, "forwards": figures}


def search_alone(layer: MoELayer, rule: RoutingRule, num_tokens: int) -> dict[str, Any]:
    """Seconds of greedy removal to one half, and of the swaps, on made-up tokens; bytes a token."""
    generator = torch.Generator().manual_seed(0)
    num_experts, half = layer.num_experts, layer.num_experts // 2
    ranks = num_ranks(layer, half)
    parts = []
    favour_E = torch.randn(num_experts, generator=generator)
    sizes_E = torch.randn(num_experts, generator=generator).mul(0.4).exp()
    directions_EF = torch.randn(num_experts, 8, generator=generator)
    batches = 16
    for batch in range(batches):
        size = num_tokens // batches
        logits = 1.5 * torch.randn(size, num_experts, generator=generator) + 0.5 * favour_E
        scores = logits.softmax(-1)
        top = scores.topk(ranks, dim=1)
        outputs = directions_EF[top.indices] * (1 + 0.5 * torch.randn(size, 1, 8, generator=generator))
        gram = torch.bmm(outputs, outputs.mT) + 8 * torch.eye(ranks)
        gram *= sizes_E[top.indices][:, :, None] * sizes_E[top.indices][:, None, :]
        parts.append(
            TokenGrams(
                top.indices.to(torch.int16),
                top.values,
                gram,
                torch.full((size,), batch, dtype=torch.int32),
                scores if rule.rescales_all else scores[:, :0],
            )
        )
    whole = TokenGrams(*(torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])))
    del parts
    started = time.perf_counter()
    state = TokenState(whole, rule, num_chosen=layer.top_k, top_k=layer.top_k, num_batches=batches)
    objective = Objective.of_batches(["text"] * batches, torch.ones(batches))
    search = Search(layer, [state], objective)
    prepared = time.perf_counter()
    for _ in search.remove(half):
        pass
    removed = time.perf_counter()
    before = float(objective(search.losses()))
    number = search.swap()
    ended = time.perf_counter()
    return {
        "search tokens": whole.num_tokens,
        "bytes a token": bytes_of_token(
            ranks, ranks, whole.score_TN.shape[1], layer.top_k, rescales_all=rule.rescales_all
        ),
        "seconds": {
            "prepare": round(prepared - started, 2),
            "remove": round(removed - prepared, 2),
            "swap": round(ended - removed, 2),
            "all": round(ended - started, 2),
        },
        "swaps": number,
        "gained by swaps": round(1 - float(objective(search.losses())) / before, 5),
        "uncovered": round(search.uncovered(), 5),
    }


if __name__ == "__main__":
    main()
