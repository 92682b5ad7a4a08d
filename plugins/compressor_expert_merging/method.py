"""The method `expert_merging`: experts that answer alike are averaged into one (HC-SMoE, arXiv 2410.08589)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compressor.plugin import Decision, Method, OptionError, Options, Plan, fewer_experts

if TYPE_CHECKING:
    from compressor.plugin import Gathered, LayerWeights, MoELayer, Statistic


class ExpertMergingOptions(Options):
    """How many experts are left, and how those of a cluster are averaged."""

    keep: int = Field(ge=2, description="experts left in every MoE layer, each a cluster of the old ones")
    weights: Literal["frequency", "uniform"] = Field(
        default="frequency", description="an expert counts by how often it is chosen, or each as much"
    )


class ExpertMerging(Method[ExpertMergingOptions]):
    """Cluster the experts of each MoE layer by their mean outputs, and average each cluster's weights."""

    name = "expert_merging"
    version = "1"
    api = 2
    options_type: ClassVar[type[Options]] = ExpertMergingOptions
    expert_ids = ("kept", "dropped", "clusters")

    def check(self, layers: Sequence[MoELayer]) -> Plan:
        """Every layer must be able to keep so many, and to be watched."""
        merged = [fewer_experts(layer, self.options.keep, "keep") for layer in layers]
        for layer in layers:
            if layer.watch_problem and self.options.keep < layer.num_experts:
                raise OptionError(None, f"{layer.path}: its experts cannot be compared: {layer.watch_problem}")
        return Plan([replace(layer, zeros=None) for layer in merged], changes_values=True)

    def statistic(self, layer: MoELayer) -> Statistic | None:
        """Mean outputs of all experts."""
        from compressor_expert_merging.clustering import MeanOutputs

        return MeanOutputs(layer)

    def decide(self, layers: Sequence[MoELayer], statistics: Gathered) -> Decision:
        """The clusters, and of each the member that is chosen most, whose router row stays: of equals the first."""
        from compressor_expert_merging.clustering import average_linkage, shares

        decided: dict[str, Any] = {}
        tensors = {}
        for layer in layers:
            figures = statistics[layer.path]
            chosen_E, mean_EH = figures["chosen"], figures["outputs"] / figures["seen"]
            size = layer.num_experts // layer.num_groups  # experts of other groups of the router are never joined
            clusters = [
                [start + member for member in members]
                for start in range(0, layer.num_experts, size)
                for members in average_linkage(mean_EH[start : start + size], self.options.keep // layer.num_groups)
            ]
            clusters.sort(key=lambda members: max(members, key=lambda expert: (chosen_E[expert].item(), -expert)))
            kept = [max(members, key=lambda expert: (chosen_E[expert].item(), -expert)) for members in clusters]
            dropped = sorted({*range(layer.num_experts)} - {*kept})
            decided[layer.path] = {"kept": kept, "dropped": dropped, "clusters": clusters}
            tensors[layer.path] = {"share": shares(chosen_E, clusters, by_use=self.options.weights == "frequency")}
        return Decision({"layers": decided}, tensors)

    def edit(self, layer: LayerWeights, decision: Decision) -> None:
        """Each kept expert becomes the weighted average of its cluster; the router loses the others' rows."""
        decided, share_E = decision["layers"][layer.path], decision.tensors[layer.path]["share"]
        for survivor, members in zip(decided["kept"], decided["clusters"], strict=True):
            if len(members) > 1:
                for name, own in layer.experts[survivor].items():
                    parts = (layer.experts[member][name].double() * share_E[member].item() for member in members)
                    layer.experts[survivor][name] = sum(parts, start=own.double() * 0)
        layer.keep(decided["kept"])

    def control(self, decision: Decision, layers: Sequence[MoELayer], seed: int) -> str:
        """None: no mask computes what merged experts do."""
        return "averages experts, and random clusters cannot be measured without editing the model"
