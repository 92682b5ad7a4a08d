"""Figures → a criterion's scores → the experts that stay. Pure functions.

Dimensions: D domains, E experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compressor.observe.reductions import joined_spread
from compressor.selection.activation_sums import SUMS
from compressor.selection.criteria import Criterion, ExpertFigures
from compressor.selection.objective import Blend, blend_weights

SUPER_FACTOR = 20.0


class ChoiceError(ValueError):
    """The figures cannot answer what is asked of them."""


def largest(figures: Mapping[str, Tensor], domains: Sequence[int] | None = None) -> Tensor:
    """[E]: the largest magnitude of a number in each expert's outputs, on some domains or all; 0 if there is none."""
    largest_DE = figures["sums.largest"] if domains is None else figures["sums.largest"][list(domains)]
    return functional.pad(largest_DE, (0, 0, 0, 1)).amax(0)


def expert_figures(
    figures: Mapping[str, Tensor],
    domains: Sequence[int],
    *,
    num_kept: int,
    num_groups: int = 1,
    seed: int = 0,
    protected: Sequence[int] = (),
    forbidden: Sequence[int] = (),
    own: str | None = None,
) -> ExpertFigures:
    """The figures of some domains added up, as a criterion takes them; `own` is how the names of its own begin."""
    of_domains = list(domains)
    tensors: dict[str, Any] = {name: figures[f"sums.{name}"][of_domains].sum(0) for name in SUMS} | {
        "output": figures["sums.output"][of_domains].double().sum(0) if "sums.output" in figures else None,
        "spread": joined_spread(*(figures[f"sums.{name}"][of_domains] for name in ("spread", "tokens", "output")))
        if "sums.spread" in figures
        else None,
        "pairs": figures["pairs.loss"][of_domains].sum(0) if "pairs.loss" in figures else None,
        "weight_l1": figures.get("weights.l1"),
        "weight_squared": figures.get("weights.squared"),
        "num_weights": figures.get("weights.count"),
    }
    if own is not None:
        of_its_own = {name: figure for name, figure in figures.items() if name.startswith(own)}
        tensors["own"] = {name.removeprefix(own): figure[of_domains].sum(0) for name, figure in of_its_own.items()}
    return ExpertFigures(
        num_kept=num_kept,
        num_groups=num_groups,
        seed=seed,
        protected=tuple(protected),
        forbidden=tuple(forbidden),
        largest=largest(figures, of_domains),
        **tensors,
    )


def _blended(figure_DX: Tensor, figures: Mapping[str, Tensor], domains: Sequence[str], blend: Blend) -> Tensor:
    """[D, …]: each domain's own as fractions of its squared output, times its weight: added up, they are blended."""
    squared_D = torch.zeros(len(domains), dtype=torch.float64)
    squared_D.index_add_(0, figures["batch.domain"], figures["batch.squared_output"].double())
    weights_D = blend_weights(blend, domains) / squared_D.clamp_min(1e-300)
    return torch.einsum("d,d...->d...", weights_D, figure_DX)


def blended_scores(
    criterion: Criterion, figures: Mapping[str, Tensor], domains: Sequence[str], blend: Blend, **asked: Any
) -> Tensor:
    """[E] float64: one score an expert, NaN without figures. One domain, or `pooled`: the criterion's of the figures
    added up; else each domain's scores as shares of their sum, averaged by `mean` or weights, or by `worst` the
    largest. `asked`: what else `expert_figures` takes.
    """
    own = criterion.own_figures if criterion.statistic is not None else None

    def scored(of_domains: Sequence[int], given: Mapping[str, Tensor] = figures) -> Tensor:
        return criterion.score(expert_figures(given, of_domains, own=own, **asked)).double()

    everything = range(len(domains))
    if len(domains) <= 1 or blend == "pooled":
        return scored(everything)
    if criterion.of_sets:
        if blend == "worst":
            raise ChoiceError(
                f"the criterion {criterion.name} judges sets, not experts; give `blend: mean`, weights or `pooled`"
            )
        summed = ("pairs.loss", criterion.own_figures)
        of_sets = {name: figure for name, figure in figures.items() if name.startswith(summed)}
        blended = {name: _blended(figure, figures, domains, blend) for name, figure in of_sets.items()}
        return scored(everything, {**figures, **blended})
    shares_DE = torch.stack([_shares(scored([domain])) for domain in range(len(domains))])
    absent_E = shares_DE.isnan().all(0)
    known_DE = shares_DE.nan_to_num(0.0)
    blended_E = known_DE.amax(0) if blend == "worst" else blend_weights(blend, domains) @ known_DE
    return blended_E.masked_fill(absent_E, torch.nan)


def _shares(score_E: Tensor) -> Tensor:
    """Scores over their sum; absent ones stay absent, and scores that are all 0 stay 0."""
    total = score_E.nan_to_num(0.0).clamp_min(0.0).sum()
    return score_E / total if total > 0 else score_E


def kept_by_score(
    score_E: Tensor, num_kept: int, *, num_groups: int = 1, protected: Sequence[int] = (), forbidden: Sequence[int] = ()
) -> tuple[list[int], list[int]]:
    """(kept, dropped), ascending: the largest scores stay, equally many in each group; those without a score go first,
    then lower ids. Protected stay and forbidden go.
    """
    rank_E = score_E.double().nan_to_num(nan=float("-inf"))
    size, per_group = len(rank_E) // num_groups, num_kept // num_groups
    stay, go = set(protected), set(forbidden)

    def place(expert: int) -> tuple[bool, bool, float, int]:
        return (expert not in stay, expert in go, -float(rank_E[expert]), -expert)

    kept: list[int] = []
    for group in range(num_groups):
        members = sorted(range(group * size, (group + 1) * size), key=place)
        kept += members[:per_group]
    return sorted(kept), sorted(set(range(len(rank_E))) - set(kept))


def super_experts(largest_E: Tensor, factor: float = SUPER_FACTOR) -> list[int]:
    """Experts whose largest output is more than `factor` times that of the layer's median expert.

    Models collapse when a *super expert* goes: three of 6,144 carry Qwen3-30B-A3B (Su et al. 2025, "Unveiling Super
    Experts in Mixture-of-Experts Large Language Models"). They are known by outputs of extreme magnitude. The paper
    compares with percentiles over all layers; here a layer is judged by itself, because it is decided before the next
    one is seen, and the factor is our choice. Experts that no token reached do not count.
    """
    reached = largest_E[largest_E > 0]
    if not len(reached):
        return []
    return [int(expert) for expert in (largest_E > factor * reached.median()).nonzero()[:, 0]]


def unreached(tokens_E: Tensor) -> list[int]:
    """Experts that no token chose: their figures are absent, not zero."""
    return [int(expert) for expert in (tokens_E == 0).nonzero()[:, 0]]
