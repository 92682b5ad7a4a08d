"""What a layer costs when it skips experts, in ordinary forwards of the same layer; and a model's prefill and decode.

    OMP_NUM_THREADS=2 python benchmarks/skipping.py [--rounds 9] [--dtype float32] [--implementations grouped_mm]
    python benchmarks/skipping.py --device cuda --dtype bfloat16

Transformers' own blocks with random weights at true widths: 64 experts of 2048 × 1024 with top-8 (OLMoE), and 8 experts
of 4096 × 3584 with top-2 (Mixtral's, an expert a quarter as wide). The same block runs unskipped and skipping in turn,
on the same tokens, with the same experts implementation underneath; a line gives the median ratio and its range.
Thresholds are set so that the named share of (token, expert) pairs is dropped; 0: no weight falls below.

* ``of FLOPs``: the time saved over the share of the experts' FLOPs saved; 1 is all of it.
* ``fewer pairs``: the same block given fewer tokens, so that it has as many pairs as are left: what the implementation
  underneath saves by itself. An expert's weights are read whether it has 48 rows or 64, so it is less than the FLOPs.
* ``of possible``: the time saved over what that saves.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compressor import MoEModel, SkipRule

SHAPES = {
    "OLMoE 64 × 2048 × 1024, top-8": (
        "olmoe",
        {"hidden_size": 2048, "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8},
    ),
    "Mixtral 8 × 4096 × 3584, top-2": (
        "mixtral",
        {"hidden_size": 4096, "intermediate_size": 3584, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
}
TOKENS = (1, 16, 512, 2048)
DROPPED = (0.0, 0.25, 0.5)
RATIO = SkipRule("ratio", True, beta=1.0)


def model_of(
    kind: str, settings: dict[str, int], layers: int, dtype: torch.dtype, implementation: str, device: str
) -> MoEModel:
    """Random weights; nothing but the layers is of interest, so its vocabulary is small."""
    config = AutoConfig.for_model(
        kind,
        **settings,
        num_hidden_layers=layers,
        vocab_size=1024,
        num_attention_heads=16,
        num_key_value_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation=implementation).eval()
    return MoEModel(model)


def seconds_of(function: Callable[[], object]) -> float:
    """Wall clock, until the GPU has done what it was asked for."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def beta_for(share: float, scores_TK: torch.Tensor) -> float:
    """The threshold below which this share of all pairs lies; the largest of a token scores 1."""
    ordered = scores_TK.flatten().sort().values
    count = round(share * len(ordered))
    return float(ordered[count]) if count else 1e-30


