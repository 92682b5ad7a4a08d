"""What the options of choosing experts mean for the layers of a model: which counts, by which route, and whether that
can be.

What needs torch is imported where it is used, so that options can be listed and checked without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any, Literal

from compressor.method import Measuring, OptionError, check_layer_names, fewer_experts
from compressor.selection.options import SelectionOptions, ids_for

if TYPE_CHECKING:
    from compressor.model.structure import MoELayer

_MAX_RANKS = 20
_PAPER_TOKENS = 128 * 2048
_TOKENS, _COUNTS = 3840, 8
_RIVALS = ("weighted_ean", "reap")
"""Criteria that every search gathers the figures of, and one of which is better than it on some models."""
_MOST_RIVALS = 6

Route = Literal["criterion", "constants", "exact", "greedy"]


@dataclass(frozen=True)
class LayerPlan:
    """What the options mean for one layer."""

    layer: MoELayer
    options: SelectionOptions

    @property
    def path(self) -> str:
        return self.layer.path

    @cached_property
    def possible(self) -> list[int]:
        """All counts that the layer could keep, ascending."""
        from compressor.model import constants
        from compressor.model.moe_model import possible_counts

        multiple, budget, num_experts = self.options.multiple_of or 1, self.options.budget, self.layer.num_experts
        counts: Sequence[int] = possible_counts(self._smaller)
        if self.options.with_constants:
            counts = [num_experts] if constants.problem(self.layer) else range(1, num_experts + 1)
        return [one for one in counts if one % multiple == 0 and (budget is None or budget.allows(one))]

    @cached_property
    def counts(self) -> list[int]:
        """The counts among whose sets is searched, ascending: one, or with a mean all that the layer could keep."""
        num_kept, asked = self.options.num_kept(self.layer), self.options.asked(self.layer)
        if num_kept is None or asked is None:
            return [count for count in self.possible if self.has_room(count)]
        if self.options.multiple_of is None or isinstance(asked, int):
            return [num_kept]
        return [min(self.possible, key=lambda count: (abs(count - asked), -count), default=num_kept)]

    @property
    def changes(self) -> bool:
        return self.options.top_k is not None or self.counts != [self.layer.num_experts]

    @cached_property
    def route(self) -> Route:
        """How its experts are chosen."""
        if self.options.criterion is not None:
            return "criterion"
        if self.options.with_constants:
            return "constants"
        if self.options.search != "auto":
            return self.options.search
        return "exact" if self._few_sets else "greedy"

    @cached_property
    def nearest_mean(self) -> list[int]:
        """Counts an eighth of the experts apart, those nearest the mean first."""
        num_experts = self.layer.num_experts
        mean = self.options.budget.total([num_experts]) if self.options.budget else num_experts
        possible = [count for count in self.counts if self.options.top_k is not None or count < num_experts]
        steps = [num_experts * step / 8 for step in range(9 if num_experts in possible else 8)]
        near = {min(possible, key=lambda count: (abs(count - step), count)) for step in steps if possible}
        return sorted(near, key=lambda count: (abs(count - mean), count))

    @cached_property
    def protected(self) -> list[int]:
        return ids_for(self.layer, self.options.protect)

    @cached_property
    def forbidden(self) -> list[int]:
        return ids_for(self.layer, self.options.forbid)

    def has_room(self, num_kept: int) -> bool:
        """Whether so many experts can be kept with those that are protected, and without those that are forbidden."""
        return not (self.protected or self.forbidden) or not any(self._crowded(num_kept))

    def after(self, num_kept: int) -> MoELayer:
        """The layer with so many experts left. Raises OptionError where that cannot be."""
        from compressor.model import constants

        if self.options.with_constants and num_kept < self.layer.num_experts:
            if why := constants.problem(self.layer, range(num_kept, self.layer.num_experts)):
                raise self._refused(f"{self.path}: {why}.")
            return self.layer.with_constants(range(num_kept, self.layer.num_experts))
        if self.options.replacement == "never_chosen":
            fewer_experts(self.layer, num_kept, self.options.count_option)
            return self.layer.with_constants(range(num_kept, self.layer.num_experts))
        return fewer_experts(self.layer, num_kept, self.options.count_option, self.options.top_k)

    def check(self) -> None:
        """Raise OptionError where this cannot be."""
        self._check_constants()
        self._check_multiple()
        if not self.options.budget:
            self._check_count()
        elif not self.possible:
            raise self._refused(f"{self.path}: of its {self.layer.num_experts} experts it can keep no such number.")
        self._check_fixed()
        if self.changes:
            self._check_search()

    def search_note(self) -> str | None:
        """What is searched, in words; None where there is no choice."""
        if not self.changes or self._num_sets == 1:
            return None
        amount = f"{self._num_sets:,}" if self._num_sets < 10**9 else f"{self._num_sets:.1e}"
        how = "all of them looked at" if self._looks_at_all else "searched: greedy removal, then best swaps"
        return f"{amount} sets of {self._counts_said('')} experts per layer, {how}"

    @cached_property
    def free(self) -> MoELayer:
        """The layer as its experts are chosen: where the router stays as it is, its groups need not be even."""
        return dataclasses.replace(self.layer, num_groups=1) if self.options.with_constants else self.layer

    @cached_property
    def _smaller(self) -> MoELayer:
        """The layer with the number of choices per token that it will have."""
        top_k = self.options.top_k
        return self.layer if top_k is None else dataclasses.replace(self.layer, top_k=top_k)

    @cached_property
    def _num_sets(self) -> int:
        from compressor.selection.exact import num_subsets

        return sum(num_subsets(self.free, count) for count in self.counts)

    @cached_property
    def _num_ranks(self) -> int:
        from compressor.selection.exact import ranks_needed

        return max(ranks_needed(self.layer, count, self.options.top_k) for count in self.counts)

    @property
    def _few_sets(self) -> bool:
        return self._num_sets <= self.options.max_subsets and self._num_ranks <= _MAX_RANKS

    @property
    def _looks_at_all(self) -> bool:
        return self.route == "exact" or (self.route == "constants" and self._num_sets <= self.options.max_subsets)

    def _counts_said(self, several: str) -> str:
        return f"{self.counts[0]}" if len(self.counts) == 1 else f"{several}{self.counts[0]} to {self.counts[-1]}"

    def _refused(self, message: str) -> OptionError:
        return OptionError(self.options.count_option, message)

    def _crowded(self, num_kept: int) -> Iterator[tuple[str, str]]:
        """(option, what is wrong) where a list is longer than there is room for."""
        layer = self.free
        size, per_group = layer.num_experts // layer.num_groups, num_kept // layer.num_groups
        for group in range(layer.num_groups):
            where = layer.path if layer.num_groups == 1 else f"{layer.path}, group {group}"
            stay = sum(expert // size == group for expert in self.protected)
            go = sum(expert // size == group for expert in self.forbidden)
            if stay > per_group:
                yield "protect", f"{where}: {stay} experts are protected, but only {per_group} are to be kept."
            if go > size - per_group:
                yield "forbid", f"{where}: {go} experts are forbidden, but only {size - per_group} are to be dropped."

    def _check_constants(self) -> None:
        from compressor.model.constants import never_chosen_problem, problem

        if self.options.replacement == "none" or self.options.num_kept(self.layer) == self.layer.num_experts:
            return
        why = problem(self.layer)
        if self.options.replacement == "never_chosen":
            why = why or never_chosen_problem(self.layer, [])
        if why:
            raise OptionError("replace", f"{self.path}: {why}.")

    def _check_multiple(self) -> None:
        """There is a multiple that the layer can keep, and a count that was given is one."""
        multiple, asked = self.options.multiple_of, self.options.asked(self.layer)
        if multiple is None:
            return
        if not self.possible:
            raise OptionError(
                "multiple_of",
                f"{self.path}: none of the counts that it can keep is a multiple of {multiple}; it has "
                f"{self.layer.num_experts} experts.",
            )
        if isinstance(asked, int) and asked % multiple:
            below, above = (asked // multiple * multiple, (asked // multiple + 1) * multiple)
            near = [str(count) for count in (below, above) if count in self.possible] or [str(self.possible[-1])]
            raise self._refused(
                f"{self.path}: {asked} is no multiple of {multiple} (`multiple_of`); nearest: {' and '.join(near)}."
            )

    def _check_count(self) -> None:
        [num_kept] = self.counts
        if num_kept < 1:
            raise self._refused(
                f"{self.path}: dropping {self.options.drop} of {self.layer.num_experts} experts would leave none."
            )
        self.after(num_kept)

    def _check_fixed(self) -> None:
        """Ids that exist, in one list only, and no more than there is room for."""
        if not (self.protected or self.forbidden):
            return
        num_experts = self.layer.num_experts
        for option, ids in (("protect", self.protected), ("forbid", self.forbidden)):
            unknown = [expert for expert in ids if expert >= num_experts]
            if unknown:
                raise OptionError(
                    option, f"{self.path}: it has no expert {unknown[0]}; its experts are 0 to {num_experts - 1}."
                )
        both = sorted(set(self.protected) & set(self.forbidden))
        if both:
            raise OptionError("forbid", f"{self.path}: expert {both[0]} is both protected and forbidden.")
        crowded = [list(self._crowded(count)) for count in (self.possible if self.options.budget else self.counts)]
        if all(crowded):
            raise OptionError(*crowded[0][0])

    def _check_search(self) -> None:
        if self.layer.watch_problem is not None:
            raise self._refused(f"{self.layer.watch_problem}.")
        if self.options.search != "exact" or self._few_sets:
            return
        limit = (
            f"the limit is {self.options.max_subsets:,} (`max_subsets`)"
            if self._num_sets > self.options.max_subsets
            else f"each token would need its best {self._num_ranks} experts, the limit is {_MAX_RANKS}"
        )
        raise OptionError(
            "search",
            f"{self.path}: keeping {self._counts_said('from ')} of {self.layer.num_experts} experts means "
            f"{self._num_sets:,} possible sets per layer, too many to look at all of them: {limit}. Say `search: "
            f"greedy`, or leave it out.",
        )


# All layers together ---------------------------------------------------------------------------------------


def check_top_k(layers: Sequence[MoELayer], top_k: int | None) -> None:
    """Raise OptionError where tokens of some layer cannot choose fewer experts, so many."""
    for layer in layers if top_k is not None else ():
        if layer.top_k_fixed:
            message = f"its class chooses {layer.top_k} experts per token whatever the config says"
        elif top_k == layer.top_k:
            message = f"each token chooses {top_k} experts already; leave `top_k` out"
        elif top_k is not None and top_k > layer.top_k:
            message = f"each token chooses {layer.top_k} experts, which can be lowered but not raised to {top_k}"
        else:
            continue
        raise OptionError("top_k", f"{layer.path}: {message}.")


def check_names(layers: Sequence[MoELayer], options: SelectionOptions) -> None:
    """Raise OptionError where an option names a layer that is not there."""
    check_layer_names(layers, options.count_option, options.by_layer)
    check_layer_names(layers, "protect", options.protect)
    check_layer_names(layers, "forbid", options.forbid)


def check_blend(options: SelectionOptions, domains: Sequence[str]) -> None:
    """Raise OptionError where weights are given to domains that are not there, or all would weigh nothing."""
    if isinstance(options.blend, str):
        return
    if unknown := [name for name in options.blend if name not in domains]:
        raise OptionError(
            "blend", f"there is no calibration source called {unknown[0]!r}; there are {', '.join(domains)}."
        )
    if not any(options.blend.get(domain) for domain in domains):
        raise OptionError("blend", f"all of the sources {', '.join(domains)} would weigh nothing.")


def total_kept(plans: Sequence[LayerPlan], options: SelectionOptions) -> int:
    """The experts that a mean leaves in all. Raises OptionError if the layers cannot keep exactly so many."""
    from compressor.selection.allocation import possible_totals

    assert options.budget is not None
    total = options.budget.total([plan.layer.num_experts for plan in plans])
    possible = possible_totals([plan.counts for plan in plans])
    if total in possible:
        return total
    if options.multiple_of is not None and possible[0] <= total <= possible[-1]:
        return min(possible, key=lambda one: (abs(one - total), -one))
    nearest = min(possible, key=lambda one: (abs(one - total), one))
    raise OptionError(
        options.count_option,
        f"a mean of {options.budget.amount} is {total} experts in {len(plans)} layers, which cannot be: what the "
        f"layers can keep adds up to {possible[0]} at least and {possible[-1]} at most"
        f"{'' if len(possible) > possible[-1] - possible[0] else ', in steps'}. "
        f"The nearest possible mean is {nearest / len(plans):.6g}.",
    )


def measured_counts(plan: LayerPlan, num_layers: int) -> list[int]:
    """The counts that are measured, ascending: an eighth of the experts apart, as many as may be paid for."""
    return sorted(plan.nearest_mean[: measured_amount(plan.options, num_layers)[1]])


def check_measured(plans: Sequence[LayerPlan], options: SelectionOptions) -> None:
    """Raise OptionError where the counts that are measured, and all between, cannot add up to the total."""
    from compressor.selection.allocation import possible_totals

    between: list[list[int]] = []
    for plan in plans:
        measured = measured_counts(plan, len(plans)) or plan.counts
        most = plan.counts[-1] if options.top_k is None else measured[-1]
        between.append([count for count in plan.counts if measured[0] <= count <= most])
    total, possible = total_kept(plans, options), possible_totals(between)
    if total not in possible:
        raise OptionError(
            "measured_counts",
            f"{total} experts are to stay in {len(plans)} layers, and the counts that would be measured, those nearest "
            f"the mean, add up to {possible[0]} at least and {possible[-1]} at most: say a larger `measured_counts`.",
        )


def measured_amount(options: SelectionOptions, num_layers: int) -> tuple[int, int]:
    """(tokens, counts of a layer) that are measured: of C counts in L layers, C·(L + 1)/2 forwards of these tokens are
    no more than one run over the paper's calibration text, where fewer than 3 counts would not be needed for that.
    """
    forwards = (num_layers + 1) / 2 * options.num_kinds
    tokens = options.measured_tokens or max(256, min(_TOKENS, int(_PAPER_TOKENS / 3 / forwards) // 256 * 256))
    return tokens, options.measured_counts or max(3, min(_COUNTS, int(_PAPER_TOKENS / tokens / forwards)))


def measured_ways(
    options: SelectionOptions, criteria: Mapping[str, Any], num_layers: int, num_counts: int
) -> list[SelectionOptions]:
    """How the sets of each count are chosen that are measured: as is asked for; and by criteria too, where no way is
    asked for and so many sets cost no more than one run over the paper's calibration text.
    """
    found = [options]
    if options.budget and options.chooses:
        found += [options.model_copy(update={"criterion": name}) for name in _RIVALS if name in criteria]
    tokens, forwards = measured_amount(options, num_layers)[0], (num_layers + 1) / 2 * options.num_kinds
    return found[: max(1, int(_PAPER_TOKENS / tokens / forwards) // max(1, num_counts))]


def sharing_notes(plans: Sequence[LayerPlan], planned: Mapping[str, int], wanted: Measuring | None) -> list[str]:
    """How a mean is shared out, and what measuring that takes."""
    options, stay = plans[0].options, f"{sum(planned.values()):,} experts stay in {len(plans)} layers"
    if options.share == "even":
        return [f"{stay}, shared out evenly"]
    note = f"{stay}; how many in which is found on the calibration text, an even split is shown"
    if options.is_measured and wanted is not None:
        note += (
            f": up to {wanted.candidates} sets of each layer are measured on {wanted.tokens:,} tokens, as much work as "
            f"{wanted.forwards(len(plans)) * wanted.tokens:,.0f} tokens more"
        )
    return [note]


def choosing_notes(names: Sequence[str], wanted: Measuring | None) -> list[str]:
    """What is compared by what the model's answers lose, and what that takes."""
    if wanted is None or len(names) < 2:
        return []
    tokens = wanted.tokens_compared
    return [
        f"{len(names)} choices are compared by what the answers lose on {tokens:,} tokens, as much work as "
        f"{(len(names) + 1) * tokens:,} tokens more: {'; '.join(names)}"
    ]


