"""The method `expert_merging`: experts that answer alike are averaged into one, by HC-SMoE (arXiv 2410.08589) or REAM
(arXiv 2604.04356).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from compressor.plugin import Decision, Method, OptionError, Options, Plan, fewer_experts

if TYPE_CHECKING:
    from compressor.plugin import Gathered, LayerWeights, MoELayer, Statistic


class ExpertMergingOptions(Options):
    """How many experts are left, and how those of a cluster are averaged."""

    keep: int = Field(ge=2, description="experts left in every MoE layer, each a cluster of the old ones")
    weights: Literal["frequency", "uniform"] | None = Field(
        default=None,
        description="of hc_smoe: an expert counts by how often it is chosen, or each as much; default frequency",
    )
    grouping: Literal["hc_smoe", "ream"] = Field(
        default="hc_smoe",
        description="clusters of like outputs, or each salient expert with those like it, neurons aligned",
    )
    group_size: int | None = Field(
        default=None, ge=2, description="of ream: members that a group has at most; default 16"
    )

    @model_validator(mode="after")
    def _of_one_grouping(self) -> ExpertMergingOptions:
        if self.grouping == "ream" and self.weights is not None:
            raise ValueError(
                "`weights` would have no effect with `grouping: ream`, which counts by saliency; leave it out"
            )
        if self.grouping != "ream" and self.group_size is not None:
            raise ValueError("`group_size` would have no effect without `grouping: ream`; leave it out")
        return self


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
            if self.options.grouping == "ream" and self.options.keep * self._group_size < layer.num_experts:
                raise OptionError(
                    "group_size",
                    f"{layer.path}: {self.options.keep} groups of {self._group_size} do not hold its "
                    f"{layer.num_experts} experts",
                )
        return Plan([replace(layer, zeros=None) for layer in merged], changes_values=True)

    def statistic(self, layer: MoELayer) -> Statistic | None:
        """Mean outputs of all experts; of ream what they are weighed by, and the router's logits."""
        from compressor_expert_merging.clustering import MeanOutputs
        from compressor_expert_merging.ream import GatedOutputs

        return GatedOutputs(layer) if self.options.grouping == "ream" else MeanOutputs(layer)

    def decide(self, layers: Sequence[MoELayer], statistics: Gathered) -> Decision:
        """The clusters, and of each the member that counts most, whose router row stays: of equals the first."""
        from compressor_expert_merging.clustering import average_linkage, shares
        from compressor_expert_merging.ream import pseudo_groups, saliency, similarity

        decided: dict[str, Any] = {}
        tensors = {}
        is_ream = self.options.grouping == "ream"
        for layer in layers:
            figures = statistics[layer.path]
            worth_E = saliency(figures) if is_ream else figures["chosen"]
            points_EX = similarity(figures) if is_ream else figures["outputs"] / figures["seen"]
            size, count = layer.num_experts // layer.num_groups, self.options.keep // layer.num_groups
            clusters = []
            for start in range(0, layer.num_experts, size):  # experts of other groups of the router are never joined
                own = slice(start, start + size)
                found = (
                    pseudo_groups(worth_E[own], points_EX[own, own], count, self._group_size)
                    if is_ream
                    else average_linkage(points_EX[own], count)
                )
                clusters += [sorted(start + member for member in members) for members in found]
            clusters.sort(key=lambda members: max(members, key=lambda expert: (worth_E[expert].item(), -expert)))
            kept = [max(members, key=lambda expert: (worth_E[expert].item(), -expert)) for members in clusters]
            dropped = sorted({*range(layer.num_experts)} - {*kept})
            decided[layer.path] = {"kept": kept, "dropped": dropped, "clusters": clusters}
            tensors[layer.path] = {"share": shares(worth_E, clusters, by_use=self.options.weights != "uniform")}
        return Decision({"layers": decided, **({"aligned": True} if is_ream else {})}, tensors)

    def edit(self, layer: LayerWeights, decision: Decision) -> None:
        """Each kept expert becomes the weighted average of its cluster; the router loses the others' rows."""
        from compressor_expert_merging.ream import aligned

        decided, share_E = decision["layers"][layer.path], decision.tensors[layer.path]["share"]
        for survivor, members in zip(decided["kept"], decided["clusters"], strict=True):
            for member in {*members} - {survivor} if decision.get("aligned") else ():
                neurons = layer.experts[member].neurons
                order_N = aligned(neurons, layer.experts[survivor].neurons)
                for name, one in neurons.items():
                    neurons[name] = one[order_N]
            for name, own in layer.experts[survivor].items() if len(members) > 1 else ():
                parts = (layer.experts[member][name].double() * share_E[member].item() for member in members)
                layer.experts[survivor][name] = sum(parts, start=own.double() * 0)
        layer.keep(decided["kept"])

    @property
    def _group_size(self) -> int:
        return self.options.group_size or 16

    def control(self, decision: Decision, layers: Sequence[MoELayer], seed: int) -> str:
        """None: no mask computes what merged experts do."""
        return "averages experts, and random clusters cannot be measured without editing the model"
