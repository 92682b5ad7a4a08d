"""Routers of every kind, written out, and tokens of layers whose experts are random matrices."""

from __future__ import annotations

import torch

from compressor.plugin import RoutingRule

ROUTERS = (
    "softmax",
    "softmax_in_order_of_ids",
    "softmax_not_renormalised",
    "softmax_not_renormalised_scaled",
    "softmax_biased",
    "softmax_biased_not_renormalised",
    "sigmoid_biased_scaled",
    "sequential",
)
HIDDEN = 6


def softmax(logits, top_k, bias):
    weights, index = logits.double().softmax(-1).topk(top_k, dim=-1)
    return index, weights / weights.sum(-1, keepdim=True)


def softmax_in_order_of_ids(logits, top_k, bias):
    """Routers need not give their choice by descending weight (deepseek_v3: topk(sorted=False))."""
    index = logits.topk(top_k, dim=-1).indices.sort(-1).values
    weights = logits.double().softmax(-1).gather(1, index)
    return index, weights / weights.sum(-1, keepdim=True)


def softmax_not_renormalised(logits, top_k, bias):
    weights, index = logits.double().softmax(-1).topk(top_k, dim=-1)
    return index, weights


def softmax_not_renormalised_scaled(logits, top_k, bias):
    weights, index = logits.double().softmax(-1).topk(top_k, dim=-1)
    return index, 1.5 * weights


def softmax_biased(logits, top_k, bias):
    """The softmax grows when experts go and the bias does not, so the order of those that stay may change."""
    index, weights = softmax_biased_not_renormalised(logits, top_k, bias)
    return index, weights / weights.sum(-1, keepdim=True)


def softmax_biased_not_renormalised(logits, top_k, bias):
    scores = logits.double().softmax(-1)
    index = (scores + bias).masked_fill(logits == float("-inf"), float("-inf")).topk(top_k, dim=-1).indices
    return index, scores.gather(1, index)


def sigmoid_biased_scaled(logits, top_k, bias):
    scores = logits.double().sigmoid()
    index = (scores + bias).masked_fill(logits == float("-inf"), float("-inf")).topk(top_k, dim=-1).indices
    weights = scores.gather(1, index)
    return index, 2.5 * weights / weights.sum(-1, keepdim=True)


def sequential(logits, top_k, bias):
    """No closed rule: each choice is weighed against those still to be had, and an even id counts double."""
    left, ids, weights = logits.double(), [], []
    for _ in range(top_k):
        best = left.argmax(-1, keepdim=True)
        ids.append(best)
        weights.append(left.softmax(-1).gather(1, best) * (2 - best % 2))
        left = left.scatter(1, best, float("-inf"))
    return torch.cat(ids, 1), torch.cat(weights, 1)


def rule(router, bias):
    return {
        "softmax": RoutingRule("softmax", True, 1.0),
        "softmax_in_order_of_ids": RoutingRule("softmax", True, 1.0),
        "softmax_not_renormalised": RoutingRule("softmax", False, 1.0),
        "softmax_not_renormalised_scaled": RoutingRule("softmax", False, 1.5),
        "softmax_biased": RoutingRule("softmax", True, 1.0, bias),
        "softmax_biased_not_renormalised": RoutingRule("softmax", False, 1.0, bias),
        "sigmoid_biased_scaled": RoutingRule("sigmoid", True, 2.5, bias),
        "sequential": None,
    }[router]


def random_tokens(make_tokens, router, num_tokens, num_experts, top_k, seed, num_extra=0):
    """A batch at a layer with this router; `make_tokens` is the fixture."""
    generator = torch.Generator().manual_seed(seed)
    num_choices = num_experts + num_extra
    bias = torch.randn(num_choices, generator=generator, dtype=torch.float64) * 0.3
    return make_tokens(
        torch.randn(num_tokens, HIDDEN, generator=generator),
        torch.randn(num_choices, HIDDEN, HIDDEN, generator=generator),
        torch.randn(num_tokens, num_choices, generator=generator) * 1.5,
        top_k,
        lambda logits, top_k: globals()[router](logits, top_k, bias),
        rule(router, bias),
        num_extra,
    )


def output(tokens, index, weights):
    """[T, H] float64: Σ over the chosen experts of weight × output."""
    outputs = tokens.evaluate_experts(tokens.hidden_TH, index).double()
    return (weights.double()[..., None] * outputs).sum(1)
