"""Published criteria: one layer's figures → a score for each expert; the largest stay.

f is an expert's output, g the weight that the router gave it, s = g over the sum of the token's weights, and sums run
over the N tokens that chose the expert. An expert that no token chose has no mean: criteria that take one answer NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor import Criterion, ExpertFigures, fewest_losses


def frequency(figures: ExpertFigures) -> Tensor:
    """N: how many tokens chose the expert."""
    return figures.tokens


def seer(figures: ExpertFigures) -> Tensor:
    """Σ g: the router's weights, summed."""
    return figures.weight


def ean(figures: ExpertFigures) -> Tensor:
    """Σ ‖f‖: expert activation norm."""
    return figures.norm


def weighted_ean(figures: ExpertFigures) -> Tensor:
    """Σ g‖f‖: what the expert adds to the layer's output, in size."""
    return figures.weighted_norm


def reap(figures: ExpertFigures) -> Tensor:
    """Σ s‖f‖ / N: router-weighted expert activation, mean over the expert's own tokens."""
    return figures.mean(figures.share_norm)


def man(figures: ExpertFigures) -> Tensor:
    """Σ ‖f‖ / N: mean activation norm."""
    return figures.mean(figures.norm)


def msan(figures: ExpertFigures) -> Tensor:
    """Σ ‖f‖² / N: mean squared activation norm."""
    return figures.mean(figures.squared_norm)


def mone(figures: ExpertFigures) -> Tensor:
    """‖std f‖ × Σ g: experts that are used little and answer much the same, so that a constant could stand in, go.

    Variance unbiased and per dimension: ‖std f‖² = (Σ‖f‖² − ‖Σf‖² / N) / (N − 1), 0 for one token. The published code
    (`fusion`) divides Σ g by the number of sequences, which changes no order. No constant is put in the place here.
    """
    assert figures.output is not None
    spread = figures.squared_norm - figures.mean(figures.output.square().sum(1))
    deviation = (spread.clamp_min(0) / (figures.tokens - 1).clamp_min(1)).sqrt()
    return deviation * figures.weight


def aimer(figures: ExpertFigures) -> Tensor:
    """√(Σw²/n) / (Σ|w|/n) over all n weights of the expert: root mean square over absolute mean. Needs no text.

    The paper's score is the inverse, ‖w‖₁ / (√n ‖w‖₂), of all the expert's matrices as one vector, and the experts with
    the largest go: here those with the largest stay, whose weights are concentrated in few places.
    """
    assert figures.weight_squared is not None
    assert figures.weight_l1 is not None
    assert figures.num_weights is not None
    root_mean_square = (figures.weight_squared / figures.num_weights).sqrt()
    return root_mean_square / (figures.weight_l1 / figures.num_weights)


def single_removal(figures: ExpertFigures) -> Tensor:
    """The squared error of the layer's output when this expert alone is gone and each token's next one steps in."""
    assert figures.pairs is not None
    return figures.pairs.diagonal()


def quad_mix(figures: ExpertFigures) -> Tensor:
    """1 for the experts that stay when Σ over pairs of dropped experts of what they lose together is least, else 0."""
    assert figures.pairs is not None
    kept = fewest_losses(
        figures.pairs, figures.num_kept, figures.num_groups, protected=figures.protected, forbidden=figures.forbidden
    )
    return torch.zeros_like(figures.tokens).index_fill(0, torch.tensor(kept), 1.0)


def random(figures: ExpertFigures) -> Tensor:
    """A number drawn for each expert: what chance does."""
    return torch.rand(len(figures.tokens), generator=figures.generator(), dtype=torch.float64)


CRITERIA = (
    Criterion("frequency", frequency, "Muzio et al. 2024, SEER-MoE, arXiv 2404.05089"),
    Criterion("seer", seer, "Muzio et al. 2024, SEER-MoE, arXiv 2404.05089, soft counting"),
    Criterion("ean", ean, "Jaiswal et al. 2025, MoE Experts Compression Suite, arXiv 2504.05586"),
    Criterion("weighted_ean", weighted_ean, "EAN with the router's weight"),
    Criterion("reap", reap, "Lasby et al. 2025, REAP the Experts, arXiv 2510.13999"),
    Criterion("man", man, "Liu et al. 2026, arXiv 2606.15716"),
    Criterion("msan", msan, "Liu et al. 2026, arXiv 2606.15716"),
    Criterion("mone", mone, "Zhang et al. 2025, MoNE, arXiv 2507.00390", frozenset({"outputs"})),
    Criterion("aimer", aimer, "Liu et al. 2026, AIMER, arXiv 2603.18492; weights only", frozenset({"weights"})),
    Criterion(
        "single_removal", single_removal, "the objective of arXiv 2402.14800 for one expert", frozenset({"pairs"})
    ),
    Criterion("quad_mix", quad_mix, "quadratic form of the same objective; ours", frozenset({"pairs"}), of_sets=True),
    Criterion("random", random, "chance, by `seed`"),
)
