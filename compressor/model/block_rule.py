"""The routing rule of a block that chooses by itself, found by how its output changes under a mask.

Dimensions: T tokens, E experts of the layer, K experts chosen per token, M experts evaluated, H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import CheckpointError, UnsupportedModelError
from compressor.model.expert_outputs import evaluate_list
from compressor.model.masking import dropped_experts, masked_router, router_weights
from compressor.model.modules import evaluating
from compressor.model.router_logits import RouterLogits
from compressor.model.routing_rule import RoutingRule
from compressor.model.rule_fitting import weights_by_id
from compressor.model.structure import MoELayer

NUM_TOKENS_THROUGH_BLOCK = 64


@torch.no_grad()
def rule_of_block(model: nn.Module, layer: MoELayer, hidden_TH: Tensor | None = None) -> RoutingRule:
    """The rule of a block that chooses by itself: the one that explains how outputs change under a mask of the experts
    that these tokens (or random ones) choose most; differences, so shared experts do not matter. Raises
    UnsupportedModelError where there is none.
    """
    block, weights = model.get_submodule(layer.path), router_weights(model, layer)
    if hidden_TH is None:
        generator = torch.Generator().manual_seed(0)
        hidden_TH = torch.randn(NUM_TOKENS_THROUGH_BLOCK, weights[0].shape[-1], generator=generator).to(weights[0])
    few_TH = hidden_TH[:NUM_TOKENS_THROUGH_BLOCK]
    (container, names), *_ = layer.containers.items()
    modules = [model.get_submodule(f"{container}.{name}") for name in names]
    try:
        with evaluating(block):  # in training some shake their input
            return _rule_of_block(model, layer, few_TH, modules)
    except TypeError as error:
        raise UnsupportedModelError(
            f"{layer.path} ({type(block).__name__}): how it chooses its experts cannot be found out, since it or its "
            f"experts need more than hidden states: {error}; this needs a plugin."
        ) from error


def _rule_of_block(model: nn.Module, layer: MoELayer, few_TH: Tensor, modules: list[nn.Module]) -> RoutingRule:
    block, weights = model.get_submodule(layer.path), router_weights(model, layer)
    with RouterLogits(weights) as mode:
        full = first_output(block.forward(few_TH[None]))
    assert mode.seen is not None
    refuse_not_finite(layer, full)
    logits_TE = mode.seen.reshape(len(few_TH), -1)[:, : layer.num_choices].float()
    all_TM = torch.arange(layer.num_experts, device=few_TH.device).expand(len(few_TH), -1)
    outputs_TEH = evaluate_list(modules, few_TH, all_TM).double()
    times_chosen_E = logits_TE.topk(layer.top_k, dim=-1).indices.flatten().bincount(minlength=layer.num_experts)
    num_kept = max(layer.top_k, -(-layer.num_experts // 2))
    kept = sorted(times_chosen_E.argsort(stable=True)[:num_kept].tolist())
    with masked_router(model, layer, kept):
        masked = first_output(block.forward(few_TH[None]))
    wanted_TH = (masked - full).double().reshape(len(few_TH), -1)
    dropped = dropped_experts(layer, kept, few_TH.device)
    for score in ("softmax", "sigmoid"):
        for renormalise in (True, False):
            rule = RoutingRule(score, renormalise, 1.0)
            smaller = rule.choose(logits_TE.index_fill(-1, dropped, float("-inf")), layer.top_k)
            whole = rule.choose(logits_TE, layer.top_k)
            change_TE = weights_by_id(*smaller, layer.num_experts) - weights_by_id(*whole, layer.num_experts)
            found_TH = torch.einsum("te,teh->th", change_TE, outputs_TEH)
            error = (found_TH - wanted_TH).norm() / wanted_TH.norm().clamp_min(1e-30)
            if error < (1e-4 if few_TH.dtype == torch.float32 else 3e-2):
                return rule
    raise UnsupportedModelError(
        f"{layer.path} ({type(block).__name__}): it chooses its experts by a rule that is neither softmax nor "
        f"sigmoid with top-{layer.top_k}, so its smaller versions cannot be computed; this needs a plugin."
    )


def refuse_not_finite(layer: MoELayer, output: Tensor) -> None:
    # smallest and largest carry NaN and infinity too, and cost a tenth of testing every number
    if output.numel() and not torch.isfinite(torch.stack(output.aminmax())).all():
        raise CheckpointError(
            f"{layer.path}: the experts' output on text is not finite: damaged, or too large for {output.dtype}."
        )


def first_output(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]
