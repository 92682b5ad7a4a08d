"""From curves to thresholds: what a threshold reaches in a layer, and which threshold reaches what is asked.

Dimensions: N bins of the score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor_dynamic_skipping.curves import bins_of, edges


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

    def beta_for_mass(self, mass: float) -> float:
        """The largest threshold with which at least this share of the weights stays, on average."""
        allowed = (1 - mass) * self.tokens
        number = int((self.share_N <= allowed + 1e-9).nonzero()[-1])
        return self.beta_at(max(1, number))


def beta_for_mean(curves: Sequence[Curve], mean: float) -> float:
    """The threshold with which a token uses `mean` experts on average over the layers, as nearly as the bins allow: one
    for all layers, so those that choose with less doubt use fewer. Raises ValueError where the mean cannot be reached.
    """
    most, fewest = (sum(values) / len(curves) for values in ([c.most for c in curves], [c.fewest for c in curves]))
    if not fewest <= mean < most:
        raise ValueError(
            f"a mean of {mean:g} experts per token cannot be reached by skipping: all layers together can be brought "
            f"from {most:.4g} down to {fewest:.4g}"
        )
    gone_N = torch.stack([curve.gone_N / curve.tokens for curve in curves]).mean(0)
    # of several bins that reach the same the first: the smallest threshold that does
    return curves[0].beta_at(max(1, int((gone_N - (most - mean)).abs().argmin())))


def uncertainty(curve: Curve, mean: float) -> float:
    """Two standard errors of a mean number of experts per token, at most: tokens taken as independent, their numbers as
    spread as numbers from 1 to the most can be (Bhatia and Davis 2000).
    """
    variance = max(0.0, (mean - min(1.0, curve.fewest)) * (math.ceil(curve.most) - mean))
    return 2 * math.sqrt(variance / curve.tokens)
