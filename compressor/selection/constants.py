"""Experts that answer a constant instead of being dropped: the constants, and which experts (MoNE, arXiv 2507.00390).

The router stays as it is, and nothing is renormalised, so replacing the experts P changes a token's output by
Σ_{e in P, chosen} w_e (E_e − c_e), whoever else is chosen. Summed over tokens that is one quadratic form, exact for
every set, from the chosen experts' outputs alone:

    c_e  = Σ w_e² E_e / Σ w_e²                        over the tokens that chose e: what loses least where e alone goes
    F_ij = Σ w_i w_j ⟨E_i − c_i, E_j − c_j⟩           over the tokens that chose both
    e(P) = Σ_{i, j in P} F_ij                         squared error of the layer's output

One look is enough, since with G_ij = Σ w_i w_j ⟨E_i, E_j⟩, A_ij = Σ w_i w_j E_i and W_ij = Σ w_i w_j

    F_ij = G_ij − ⟨c_j, A_ij⟩ − ⟨c_i, A_ji⟩ + ⟨c_i, c_j⟩ W_ij,     c_i = A_ii / W_ii

The paper takes the plain mean for c_e and a criterion for P; these lose more. F is kept by domain; in c a domain's sums
count 1/Σ‖z‖², z being the layer's output on it, so that none rules by its size. What is minimised is e_D(P) / Σ‖z‖²,
blended as `objective` does losses: squares, not the roots that a search takes for each batch. Chosen on the demo model
(docs/log.md has the figures); with one domain it is the paper's error of the output.

Dimensions: c tokens of a chunk, K chosen per token, E experts, D domains, S sets, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations, islice
from math import comb, sqrt

import torch
from torch import Tensor

from compressor.errors import UnsupportedModelError
from compressor.model.routed_tokens import RankedChunk, RoutedTokens
from compressor.model.structure import MoELayer
from compressor.observe.reductions import Rule
from compressor.observe.statistic import RankedStatistic
from compressor.selection.choose import AGAIN, Choice, Fixed, kept_and_dropped, losses
from compressor.selection.objective import Blend, Objective
from compressor.selection.pair_losses import searched
from compressor.selection.scores import ChoiceError

VALUES, ERRORS = "constants.value", "constants.error"
_SETS_AT_ONCE = 4096


class ConstantErrors(RankedStatistic):
    """The constants and F. Memory: 8 · D · E² · H bytes while a layer is observed."""

    own_rules: Mapping[str, Rule] = {VALUES: "same", ERRORS: "summed"}

    def __init__(self, layer: MoELayer, *, must: bool = True) -> None:
        self.layer, self.must = layer, must
        self._is_known = True
        """Whether constants can stand for its experts, as far as was seen. Where they `must`, not is an error."""
        self._sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        """Domain → G [E, E], W [E, E], A [E, E, H]; float64."""
        self._squared_output: dict[str, float] = {}
        self._values_EH: Tensor | None = None

    def num_ranks(self, tokens: RoutedTokens) -> int:
        return tokens.index_TK.shape[1]

    def add(self, tokens: RoutedTokens, chunk: RankedChunk) -> None:
        """Add some tokens. Raises UnsupportedModelError where the block changes what its experts have answered."""
        if tokens.lift is not None or not tokens.at_block:
            if self.must:
                raise UnsupportedModelError(
                    f"{self.layer.path}: its block changes what its experts answer, so constants cannot stand for them."
                )
            self._is_known = False
            return
        size, (_, num_chosen, hidden) = self.layer.num_experts, chunk.outputs_cMH.shape
        if tokens.domain not in self._sums:
            empty = torch.zeros(size, size, dtype=torch.float64, device=chunk.outputs_cMH.device)
            self._sums[tokens.domain] = (empty, empty.clone(), empty[..., None].repeat(1, 1, hidden))
        gram_EE, weight_EE, output_EEH = self._sums[tokens.domain]
        index_cK, weights_cK = chunk.order_cM, tokens.weights_TK[chunk.start : chunk.stop].double()
        weights_cKK = weights_cK[:, :, None] * weights_cK[:, None, :]
        gram_cKK = torch.bmm(chunk.outputs_cMH, chunk.outputs_cMH.mT)  # float32 will do: F is far above its rounding
        place_P = (index_cK[:, :, None] * size + index_cK[:, None, :]).reshape(-1)
        weight_EE.view(-1).index_add_(0, place_P, weights_cKK.reshape(-1))
        gram_EE.view(-1).index_add_(0, place_P, (weights_cKK * gram_cKK).reshape(-1))
        weights_cE = weights_cK.new_zeros(len(weights_cK), size).scatter_(1, index_cK, weights_cK).float()
        expert_P, outputs_PH = index_cK.reshape(-1), chunk.outputs_cMH.reshape(-1, hidden)
        order_P, counts = expert_P.argsort(stable=True), torch.bincount(expert_P, minlength=size).tolist()
        for expert, own_p in enumerate(torch.split(order_P, counts)):
            weights_pE = weights_cE.index_select(0, own_p // num_chosen)
            both_pE = weights_pE * weights_pE[:, expert, None]
            output_EEH[expert] += both_pE.T @ outputs_PH.index_select(0, own_p)

    def end_batch(self, tokens: RoutedTokens) -> None:
        so_far = self._squared_output.get(tokens.domain, 0.0)
        self._squared_output[tokens.domain] = so_far + float(tokens.squared_output)

    def again(self) -> bool:
        """No; but by now the constants are those of all processes."""
        self._is_known = all(self.processes.exchange(self._is_known))
        squared: dict[str, float] = {}
        for of_process in self.processes.exchange(self._squared_output):
            squared = {name: squared.get(name, 0.0) + of_process.get(name, 0.0) for name in {**squared, **of_process}}
        hidden = max(self.processes.exchange(max((one.shape[-1] for *_, one in self._sums.values()), default=0)))
        numerator_EH = torch.zeros(self.layer.num_experts, hidden, dtype=torch.float64)
        weight_E = torch.zeros(self.layer.num_experts, dtype=torch.float64)
        for domain, (_, weight_EE, output_EEH) in self._sums.items():
            numerator_EH += output_EEH.diagonal().T.cpu() / (squared[domain] or 1.0)
            weight_E += weight_EE.diagonal().cpu() / (squared[domain] or 1.0)
        weight_E = self.processes.sum(weight_E)
        values_EH = self.processes.sum(numerator_EH) / weight_E.masked_fill(weight_E == 0, 1.0)[:, None]
        self._values_EH = values_EH.float()  # as they will be stored
        return False

    def tensors(self) -> dict[str, Tensor]:
        """constants.value [E, H] float32, 0 of an expert that no token chose; constants.error [D, E, E] float64. None
        where the experts cannot answer constants.
        """
        assert self._values_EH is not None, "`again` has been asked"
        if not self._is_known:
            return {}
        errors_DEE = []
        for gram_EE, weight_EE, output_EEH in self._sums.values():
            values_EH = self._values_EH.double().to(gram_EE.device)
            crossed_EE = torch.einsum("ijh,jh->ij", output_EEH, values_EH)
            errors_DEE.append((gram_EE - crossed_EE - crossed_EE.T + values_EH @ values_EH.T * weight_EE).cpu())
        empty = torch.zeros(0, self.layer.num_experts, self.layer.num_experts, dtype=torch.float64)
        return {VALUES: self._values_EH, ERRORS: torch.stack(errors_DEE) if errors_DEE else empty}


def by_constants(
    layer: MoELayer, figures: Mapping[str, Tensor], num_kept: int, objective: Objective, fixed: Fixed, most_sets: int
) -> tuple[Choice, float]:
    """(the set that loses least, its cost): of all sets up to `most_sets`, else by greedy removal and best swaps."""
    errors_DEE, num_dropped = _errors_of(figures), layer.num_experts - num_kept
    free = [e for e in range(layer.num_experts) if e not in {*fixed.staying, *fixed.forbidden}]
    num_free = num_dropped - len(fixed.forbidden)
    found: Choice
    if comb(len(free), num_free) <= most_sets:
        sets = ((*fixed.forbidden, *more) for more in combinations(free, num_free))
        value_S, dropped = _best_set(errors_DEE, sets, objective)
        found = {"search": "exact", "sets": len(value_S)}
    else:
        value = partial(minimised, objective)
        dropped, before, swaps = searched(errors_DEE, num_dropped, value, 1, fixed.staying, fixed.forbidden)
        found = {"search": "greedy", "swaps": swaps}
        found["loss_before_swaps"] = lost_by(figures, before, objective)[0]["loss"]
    lost, cost = lost_by(figures, dropped, objective)
    return kept_and_dropped(layer, dropped) | lost | found, cost


def lost_by(figures: Mapping[str, Tensor], dropped: Sequence[int], objective: Objective) -> tuple[Choice, float]:
    """(the losses of replacing these experts, their cost in the output's units)."""
    squared_D = _errors_of(figures)[:, dropped][:, :, dropped].sum((1, 2))
    value, found = float(minimised(objective, squared_D)), losses(objective, squared_D)
    if not objective.is_relative:
        return found, sqrt(value)
    return found | {"objective": sqrt(value)}, sqrt(value * float(objective.norm_D.square().mean()))


def minimised(objective: Objective, squared_D: Tensor) -> Tensor:
    """[..., D] squared errors → [...]: blended as losses are, each relative to the squared size of the output."""
    return replace(objective, norm_D=objective.norm_D.square()).of_losses(squared_D.clamp_min(0.0))


def objective_of(figures: Mapping[str, Tensor], domains: Sequence[str], blend: Blend) -> Objective:
    """Whose losses are blended: each domain's text is one batch."""
    squared_D = torch.zeros(len(domains), dtype=torch.float64)
    squared_D.index_add_(0, figures["batch.domain"], figures["batch.squared_output"])
    return Objective.of_batches(domains, squared_D, blend)


def values_of(figures: Mapping[str, Tensor]) -> Tensor:
    """[E, H] float32: what each expert would answer. Raises ChoiceError where it was not gathered."""
    _errors_of(figures)
    return figures[VALUES]


def _errors_of(figures: Mapping[str, Tensor]) -> Tensor:
    if ERRORS not in figures:
        raise ChoiceError(f"no constants were gathered; {AGAIN} with `replace: constants`")
    return figures[ERRORS]


def _best_set(errors_DEE: Tensor, sets: Iterable[Sequence[int]], objective: Objective) -> tuple[Tensor, list[int]]:
    """([S] what is minimised, of all sets; the first of the best)."""
    found, best, dropped = [], float("inf"), [0]
    rest = iter(sets)
    while part := list(islice(rest, _SETS_AT_ONCE)):
        is_in_SE = torch.zeros(len(part), errors_DEE.shape[1], dtype=torch.float64)
        is_in_SE.scatter_(1, torch.tensor(part, dtype=torch.int64).reshape(len(part), -1), 1.0)
        squared = [((is_in_SE @ one_EE) * is_in_SE).sum(1) for one_EE in errors_DEE]
        value_S = minimised(objective, torch.stack(squared, -1))
        found.append(value_S)
        if float(value_S.min()) < best:
            best, dropped = float(value_S.min()), list(part[int(value_S.argmin())])
    return torch.cat(found), dropped
