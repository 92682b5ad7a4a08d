"""Run calibration batches through the model and hand every MoE layer's tokens to its statistic.

Layer-wise: every layer sees the activations of the model as it is. One pass over the data; each layer's output is put
together from the expert outputs its statistic asked for, so the experts are not run twice.

Not covered yet: reading one layer at a time from disk, and a second stream through the layers already pruned. In a
block-diffusion model, padding counts towards the sliding window through which the decoder sees its prompt.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from compressor.calibration import TokenBatch
from compressor.errors import CalibrationError
from compressor.moe import MoEModel, RealTokens, RoutedTokens
from compressor.progress import Progress, Update
from compressor.statistics import Statistic


@torch.no_grad()
def observe(
    moe: MoEModel,
    batches: Sequence[TokenBatch],
    statistics: Mapping[str, Statistic],
    progress: Progress,
    *,
    title: str = "observing",
) -> None:
    """Feed every batch to every statistic, in order. The model is not changed.

    Raises CheckpointError, naming the layer, where activations are not finite.
    """
    model = moe.model
    body = getattr(model, "base_model", model)  # without the language-model head, whose output nobody reads
    device = next(model.parameters()).device
    real = RealTokens()
    was_training = model.training
    model.eval()
    seen: set[str] = set()

    def visitor(path: str, statistic: Statistic) -> Callable[[RoutedTokens], None]:
        def visit(tokens: RoutedTokens) -> None:
            seen.add(path)
            statistic.update(tokens)

        return visit

    visitors = {path: visitor(path, statistic) for path, statistic in statistics.items()}
    try:
        with (
            moe.watched(visitors, real),
            progress.task(title) as update,
            _counted(model, list(visitors), len(batches), update),
        ):
            for batch in batches:
                real.mask_T = batch.attention_mask.flatten().to(device)
                body(**model_inputs(body, batch))
    finally:
        model.train(was_training)
    unseen = [path for path in statistics if path not in seen]
    if unseen:
        raise CalibrationError(
            f"{unseen[0]}: no token of the calibration text comes to this layer (a layer for images, say), so its "
            f"experts "
            f"cannot be judged. Prune the other layers only: name them under `keep:`."
        )


def model_inputs(model: Any, batch: TokenBatch) -> dict[str, Any]:
    """Arguments of a model's forward, or of its base model's, on its own device.

    The mask is left out where there is no padding, which lets fast attention run. A model with an encoder and a
    decoder reads the same ids in both, so every MoE layer sees as many tokens, padding in the same places.
    """
    device = next(model.parameters()).device
    ids = batch.input_ids.to(device)
    mask = None if batch.attention_mask.all() else batch.attention_mask.to(device, torch.int64)
    inputs: dict[str, Any] = {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask})
    if "decoder_input_ids" not in inspect.signature(model.forward).parameters:
        return inputs | {"use_cache": False}
    inputs["decoder_input_ids"] = ids
    if model.config.is_encoder_decoder:
        return inputs | ({} if mask is None else {"decoder_attention_mask": mask}) | {"use_cache": False}
    # Block diffusion: the decoder reads the encoder's cache, which must be there, and goes on behind its real tokens.
    if mask is not None:
        inputs["decoder_attention_mask"] = torch.cat([mask, mask], dim=1)
        inputs["decoder_position_ids"] = mask.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=device)
    return inputs


@torch.no_grad()
def logits(model: Any, batch: TokenBatch) -> Tensor:
    """The model's logits [N, V] at the batch's N real tokens, in the model's dtype.

    Of a class without a head these are its last hidden states, [N, H]: what it hands out instead.
    """
    was_training = model.training
    model.eval()
    try:
        output = model(**model_inputs(model, batch))
    finally:
        model.train(was_training)
    answers = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return answers[batch.attention_mask.to(answers.device)]  # type: ignore[no-any-return]


@contextmanager
def _counted(model: Any, paths: Sequence[str], num_batches: int, update: Update) -> Iterator[None]:
    """Report every time that a watched layer has run."""
    count = itertools.count(1)

    def report(*_: object) -> None:
        update(next(count), num_batches * len(paths))

    hooks = [model.get_submodule(path).register_forward_hook(report) for path in paths]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
