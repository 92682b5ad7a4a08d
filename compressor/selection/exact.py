"""The reconstruction loss of every set of kept experts, from a few forwards instead of one per set.

Source: Lu et al., "Not All Experts are Equal", ACL 2024, arXiv 2402.14800, section 3.2:

    loss(S) = Σ_batches ‖ F(x; S) − F(x) ‖_Frobenius

F(x; S) is the layer's routed output when the router cannot choose experts outside S. The paper runs the layer once
per set. Here, with E_e(x) the output of expert e and w_e(S) its weight (0 if not chosen), a token's squared error is

    ‖ Σ_e w_e(S) E_e − Σ_e w_e E_e ‖²  =  δᵀ G δ        δ = w(S) − w,   G_ij = ⟨E_i(x), E_j(x)⟩

and when d experts are dropped only a token's best K + d ranks can ever be chosen. So the outputs of these few give
the loss of all sets. δ, not a difference of outputs: a token whose experts all stay adds exactly 0, so ties stay ties.

If fewer experts per token are chosen than in the original (k < K), the first term is the smaller layer with k and the
second the original one with its own K, so δ = w(S, k) − w(full, K). Some routers choose among more than experts (an
identity, a skip): these stay in every set, have ranks like any other, and count in a softmax that is not renormalised.

Dimensions: c tokens, E experts, N = E + what else can be chosen, K chosen per token, k chosen by the smaller layer
(k = K if not lowered), M = min(N, max(K, k + d)) ranks, P = C(M, k) possible choices among the ranks, S sets of kept
experts, H hidden size, X = M, or M + 1 with the residual of a target that is not the layer's own output.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor
from torch.nn import functional

from compressor.model.routed_tokens import RankedChunk, RoutedTokens, gram_of
from compressor.model.routing_rule import RoutingRule
from compressor.model.rule_fitting import explains, weights_by_id
from compressor.model.structure import MoELayer
from compressor.observe.statistic import RankedStatistic

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
    """Look-up tables for one layer's shape: they depend on E, N, K, k and the dropped sets only."""

    dropped: list[tuple[int, ...]]
    keep_SN: Tensor
    """float32, 1 where set S keeps expert N, and for everything behind the experts."""
    choices_Pk: Tensor
    """int64: the possible choices of k among M ranks, lexicographic; the first is the ordinary one."""
    choice_of_mask: Tensor
    """[2^M] int64: bit mask of the ranks that survive → the choice that a token then makes."""
    num_ranks: int
    """M."""
    top_k: int | None
    """k, or None if it is not lowered."""

    @classmethod
    def build(
        cls, layer: MoELayer, counts: Sequence[int], device: torch.device, top_k: int | None = None
    ) -> SubsetTables:
        """Tables for all sets of all `counts` of kept experts, in this order; memory S·N·4 + 2^M·8 bytes."""
        by_count = [dropped_subsets(layer, num_kept) for num_kept in counts]
        keep_SN = torch.cat([_keep_masks(layer, dropped) for dropped in by_count])
        num_ranks = max(ranks_needed(layer, num_kept, top_k) for num_kept in counts)
        choices_Pk = torch.combinations(torch.arange(num_ranks), layer.top_k if top_k is None else top_k)
        return cls(
            dropped=[one for dropped in by_count for one in dropped],
            keep_SN=keep_SN.to(device),
            choices_Pk=choices_Pk.to(device),
            choice_of_mask=_first_choices(num_ranks, choices_Pk).to(device),
            num_ranks=num_ranks,
            top_k=top_k,
        )


def _keep_masks(layer: MoELayer, dropped: Sequence[tuple[int, ...]]) -> Tensor:
    keep_SN = torch.ones(len(dropped), layer.num_choices)
    return keep_SN.scatter_(1, torch.tensor(dropped, dtype=torch.int64), 0.0)


def ranks_needed(layer: MoELayer, num_kept: int, top_k: int | None = None) -> int:
    """M, the ranks looked at: K, and those that may be in its choice of `top_k` once all but `num_kept` go."""
    smaller = layer.top_k if top_k is None else top_k
    return min(layer.num_choices, max(layer.top_k, smaller + layer.num_experts - num_kept))


def _first_choices(num_ranks: int, choices_Pk: Tensor) -> Tensor:
    """[2^M]: for every mask of surviving ranks, the row of `choices_Pk` of its first k (0 if fewer)."""
    top_k = choices_Pk.shape[1]
    bit_of_rank = 1 << torch.arange(num_ranks)
    masks = torch.arange(1 << num_ranks)
    alive = (masks[:, None] & bit_of_rank) > 0
    first = alive & (alive.cumsum(1) <= top_k)
    chosen_mask = (first * bit_of_rank).sum(1)
    row_of_mask = torch.zeros(1 << num_ranks, dtype=torch.int64)
    row_of_mask[bit_of_rank[choices_Pk].sum(1)] = torch.arange(len(choices_Pk))
    return row_of_mask[chosen_mask]


