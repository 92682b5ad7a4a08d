"""Time the gathering of the criteria's figures: ``python benchmarks/criteria.py``.

What users run: ``MoEModel.watched`` with the method's statistic, on one MoE layer of a real transformers model with
random weights at true shapes, against transformers' own forward of the same block on the same tokens. Both alternate;
the median of the rounds' ratios is printed (minimum – maximum), in ordinary forwards of the layer:

    sums      every criterion but those below
    outputs   with each expert's summed output (mone)
    pairs     with the losses of single experts and of pairs (single_removal, quad_mix): (k + 1) / k forwards by count
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
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, OlmoeConfig, Qwen3MoeConfig

from compressor import MoEModel
from compressor.machine.environment import hardware, versions
from compressor.model.capture import RealTokens
from compressor.model.routed_tokens import RoutedTokens
from compressor.observe.statistic import JoinedStatistic, RankedStatistic
from compressor.selection.activation_sums import ExpertSums
from compressor.selection.pair_losses import PairLosses

_SHAPE = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 4}


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    family: str
    num_experts: int
    hidden_size: int
    width: int
    num_tokens: int
    top_k: int = 8
    dtype: str = "float32"

    @property
    def title(self) -> str:
        """For the table and `--only`."""
        return (
            f"{self.family} {self.num_experts}×{self.hidden_size}×{self.width} k={self.top_k} "
            f"{self.num_tokens} tokens {self.dtype}"
        )


CASES = (
    Case("olmoe", 64, 2048, 1024, 1024),
    Case("qwen3_moe", 128, 2048, 768, 1024),
)
PARTS: dict[str, Callable[[Any], list[RankedStatistic]]] = {
    "sums": lambda layer: [ExpertSums(layer)],
    "outputs": lambda layer: [ExpertSums(layer, outputs=True)],
    "pairs": lambda layer: [ExpertSums(layer), PairLosses(layer)],
}


def build(case: Case) -> nn.Module:
    """A causal language model with one MoE layer; random weights, outputs about as large as their inputs."""
    shape = {**_SHAPE, "hidden_size": case.hidden_size, "num_experts": case.num_experts}
    shape |= {"num_experts_per_tok": case.top_k}
    config: Any
    if case.family == "olmoe":
        config = OlmoeConfig(**shape, intermediate_size=case.width)
    else:
        config = Qwen3MoeConfig(**shape, moe_intermediate_size=case.width, norm_topk_prob=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model = model.to(getattr(torch, case.dtype)).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
        else:
            parameter.data.fill_(1.0)
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def seconds(run: Callable[[], object]) -> float:
    """Processor time of one call, on one thread, so that others at work on the machine count less."""
    started = time.process_time()
    run()
    return time.process_time() - started


@torch.no_grad()
def measure(case: Case, part: str, rounds: int) -> list[float]:
    """Observing ÷ the block's own forward, round by round."""
    moe = MoEModel(build(case))
    [layer] = moe.layers
    block: Any = moe.model.get_submodule(layer.path)
    generator = torch.Generator().manual_seed(1)
    shape = (1, case.num_tokens, case.hidden_size)
    hidden = torch.randn(shape, generator=generator).to(getattr(torch, case.dtype))
    real = RealTokens(torch.ones(case.num_tokens, dtype=torch.bool))
    statistic = JoinedStatistic(PARTS[part](layer))

    def plain() -> Tensor:
        return block(hidden)  # type: ignore[no-any-return]

    def visit(tokens: RoutedTokens) -> None:
        statistic.update(tokens)

    ratios = []
    plain()
    for _ in range(rounds):
        ordinary = seconds(plain)
        with moe.watched({layer.path: visit}, real):  # with it the fit of the router's rule, once a context
            ratios.append(seconds(plain) / ordinary)
    return ratios


def main() -> None:
    """Print the table, and the circumstances as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose title contains this")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| layer | " + " | ".join(arguments.parts) + " |\n|---|" + "--:|" * len(arguments.parts))
    for case in CASES:
        if arguments.only not in case.title:
            continue
        cells = []
        for part in arguments.parts:
            ratios = measure(case, part, arguments.rounds)
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})")
        print(f"| {case.title} | " + " | ".join(cells) + " |", flush=True)
    print(json.dumps({**versions({}), **hardware("cpu")}))


if __name__ == "__main__":
    main()
