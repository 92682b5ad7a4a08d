"""Published criteria: one layer's figures → a score for each expert; the largest stay.

f is an expert's output, g the weight that the router gave it, s = g over the sum of the token's weights, and sums run
over the N tokens that chose the expert. An expert that no token chose has no mean: criteria that take one answer NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from compressor.plugin import Criterion, ExpertFigures

if TYPE_CHECKING:
    from torch import Tensor

    from compressor.plugin import MoELayer, Statistic


def frequency(figures: ExpertFigures) -> Tensor:
    """N: how many tokens chose the expert."""
    return figures.tokens


def seer(figures: ExpertFigures) -> Tensor:
    """Σ g: the router's weights, as it gives them, summed over the tokens that chose the expert.

    The paper's soft counting, of Mixtral. We know of no published code to compare with: where a router renormalises, so
    do these weights.
    """
    return figures.weight


def ean(figures: ExpertFigures) -> Tensor:
    """Σ ‖f‖: expert activation norm."""
    return figures.norm


def weighted_ean(figures: ExpertFigures) -> Tensor:
    """Σ g‖f‖: what the expert adds to the layer's output, in size; g as in `reap`, whose published code has it too."""
    return figures.weighted_norm


def reap(figures: ExpertFigures) -> Tensor:
    """Σ g‖f‖ / N: router-weighted expert activation, mean over the expert's own tokens.

    g is what the router gives: renormalised over the token's experts where the router does so, and else not. That is
    the paper's gate value, and for softmax routers what the published code (CerebrasResearch/reap, since March 2026)
    computes: softmax over all experts, divided by the sum of the chosen ones where the config says `norm_topk_prob`. It
    leaves out a factor that all tokens of a layer share, such as `routed_scaling_factor`, which changes no order.
    We differ where that code does not follow the router: Mixtral renormalises without such a key in its config, and
    there the code does not; of a sigmoid router (GLM-4.5, DeepSeek-V3, Llama 4) it takes a softmax of the logits, and
    as chosen the largest logits, without the router's bias and groups. Here experts and weights are those of the model.
    """
    return figures.mean(figures.weighted_norm)


def reap_renormalised(figures: ExpertFigures) -> Tensor:
    """Σ s‖f‖ / N: the same with weights renormalised whether the router does so or not. Equal to `reap`, up to a factor
    for the layer, where it does; otherwise (OLMoE, Qwen2-MoE, DeepSeek-V2) every token counts the same, however much
    of its weight the router leaves to experts that were not chosen.
    """
    return figures.mean(figures.share_norm)


def man(figures: ExpertFigures) -> Tensor:
    """Σ ‖f‖ / N: mean activation norm."""
    return figures.mean(figures.norm)


def msan(figures: ExpertFigures) -> Tensor:
    """Σ ‖f‖² / N: mean squared activation norm."""
    return figures.mean(figures.squared_norm)


def mone(figures: ExpertFigures) -> Tensor:
    """‖std f‖ × Σ g: experts that are used little and answer much the same, so that a constant could stand in, go.

    Variance unbiased and per dimension: ‖std f‖² = Σ‖f − mean f‖² / (N − 1), 0 for one token. g is the router's own
    weight, renormalised where the router does, as in the published code (`fusion` of mode-pd). That divides Σ g by the
    number of sequences and multiplies by a quarter, which changes no order; its running variance leaves out the first
    batch and takes means of what it has seen so far, ours is the variance of all tokens. No constant is put in the
    place here.
    """
    assert figures.spread is not None
    deviation = (figures.spread / (figures.tokens - 1).clamp_min(1)).sqrt()
    import torch

    return torch.where(figures.tokens > 0, deviation * figures.weight, torch.nan)


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
    return _least_together(figures.pairs, figures)


def hope(figures: ExpertFigures) -> Tensor:
    """1 for the experts that stay when pᵀFp is least, else 0; p is 1 for those that go, F_ij = mean a_i a_j over the
    tokens that chose both, a = g‖f‖, and 0 where no token did.

    These are the means of the paper's practice; those of its theory are over all tokens (`hope_sums`). So a pair weighs
    as much however seldom it is chosen. The diagonal is mean a², about REAP's score squared. Searched by greedy removal
    and best swaps. Of several domains, sums and numbers of tokens weigh by the size of the layer's output, as in the
    search.
    """
    return _least_together(figures.own["products"] / figures.own["together"].clamp_min(1e-300), figures)


def hope_sums(figures: ExpertFigures) -> Tensor:
    """The same with F_ij = Σ a_i a_j: HOPE's theory, up to the number of tokens. What `quad_mix` has in ⟨f_i, f_j⟩ is
    bounded by norms here, and no next expert steps in.
    """
    return _least_together(figures.own["products"], figures)


def _least_together(losses_EE: Tensor, figures: ExpertFigures) -> Tensor:
    import torch

    from compressor.plugin import fewest_losses

    kept = fewest_losses(
        losses_EE, figures.num_kept, figures.num_groups, protected=figures.protected, forbidden=figures.forbidden
    )
    return torch.zeros_like(figures.tokens).index_fill(0, torch.tensor(kept), 1.0)


def _pair_sizes(name: str) -> Callable[[MoELayer], Statistic]:
    def statistic(layer: MoELayer) -> Statistic:
        from compressor_expert_pruning.pair_sizes import PairSizes

        return PairSizes(layer, name)

    return statistic


def random(figures: ExpertFigures) -> Tensor:
    """A number drawn for each expert: what chance does."""
    import torch

    return torch.rand(len(figures.tokens), generator=figures.generator(), dtype=torch.float64)


CRITERIA = (
    Criterion("frequency", frequency, "Muzio et al. 2024, SEER-MoE, arXiv 2404.05089"),
    Criterion("seer", seer, "Muzio et al. 2024, SEER-MoE, arXiv 2404.05089, soft counting"),
    Criterion("ean", ean, "Jaiswal et al. 2025, MoE Experts Compression Suite, arXiv 2504.05586"),
    Criterion("weighted_ean", weighted_ean, "EAN with the router's weight"),
    Criterion("reap", reap, "Lasby et al. 2025, REAP the Experts, arXiv 2510.13999"),
    Criterion("reap_renormalised", reap_renormalised, "REAP with weights renormalised in every model"),
    Criterion("man", man, "Liu et al. 2026, arXiv 2606.15716"),
    Criterion("msan", msan, "Liu et al. 2026, arXiv 2606.15716"),
    Criterion("mone", mone, "Zhang et al. 2025, MoNE, arXiv 2507.00390", frozenset({"outputs"})),
    Criterion(
        "aimer",
        aimer,
        "Liu et al. 2026, AIMER, arXiv 2603.18492; weights only",
        frozenset({"weights"}),
        needs_text=False,
    ),
    Criterion(
        "single_removal", single_removal, "the objective of arXiv 2402.14800 for one expert", frozenset({"pairs"})
    ),
    Criterion("quad_mix", quad_mix, "quadratic form of the same objective; ours", frozenset({"pairs"}), of_sets=True),
    Criterion("hope", hope, "HOPE, arXiv 2609.18916", of_sets=True, statistic=_pair_sizes("hope")),
    Criterion(
        "hope_sums",
        hope_sums,
        "HOPE, arXiv 2609.18916, over all tokens",
        of_sets=True,
        statistic=_pair_sizes("hope_sums"),
    ),
    Criterion("random", random, "chance, by `seed`", needs_text=False),
)