def surviving_ranks(order_cM: Tensor, keep_SN: Tensor) -> Tensor:
    """[c, S] int64: for token and set, the bit mask of the ranks whose expert is kept; exact up to M = 24."""
    powers = 2.0 ** torch.arange(order_cM.shape[1], device=order_cM.device)
    bit_cN = keep_SN.new_zeros(len(order_cM), keep_SN.shape[1]).scatter_(1, order_cM, powers.expand(order_cM.shape))
    return (bit_cN @ keep_SN.T).long()


def choice_weights(affinity_cM: Tensor, choices_Pk: Tensor, *, renormalise: bool, scale: float) -> Tensor:
    """[c, P, M] float64: the weight of every rank under every choice, 0 for ranks not chosen."""
    weights_cPk = affinity_cM[:, choices_Pk]
    if renormalise:
        weights_cPk = weights_cPk / weights_cPk.sum(-1, keepdim=True)
    empty_cPM = affinity_cM.new_zeros(len(affinity_cM), len(choices_Pk), affinity_cM.shape[1])
    return empty_cPM.scatter_(2, choices_Pk.expand(len(affinity_cM), -1, -1), scale * weights_cPk)


def choice_errors(weights_cPM: Tensor, full_cM: Tensor, gram_cMM: Tensor) -> Tensor:
    """[c, P] float64: δᵀ G δ of every choice P, δ = its weights − those of the whole layer."""
    delta_cPM = weights_cPM - full_cM[:, None]
    return (torch.bmm(delta_cPM, gram_cMM) * delta_cPM).sum(-1)


def rescaled_errors(
    weights_cPM: Tensor, full_cM: Tensor, gram_cMM: Tensor, choice_cS: Tensor, affinity_cN: Tensor, keep_SN: Tensor
) -> Tensor:
    """[c, S] float64: the error where every dropped expert rescales all weights (softmax that is not renormalised).

    With Z(S) = Σ_{e ∈ S} softmax_e the weights become w_P / Z, so ‖u_P / Z − u‖² = ⟨u_P,u_P⟩/Z² − 2⟨u_P,u⟩/Z + ⟨u,u⟩,
    u_P = Σ_m w_Pm E_m. Written as a sum of ‖u_P − u‖² and terms in (1/Z − 1), which keeps small errors exact.
    """
    product_cPM = torch.bmm(weights_cPM, gram_cMM)
    squared_cP = (product_cPM * weights_cPM).sum(-1)
    with_full_cP = (product_cPM * full_cM[:, None]).sum(-1)
    errors_cP = choice_errors(weights_cPM, full_cM, gram_cMM)
    keep_NS = keep_SN.T.double()
    growth_cS = (affinity_cN @ (1.0 - keep_NS)) / (affinity_cN @ keep_NS)  # 1/Z − 1, and exactly 0 if all stay
    # ‖u_P (1 + g) − u‖² = ‖u_P − u‖² + 2 g (⟨u_P,u_P⟩ − ⟨u_P,u⟩) + g² ⟨u_P,u_P⟩
    return (
        errors_cP.gather(1, choice_cS)
        + 2 * growth_cS * (squared_cP - with_full_cP).gather(1, choice_cS)
        + growth_cS.square() * squared_cP.gather(1, choice_cS)
    )


