"""What methods have in common that bring layers back to the original's output, judged by held-out text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compressor.method import Decision, Method, OptionError, OptionsT, Plan
from compressor.report.description import Description

if TYPE_CHECKING:
    from compressor.model.structure import MoELayer


class Healing(Method[OptionsT]):
    """A method that fits weights of each layer to what the original puts out there, and keeps those with which the
    layer's loss on held-out text falls. Its decision has `scales` of each layer, None of one that keeps its weights.
    """

    needs_original = fits_weights = held_out = needs_held_out = True

    def check(self, layers: Sequence[MoELayer]) -> Plan:
        """Every layer must let its experts be watched."""
        for layer in layers:
            if layer.watch_problem:
                raise OptionError(None, f"{layer.path}: its experts cannot be compared: {layer.watch_problem}")
        return Plan(layers, changes_values=True)

    def falls(self, layers: Mapping[str, Mapping[str, Any]], after: str) -> list[str]:
        """The layers whose `loss`, a share of the original's output, falls by more than rounding until `after`."""
        if not (found := [path for path, one in layers.items() if one["loss"] - one[after] > 1e-6]):
            raise OptionError(None, "in no layer does the loss on held-out text fall: leave this pass out")
        return found

    def describe(self, decision: Decision) -> Description:
        """Its figures, and how many layers keep their weights."""
        shown = [replace(one, detail=one.key == "scales") for one in Description.of(decision).columns]
        columns = [replace(one, title="held-out loss") if one.key == "loss" else one for one in shown]
        scales = [layer["scales"] for layer in decision["layers"].values()]
        note = f"in {scales.count(None)} of {len(scales)} layers the loss does not fall, and nothing changes"
        return Description(columns, [note] if None in scales else [])
