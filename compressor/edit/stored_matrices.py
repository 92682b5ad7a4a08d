"""What the tensors of a checkpoint's files are matrices of, for whoever stores them otherwise (`Method.external`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Literal

from torch import Tensor, nn

from compressor.checkpoint.conversion import Conversion
from compressor.checkpoint.find import Checkpoint
from compressor.edit.checkpoint_edit import meta_model
from compressor.errors import UnsupportedModelError
from compressor.model.adapter import Adapter
from compressor.model.modules import is_inside, units_of
from compressor.model.moe_model import MoEModel
from compressor.model.structure import MoELayer

Place = Literal["expert", "block", "layer", "dense", "other"]
"""Where a matrix is: an expert's, beside the experts in their block, elsewhere in a decoder layer as attention is, the
rest of decoder layers without experts; and all that is no linear map of a decoder layer, routers too.
"""


class StoredMatrices:
    """The matrices in a checkpoint's files: `places` by name on disk."""

    def __init__(self, found: Checkpoint, adapters: Sequence[Adapter] = ()) -> None:
        self._found, self._adapters = found, adapters

    @cached_property
    def _moe(self) -> MoEModel:
        return meta_model(self._found, self._adapters)

    @cached_property
    def _conversion(self) -> Conversion:
        return Conversion(self._moe.model)

    @cached_property
    def places(self) -> Mapping[str, Place]:
        """Where each matrix `….weight` of the model is. UnsupportedModelError where experts are packed together."""
        tensors = {name: shape for shard in self._found.shards for name, (_, shape) in shard.tensors.items()}
        targets = {name: self._conversion.rename(name)[0] for name in tensors}
        found: dict[str, Place] = {}
        for name, target in targets.items():
            place = self._known.get(target, "other")
            if place == "expert" and len(tensors[name]) > 2:
                raise UnsupportedModelError(
                    f"{self._found.reference}: {name} holds the matrices of all experts of a layer, and only those "
                    f"with a tensor of their own can be stored otherwise."
                )
            if name.endswith(".weight") and len(tensors[name]) == 2 and target in self._conversion.tensors:
                found[name] = place
        return found

    def as_stored(self, layer: str, name: str, rows: Tensor) -> dict[str, Tensor]:
        """What belongs to the rows of a matrix, by name on disk. `name` is as `LinearSite` has it, of a layer by its
        path; `rows` are [outputs, …], of experts [E, outputs, …].
        """
        moe_layer = self._moe.layer(layer)
        if name in moe_layer.linears:
            return self._conversion.as_stored({moe_layer.linears[name]: rows})
        start = f"{layer}." if layer else ""
        if "*" not in name:
            return self._conversion.as_stored({start + name: rows})
        path, _, leaf = (start + name).partition(".*.")
        of_each = zip(moe_layer.containers[path], rows, strict=True)
        return self._conversion.as_stored({f"{path}.{child}.{leaf}": one for child, one in of_each})

    @cached_property
    def _known(self) -> dict[str, Place]:
        """The place of each of the model's matrices that is one of a decoder layer's linear maps."""
        model, layers = self._moe.model, self._moe.layers
        units = units_of(model)
        stacks = {unit.rpartition(".")[0] for unit in units for one in layers if is_inside(one.path, unit)}
        inside = tuple(f"{unit}." for unit in units if unit.rpartition(".")[0] in stacks)
        beside = {name for one in layers for name in one.linears if one.place_of(name) == "layer"}
        found: dict[str, Place] = {}
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear) and path.startswith(inside):
                is_beside = any(f"{path}.weight".endswith(f".{name}") for name in beside)
                found[f"{path}.weight"] = "layer" if is_beside else "dense"
        for one in layers:
            found |= dict.fromkeys(_routing(model, one), "other")
            found |= {at: one.place_of(name) for name, at in one.linears.items()}
            found |= {name: "expert" for name in self._conversion.tensors if one.in_experts(name)}
        single = (name for name, one in self._conversion.tensors.items() if one.ndim == 2 and one.shape[0] == 1)
        return found | dict.fromkeys(single, "other")  # gates of shared experts, which choose too


def _routing(model: nn.Module, layer: MoELayer) -> list[str]:
    return [
        name for name, _ in model.named_parameters() if is_inside(name, layer.router) or name in layer.router_weights
    ]
