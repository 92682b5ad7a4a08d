"""What a criterion is: a function from one layer's figures to one score for each expert.

    def reap(figures: ExpertFigures) -> Tensor:
        return figures.mean(figures.share_norm)

The experts with the largest scores stay. A plugin offers criteria through the hook `compressor_criteria`.

Dimensions: E experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compressor.model.structure import MoELayer
    from compressor.observe.statistic import Statistic

Need = Literal["pairs", "weights", "outputs"]
"""Figures that cost more than the sums, and are gathered only for criteria that ask for them: `pairs` (losses of pairs
of experts, from one rank more), `weights` (norms of the experts' weights), `outputs` (each expert's summed output, and
how far its outputs are from their mean).
"""


@dataclass(frozen=True)
class ExpertFigures:
    """One layer's figures, float64 [E] each: sums over the tokens that chose the expert; f its output (at the block's),
    g the router's weight, s = g / Σ g over the token's experts.
    """

    num_kept: int
    """How many experts will stay."""
    num_groups: int
    seed: int
    protected: tuple[int, ...]
    """Experts that will stay whatever their score."""
    forbidden: tuple[int, ...]
    tokens: Tensor
    """N: tokens that chose the expert."""
    weight: Tensor
    """Σ g"""
    share: Tensor
    """Σ s"""
    norm: Tensor
    """Σ ‖f‖"""
    squared_norm: Tensor
    """Σ ‖f‖²"""
    weighted_norm: Tensor
    """Σ g‖f‖"""
    squared_weighted_norm: Tensor
    """Σ (g‖f‖)²"""
    share_norm: Tensor
    """Σ s‖f‖"""
    largest: Tensor
    """The largest magnitude of a number in f, over all tokens."""
    output: Tensor | None = field(default=None, repr=False)
    """[E, H]: Σ f; only where a criterion needs `outputs`."""
    spread: Tensor | None = None
    """Σ ‖f − mean f‖²; only for `outputs`. Not from Σ‖f‖² and Σ f, whose difference is rounding where it is small."""
    pairs: Tensor | None = field(default=None, repr=False)
    """[E, E]: the squared loss of dropping one expert (diagonal) and what two share; only for `pairs`."""
    weight_l1: Tensor | None = None
    """Σ |w| over the expert's weights; only for `weights`."""
    weight_squared: Tensor | None = None
    """Σ w²; only for `weights`."""
    num_weights: Tensor | None = None
    """How many weights an expert has; only for `weights`."""
    own: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    """What the criterion's own statistic gathered as `sums.CRITERION.NAME`, by NAME, added up over the domains."""

    def mean(self, summed: Tensor) -> Tensor:
        """A sum over an expert's tokens → its mean; NaN for an expert that no token chose: it has no mean."""
        import torch

        return torch.where(self.tokens > 0, summed / self.tokens, torch.nan)

    def generator(self) -> torch.Generator:
        """Random numbers that depend on the seed alone."""
        import torch

        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class Criterion:
    """A named way to score experts. `score` answers [E]: the largest stay; NaN where an expert has no figures."""

    name: str
    score: Callable[[ExpertFigures], Tensor]
    source: str
    """Where it was published, for tables and records."""
    needs: frozenset[Need] = frozenset()
    needs_text: bool = True
    """Whether it looks at what tokens were routed to whom, and at what experts answered. Where not, no text is read."""
    of_sets: bool = False
    """Whether a score depends on which others stay; then losses of pairs are averaged over domains, not scores."""
    statistic: Callable[[MoELayer], Statistic] | None = None
    """What gathers figures of the criterion's own, such as a subclass of Statistic: sums called `sums.CRITERION.NAME`,
    [D, …] with a row for each domain in the order in which they are first seen. Its `score` finds them in `own`. So
    named, they add up over domains, files and processes.
    """

    @property
    def own_figures(self) -> str:
        """How the names of its own statistic's figures begin."""
        return f"sums.{self.name}."
