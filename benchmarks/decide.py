"""Deciding again from a statistics file of 48 layers × 128 experts and three domains: seconds, the file read included.

python benchmarks/decide.py
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import torch

import compressor
from compressor.observe.statistics_file import save_statistics
from compressor.selection.activation_sums import SUMS

LAYERS, EXPERTS, DOMAINS = 48, 128, ("code", "prose", "mathematics")


def main() -> None:
    """Write a file of made-up figures, and decide by it."""
    generator = torch.Generator().manual_seed(0)
    paths = [f"model.layers.{number}.mlp" for number in range(LAYERS)]
    layers = [
        {
            "path": path,
            "num_experts": EXPERTS,
            "top_k": 8,
            "num_groups": 1,
            "num_chosen_groups": 1,
            "num_extra_choices": 0,
            "parameters_per_expert": 1,
            "top_k_fixed": False,
            "watch_problem": None,
            "padding_problem": None,
        }
        for path in paths
    ]
    figures = {}
    for path in paths:
        sums = {
            f"sums.{name}": torch.rand(3, EXPERTS, generator=generator).double() * 1e5 for name in (*SUMS, "largest")
        }
        pairs = torch.rand(3, EXPERTS, EXPERTS, generator=generator).double()
        figures[path] = sums | {
            "pairs.loss": pairs @ pairs.mT,
            "batch.domain": torch.arange(3).repeat(16),
            "batch.squared_output": torch.rand(48, generator=generator).double(),
        }
    about = {
        "model": {"reference": "made up", "fingerprint": None},
        "tokenizer": "none",
        "domains": [],
        "layers": layers,
        "passes": {"0.expert_pruning": {"domains": list(DOMAINS), "progressive": False, "layers": layers}},
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "statistics.safetensors"
        save_statistics(file, {"0.expert_pruning": figures}, about)
        found = {"bytes": file.stat().st_size}
        for criterion in ("reap", "quad_mix"):
            started = time.perf_counter()
            compressor.decide(file, keep=64, criterion=criterion, blend="mean")
            found[criterion] = round(time.perf_counter() - started, 2)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