def constants_notes(layers: Sequence[MoELayer], options: SelectionOptions) -> list[str]:
    """Who reads a model some of whose experts, as in these layers, answer constants or are never chosen."""
    there = [layer for layer in layers if layer.constants]
    number = sum(len(layer.constants) for layer in there)
    will = "never be chosen" if options.replacement == "never_chosen" else "answer constants"
    condition = ""
    if options.replacement == "measured":
        condition = ", if the model's answers lose less so than where tokens choose among the others"
    return [
        f"{number:,} experts of {len(there)} layers will {will}{condition}; `compressor.load` and vLLM from 0.33 on "
        f"read that; transformers 5 alone refuses it, version 4 makes weights up"
    ]


def rivals(
    options: SelectionOptions, criteria: Mapping[str, Any], domains: Sequence[str], *, several: bool
) -> dict[str, dict[str, Any]]:
    """What is asked for, and what it is compared with where KL is to choose: in words → other values of options. Six at
    most, of all kinds together. `several`: whether sets chosen in several ways were measured.
    """
    shares: list[str | None] = [options.share or "measured"] if options.budget else [None]
    asked = options.criterion or "search"
    ways: dict[str, dict[str, Any]] = {asked: {}}
    if options.chooses:
        shares += ["even"] if options.is_measured else []
        ways |= {name: {"criterion": name, "search": "auto"} for name in _RIVALS if name in criteria}
        if len(domains) > 1 and options.blend != "worst" and not several:
            ways[f"{asked}, worst domain"] = {"blend": "worst"}
    found: dict[str, dict[str, Any]] = {"each layer's best": {}} if several else {}
    for share, way in product(shares, ways):
        of_share = {"share": share} if share else {}
        found[f"{way}, {share} counts" if share else way] = {**ways[way], **of_share, "choose": "given"}
    kind, most = ", constants" if options.with_constants else "", _MOST_RIVALS // options.num_kinds
    names = list(found)[:most]
    even = next((name for name, changes in found.items() if changes.get("share") == "even"), None)
    if even is not None and even not in names:
        names[-1] = even
    return {f"{name}{kind}": found[name] for name in names}


