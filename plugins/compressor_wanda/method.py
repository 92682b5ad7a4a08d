"""The method `wanda`: of each output's weights, those with the smallest |weight| · ‖input‖ become zero (arXiv
2306.11695). An expert's inputs are those of its own tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from compressor.plugin import Column, Decision, Description, Method, OptionError, Options, Plan

if TYPE_CHECKING:
    from torch import Tensor

    from compressor.plugin import Gathered, InputStatistic, LayerWeights, LinearSite, MoELayer


class WandaOptions(Options):
    """Which weights become zero, and in which matrices."""

    pattern: Literal["2:4", "4:8", "unstructured"] = Field(
        default="2:4", description="zeros in every four or eight weights of an output, or anywhere among them"
    )
    sparsity: float = Field(
        default=0.5, gt=0, lt=1, description="share of each output's weights that become zero, `unstructured` only"
    )
    attention: bool = Field(default=False, description="linear maps outside the MoE blocks as well")
    shared_experts: bool = Field(default=False, description="linear maps beside the experts of a MoE block as well")
    progressive: bool = Field(
        default=False, description="observe each layer on what comes out of those before it with their zeros"
    )

    @model_validator(mode="after")
    def _progressive_in_experts(self) -> WandaOptions:
        if self.progressive and (self.attention or self.shared_experts):
            raise ValueError(
                "`progressive` puts zeros into experts alone; leave `attention` and `shared_experts` out, or it"
            )
        return self


class Wanda(Method[WandaOptions]):
    """Set the weights to zero that matter least: by their size, and the norm of what they are multiplied with."""

    name = "wanda"
    version = "1"
    api = 2
    options_type: ClassVar[type[Options]] = WandaOptions
    expert_ids = ("without_tokens",)

    @property
    def progressive(self) -> bool:
        """As the options say."""
        return self.options.progressive

    def check(self, layers: Sequence[MoELayer]) -> Plan:
        """Every layer must let its experts be watched."""
        if self.options.pattern != "unstructured" and self.options.sparsity != 0.5:
            raise OptionError("sparsity", f"{self.options.pattern} is half of the weights; leave `sparsity` out")
        for layer in layers:
            if layer.watch_problem:
                raise OptionError(None, f"{layer.path}: its experts cannot be observed: {layer.watch_problem}")
            outside = [at for at in layer.linears.values() if not layer.holds(at)]
            if self.options.attention and layer.linears and not outside:
                raise OptionError("attention", f"{layer.path}: its decoder layer has no linear map outside the block")
        return Plan([replace(layer, zeros=self.options.pattern) for layer in layers], changes_values=True)

    def input_statistic(self, site: LinearSite) -> InputStatistic | None:
        """Norms of what a matrix is given, of those that the options ask for."""
        from compressor_wanda.scores import Norms

        return Norms(site.layer.num_experts, site.place) if site.place in self._places else None

    def decide(self, layers: Sequence[MoELayer], statistics: Gathered) -> Decision:
        """The norms, which with the weights say everything; an expert without tokens goes by its weights alone."""
        import torch

        decided = {}
        tensors: dict[str, Mapping[str, Tensor]] = {}
        if self.options.attention and not any(dict(_of_place(one, "layer")) for one in statistics.values()):
            raise OptionError("attention", "the figures have none of linear maps outside the MoE blocks")
        for layer in layers:
            found = {place: dict(_of_place(statistics[layer.path], place)) for place in self._places}
            if not found["expert"]:
                raise KeyError("inputs of experts")
            tensors[layer.path] = {name: one.sqrt().float() for of in found.values() for name, one in of.items()}
            tokens_E = statistics[layer.path][f"inputs.{next(iter(found['expert']))}.tokens"]
            decided[layer.path] = {"without_tokens": torch.where(tokens_E == 0)[0].tolist()}
        return Decision({"layers": decided}, tensors)

    @property
    def _places(self) -> Sequence[str]:
        """Where the options ask for zeros, as `LinearSite.place` has it."""
        asked = {"expert": True, "block": self.options.shared_experts, "layer": self.options.attention}
        return [place for place, is_asked in asked.items() if is_asked]

    def describe(self, decision: Decision) -> Description:
        """Which zeros, and the experts that the text has not reached."""
        is_unseen = any(layer["without_tokens"] for layer in decision["layers"].values())
        which = f"{self.options.sparsity:.0%}" if self.options.pattern == "unstructured" else self.options.pattern
        columns = [Column("without_tokens", "experts without tokens")] if is_unseen else []
        return Description(columns, [f"{which} of each output's weights are zero, as numbers: no bytes are saved"])

    def edit(self, layer: LayerWeights, decision: Decision) -> None:
        """Zeros in every expert's matrices, and in the linear maps beside them that the decision has norms of."""
        from compressor_wanda.scores import sparse

        norms = decision.tensors[layer.path]
        for expert, own in enumerate(layer.experts):
            for name, weight_OI in own.matrices.items():
                own.matrices[name] = sparse(weight_OI, norms[name][expert], self.options.pattern, self.options.sparsity)
        for name in norms.keys() & layer.linears.keys():
            layer.linears[name] = sparse(layer.linears[name], norms[name], self.options.pattern, self.options.sparsity)


def _of_place(figures: Mapping[str, Tensor], place: str) -> Iterator[tuple[str, Tensor]]:
    """The sums of squares of the linear maps there, by name."""
    for key in sorted(figures):
        if key.startswith("inputs.") and key.endswith(f".squares.{place}"):
            yield key.removeprefix("inputs.").removesuffix(f".squares.{place}"), figures[key]
