"""Which of a token's experts are skipped, and what the others then weigh: formulas, and the JSON that other engines
read (docs/skipping.md).

With w the weights of the K experts that a token's router chose, S = Σ w, and β the layer's threshold:

    ratio          skip expert m where  w_m / max w < β                                    (arXiv 2402.14800, eq. 6)
    tail_mass      keep the smallest i with  Σ_{m > i} w_m ≤ β S,  w descending            (the same, for K > 2)
    contribution   skip expert m where  w_m n_m / max(w n) < β,  n_m the mean norm of the expert's output
    top_k          keep the k largest, whatever they weigh

The expert of the largest weight is never skipped (of several as large, the one that scores most), nor is what can be
chosen and is no expert (identity experts). What stays is divided so that it adds up to

    S                        where the router renormalises its weights: the token's own sum, not 1
    S · Σ_kept w / Σ_c w     for top_k with `normalise_over` c: as if the router had divided by the mass of its best c
    Σ_kept w                 where the router does not renormalise: the weights are as they were

Dimensions: T tokens, K experts chosen per token, E experts of the layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

RuleName = Literal["ratio", "tail_mass", "contribution", "top_k"]
VERSION = 1
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class SkipRule:
    """How one layer skips experts. Checked when made: raises ValueError.

    `beta` is the threshold of the first three rules, 0 < β ≤ 1. `renormalise` says whether what stays is scaled up to
    the token's own sum: True where the architecture's router renormalises. `expert_norms` are n, one an expert, for
    `contribution`. `top_k` experts stay by the rule `top_k`; `normalise_over` experts then share the mass that their
    weights are a part of, None for those that the router chooses.
    """

    rule: RuleName
    renormalise: bool
    beta: float | None = None
    expert_norms: tuple[float, ...] | None = field(default=None, repr=False)
    top_k: int | None = None
    normalise_over: int | None = None

    def __post_init__(self) -> None:
        """Refuse what is no rule."""
        if self.rule not in get_args(RuleName):
            raise ValueError(f"unknown rule {self.rule!r}; known are {', '.join(get_args(RuleName))}")
        if type(self.renormalise) is not bool:
            raise ValueError(f"`renormalise` should be true or false, found {self.renormalise!r}")
        wanted = {
            "ratio": {"beta"},
            "tail_mass": {"beta"},
            "contribution": {"beta", "expert_norms"},
            "top_k": {"top_k"},
        }[self.rule]
        given = {name for name in ("beta", "expert_norms", "top_k") if getattr(self, name) is not None}
        if given != wanted:
            raise ValueError(f"the rule {self.rule} needs {_and(wanted)}, found {_and(given)}")
        if self.beta is not None and not (_is_number(self.beta) and 0 < self.beta <= 1):
            raise ValueError(f"`beta` should be a number above 0, up to 1, found {self.beta!r}")
        if self.expert_norms is not None and not all(_is_number(norm) and norm >= 0 for norm in self.expert_norms):
            raise ValueError("`expert_norms` should be finite numbers from 0 up, in float32")
        for name in ("top_k", "normalise_over"):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and value >= 1):
                raise ValueError(f"`{name}` should be a whole number from 1 up, found {value!r}")
        if self.normalise_over is not None and not self.renormalise:
            raise ValueError("`normalise_over` means nothing where the router does not renormalise (`renormalise`)")
        if self.normalise_over is not None and (self.top_k is None or self.normalise_over < self.top_k):
            raise ValueError(
                f"`normalise_over` should be at least `top_k`, found {self.normalise_over} and {self.top_k}"
            )

    def to_json(self) -> dict[str, Any]:
        """The rule as a checkpoint's config has it: without what it does not need."""
        given = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return given | ({"expert_norms": list(self.expert_norms)} if self.expert_norms is not None else {})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SkipRule:
        """The inverse of `to_json`. Raises ValueError; keys that it does not know are an error too."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown or not {"rule", "renormalise"} <= set(data):
            raise ValueError(
                f"a rule has the keys {', '.join(sorted(known))}, found {', '.join(sorted(data)) or 'none'}"
            )
        norms = data.get("expert_norms")
        if norms is not None and not isinstance(norms, Sequence):
            raise ValueError(f"`expert_norms` should be a list, found {norms!r}")
        return cls(**{**data, **({"expert_norms": tuple(norms)} if norms is not None else {})})

    @classmethod
    def of(cls, decided: Mapping[str, Any]) -> SkipRule:
        """The rule in a layer's entry of a decision, which has figures beside it. Raises ValueError."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls.from_json({name: value for name, value in decided.items() if name in known})

    def at(self, beta: float) -> SkipRule:
        """The same rule with another threshold. Raises ValueError for `top_k`, which has none."""
        return dataclasses.replace(self, beta=beta)

    def of_experts(self, kept: Sequence[int]) -> SkipRule:
        """The rule for the same layer with only some of its experts left."""
        norms = self.expert_norms
        return self if norms is None else dataclasses.replace(self, expert_norms=tuple(norms[e] for e in kept))

    def problem(self, num_experts: int, top_k: int) -> str | None:
        """Why a layer with so many experts, of which a token chooses so many, cannot skip like this; None if it can."""
        if top_k < 2:
            return "each token chooses one expert, so there is nothing to skip"
        if self.expert_norms is not None and len(self.expert_norms) != num_experts:
            return f"the rule knows {len(self.expert_norms)} experts, the layer has {num_experts}"
        if self.top_k is not None and self.top_k >= top_k:
            return f"each token chooses {top_k} experts, so keeping the largest {self.top_k} skips nothing"
        if self.normalise_over is not None and self.normalise_over > num_experts:
            return f"it has {num_experts} experts, so there are no {self.normalise_over} to normalise over"
        return None

    # formulas

    def scores(self, index_TK: Tensor, weights_TK: Tensor, norms_E: Tensor | None = None) -> Tensor:
        """[T, K] float32: what β is compared with; 1 where nothing can be larger. `norms_E` are `expert_norms`."""
        weights_TK = weights_TK.float()
        if self.rule == "tail_mass":
            descending_TK, order_TK = weights_TK.sort(dim=-1, descending=True, stable=True)
            tails_TK = descending_TK.flip(-1).cumsum(-1).flip(-1)  # Σ_{m ≥ i}
            return torch.zeros_like(tails_TK).scatter(-1, order_TK, tails_TK / tails_TK[..., :1])
        if self.rule == "contribution":
            assert norms_E is not None
            # what is no expert has no norm: its place is taken by the last one's, and it is never skipped
            weights_TK = weights_TK * norms_E[index_TK.clamp(max=len(norms_E) - 1)]
        return weights_TK / weights_TK.amax(-1, keepdim=True)

    def kept(
        self, index_TK: Tensor, weights_TK: Tensor, num_experts: int | None = None, norms_E: Tensor | None = None
    ) -> Tensor:
        """[T, K] bool: which chosen experts are evaluated; NaN weights skip nothing, but by `top_k`. Ids from
        `num_experts` (None: no such) up are no experts, and stay.
        """
        if self.rule == "top_k":
            assert self.top_k is not None
            largest_TC = weights_TK.topk(min(self.top_k, weights_TK.shape[-1]), dim=-1).indices
            kept_TK = torch.zeros_like(weights_TK, dtype=torch.bool).scatter(-1, largest_TC, True)
        else:
            assert self.beta is not None
            scores_TK = self.scores(index_TK, weights_TK, norms_E)
            kept_TK = ~(scores_TK <= self.beta if self.rule == "tail_mass" else scores_TK < self.beta)
            if self.rule != "ratio":  # by the ratio the largest weight scores 1, and stays
                kept_TK = kept_TK | self.never_skipped(weights_TK, scores_TK)
        return kept_TK if num_experts is None else kept_TK | (index_TK >= num_experts)

    @staticmethod
    def never_skipped(weights_TK: Tensor, scores_TK: Tensor) -> Tensor:
        """[T, K] bool: the largest weight; of several as large, the one that scores most (all that do)."""
        largest_TK = weights_TK == weights_TK.amax(-1, keepdim=True)
        scores_TK = scores_TK.masked_fill(~largest_TK, -1.0)
        return largest_TK & (scores_TK == scores_TK.amax(-1, keepdim=True))

    def reweighted(self, weights_TK: Tensor, kept_TK: Tensor) -> Tensor:
        """[T, K]: weights, those of skipped experts 0; a token that skips nothing has its own, to the bit."""
        weights = weights_TK.float()
        left_TK = weights.masked_fill(~kept_TK, 0.0)
        if self.normalise_over is not None and self.normalise_over < weights.shape[-1]:
            mass_T1 = weights.topk(self.normalise_over, dim=-1).values.sum(-1, keepdim=True)
        elif self.renormalise and self.normalise_over is None:
            mass_T1 = left_TK.sum(-1, keepdim=True)
        else:
            return left_TK.to(weights_TK.dtype)
        factor_T1 = weights.sum(-1, keepdim=True) / mass_T1.masked_fill(mass_T1 == 0, 1.0)  # all of a token's may be 0
        return (left_TK * factor_T1).to(weights_TK.dtype)


def _is_number(value: object) -> bool:
    """Whether it is one in float32, which rules are computed in."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST


def _and(names: set[str]) -> str:
    return " and ".join(f"`{name}`" for name in sorted(names)) or "nothing"
