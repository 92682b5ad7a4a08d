"""How far one model's answers are from another's, Kullback–Leibler divergence in nats a token, and how sure a mean is.

Dimensions: N tokens, c tokens of a chunk, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 2**22


def kl_divergences(logits_NV: Tensor, others_NV: Tensor) -> Tensor:
    """Σ_v p·(log p − log q) of every token, [N] float64 on the CPU; p and q are the softmax of `logits_NV` and
    `others_NV`. Log-softmax in float32, sums in float64; equal logits give exactly 0.
    """
    num_tokens, vocabulary = logits_NV.shape
    chunk = max(1, _CHUNK_ELEMENTS // vocabulary)
    found = [_of_chunk(logits_NV[i : i + chunk], others_NV[i : i + chunk]) for i in range(0, num_tokens, chunk)]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


def _of_chunk(logits_cV: Tensor, others_cV: Tensor) -> Tensor:
    log_p_cV = torch.log_softmax(logits_cV.float(), dim=-1)
    log_q_cV = torch.log_softmax(others_cV.to(logits_cV.device).float(), dim=-1)
    p_cV = log_p_cV.exp()
    terms_cV = torch.where(p_cV > 0, p_cV * (log_p_cV - log_q_cV), 0.0)  # an id that both exclude is −∞ − −∞
    return terms_cV.sum(-1, dtype=torch.float64).cpu() + 0.0  # not −0


def ratio_standard_error(totals: Sequence[float], counts: Sequence[int]) -> float | None:
    """Standard error of Σtotals / Σcounts over R independent (total, count) pairs: with their ratio L it is
    √( R/(R−1) · Σ(total − L·count)² ) / Σcounts; None for one pair.
    """
    num_pairs = len(totals)
    if num_pairs < 2:
        return None
    mean = math.fsum(totals) / sum(counts)
    squares = math.fsum((total - mean * count) ** 2 for total, count in zip(totals, counts, strict=True))
    return math.sqrt(num_pairs / (num_pairs - 1) * squares) / sum(counts)
