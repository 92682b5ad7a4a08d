"""How much memory and disk a run will need, from config and recipe alone: what decides whether weights are all in
memory or read one decoder layer at a time.

    observing    process + weights + text + batch or search
    comparing    process + weights, twice in memory + batch or answers, if that is more
    before       process + what reading the text takes, if that is more: nothing else is in memory by then

*weights* are all of them, on several GPUs the largest share, or what is in no layer and the largest layer, twice while
it is put together. *text* are the hidden states of all calibration text, unless they wait in files, and what a search
keeps of each token; *batch* is the work on one batch, *search* that on the tables of a search, *answers* are logits of
a few tokens. A margin of 5 % is added to all but the process, which is taken larger than was measured.

What is counted is anonymous memory. Files are mapped while they are read, as much of them as the system has room for;
it takes these pages back when others need them. `benchmarks/streaming.py` compares the estimate with what is used.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Weights = Literal["memory", "disk"]
States = Literal["memory", "file"]


@dataclass(frozen=True)
class Placement:
    """Where weights and hidden states are, and over how many GPUs weights in memory are spread."""

    weights: Weights
    states: States
    num_gpus: int = 1


PLACEMENTS = (
    Placement("memory", "memory"),
    Placement("memory", "file"),
    Placement("disk", "memory"),
    Placement("disk", "file"),
)
"""Fastest first."""

PROCESS = 500_000_000
"""Bytes of Python with torch and transformers, before any weight (310 to 425 MB measured)."""
ACCELERATOR = 500_000_000
"""Bytes of memory that an accelerator's libraries add to that; not measured."""
TASKS = 1_200_000_000
"""Bytes that lm-eval and its data sets add."""
_MEASURED_AT_ONCE = 2**16
"""Tokens that pass a layer together where nothing is observed."""
_EXPERT_OUTPUTS = 2**28
"""Bytes of expert outputs held at one time, at most; see `model.routed_tokens`."""
_SEARCH = 2**28
"""Bytes of the tables and copies at work in a search, at most; see `selection.greedy` and `selection.token_state`."""
_COMPARED = 4 * 256
"""Tokens whose logits an edited model is compared on."""
_MARGIN = 1.05
_COPIES_PER_TOKEN = 12
"""Float32 vectors of a token of the batch at work, attention included."""


