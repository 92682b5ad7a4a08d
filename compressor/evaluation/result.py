"""What all measurements have in common: results are frozen dataclasses, and `to_json()` gives what the record holds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from compressor.data.sequences import TokenBatch

Json = dict[str, Any]
Progress = Callable[[int, int], None]
Run = Callable[[Sequence[TokenBatch], Callable[[TokenBatch, Any], None]], None]
"""(batches, what to do with each batch and the model's output for it)"""


@dataclass(frozen=True)
class Result:
    def to_json(self) -> Json:
        """The figures as JSON types: what the record holds."""
        return dataclasses.asdict(self)


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
