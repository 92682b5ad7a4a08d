"""The tokens of one calibration batch at one MoE layer, as a method's statistic sees them.

Dimensions: T tokens, c tokens of a chunk, E experts, K chosen per token, M ranks, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from compressor.model.routing_rule import Replay, RoutingRule
from compressor.model.rule_fitting import renormalises
from compressor.model.structure import MoELayer
from compressor.wording import counted

_ROWS_PER_EXPERT = 768
"""Tokens that an expert is given at a time, on average: enough for fast matrix products, few enough that what lies
between them (the experts' inner activations) stays near the processor. See benchmarks/README.md.
"""
_CHUNK_BYTES = 256 * 2**20
_TOKENS_PER_GRAM = 64
Lift = Callable[[Tensor], Tensor]
"""Outputs of the experts module [N, H'] → what they add to the block's own output [N, H]; linear."""


@dataclass
class RealTokens:
    """Which tokens are no padding: `mask_T` [B·S] bool. Nobody is told unless `listening`; `paused`: a block reruns;
    `splits`: one sequence with images, of which experts may be given those of a kind alone.
    """

    mask_T: Tensor | None = None
    listening: bool = True
    paused: bool = False
    splits: bool = False

    @property
    def deaf(self) -> bool:
        """Whether nobody is told of what runs."""
        return self.paused or not self.listening


@dataclass(frozen=True)
class RankedChunk:
    """Some tokens, from `start` to `stop`, with outputs of their best ranks: `order_cM` expert ids, the K chosen first,
    then by descending rank; `outputs_cMH` float32, not weighted.
    """

    start: int
    stop: int
    order_cM: Tensor
    outputs_cMH: Tensor

    def __repr__(self) -> str:
        return f"RankedChunk(tokens {self.start}–{self.stop}, {self.order_cM.shape[1]} ranks)"

    def first(self, num_ranks: int) -> RankedChunk:
        """The same tokens with fewer of their ranks."""
        return RankedChunk(self.start, self.stop, self.order_cM[:, :num_ranks], self.outputs_cMH[:, :num_ranks])

    def gram(self) -> Tensor:
        """[c, M, M] float64: inner products of these outputs; see `gram_of`."""
        return gram_of(self.outputs_cMH)


@dataclass
class RoutedTokens:
    """One batch at one layer: real tokens only, padding is gone.

    hidden_TH       what the experts are given, in the model's dtype
    logits_TE       the router's logits, float32
    index_TK        the experts chosen, int64
    weights_TK      their weights, as the router gave them
    rule            the router's rule in closed form, or None: then `replay` says what a smaller set would choose
    domain          the calibration source that the batch comes from
    held_out        whether it is held-out text, which nothing may be decided by
    is_image_T      bool, on the CPU: an image stands there; None where there is none, or it is not known
    target_TH       what the layer should put out, where that is not its own output on these tokens: in progressive
                    pruning, the original model's output on the original model's activations; like `output_TH`
    """

    layer: MoELayer
    hidden_TH: Tensor
    logits_TE: Tensor
    index_TK: Tensor
    weights_TK: Tensor
    rule: RoutingRule | None
    replay: Replay
    evaluate_experts: Callable[[Tensor, Tensor], Tensor]
    """(hidden [c, H], expert ids [c, M]) → outputs [c, M, H]."""
    lift: Lift | None = None
    """How the block carries its experts' output to its own, where it scales or projects it."""
    at_block: bool = True
    """Whether outputs are as they reach the block's output, or (a norm stands between) as experts give them."""
    output_TH: Tensor | None = None
    """What the experts add to the block's output; filled by `ranked_outputs`, so that nobody computes it twice."""
    experts_output_TH: Tensor | None = None
    """The same before the block scales or projects it: what the experts module answers."""
    domain: str = ""
    held_out: bool = False
    is_image_T: Tensor | None = None
    target_TH: Tensor | None = None

    def __repr__(self) -> str:
        return f"RoutedTokens({counted(self.num_tokens, 'token')} of {self.domain or 'no source'} at {self.layer.path})"

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.hidden_TH)

    @property
    def wanted_TH(self) -> Tensor:
        """What the layer should put out: its target, or its own output, once `ranked_outputs` has been through."""
        wanted_TH = self.output_TH if self.target_TH is None else self.target_TH
        assert wanted_TH is not None
        return wanted_TH

    @property
    def squared_output(self) -> Tensor:
        """Σ of its squares, float64, on the CPU."""
        return self.wanted_TH.float().square().sum(dtype=torch.float64).cpu()

    @property
    def can_evaluate(self) -> bool:
        """Whether it can be asked what an expert answers to a token; `layer.watch_problem` says why not."""
        return self.layer.watch_problem is None

    def renormalises(self) -> bool:
        """Whether the router divides the chosen experts' weights by their sum; see `rule_fitting.renormalises`."""
        return renormalises(self.layer, self.rule, self.index_TK, self.weights_TK, self.replay)

    def ranked_outputs(self, num_ranks: int) -> Iterator[RankedChunk]:
        """The outputs of each token's `num_ranks` best experts, some tokens at a time, as they reach the block's
        output; costs num_ranks / K forwards. The first K ranks are those chosen.
        """
        hidden_size = self.hidden_TH.shape[-1]
        most = max(1, min(_ROWS_PER_EXPERT * self.layer.num_experts, _CHUNK_BYTES // (4 * hidden_size)) // num_ranks)
        chunk = ceil(self.num_tokens / ceil(self.num_tokens / most)) if self.num_tokens else most
        order_TM = self.order(num_ranks)
        output_TH = torch.empty_like(self.hidden_TH)
        lifted: list[Tensor] = []
        for start in range(0, self.num_tokens, chunk):
            stop = min(start + chunk, self.num_tokens)
            outputs_cMH = self.evaluate_experts(self.hidden_TH[start:stop], order_TM[start:stop]).float()
            weights_cK = self.weights_TK[start:stop].float()
            chosen_cKH = outputs_cMH[:, : weights_cK.shape[1]]
            output_TH[start:stop] = torch.bmm(weights_cK[:, None], chosen_cKH)[:, 0].to(output_TH.dtype)
            if self.lift is not None:
                outputs_cMH = self.lift(outputs_cMH.flatten(0, 1)).view(*outputs_cMH.shape[:2], -1)
                lifted.append(torch.bmm(weights_cK[:, None], outputs_cMH[:, : weights_cK.shape[1]])[:, 0])
            yield RankedChunk(start, stop, order_TM[start:stop], outputs_cMH)
        self.experts_output_TH = output_TH
        self.output_TH = torch.cat(lifted) if lifted else output_TH

    def order(self, num_ranks: int) -> Tensor:
        """[T, num_ranks] int64: the chosen experts, ties as the router broke them, then by descending rank; without a
        closed rule by logits, which will do only if all are looked at.
        """
        ranking_TE = (
            self.logits_TE.double() if self.rule is None else self.rule.ranking(self.rule.affinity(self.logits_TE))
        )
        others_TE = ranking_TE.scatter(1, self.index_TK, float("-inf"))
        num_others = num_ranks - self.index_TK.shape[1]
        if num_others <= 0:
            return self.index_TK[:, :num_ranks]
        return torch.cat([self.index_TK, others_TE.topk(num_others, dim=-1).indices], dim=1)


def gram_of(outputs_cXH: Tensor) -> Tensor:
    """[c, X, X] float64: inner products of float32 outputs; float32 would leave δᵀ G δ nothing but rounding."""
    gram_cXX = outputs_cXH.new_empty(*outputs_cXH.shape[:2], outputs_cXH.shape[1], dtype=torch.float64)
    for start in range(0, len(outputs_cXH), _TOKENS_PER_GRAM):
        part = slice(start, start + _TOKENS_PER_GRAM)
        wide_cXH = outputs_cXH[part].double()
        gram_cXX[part] = torch.bmm(wide_cXH, wide_cXH.mT)
    return gram_cXX