class SubsetErrors(RankedStatistic):
    """Per batch B and set S: the squared error of the layer's output. The sets are those of all `counts` of kept
    experts, in this order; with `top_k` the smaller layer chooses only so many experts per token.
    """

    def __init__(self, layer: MoELayer, counts: Sequence[int], top_k: int | None = None) -> None:
        self.layer = layer
        self.counts = counts
        self.top_k = top_k
        self._tables: SubsetTables | None = None
        self._errors_BS: list[Tensor] = []
        self._tokens: RoutedTokens | None = None
        self._gram_TXX: Tensor | None = None
        """Of one batch's tokens, where the router itself has to be asked."""

    def num_ranks(self, tokens: RoutedTokens) -> int:
        """As many ranks as can ever be chosen; all of them where the router has to be run again."""
        if self._tokens is not tokens:
            self._begin(tokens)
        assert self._tables is not None
        return self._tables.num_ranks if self._gram_TXX is None else self.layer.num_choices

    def _begin(self, tokens: RoutedTokens) -> None:
        device = tokens.hidden_TH.device
        if self._tables is None:
            self._tables = SubsetTables.build(self.layer, self.counts, device, self.top_k)
        self._tokens, self._gram_TXX = tokens, None
        if not ranks_suffice(tokens, self._tables):
            size = self.layer.num_choices + (tokens.target_TH is not None)
            self._gram_TXX = torch.empty(tokens.num_tokens, size, size, dtype=torch.float64, device=device)
        self._errors_BS.append(torch.zeros(len(self._tables.dropped), dtype=torch.float64, device=device))

    def add(self, tokens: RoutedTokens, chunk: RankedChunk) -> None:
        assert self._tables is not None
        if self._gram_TXX is None:
            self._errors_BS[-1] += chunk_errors(tokens, self._tables, chunk)
        else:
            self._gram_TXX[chunk.start : chunk.stop] = _gram_by_id(tokens, chunk)

    def end_batch(self, tokens: RoutedTokens) -> None:
        """Where the router has to be asked, it is asked now."""
        assert self._tables is not None
        if self._gram_TXX is not None:
            self._errors_BS[-1] = _errors_by_replay(tokens, self._tables, self._gram_TXX)
        self._errors_BS[-1] = self._errors_BS[-1].clamp_min_(0.0).cpu()
        self._tokens = self._gram_TXX = None

    def tensors(self) -> dict[str, Tensor]:
        """squared_error [B, S] float64; counts: of kept experts in those sets; top_k: what a token then chooses."""
        return {
            "subsets.squared_error": torch.stack(self._errors_BS),
            "subsets.counts": torch.tensor(self.counts),
            "subsets.top_k": torch.tensor(self.layer.top_k if self.top_k is None else self.top_k),
        }


def ranks_suffice(tokens: RoutedTokens, tables: SubsetTables) -> bool:
    """Whether what a smaller set chooses can be read off each token's ranks; else the router itself must be asked."""
    rule, top_k = tokens.rule, tables.top_k
    if rule is None or not keeps_order(rule):
        return False
    return top_k is None or _holds_for(rule, tokens, top_k)


