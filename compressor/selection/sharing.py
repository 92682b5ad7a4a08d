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
from typing import Any

from compressor.method import OptionError
from compressor.observe.measuring import KL, measured_of
from compressor.observe.statistic import Gathered
from compressor.selection.choose import AGAIN, Choice
from compressor.selection.layer_plan import LayerPlan, allocated, planned_counts, total_kept
from compressor.selection.objective import Blend, blend_weights
from compressor.selection.options import SelectionOptions
from compressor.selection.scores import ChoiceError

Costs = dict[int, float]
"""Count → cost, of one layer."""


def shared(
    plans: Sequence[LayerPlan],
    options: SelectionOptions,
    statistics: Gathered,
    chosen: Callable[[LayerPlan, int], tuple[Choice, float]],
) -> tuple[dict[str, Any], dict[str, int], dict[str, float]]:
    """(what is said of it, layer path → count, layer path → what that costs in nats where it was measured). `chosen`:
    what a layer with so many experts would be, and its loss. Raises OptionError where no counts add up.
    """
    budget, total = options.budget, total_kept(plans, options)
    assert budget is not None
    said: dict[str, Any] = {
        "asked_mean": budget.amount,
        "share": options.share or "measured",
        "mean": total / len(plans),
        "num_kept": total,
        "num_experts": sum(plan.layer.num_experts for plan in plans),
    }
    if options.share == "even":
        return said, planned_counts(plans, options), {}
    costs: dict[str, Costs] = {}
    for plan in plans:
        if options.share == "loss":
            costs[plan.path] = {count: chosen(plan, count)[1] ** 2 for count in plan.counts}
            continue
        table = _table_of(plan, statistics) if plan.changes else {}
        said.setdefault("measured", {})[plan.path] = table
        nats = {count: blended(list(of["kl"].values()), list(of["kl"]), options.blend) for count, of in table.items()}
        whole = {} if options.top_k is not None else {plan.layer.num_experts: 0.0}
        costs[plan.path] = costs_between(nats | whole, plan.counts)
    try:
        num_kept = allocated(costs, total)
    except ValueError as error:
        raise OptionError(options.count_option, f"{error}, as far as they were measured.") from error
    cost = {path: costs[path][count] for path, count in num_kept.items()}
    summed = math.fsum(cost.values())
    if options.share == "loss":
        return {**said, "summed_squared_loss": summed}, num_kept, {}
    return {**said, "summed_kl": summed}, num_kept, cost


def _table_of(plan: LayerPlan, statistics: Gathered) -> dict[int, dict[str, Any]]:
    try:
        return measured_table(statistics, plan.path)
    except ChoiceError as error:
        raise OptionError(plan.options.count_option, f"{plan.path}: {error}.") from error


def blended(kl: Sequence[float], domains: Sequence[str], blend: Blend) -> float:
    """One number of what is lost in each domain: its mean, by weights, or the worst; `pooled` counts as `mean`."""
    if blend == "worst":
        return max(kl)
    weights = blend_weights("mean" if blend == "pooled" else blend, domains).tolist()
    return math.fsum(weight * one for weight, one in zip(weights, kl, strict=True))


def measured_table(statistics: Gathered, path: str) -> dict[int, dict[str, Any]]:
    """Count → nats by domain, of which some text was measured, and standard errors (None for one sequence). Raises
    ChoiceError where no count of the layer was measured.
    """
    if KL not in statistics.get(path, {}):
        raise ChoiceError(f"what its counts cost was not measured; share the mean out by `loss` or `even`, or {AGAIN}")
    names = statistics.domains
    return {
        len(decided["kept"]): {
            "kl": {name: kl for name, kl in zip(names, kl_D.tolist(), strict=True) if not math.isnan(kl)},
            "standard_error": {
                name: None if math.isnan(error) else error
                for name, kl, error in zip(names, kl_D.tolist(), error_D.tolist(), strict=True)
                if not math.isnan(kl)
            },
        }
        for decided, kl_D, error_D in measured_of(statistics[path], len(names))
    }


def costs_between(measured: Mapping[int, float], counts: Sequence[int]) -> Costs:
    """Costs of all counts from the least that was measured up, on straight lines between those that were."""
    known = sorted(measured)
    found: Costs = {}
    for count in (one for one in counts if known[0] <= one <= known[-1]):
        below, above = max(one for one in known if one <= count), min(one for one in known if one >= count)
        share = (count - below) / (above - below) if above > below else 0.0
        found[count] = (1 - share) * measured[below] + share * measured[above]
    return found
