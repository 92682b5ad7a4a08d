"""One layer's figures → the experts that stay, and what that loses. Pure functions.

Dimensions: B batches, S sets of kept experts, E experts, D domains.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.model.structure import MoELayer
from compressor.selection.criteria import Criterion
from compressor.selection.exact import dropped_subsets, num_subsets
from compressor.selection.objective import Blend, Objective
from compressor.selection.scores import ChoiceError, blended_scores, kept_by_score, largest, super_experts, unreached

AGAIN = "decide by a criterion, or observe again"
Choice = dict[str, Any]
"""What a decision says of one layer: kept and dropped ids, losses, and how they were found."""


@dataclass(frozen=True)
class Fixed:
    """Experts that are not for the choosing. `supers` are protected because their outputs are extreme."""

    protected: tuple[int, ...] = ()
    forbidden: tuple[int, ...] = ()
    supers: tuple[int, ...] = ()

    @property
    def staying(self) -> list[int]:
        return sorted({*self.protected, *self.supers})


def fixed_experts(
    layer: MoELayer,
    largest_E: Tensor,
    num_kept: int,
    *,
    protected: Sequence[int],
    forbidden: Sequence[int],
    protect_supers: bool,
) -> Fixed:
    """The lists given, and the super experts found, largest first as far as there is room in their group."""
    found = [e for e in super_experts(largest_E) if e not in forbidden] if protect_supers else []
    size, room = layer.num_experts // layer.num_groups, num_kept // layer.num_groups
    kept = set(protected)
    for expert in sorted(found, key=lambda e: (-float(largest_E[e]), e)):
        if sum(other // size == expert // size for other in kept) < room:
            kept.add(expert)
    return Fixed(tuple(sorted(protected)), tuple(sorted(forbidden)), tuple(sorted(kept & set(found))))


def objective_of(figures: Mapping[str, Tensor], domains: Sequence[str], blend: Blend) -> Objective:
    """What is minimised, from the batches' domains and the size of the layer's output on them."""
    batch_domains = [domains[index] for index in figures["batch.domain"].tolist()]
    return Objective.of_batches(batch_domains, figures["batch.squared_output"], blend)


def losses(objective: Objective, squared_B: Tensor) -> Choice:
    """The loss, also relative; with several domains each one's, and what was minimised."""
    loss_D = objective.losses(squared_B)
    loss, norm = float(loss_D.sum()), float(objective.norm_D.sum())
    found: Choice = {"loss": loss, "relative_loss": loss / norm if norm else 0.0}
    if len(objective.domains) > 1:
        found["domains"] = dict(zip(objective.domains, objective.relative(loss_D).tolist(), strict=True))
    if objective.is_relative:
        found["objective"] = float(objective.of_losses(loss_D))
    return found


def cost(objective: Objective, squared_B: Tensor) -> float:
    """The number that is minimised, in the output's units, so that layers can be compared."""
    value = float(objective(squared_B))
    return value * float(objective.norm_D.mean()) if objective.is_relative else value


def kept_and_dropped(layer: MoELayer, dropped: Sequence[int]) -> Choice:
    gone = set(dropped)
    return {"kept": [e for e in range(layer.num_experts) if e not in gone], "dropped": sorted(gone)}


def by_subsets(
    layer: MoELayer, figures: Mapping[str, Tensor], num_kept: int, objective: Objective, fixed: Fixed
) -> tuple[Choice, float]:
    """(the best of all sets, its cost). Ties go to the first set in lexicographic order of dropped ids."""
    counts = figures["subsets.counts"].tolist()
    if num_kept not in counts:
        raise ChoiceError(
            f"the losses of all sets were gathered for keeping {_listed(counts)} experts, not {num_kept}; {AGAIN}"
        )
    sizes = [num_subsets(layer, count) for count in counts]
    squared_BS = torch.split(figures["subsets.squared_error"], sizes, dim=1)[counts.index(num_kept)]
    dropped = dropped_subsets(layer, num_kept)
    value_S = objective(squared_BS.T)
    gone, stay = set(fixed.forbidden), set(fixed.staying)
    allowed_S = torch.tensor([gone <= set(one) and not stay & set(one) for one in dropped])
    best = int((value_S == value_S[allowed_S].min()).logical_and(allowed_S).nonzero()[0])
    total_S = objective.losses(squared_BS.T).sum(-1)
    found = kept_and_dropped(layer, dropped[best]) | losses(objective, squared_BS[:, best])
    found |= {"search": "exact", "sets": len(dropped), "median_loss": float(total_S.quantile(0.5))}
    return found, cost(objective, squared_BS[:, best])