@dataclass(frozen=True)
class Work:
    """What a run works on. Bytes of weights as numbers to compute with: `bytes_total`, `bytes_outside` of layers,
    `bytes_by_layer`; of files `bytes_stored` and `bytes_after`. `tokens` of the largest pass, `batch_tokens` of a
    batch; `hidden` a token's width, `num_experts` of the largest layer, `itemsize` bytes of a number, `per_token` kept
    by a search, `sums` by a layer's statistic in all; `measured_tokens` of all candidates together; `streams` 2 in
    progressive mode and beside an original (`has_original`); `copies` of all weights at most; `reading`: bytes to read
    and cut the text.
    """

    bytes_total: int
    bytes_outside: int
    bytes_by_layer: Mapping[str, int]
    bytes_stored: int
    bytes_after: int
    tokens: int
    batch_tokens: int
    hidden: int
    num_experts: int
    vocabulary: int
    itemsize: int
    per_token: float
    streams: int
    measured_tokens: int
    num_passes: int
    copies: int
    has_tasks: bool
    measures_text: bool
    answers: int = 0
    """Bytes of the original's answers to measured text, in files beside the output, or `in_memory` without one."""
    pixels: int = 0
    """Bytes of the images in all text, in float32, which are there as long as it is."""
    carried: int = 0
    """Bytes of extra prediction layers, which the output gets beside those of the model."""
    in_memory: bool = False
    is_quantised: bool = False
    reading: int = 0
    sums: int = 0
    training: int = 0
    """Bytes that a pass which trains has of models, their gradients and activations; nothing else is there then."""
    has_original: bool = False
    num_turned: int = 0
    """External steps, each of which turns a checkpoint, written first where weights are in memory, into another."""
    changes_values: bool = False
    """Whether a pass edits numbers: one decoder layer's are there in float32 too, and from disk as they are stored."""

    @property
    def _largest_layer(self) -> int:
        return max(self.bytes_by_layer.values(), default=0)

    @property
    def tokens_at_once(self) -> int:
        """Tokens that pass a layer together while measured from disk; more text takes turns."""
        return self.tokens * self.streams or _MEASURED_AT_ONCE

    def hidden_states(self, weights: Weights) -> int:
        """Bytes of hidden states: four vectors a token (input, residual, decoder layer's input, embedding)."""
        tokens = self.tokens_at_once if weights == "disk" else self.tokens * self.streams
        return 4 * (tokens + self.measured_tokens) * self.hidden * self.itemsize

    @property
    def _images(self) -> int:
        """Bytes of images in the model's dtype, which each batch's forward holds until its end."""
        return self.streams * self.pixels * self.itemsize // 4

    def text(self, place: Placement) -> int:
        waiting = self.hidden_states(place.weights) + self._images if place.states == "memory" else 0
        return round(self.tokens * self.per_token) + waiting

    @property
    def batch(self) -> int:
        """Bytes that the work on one batch takes."""
        has_logits = self.measures_text or self.has_tasks or self.measured_tokens
        logits = self.vocabulary * (self.itemsize + 4) if has_logits else 0
        outputs = min(_EXPERT_OUTPUTS, self.batch_tokens * self.num_experts * 4 * self.hidden)
        return outputs + self.batch_tokens * (4 * _COPIES_PER_TOKEN * self.hidden + logits)

    def memory(self, place: Placement, *, device: str = "cpu") -> int:
        """Bytes of memory at the peak, beside the accelerator's where the model computes on one."""
        others = PROCESS + (TASKS if self.has_tasks else 0) + (self.answers if self.in_memory else 0) + self.pixels
        if device == "cpu":
            return others + max(self.reading, self._at_peak(place))
        held = self.bytes_total if place.weights == "memory" else self._largest_layer
        return others + max(self.reading, ACCELERATOR + held)

    def device_memory(self, place: Placement) -> int:
        """Bytes of the accelerator's memory at the peak, where the model computes on one; of several, the fullest's."""
        return self._at_peak(place, place.num_gpus)

    def _at_peak(self, place: Placement, num_gpus: int = 1) -> int:
        """Peak bytes of weights, text and work: observing, a second copy of weights, or comparing in float64."""
        weights, answers = self._held(place.weights, num_gpus), min(self.batch_tokens, _COMPARED) * self.vocabulary
        copies = self.copies if place.weights == "memory" else 1
        beside = self._held("disk") if self.has_original else 0
        observing = weights + beside + self.text(place) + self.sums + max(self.batch, _SEARCH if self.per_token else 0)
        comparing = copies * weights + max(self.batch, 2 * self.itemsize * answers)
        differing = weights + (3 * self.itemsize + 2 * 8) * answers
        largest = self._largest_layer if self.changes_values else 0
        editing = weights + largest * 4 // self.itemsize + (largest if place.weights == "disk" else 0)
        return round(_MARGIN * max(observing, comparing, differing, editing, self.training))

    def _held(self, weights: Weights, num_gpus: int = 1) -> int:
        if weights == "memory":
            sizes = list(self.bytes_by_layer.values())
            return max(shares(self.bytes_outside, sizes, num_gpus)[1])
        packed = self._largest_layer * self.bytes_stored // self.bytes_total if self.is_quantised else 0
        return self.bytes_outside + 2 * self._largest_layer + packed

    def disk(self, place: Placement) -> int:
        """Peak bytes on the output's disk: output, checkpoint before it, journal, hidden states in files, the
        original's answers. What an external step writes is taken to be as large as what it is given.
        """
        most = min(self.num_passes, 2 + self.num_turned)  # each step's checkpoint stays until the end
        stages = most if place.weights == "disk" else 1 + self.num_turned
        states = self.hidden_states(place.weights)
        waiting = states + self._images if place.states == "file" else 0
        beside = self.carried + states // 2 + waiting + (0 if self.in_memory else self.answers)
        return stages * self.bytes_after + beside

    def readings(self, place: Placement) -> int:
        """How often all weights are read: in memory once, and the result to compare it; from disk for each pass to
        observe, preview, write and compare, and before and after for measured text (one turn of `tokens_at_once`).
        """
        if place.weights == "memory":
            return 2
        return 4 * self.num_passes + (2 if self.measures_text else 0)

    def to_json(self, place: Placement, *, device: str, available: int) -> dict[str, object]:
        """What `check` prints: sizes in bytes."""
        return {
            "weights": place.weights,
            "hidden_states": place.states,
            "memory": self.memory(place, device=device),
            "device_memory": None if device == "cpu" else self.device_memory(place),
            "available": available,
            "disk": self.disk(place),
            "readings": self.readings(place),
            "bytes_read": self.readings(place) * self.bytes_stored,
            "layers": len(self.bytes_by_layer),
            "largest_layer": self._largest_layer,
            "text": self.hidden_states(place.weights),
            "tasks_at_once": self.tokens_at_once if self.has_tasks and place.weights == "disk" else None,
        }


def shares(outside: int, sizes: Sequence[int], num_devices: int) -> tuple[list[int], list[int]]:
    """Layers of these `sizes` in bytes dealt out in order, the fullest device as empty as possible, the first one with
    what is `outside`: each layer's device, each device's bytes.
    """
    limits = range(outside + sum(sizes))
    enough = bisect_left(limits, True, key=lambda limit: _dealt(outside, sizes, num_devices, limit) is not None)
    found = _dealt(outside, sizes, num_devices, enough)
    assert found is not None
    return found


def _dealt(outside: int, sizes: Sequence[int], num_devices: int, limit: int) -> tuple[list[int], list[int]] | None:
    """The same with no more than `limit` bytes on a device; None where that cannot be."""
    places, held = [], [outside] + [0] * (num_devices - 1)
    place = 0
    for size in sizes:
        if held[place] + size > limit:
            place += 1
        if place == num_devices:
            return None
        held[place] += size
        places.append(place)
    return (places, held) if max(held) <= limit else None
