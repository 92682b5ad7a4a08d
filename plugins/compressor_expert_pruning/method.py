"""The method `expert_pruning`: exact search over all sets of kept experts, layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from torch import Tensor

from compressor import (
    Decision,
    Method,
    MoELayer,
    MoEModel,
    OptionError,
    Options,
    Plan,
    RoutedTokens,
    Statistic,
    count_problem,
)
from compressor.selection.budget import allocate, possible_totals
from compressor.selection.subsets import (
    SubsetTables,
    best_subset,
    dropped_subsets,
    num_subsets,
    ranks_needed,
    squared_errors,
)
from compressor_expert_pruning.options import ExpertPruningOptions, names, number

_MAX_RANKS = 20


class ExpertPruning(Method[ExpertPruningOptions]):
    """Keep the set of experts that changes each MoE layer's output least on calibration text (arXiv 2402.14800)."""

    name = "expert_pruning"
    version = "1"
    options_type: ClassVar[type[Options]] = ExpertPruningOptions

    # check

    def check(self, layers: Sequence[MoELayer]) -> Plan:
        """Possible counts only; few enough sets to look at all of them; nothing asked for that has no effect."""
        self._check_top_k(layers)
        self._check_names(layers)
        for layer in layers:
            if not self.options.budget:
                self._check_count(layer)
            if self._searches(layer):
                self._check_search(layer)
        planned = self._planned(layers)
        if self.options.top_k is None and sum(planned.values()) == sum(layer.num_experts for layer in layers):
            where = f"{layers[0].path}: all {layers[0].num_experts} experts would stay"
            raise self._refused(f"{where}: nothing to prune.")
        notes = sorted({note for layer in layers for note in self._search_notes(layer)})
        if self.options.budget:
            notes.append(
                f"{sum(planned.values()):,} experts stay in {len(layers)} layers; how many in which is found on the "
                f"calibration text, an even split is shown"
            )
        if self.options.padded:
            notes.append(self._padding_note(layers, planned))
        if self.options.top_k is not None:
            notes.append(f"each token chooses {self.options.top_k} of a layer's experts, now {layers[0].top_k}")
        return Plan(planned, notes, top_k=self.options.top_k)

    def _refused(self, message: str) -> OptionError:
        return OptionError(self.options.count_option, message)

    def _check_top_k(self, layers: Sequence[MoELayer]) -> None:
        for layer in layers:
            top_k = self.options.top_k
            if top_k is None:
                return
            if layer.top_k_fixed:
                message = f"its class chooses {layer.top_k} experts per token whatever the config says"
            elif top_k == layer.top_k:
                message = f"each token chooses {top_k} experts already; leave `top_k` out"
            elif top_k > layer.top_k:
                message = f"each token chooses {layer.top_k} experts, which can be lowered but not raised to {top_k}"
            else:
                continue
            raise OptionError("top_k", f"{layer.path}: {message}.")

    def _check_names(self, layers: Sequence[MoELayer]) -> None:
        known = list(dict.fromkeys(number(layer) or layer.path for layer in layers))
        for name in self.options.by_layer:
            if not any(name in names(layer) for layer in layers):
                raise self._refused(
                    f"there is no MoE layer {name}; the MoE layers are {', '.join(known)} (or by path, such as "
                    f"{layers[0].path})."
                )
        for layer in layers:
            given = [name for name in names(layer) if name in self.options.by_layer]
            if len(given) > 1:
                raise self._refused(f"{layer.path}: named twice, as {' and as '.join(given)}; keep one of them.")

    def _check_count(self, layer: MoELayer) -> None:
        num_kept = self.options.num_kept(layer)
        assert num_kept is not None
        if num_kept < 1:
            raise self._refused(
                f"{layer.path}: it has {layer.num_experts} experts, so dropping {self.options.drop} would leave none."
            )
        problem = count_problem(self._smaller(layer), num_kept)
        if problem:
            raise self._refused(f"{layer.path}: {problem}.")

    def _check_search(self, layer: MoELayer) -> None:
        if layer.watch_problem is not None:
            raise self._refused(f"{layer.watch_problem}.")
        sets, ranks = self._num_sets(layer), self._num_ranks(layer)
        if sets <= self.options.max_subsets and ranks <= _MAX_RANKS:
            return
        limit = (
            f"the limit is {self.options.max_subsets:,} (`max_subsets`)"
            if sets > self.options.max_subsets
            else f"each token would need its best {ranks} experts, the limit is {_MAX_RANKS}"
        )
        counts = self._counts(layer)
        kept = f"{counts[0]}" if len(counts) == 1 else f"from {counts[0]} to {counts[-1]}"
        raise self._refused(
            f"{layer.path}: keeping {kept} of {layer.num_experts} experts means {sets:,} possible sets per layer, too "
            f"many to look at all of them: {limit}. {'Drop fewer experts' if len(counts) == 1 else 'Give counts'}."
        )

    def _search_notes(self, layer: MoELayer) -> Iterator[str]:
        sets, counts = self._num_sets(layer), self._counts(layer)
        if self.options.budget:
            yield f"{sets:,} sets of {counts[0]} to {counts[-1]} experts per layer, all of them looked at"
        elif sets > 1:
            yield f"{sets:,} sets of {counts[0]} experts per layer, all of them looked at"

    def _padding_note(self, layers: Sequence[MoELayer], planned: Mapping[str, int]) -> str:
        most = max(planned.values())
        if not self.options.budget and min(planned.values()) == most:
            raise OptionError("padded", f"every layer keeps {most} experts, so there is nothing to pad; leave it out.")
        for layer in layers:
            if layer.padding_problem is not None and (self.options.budget or planned[layer.path] < most):
                raise OptionError("padded", f"{layer.path}: cannot be padded: {layer.padding_problem}.")
        if self.options.budget:
            return "padded to the largest layer's count: what the other layers drop beyond that saves no memory"
        stay = {layer.path: most - planned[layer.path] for layer in layers}
        parameters = sum(stay[layer.path] * layer.parameters_per_expert for layer in layers)
        return (
            f"padded to {most} experts in every layer: {parameters:,} parameters of {sum(stay.values())} dropped "
            f"experts stay in the checkpoint"
        )

    # how many

    def _smaller(self, layer: MoELayer) -> MoELayer:
        """The layer with the number of choices per token that it will have."""
        return layer if self.options.top_k is None else dataclasses.replace(layer, top_k=self.options.top_k)

    def _counts(self, layer: MoELayer) -> list[int]:
        """The counts among whose sets is searched, ascending: one, or with a mean all that the layer could keep."""
        num_kept = self.options.num_kept(layer)
        if num_kept is not None:
            return [num_kept]
        smaller = self._smaller(layer)
        return [count for count in range(1, layer.num_experts + 1) if count_problem(smaller, count) is None]

    def _num_sets(self, layer: MoELayer) -> int:
        return sum(num_subsets(layer, count) for count in self._counts(layer))

    def _num_ranks(self, layer: MoELayer) -> int:
        return max(ranks_needed(layer, count, self.options.top_k) for count in self._counts(layer))

    def _searches(self, layer: MoELayer) -> bool:
        """Whether anything changes in the layer."""
        return self.options.top_k is not None or self._counts(layer) != [layer.num_experts]

    def _total(self, layers: Sequence[MoELayer]) -> int:
        """The experts that a mean leaves in all. Raises OptionError if the layers cannot keep exactly so many."""
        assert self.options.budget is not None
        total = self.options.budget.total([layer.num_experts for layer in layers])
        possible = possible_totals([self._counts(layer) for layer in layers])
        if total in possible:
            return total
        nearest = min(possible, key=lambda one: (abs(one - total), one))
        raise self._refused(
            f"a mean of {self.options.budget.mean} is {total} experts in {len(layers)} layers, which cannot be: what "
            f"the layers can keep adds up to {possible[0]} at least and {possible[-1]} at most"
            f"{'' if len(possible) > possible[-1] - possible[0] else ', in steps'}. "
            f"The nearest possible mean is {nearest / len(layers):.6g}."
        )

    def _planned(self, layers: Sequence[MoELayer]) -> dict[str, int]:
        """The count of every layer; with a mean, whose split only the figures can tell, the most even one."""
        if not self.options.budget:
            return {layer.path: self._counts(layer)[0] for layer in layers}
        total = self._total(layers)
        mean = total / len(layers)
        return allocated(
            {one.path: {count: (count - mean) ** 2 for count in self._counts(one)} for one in layers}, total
        )

    # observe, decide, edit

    def statistic(self, layer: MoELayer) -> Statistic | None:
        """The squared errors of every set, per batch; nothing where nothing changes."""
        return SubsetErrors(layer, self._counts(layer), self.options.top_k) if self._searches(layer) else None

    def decide(self, layers: Sequence[MoELayer], statistics: Mapping[str, Mapping[str, Tensor]]) -> Decision:
        """Per layer: the ids kept, their loss, and the loss as a fraction of the output's own norm."""
        found = {layer.path: self.best_of_counts(layer, statistics.get(layer.path)) for layer in layers}
        decision: Decision = {"layers": {}}
        if self.options.budget:
            total = self._total(layers)
            num_kept = allocated(
                {path: {count: one["loss"] ** 2 for count, one in of.items()} for path, of in found.items()}, total
            )
            decision["budget"] = {
                "asked_mean": self.options.budget.mean,
                "mean": total / len(layers),
                "num_kept": total,
                "num_experts": sum(layer.num_experts for layer in layers),
                "summed_squared_loss": sum(found[path][count]["loss"] ** 2 for path, count in num_kept.items()),
            }
        else:
            num_kept = {layer.path: self._counts(layer)[0] for layer in layers}
        decision["layers"] = {path: found[path][count] for path, count in num_kept.items()}
        if self.options.top_k is not None:
            decision["top_k"] = self.options.top_k
        if self.options.padded:
            decision["padded"] = True
        return decision

    def best_of_counts(self, layer: MoELayer, figures: Mapping[str, Tensor] | None) -> dict[int, dict[str, Any]]:
        """For every count searched: what will be decided if the layer keeps so many."""
        if figures is None:
            kept = list(range(layer.num_experts))
            unchanged = {"kept": kept, "dropped": [], "loss": 0.0, "relative_loss": 0.0, "median_loss": 0.0, "sets": 1}
            return {layer.num_experts: unchanged}
        norm = float(figures["squared_output"].sqrt().sum())
        counts = self._counts(layer)
        by_count = torch.split(figures["squared_error"], [num_subsets(layer, count) for count in counts], dim=1)
        found = {}
        for count, squared_BS in zip(counts, by_count, strict=True):
            dropped, losses_S = best_subset(squared_BS, dropped_subsets(layer, count))
            loss = float(losses_S.min())
            found[count] = {
                "kept": [expert for expert in range(layer.num_experts) if expert not in dropped],
                "dropped": list(dropped),
                "loss": loss,
                "relative_loss": loss / norm if norm else 0.0,
                "median_loss": float(losses_S.quantile(0.5)),
                "sets": len(losses_S),
            }
        return found

    def preview(self, moe: MoEModel, decision: Decision) -> AbstractContextManager[object]:
        """Removed means masked."""
        return moe.masked(_kept(decision), top_k=decision.get("top_k"))

    def edit(self, moe: MoEModel, decision: Decision) -> None:
        """Remove the experts that are not kept."""
        moe.keep(_kept(decision), top_k=decision.get("top_k"), padded=decision.get("padded", False))


