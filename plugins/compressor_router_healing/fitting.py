"""The fit of a layer's router rows and expert scales. Dimensions: T tokens, c of a chunk, P of a probe, E experts, M
candidates of a token, K chosen, H hidden size.

The layer puts out Σ_m a_m f_m over a token's M best experts, a_m = s_m w_m with w_m = 0 where it is not chosen; and the
original put out y. With G_mn = ⟨f_m, f_n⟩ and b_m = ⟨f_m, y⟩ the token's loss is ‖y‖² − 2 aᵀb + aᵀGa: outputs need not
be kept. What changes is R, by Δ: the router's logits become z + Δx, and its own rule makes weights of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compressor.plugin import (
    MoELayer,
    Processes,
    RankedChunk,
    RankedStatistic,
    RoutedTokens,
    RoutingRule,
    Rule,
    UnsupportedModelError,
)

_PROBE = 16


@dataclass
class Seen:
    """What is kept of a text's tokens: x [T, H], z [T, E], candidates' ids [T, M], G [T, M, M], b [T, M], ‖y‖² [T]."""

    hidden: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    order: list[Tensor] = field(default_factory=list)
    gram: list[Tensor] = field(default_factory=list)
    cross: list[Tensor] = field(default_factory=list)
    energy: list[Tensor] = field(default_factory=list)

    def joined(self) -> dict[str, Tensor]:
        """Each as one tensor, all of them empty where there is no token."""
        return {name: torch.cat(parts) if parts else torch.empty(0) for name, parts in vars(self).items()}


def weights_of(rule: RoutingRule, top_k: int, logits_TE: Tensor, order_TM: Tensor) -> Tensor:
    """[T, M] float64: the weights of the candidates by the router's rule, 0 where one is not chosen. None but they can
    be.
    """
    affinity_TE = rule.affinity(logits_TE)
    ranking_TE = rule.ranking(affinity_TE)
    if rule.groups is not None:
        ranking_TE = rule.groups.within(ranking_TE)
    chosen_TK = ranking_TE.gather(1, order_TM).topk(top_k, dim=-1).indices
    weights_TK = affinity_TE.gather(1, order_TM).gather(1, chosen_TK)
    if rule.renormalise:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    return torch.zeros_like(order_TM, dtype=torch.float64).scatter(1, chosen_TK, weights_TK * rule.scale)


def losses(seen: Mapping[str, Tensor], rule: RoutingRule, top_k: int, change_EH: Tensor, scale_E: Tensor) -> Tensor:
    """[T] float32: each token's loss with the router's rows changed by Δ and the experts' outputs scaled by s."""
    logits_TE = seen["logits"] + seen["hidden"].float() @ change_EH.T
    weights_TM = weights_of(rule, top_k, logits_TE, seen["order"]) * scale_E[seen["order"]]
    a_TM = weights_TM.float()
    products_TM = torch.bmm(seen["gram"], a_TM[:, :, None])[:, :, 0]
    found_T: Tensor = seen["energy"] + (a_TM * (products_TM - 2 * seen["cross"])).sum(-1)
    return found_T


class RouterFit(RankedStatistic):
    """Δ [E, H] and s [E] of a layer with the least loss on calibration text, and the losses on both texts, as shares of
    Σ ‖y‖²: fitted when all batches have been seen, of which nothing else is kept.
    """

    own_rules: Mapping[str, Rule] = {"fit.": "same"}

    def __init__(self, layer: MoELayer, steps: int, min_tokens: int) -> None:
        self._layer, self._steps, self._min_tokens = layer, steps, min_tokens
        self._seen = {False: Seen(), True: Seen()}
        self._rule: RoutingRule | None = None
        self._found: dict[str, Tensor] = {}

    def num_ranks(self, tokens: RoutedTokens) -> int:
        """Twice as many as are chosen: what other rows may choose instead."""
        return min(self._layer.num_experts, 2 * tokens.layer.top_k)

    def add(self, tokens: RoutedTokens, chunk: RankedChunk) -> None:
        """Keep a chunk's tokens."""
        if tokens.rule is None:
            raise UnsupportedModelError(
                f"{self._layer.path}: its router follows no rule in closed form, so its rows cannot be fitted."
            )
        assert tokens.target_TH is not None
        self._rule, seen = tokens.rule, self._seen[tokens.held_out]
        part = slice(chunk.start, chunk.stop)
        outputs_cXH = torch.cat([chunk.outputs_cMH, tokens.target_TH[part, None].float()], dim=1)
        gram_cXX = RankedChunk(chunk.start, chunk.stop, chunk.order_cM, outputs_cXH).gram().float().cpu()
        seen.hidden.append(tokens.hidden_TH[part].cpu())
        seen.logits.append(tokens.logits_TE[part, : self._layer.num_experts].float().cpu())
        seen.order.append(chunk.order_cM.cpu())
        seen.gram.append(gram_cXX[:, :-1, :-1])
        seen.cross.append(gram_cXX[:, :-1, -1])
        seen.energy.append(gram_cXX[:, -1, -1])

    def again(self) -> bool:
        """Fit, all processes together."""
        seen, held_out = (self._seen[name].joined() for name in (False, True))
        self._seen = {False: Seen(), True: Seen()}
        fit = Fit(self._layer, self._rule, seen, held_out, self.processes)
        found = {"tokens": fit.num_tokens}
        if fit.num_tokens >= self._min_tokens:
            with torch.enable_grad():
                found |= fit.found(self._steps)
        self._found = {f"fit.{name}": one for name, one in found.items()}
        return False

    def tensors(self) -> dict[str, Tensor]:
        """`fit.tokens`; and, where these are enough, what `Fit.found` finds."""
        return self._found


