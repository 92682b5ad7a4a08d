"""Time the exact search over all sets of experts against the published loop: ``python benchmarks/subset_search.py``.

The loop is the paper's algorithm (arXiv 2402.14800, section 3.2), written here from its description: for every set of
experts, mask the router, run the layer again on every calibration batch, and add up the norms of the change. Ours is
what users run: ``MoEModel.watched`` with the method's own statistic, on the MoE layer of a real transformers model
with random weights. Both give the same losses, which is asserted each time. What is printed are ratios measured side
by side in one run:

    loop ÷ ours        median over the alternations (minimum – maximum)
    observing cost     one calibration pass with the statistic ÷ one without, in ordinary forwards of the layer

A loop over thousands of sets is timed on a few of them, evenly spaced, and extrapolated; the table marks it with ≈.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm as norm
from torch.nn import functional
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, PhimoeConfig
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from compressor import MoEModel
from compressor.machine.environment import hardware, versions
from compressor.model.capture import RealTokens
from compressor.selection.exact import SubsetErrors

HIDDEN, WIDTH, TOKENS, BATCHES = 512, 1792, 4096, 2
TIMED_TOGETHER = 3  # short runs are timed several times and averaged, the loop is long enough by itself

_SHAPE = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


@dataclass(frozen=True)
class Case:
    """One line of the table. `sampled`: how many sets the loop really runs, None for all of them."""

    family: str
    num_experts: int
    top_k: int
    num_kept: int
    dtype: str = "float32"
    sampled: int | None = None
    target: float | None = None
    target_cost: float | None = None

    @property
    def num_sets(self) -> int:
        """C(n, r)."""
        return math.comb(self.num_experts, self.num_kept)

    @property
    def title(self) -> str:
        """For the table and `--only`."""
        return f"{self.family} n={self.num_experts} k={self.top_k} r={self.num_kept} {self.dtype}"


CASES = (
    Case("mixtral", 8, 2, 6, target=14.0),
    Case("mixtral", 8, 2, 4, target=22.0, target_cost=3.5),
    Case("mixtral", 16, 2, 8, sampled=8, target=2000.0),
    Case("mixtral", 8, 2, 4, dtype="bfloat16"),
    Case("olmoe", 8, 2, 4),
    Case("phimoe", 8, 2, 4),
)


def build(case: Case, experts: str) -> nn.Module:
    """A causal language model with one MoE layer and random weights."""
    width, count = {"intermediate_size": WIDTH}, case.num_experts
    config: Any
    if case.family == "mixtral":
        config = MixtralConfig(
            **_SHAPE, **width, vocab_size=64, num_local_experts=count, num_experts_per_tok=case.top_k
        )
    elif case.family == "olmoe":
        config = OlmoeConfig(**_SHAPE, **width, vocab_size=64, num_experts=count, num_experts_per_tok=case.top_k)
    else:
        config = PhimoeConfig(**_SHAPE, **width, vocab_size=64, num_local_experts=count, num_experts_per_tok=case.top_k)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation=experts)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3:  # stacked experts: outputs as large as their inputs, so that losses are well above 0
            parameter.data.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
        elif name.endswith(("gate.weight", "router.weight")):
            parameter.data.normal_(0.0, 2 * HIDDEN**-0.5, generator=generator)
    return model.to(getattr(torch, case.dtype)).eval().requires_grad_(False)  # type: ignore[no-any-return]


def router_choice(family: str, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """(ids, weights) [T, K], as the family's router chooses: written out, not taken from the code under test."""
    if family == "phimoe":
        weights, index = sparsemixer(logits, jitter_eps=0.01, training=False, top_k=top_k)
        return index, weights
    weights, index = functional.softmax(logits.float(), dim=-1).topk(top_k, dim=-1)
    if family == "mixtral":
        weights = weights / weights.sum(-1, keepdim=True)
    return index, weights.to(logits.dtype)


def masked_forward(family: str, block: Any, hidden: Tensor, dropped: tuple[int, ...]) -> Tensor:
    """The layer's routed output when the router cannot choose the dropped experts."""
    router = block.gate if hasattr(block, "gate") else block.router
    logits = functional.linear(hidden, router.weight)
    if dropped:
        logits = logits.index_fill(-1, torch.tensor(dropped), float("-inf"))
    return block.experts(hidden, *router_choice(family, logits, router.top_k))  # type: ignore[no-any-return]


def loop(case: Case, block: Any, batches: list[Tensor], sets: list[tuple[int, ...]]) -> list[float]:
    """The published algorithm: the loss of every set given, one set at a time."""
    full = [masked_forward(case.family, block, hidden, ()) for hidden in batches]
    return [
        sum(
            float(norm(masked_forward(case.family, block, hidden, dropped) - output, dtype=torch.float64))
            for hidden, output in zip(batches, full, strict=True)
        )
        for dropped in sets
    ]


