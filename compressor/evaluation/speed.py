"""The speed of two live models, measured in alternation, and the memory that they need.

Dimensions: B sequences of a batch, S positions.
"""

from __future__ import annotations

import contextlib
import inspect
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.classes import max_positions
from compressor.evaluation.result import Json, Result
from compressor.evaluation.size import size
from compressor.model.modules import evaluating
from compressor.observe import forward

MIN_ROUNDS = 3


@dataclass(frozen=True)
class Ratio(Result):
    """The second model's speed over the first's: median, smallest and largest of the rounds' ratios."""

    median: float
    min: float
    max: float


@dataclass(frozen=True)
class Speed(Result):
    """Two models' tokens per second (of all sequences of the batch), medians of ``rounds``. ``prefill`` reads the
    prompt, ``decode`` writes token after token, None where a model cannot, for ``decode_reason``; ratios above 1: the
    second is faster. ``peak_memory``: device bytes of weights and work, None on the CPU.
    """

    names: tuple[str, str]
    prefill: dict[str, float]
    prefill_ratio: Ratio
    decode: dict[str, float] | None
    decode_ratio: Ratio | None
    decode_reason: str | None
    peak_memory: dict[str, int] | None
    rounds: int
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    device: str


def speed(
    models: Mapping[str, Any],
    *,
    vocab_size: int,
    text: Sequence[Tensor] = (),
    prompt_tokens: int = 512,
    new_tokens: int = 32,
    batch_size: int = 1,
    repeats: int = 5,
    seconds: float = 20.0,
    seed: int = 0,
) -> Speed:
    """Time two models against each other: A B, B A, … after a warm-up of both. Machines drift, so each round forms its
    own ratio, and the median is taken. ``prefill`` is a forward over ``prompt_tokens`` ids of ``text``, or random ones
    (on which a model skips others), with the last logits only where it can; ``decode`` is ``new_tokens`` greedy
    forwards with the model's cache; both are shortened to the positions. Ends after ``repeats`` rounds, or ``seconds``
    once there were three. Wall clock, device synchronised, each model in memory on its own device.
    """
    if len(models) != 2:
        raise ValueError(f"speed compares exactly two models, got {list(models)}")
    first, second = models
    prompt_tokens, new_tokens = fit_positions(list(models.values()), prompt_tokens, new_tokens)
    generator = torch.Generator().manual_seed(seed)
    prompt_BS = torch.randint(vocab_size, (batch_size, prompt_tokens), generator=generator)
    if text:
        ids = torch.cat(list(text))
        prompt_BS = ids[torch.arange(prompt_BS.numel()) % len(ids)].view_as(prompt_BS)
    started = time.perf_counter()
    decode_reason = _warm_up(models, prompt_BS, new_tokens)
    steps = 0 if decode_reason else new_tokens
    rounds: list[dict[str, _Timing]] = []
    while len(rounds) < repeats and (len(rounds) < MIN_ROUNDS or time.perf_counter() - started < seconds):
        order = (first, second) if len(rounds) % 2 == 0 else (second, first)
        rounds.append({name: _time(models[name], prompt_BS, steps) for name in order})

    prefill = {name: [prompt_BS.numel() / timings[name].prefill for timings in rounds] for name in models}
    decode = (
        {name: [batch_size * steps / timings[name].decode for timings in rounds] for name in models} if steps else None
    )
    peaks = {name: max(timings[name].peak_memory or 0 for timings in rounds) for name in models}
    return Speed(
        names=(first, second),
        prefill={name: statistics.median(values) for name, values in prefill.items()},
        prefill_ratio=_ratio(prefill[first], prefill[second]),
        decode={name: statistics.median(values) for name, values in decode.items()} if decode else None,
        decode_ratio=_ratio(decode[first], decode[second]) if decode else None,
        decode_reason=decode_reason,
        peak_memory=peaks if all(peaks.values()) else None,
        rounds=len(rounds),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch_size=batch_size,
        device=", ".join(forward.devices_of(models[second])),
    )