def allocated(costs: Mapping[str, Mapping[int, float]], total: int) -> dict[str, int]:
    """Layer path → the count it keeps, from layer path → count → its cost."""
    table_LC = torch.full((len(costs), 1 + max(map(max, costs.values()))), float("inf"), dtype=torch.float64)
    for row_C, by_count in zip(table_LC, costs.values(), strict=True):
        row_C[list(by_count)] = torch.tensor(list(by_count.values()), dtype=torch.float64)
    return dict(zip(costs, allocate(table_LC, total), strict=True))


def _kept(decision: Decision) -> dict[str, list[int]]:
    return {path: layer["kept"] for path, layer in decision["layers"].items()}


class SubsetErrors(Statistic):
    """Per batch B and set S: the squared error of the layer's output; and per batch the squared norm of the output.

    The sets are those of all `counts` of kept experts, in this order. With `top_k` the smaller layer chooses only so
    many experts per token.
    """

    def __init__(self, layer: MoELayer, counts: Sequence[int], top_k: int | None = None) -> None:
        self.layer = layer
        self.counts = counts
        self.top_k = top_k
        self._tables: SubsetTables | None = None
        self._errors_BS: list[Tensor] = []
        self._outputs_B: list[Tensor] = []
        self._num_tokens_B: list[int] = []

    def update(self, tokens: RoutedTokens) -> None:
        """Add the row of one batch."""
        if self._tables is None:
            self._tables = SubsetTables.build(self.layer, self.counts, tokens.hidden_TH.device, self.top_k)
        self._errors_BS.append(squared_errors(tokens, self._tables).cpu())
        assert tokens.output_TH is not None
        self._outputs_B.append(tokens.output_TH.float().square().sum(dtype=torch.float64).cpu())
        self._num_tokens_B.append(tokens.num_tokens)

    def tensors(self) -> dict[str, Tensor]:
        """squared_error [B, S], squared_output [B] float64; num_tokens [B] int64."""
        return {
            "squared_error": torch.stack(self._errors_BS),
            "squared_output": torch.stack(self._outputs_B),
            "num_tokens": torch.tensor(self._num_tokens_B),
        }
