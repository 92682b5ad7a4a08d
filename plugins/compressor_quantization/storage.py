"""From folder to folder, one file after another: what is asked for is stored in fewer bits, all else as it is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compressor.plugin import CheckpointError
from compressor_quantization.rounding import grid_for
from compressor_quantization.schemes import Scheme, config_of, packed

if TYPE_CHECKING:
    from torch import Tensor

    from compressor_quantization.rounding import Grid

_INDEX = "model.safetensors.index.json"
_EXPERTS = r"re:.*\.experts\.\d+\..*"
"""Names of experts' matrices, in a group of their own where other matrices have another scheme: by `experts` in it
transformers knows which one is theirs."""


def write(
    source: Path,
    target: Path,
    schemes: Mapping[str, tuple[Scheme, bool]],
    known: Mapping[str, tuple[Tensor, Grid]] | None = None,
) -> None:
    """Store matrices otherwise: `schemes` are by name on disk, with whether the matrix is an expert's. Of each file
    only as much as it will hold is in memory; `known` are matrices found before, packed, and their grid. Raises
    CheckpointError, naming the tensor.
    """
    known = known or {}
    weight_map: dict[str, str] = {}
    sizes, stays = 0, []
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as file, _workers() as pool:

            def stored(name: str) -> dict[str, Tensor]:
                tensor = file.get_tensor(name)
                return _stored(name, tensor, schemes[name][0], known.get(name)) if name in schemes else {name: tensor}

            tensors = {name: one for made in pool.map(stored, file.keys()) for name, one in made.items()}
        both = [name for name, one in tensors.items() if name.endswith(".weight") and one.ndim == 2]
        stays += [name.removesuffix(".weight") for name in both if name not in schemes]
        save_file(tensors, target / path.name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
        sizes += sum(tensor.nbytes for tensor in tensors.values())
    if (source / _INDEX).exists():
        index = {"metadata": {"total_size": sizes}, "weight_map": dict(sorted(weight_map.items()))}
        (target / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if "lm_head.weight" not in weight_map and "lm_head.weight" not in schemes:
        stays.append("lm_head")  # tied to the embedding: no file names it, and "Linear" would
    config["quantization_config"] = config_of(_groups(schemes), sorted(stays))
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """As many as torch has threads, each of which computes alone: pieces are too small to be shared."""
    num_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(num_threads)  # what threads begin with that are started from now on


def _stored(name: str, weight_OI: Tensor, scheme: Scheme, known: tuple[Tensor, Grid] | None) -> dict[str, Tensor]:
    try:
        grid = known[1] if known else grid_for(weight_OI, scheme)
    except ValueError as error:
        raise CheckpointError(f"{name} cannot be stored as {scheme.name}: {error}.") from error
    words = known[0] if known else packed(grid.codes(weight_OI), scheme)
    made = scheme.stored(words, grid, weight_OI.shape)
    return {name.removesuffix("weight") + key: one.contiguous() for key, one in made.items()}


def _groups(schemes: Mapping[str, tuple[Scheme, bool]]) -> list[tuple[Scheme, list[str]]]:
    """Each scheme with what it is for: all linear maps, or experts first where theirs is another one."""
    of_experts, of_others = (
        list(dict.fromkeys(s for s, own in schemes.values() if own is is_own)) for is_own in (True, False)
    )
    if not set(of_others) - set(of_experts):
        return [(of_experts[0], ["Linear"])]
    return [(of_experts[0], [_EXPERTS]), (of_others[0], ["Linear"])]