def by_greedy(
    layer: MoELayer, figures: Mapping[str, Tensor], num_kept: int, objective: Objective, fixed: Fixed
) -> tuple[Choice, float]:
    """(what the search found for a count that was asked for, or else stood at on its path, its cost)."""
    counts, order = figures["greedy.counts"].tolist(), figures["greedy.order"].tolist()
    num_dropped = layer.num_experts - num_kept
    if num_kept in counts:
        index = counts.index(num_kept)
        dropped = (~figures["greedy.kept"][index].bool()).nonzero()[:, 0].tolist()
        squared_B = figures["greedy.squared_error"][index]
        swaps, coverage = int(figures["greedy.num_swaps"][index]), float(figures["greedy.coverage"][index])
        found = kept_and_dropped(layer, dropped) | losses(objective, squared_B)
        found |= {"search": "greedy", "swaps": swaps, "uncovered": coverage}
        before = float(objective.losses(figures["greedy.before_swaps"][index]).sum())
        found["loss_before_swaps"] = before
    elif 0 < num_dropped <= len(order):
        squared_B = figures["greedy.path_squared_error"][num_dropped - 1]
        found = kept_and_dropped(layer, order[:num_dropped]) | losses(objective, squared_B) | {"search": "path"}
    else:
        raise ChoiceError(
            f"the search went down to {layer.num_experts - len(order)} experts, not to {num_kept}; {AGAIN}"
        )
    wrong = [e for e in fixed.staying if e in found["dropped"]] + [e for e in fixed.forbidden if e in found["kept"]]
    if wrong:
        raise ChoiceError(
            f"the search was made without the present `protect` and `forbid` (expert {wrong[0]}); {AGAIN}"
        )
    return found, cost(objective, squared_B)


def by_criterion(
    layer: MoELayer,
    figures: Mapping[str, Tensor],
    num_kept: int,
    domains: Sequence[str],
    blend: Blend,
    criterion: Criterion,
    fixed: Fixed,
    seed: int,
) -> tuple[Choice, Tensor]:
    """(the experts with the largest scores; those without figures go first, the scores [E])"""
    if criterion.needs_text and not domains:
        raise ChoiceError(
            f"the criterion {criterion.name} goes by text, and none was read for these figures; observe again with it"
        )
    for need in sorted(criterion.needs):
        missing = [name for name in _NEEDED[need] if name not in figures]
        if missing:
            is_old = len(missing) < len(_NEEDED[need])
            were = f"an older version gathered without `{missing[0]}`" if is_old else "were not gathered"
            raise ChoiceError(
                f"the criterion {criterion.name} needs `{need}`, which {were}; observe again with `gather: [{need}]`"
            )
    if criterion.statistic is not None and not any(name.startswith(criterion.own_figures) for name in figures):
        raise ChoiceError(
            f"the criterion {criterion.name} needs its own figures, `{criterion.own_figures}…`; observe again with it"
        )
    asked: dict[str, Any] = {"num_groups": layer.num_groups, "protected": fixed.staying, "forbidden": fixed.forbidden}
    own_seed = hashlib.sha256(f"{seed} {layer.path}".encode()).digest()  # lest chance drop the same ids everywhere
    of_layer = {"num_kept": num_kept, "seed": int.from_bytes(own_seed[:6])}
    score_E = blended_scores(criterion, figures, domains, blend, **of_layer, **asked)
    if score_E.shape != (layer.num_experts,):
        raise ChoiceError(
            f"the criterion {criterion.name} answers scores {list(score_E.shape)}, expected [{layer.num_experts}]"
        )
    _, dropped = kept_by_score(score_E, num_kept, **asked)
    found = kept_and_dropped(layer, dropped) | {"search": criterion.name}
    known = torch.where(score_E.isfinite(), score_E, 0.0)
    if float(known.min()) >= 0.0 and float(known.sum()) > 0.0:
        found["score_kept"] = float(known[found["kept"]].sum() / known.sum())
    return found, score_E


_NEEDED = {"pairs": ("pairs.loss",), "outputs": ("sums.output", "sums.spread"), "weights": ("weights.l1",)}


def notes(figures: Mapping[str, Tensor], fixed: Fixed) -> Choice:
    """Experts that no calibration token reached, and super experts, protected or not, where there are any."""
    without = unreached(figures["sums.tokens"].sum(0)) if len(figures["sums.tokens"]) else []
    found: Choice = {"unreached": without} if without else {}
    if supers := super_experts(largest(figures)):
        found["super_experts"] = supers
        found["protected_super_experts"] = list(fixed.supers)
    return found


def _listed(counts: Sequence[int]) -> str:
    return f"{counts[0]}" if len(counts) == 1 else f"{', '.join(map(str, counts[:-1]))} or {counts[-1]}"
