"""Losses of single experts, exactly, and of pairs, approximately: a matrix that adds up over tokens and files.

With u = Σ_e w_e E_e the layer's output for a token, dropping expert e alone changes it by

    Δ_e = Σ_{x in the choice without e} w_x(−e) E_x  −  u

where the token's next expert steps in. The matrix is, summed over tokens,

    M_ee = ‖Δ_e‖²                      the exact squared error of dropping e alone
    M_ij = w_i w_j ⟨E_i, E_j⟩          for i ≠ j among the token's experts

and 1_Dᵀ M 1_D estimates the squared error of dropping the set D (against the layer's own output, in progressive
pruning too). It needs one rank more than the layer chooses, adds
up over tokens, domains and files, and was 1.00–1.12 times the best loss found by the search on 108 layers: for machines
on which the search itself has no room.

Dimensions: c tokens, T tokens of a batch, N choices (experts and what else can be chosen), E experts, K chosen per
token, M = K + 1 ranks, D domains, B batches, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from compressor.model.routed_tokens import RankedChunk, RoutedTokens
from compressor.model.routing_rule import RoutingRule
from compressor.model.rule_fitting import weights_by_id
from compressor.model.structure import MoELayer
from compressor.observe.statistic import RankedStatistic
from compressor.selection.exact import keeps_order

_TOKENS_AT_ONCE = 512


class PairLosses(RankedStatistic):
    """The matrix M per domain."""

    def __init__(self, layer: MoELayer) -> None:
        self.layer = layer
        self._domains: dict[str, int] = {}
        self._matrices_NN: list[Tensor] = []
        self._single_N = torch.empty(0)
        """Its diagonal, of the batch at hand."""
        self._tokens: RoutedTokens | None = None
        self._grams: list[Tensor] = []

    def _by_ranks(self, tokens: RoutedTokens) -> bool:
        return tokens.rule is not None and keeps_order(tokens.rule)

    def num_ranks(self, tokens: RoutedTokens) -> int:
        """One more than are chosen; all, where the router itself has to be asked who steps in."""
        if self._tokens is not tokens:
            self._begin(tokens)
        size = self.layer.num_choices
        return min(size, self.layer.top_k + 1) if self._by_ranks(tokens) else size

    def _begin(self, tokens: RoutedTokens) -> None:
        size, device = self.layer.num_choices, tokens.hidden_TH.device
        self._tokens = tokens
        domain = self._domains.setdefault(tokens.domain, len(self._domains))
        if domain == len(self._matrices_NN):
            self._matrices_NN.append(torch.zeros(size, size, dtype=torch.float64, device=device))
        self._single_N = torch.zeros(size, dtype=torch.float64, device=device)

    def add(self, tokens: RoutedTokens, chunk: RankedChunk) -> None:
        matrix_NN = self._matrices_NN[self._domains[tokens.domain]]
        gram_cMM = chunk.gram()
        weights_cK = tokens.weights_TK[chunk.start : chunk.stop].double()
        index_cK = chunk.order_cM[:, : weights_cK.shape[1]]
        num_chosen = index_cK.shape[1]
        add_pairs(matrix_NN, index_cK, weights_cK, gram_cMM[:, :num_chosen, :num_chosen])
        if self._by_ranks(tokens):
            assert tokens.rule is not None
            affinity_cN = tokens.rule.affinity(tokens.logits_TE[chunk.start : chunk.stop])
            add_single(self._single_N, tokens.rule, affinity_cN, chunk.order_cM, gram_cMM, num_chosen)
        else:
            rank_cN = chunk.order_cM.argsort(1)
            rows = gram_cMM.gather(1, rank_cN[:, :, None].expand(gram_cMM.shape))
            self._grams.append(rows.gather(2, rank_cN[:, None, :].expand(gram_cMM.shape)))

    def end_batch(self, tokens: RoutedTokens) -> None:
        """Where the router has to be asked, it is asked now, once for every expert."""
        if self._grams:
            self._single_N = single_by_replay(tokens, torch.cat(self._grams))
            self._grams = []
        matrix_NN = self._matrices_NN[self._domains[tokens.domain]]
        matrix_NN.diagonal().add_(self._single_N)
        self._tokens = None

    def tensors(self) -> dict[str, Tensor]:
        """pairs.loss [D, E, E] float64."""
        experts = slice(self.layer.num_experts)
        return {"pairs.loss": torch.stack(self._matrices_NN)[:, experts, experts].contiguous().cpu()}


def add_pairs(matrix_NN: Tensor, index_cK: Tensor, weights_cK: Tensor, gram_cKK: Tensor) -> None:
    """Add w_i w_j ⟨E_i, E_j⟩ of each token's chosen experts i ≠ j, in place."""
    products_cKK = weights_cK[:, :, None] * weights_cK[:, None, :] * gram_cKK
    products_cKK.diagonal(dim1=1, dim2=2).zero_()
    places_cKK = index_cK[:, :, None] * len(matrix_NN) + index_cK[:, None, :]
    matrix_NN.view(-1).index_add_(0, places_cKK.reshape(-1), products_cKK.reshape(-1))


