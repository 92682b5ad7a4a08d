"""The reconstruction loss of every set of kept experts, from a few forwards instead of one per set.

Source: Lu et al., "Not All Experts are Equal", ACL 2024, arXiv 2402.14800, section 3.2:

    loss(S) = Σ_batches ‖ F(x; S) − F(x) ‖_Frobenius

F(x; S) is the layer's routed output when the router cannot choose experts outside S. The paper runs the layer once
per set. Here, with E_e(x) the output of expert e and w_e(S) its weight (0 if not chosen), a token's squared error is

    ‖ Σ_e w_e(S) E_e − Σ_e w_e E_e ‖²  =  δᵀ G δ        δ = w(S) − w,   G_ij = ⟨E_i(x), E_j(x)⟩

and when d experts are dropped only a token's best K + d ranks can ever be chosen. So the outputs of these few give
the loss of all sets. δ, not a difference of outputs: a token whose experts all stay adds exactly 0, so ties stay ties.

Dimensions: c tokens, E experts, K chosen per token, M = min(E, K + d) ranks, P = C(M, K) possible choices among the
ranks, S sets of kept experts, H hidden size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor

from compressor import MoELayer, RoutedTokens, RoutingRule

_BYTES = 64 * 2**20
_SMALL_TABLE = 1000
_TOKENS_PER_LOOKUP = 16


def num_subsets(layer: MoELayer, num_kept: int) -> int:
    """How many sets of `num_kept` experts the layer can keep; with groups, equally many of each group."""
    per_group = num_kept // layer.num_groups
    return int(comb(layer.num_experts // layer.num_groups, per_group) ** layer.num_groups)


def dropped_subsets(layer: MoELayer, num_kept: int) -> list[tuple[int, ...]]:
    """Every set of dropped experts, ascending ids, in lexicographic order."""
    size = layer.num_experts // layer.num_groups
    num_dropped = size - num_kept // layer.num_groups
    groups = [range(group * size, (group + 1) * size) for group in range(layer.num_groups)]
    choices = [itertools.combinations(group, num_dropped) for group in groups]
    return [tuple(itertools.chain.from_iterable(parts)) for parts in itertools.product(*choices)]


@dataclass(frozen=True)
class SubsetTables:
    """Look-up tables for one layer's shape: they depend on E, K and the dropped sets only."""

    dropped: list[tuple[int, ...]]
    keep_SE: Tensor
    """float32, 1 where set S keeps expert E."""
    choices_PK: Tensor
    """int64: the possible choices of K among M ranks, lexicographic; the first is the ordinary one."""
    choice_of_mask: Tensor
    """[2^M] int64: bit mask of the ranks that survive → the choice that a token then makes."""

    @classmethod
    def build(cls, layer: MoELayer, num_kept: int, device: torch.device) -> SubsetTables:
        """All tables; memory S·E·4 + 2^M·8 bytes."""
        dropped = dropped_subsets(layer, num_kept)
        keep_SE = torch.ones(len(dropped), layer.num_experts)
        keep_SE.scatter_(1, torch.tensor(dropped, dtype=torch.int64), 0.0)
        num_ranks = ranks_needed(layer, num_kept)
        choices_PK = torch.combinations(torch.arange(num_ranks), layer.top_k)
        choice_of_mask = _first_choices(num_ranks, choices_PK)
        return cls(dropped, keep_SE.to(device), choices_PK.to(device), choice_of_mask.to(device))


def ranks_needed(layer: MoELayer, num_kept: int) -> int:
    """M: how many ranks of a token can become its choice when all but `num_kept` experts go."""
    return min(layer.num_experts, layer.top_k + layer.num_experts - num_kept)


def _first_choices(num_ranks: int, choices_PK: Tensor) -> Tensor:
    """[2^M]: for every mask of surviving ranks, which row of `choices_PK` are its first K ranks (0 if fewer
    survive).
    """
    top_k = choices_PK.shape[1]
    bit_of_rank = 1 << torch.arange(num_ranks)
    masks = torch.arange(1 << num_ranks)
    alive = (masks[:, None] & bit_of_rank) > 0
    first = alive & (alive.cumsum(1) <= top_k)
    chosen_mask = (first * bit_of_rank).sum(1)
    row_of_mask = torch.zeros(1 << num_ranks, dtype=torch.int64)
    row_of_mask[bit_of_rank[choices_PK].sum(1)] = torch.arange(len(choices_PK))
    return row_of_mask[chosen_mask]


