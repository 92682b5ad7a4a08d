"""What storing weights in fewer bits takes: rounding to the nearest beside `cp` of the bytes read, and GPTQ of a layer
beside observing it.

    OMP_NUM_THREADS=1 python benchmarks/quantization.py
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from linear_inputs import observing
from safetensors.torch import save_file
from transformers import OlmoeConfig, OlmoeForCausalLM

from compressor import MoEModel
from compressor.data.sequences import make_batches
from compressor_quantization import rounding
from compressor_quantization.schemes import Scheme
from compressor_quantization.storage import write

SCHEMES = {
    str(one): one for one in (Scheme("W4A16", 128), Scheme("W8A16", 128), Scheme("FP8_DYNAMIC"), Scheme("FP8_BLOCK"))
}
WAYS = [*SCHEMES, "W4A16-128, no scales tried"]


def seconds(do: Callable[[], Any]) -> tuple[float, float]:
    """(seconds by the clock, of processors, a program that it starts included) that something takes."""
    clock, before = time.perf_counter(), _processor()
    do()
    return time.perf_counter() - clock, _processor() - before


def _processor() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in both)


def storing(num_experts: int, rounds: int) -> None:
    """OLMoE's experts of one layer, in one file: what `cp` takes over what storing takes, beside it in each round."""
    ratios: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    speeds: dict[str, list[float]] = {way: [] for way in ["cp", *WAYS]}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "source"), Path(folder, "target")
        source.mkdir()
        (source / "config.json").write_text("{}")
        shapes = {"gate_proj": (1024, 2048), "up_proj": (1024, 2048), "down_proj": (2048, 1024)}
        tensors = {
            f"model.layers.0.mlp.experts.{expert}.{name}.weight": (torch.randn(shape) / 50).bfloat16()
            for expert in range(num_experts)
            for name, shape in shapes.items()
        }
        save_file(tensors, source / "model.safetensors")
        num_bytes = sum(one.nbytes for one in tensors.values())

        def into_empty(do: Callable[[], Any]) -> tuple[float, float]:
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            return seconds(do)

        copy = ["cp", str(source / "model.safetensors"), str(target / "copy")]
        for number in range(rounds + 1):
            for way in WAYS:
                copied = into_empty(lambda: subprocess.run(copy, check=True))
                names = dict.fromkeys(tensors, (SCHEMES[way.partition(",")[0]], True))
                tried = rounding.tried if way in SCHEMES else lambda bits, size: [1.0]
                with patch.object(rounding, "tried", tried):
                    stored = into_empty(lambda names=names: write(source, target, names))
                if number:  # the first one warms up
                    ratios[way].append((copied[0] / stored[0], copied[1] / stored[1]))
                    speeds["cp"].append(num_bytes / copied[1] / 1e6)
                    speeds[way].append(num_bytes / stored[1] / 1e6)
    print(
        f"{rounds} rounds, medians; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, torch {torch.__version__}"
    )
    print("| | MB per second of a processor | cp ÷ storing, of processors | by the clock |\n|---|--:|--:|--:|")
    print(f"| `cp` | {median(speeds['cp']):.0f} | | |")
    for way, found in ratios.items():
        clock, processor = (median(one) for one in zip(*found, strict=True))
        print(f"| {way} | {median(speeds[way]):.0f} | {processor:.2f} | {clock:.2f} |")


def rounding_by_text(num_experts: int, num_tokens: int, rounds: int) -> None:
    """A layer of OLMoE's shape with so many experts, each chosen as often as in the whole layer by as much text."""
    config = OlmoeConfig(num_hidden_layers=1, num_experts=num_experts, vocab_size=512)
    moe = MoEModel(OlmoeForCausalLM(config).eval())
    ids = torch.randint(2, 512, (num_tokens // 256, 256), generator=torch.Generator().manual_seed(0))
    batches = make_batches(list(ids), 8, "")
    ways = {
        "router": (None, {}),
        "inputs": ("wanda", {}),
        "gptq": ("quantization", {"scheme": "W4A16", "method": "gptq"}),
    }
    runs = {way: observing(moe, batches, name, **given) for way, (name, given) in ways.items()}
    found = [{way: seconds(run)[1] for way, run in runs.items()} for _ in range(rounds + 1)][1:]  # the first warms up
    print(
        f"one layer, {num_experts} experts of 2048 → 1024 → 2048, top-8, float32, {num_tokens:,} tokens: observing "
        f"{median(one['router'] for one in found):.1f} s of a processor; seeing inputs "
        f"{median(one['inputs'] / one['router'] for one in found):.2f} ×, "
        f"GPTQ {median(one['gptq'] / one['router'] for one in found):.2f} ×"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="*", default=[2048, 8192])
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    storing(given.experts, given.rounds)
    for num_tokens in given.tokens:
        rounding_by_text(given.experts, num_tokens, given.rounds)


if __name__ == "__main__":
    main()
