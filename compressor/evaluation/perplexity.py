"""How well a live model predicts text.

Nothing here changes the model: its parameters, configuration, device and training mode are as before, also after an
error. Several processes with the same model share the batches of a text, and all get the result.

Dimensions: B sequences of a batch, S positions, C positions of a chunk, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.classes import max_positions
from compressor.data.sequences import Sequences, TokenBatch, check_vocabulary
from compressor.errors import EvaluationError
from compressor.evaluation.result import Progress, Result, Run
from compressor.machine.distributed import Processes
from compressor.model.modules import evaluating
from compressor.observe import forward
from compressor.observe.divergence import ratio_standard_error

CHUNK_ELEMENTS = 2**24  # float32 log-probabilities held at one time: 64 MiB
Watch = Callable[[int, TokenBatch, Tensor, Tensor], None]
"""(a batch's number, the batch, its logits [B, S, V], the losses of its next tokens [B, S − 1])"""


@dataclass(frozen=True)
class Perplexity(Result):
    """How well a model predicts a text: lower is better. ``mean_loss`` is in nats a predicted token (of ``tokens``),
    with its ``standard_error``, None for one sequence; ``perplexity`` its exponential, with that error times itself.
    """

    name: str
    perplexity: float
    mean_loss: float
    standard_error: float | None
    tokens: int
    fingerprint: str


def perplexity(
    model: Any,
    sequences: Sequences,
    batch_size: int = 8,
    progress: Progress | None = None,
    processes: Processes | None = None,
    *,
    run: Run | None = None,
    watch: Watch | None = None,
) -> Perplexity:
    """Next-token perplexity of ``model`` on one source.

    In a sequence of n tokens the last n − 1 are predicted, each from those before it in the same sequence.
    Padding and places of images count nowhere. The mean is over all predicted tokens of all sequences, whatever the
    batches; logits are in the model's dtype, log-softmax in float32 and sums in float64.

    The standard error takes the sequences, not the tokens, as independent draws (`ratio_standard_error`); for
    sequences of one length it is the standard deviation of the sequences' means over √R.

    ``progress(done, total)`` is called with numbers of sequences. ``run`` feeds the batches to a model that cannot
    simply be called, in order; the figures are the same to the bit. ``watch`` is shown every batch of this
    process in turn. Raises EvaluationError when a loss is not
    finite, a sequence is longer than the model's positions or nothing is to be predicted, CalibrationError
    when an id has no embedding.
    """
    _check_sequences(model, sequences)
    processes = processes or Processes()
    batches = sequences.batches(batch_size)
    batch_size = len(batches[0].input_ids)
    own = processes.own(len(batches))
    found: list[list[tuple[float, int]]] = []  # batch by batch

    def take(batch: TokenBatch, output: Any) -> None:
        number = own[len(found)]
        losses_BS = next_token_losses(output.logits, batch.input_ids, batch.text_mask)
        losses_B = losses_BS.sum(1).tolist()
        _refuse_not_finite(losses_B, sequences.name, first=number * batch_size)
        if watch is not None:
            watch(number, batch, output.logits, losses_BS)
        found.append(list(zip(losses_B, batch.text_mask[:, 1:].sum(1).tolist(), strict=True)))
        if progress is not None:
            progress(min((number + 1) * batch_size, len(sequences.ids)), len(sequences.ids))

    with torch.no_grad(), evaluating(model):
        if run is not None:
            run([batches[number] for number in own], take)
        else:
            for number in own:
                take(batches[number], model(**forward.model_inputs(model, batches[number])))
    losses, counts = zip(*(pair for of_batch in processes.in_order(found) for pair in of_batch), strict=True)
    tokens = sum(counts)
    mean_loss = math.fsum(losses) / tokens
    return Perplexity(
        name=sequences.name,
        perplexity=_exponential(mean_loss, sequences.name),
        mean_loss=mean_loss,
        standard_error=ratio_standard_error(losses, counts),
        tokens=tokens,
        fingerprint=sequences.fingerprint,
    )


def next_token_losses(logits_BSV: Tensor, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """[B, S − 1] float64 on the CPU: the loss of each next token in nats, 0 for padding; in chunks of 64 MiB."""
    ids_BS, mask_BS = ids_BS.to(logits_BSV.device), mask_BS.to(logits_BSV.device)
    num_sequences, num_positions, vocab_size = logits_BSV.shape
    chunk = max(1, CHUNK_ELEMENTS // (num_sequences * vocab_size))
    losses_BS = torch.zeros(num_sequences, num_positions - 1, dtype=torch.float64)
    for start in range(0, num_positions - 1, chunk):
        stop = min(start + chunk, num_positions - 1)
        targets_BC = ids_BS[:, start + 1 : stop + 1]
        log_probabilities_BCV = torch.log_softmax(logits_BSV[:, start:stop].float(), dim=-1)
        loss_BC = -log_probabilities_BCV.gather(-1, targets_BC[..., None])[..., 0]
        losses_BS[:, start:stop] = loss_BC.masked_fill(~mask_BS[:, start + 1 : stop + 1], 0.0)
    return losses_BS


def _check_sequences(model: Any, sequences: Sequences) -> None:
    if not any(len(ids) > 1 for ids in sequences.ids):
        raise EvaluationError(f"source {sequences.name!r} has no sequence of 2 tokens or more: nothing to predict.")
    check_vocabulary(sequences, model.get_input_embeddings().weight.shape[0])
    longest, positions = max(map(len, sequences.ids)), max_positions(model.config)
    if positions is not None and longest > positions:
        raise EvaluationError(
            f"source {sequences.name!r} has sequences of {longest} tokens, the limit is {positions}: lower `length:`."
        )


def _refuse_not_finite(losses: Sequence[float], name: str, first: int) -> None:
    bad = next((number for number, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if bad is not None:
        raise EvaluationError(
            f"source {name!r}: the loss on sequence {first + bad} is {losses[bad]}: overflow in this dtype, or damage."
        )


def _exponential(mean_loss: float, name: str) -> float:
    try:
        return math.exp(mean_loss)
    except OverflowError:
        raise EvaluationError(
            f"source {name!r}: a mean loss of {mean_loss:.0f} nats per token has no finite perplexity."
        ) from None