def surviving_ranks(order_cM: Tensor, keep_SE: Tensor) -> Tensor:
    """[c, S] int64: for every token and set, the bit mask of the token's ranks whose expert is kept. Exact up to M =
    24.
    """
    powers = 2.0 ** torch.arange(order_cM.shape[1], device=order_cM.device)
    bit_cE = keep_SE.new_zeros(len(order_cM), keep_SE.shape[1]).scatter_(1, order_cM, powers.expand(order_cM.shape))
    return (bit_cE @ keep_SE.T).long()


def choice_weights(affinity_cM: Tensor, choices_PK: Tensor, *, renormalise: bool, scale: float) -> Tensor:
    """[c, P, M] float64: the weight of every rank under every choice, 0 for ranks not chosen."""
    weights_cPK = affinity_cM[:, choices_PK]
    if renormalise:
        weights_cPK = weights_cPK / weights_cPK.sum(-1, keepdim=True)
    empty_cPM = affinity_cM.new_zeros(len(affinity_cM), len(choices_PK), affinity_cM.shape[1])
    return empty_cPM.scatter_(2, choices_PK.expand(len(affinity_cM), -1, -1), scale * weights_cPK)


def choice_errors(weights_cPM: Tensor, gram_cMM: Tensor) -> Tensor:
    """[c, P] float64: δᵀ G δ of every choice P, δ = its weights − those of the ordinary choice (the first)."""
    delta_cPM = weights_cPM - weights_cPM[:, :1]
    return (torch.bmm(delta_cPM, gram_cMM) * delta_cPM).sum(-1)


def rescaled_errors(
    weights_cPM: Tensor, gram_cMM: Tensor, choice_cS: Tensor, affinity_cE: Tensor, keep_SE: Tensor
) -> Tensor:
    """[c, S] float64: the error where every dropped expert rescales all weights (softmax that is not renormalised).

    With Z(S) = Σ_{e ∈ S} softmax_e the weights become w_P / Z, so ‖u_P / Z − u‖² = ⟨u_P,u_P⟩/Z² − 2⟨u_P,u⟩/Z + ⟨u,u⟩,
    u_P = Σ_m w_Pm E_m. Written as a sum of ‖u_P − u‖² and terms in (1/Z − 1), which keeps small errors exact.
    """
    product_cPM = torch.bmm(weights_cPM, gram_cMM)
    squared_cP = (product_cPM * weights_cPM).sum(-1)
    with_full_cP = (product_cPM * weights_cPM[:, :1]).sum(-1)
    errors_cP = choice_errors(weights_cPM, gram_cMM)
    growth_cS = 1.0 / (affinity_cE @ keep_SE.T.double()) - 1.0
    # ‖u_P (1 + g) − u‖² = ‖u_P − u‖² + 2 g (⟨u_P,u_P⟩ − ⟨u_P,u⟩) + g² ⟨u_P,u_P⟩
    return (
        errors_cP.gather(1, choice_cS)
        + 2 * growth_cS * (squared_cP - with_full_cP).gather(1, choice_cS)
        + growth_cS.square() * squared_cP.gather(1, choice_cS)
    )


