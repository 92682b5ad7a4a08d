"""How many experts stay in which layer, where a mean is asked for.

measured    c_l(r): what the answers of the model lose, in nats a token, when layer l alone keeps r experts. Measured at
            some counts on a small text; between them linear, and 0 where all stay
loss        the layer's squared loss of its best set of r experts
even        (r − mean)²

Shared out by `allocation`, so that Σ c_l(r_l) is least. Losses of different layers are not the same money; nats are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compressor.method import OptionError
from compressor.observe.measuring import KL, measured_of
from compressor.observe.statistic import Gathered
from compressor.selection.choose import AGAIN, Choice
from compressor.selection.constants import ERRORS
from compressor.selection.layer_plan import LayerPlan, allocated, measured_counts, planned_counts, total_kept
from compressor.selection.objective import Blend, blend_weights

Costs = dict[int, float]
"""Count → cost, of one layer."""


def shared(
    ways: Sequence[Sequence[LayerPlan]], statistics: Gathered, chosen: Callable[[LayerPlan, int], tuple[Choice, float]]
) -> tuple[dict[str, Any], list[tuple[LayerPlan, int]], dict[str, float]]:
    """(what is said of it, each layer's plan and count, layer path → what that costs in nats where it was measured).
    `ways`: the layers' plans, by each way in which sets may be chosen; `chosen`: what a layer of a plan with so many
    experts would be, and its loss. Raises OptionError where no counts add up.
    """
    plans = ways[0]
    options, total = plans[0].options, total_kept(plans, plans[0].options)
    assert options.budget is not None
    said: dict[str, Any] = {
        "asked_mean": options.budget.amount,
        "share": options.share or "measured",
        "mean": total / len(plans),
        "num_kept": total,
        "num_experts": sum(plan.layer.num_experts for plan in plans),
    }
    if options.share == "even":
        counts = planned_counts(plans, options)
        return said, [(plan, counts[plan.path]) for plan in plans], {}
    costs: dict[str, Costs] = {}
    best: dict[tuple[str, int], LayerPlan] = {}
    for of_layer in zip(*ways, strict=True):
        path, by_way = of_layer[0].path, list[Costs]()
        if options.share == "loss":
            by_way.append({count: chosen(of_layer[0], count)[1] ** 2 for count in of_layer[0].counts})
        elif of_layer[0].changes:
            sets = _sets_of(of_layer[0], statistics, len(plans))
            best_last = sorted(sets, key=lambda one: (len(one.kept), -one.cost))
            said.setdefault("measured", {})[path] = {len(one.kept): one.said for one in best_last}
            by_way = [_costs(plan, sets, chosen) for plan in of_layer]
        else:
            by_way.append({of_layer[0].layer.num_experts: 0.0})
        for plan, found in zip(of_layer, by_way, strict=False):
            for count, cost in found.items():
                if cost < costs.setdefault(path, {}).get(count, math.inf):
                    costs[path][count], best[path, count] = cost, plan
    try:
        num_kept = allocated(costs, total)
    except ValueError as error:
        raise OptionError(options.count_option, f"{error}, as far as they were measured.") from error
    cost_of = {path: costs[path][count] for path, count in num_kept.items()}
    kept = [(best[path, count], count) for path, count in num_kept.items()]
    if options.share == "loss":
        return {**said, "summed_squared_loss": math.fsum(cost_of.values())}, kept, {}
    even = round(total / len(plans))
    if options.replacement == "none" and all(even in of_layer for of_layer in costs.values()):
        said["even"] = {"count": even, "summed_kl": math.fsum(of_layer[even] for of_layer in costs.values())}
    return {**said, "summed_kl": math.fsum(cost_of.values())}, kept, cost_of


@dataclass(frozen=True)
class _Set:
    """One set of a layer's experts that was measured, and what it costs."""

    kept: tuple[int, ...]
    cost: float
    said: dict[str, Any]


def _sets_of(plan: LayerPlan, statistics: Gathered, num_layers: int) -> list[_Set]:
    """Those that the plan's own run would measure, if they were, or all: so what is observed for several totals decides
    each as its own run does. Raises OptionError where no set of the layer was measured.
    """
    found, figures, with_constants = list[_Set](), statistics.get(plan.path, {}), plan.options.with_constants
    for decided, kl_D, error_D in measured_of(figures, len(statistics.domains)) if KL in figures else ():
        if decided.get("constants", ERRORS in figures) != with_constants:
            continue
        numbers = zip(statistics.domains, kl_D.tolist(), error_D.tolist(), strict=True)
        there = [(name, kl, None if math.isnan(error) else error) for name, kl, error in numbers if not math.isnan(kl)]
        said = {"kl": {name: kl for name, kl, _ in there}, "standard_error": {name: error for name, _, error in there}}
        cost = blended(list(said["kl"].values()), list(said["kl"]), plan.options.blend)
        found.append(_Set(tuple(decided["kept"]), cost, said))
    if not found:
        where = "" if KL not in figures else f" where experts {'answer constants' if with_constants else 'are removed'}"
        raise OptionError(
            plan.options.count_option,
            f"{plan.path}: what its counts cost was not measured{where}; share the mean out by `loss` or `even`, or "
            f"{AGAIN}.",
        )
    counts = {*measured_counts(plan, num_layers)}
    own = [one for one in found if len(one.kept) in counts]
    return own if {len(one.kept) for one in own} == counts else found


def _costs(plan: LayerPlan, sets: Sequence[_Set], chosen: Callable[[LayerPlan, int], tuple[Choice, float]]) -> Costs:
    """What a layer's counts cost by one way of choosing sets; where its own was not measured, as much as the best."""
    known: Costs = {} if plan.options.top_k is not None else {plan.layer.num_experts: 0.0}
    by_kept = {one.kept: one.cost for one in sets}
    for count in {len(one.kept) for one in sets}:
        least = min(one.cost for one in sets if len(one.kept) == count)
        known[count] = by_kept.get(tuple(chosen(plan, count)[0]["kept"]), least)
    return costs_between(known, plan.counts)


def blended(kl: Sequence[float], domains: Sequence[str], blend: Blend) -> float:
    """One number of what is lost in each domain: its mean, by weights, or the worst; `pooled` counts as `mean`."""
    if blend == "worst":
        return max(kl)
    weights = blend_weights("mean" if blend == "pooled" else blend, domains).tolist()
    return math.fsum(weight * one for weight, one in zip(weights, kl, strict=True))


def costs_between(measured: Mapping[int, float], counts: Sequence[int]) -> Costs:
    """Costs of all counts from the least that was measured up, on straight lines between those that were."""
    known = sorted(measured)
    found: Costs = {}
    for count in (one for one in counts if known[0] <= one <= known[-1]):
        below, above = max(one for one in known if one <= count), min(one for one in known if one >= count)
        share = (count - below) / (above - below) if above > below else 0.0
        found[count] = (1 - share) * measured[below] + share * measured[above]
    return found
