"""What storing weights in fewer bits takes: rounding to the nearest beside `cp` of the bytes read, by the clock, and
GPTQ of a layer beside observing it, in CPU time.

    python benchmarks/quantization.py --experts 64 --tokens 16384
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from linear_inputs import observing
from safetensors.torch import save_file
from transformers import OlmoeConfig, OlmoeForCausalLM

from compressor import MoEModel
from compressor.data.sequences import make_batches
from compressor_quantization.schemes import Scheme
from compressor_quantization.storage import write

SCHEMES = [Scheme("W4A16", 128), Scheme("W8A16", 128), Scheme("FP8_DYNAMIC")]


def seconds(do: Callable[[], Any]) -> tuple[float, float]:
    """(seconds by the clock, of processors) that something takes."""
    clock, processor = time.perf_counter(), time.process_time()
    do()
    return time.perf_counter() - clock, time.process_time() - processor


def storing(num_experts: int) -> None:
    """OLMoE's experts of one layer, in one file."""
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
        for scheme in SCHEMES:
            copying, rounding = [], []
            for _ in range(3):
                shutil.rmtree(target, ignore_errors=True)
                target.mkdir()
                copy = ["cp", str(source / "model.safetensors"), str(target / "copy")]
                copying.append(seconds(lambda copy=copy: subprocess.run(copy, check=True))[0])
                names = dict.fromkeys(tensors, (scheme, True))
                rounding.append(seconds(lambda names=names: write(source, target, names)))
            clock, processor = min(one for one, _ in rounding), min(one for _, one in rounding)
            print(
                f"{scheme}: {num_bytes / clock / 1e6:.0f} MB/s, {num_bytes / processor / 1e6:.0f} MB per second of a "
                f"processor; cp {num_bytes / min(copying) / 1e6:.0f} MB/s, ratio {min(copying) / clock:.2f}"
            )


def rounding_by_text(num_experts: int, num_tokens: int) -> None:
    """A layer of OLMoE's shape with so many experts, each chosen as often as in the whole layer by as much text."""
    config = OlmoeConfig(num_hidden_layers=1, num_experts=num_experts, vocab_size=512)
    moe = MoEModel(OlmoeForCausalLM(config).eval())
    ids = torch.randint(2, 512, (num_tokens // 256, 256), generator=torch.Generator().manual_seed(0))
    batches = make_batches(list(ids), 8, "")
    options = {"scheme": "W4A16", "method": "gptq"}
    found = [
        seconds(observing(moe, batches, name, **given))[1] for name, given in ((None, {}), ("quantization", options))
    ]
    print(
        f"one layer, {num_experts} experts of 2048 → 1024 → 2048, top-8, {num_tokens:,} tokens: observing "
        f"{found[0]:.1f} s of a processor, with GPTQ {found[1]:.1f} s, ratio {found[1] / found[0]:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8192)
    given = parser.parse_args()
    storing(given.experts)
    rounding_by_text(given.experts, given.tokens)


if __name__ == "__main__":
    main()
