"""What a live model writes when nobody tells it the answer: whether it goes round in circles, and whether it ends.

Prompts are pieces of one length of the measured text, so a batch has no padding. The model is as before afterwards.

Dimensions: B prompts of a batch, P their tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.quiet import quiet_transformers
from compressor.data.lm_eval_tasks import seeded
from compressor.data.sequences import Sequences
from compressor.errors import EvaluationError
from compressor.evaluation.result import Progress, Result
from compressor.evaluation.speed import fit_positions
from compressor.machine.distributed import Processes
from compressor.model.modules import evaluating
from compressor.observe.divergence import ratio_standard_error
from compressor.observe.forward import device_of

PROMPT_TOKENS, NEW_TOKENS, NUM_SAMPLES = 32, 96, 3
_SHORTEST_LOOP = 8
_Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class Written(Result):
    """Continuations: the share that ``loops``, an n-gram three times or more and over 8 tokens or more at its end; the
    share that ``ends`` by itself, both with their Wilson intervals of 95 %; and ``distinct_4``, the share of different
    ones among a continuation's 4-grams, a mean with its standard error; None where none has 4 tokens.
    """

    loops: float
    loops_interval: Sequence[float]
    ends: float
    ends_interval: Sequence[float]
    distinct_4: float | None
    distinct_4_error: float | None


@dataclass(frozen=True)
class Generation(Result):
    """``prompts`` pieces of text continued by at most ``new_tokens``, ``greedy`` and ``sampled`` as the model's own
    settings say; ``samples``: some of the prompts with both continuations, as text.
    """

    prompts: int
    prompt_tokens: int
    new_tokens: int
    greedy: Written
    sampled: Written
    samples: Sequence[Mapping[str, str]]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Generation:
        return cls(**{**data, **{mode: Written(**data[mode]) for mode in ("greedy", "sampled")}})


def generation(
    model: Any,
    tokenizer: Any | None,
    texts: Sequence[Sequences],
    num_prompts: int,
    *,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
    processes: Processes | None = None,
) -> Generation:
    """Have a model in memory continue pieces of these texts, of each in turn. Several processes share the batches.
    Raises EvaluationError where no sequence is as long as a prompt. Rows with images are passed over.
    """
    processes = processes or Processes()
    prompt_tokens, new_tokens = fit_positions([model], PROMPT_TOKENS, NEW_TOKENS)
    prompts = list(itertools.islice(_pieces(texts, prompt_tokens), num_prompts))
    if not prompts:
        raise EvaluationError(f"generation: no sequence of the measured text has {prompt_tokens} tokens for a prompt.")
    batches = [torch.stack(prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]
    own, found = processes.own(len(batches)), []
    with torch.no_grad(), evaluating(model), quiet_transformers():
        for done, number in enumerate(own, start=1):
            found.append(
                [_continued(model, batches[number], new_tokens, seed + number, samples=mode) for mode in (False, True)]
            )
            if progress is not None:
                progress(done, len(own))
    greedy, sampled = (
        [ids for of_batch in of_mode for ids in of_batch] for of_mode in zip(*processes.in_order(found), strict=True)
    )
    ends = _ends_of(model)
    samples = [
        {name: tokenizer.decode(ids) for name, ids in zip(("prompt", "greedy", "sampled"), sample, strict=True)}
        for sample in zip(prompts[:NUM_SAMPLES], greedy, sampled, strict=False)
        if tokenizer is not None
    ]
    return Generation(len(prompts), prompt_tokens, new_tokens, _written(greedy, ends), _written(sampled, ends), samples)


def _pieces(texts: Sequence[Sequences], length: int) -> Iterator[Tensor]:
    """Pieces of so many tokens: of each text in turn, the beginnings of its sequences first."""

    def of_text(text: Sequences) -> Iterator[Tensor]:
        for start in range(0, max(map(len, text.ids)), length):
            yield from (ids[start : start + length] for ids in text.ids if len(ids) >= start + length)

    for turn in itertools.zip_longest(*(of_text(text) for text in texts if not text.images)):
        yield from (piece for piece in turn if piece is not None)


def _ends_of(model: Any) -> set[int]:
    """The ids by which the model ends a text."""
    ids = model.generation_config.eos_token_id
    return set(ids) if isinstance(ids, list | tuple) else {ids} - {None}


def _continued(model: Any, prompts_BP: Tensor, new_tokens: int, seed: int, *, samples: bool) -> list[list[int]]:
    """What the model writes behind each prompt, up to and with the token that ends it."""
    ends = _ends_of(model)
    prompts_BP = prompts_BP.to(device_of(model))
    with seeded(seed):
        written = model.generate(
            input_ids=prompts_BP,
            attention_mask=torch.ones_like(prompts_BP),
            max_new_tokens=new_tokens,
            do_sample=samples,
            num_beams=1,
            repetition_penalty=1.0,  # or no loop would be seen
            no_repeat_ngram_size=0,
            pad_token_id=min(ends, default=0),
        )[:, prompts_BP.shape[1] :].tolist()
    lengths = [next((place for place, one in enumerate(ids, start=1) if one in ends), len(ids)) for ids in written]
    return [ids[:length] for ids, length in zip(written, lengths, strict=True)]


def _written(continuations: Sequence[Sequence[int]], ends: set[int]) -> Written:
    number = len(continuations)
    looping, ended = sum(map(loops, continuations)), sum(ids[-1] in ends for ids in continuations)
    distinct = [len(set(grams)) / len(grams) for ids in continuations if (grams := _grams(ids))]
    return Written(
        loops=looping / number,
        loops_interval=wilson(looping, number),
        ends=ended / number,
        ends_interval=wilson(ended, number),
        distinct_4=math.fsum(distinct) / len(distinct) if distinct else None,
        distinct_4_error=ratio_standard_error(distinct, [1] * len(distinct)),
    )


def _grams(ids: Sequence[int]) -> list[tuple[int, ...]]:
    return list(zip(*(ids[start:] for start in range(4)), strict=False))


def loops(ids: Sequence[int]) -> bool:
    """Whether it ends with an n-gram, whatever n, three times or more in a row, over 8 tokens or more."""
    for n in range(1, len(ids) // 3 + 1):
        same = next((k for k in range(len(ids) - n) if ids[-1 - k] != ids[-1 - k - n]), len(ids) - n)
        if same >= max(2 * n, _SHORTEST_LOOP - n):
            return True
    return False


def wilson(successes: int, number: int) -> list[float]:
    """The interval of 95 % of a share: (p + z²/2n ± z·√(p(1 − p)/n + z²/4n²)) / (1 + z²/n)."""
    share, z2 = successes / number, _Z**2
    middle, width = share + z2 / (2 * number), _Z * math.sqrt(share * (1 - share) / number + z2 / (4 * number**2))
    low, high = ((middle + side * width) / (1 + z2 / number) for side in (-1, 1))
    return [max(0.0, low), min(1.0, high)]
