"""How much memory and disk a run will need, from config and recipe alone: what decides whether weights are all in
memory or read one decoder layer at a time.

    in memory    process + weights, twice while the result is compared + text + batch
    from disk    process + what is in no layer + largest layer, twice while it is put together + text + batch

*text* are the hidden states of all calibration text, and what a search keeps of each token; *batch* is the work on one
batch. `benchmarks/streaming.py` compares the estimate with what is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Weights = Literal["memory", "disk"]

PROCESS = 700_000_000
"""Bytes of Python with torch and transformers, before any weight."""
TASKS = 1_200_000_000
"""Bytes that lm-eval and its data sets add."""
_EXPERT_OUTPUTS = 2**28
"""Bytes of expert outputs held at one time, see `moe.tokens`."""
_COPIES_PER_TOKEN = 12
"""Float32 vectors of a token of the batch at work, attention included."""


@dataclass(frozen=True)
class Work:
    """What a run works on, in numbers.

    `bytes_total` and `bytes_outside` are those of all weights and of those in no layer, `bytes_by_layer` those of each
    decoder layer; `tokens` the calibration text of the largest pass; `batch_tokens` one batch; `hidden` the width of
    a token, `itemsize` the bytes of a number, `per_token` what a search keeps of a token; `streams` 2 in progressive
    mode. `copies` is how often all weights are in memory at most.
    """

    bytes_total: int
    bytes_outside: int
    bytes_by_layer: Mapping[str, int]
    bytes_after: int
    tokens: int
    batch_tokens: int
    hidden: int
    vocabulary: int
    itemsize: int
    per_token: float
    streams: int
    num_passes: int
    copies: int
    has_tasks: bool
    measures_text: bool

    @property
    def text(self) -> int:
        """Bytes of the hidden states of the calibration text: before a block two for each token, what goes in and what
        it is added to; and of what is kept of each token.
        """
        return round(self.tokens * (2 * self.streams * self.hidden * self.itemsize + self.per_token))

    @property
    def batch(self) -> int:
        """Bytes that the work on one batch takes."""
        logits = self.vocabulary * (self.itemsize + 4) if self.measures_text else 0
        return _EXPERT_OUTPUTS + self.batch_tokens * (4 * _COPIES_PER_TOKEN * self.hidden + logits)

    def memory(self, weights: Weights, *, device: str = "cpu") -> int:
        """Bytes of memory at the peak, beside the accelerator's where the model computes on one."""
        others = PROCESS + (TASKS if self.has_tasks else 0)
        if device == "cpu":
            return others + self.text + self.batch + self._held(weights)
        largest = max(self.bytes_by_layer.values(), default=0)
        return others + (self.bytes_total if weights == "memory" else largest)

    def device_memory(self, weights: Weights) -> int:
        """Bytes of the accelerator's memory at the peak, where the model computes on one."""
        return self.text + self.batch + self._held(weights)

    def _held(self, weights: Weights) -> int:
        if weights == "memory":
            return self.copies * self.bytes_total
        return self.bytes_outside + 2 * max(self.bytes_by_layer.values(), default=0)

    def disk(self, weights: Weights) -> int:
        """Bytes on the output's disk at the peak: the output, with it the checkpoint before it, and the journal."""
        stages = 2 if weights == "disk" and self.num_passes > 1 else 1
        journal = 2 * self.tokens * self.streams * self.hidden * self.itemsize
        return stages * self.bytes_after + journal

    def readings(self, weights: Weights) -> int:
        """How often all weights are read, as far as passes go: in memory once, and the result to compare it; from disk
        for each pass to observe, to preview, to write and to compare, and before and after for text that is measured.
        """
        if weights == "memory":
            return 2
        return 4 * self.num_passes + (2 if self.measures_text else 0)

    def to_json(self, weights: Weights, *, device: str, available: int | None) -> dict[str, object]:
        """What `check` prints: sizes in bytes."""
        return {
            "weights": weights,
            "memory": self.memory(weights, device=device),
            "device_memory": None if device == "cpu" else self.device_memory(weights),
            "available": available,
            "disk": self.disk(weights),
            "readings": self.readings(weights),
            "bytes_read": self.readings(weights) * self.bytes_total,
            "layers": len(self.bytes_by_layer),
            "largest_layer": max(self.bytes_by_layer.values(), default=0),
            "text": self.text,
        }
