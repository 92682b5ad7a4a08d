"""One layer's figures and options → what is decided of it. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compressor.method import OptionError
from compressor.observe.statistic import Gathered
from compressor.report.description import SEARCH_LOSS
from compressor.selection import choose, constants
from compressor.selection.choose import Choice, Fixed
from compressor.selection.layer_plan import LayerPlan
from compressor.selection.objective import Objective
from compressor.selection.scores import ChoiceError, largest


def decided(plan: LayerPlan, statistics: Gathered, num_kept: int, criteria: Mapping[str, Any]) -> tuple[Choice, float]:
    """What is decided of a layer that keeps so many experts, and its loss. Raises OptionError if unknown."""
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
        found, _ = choose.by_criterion(plan.free, figures, num_kept, domains, blend, criterion, staying, seed)
        if options.with_constants:
            found |= constants.lost_by(figures, found["dropped"], constants.objective_of(figures, domains, blend))[0]
        return found | notes, 0.0
    if options.with_constants:
        objective = constants.objective_of(figures, domains, blend)
        found, cost = constants.by_constants(layer, figures, num_kept, objective, staying, options.max_subsets)
    else:
        found, cost = _searched(plan, figures, num_kept, choose.objective_of(figures, domains, blend), staying)
    return found | notes, cost


def by_expert(
    plan: LayerPlan, statistics: Gathered, decided: Mapping[str, Any], criteria: Mapping[str, Any]
) -> dict[str, list[float | None]]:
    """Of each expert of a layer: its share of the tokens' choices, also of each domain's, and of rows with images those
    of text and of images; its share of Σ g‖f‖, what all add to the output, in size; and the score that it was chosen
    by, or the relative loss when the search let it go.
    """
    figures, domains, options, layer = statistics[plan.path], statistics.domains, plan.options, plan.layer
    found = dict[str, Tensor]()
    if len(figures["sums.tokens"]):
        tokens_DE = figures["sums.tokens"][:, : layer.num_experts]
        found = {"use %": _percent(tokens_DE.sum(0))}
        if len(domains) > 1:
            found |= {f"use on {name} %": _percent(of) for name, of in zip(domains, tokens_DE, strict=False)}
        if "images.tokens" in figures:
            images_E = figures["images.tokens"]
            found |= {"use, images %": _percent(images_E), "use, text %": _percent(tokens_DE.sum(0) - images_E)}
        found["output %"] = _percent(figures["sums.weighted_norm"].sum(0)[: layer.num_experts])
    search, num_kept = decided.get("search", ""), len(decided["kept"])
    if search in criteria:
        how = (options.blend, criteria[search], fixed(plan, largest(figures), num_kept), options.seed or 0)
        _, found[f"score by {search}"] = choose.by_criterion(plan.free, figures, num_kept, domains, *how)
    elif search in ("greedy", "path") and "greedy.order" in figures:
        objective = choose.objective_of(figures, domains, options.blend)
        lost_E = torch.full((layer.num_experts,), torch.nan, dtype=torch.float64)
        loss_S = objective.losses(figures["greedy.path_squared_error"]).sum(-1)
        lost_E[figures["greedy.order"]] = loss_S / objective.norm_D.sum().clamp_min(1e-300)
        found[SEARCH_LOSS] = lost_E
    return {
        name: [float(f"{value:.4g}") if math.isfinite(value) else None for value in of_E.tolist()]
        for name, of_E in found.items()
    }


def _percent(numbers_E: Tensor) -> Tensor:
    return 100 * numbers_E.double() / numbers_E.double().sum().clamp_min(1e-300)


def _searched(
    plan: LayerPlan, figures: Mapping[str, Tensor], num_kept: int, objective: Objective, staying: Fixed
) -> tuple[Choice, float]:
    layer, options = plan.layer, plan.options
    top_k = options.top_k or layer.top_k
    observed = [int(figures[name]) for name in ("subsets.top_k", "greedy.top_k") if name in figures]
    if any(one != top_k for one in observed):
        raise ChoiceError(f"the losses were gathered for {observed[0]} experts per token, not {top_k}; {choose.AGAIN}")
    sets_of = figures["subsets.counts"].tolist() if "subsets.counts" in figures else ()
    if options.search != "greedy" and (num_kept in sets_of or (sets_of and "greedy.counts" not in figures)):
        return choose.by_subsets(layer, figures, num_kept, objective, staying)
    if "greedy.counts" in figures and options.search != "exact":
        return choose.by_greedy(layer, figures, num_kept, objective, staying)
    raise ChoiceError("no losses of sets of experts were gathered, only sums; decide or observe by a criterion")
