"""The tokens of one layer while experts are dropped: who each token chooses now, what that loses, and what dropping or
swapping one more would change.

With a_i a rank's affinity, c a token's choice among the experts that are left, and D what its weights are divided by
(Σ_c a where weights are renormalised, 1 where they are not, Σ over all experts left of a softmax),

    v = Σ_{i ∈ c} a_i E_i,    output = s v / D,    loss = (s/D)² ⟨v,v⟩ − 2 (s/D) ⟨v,z⟩ + ⟨z,z⟩

with scale s and target z. If rank e leaves the choice and rank x steps in, v' = v − a_e E_e + a_x E_x, so with h = G a
and f = G z only inner products that are there already are needed, O(1) for each candidate:

    ⟨v',v'⟩ = ⟨v,v⟩ + a_e² G_ee + a_x² G_xx − 2 a_e h_e + 2 a_x h_x − 2 a_e a_x G_ex
    ⟨v',z⟩  = ⟨v,z⟩ − a_e f_e + a_x f_x

Dimensions: T tokens, t some of them, E experts, N choices, k chosen per token, M ranks, X columns of the Gram matrix,
B batches, P pairs of a token and a dropped expert that it would choose.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from compressor.model.routing_rule import RoutingRule
from compressor.selection.token_grams import TokenGrams, target_weights

_TOKENS_AT_ONCE = 8192
_GRAMS_AT_ONCE = 1024
_PAIRS_AT_ONCE = 2**14


def bytes_of_token(num_ranks: int, num_columns: int, num_choices: int, top_k: int, *, rescales_all: bool) -> int:
    """What a search keeps of a token; `num_choices` is 0 where affinities of all choices are not kept."""
    grams = 4 * num_columns**2 + (2 + 4) * num_ranks + 4 + 4 * num_choices
    state = (8 + 8) * num_ranks + 8 + 8 + 2 + 4 * 8 + (2 + 4) * top_k
    return grams + state + (8 * top_k if rescales_all else 0)


class TokenState:
    """Tokens with equally many ranks, for one set of experts left; `keep` starts from any. `loss_T` float64: squared
    errors; `removal_BE` float64 [B, E]: a batch's change if an expert goes too.
    """

    def __init__(self, grams: TokenGrams, rule: RoutingRule, *, num_chosen: int, top_k: int, num_batches: int) -> None:
        self.grams, self.rule, self.top_k, self.num_batches = grams, rule, top_k, num_batches
        tokens, device = grams.num_tokens, grams.gram_TXX.device
        self.num_ranks = grams.order_TM.shape[1]
        self.has_residual = grams.gram_TXX.shape[1] > self.num_ranks
        self.is_untouched = num_chosen == top_k and not self.has_residual
        self.batch_T = grams.batch_T.long()
        self.target_TM = torch.empty(tokens, self.num_ranks, dtype=torch.float64, device=device)
        """f: each rank's product with the target."""
        self.target_squared_T = torch.empty(tokens, dtype=torch.float64, device=device)
        for start in range(0, tokens, _GRAMS_AT_ONCE):
            part = slice(start, start + _GRAMS_AT_ONCE)
            full_cX = target_weights(grams, rule, num_chosen, part)
            product_cX = torch.bmm(grams.gram_TXX[part].double(), full_cX[..., None])[..., 0]
            self.target_TM[part] = product_cX[:, : self.num_ranks]
            self.target_squared_T[part] = (product_cX * full_cX).sum(1)
        self.place_Tk = torch.zeros(tokens, top_k, dtype=torch.int16, device=device)
        """The chosen ranks, ascending; M where a token has fewer than k left."""
        self.next_T = torch.zeros(tokens, dtype=torch.int16, device=device)
        """The rank that steps in next, M if there is none."""
        self.product_TM = torch.empty(tokens, self.num_ranks, dtype=torch.float64, device=device)
        """h: each rank's product with the choice."""
        self.squared_T, self.with_target_T, self.divisor_T, self.loss_T = (
            torch.zeros(tokens, dtype=torch.float64, device=device) for _ in range(4)
        )
        self.change_Tk = torch.zeros(tokens, top_k, dtype=torch.float32, device=device)
        """What the loss changes when a chosen expert goes."""
        stored = top_k if rule.rescales_all else 0
        self.squared_after_Tk = torch.zeros(tokens, stored, dtype=torch.float32, device=device)
        """⟨v',v'⟩ − ⟨v,v⟩ of these changes, kept where all of them change with every expert that goes."""
        self.with_target_after_Tk = torch.zeros_like(self.squared_after_Tk)

    # Which ranks are chosen

    def keep(self, is_left_N: Tensor) -> None:
        """Start from this set; choices behind the experts are always left."""
        self.is_left_N = is_left_N.clone()
        if self.rule.rescales_all:
            self.divisor_T = self.grams.score_TN.double() @ is_left_N.double()
        num_experts = len(is_left_N)
        self.removal_BE = torch.zeros(self.num_batches, num_experts, dtype=torch.float64, device=is_left_N.device)
        everything = torch.arange(self.grams.num_tokens, device=is_left_N.device)
        for tokens_t in everything.split(_TOKENS_AT_ONCE):  # type: ignore[no-untyped-call]
            self._choose(tokens_t)
            self._weigh(tokens_t)
        if self.rule.rescales_all:
            self._price_again()

    def set_left(self, expert: int, *, left: bool) -> None:
        """One expert goes, or comes back; only tokens that this can concern are looked at."""
        if left:
            self.is_left_N[expert] = True
            tokens_T = self._would_choose(expert)
        else:
            tokens_T = self._concerned(expert)
            self.is_left_N[expert] = False
        concerned = tokens_T.nonzero()[:, 0]
        if self.rule.rescales_all:
            self._rescale(expert, left=left)
            self._choose(concerned)
            for tokens_t in concerned.split(_TOKENS_AT_ONCE):  # type: ignore[no-untyped-call]
                self._weigh(tokens_t)
            self._price_again()
            return
        for tokens_t in concerned.split(_TOKENS_AT_ONCE):  # type: ignore[no-untyped-call]
            self._count_changes(tokens_t, -1.0)
            self._choose(tokens_t)
            self._weigh(tokens_t)

    def _concerned(self, expert: int) -> Tensor:
        """[T] bool: tokens that choose the expert, or would next; by group also those whose groups hang on it."""
        order_TM = self.grams.order_TM
        last = torch.full((len(order_TM), 1), -1, dtype=torch.int16, device=order_TM.device)
        padded_TM = torch.cat([order_TM, last], dim=1)
        chosen_Tk = padded_TM.gather(1, self.place_Tk.long())
        concerned_T = (chosen_Tk == expert).any(1)
        concerned_T |= padded_TM.gather(1, self.next_T.long()[:, None])[:, 0] == expert
        if self.rule.groups is not None:
            concerned_T |= self._leads_its_group(expert)
        return concerned_T

    def _would_choose(self, expert: int) -> Tensor:
        """[T] bool: tokens that rank the expert above the one that steps in next."""
        rank_TM = torch.arange(self.num_ranks, dtype=torch.int16, device=self.next_T.device)
        concerned_T = ((self.grams.order_TM == expert) & (rank_TM <= self.next_T[:, None])).any(1)
        if self.rule.groups is not None:
            concerned_T |= self._leads_its_group(expert)
        return concerned_T

    def _leads_its_group(self, expert: int) -> Tensor:
        groups = self.rule.groups
        assert groups is not None
        size = len(self.is_left_N) // groups.num_groups
        members = slice(expert // size * size, (expert // size + 1) * size)
        ranking_TX = self._ranking(slice(None))[:, members]
        ranking_TX = ranking_TX.masked_fill(~self.is_left_N[members], float("-inf"))
        second_T = ranking_TX.topk(2, dim=1).values[:, 1]
        return self._ranking(slice(None))[:, expert] >= second_T

    def _ranking(self, part: slice | Tensor) -> Tensor:
        """[c, N] float32: what experts are chosen by."""
        score_cN = self.grams.score_TN[part]
        return score_cN if self.rule.bias is None else score_cN + self.rule.bias.float()

    def _choose(self, tokens_t: Tensor) -> None:
        """Find the chosen ranks, and the next one, of some tokens."""
        order_tM = self.grams.order_TM[tokens_t].long()
        if self.rule.groups is None:
            is_left_tM = self.is_left_N[order_tM]
        else:
            is_left_tM = self._in_chosen_groups(tokens_t).gather(1, order_tM)
        count_tM = is_left_tM.cumsum(1)
        rank_tM = torch.arange(self.num_ranks, device=order_tM.device).expand(order_tM.shape)
        absent = rank_tM.new_full((), self.num_ranks)
        chosen_tM = torch.where(is_left_tM & (count_tM <= self.top_k), rank_tM, absent)
        wanted = min(self.top_k, self.num_ranks)
        self.place_Tk[tokens_t, :wanted] = chosen_tM.sort(1).values[:, :wanted].to(torch.int16)
        self.place_Tk[tokens_t, wanted:] = self.num_ranks
        next_tM = torch.where(is_left_tM & (count_tM == self.top_k + 1), rank_tM, absent)
        self.next_T[tokens_t] = next_tM.amin(1).to(torch.int16)

    def _in_chosen_groups(self, tokens_t: Tensor) -> Tensor:
        """[t, N] bool: experts that are left, in the groups that the token chooses now."""
        groups = self.rule.groups
        assert groups is not None
        ranking_tN = self._ranking(tokens_t).masked_fill(~self.is_left_N, float("-inf"))
        return (groups.within(ranking_tN) == ranking_tN) & self.is_left_N

    # What that loses

    def _weigh(self, tokens_t: Tensor) -> None:
        """Compute products, losses and changes of some tokens whose choice is new."""
        place_tk = self.place_Tk[tokens_t].long()
        is_there_tk = place_tk < self.num_ranks
        place_tk = place_tk.clamp_max(self.num_ranks - 1)
        affinity_tk = self.grams.affinity_TM[tokens_t].double().gather(1, place_tk) * is_there_tk
        rows_tkM = self._rows(tokens_t, place_tk)
        product_tM = torch.bmm(affinity_tk[:, None], rows_tkM)[:, 0]
        self.product_TM[tokens_t] = product_tM
        self.squared_T[tokens_t] = (affinity_tk * product_tM.gather(1, place_tk)).sum(1)
        self.with_target_T[tokens_t] = (affinity_tk * self.target_TM[tokens_t].gather(1, place_tk)).sum(1)
        if self.rule.renormalise:
            self.divisor_T[tokens_t] = affinity_tk.sum(1)
        elif not self.rule.rescales_all:
            self.divisor_T[tokens_t] = 1.0
        self._price(tokens_t, place_tk, is_there_tk, rows_tkM)

    def _rows(self, tokens_t: Tensor, place_tk: Tensor) -> Tensor:
        """[t, k, M] float64: the Gram matrix's rows of the chosen ranks."""
        width = self.grams.gram_TXX.shape[1]
        flat = self.grams.gram_TXX.view(-1, width)
        rows = flat[(tokens_t[:, None] * width + place_tk).reshape(-1)]
        return rows.view(*place_tk.shape, width)[..., : self.num_ranks].double()

    def _price(self, tokens_t: Tensor, place_tk: Tensor, is_there_tk: Tensor, rows_tkM: Tensor) -> None:
        """The loss of some tokens, and what it changes when one of their experts goes; counted in `removal_BE`."""
        next_t = self.next_T[tokens_t].long()
        squared_tk, with_target_tk, out_tk, in_t1 = self._replaced(tokens_t, place_tk, is_there_tk, next_t, rows_tkM)
        if self.rule.rescales_all:  # priced with all others, once D is known
            self.squared_after_Tk[tokens_t] = (squared_tk - self.squared_T[tokens_t][:, None]).float()
            self.with_target_after_Tk[tokens_t] = (with_target_tk - self.with_target_T[tokens_t][:, None]).float()
            return
        divisor_tk = self.divisor_T[tokens_t][:, None]
        if self.rule.renormalise:
            divisor_tk = (divisor_tk - out_tk + in_t1).clamp_min(0.0)
        loss_t = self._loss(tokens_t, self.squared_T[tokens_t], self.with_target_T[tokens_t], self.divisor_T[tokens_t])
        if self.is_untouched:  # exactly 0, so that ties stay ties
            first_k = torch.arange(self.top_k, device=place_tk.device)
            loss_t = loss_t.masked_fill(((place_tk == first_k) & is_there_tk).all(1), 0.0)
        self.loss_T[tokens_t] = loss_t
        entered_tk = self._loss(tokens_t, squared_tk, with_target_tk, divisor_tk)
        self.change_Tk[tokens_t] = ((entered_tk - loss_t[:, None]) * is_there_tk).float()
        self._count_changes(tokens_t, 1.0)

    def _price_again(self) -> None:
        """The same for all tokens, where every expert that goes or comes back changes what all are divided by."""
        self.removal_BE.zero_()
        if not self.grams.num_tokens:
            return
        everything = torch.arange(self.grams.num_tokens, device=self.loss_T.device)
        for tokens_t in everything.split(4 * _TOKENS_AT_ONCE):  # type: ignore[no-untyped-call]
            part = slice(int(tokens_t[0]), int(tokens_t[-1]) + 1)
            place_tk = self.place_Tk[part].long()
            is_there_tk = place_tk < self.num_ranks
            divisor_t = self.divisor_T[part]
            loss_t = self._loss(part, self.squared_T[part], self.with_target_T[part], divisor_t)
            self.loss_T[part] = loss_t
            out_tk = self.grams.affinity_TM[part].gather(1, place_tk.clamp_max(self.num_ranks - 1)).double()
            factor_tk, factor_t1 = self.rule.scale / (divisor_t[:, None] - out_tk), self._factor(divisor_t)[:, None]
            squared_t1, with_target_t1 = self.squared_T[part][:, None], self.with_target_T[part][:, None]
            grown_tk = (factor_tk - factor_t1) * (squared_t1 * (factor_tk + factor_t1) - 2 * with_target_t1)
            replaced_tk = self.squared_after_Tk[part] * factor_tk - 2 * self.with_target_after_Tk[part]
            self.change_Tk[part] = ((grown_tk + replaced_tk * factor_tk) * is_there_tk).float()
            self._count_changes(tokens_t, 1.0)
        self._add_rescaling()

    def _replaced(
        self, tokens_t: Tensor, leaving_tk: Tensor, is_there_tk: Tensor, entering_t: Tensor, rows_tkM: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """⟨v',v'⟩, ⟨v',z⟩ [t, k] for a swap (M: none steps in), affinities of both [t, k], [t, 1]; float64."""
        steps_in_t1 = (entering_t < self.num_ranks)[:, None]
        entering_t1 = entering_t.clamp_max(self.num_ranks - 1)[:, None]
        affinity_tM = self.grams.affinity_TM[tokens_t].double()
        out_tk = affinity_tM.gather(1, leaving_tk) * is_there_tk
        in_t1 = affinity_tM.gather(1, entering_t1) * steps_in_t1
        product_tM, target_tM = self.product_TM[tokens_t], self.target_TM[tokens_t]
        gram_out_tk = rows_tkM.gather(2, leaving_tk[..., None])[..., 0]
        gram_both_tk = rows_tkM.gather(2, entering_t1[:, None].expand(-1, leaving_tk.shape[1], -1))[..., 0]
        gram_in_t1 = self.grams.gram_TXX[tokens_t, entering_t1[:, 0], entering_t1[:, 0]].double()[:, None]
        squared_tk = (
            self.squared_T[tokens_t][:, None]
            + out_tk.square() * gram_out_tk
            + in_t1.square() * gram_in_t1
            - 2 * out_tk * product_tM.gather(1, leaving_tk)
            + 2 * in_t1 * product_tM.gather(1, entering_t1)
            - 2 * out_tk * in_t1 * gram_both_tk
        )
        with_target_tk = (
            self.with_target_T[tokens_t][:, None]
            - out_tk * target_tM.gather(1, leaving_tk)
            + in_t1 * target_tM.gather(1, entering_t1)
        )
        return squared_tk, with_target_tk, out_tk, in_t1

    def _factor(self, divisor: Tensor) -> Tensor:
        """The scale over D; 0 for a token that is left with nothing to choose."""
        return torch.where(divisor > 1e-300, self.rule.scale / divisor, 0.0)

    def _loss(self, tokens_t: Tensor | slice, squared: Tensor, with_target: Tensor, divisor: Tensor) -> Tensor:
        """[t] or [t, k] float64: (s/D)² ⟨v,v⟩ − 2 (s/D) ⟨v,z⟩ + ⟨z,z⟩."""
        target_squared = self.target_squared_T[tokens_t]
        if squared.ndim == 2:
            target_squared = target_squared[:, None]
        factor = self._factor(divisor)
        return squared * factor.square() - 2 * with_target * factor + target_squared

    def _count_changes(self, tokens_t: Tensor, sign: float) -> None:
        """Add the changes of some tokens to `removal_BE`, or take them back."""
        place_tk = self.place_Tk[tokens_t].long().clamp_max(self.num_ranks - 1)
        expert_tk = self.grams.order_TM[tokens_t].long().gather(1, place_tk)
        cell_tk = self.batch_T[tokens_t][:, None] * self.removal_BE.shape[1] + expert_tk
        change_tk = sign * self.change_Tk[tokens_t].double()
        self.removal_BE.view(-1).index_add_(0, cell_tk.reshape(-1), change_tk.reshape(-1))

    def losses(self) -> Tensor:
        """[B] float64: each batch's squared error."""
        total_B = torch.zeros(self.num_batches, dtype=torch.float64, device=self.loss_T.device)
        return total_B.index_add_(0, self.batch_T, self.loss_T)

    def short(self) -> Tensor:
        """[T] bool: tokens with fewer known ranks left than they choose."""
        return self.place_Tk[:, -1] >= self.num_ranks

    # Where dropping an expert rescales everybody

    def _rescale(self, expert: int, *, left: bool) -> None:
        change_T = self.grams.score_TN[:, expert].double()
        self.divisor_T += change_T if left else -change_T

    def _add_rescaling(self) -> None:
        """Add to `removal_BE` what the tokens lose that did not choose the expert.

        With g = a_e / (D − a_e) their output grows by 1 + g, so the loss changes by 2g (⟨u,u⟩ − ⟨u,z⟩) + g² ⟨u,u⟩.
        """
        slope_T, squared_T = self._slope_and_square()
        borders = [0, *torch.bincount(self.batch_T, minlength=self.num_batches).cumsum(0).tolist()]
        for batch in range(self.num_batches):
            for start in range(borders[batch], borders[batch + 1], _TOKENS_AT_ONCE):
                part = slice(start, min(start + _TOKENS_AT_ONCE, borders[batch + 1]))
                growth_cN = self._growth(part)
                row_E = slope_T[part] @ growth_cN + squared_T[part] @ growth_cN.square_()
                self.removal_BE[batch] += row_E.double()

    def _slope_and_square(self) -> tuple[Tensor, Tensor]:
        """[T] float32: 2 (⟨u,u⟩ − ⟨u,z⟩) and ⟨u,u⟩."""
        factor_T = self._factor(self.divisor_T)
        squared_T = self.squared_T * factor_T.square()
        return (2 * (squared_T - self.with_target_T * factor_T)).float(), squared_T.float()

    def _growth(self, part: slice) -> Tensor:
        """[c, N] float32: g of every expert that is left and not chosen, else 0."""
        score_cN = self.grams.score_TN[part]
        growth_cN = score_cN / (self.divisor_T[part].float()[:, None] - score_cN)
        growth_cN[:, ~self.is_left_N] = 0.0
        place_ck = self.place_Tk[part].long()
        chosen_ck = self.grams.order_TM[part].long().gather(1, place_ck.clamp_max(self.num_ranks - 1))
        return growth_cN.scatter_(1, chosen_ck, 0.0)

    # What a swap would change

    def swaps(self, first: int, last: int) -> Tensor:
        """[B, N, last − first] float64: what changes if a row's expert goes and a column's (`first` …) comes back; an
        estimate, of tokens that choose one of the two, where all are rescaled, or experts are chosen by group.
        """
        size, num_experts = last - first, self.removal_BE.shape[1]
        table = torch.zeros(self.num_batches * num_experts * size, dtype=torch.float64, device=self.loss_T.device)
        alone = torch.zeros(self.num_batches * size, dtype=torch.float64, device=self.loss_T.device)
        for tokens_p, rank_p in self._could_come_back(first, last):
            expert_p = self.grams.order_TM[tokens_p, rank_p].long() - first
            place_pk = self.place_Tk[tokens_p].long()
            is_there_pk, inside_pk = place_pk < self.num_ranks, place_pk.clamp_max(self.num_ranks - 1)
            rows_pkM = self._rows(tokens_p, inside_pk)
            squared_pk, with_target_pk, out_pk, in_p1 = self._replaced(
                tokens_p, inside_pk, is_there_pk, rank_p, rows_pkM
            )
            divisor_pk = self.divisor_T[tokens_p][:, None].expand(out_pk.shape)
            if self.rule.renormalise or self.rule.rescales_all:  # of a softmax, one goes and one comes back
                divisor_pk = (divisor_pk - out_pk + in_p1).clamp_min(0.0)
            replaced_pk = self._loss(tokens_p, squared_pk, with_target_pk, divisor_pk)
            loss_p1 = self.loss_T[tokens_p][:, None]
            enters_p = rank_p < place_pk[:, -1]  # it comes in by itself, for the last one
            inserted_p = torch.where(enters_p, replaced_pk[:, -1] - loss_p1[:, 0], 0.0)
            batch_p = self.batch_T[tokens_p]
            alone.index_add_(0, batch_p * size + expert_p, inserted_p)
            more_pk = replaced_pk - loss_p1 - self.change_Tk[tokens_p].double() - inserted_p[:, None]
            leaving_pk = self.grams.order_TM[tokens_p].long().gather(1, inside_pk)
            cell_pk = (batch_p[:, None] * num_experts + leaving_pk) * size + expert_p[:, None]
            table.index_add_(0, cell_pk.reshape(-1), (more_pk * is_there_pk).reshape(-1))
        swapped = table.view(self.num_batches, num_experts, size) + alone.view(self.num_batches, 1, size)
        if self.rule.rescales_all:
            swapped += self._shrinking(first, last)[:, None]
        return swapped + self.removal_BE[:, :, None]

    def _shrinking(self, first: int, last: int) -> Tensor:
        """[B, last − first]: what changes for tokens that would not choose the expert that comes back."""
        slope_T, squared_T = self._slope_and_square()
        total = torch.zeros(self.num_batches, last - first, dtype=torch.float64, device=self.loss_T.device)
        for start in range(0, self.grams.num_tokens, _TOKENS_AT_ONCE):
            part = slice(start, start + _TOKENS_AT_ONCE)
            score_cN = self.grams.score_TN[part].clone()
            rank_M = torch.arange(self.num_ranks, device=score_cN.device)
            above_cM = rank_M <= self.next_T[part].long()[:, None]
            order_cM = self.grams.order_TM[part].long()
            score_cN.scatter_(1, order_cM, score_cN.gather(1, order_cM) * ~above_cM)
            score_cY = score_cN[:, first:last]
            growth_cY = -score_cY / (self.divisor_T[part].float()[:, None] + score_cY)
            change_cY = slope_T[part, None] * growth_cY + squared_T[part, None] * growth_cY.square()
            total.index_add_(0, self.batch_T[part], change_cY.double())
        return total

    def _could_come_back(self, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs (token, rank) of dropped experts `first` … that a token ranks above the one that steps in next."""
        rank_M = torch.arange(self.num_ranks, device=self.next_T.device)
        wanted_N = ~self.is_left_N
        wanted_N[:first] = False
        wanted_N[last:] = False
        for start in range(0, self.grams.num_tokens, _TOKENS_AT_ONCE):
            part = slice(start, start + _TOKENS_AT_ONCE)
            is_one_cM = wanted_N[self.grams.order_TM[part].long()] & (rank_M < self.next_T[part].long()[:, None])
            tokens_p, rank_p = is_one_cM.nonzero(as_tuple=True)
            for begin in range(0, len(tokens_p), _PAIRS_AT_ONCE):
                few = slice(begin, begin + _PAIRS_AT_ONCE)
                yield tokens_p[few] + start, rank_p[few]