def ours(case: Case, model: nn.Module, moe: MoEModel, batches: list[Tensor]) -> list[float]:
    """The loss of every set, as `compressor run` finds it: one calibration pass with the layer watched."""
    layer = moe.layers[0]
    block = model.get_submodule(layer.path)
    statistic = SubsetErrors(layer, [case.num_kept])
    real = RealTokens(torch.ones(TOKENS // BATCHES, dtype=torch.bool))
    with moe.watched({layer.path: statistic.update}, real):
        for hidden in batches:
            block(hidden[None])
    return statistic.tensors()["subsets.squared_error"].sqrt().sum(0).tolist()


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, what it returned). On one thread processor time, so that others at work on the machine count less."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    result = function()
    return clock() - start, result


@torch.no_grad()
def measure(case: Case, repeats: int, experts: str) -> dict[str, Any]:
    """Alternate loop, ours and ordinary forwards; one ratio per alternation."""
    model = build(case, experts)
    moe = MoEModel(model)
    block = model.get_submodule(moe.layers[0].path)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(getattr(torch, case.dtype))
    batches = list(hidden.split(TOKENS // BATCHES))

    every = list(itertools.combinations(range(case.num_experts), case.num_experts - case.num_kept))
    step = 1 if case.sampled is None else len(every) / case.sampled
    places = [int(step * number) for number in range(case.sampled or len(every))]
    tolerance = 1e-6 if case.dtype == "float32" else 2e-2
    loop(case, block, batches, every[:1])
    ours(case, model, moe, batches)

    ratios, costs, differences = [], [], []
    for _ in range(repeats):
        loop_seconds, expected = timed(lambda: loop(case, block, batches, [every[place] for place in places]))
        our_seconds, (losses, *_) = timed(lambda: [ours(case, model, moe, batches) for _ in range(TIMED_TOGETHER)])
        forward_seconds, _ = timed(lambda: [block(one[None]) for _ in range(TIMED_TOGETHER) for one in batches])
        differences.append(max(abs(losses[place] / wanted - 1) for place, wanted in zip(places, expected, strict=True)))
        assert differences[-1] < tolerance, f"{case.title}: losses differ by {differences[-1]:.1e}"
        # the loop runs the layer once more than there are sets, for the output of the whole layer
        ratios.append(loop_seconds * (1 + len(every)) / (1 + len(places)) / (our_seconds / TIMED_TOGETHER))
        costs.append(our_seconds / forward_seconds)
    return {**asdict(case), "sets": len(every), "ratios": ratios, "costs": costs, "difference": max(differences)}


def spread(values: list[float], digits: int) -> str:
    """Median (minimum–maximum)."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


def row(result: dict[str, Any]) -> str:
    """One line of a Markdown table."""
    case = Case(**{name: result[name] for name in Case.__dataclass_fields__})
    digits = 0 if case.sampled else 1
    mark = "≈ " if case.sampled else ""
    target = "" if case.target is None else f"≥ {case.target:,.0f}"
    target_cost = "" if case.target_cost is None else f"≤ {case.target_cost}"
    ideal = (
        case.num_experts
        if case.family == "phimoe"
        else min(case.num_experts, case.top_k + case.num_experts - case.num_kept)
    )
    return (
        f"| {case.title} | {case.num_sets:,} | {mark}{spread(result['ratios'], digits)} | {target} | "
        f"{spread(result['costs'], 2)} | {ideal / case.top_k:.1f} | {target_cost} | {result['difference']:.0e} |"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="alternations per line (default: %(default)s)")
    parser.add_argument(
        "--experts", default="eager", help="transformers' experts_implementation (default: %(default)s)"
    )
    parser.add_argument("--only", default="", help="only lines whose name contains this text")
    parser.add_argument("--json", metavar="FILE", help="write everything measured to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    machine = hardware("cpu")
    print(f"{machine['processor']}, {machine['cores']} cores, {arguments.threads} thread(s) used")
    print(", ".join(f"{name} {number}" for name, number in versions({}).items()))
    print(f"hidden {HIDDEN}, expert width {WIDTH}, {TOKENS} tokens in {BATCHES} batches, {arguments.experts} experts,")
    clock = "processor time" if arguments.threads == 1 else "wall-clock time"
    print(f"{clock}, median of {arguments.repeats} alternations (minimum–maximum)\n")
    print("| layer | sets | loop ÷ ours | target | observing cost, forwards | by count | target | losses differ by |")
    print("|---|---|---|---|---|---|---|---|")
    results = []
    for case in CASES:
        if arguments.only in case.title:
            results.append(measure(case, arguments.repeats, arguments.experts))
            print(row(results[-1]), flush=True)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine, "versions": versions({}), "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