def planned_counts(plans: Sequence[LayerPlan], options: SelectionOptions) -> dict[str, int]:
    """The count of every layer; of a mean the most even split. Raises OptionError where nothing would change."""
    planned = {plan.path: plan.counts[0] for plan in plans}
    if options.budget:
        total = total_kept(plans, options)
        mean, kinds = total / len(plans), {tuple(plan.counts) for plan in plans}
        steps = {after - before for counts in kinds for before, after in pairwise(counts)}
        reach = 2 * max(steps) if len(kinds) == len(steps) == 1 else float("inf")  # then all are next to the mean
        near = {plan.path: [count for count in plan.counts if abs(count - mean) < reach] for plan in plans}
        planned = allocated({path: {one: (one - mean) ** 2 for one in counts} for path, counts in near.items()}, total)
    if options.top_k is None and sum(planned.values()) == sum(plan.layer.num_experts for plan in plans):
        where = f"{plans[0].path}: all {plans[0].layer.num_experts} experts would stay"
        if options.multiple_of is not None:
            where += f" (`multiple_of: {options.multiple_of}`)"
        raise OptionError(options.count_option, f"{where}: nothing to prune.")
    return planned


def allocated(costs: Mapping[str, Mapping[int, float]], total: int) -> dict[str, int]:
    """Layer path → the count it keeps, from layer path → count → its cost."""
    import torch

    from compressor.selection.allocation import allocate

    table_LC = torch.full((len(costs), 1 + max(map(max, costs.values()))), float("inf"), dtype=torch.float64)
    for row_C, by_count in zip(table_LC, costs.values(), strict=True):
        row_C[list(by_count)] = torch.tensor(list(by_count.values()), dtype=torch.float64)
    return dict(zip(costs, allocate(table_LC, total), strict=True))