def alternated(first: Callable[[], object], others: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Times of the others over the first, one ratio a round; the order turns around every round."""
    ratios: list[list[float]] = [[] for _ in others]
    for number in range(rounds + 1):
        seconds = {}
        for function in (first, *others) if number % 2 else (*reversed(others), first):
            seconds[function] = seconds_of(function)
        if number:  # the first round warms up
            for own, other in zip(ratios, others, strict=True):
                own.append(seconds[other] / seconds[first])
    return ratios


def spread(ratios: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f}–{max(ratios):.3f})"


@torch.no_grad()
def layer_line(moe: MoEModel, num_tokens: int, share: float, rounds: int) -> list[str]:
    """The cells of a line behind the number of tokens."""
    (layer,) = moe.layers
    block, experts = moe.model.get_submodule(layer.path), moe.model.get_submodule(layer.experts)
    size = moe.config.hidden_size
    hidden = torch.randn(1, num_tokens, size, generator=torch.Generator().manual_seed(1)).to(
        moe.model.device, moe.model.dtype
    )
    _, weights_TK, index_TK = moe.model.get_submodule(layer.router)(hidden.view(-1, size))
    rule = RATIO.at(beta_for(share, RATIO.scores(index_TK, weights_TK)))
    kept = float(rule.kept(index_TK, weights_TK).double().mean())
    base = experts.config._experts_implementation
    moe.skip({layer.path: rule})
    fewer = hidden[:, : max(1, round(num_tokens * kept))]
    repeats = 1

    def run(given: torch.Tensor, implementation: str) -> None:
        experts.config._experts_implementation = implementation
        for _ in range(repeats):
            block(given)

    def skipping() -> None:
        run(hidden, "compressor_skip")

    seconds_of(skipping)
    repeats = max(1, round(0.2 / seconds_of(skipping)))  # a fifth of a second at least
    skipped, possible = alternated(lambda: run(hidden, base), (skipping, lambda: run(fewer, base)), rounds)
    moe.skip({})
    cells = [f"{1 - kept:.0%}", spread(skipped)]
    if kept == 1 or num_tokens == 1:
        return [*cells, "", "", ""]
    saved, could = 1 - statistics.median(skipped), 1 - statistics.median(possible)
    return [*cells, f"{saved / (1 - kept):.2f}", spread(possible), f"{saved / could:.2f}" if could > 0.02 else "–"]


@torch.no_grad()
def model_lines(moe: MoEModel, rounds: int) -> None:
    """Prefill of 512 tokens, and 16 tokens of decoding behind 8, skipping ÷ unskipped."""
    ids = torch.randint(1024, (1, 512), generator=torch.Generator().manual_seed(0)).to(moe.model.device)
    scores: dict[str, torch.Tensor] = {}
    hooks = [
        moe.model.get_submodule(layer.router).register_forward_hook(
            lambda _, __, output, path=layer.path: scores.__setitem__(path, RATIO.scores(output[2], output[1]))
        )
        for layer in moe.layers
    ]
    moe.model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()

    def prefill() -> None:
        moe.model(ids, use_cache=False)

    def decode() -> None:
        moe.model.generate(ids[:, :8], max_new_tokens=16, min_new_tokens=16, do_sample=False)

    for share in DROPPED[1:]:
        rules = {path: RATIO.at(beta_for(share, one)) for path, one in scores.items()}
        for name, work in (("prefill of 512 tokens", prefill), ("decoding 16 tokens", decode)):

            def with_rules(rules: dict[str, SkipRule], work: Callable[[], None] = work) -> None:
                moe.skip(rules)
                work()

            (ratios,) = alternated(
                lambda run=with_rules: run({}), (lambda run=with_rules, rules=rules: run(rules),), rounds
            )
            print(f"| {name} | {share:.0%} | {spread(ratios)} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--implementations", nargs="+", default=["grouped_mm", "eager"])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--layers-only", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--divide", type=int, default=1, help="widths by this, to try the script out")
    given = parser.parse_args()
    dtype = getattr(torch, given.dtype)
    where = torch.cuda.get_device_name(given.device) if given.device != "cpu" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}, {given.dtype}, {given.rounds} rounds, widths ÷ {given.divide}")
    for title, (kind, shape) in SHAPES.items():
        settings = {key: size // given.divide if key.endswith("_size") else size for key, size in shape.items()}
        for implementation in given.implementations:
            print(f"\n{title}, {implementation}\n")
            print("| tokens | pairs dropped | skipping ÷ unskipped | of FLOPs | fewer pairs | of possible |")
            print("|--:|--:|--:|--:|--:|--:|")
            moe = model_of(kind, settings, 1, dtype, implementation, given.device)
            for num_tokens in given.tokens:
                pairs = num_tokens * moe.layers[0].top_k
                for share in (one for one in DROPPED if not 0 < one * pairs < 1):
                    cells = layer_line(moe, num_tokens, share, given.rounds)
                    print(f"| {num_tokens} | {' | '.join(cells)} |", flush=True)
            del moe
        if not given.layers_only:
            print(f"\n{title}, a model of four layers, {given.implementations[0]}\n")
            print("| what | pairs dropped | skipping ÷ unskipped |\n|---|--:|--:|")
            moe = model_of(kind, settings, 4, dtype, given.implementations[0], given.device)
            model_lines(moe, given.rounds)


if __name__ == "__main__":
    main()
