"""The machine that a recipe is checked for, which need not be this one, and how long a run would take there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compressor.machine.distributed import Processes
from compressor.machine.environment import gpus
from compressor.machine.memory_estimate import Placement
from compressor.model.structure import MoELayer
from compressor.recipe.schema import LoadedRecipe
from compressor.run.preview import Preview


@dataclass(frozen=True)
class Machine:
    """The one at hand, or another with `num_gpus`; `tflops` a second of all its devices, MB a second of its disk."""

    num_gpus: int | None = None
    tflops: int | None = None
    disk_speed: int | None = None

    @property
    def gpus(self) -> tuple[str, ...]:
        """cuda:0, cuda:1, …"""
        return gpus() if self.num_gpus is None else tuple(f"cuda:{number}" for number in range(self.num_gpus))

    def require_budgets(self, loaded: LoadedRecipe) -> None:
        """Raise RecipeError where it is another machine without the recipe's device, or what it has is not said."""
        if self.num_gpus is None:
            return
        device, _, number = loaded.recipe.device.partition(":")
        if device == "cuda" and int(number or 0) >= self.num_gpus:
            raise loaded.error(("device",), f"found {loaded.recipe.device!r}, and by --gpus there are {self.num_gpus}")
        wanted = ["memory", "disk", *(["device_memory"] if self.num_gpus and loaded.recipe.device != "cpu" else [])]
        missing = [f"--{key.replace('_', '-')}" for key in wanted if getattr(loaded.recipe, key) is None]
        if missing:
            raise loaded.error((), f"with --gpus another machine is meant: say what it has, with {', '.join(missing)}")


HERE = Machine()


def computing(
    loaded: LoadedRecipe, layers: Sequence[MoELayer], num_parameters: int, needs: dict[str, Any], machine: Machine
) -> dict[str, Any]:
    """What of `num_parameters`, without an embedding that is only looked up, a token uses; tokens through the model:
    calibration, a second stream of it, measured candidates, measured text; 2 operations for each of both; and seconds
    of these and of the disk. Not counted: searches, training, tasks, attention between tokens.
    """
    evaluation = loaded.recipe.evaluate
    each_pass = len(loaded.passes) if evaluation and evaluation.each_pass else 0
    observed = loaded.passes + loaded.passes[1:] * bool(each_pass)  # alone the first one's decision is known
    read = [(1 + (one.method.progressive or one.method.needs_original), loaded.sources_of(one)) for one in observed]
    read += [(2 + evaluation.random + each_pass, list(evaluation.texts.values()))] if evaluation else []
    wanted = [one.method.measuring(layers) for one in observed]
    tokens = sum(times * sum(source.lengths()) for times, sources in read for source in sources)
    tokens += round(sum(one.forwards(len(layers)) * one.tokens for one in wanted if one is not None))
    used = num_parameters - sum(max(0, one.num_with_weights - one.top_k) * one.parameters_per_expert for one in layers)
    by_speed = {
        "disk": (needs["bytes_read"] + needs["disk"], (machine.disk_speed or 0) * 1e6),
        "computing": (2 * tokens * used, (machine.tflops or 0) * 1e12),
    }
    seconds = {key: amount / speed for key, (amount, speed) in by_speed.items() if speed}
    return {"tokens": tokens, "parameters_at_work": used, "flop": 2 * tokens * used, "seconds": seconds}


def agreed(processes: Processes, preview: Preview) -> Preview:
    """The same, held as the process with the least room must ("disk" and "file" before "memory"): machines differ."""
    places = processes.exchange(dataclasses.astuple(preview.place))
    return dataclasses.replace(preview, place=Placement(*min(places))) if processes.size > 1 else preview
