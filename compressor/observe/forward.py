"""A model's answers to a batch, and the devices that it is on."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from compressor.data.sequences import TokenBatch
from compressor.model.modules import evaluating


def device_of(model: Any) -> torch.device:
    """Where a model takes its text: its input embedding's device, or that of the first weight that is anywhere."""
    embedding = model.get_input_embeddings()
    weights = [*(embedding.parameters() if embedding is not None else ()), *model.parameters()]
    return next((tensor.device for tensor in weights if not tensor.is_meta), torch.device("cpu"))


def devices_of(model: Any) -> tuple[str, ...]:
    """All devices that hold a model's weights, by name."""
    return tuple(sorted({str(tensor.device) for tensor in model.parameters()}))


def model_inputs(model: Any, batch: TokenBatch) -> dict[str, Any]:
    """Arguments of a model's forward, or of its base model's, on its own device.

    The mask is left out where there is no padding, which lets fast attention run. A model with an encoder and a
    decoder reads the same ids in both, so every MoE layer sees as many tokens, padding in the same places.
    """
    device = device_of(model)
    ids = batch.input_ids.to(device)
    mask = None if batch.attention_mask.all() else batch.attention_mask.to(device, torch.int64)
    inputs: dict[str, Any] = {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask})
    for name, held in (batch.images or {}).items():
        inputs[name] = held.to(device, model.dtype) if held.is_floating_point() else held.to(device)
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
    """The model's logits [N, V] at the batch's N real tokens of text, in the model's dtype.

    Of a class without a head these are its last hidden states, [N, H]: what it hands out instead.
    """
    with evaluating(model):
        return answers_at(batch, model(**model_inputs(model, batch)))


def answers_at(batch: TokenBatch, output: Any) -> Tensor:
    """A model's output for a batch's real tokens of text: logits [N, V], or hidden states [N, H] without a head."""
    answers = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return answers[batch.text_mask.to(answers.device)]  # type: ignore[no-any-return]