def squared_errors(tokens: RoutedTokens, tables: SubsetTables, num_kept: int) -> Tensor:
    """[S] float64: Σ over the batch's tokens of the squared error of every set of kept experts."""
    if tokens.rule is None:
        return _squared_errors_by_replay(tokens, tables)
    total_S = torch.zeros(len(tables.dropped), dtype=torch.float64, device=tokens.hidden_TH.device)
    affinity_TE = tokens.rule.affinity(tokens.logits_TE)
    for chunk in tokens.ranked_outputs(ranks_needed(tokens.layer, num_kept)):
        num_ranks = chunk.order_cM.shape[1]
        step = max(_TOKENS_PER_LOOKUP, _BYTES // (8 * len(tables.choices_PK) * num_ranks))
        for start in range(0, len(chunk.order_cM), step):
            part = slice(start, start + step)
            outputs_cMH = chunk.outputs_cMH[part]
            total_S += _part_errors(
                tokens.rule,
                tables,
                chunk.order_cM[part],
                torch.bmm(outputs_cMH, outputs_cMH.transpose(1, 2)).double(),
                affinity_TE[chunk.start : chunk.stop][part],
            )
    return total_S.clamp_min_(0.0)


def _part_errors(
    rule: RoutingRule, tables: SubsetTables, order_cM: Tensor, gram_cMM: Tensor, affinity_cE: Tensor
) -> Tensor:
    """[S]: the squared errors of some tokens, summed."""
    weights_cPM = choice_weights(
        affinity_cE.gather(1, order_cM), tables.choices_PK, renormalise=rule.renormalise, scale=rule.scale
    )
    errors_cP = None if rule.rescales_all else choice_errors(weights_cPM, gram_cMM)
    total_S = gram_cMM.new_zeros(len(tables.dropped))
    # few tokens at a time where there are many sets: the [tokens, S] look-up then stays in the processor's cache
    step = len(order_cM) if len(tables.dropped) < _SMALL_TABLE else _TOKENS_PER_LOOKUP
    for start in range(0, len(order_cM), step):
        part = slice(start, start + step)
        mask_cS = surviving_ranks(order_cM[part], tables.keep_SE)
        if errors_cP is None:
            choice_cS = tables.choice_of_mask[mask_cS]
            total_S += rescaled_errors(
                weights_cPM[part], gram_cMM[part], choice_cS, affinity_cE[part], tables.keep_SE
            ).sum(0)
        elif len(tables.choice_of_mask) <= 4 * len(tables.dropped):
            total_S += errors_cP[part][:, tables.choice_of_mask].gather(1, mask_cS).sum(0)
        else:
            total_S += errors_cP[part].gather(1, tables.choice_of_mask[mask_cS]).sum(0)
    return total_S


def _squared_errors_by_replay(tokens: RoutedTokens, tables: SubsetTables) -> Tensor:
    """[S]: the same for a router without a closed rule: it is run again for every set, the experts are not.

    All E outputs of each token are needed (E / K forwards), since such a router may choose anything.
    """
    num_experts = tokens.layer.num_experts
    gram_TEE = torch.empty(tokens.num_tokens, num_experts, num_experts, device=tokens.hidden_TH.device)
    for chunk in tokens.ranked_outputs(num_experts):
        rank_of_expert = chunk.order_cM.argsort(1)
        outputs_cEH = chunk.outputs_cMH.gather(1, rank_of_expert[..., None].expand(chunk.outputs_cMH.shape))
        gram_TEE[chunk.start : chunk.stop] = torch.bmm(outputs_cEH, outputs_cEH.transpose(1, 2))
    full_TE = _weights_by_expert(tokens.index_TK, tokens.weights_TK, num_experts)
    totals = []
    for dropped in tables.dropped:
        kept = [expert for expert in range(num_experts) if expert not in dropped]
        delta_TE = (_weights_by_expert(*tokens.replay(kept), num_experts) - full_TE).float()
        changed = delta_TE.abs().amax(1) > 0
        delta_cE = delta_TE[changed]
        errors_c = (torch.bmm(gram_TEE[changed], delta_cE[..., None])[..., 0] * delta_cE).sum(1, dtype=torch.float64)
        totals.append(errors_c.sum())
    return torch.stack(totals).clamp_min_(0.0)


def _weights_by_expert(index_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Tensor:
    empty_TE = torch.zeros(len(index_TK), num_experts, dtype=torch.float64, device=index_TK.device)
    return empty_TE.scatter_(1, index_TK, weights_TK.double())


def best_subset(squared_errors_BS: Tensor, dropped: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], Tensor]:
    """(the dropped experts of least loss, the losses [S]): loss = Σ_batches √(squared error), the paper's objective.

    Ties go to the first set in lexicographic order of dropped ids.
    """
    losses_S = squared_errors_BS.double().sqrt().sum(0)
    return dropped[int((losses_S == losses_S.min()).nonzero()[0])], losses_S
