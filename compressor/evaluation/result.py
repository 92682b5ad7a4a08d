"""What all measurements have in common: results are frozen dataclasses, and `to_json()` gives what the record holds."""

from __future__ import annotations

import dataclasses
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
