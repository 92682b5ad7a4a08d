"""What the search keeps of each calibration token at one layer: its best ranks, and the Gram matrix of their outputs.

Outputs of H numbers become inner products: with E_i the output of a token's rank i and w any weights of these ranks,
‖Σ_i w_i E_i‖² = wᵀ G w, so the loss of every set of experts can be computed without the outputs. Where the target is
not the layer's own output (progressive pruning), the residual ρ is one more column, of weight 1 in the target.

Of the ranks behind the K chosen ones only so many are kept as can be reached: when a share of the experts goes, a token
falls back by about that share. 2K ranks were exact where 25 % of the experts went; the defaults leave room.

The matrices are kept in float32, each entry rounded once: experts that answer exactly alike lose exactly nothing, and a
loss below about 3·10⁻⁴ of the output, whose square is less than that rounding, is not resolved. Where all sets are
looked at there is no such limit (`routed_tokens.gram_of`).

Dimensions: T tokens of all batches, c tokens of a chunk, N choices (experts, and what else can be chosen), K chosen by
the layer, k chosen by the smaller layer, M ranks, X = M columns of the Gram matrix, or M + 1 with a residual,
B batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from compressor.errors import UnsupportedModelError
from compressor.model.routed_tokens import RankedChunk, RoutedTokens, gram_of
from compressor.model.routing_rule import RoutingRule
from compressor.model.structure import MoELayer
from compressor.selection.exact import keeps_order, sorted_choice, with_residual


def num_ranks(layer: MoELayer, num_kept: int, top_k: int | None = None) -> int:
    """M, the ranks looked at: 2k to a quarter dropped, 3k to 60 %, 5k beyond; k + dropped at most, whole groups."""
    smaller = layer.top_k if top_k is None else top_k
    num_dropped = layer.num_experts - num_kept
    share = num_dropped / layer.num_experts
    wanted = ceil((2 if share <= 0.25 else 3 if share <= 0.6 else 5) * smaller)
    if layer.num_groups > 1:
        wanted *= 2
    return min(layer.num_choices, max(layer.top_k, min(wanted, smaller + num_dropped)))


@dataclass
class TokenGrams:
    """Tokens with equally many ranks. Large arrays are on the layer's device.

    order_TM        expert ids, int16, best first
    affinity_TM     float32, before renormalisation
    gram_TXX        float32
    batch_T         each token's batch, int32
    score_TN        float32, [T, N]: all affinities, where dropping any expert rescales all tokens or experts are chosen
                    by group; else empty
    """

    order_TM: Tensor
    affinity_TM: Tensor
    gram_TXX: Tensor
    batch_T: Tensor
    score_TN: Tensor

    @property
    def num_tokens(self) -> int:
        return len(self.order_TM)

    @property
    def bytes_per_token(self) -> float:
        held = (self.order_TM, self.affinity_TM, self.gram_TXX, self.batch_T, self.score_TN)
        return sum(tensor.numel() * tensor.element_size() for tensor in held) / max(1, self.num_tokens)

    def without(self, is_gone_T: Tensor) -> TokenGrams:
        """The other tokens only."""
        stay = ~is_gone_T
        return TokenGrams(
            self.order_TM[stay], self.affinity_TM[stay], self.gram_TXX[stay], self.batch_T[stay], self.score_TN[stay]
        )


def joined(parts: list[TokenGrams]) -> TokenGrams:
    """All parts as one; each is freed as soon as it is copied, so that there is no second copy of all."""
    first = parts[0]
    total = sum(part.num_tokens for part in parts)
    names = ("order_TM", "affinity_TM", "gram_TXX", "batch_T", "score_TN")
    whole = {name: getattr(first, name).new_empty(total, *getattr(first, name).shape[1:]) for name in names}
    parts.reverse()
    start = 0
    while parts:
        part = parts.pop()
        for name in names:
            whole[name][start : start + part.num_tokens] = getattr(part, name)
        start += part.num_tokens
    return TokenGrams(**whole)


def search_rule(layer: MoELayer, rule: RoutingRule | None) -> RoutingRule:
    """The rule that says what a smaller set chooses. Raises UnsupportedModelError where there is none."""
    if rule is None or (rule.groups is None and not keeps_order(rule)):
        why = "has no closed form" if rule is None else "adds a bias to a softmax, so ranks change when experts go"
        raise UnsupportedModelError(
            f"{layer.path}: its router's rule {why}, and its sets of experts are too many to look at all of them. Keep "
            f"more experts, so that all sets can be looked at, or choose by a criterion, such as `criterion: reap`."
        )
    return rule


def token_grams(tokens: RoutedTokens, chunk: RankedChunk, batch: int) -> TokenGrams:
    """Some tokens of a batch."""
    rule, num_chosen = search_rule(tokens.layer, tokens.rule), tokens.weights_TK.shape[1]
    affinity_cN = rule.affinity(tokens.logits_TE[chunk.start : chunk.stop])
    gram_cXX = gram_of(with_residual(tokens, chunk))
    order_cM, gram_cXX = sorted_choice(rule, affinity_cN, chunk.order_cM, gram_cXX, num_chosen)
    needs_scores = rule.rescales_all or rule.groups is not None
    scores = affinity_cN if needs_scores else affinity_cN[:, :0]
    return TokenGrams(
        order_cM.to(torch.int16),
        affinity_cN.gather(1, order_cM).float(),
        gram_cXX.float(),
        torch.full((len(order_cM),), batch, dtype=torch.int32, device=order_cM.device),
        scores.float(),
    )


def target_weights(grams: TokenGrams, rule: RoutingRule, num_chosen: int, part: slice) -> Tensor:
    """[c, X] float64: the weights of the target: those of the whole layer's K experts, and 1 for the residual."""
    affinity_cM = grams.affinity_TM[part].double()
    full_cX = affinity_cM.new_zeros(len(affinity_cM), grams.gram_TXX.shape[1])
    full_cX[:, :num_chosen] = rule.scale * affinity_cM[:, :num_chosen]
    if rule.renormalise:
        full_cX[:, :num_chosen] /= affinity_cM[:, :num_chosen].sum(1, keepdim=True)
    full_cX[:, affinity_cM.shape[1] :] = 1.0
    return full_cX
