"""The method `output_scale`: a factor for each expert, by least squares against the original layer's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compressor.plugin import Column, Decision, Description, Method, OptionError, Options, Plan

if TYPE_CHECKING:
    from compressor.plugin import Gathered, LayerWeights, MoELayer, Statistic

_ROUNDING = 1e-6
"""Of the original's output: no less is called a fall."""


class OutputScaleOptions(Options):
    """How freely the scales are fitted."""

    per: Literal["expert", "layer"] = Field(default="expert", description="a scale for every expert, or one a layer")
    ridge: float = Field(
        default=0.01, ge=0, description="how strongly scales are held near 1, as a share of each expert's own term"
    )


class OutputScale(Method[OutputScaleOptions]):
    """Scale what the experts answer so that each layer puts out what the original did, where held-out text agrees."""

    name = "output_scale"
    version = "1"
    api = 2
    options_type: ClassVar[type[Options]] = OutputScaleOptions
    needs_original = fits_weights = True
    held_out = needs_held_out = True

    def check(self, layers: Sequence[MoELayer]) -> Plan:
        """Every layer must let its experts be watched."""
        for layer in layers:
            if layer.watch_problem:
                raise OptionError(None, f"{layer.path}: its experts cannot be compared: {layer.watch_problem}")
        return Plan(layers, changes_values=True)

    def statistic(self, layer: MoELayer) -> Statistic | None:
        """The terms of the least squares, of calibration text and of held-out text."""
        from compressor_output_scale.least_squares import Terms

        return Terms(layer)

    def decide(self, layers: Sequence[MoELayer], statistics: Gathered) -> dict[str, Any]:
        """The scales of each layer; None where the loss on held-out text does not fall."""
        from compressor_output_scale.least_squares import relative_loss, scales

        decided: dict[str, dict[str, Any]] = {}
        for layer in layers:
            figures = statistics[layer.path]
            scale_E = scales(figures, self.options.ridge, per_layer=self.options.per == "layer")
            before, after = (relative_loss(figures, one_E) for one_E in (scale_E.new_ones(len(scale_E)), scale_E))
            decided[layer.path] = {"loss": before, "scaled": after, "scales": None}
            if before - after > _ROUNDING:
                found = scale_E.tolist()
                decided[layer.path] |= {"smallest": min(found), "largest": max(found), "scales": found}
        if not any(one["scales"] for one in decided.values()):
            raise OptionError(None, "in no layer does the loss on held-out text fall: leave this pass out")
        return {"layers": decided}

    def describe(self, decision: Decision) -> Description:
        """The losses on held-out text, and the scales where they fell."""
        layers = decision["layers"]
        titles = {"loss": "held-out loss", "scaled": "with scales", "smallest": "smallest scale", "largest": "largest"}
        columns = [*(Column(key, title) for key, title in titles.items()), Column("scales", detail=True)]
        left = sum(layer["scales"] is None for layer in layers.values())
        left_alone = f"in {left} of {len(layers)} layers the loss does not fall, and nothing changes"
        return Description(columns, [left_alone] if left else [])

    def edit(self, layer: LayerWeights, decision: Decision) -> None:
        """Fold each expert's scale into its last matrix, and what is added to it."""
        for expert, scale in enumerate(decision["layers"][layer.path]["scales"] or ()):
            layer.experts[expert].scale(scale)
