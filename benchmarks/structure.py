"""How long finding the structure takes at real size, and how much memory: no weights, configs of the largest models.

The ratio is to building the model once on the meta device, which is the least that any look at its modules costs.

    python benchmarks/structure.py
"""

from __future__ import annotations

import resource
import statistics
import time

import torch
from transformers import AutoConfig

from compressor.model.find_structure import find_structure
from compressor.testing.tiny import model_class

TYPES = ("mixtral", "qwen3_next", "deepseek_v3")
ROUNDS = 5


def seconds(run: object) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    run()  # type: ignore[operator]
    return time.perf_counter() - started


def main() -> None:
    """Print one line for each type: median of ROUNDS alternations (minimum-maximum)."""
    print("type | MoE layers × experts | find, s | ÷ one build")
    for model_type in TYPES:
        config, cls = AutoConfig.for_model(model_type), model_class(model_type)

        def build(config: object = config, cls: type = cls) -> None:
            with torch.device("meta"):
                cls(config)

        def find(config: object = config, cls: type = cls) -> None:
            find_structure(cls, config)

        build()
        pairs = [(seconds(find), seconds(build)) for _ in range(ROUNDS)]
        found = sorted(pair[0] for pair in pairs)
        ratio = statistics.median(a / b for a, b in pairs)
        layers = find_structure(cls, config).layers
        print(
            f"{model_type} | {len(layers)} × {layers[0].num_experts} | {statistics.median(found):.2f} "
            f"({found[0]:.2f}-{found[-1]:.2f}) | {ratio:.0f}"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of the process: {peak:.2f} GB")


if __name__ == "__main__":
    main()
