"""The method `router_healing`: router rows and expert scales fitted to the original layer's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from compressor.plugin import Decision, Healing, OptionError, Options, Plan

if TYPE_CHECKING:
    from compressor.plugin import Gathered, LayerWeights, MoELayer, Statistic

_ALIKE = 0.02
"""Of the largest logit: what rounding explains where a router's rows are multiplied with what its experts see."""


class RouterHealingOptions(Options):
    """How long rows and scales are fitted, and to how much text at least."""

    steps: int = Field(default=50, ge=1, description="steps of the fit, each on all tokens")
    min_tokens: int = Field(
        default=50_000, ge=1, description="calibration tokens that are asked for: fewer fit what other text has not"
    )


class RouterHealing(Healing[RouterHealingOptions]):
    """Move router rows and scale experts so that layers put out what the original did, where held-out text agrees."""

    name = "router_healing"
    version = "1"
    api = 2
    options_type: ClassVar[type[Options]] = RouterHealingOptions

    def check(self, layers: Sequence[MoELayer]) -> Plan:
        """Every layer must let its experts be watched, and have one matrix of router rows for experts alone."""
        for layer in layers:
            if len(layer.router_weights) != 1 or layer.num_extra_choices:
                raise OptionError(
                    None, f"{layer.path}: its router has more than one row for each expert, and rows for nothing else"
                )
        return super().check(layers)

    def check_tokens(self, most: int) -> None:
        """Few are not enough."""
        if most < self.options.min_tokens:
            raise OptionError(
                "min_tokens",
                f"the calibration text has {most:,} tokens, and {self.options.min_tokens:,} are asked for: on few "
                f"tokens rows fit what other text has not. Give more text",
            )

    def bytes_per_token(self, layer: MoELayer) -> float:
        """What the router sees, and the Gram matrix of the candidates' outputs."""
        ranks = min(layer.num_experts, 2 * layer.top_k)
        return 4.0 * ((layer.router_probe.experts_width or 0) + layer.num_experts + ranks * (ranks + 3) + 1)

    def statistic(self, layer: MoELayer) -> Statistic | None:
        """The fit."""
        from compressor_router_healing.fitting import RouterFit

        return RouterFit(layer, self.options.steps, self.options.min_tokens)

    def decide(self, layers: Sequence[MoELayer], statistics: Gathered) -> Decision:
        """Rows and scales of the layers whose loss on held-out text falls."""
        decided: dict[str, dict[str, Any]] = {}
        tensors: dict[str, dict[str, Any]] = {}
        found: dict[str, dict[str, Any]] = {}
        for layer in layers:
            figures = {name.removeprefix("fit."): one for name, one in statistics[layer.path].items()}
            self.check_tokens(int(figures["tokens"]))
            before, after = figures["losses"].tolist()
            decided[layer.path] = {"loss": before, "healed": after, "scales": None}
            found[layer.path] = figures
        for path in self.falls(decided, "healed"):
            decided[path]["scales"] = found[path]["scales"].tolist()
            tensors[path] = {name: found[path][name] for name in ("rows", "hidden", "logits")}
        return Decision({"layers": decided}, tensors)

    def edit(self, layer: LayerWeights, decision: Decision) -> None:
        """Add to the router's rows, and fold each expert's scale into its last matrix and what is added to it. Raises
        ValueError where the rows are not what makes logits of what the experts see.
        """
        scales = decision["layers"][layer.path]["scales"]
        if scales is None:
            return
        tensors = decision.tensors[layer.path]
        seen_PH, logits_PE = tensors["hidden"], tensors["logits"]
        for expert, scale in enumerate(scales):
            [(name, row)] = [one for one in layer.router[expert].items() if one[1].numel() == seen_PH.shape[1]]
            row_H = row.float().flatten()
            found_P = seen_PH.to(row.device) @ row_H - logits_PE[:, expert].to(row.device)  # but for a bias
            if (found_P - found_P.mean()).abs().max() > _ALIKE * logits_PE.abs().max():
                raise ValueError(
                    f"{layer.path}: its router makes its logits of something else than its experts see, so rows that "
                    f"were fitted to that do not fit it"
                )
            layer.router[expert][name] = (row_H + tensors["rows"][expert].to(row.device)).view(row.shape)
            layer.experts[expert].scale(scale)
