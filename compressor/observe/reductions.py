"""How figures of several runs, domains or processes become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

Statistics = Mapping[str, Mapping[str, Tensor]]
"""Layer path → name → figures."""
Rule = Literal["summed", "spread", "largest", "total", "batches", "columns", "same"]
"""How figures of several runs, or of several processes of one run, become one:

    summed      [D, …]  added, domain by domain
    spread      [D, E]  as `joined_spread` says, domain by domain
    largest     [D, …]  the largest of them, domain by domain
    total       […]     added, where domains are not kept apart
    batches     [B, …]  one batch after another
    columns     […, B]  the same, with the batches in the last dimension
    same                alike in all of them, or else they do not belong together
"""
RULES: Mapping[str, Rule] = {
    "sums.": "summed",
    "sums.largest": "largest",
    "sums.spread": "spread",
    "pairs.loss": "summed",
    "batch.": "batches",
    "subsets.squared_error": "batches",
    "subsets.": "same",
    "inputs.": "total",
    "images.": "total",
    "weights.": "same",
    "same.": "same",
}
"""Name of a figure, or how it begins → its rule. A statistic whose figures are named so can be joined as it is."""


def joined_figures(
    parts: Sequence[Mapping[str, Tensor]],
    places: Sequence[Sequence[int]],
    num_domains: int,
    *,
    rules: Mapping[str, Rule] = RULES,
    order_B: Tensor | None = None,
) -> tuple[dict[str, Tensor], list[str]]:
    """One layer's figures from several parts of the text: (figures, names of those that cannot be joined).

    `places` says where each part's domains stand in the result; `order_B` puts all batches, which come one part after
    another, into another order.
    """
    found: dict[str, Tensor] = {}
    lost: list[str] = []
    sets = [
        torch.cat([figures.get(name, torch.empty(0)).reshape(-1) for name in ("subsets.counts", "subsets.top_k")])
        for figures in parts
    ]
    has_same_sets = _alike_in_all(sets)
    for name in sorted({name for figures in parts for name in figures}):
        rule = _rule_of(name, rules)
        given = [figures[name] for figures in parts if name in figures]
        if len(given) < len(parts) or rule is None or (name.startswith("subsets.") and not has_same_sets):
            lost.append(name)  # also the path of a search, or losses of other sets
        elif rule in ("summed", "largest"):
            found[name] = _over_domains(given, places, num_domains, rule)
        elif rule == "spread":
            found[name] = _spread_over_domains(parts, places, num_domains)
        elif rule == "total":
            found[name] = torch.stack(given).sum(0)
        elif rule == "same":
            if _alike_in_all(given):
                found[name] = given[0]
            else:
                lost.append(name)
        else:
            if name == "batch.domain":
                given = [torch.tensor(at)[domain_B] for domain_B, at in zip(given, places, strict=True)]
            dim = 0 if rule == "batches" else -1
            whole = torch.cat(given, dim)
            found[name] = whole if order_B is None else whole.index_select(dim, order_B)
    return found, lost


def _rule_of(name: str, rules: Mapping[str, Rule]) -> Rule | None:
    """That of the name itself, or else of the longest beginning, `sums.skip.` before `sums.`."""
    beginnings = [one for one in rules if one == name or (one.endswith(".") and name.startswith(one))]
    return rules[max(beginnings, key=len)] if beginnings else None


def _over_domains(given: Sequence[Tensor], places: Sequence[Sequence[int]], num_domains: int, rule: Rule) -> Tensor:
    whole = given[0].new_zeros(num_domains, *given[0].shape[1:])
    for figures, at in zip(given, places, strict=True):
        present = whole[list(at)]
        whole[list(at)] = present + figures if rule == "summed" else torch.maximum(present, figures)
    return whole


def _spread_over_domains(
    parts: Sequence[Mapping[str, Tensor]], places: Sequence[Sequence[int]], num_domains: int
) -> Tensor:
    spread_DE = parts[0]["sums.spread"]
    whole_DE = spread_DE.new_zeros(num_domains, spread_DE.shape[1])
    for domain in range(num_domains):
        rows = [(of, at.index(domain)) for of, at in zip(parts, map(list, places), strict=True) if domain in at]
        names = ("sums.spread", "sums.tokens", "sums.output")
        whole_DE[domain] = joined_spread(*(torch.stack([of[name][row] for of, row in rows]) for name in names))
    return whole_DE


def joined_spread(spread_GE: Tensor, tokens_GE: Tensor, output_GEH: Tensor) -> Tensor:
    """[E] float64: Σ ‖f − mean f‖² over the tokens of all G groups, from each group's own, its number of tokens and
    its Σ f.

    What lies within the groups, and Σ_g n_g ‖mean_g − mean‖² between them: nothing large is taken from something large,
    as in Σ‖f‖² − ‖Σf‖²/n, which leaves rounding where the spread is small. Sums of float32 numbers are exact in float64
    as long as these are alike, so an expert with one token, or with the same answer to all, has a spread of exactly 0
    on every machine, however the text was shared out.
    """
    mean_GEH = output_GEH / tokens_GE.clamp_min(1)[..., None]
    mean_EH = output_GEH.sum(0) / tokens_GE.sum(0).clamp_min(1)[..., None]
    between_GE = tokens_GE * (mean_GEH - mean_EH).square().sum(-1)
    return (spread_GE + between_GE).sum(0)


def _alike_in_all(given: Sequence[Tensor]) -> bool:
    return all(one.shape == given[0].shape and torch.allclose(one.double(), given[0].double()) for one in given[1:])
