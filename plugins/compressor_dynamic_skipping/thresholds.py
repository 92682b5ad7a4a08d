"""From curves to thresholds: what a threshold reaches in a layer, and which threshold reaches what is asked.

Dimensions: N bins of the score; d what is dropped, in steps of 1/32 expert per token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor import allocate
from compressor_dynamic_skipping.curves import bins_of, edges

STEPS = 32
"""Steps to an expert in which the number of experts is shared out among layers."""


@dataclass(frozen=True)
class Reached:
    """What a threshold does to a layer: experts that a token uses on average, share of the weights that stays, and
    the error of the layer's output, √(Σ ‖change‖² / Σ ‖output‖²); None where outputs cannot be asked.
    """

    mean_experts: float
    kept_mass: float
    relative_loss: float | None


@dataclass(frozen=True)
class Curve:
    """One layer on some text: sums over the steps whose score is below each bin's edge, [N] float64 each."""

    rule: str
    tokens: float
    experts: float
    squared_output: float | None
    gone_N: Tensor
    share_N: Tensor
    error_N: Tensor

    @classmethod
    def of(cls, rule: str, figures: Mapping[str, Tensor], domains: Sequence[int]) -> Curve:
        """The curve over some of the domains together. Raises KeyError where the figures hold none for this rule."""
        name = f"{'skip' if rule == 'contribution' else 'sums.skip'}.{rule}"
        at = list(domains)
        steps_NX = figures[name][at].sum(0)
        below_NX = torch.cat([torch.zeros(1, 3, dtype=torch.float64), steps_NX.cumsum(0)])[:-1]
        squared = figures.get("sums.skip.squared_output")
        return cls(
            rule,
            float(figures["sums.skip.tokens"][at].sum()),
            float(figures["sums.skip.experts"][at].sum()),
            None if squared is None else float(squared[at].sum()),
            *below_NX.T.contiguous(),
        )

    @property
    def most(self) -> float:
        """Experts that a token uses on average if none is skipped."""
        return self.experts / self.tokens

    @property
    def fewest(self) -> float:
        """The same if as many are skipped as may be."""
        return (self.experts - float(self.gone_N[-1])) / self.tokens

    def reached(self, beta: float) -> Reached:
        """What a threshold does; within the bin that it falls into, steps are taken as evenly spread."""
        edges_N = edges().double()
        low = int(bins_of(torch.tensor([beta])))
        high = min(low + 1, len(edges_N) - 1)
        width = float(edges_N[high] - edges_N[low])
        part = (beta - float(edges_N[low])) / width if width else 0.0

        def at(values_N: Tensor) -> float:
            return float(values_N[low] + part * (values_N[high] - values_N[low]))

        error = None if self.squared_output is None else max(0.0, at(self.error_N))
        return Reached(
            (self.experts - at(self.gone_N)) / self.tokens,
            1 - at(self.share_N) / self.tokens,
            None if error is None else (error / max(self.squared_output or 0.0, 1e-300)) ** 0.5,
        )

    def beta_at(self, bin_number: int) -> float:
        """The threshold that skips exactly what lies below a bin's edge, and no more."""
        edge = edges()[bin_number]
        if self.rule == "tail_mass":  # it skips what equals β too
            edge = torch.nextafter(edge, torch.zeros(()))
        return float(edge)

    def beta_for_mean(self, mean: float) -> float:
        """The threshold with which a token uses so many experts on average, as nearly as the bins allow."""
        return self._nearest(self.experts - mean * self.tokens, self.gone_N)

    def beta_for_mass(self, mass: float) -> float:
        """The largest threshold with which at least this share of the weights stays, on average."""
        allowed = (1 - mass) * self.tokens
        number = int((self.share_N <= allowed + 1e-9).nonzero()[-1])
        return self.beta_at(max(1, number))

    def _nearest(self, wanted: float, values_N: Tensor) -> float:
        # of several bins that reach the same the first: the smallest threshold that does
        return self.beta_at(max(1, int((values_N - wanted).abs().argmin())))

    def costs(self) -> Tensor:
        """[d]: the squared error per token if d/32 experts are dropped per token, ∞ where that is more than may go."""
        steps_d = torch.arange(int(self.most * STEPS) + 1, dtype=torch.float64)
        wanted_d = steps_d / STEPS * self.tokens
        high_d = torch.searchsorted(self.gone_N, wanted_d).clamp(1, len(self.gone_N) - 1)
        low_gone_d, high_gone_d = self.gone_N[high_d - 1], self.gone_N[high_d]
        part_d = ((wanted_d - low_gone_d) / (high_gone_d - low_gone_d).clamp_min(1e-300)).clamp(0, 1)
        error_d = self.error_N[high_d - 1] + part_d * (self.error_N[high_d] - self.error_N[high_d - 1])
        return (error_d / self.tokens).masked_fill(wanted_d > self.gone_N[-1] + 1e-9, torch.inf)


def shared_out(curves: Mapping[str, Curve], mean: float) -> dict[str, float]:
    """Layer path → experts per token, on average `mean`, such that the layers' squared errors add up to least.

    Where a layer's outputs cannot be asked, one threshold for all layers is looked for instead. Raises ValueError where
    the mean cannot be reached.
    """
    fewest, most = (
        sum(values) / len(curves) for values in zip(*((c.fewest, c.most) for c in curves.values()), strict=True)
    )
    if not fewest <= mean < most:
        raise ValueError(
            f"a mean of {mean:g} experts per token cannot be reached by skipping: all layers together can be brought "
            f"from {most:.4g} down to {fewest:.4g}"
        )
    if any(curve.squared_output is None for curve in curves.values()):
        return _by_one_threshold(curves, mean)
    costs = [curve.costs() for curve in curves.values()]
    table_Ld = torch.full((len(costs), max(map(len, costs))), torch.inf, dtype=torch.float64)
    for row_d, cost_d in zip(table_Ld, costs, strict=True):
        row_d[: len(cost_d)] = cost_d
    to_drop = int(sum((curve.most - mean) * STEPS for curve in curves.values()) + 0.5)
    possible = sum(int(row_d.isfinite().sum()) - 1 for row_d in table_Ld)
    dropped = allocate(table_Ld, min(to_drop, possible))
    return {path: curve.most - d / STEPS for (path, curve), d in zip(curves.items(), dropped, strict=True)}


def _by_one_threshold(curves: Mapping[str, Curve], mean: float) -> dict[str, float]:
    gone_N = torch.stack([curve.gone_N / curve.tokens for curve in curves.values()]).mean(0)
    most = sum(curve.most for curve in curves.values()) / len(curves)
    number = int((gone_N - (most - mean)).abs().argmin())
    return {path: curve.most - float(curve.gone_N[number]) / curve.tokens for path, curve in curves.items()}


def uncertainty(curve: Curve, mean: float) -> float:
    """Two standard errors of a mean number of experts per token, at most: tokens taken as independent, their numbers as
    spread as numbers from 1 to the most can be (Bhatia and Davis 2000).
    """
    variance = max(0.0, (mean - min(1.0, curve.fewest)) * (math.ceil(curve.most) - mean))
    return 2 * math.sqrt(variance / curve.tokens)