class Fit:
    """The fit of one layer: Adam on all tokens at once, whose every tenth chooses among the steps."""

    def __init__(
        self,
        layer: MoELayer,
        rule: RoutingRule | None,
        seen: Mapping[str, Tensor],
        held_out: Mapping[str, Tensor],
        processes: Processes,
    ) -> None:
        self._layer, self._rule, self._processes, self._held_out = layer, rule, processes, held_out
        is_judge = torch.arange(len(seen["energy"])) % 10 == 9
        self._fitted = {name: one[~is_judge] for name, one in seen.items()}
        self._judged = {name: one[is_judge] for name, one in seen.items()}
        self.num_tokens = processes.sum(torch.tensor(len(seen["energy"])))
        parts = processes.gather({name: seen[name][:_PROBE].float() for name in ("hidden", "logits")})
        self._probe = next((part for part in parts if len(part["hidden"])), parts[0])
        self._squares = float(processes.sum(seen["hidden"].double().square().sum()))

    def found(self, steps: int) -> dict[str, Tensor]:
        """`rows` Δ [E, H], `scales` [E], `losses` [2] on held-out text, before and after, as shares of Σ ‖y‖²; and some
        tokens' x and z, by which an edit sees that the router's rows are what x is multiplied with: `hidden` [P, H],
        `logits` [P, E].
        """
        probe = self._probe
        rows_EH = torch.zeros(self._layer.num_experts, probe["hidden"].shape[1], requires_grad=True)
        off_E = torch.zeros(self._layer.num_experts, requires_grad=True)
        size = max(1e-6, (self._squares / int(self.num_tokens)) ** 0.5)  # of x; a step moves a logit by about 0.1
        optimiser = torch.optim.Adam([{"params": [rows_EH], "lr": 0.1 / size}, {"params": [off_E], "lr": 0.01}])
        best, kept = self._share(self._judged, rows_EH, off_E), (torch.zeros_like(rows_EH), torch.zeros_like(off_E))
        before = self._share(self._held_out, *kept)
        for step in range(1, steps + 1):
            self._descend(rows_EH, off_E)
            optimiser.step()
            if step % 10 == 0 or step == steps:
                judged = self._share(self._judged, rows_EH, off_E)
                if judged < best:
                    best, kept = judged, (rows_EH.detach().clone(), off_E.detach().clone())
        losses_2 = torch.tensor([before, self._share(self._held_out, *kept)], dtype=torch.float64)
        return {"rows": kept[0].detach(), "scales": 1 + kept[1].detach(), "losses": losses_2, **probe}

    def _descend(self, rows_EH: Tensor, off_E: Tensor) -> None:
        """Put the gradient of all processes' tokens where the optimiser looks for it."""
        rows, off, energy = torch.zeros_like(rows_EH), torch.zeros_like(off_E), torch.zeros(())
        if len(self._fitted["energy"]):
            rows, off = torch.autograd.grad(self._losses(self._fitted, rows_EH, off_E).sum(), (rows_EH, off_E))
            energy = self._fitted["energy"].sum()
        whole = self._processes.sum(energy).clamp_min(1e-30)
        rows_EH.grad, off_E.grad = self._processes.sum(rows) / whole, self._processes.sum(off) / whole

    @torch.no_grad()
    def _share(self, seen: Mapping[str, Tensor], rows_EH: Tensor, off_E: Tensor) -> float:
        """The loss of all processes' tokens, as a share of Σ ‖y‖²; 0 where that is nothing."""
        sums = torch.zeros(2, dtype=torch.float64)
        if len(seen["energy"]):
            sums = torch.stack([self._losses(seen, rows_EH, off_E).double().sum(), seen["energy"].double().sum()])
        loss, energy = self._processes.sum(sums).tolist()
        return loss / energy if energy else 0.0

    def _losses(self, seen: Mapping[str, Tensor], rows_EH: Tensor, off_E: Tensor) -> Tensor:
        assert self._rule is not None
        return losses(seen, self._rule, self._layer.top_k, rows_EH, 1 + off_E)