def rounding_notes(plans: Sequence[LayerPlan], options: SelectionOptions) -> list[str]:
    """What `multiple_of` has changed."""
    if options.multiple_of is None:
        return []
    notes: list[str] = []
    if options.budget:
        asked, total = options.budget.total([plan.layer.num_experts for plan in plans]), total_kept(plans, options)
        notes += [f"{total:,} experts stay in all instead of {asked:,}"] if asked != total else []
    for plan in plans:
        num_kept, count = options.num_kept(plan.layer), plan.counts[0]
        if num_kept not in (None, count):
            notes.append(f"{count} of {plan.layer.num_experts} experts stay instead of {num_kept}")
    return [f"multiple_of {options.multiple_of}: {note}" for note in dict.fromkeys(notes)]


def switch_notes(layers: Sequence[MoELayer], planned: Mapping[str, int], options: SelectionOptions) -> list[str]:
    """What `padded`, `progressive` and `top_k` do."""
    notes = [padding_note(layers, planned, options)] if options.padded else []
    if options.progressive:
        notes.append("each layer is observed on what comes out of the layers already pruned")
    if options.top_k is not None:
        notes.append(f"each token chooses {options.top_k} of a layer's experts, now {layers[0].top_k}")
    return notes


def padding_note(layers: Sequence[MoELayer], planned: Mapping[str, int], options: SelectionOptions) -> str:
    """What `padded` costs. Raises OptionError where it would do nothing, or cannot be."""
    most = max(planned.values())
    if not options.budget and min(planned.values()) == most:
        raise OptionError("padded", f"every layer keeps {most} experts, so there is nothing to pad; leave it out.")
    for layer in layers:
        if layer.padding_problem is not None and (options.budget or planned[layer.path] < most):
            raise OptionError("padded", f"{layer.path}: cannot be padded: {layer.padding_problem}.")
    if options.budget:
        return "padded to the largest layer's count: what the other layers drop beyond that saves no memory"
    stay = {layer.path: most - planned[layer.path] for layer in layers}
    parameters = sum(stay[layer.path] * layer.parameters_per_expert for layer in layers)
    return (
        f"padded to {most} experts in every layer: {parameters:,} parameters of {sum(stay.values())} dropped "
        f"experts stay in the checkpoint"
    )
