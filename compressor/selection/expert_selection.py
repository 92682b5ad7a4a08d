"""Choosing the experts that stay, as a method: what expert pruning and task-specific pruning have in common.

A layer's experts are chosen on one of three routes:

    criterion   sums per expert → scores → the largest stay
    exact       the paper's objective for every set of kept experts
    greedy      the same objective, searched, where there are too many sets

The sums are gathered on every route, so that `compressor decide` can answer other criteria and counts afterwards.

What needs torch is imported where it is used, so that options can be listed and checked without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from compressor.method import Decision, Method, OptionError, Plan, check_layer_names
from compressor.selection.options import SelectionOptions, ids_for
from compressor.wording import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from compressor.model.moe_model import MoEModel
    from compressor.model.structure import MoELayer
    from compressor.observe.statistic import Gathered, RankedStatistic, Statistic
    from compressor.selection.activation_sums import ExpertSums
    from compressor.selection.choose import Choice, Fixed
    from compressor.selection.greedy import GreedySearch

_MAX_RANKS = 20
_MANY_DROPPED = 0.6
_STARTS_WHERE_MANY_GO = 2

Route = Literal["criterion", "exact", "greedy"]
OptionsT = TypeVar("OptionsT", bound=SelectionOptions)


class ExpertSelection(Method[OptionsT]):
    """Keep, in every MoE layer, the experts that are chosen by a search or by a criterion."""

    needs_weights = False

    # check

    def check(self, layers: Sequence[MoELayer]) -> Plan:
        """Possible counts only; few enough sets to look at all of them; nothing asked for that has no effect."""
        self._check_criterion()
        self._check_text()
        self._check_top_k(layers)
        for option, by_layer in self._by_layer().items():
            check_layer_names(layers, option, by_layer)
        for layer in layers:
            self._check_multiple(layer)
            if not self.options.budget:
                self._check_count(layer)
            self._check_fixed(layer)
            if self._changes(layer):
                self._check_search(layer)
        planned = self._planned(layers)
        if self.options.top_k is None and sum(planned.values()) == sum(layer.num_experts for layer in layers):
            where = f"{layers[0].path}: all {layers[0].num_experts} experts would stay"
            if self.options.multiple_of is not None:
                where += f" (`multiple_of: {self.options.multiple_of}`)"
            raise self._refused(f"{where}: nothing to prune.")
        notes = sorted({note for layer in layers for note in self._search_notes(layer)})
        notes += self._rounding_notes(layers)
        if self.options.budget:
            notes.append(
                f"{sum(planned.values()):,} experts stay in {len(layers)} layers; how many in which is found on the "
                f"calibration text, an even split is shown"
            )
        if self.options.padded:
            notes.append(self._padding_note(layers, planned))
        if self.options.progressive:
            notes.append("each layer is observed on what comes out of the layers already pruned")
        if self.options.top_k is not None:
            notes.append(f"each token chooses {self.options.top_k} of a layer's experts, now {layers[0].top_k}")
        return Plan(planned, notes, top_k=self.options.top_k, count_option=self.options.count_option)

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

    def _check_criterion(self) -> None:
        name = self.options.criterion
        if name is not None and name not in self.criteria:
            known = ", ".join(sorted(self.criteria))
            raise OptionError(
                "criterion", f"there is no criterion {name!r}{did_you_mean(name, self.criteria)} Known are {known}."
            )

    def _check_text(self) -> None:
        idle = {"progressive": self.options.progressive, "blend": self.options.blend != "mean"}
        for option in (option for option, given in idle.items() if given and not self.needs_text):
            raise OptionError(
                option,
                f"it would have no effect, since `criterion: {self.options.criterion}` looks at no text; leave it out.",
            )

    def _by_layer(self) -> dict[str, Mapping[str, Any]]:
        """The options that name layers."""
        options = self.options
        return {options.count_option: options.by_layer, "protect": options.protect, "forbid": options.forbid}

    def _check_fixed(self, layer: MoELayer) -> None:
        """Ids that exist, in one list only, and no more than there is room for."""
        protected, forbidden = ids_for(layer, self.options.protect), ids_for(layer, self.options.forbid)
        for option, ids in (("protect", protected), ("forbid", forbidden)):
            unknown = [expert for expert in ids if expert >= layer.num_experts]
            if unknown:
                raise OptionError(
                    option,
                    f"{layer.path}: it has no expert {unknown[0]}; its experts are 0 to {layer.num_experts - 1}.",
                )
        both = sorted(set(protected) & set(forbidden))
        if both:
            raise OptionError("forbid", f"{layer.path}: expert {both[0]} is both protected and forbidden.")
        crowded = [list(self._crowded(layer, count)) for count in self._counts(layer)]
        if all(crowded):
            raise OptionError(*crowded[0][0])

    def _crowded(self, layer: MoELayer, num_kept: int) -> Iterator[tuple[str, str]]:
        """(option, what is wrong) where a list is longer than there is room for."""
        protected, forbidden = ids_for(layer, self.options.protect), ids_for(layer, self.options.forbid)
        size, per_group = layer.num_experts // layer.num_groups, num_kept // layer.num_groups
        for group in range(layer.num_groups):
            where = layer.path if layer.num_groups == 1 else f"{layer.path}, group {group}"
            stay = sum(expert // size == group for expert in protected)
            go = sum(expert // size == group for expert in forbidden)
            if stay > per_group:
                yield "protect", f"{where}: {stay} experts are protected, but only {per_group} are to be kept."
            if go > size - per_group:
                yield "forbid", f"{where}: {go} experts are forbidden, but only {size - per_group} are to be dropped."

    def _check_multiple(self, layer: MoELayer) -> None:
        """There is a multiple that the layer can keep, and a count that was given is one."""
        multiple, asked = self.options.multiple_of, self.options.asked(layer)
        if multiple is None:
            return
        possible = self._possible(layer)
        if not possible:
            raise OptionError(
                "multiple_of",
                f"{layer.path}: none of the counts that it can keep is a multiple of {multiple}; it has "
                f"{layer.num_experts} experts.",
            )
        if isinstance(asked, int) and asked % multiple:
            below, above = (asked // multiple * multiple, (asked // multiple + 1) * multiple)
            near = " and ".join(str(count) for count in (below, above) if count in possible) or str(possible[-1])
            raise self._refused(
                f"{layer.path}: {asked} is not a multiple of {multiple} (`multiple_of`). The nearest that it can keep: "
                f"{near}."
            )

    def _rounding_notes(self, layers: Sequence[MoELayer]) -> list[str]:
        """What `multiple_of` has changed."""
        multiple = self.options.multiple_of
        if multiple is None:
            return []
        notes: list[str] = []
        if self.options.budget:
            asked, total = self.options.budget.total([layer.num_experts for layer in layers]), self._total(layers)
            notes += [f"{total:,} experts stay in all instead of {asked:,}"] if asked != total else []
        for layer in layers:
            num_kept, count = self.options.num_kept(layer), self._counts(layer)[0]
            if num_kept not in (None, count):
                notes.append(f"{count} of {layer.num_experts} experts stay instead of {num_kept}")
        return [f"multiple_of {multiple}: {note}" for note in dict.fromkeys(notes)]

    def _check_count(self, layer: MoELayer) -> None:
        from compressor.model.moe_model import count_problem

        [num_kept] = self._counts(layer)
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
        if self.options.search != "exact" or self._few_sets(layer):
            return
        sets, ranks, counts = self._num_sets(layer), self._num_ranks(layer), self._counts(layer)
        limit = (
            f"the limit is {self.options.max_subsets:,} (`max_subsets`)"
            if sets > self.options.max_subsets
            else f"each token would need its best {ranks} experts, the limit is {_MAX_RANKS}"
        )
        kept = f"{counts[0]}" if len(counts) == 1 else f"from {counts[0]} to {counts[-1]}"
        raise OptionError(
            "search",
            f"{layer.path}: keeping {kept} of {layer.num_experts} experts means {sets:,} possible sets per layer, too "
            f"many to look at all of them: {limit}. Say `search: greedy`, or leave it out.",
        )

    def _search_notes(self, layer: MoELayer) -> Iterator[str]:
        counts, route = self._counts(layer), self._route(layer)
        if not self._changes(layer):
            return
        if route == "criterion":
            criterion = self.criteria[self.options.criterion or ""]
            yield f"experts are kept by their score: {criterion.name} ({criterion.source})"
            if not self.needs_text:
                yield (
                    "no calibration text is read for it, so super experts are not known and not protected (with "
                    "`gather: [outputs]` some is, and they are)"
                )
            return
        kept = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        sets = self._num_sets(layer)
        if sets == 1:
            return
        amount = f"{sets:,}" if sets < 10**9 else f"{sets:.1e}"
        how = "all of them looked at" if route == "exact" else "searched: greedy removal, then best swaps"
        yield f"{amount} sets of {kept} experts per layer, {how}"

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
        num_kept, asked = self.options.num_kept(layer), self.options.asked(layer)
        if num_kept is None or asked is None:
            return self._possible(layer)
        if self.options.multiple_of is None or isinstance(asked, int):
            return [num_kept]
        return [min(self._possible(layer), key=lambda count: (abs(count - asked), -count), default=num_kept)]

    def _possible(self, layer: MoELayer) -> list[int]:
        """All counts that the layer could keep, ascending."""
        from compressor.model.moe_model import count_problem

        smaller, multiple = self._smaller(layer), self.options.multiple_of or 1
        counts = range(multiple, layer.num_experts + 1, multiple)
        return [count for count in counts if count_problem(smaller, count) is None]

    def _num_sets(self, layer: MoELayer) -> int:
        from compressor.selection.exact import num_subsets

        return sum(num_subsets(layer, count) for count in self._counts(layer))

    def _num_ranks(self, layer: MoELayer) -> int:
        from compressor.selection.exact import ranks_needed

        return max(ranks_needed(layer, count, self.options.top_k) for count in self._counts(layer))

    def _changes(self, layer: MoELayer) -> bool:
        """Whether anything changes in the layer."""
        return self.options.top_k is not None or self._counts(layer) != [layer.num_experts]

    def _few_sets(self, layer: MoELayer) -> bool:
        return self._num_sets(layer) <= self.options.max_subsets and self._num_ranks(layer) <= _MAX_RANKS

    def _route(self, layer: MoELayer) -> Route:
        if self.options.criterion is not None:
            return "criterion"
        if self.options.search != "auto":
            return self.options.search
        return "exact" if self._few_sets(layer) else "greedy"

    def _total(self, layers: Sequence[MoELayer]) -> int:
        """The experts that a mean leaves in all. Raises OptionError if the layers cannot keep exactly so many."""
        from compressor.selection.allocation import possible_totals

        assert self.options.budget is not None
        total = self.options.budget.total([layer.num_experts for layer in layers])
        possible = possible_totals([self._counts(layer) for layer in layers])
        if total in possible:
            return total
        if self.options.multiple_of is not None and possible[0] <= total <= possible[-1]:
            return min(possible, key=lambda one: (abs(one - total), -one))
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

    @property
    def progressive(self) -> bool:
        """Whether layers are observed on what comes out of the layers already pruned."""
        return self.options.progressive

    def check_domains(self, domains: Sequence[str]) -> None:
        """Weights are given to domains that exist."""
        if isinstance(self.options.blend, str):
            return
        unknown = [name for name in self.options.blend if name not in domains]
        if unknown:
            raise OptionError(
                "blend", f"there is no calibration source called {unknown[0]!r}; there are {', '.join(domains)}."
            )
        if not any(self.options.blend.get(domain) for domain in domains):
            raise OptionError("blend", f"all of the sources {', '.join(domains)} would weigh nothing.")

    @property
    def needs_text(self) -> bool:
        """Not for a criterion that looks at none, unless figures of text are to be gathered besides."""
        criterion = self.criteria.get(self.options.criterion or "")
        return criterion is None or criterion.needs_text or bool(self.options.gather)

    def statistic(self, layer: MoELayer) -> Statistic | None:
        """Sums for every criterion, and what the search needs; nothing where nothing changes."""
        from compressor.observe.statistic import JoinedStatistic
        from compressor.selection.activation_sums import ExpertSums
        from compressor.selection.exact import SubsetErrors
        from compressor.selection.pair_losses import PairLosses

        if not self._changes(layer):
            return None
        criterion = self.criteria[self.options.criterion] if self.options.criterion is not None else None
        needs = {*self.options.gather, *(criterion.needs if criterion else ())}
        sums = ExpertSums(layer, outputs="outputs" in needs)
        parts: list[RankedStatistic] = [sums]
        if "pairs" in needs:
            parts.append(PairLosses(layer))
        route, counts = self._route(layer), self._counts(layer)
        if route == "exact":
            parts.append(SubsetErrors(layer, counts, self.options.top_k))
        if route == "greedy":
            parts.append(self._greedy_search(layer, sums))
        return JoinedStatistic(parts)

    def bytes_per_token(self, layer: MoELayer) -> float:
        """The search's Gram matrix of each token's ranks, and what it knows of each rank."""
        if not self._changes(layer) or self._route(layer) != "greedy":
            return 0.0
        from compressor.selection.greedy import most_bytes_of_token, ranks_looked_at

        options = self.options
        ranks = ranks_looked_at(layer, min(self._counts(layer)), options.top_k, options.ranks)
        top_k = options.top_k or layer.top_k
        return most_bytes_of_token(layer, ranks, top_k, has_residual=options.progressive)

    def _greedy_search(self, layer: MoELayer, sums: ExpertSums) -> GreedySearch:
        from compressor.selection.greedy import GreedySearch

        counts = [count for count in self._counts(layer) if self._has_room(layer, count)]
        fewest = min(counts)

        def protected() -> list[int]:
            return self._fixed(layer, sums.largest(), fewest).staying

        many_go = layer.num_experts - fewest > _MANY_DROPPED * layer.num_experts
        starts = self.options.starts
        return GreedySearch(
            layer,
            [fewest] if self.options.budget else counts,
            top_k=self.options.top_k,
            blend=self.options.blend,
            protected=protected,
            forbidden=ids_for(layer, self.options.forbid),
            num_ranks=self.options.ranks,
            num_starts=(_STARTS_WHERE_MANY_GO if many_go else 0) if starts is None else starts,
        )

    def _fixed(self, layer: MoELayer, largest_E: Tensor, num_kept: int) -> Fixed:
        from compressor.selection import choose

        return choose.fixed_experts(
            layer,
            largest_E,
            num_kept,
            protected=ids_for(layer, self.options.protect),
            forbidden=ids_for(layer, self.options.forbid),
            protect_supers=self.options.protect_super_experts,
        )

    def decide(self, layers: Sequence[MoELayer], statistics: Gathered) -> Decision:
        """Per layer: the ids kept and dropped, how they were found, and what they lose where a search has told."""
        found = {layer.path: self.best_of_counts(layer, statistics) for layer in layers}
        decision: Decision = {"layers": {}}
        if self.options.budget:
            total = self._total(layers)
            costs = {path: {count: cost**2 for count, (_, cost) in of.items()} for path, of in found.items()}
            num_kept = allocated(costs, total)
            decision["budget"] = {
                "asked_mean": self.options.budget.mean,
                "mean": total / len(layers),
                "num_kept": total,
                "num_experts": sum(layer.num_experts for layer in layers),
                "summed_squared_loss": sum(costs[path][count] for path, count in num_kept.items()),
            }
        else:
            num_kept = {layer.path: self._counts(layer)[0] for layer in layers}
        decision["layers"] = {path: found[path][count][0] for path, count in num_kept.items()}
        if self.options.top_k is not None:
            decision["top_k"] = self.options.top_k
        if self.options.padded:
            decision["padded"] = True
        return decision

    def best_of_counts(self, layer: MoELayer, statistics: Gathered) -> dict[int, tuple[Choice, float]]:
        """For every count that the layer may keep: what will be decided if it does, and its cost.

        Raises OptionError where the figures cannot tell.
        """
        from compressor.selection.choose import ChoiceError

        if not self._changes(layer):
            return {layer.num_experts: (_unchanged(layer), 0.0)}
        if layer.path not in statistics:
            raise self._refused(f"{layer.path}: nothing was gathered at this layer; observe again.")
        counts = [count for count in self._counts(layer) if self._has_room(layer, count)]
        try:
            return {count: self._best(layer, statistics, count) for count in counts}
        except ChoiceError as error:
            raise self._refused(f"{error}.") from error

    def _has_room(self, layer: MoELayer, num_kept: int) -> bool:
        """Whether so many experts can be kept with those that are protected, and without those that are forbidden."""
        return not list(self._crowded(layer, num_kept))

    def _best(self, layer: MoELayer, statistics: Gathered, num_kept: int) -> tuple[Choice, float]:
        from compressor.selection import choose
        from compressor.selection.scores import largest

        figures, options = statistics[layer.path], self.options
        if num_kept == layer.num_experts and options.top_k is None:
            return _unchanged(layer), 0.0
        fixed = self._fixed(layer, largest(figures), num_kept)
        notes = choose.notes(figures, fixed)
        if options.criterion is not None:
            criterion = self.criteria[options.criterion]
            found = choose.by_criterion(
                layer, figures, num_kept, statistics.domains, options.blend, criterion, fixed, options.seed or 0
            )
            return found | notes, 0.0
        objective = choose.objective_of(figures, statistics.domains, options.blend)
        top_k = options.top_k or layer.top_k
        observed = [int(figures[name]) for name in ("subsets.top_k", "greedy.top_k") if name in figures]
        if any(one != top_k for one in observed):
            raise choose.ChoiceError(
                f"{layer.path}: the losses were gathered for {observed[0]} experts per token, not {top_k}; decide by a "
                f"criterion, or observe again"
            )
        if "subsets.counts" in figures and options.search != "greedy":
            found, cost = choose.by_subsets(layer, figures, num_kept, objective, fixed)
        elif "greedy.counts" in figures and options.search != "exact":
            found, cost = choose.by_greedy(layer, figures, num_kept, objective, fixed)
        else:
            raise choose.ChoiceError(
                f"{layer.path}: no losses of sets of experts were gathered, only sums; decide by a criterion, or "
                f"observe again without one"
            )
        return found | notes, cost

    def preview(self, moe: MoEModel, decision: Decision) -> AbstractContextManager[object]:
        """Removed means masked."""
        return moe.masked(_kept(decision), top_k=decision.get("top_k"))

    def edit(self, moe: MoEModel, decision: Decision) -> None:
        """Remove the experts that are not kept."""
        moe.keep(_kept(decision), top_k=decision.get("top_k"), padded=decision.get("padded", False))


def allocated(costs: Mapping[str, Mapping[int, float]], total: int) -> dict[str, int]:
    """Layer path → the count it keeps, from layer path → count → its cost."""
    import torch

    from compressor.selection.allocation import allocate

    table_LC = torch.full((len(costs), 1 + max(map(max, costs.values()))), float("inf"), dtype=torch.float64)
    for row_C, by_count in zip(table_LC, costs.values(), strict=True):
        row_C[list(by_count)] = torch.tensor(list(by_count.values()), dtype=torch.float64)
    return dict(zip(costs, allocate(table_LC, total), strict=True))


def _unchanged(layer: MoELayer) -> Choice:
    return {"kept": list(range(layer.num_experts)), "dropped": [], "loss": 0.0, "relative_loss": 0.0}


def _kept(decision: Decision) -> dict[str, list[int]]:
    return {path: layer["kept"] for path, layer in decision["layers"].items()}
