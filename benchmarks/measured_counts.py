"""What measuring counts costs: candidates that set out within the walk, against a whole forward for each of them.

    python benchmarks/measured_counts.py --layers 8

A random Mixtral is observed twice, without and with candidates (as many counts of each layer as by default); the
difference is what measuring costs. Beside it: whole forwards of the same text under each candidate's mask (the obvious
way, C·L of them), and plain forwards of C·(L + 1)/2 times the text (what it should cost). CPU time, so other work
beside it counts little; all in one run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from compressor import MoEModel
from compressor.data.sequences import make_batches
from compressor.machine.progress import Progress
from compressor.observe import forward, layerwise
from compressor.observe.divergence import kl_divergences
from compressor.observe.measuring import Candidate, Measured
from compressor.selection.activation_sums import ExpertSums
from compressor.selection.layer_plan import LayerPlan, measured_amount, measured_counts
from compressor.selection.options import SelectionOptions


def main() -> None:
    """Measure, and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2048, help="of the small text")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = MixtralConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=512, num_hidden_layers=args.layers, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=args.experts, num_experts_per_tok=2,
    )  # fmt: skip
    moe = MoEModel(MixtralForCausalLM(config).eval())
    text = make_batches(list(torch.randint(2048, (args.tokens // 256, 256))), 4)
    options = SelectionOptions(keep={"fraction": 0.5})
    counts = measured_counts(LayerPlan(moe.layers[0], options), args.layers)
    contexts = {layer.path: [partial(moe.masked, {layer.path: range(c)}) for c in counts] for layer in moe.layers}
    measured = Measured(
        text, lambda path, _: [Candidate(n, {path: c}) for n, c in enumerate(contexts[path])], len(counts)
    )

    def walk(**how: Any) -> None:
        statistics = {layer.path: ExpertSums(layer) for layer in moe.layers}
        layerwise.observe(moe, text, statistics, Progress(), **how)

    def one_after_another() -> None:
        for of_layer in contexts.values():
            for context in of_layer:
                for batch in text:
                    plain = forward.logits(moe.model, batch)
                    with context():
                        kl_divergences(plain, forward.logits(moe.model, batch))

    def plainly() -> None:
        for _ in range(round(len(counts) * (args.layers + 1) / 2)):
            for batch in text:
                forward.logits(moe.model, batch)

    walk(measured=measured)  # everything once
    took = seconds(partial(walk, measured=measured)) - seconds(walk)
    tokens, default = measured_amount(options, args.layers)
    print(f"{len(counts)} counts of {args.layers} layers on {args.tokens} tokens (by default {default} on {tokens})")
    print(f"measuring in the walk ÷ plain forwards of as much text: {took / seconds(plainly):.2f}")
    print(f"one candidate after another ÷ measuring in the walk:    {seconds(one_after_another) / took:.2f}")


def seconds(work: Callable[[], None]) -> float:
    """CPU seconds, the smaller of two."""
    found = []
    for _ in range(2):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return min(found)


if __name__ == "__main__":
    main()
