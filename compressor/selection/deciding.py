"""One layer's figures and options → what is decided of it. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compressor.method import OptionError
from compressor.observe.statistic import Gathered
from compressor.selection import choose, constants
from compressor.selection.choose import Choice, Fixed
from compressor.selection.layer_plan import LayerPlan
from compressor.selection.objective import Objective
from compressor.selection.scores import ChoiceError, largest


def decided(plan: LayerPlan, statistics: Gathered, num_kept: int, criteria: Mapping[str, Any]) -> tuple[Choice, float]:
    """What is decided of a layer that keeps so many experts, and its loss. Raises OptionError where the figures cannot
    tell.
    """
    option = plan.options.count_option
    if not plan.changes or (num_kept == plan.layer.num_experts and plan.options.top_k is None):
        kept = list(range(plan.layer.num_experts))
        return {"kept": kept, "dropped": [], "loss": 0.0, "relative_loss": 0.0}, 0.0
    if plan.path not in statistics:
        raise OptionError(option, f"{plan.path}: nothing was gathered at this layer; observe again.")
    try:
        return _best(plan, statistics, num_kept, criteria)
    except ChoiceError as error:
        raise OptionError(option, f"{plan.path}: {error}.") from error


def fixed(plan: LayerPlan, largest_E: Tensor, num_kept: int) -> Fixed:
    """Experts of a layer that are not for the choosing; `largest_E` tells which are super experts."""
    return choose.fixed_experts(
        plan.free,
        largest_E,
        num_kept,
        protected=plan.protected,
        forbidden=plan.forbidden,
        protect_supers=plan.options.protect_super_experts,
    )


def _best(plan: LayerPlan, statistics: Gathered, num_kept: int, criteria: Mapping[str, Any]) -> tuple[Choice, float]:
    layer, options, figures = plan.layer, plan.options, statistics[plan.path]
    staying = fixed(plan, largest(figures), num_kept)
    notes, domains, blend = choose.notes(figures, staying), statistics.domains, options.blend
    if options.criterion is not None:
        criterion, seed = criteria[options.criterion], options.seed or 0
        found = choose.by_criterion(plan.free, figures, num_kept, domains, blend, criterion, staying, seed)
        if options.with_constants:
            found |= constants.lost_by(figures, found["dropped"], constants.objective_of(figures, domains, blend))[0]
        return found | notes, 0.0
    if options.with_constants:
        objective = constants.objective_of(figures, domains, blend)
        found, cost = constants.by_constants(layer, figures, num_kept, objective, staying, options.max_subsets)
    else:
        found, cost = _searched(plan, figures, num_kept, choose.objective_of(figures, domains, blend), staying)
    return found | notes, cost


def _searched(
    plan: LayerPlan, figures: Mapping[str, Tensor], num_kept: int, objective: Objective, staying: Fixed
) -> tuple[Choice, float]:
    layer, options = plan.layer, plan.options
    top_k = options.top_k or layer.top_k
    observed = [int(figures[name]) for name in ("subsets.top_k", "greedy.top_k") if name in figures]
    if any(one != top_k for one in observed):
        raise ChoiceError(f"the losses were gathered for {observed[0]} experts per token, not {top_k}; {choose.AGAIN}")
    if "subsets.counts" in figures and options.search != "greedy":
        return choose.by_subsets(layer, figures, num_kept, objective, staying)
    if "greedy.counts" in figures and options.search != "exact":
        return choose.by_greedy(layer, figures, num_kept, objective, staying)
    raise ChoiceError("no losses of sets of experts were gathered, only sums; decide or observe by a criterion")
