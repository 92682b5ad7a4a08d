"""Observing in two processes over one, each on one thread, alternated: how much of two cores arrives.

    OMP_NUM_THREADS=1 python benchmarks/processes.py --rounds 5

Qwen3-MoE blocks of 64 experts with random weights, all of calibration's batches through all layers, twice: sums for a
criterion, and the greedy search. Both kinds of run are started by torchrun; only observing is timed, from when all
processes have the model until all have the figures, which are compared. Where other work shares the cores, processor
time tells more: that of one over that of the busier of two is what idle cores would give.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compressor import MoEModel, Processes
from compressor.data.sequences import TokenBatch
from compressor.machine.progress import Progress
from compressor.model.find_structure import find_structure
from compressor.observe.layerwise import observe
from compressor.plugin import JoinedStatistic
from compressor.selection.activation_sums import ExpertSums
from compressor.selection.greedy import GreedySearch

LAYERS, EXPERTS, HIDDEN, WIDTH, TOP_K = 3, 64, 512, 256, 8
KINDS = {
    "sums": ExpertSums,
    "greedy search": lambda layer: JoinedStatistic([ExpertSums(layer), GreedySearch(layer, [EXPERTS // 2])]),
}


def made_model() -> MoEModel:
    """A model of the shape above."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=512,
        hidden_size=HIDDEN,
        moe_intermediate_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        norm_topk_prob=True,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    return MoEModel(model, find_structure(type(model), config))


def measure(folder: Path, num_batches: int) -> None:
    """Observe with each kind of statistic, and write seconds and what was found."""
    with Processes.joined() as processes:
        moe = made_model()
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(512, (num_batches, 4, 256), generator=generator)
        batches = [TokenBatch(one, torch.ones_like(one, dtype=torch.bool)) for one in ids]
        found = {}
        for kind, make in KINDS.items():
            made = {layer.path: make(layer) for layer in moe.layers}
            processes.wait()
            started, worked = time.perf_counter(), time.process_time()
            figures = observe(moe, batches, made, Progress(), processes=processes)
            by_process = processes.exchange(time.process_time() - worked)
            found[kind] = {
                "seconds": time.perf_counter() - started,
                "processor": max(by_process),
                "sums": sum(float(one["sums.share_norm"].sum()) for one in figures.values()),
                "order": [one["greedy.order"].tolist() for one in figures.values() if "greedy.order" in one],
            }
        if processes.is_first:
            (folder / "found.json").write_text(json.dumps(found))


def started(num_processes: int, num_batches: int) -> dict[str, dict[str, Any]]:
    """What one start gives."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            f"{num_processes}",
        ]
        own = [__file__, "--measure", folder, "--batches", f"{num_batches}"]
        subprocess.run([*command, *own], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        found: dict[str, dict[str, Any]] = json.loads((Path(folder) / "found.json").read_text())
        return found


def main() -> None:
    """Alternate, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=16, help="of 1,024 tokens")
    parser.add_argument("--measure", type=Path, help="(what this starts)")
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure, arguments.batches)
        return
    ratios: dict[str, list[float]] = {f"{kind}, {what}": [] for kind in KINDS for what in ("seconds", "processor")}
    for _ in range(arguments.rounds):
        one, two = started(1, arguments.batches), started(2, arguments.batches)
        for kind in KINDS:
            assert one[kind]["order"] == two[kind]["order"]
            assert abs(one[kind]["sums"] / two[kind]["sums"] - 1) < 1e-9
            for what in ("seconds", "processor"):
                ratios[f"{kind}, {what}"].append(one[kind][what] / two[kind][what])
            print(
                {kind: [{k: round(v, 1) for k, v in of[kind].items() if k != "order"} for of in (one, two)]}, flush=True
            )
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    for kind, of_kind in ratios.items():
        print(f"| {kind} | {statistics.median(of_kind):.2f} ({min(of_kind):.2f}–{max(of_kind):.2f}) |")


if __name__ == "__main__":
    main()
