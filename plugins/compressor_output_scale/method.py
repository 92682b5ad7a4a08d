"""The method `output_scale`: a factor for each expert, by least squares against the original layer's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compressor.plugin import Decision, Healing, Options

if TYPE_CHECKING:
    from compressor.plugin import Gathered, LayerWeights, MoELayer, Statistic


class OutputScaleOptions(Options):
    """How freely the scales are fitted."""

    per: Literal["expert", "layer"] = Field(default="expert", description="a scale for every expert, or one a layer")
    ridge: float = Field(
        default=0.01, ge=0, description="how strongly scales are held near 1, as a share of each expert's own term"
    )


class OutputScale(Healing[OutputScaleOptions]):
    """Scale what the experts answer so that each layer puts out what the original did, where held-out text agrees."""

    name = "output_scale"
    version = "1"
    api = 2
    options_type: ClassVar[type[Options]] = OutputScaleOptions

    def statistic(self, layer: MoELayer) -> Statistic | None:
        """The terms of the least squares, of calibration text and of held-out text."""
        from compressor_output_scale.least_squares import Terms

        return Terms(layer)

    def decide(self, layers: Sequence[MoELayer], statistics: Gathered) -> dict[str, Any]:
        """The scales of each layer; None where the loss on held-out text does not fall."""
        from compressor_output_scale.least_squares import relative_loss, scales

        decided: dict[str, dict[str, Any]] = {}
        found: dict[str, list[float]] = {}
        for layer in layers:
            figures = statistics[layer.path]
            scale_E = scales(figures, self.options.ridge, per_layer=self.options.per == "layer")
            before, after = (relative_loss(figures, one_E) for one_E in (scale_E.new_ones(len(scale_E)), scale_E))
            decided[layer.path] = {"loss": before, "scaled": after, "scales": None}
            found[layer.path] = scale_E.tolist()
        for path in self.falls(decided, "scaled"):
            decided[path] |= {"smallest": min(found[path]), "largest": max(found[path]), "scales": found[path]}
        return {"layers": decided}

    def edit(self, layer: LayerWeights, decision: Decision) -> None:
        """Fold each expert's scale into its last matrix, and what is added to it."""
        for expert, scale in enumerate(decision["layers"][layer.path]["scales"] or ()):
            layer.experts[expert].scale(scale)