def add_single(
    single_N: Tensor, rule: RoutingRule, affinity_cN: Tensor, order_cM: Tensor, gram_cMM: Tensor, num_chosen: int
) -> None:
    """Add the squared error of dropping each expert alone, in place: Δ_eᵀ G Δ_e in weights of the token's M ranks."""
    affinity_cM = affinity_cN.gather(1, order_cM)
    full_cM = affinity_cM.clone()
    full_cM[:, num_chosen:] = 0.0
    without_cKM = full_cM[:, None].repeat(1, num_chosen, 1)
    without_cKM.diagonal(dim1=1, dim2=2).zero_()  # the dropped one
    without_cKM[:, :, num_chosen:] = affinity_cM[:, None, num_chosen:]  # the next one steps in, if there is one
    if rule.renormalise:
        full_cM = full_cM / full_cM.sum(1, keepdim=True)
        without_cKM = without_cKM / without_cKM.sum(2, keepdim=True)
    elif rule.rescales_all:
        chosen_cK = order_cM[:, :num_chosen]
        # 1 − a, as the sum of the others: exact where a token is all but sure of one expert
        rest_cN = affinity_cN @ (1.0 - torch.eye(len(single_N), dtype=torch.float64, device=single_N.device))
        without_cKM = without_cKM / rest_cN.gather(1, chosen_cK)[..., None]
        # who did not choose the expert is rescaled by 1/(1 − a) = 1 + g: ‖g u‖²
        growth_cN = (affinity_cN / rest_cN).scatter(1, chosen_cK, 0.0)
        squared_c = torch.einsum("cm,cmn,cn->c", full_cM, gram_cMM, full_cM) * rule.scale**2
        single_N += squared_c @ growth_cN.square()
    delta_cKM = rule.scale * (without_cKM - full_cM[:, None])
    errors_cK = (torch.bmm(delta_cKM, gram_cMM) * delta_cKM).sum(-1)
    single_N.index_add_(0, order_cM[:, :num_chosen].reshape(-1), errors_cK.reshape(-1))


def single_by_replay(tokens: RoutedTokens, gram_TNN: Tensor) -> Tensor:
    """[N]: the same where only the router knows who steps in: all N outputs (N / K forwards), T·N² Grams, float64."""
    num_experts, size = tokens.layer.num_experts, tokens.layer.num_choices
    full_TN = weights_by_id(tokens.index_TK, tokens.weights_TK, size)
    single_N = full_TN.new_zeros(size)
    for expert in range(num_experts):
        kept = [other for other in range(num_experts) if other != expert]
        delta_TN = weights_by_id(*tokens.replay(kept), size) - full_TN
        for changed_t in torch.split((delta_TN != 0).any(1).nonzero()[:, 0], _TOKENS_AT_ONCE):
            delta_tN = delta_TN[changed_t]
            single_N[expert] += torch.einsum("tm,tmn,tn->", delta_tN, gram_TNN[changed_t], delta_tN)
    return single_N


def fewest_losses(
    pairs_EE: Tensor,
    num_kept: int,
    num_groups: int = 1,
    *,
    protected: Sequence[int] = (),
    forbidden: Sequence[int] = (),
) -> list[int]:
    """The experts to keep for the least Σ_{i, j dropped} M_ij: greedy, then swaps; lowest id first, even groups."""
    dropped, _, _ = searched(
        pairs_EE[None], len(pairs_EE) - num_kept, lambda loss_D: loss_D[..., 0], num_groups, protected, forbidden
    )
    return [expert for expert in range(len(pairs_EE)) if expert not in dropped]


def searched(
    pairs_DEE: Tensor,
    num_dropped: int,
    value: Callable[[Tensor], Tensor],
    num_groups: int = 1,
    protected: Sequence[int] = (),
    forbidden: Sequence[int] = (),
) -> tuple[list[int], list[int], int]:
    """(experts to drop, those before the swaps, how many swaps) for the least value(Σ_{i, j dropped} M_ij) of D
    matrices; `value` answers one number for [..., D]. Forbidden ones first, then the lowest id; even groups.
    """
    size = pairs_DEE.shape[1]
    own_ED, group_E = pairs_DEE.diagonal(dim1=1, dim2=2).T, torch.arange(size) // (size // num_groups)
    is_in_E, stays_E, first_E = (torch.zeros(size, dtype=torch.bool) for _ in range(3))
    stays_E[list(protected)] = first_E[list(forbidden)] = True
    rounding = 1e-12 * float(value(pairs_DEE.abs().sum((1, 2))))

    def state() -> tuple[Tensor, Tensor]:
        """[E, D] Σ_{j dropped} M_ej; [D] Σ_{i, j dropped} M_ij."""
        with_ED = pairs_DEE[:, :, is_in_E].sum(-1).T
        return with_ED, with_ED[is_in_E].sum(0)

    for _ in range(num_dropped):
        with_ED, loss_D = state()
        full_E = torch.bincount(group_E[is_in_E], minlength=num_groups)[group_E] >= num_dropped // num_groups
        barred_E = is_in_E | stays_E | full_E
        if (waiting_E := first_E & ~barred_E).any():
            barred_E = ~waiting_E
        value_E = value(loss_D + own_ED + 2 * with_ED)
        is_in_E[int(value_E.masked_fill(barred_E, torch.inf).argmin())] = True
    before = is_in_E.nonzero()[:, 0].tolist()
    may_swap_EE = ~first_E[:, None] & ~stays_E[None, :] & (group_E[:, None] == group_E[None, :])
    for swaps in range(size * size):
        with_ED, loss_D = state()
        change_EED = (own_ED - 2 * with_ED)[:, None] + (own_ED + 2 * with_ED)[None, :] - 2 * pairs_DEE.permute(1, 2, 0)
        possible_EE = may_swap_EE & is_in_E[:, None] & ~is_in_E[None, :]
        value_EE = value(loss_D + change_EED).masked_fill(~possible_EE, torch.inf)
        back, gone = divmod(int(value_EE.argmin()), size)
        if not float(value_EE[back, gone]) < float(value(loss_D)) - rounding:
            return is_in_E.nonzero()[:, 0].tolist(), before, swaps
        is_in_E[back], is_in_E[gone] = False, True
    raise AssertionError("every swap loses less than the one before")
