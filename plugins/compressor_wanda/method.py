"""The method `wanda`: of each output's weights, those with the smallest |weight| · ‖input‖ become zero (arXiv
2306.11695). An expert's inputs are those of its own tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

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


class Wanda(Method[WandaOptions]):
    """Set the weights to zero that matter least: by their size, and the norm of what they are multiplied with."""

    name = "wanda"
    version = "1"
    api = 2
    options_type: ClassVar[type[Options]] = WandaOptions
    expert_ids = ("without_tokens",)

    def check(self, layers: Sequence[MoELayer]) -> Plan:
        """Every layer must let its experts be watched."""
        if self.options.pattern != "unstructured" and self.options.sparsity != 0.5:
            raise OptionError("sparsity", f"{self.options.pattern} is half of the weights; leave `sparsity` out")
        for layer in layers:
            if layer.watch_problem:
                raise OptionError(None, f"{layer.path}: its experts cannot be observed: {layer.watch_problem}")
        return Plan([replace(layer, zeros=self.options.pattern) for layer in layers], changes_values=True)

    def input_statistic(self, site: LinearSite) -> InputStatistic | None:
        """Norms of what a matrix is given, of those that the options ask for."""
        from compressor_wanda.scores import Norms

        wanted = {"expert": True, "block": self.options.shared_experts, "layer": self.options.attention}
        return Norms(site.layer.num_experts) if wanted[site.place] else None

    def decide(self, layers: Sequence[MoELayer], statistics: Gathered) -> Decision:
        """The norms, which with the weights say everything; an expert without tokens goes by its weights alone."""
        import torch

        decided = {}
        tensors: dict[str, Mapping[str, Tensor]] = {}
        for layer in layers:
            figures = statistics[layer.path]
            names = sorted(name[len("inputs.") : -len(".squares")] for name in figures if name.endswith(".squares"))
            tensors[layer.path] = {name: figures[f"inputs.{name}.squares"].sqrt().float() for name in names}
            of_experts = [one_E for name in names if (one_E := figures[f"inputs.{name}.tokens"]).ndim]
            decided[layer.path] = {"without_tokens": torch.where(of_experts[0] == 0)[0].tolist()}
        return Decision({"layers": decided}, tensors)

    def describe(self, decision: Decision) -> Description:
        """Which zeros, and the experts that the text has not reached."""
        is_unseen = any(layer["without_tokens"] for layer in decision["layers"].values())
        which = f"{self.options.sparsity:.0%}" if self.options.pattern == "unstructured" else self.options.pattern
        columns = [Column("without_tokens", "experts without tokens")] if is_unseen else []
        return Description(columns, [f"{which} of each output's weights are zero, as numbers: no bytes are saved"])

    def edit(self, layer: LayerWeights, decision: Decision) -> None:
        """Zeros in every expert's matrices, and in the linear maps beside them that were observed."""
        from compressor_wanda.scores import sparse

        norms = decision.tensors[layer.path]
        for expert, own in enumerate(layer.experts):
            for name, weight_OI in own.matrices.items():
                own.matrices[name] = sparse(weight_OI, norms[name][expert], self.options.pattern, self.options.sparsity)
        for name in norms.keys() & layer.linears.keys():
            layer.linears[name] = sparse(layer.linears[name], norms[name], self.options.pattern, self.options.sparsity)