def peak_memory(*devices: str) -> dict[str, int | None]:
    """Most memory so far, in bytes: ``host_bytes`` of this process, which cannot be reset (None: unknown), and
    ``device_bytes`` allocated by torch, summed over CUDA devices (None without one).
    """
    peaks = [torch.cuda.max_memory_allocated(device) for device in devices if device.startswith("cuda")]
    return {"host_bytes": _host_bytes(), "device_bytes": sum(peaks) if peaks else None}


@dataclass(frozen=True)
class _Timing:
    """Seconds of one prefill and of all decoding steps; peak device memory in bytes."""

    prefill: float
    decode: float
    peak_memory: int | None


class _CannotDecodeError(Exception):
    """The model gives no cache to decode with."""


def _warm_up(models: Mapping[str, Any], prompt_BS: Tensor, new_tokens: int) -> str | None:
    """Run each model once; the reason why one of them cannot decode, or None."""
    reason = None
    for name, model in models.items():
        _time(model, prompt_BS, 0)
        try:
            _time(model, prompt_BS, new_tokens)
        except Exception as error:  # whatever third-party model code does not support shows here, and is reported
            reason = reason or f"{name}: {type(error).__name__.removeprefix('_')}: {error}"
    return reason


def _time(model: Any, prompt_BS: Tensor, new_tokens: int) -> _Timing:
    gpus = [device for device in forward.devices_of(model) if device.startswith("cuda")]
    prompt_BS = prompt_BS.to(forward.device_of(model))
    takes = inspect.signature(model.forward).parameters
    extra: Json = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    two_parts = "decoder_input_ids" in takes
    extra |= {"decoder_input_ids": prompt_BS} if two_parts else {"use_cache": True}
    cache_name = "cache" if "cache" in takes else "past_key_values"  # as it was called before transformers 5.24
    with torch.no_grad(), evaluating(model), _counted_memory(model, gpus) as peak:
        start = _now(gpus)
        output = model(input_ids=prompt_BS, **extra)
        middle = _now(gpus)
        for _ in range(new_tokens):
            cache = getattr(output, cache_name, None)
            if two_parts or not hasattr(output, "logits"):
                raise _CannotDecodeError("the model does not predict the next token of a text")
            if cache is None:
                raise _CannotDecodeError("the model returns no key-value cache")
            token_B1 = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=token_B1, use_cache=True, **{cache_name: cache})
        end = _now(gpus)
    return _Timing(middle - start, end - middle, peak())


def _now(gpus: Sequence[str]) -> float:
    for gpu in gpus:
        torch.cuda.synchronize(gpu)
    return time.perf_counter()


@contextlib.contextmanager
def _counted_memory(model: Any, gpus: Sequence[str]) -> Iterator[Callable[[], int | None]]:
    """Yields a function: bytes of the model's weights and of what its CUDA devices allocated meanwhile."""
    if not gpus:
        yield lambda: None
        return
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    resting = sum(map(torch.cuda.memory_allocated, gpus))
    weights = size(model).bytes
    yield lambda: weights + sum(map(torch.cuda.max_memory_allocated, gpus)) - resting


def _ratio(first: Sequence[float], second: Sequence[float]) -> Ratio:
    ratios = [b / a for a, b in zip(first, second, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def fit_positions(models: Sequence[Any], prompt_tokens: int, new_tokens: int) -> tuple[int, int]:
    """So many tokens to read and to write, or fewer where all the models have fewer positions."""
    positions = min(
        (p for p in (max_positions(one.config) for one in models) if p is not None), default=prompt_tokens + new_tokens
    )
    new_tokens = max(1, min(new_tokens, positions // 2))
    return max(1, min(prompt_tokens, positions - new_tokens)), new_tokens


def _host_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