def chunk_errors(tokens: RoutedTokens, tables: SubsetTables, chunk: RankedChunk) -> Tensor:
    """[S] float64: the squared errors of some tokens, summed."""
    rule = tokens.rule
    assert rule is not None
    total_S = torch.zeros(len(tables.dropped), dtype=torch.float64, device=tokens.hidden_TH.device)
    outputs_cXH = with_residual(tokens, chunk)
    step = max(_TOKENS_PER_LOOKUP, _BYTES // (8 * len(tables.choices_Pk) * tables.num_ranks))
    for start in range(0, len(chunk.order_cM), step):
        part = slice(start, start + step)
        affinity_cN = rule.affinity(tokens.logits_TE[chunk.start : chunk.stop][part])
        order_cM, gram_cXX = chunk.order_cM[part], gram_of(outputs_cXH[part])
        if tables.top_k is not None:
            order_cM, gram_cXX = sorted_choice(rule, affinity_cN, order_cM, gram_cXX, tokens.layer.top_k)
        total_S += _part_errors(rule, tables, order_cM, gram_cXX, affinity_cN, tokens.layer.top_k)
    return total_S


def with_residual(tokens: RoutedTokens, chunk: RankedChunk) -> Tensor:
    """[c, X, H] float32: the outputs of the M ranks and, where the target is not the layer's own output on these
    tokens, what the layer with all experts lacks of it (X = M + 1, else M).

    The residual ρ = target − Σ_e w_e E_e is treated as one more expert, of weight 1 in the target and 0 in every set,
    so that ‖Σ_e w_e(S) E_e − target‖² = δᵀ G δ holds as before.
    """
    if tokens.target_TH is None:
        return chunk.outputs_cMH
    weights_cK = tokens.weights_TK[chunk.start : chunk.stop].float()
    own_cH = torch.bmm(weights_cK[:, None], chunk.outputs_cMH[:, : weights_cK.shape[1]])[:, 0]
    residual_cH = tokens.target_TH[chunk.start : chunk.stop].float() - own_cH
    return torch.cat([chunk.outputs_cMH, residual_cH[:, None]], dim=1)


def keeps_order(rule: RoutingRule) -> bool:
    """Whether experts keep their order when others are dropped: not with a bias added to a softmax, nor with groups."""
    if rule.groups is not None:
        return False
    return rule.score != "softmax" or rule.bias is None or bool((rule.bias == rule.bias[0]).all())


def _holds_for(rule: RoutingRule, tokens: RoutedTokens, top_k: int) -> bool:
    """Whether the fitted rule also holds with a lower `top_k`, where some renormalise otherwise."""
    lower = dataclasses.replace(tokens.layer, top_k=top_k)
    answered = tokens.replay(range(lower.num_experts), top_k=top_k)
    return not tokens.num_tokens or explains(rule, lower, tokens.logits_TE, *answered)


def sorted_choice(
    rule: RoutingRule, affinity_cN: Tensor, order_cM: Tensor, gram_cXX: Tensor, num_chosen: int
) -> tuple[Tensor, Tensor]:
    """Both with chosen experts by descending rank, which not every router gives: a lower k takes the first."""
    ranking_cK = rule.ranking(affinity_cN).gather(1, order_cM[:, :num_chosen])
    place_cX = torch.arange(gram_cXX.shape[1], device=order_cM.device).repeat(len(order_cM), 1)
    place_cX[:, :num_chosen] = ranking_cK.argsort(dim=1, descending=True, stable=True)
    rows_cXX = gram_cXX.gather(1, place_cX[:, :, None].expand(gram_cXX.shape))
    sorted_cXX = rows_cXX.gather(2, place_cX[:, None, :].expand(gram_cXX.shape))
    return order_cM.gather(1, place_cX[:, : order_cM.shape[1]]), sorted_cXX


def _part_errors(
    rule: RoutingRule, tables: SubsetTables, order_cM: Tensor, gram_cXX: Tensor, affinity_cN: Tensor, num_chosen: int
) -> Tensor:
    """[S]: the squared errors of some tokens, summed."""
    affinity_cM = affinity_cN.gather(1, order_cM)
    weights_cPX = choice_weights(affinity_cM, tables.choices_Pk, renormalise=rule.renormalise, scale=rule.scale)
    if tables.top_k is None:
        full_cX = weights_cPX[:, 0]
    else:
        ordinary_1K = torch.arange(num_chosen, device=order_cM.device)[None]
        full_cX = choice_weights(affinity_cM, ordinary_1K, renormalise=rule.renormalise, scale=rule.scale)[:, 0]
    if gram_cXX.shape[1] > order_cM.shape[1]:  # the residual
        weights_cPX, full_cX = functional.pad(weights_cPX, (0, 1)), functional.pad(full_cX, (0, 1), value=1.0)
    errors_cP = None if rule.rescales_all else choice_errors(weights_cPX, full_cX, gram_cXX)
    total_S = gram_cXX.new_zeros(len(tables.dropped))
    # few tokens at a time where there are many sets: the [tokens, S] look-up then stays in the processor's cache
    step = len(order_cM) if len(tables.dropped) < _SMALL_TABLE else _TOKENS_PER_LOOKUP
    for start in range(0, len(order_cM), step):
        part = slice(start, start + step)
        mask_cS = surviving_ranks(order_cM[part], tables.keep_SN)
        if errors_cP is None:
            choice_cS = tables.choice_of_mask[mask_cS]
            total_S += rescaled_errors(
                weights_cPX[part], full_cX[part], gram_cXX[part], choice_cS, affinity_cN[part], tables.keep_SN
            ).sum(0)
        elif len(tables.choice_of_mask) <= 4 * len(tables.dropped):
            total_S += errors_cP[part][:, tables.choice_of_mask].gather(1, mask_cS).sum(0)
        else:
            total_S += errors_cP[part].gather(1, tables.choice_of_mask[mask_cS]).sum(0)
    return total_S


def _gram_by_id(tokens: RoutedTokens, chunk: RankedChunk) -> Tensor:
    """[c, X, X]: the Gram matrix of all N outputs by their ids, and of the residual."""
    outputs_cXH = with_residual(tokens, chunk)
    rank_cX = torch.arange(outputs_cXH.shape[1], device=outputs_cXH.device).repeat(len(outputs_cXH), 1)
    rank_cX[:, : chunk.order_cM.shape[1]] = chunk.order_cM.argsort(1)
    return gram_of(outputs_cXH.gather(1, rank_cX[..., None].expand(outputs_cXH.shape)))


def _errors_by_replay(tokens: RoutedTokens, tables: SubsetTables, gram_TXX: Tensor) -> Tensor:
    """[S]: the same where ranks do not tell the choice: the router runs again for every set, on all N outputs."""
    num_choices = tokens.layer.num_choices
    has_residual = gram_TXX.shape[1] > num_choices
    full_TX = weights_by_id(tokens.index_TK, tokens.weights_TK, num_choices)
    if has_residual:
        full_TX = functional.pad(full_TX, (0, 1), value=1.0)
    totals = []
    for dropped in tables.dropped:
        kept = [expert for expert in range(tokens.layer.num_experts) if expert not in dropped]
        weights_TN = weights_by_id(*tokens.replay(kept, top_k=tables.top_k), num_choices)
        delta_TX = functional.pad(weights_TN, (0, int(has_residual))) - full_TX
        changed = delta_TX.abs().amax(1) > 0
        delta_cX = delta_TX[changed]
        totals.append((torch.bmm(gram_TXX[changed], delta_cX[..., None])[..., 0] * delta_cX).sum())
    return torch.stack(totals)
