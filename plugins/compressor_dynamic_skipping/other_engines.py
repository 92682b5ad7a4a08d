"""What engines can be told that know no thresholds by layer: one for all layers, and ik_llama.cpp's option for it.

`-ser Kmin,t` of ik_llama.cpp (ggml_top_k_thresh): a token's chosen experts, by descending p, stay where they are among
the first Kmin, or where p_i >= t p_0; what the router chooses by (p) is its scores with their bias, of gpt-oss logits.
What stays is divided by its own sum where the router renormalises: with Kmin 1 the rule ratio, with t 1 `top_k`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from compressor_dynamic_skipping.thresholds import Curve, beta_for_mean

NOT_APPLIED = (
    "Read a build's own sources first: ik_llama.cpp's from 2025-10-19 (7a41b3b1f) to 2026-08-15, the last seen, take "
    "-ser and do nothing with it"
)


def one_threshold(
    figures: Sequence[Mapping[str, Tensor]], found: Mapping[str, Mapping[str, Any]], domains: Sequence[int]
) -> dict[str, float]:
    """What one threshold of the rule ratio does, with which a token uses as many experts on average as is decided:
    means over the layers; `instead_of`: what is lost with a threshold for each.
    """
    curves = [Curve.of("ratio", of_layer, domains) for of_layer in figures]
    beta = beta_for_mean(curves, _mean([layer["mean_experts"] for layer in found.values()]))
    reached = [curve.reached(beta) for curve in curves]
    losses = [one.relative_loss for one in reached if one.relative_loss is not None]
    told = {"beta": beta, "mean_experts": _mean([one.mean_experts for one in reached])}
    if len(losses) < len(reached):
        return told
    return told | {
        "relative_loss": _mean(losses),
        "instead_of": _mean([one["relative_loss"] for one in found.values()]),
    }


def ser(
    found: Mapping[str, Mapping[str, Any]], figures: Mapping[str, Mapping[str, Tensor]], one: Mapping[str, float] | None
) -> dict[str, str]:
    """The `line` and what it `says`, or the `problem` why there is none."""
    layers = list(found.values())
    if not all(float(figures[path].get("same.plain", 0)) for path in found):
        return {"problem": "of this router ik_llama.cpp compares biased scores, groups or logits, or it is not known"}
    if layers[0]["rule"] == "top_k":
        kept = layers[0]["top_k"]
        if layers[0]["renormalise"] and layers[0].get("normalise_over") != kept:
            return {"problem": f"what stays is divided by its own sum there; say `normalise_over: {kept}`"}
        return {"line": f"-ser {kept},1", "says": f"As decided, in every layer. {NOT_APPLIED}."}
    if any(layer["rule"] not in ("ratio", None) for layer in layers):
        return {"problem": f"it skips by {next(layer['rule'] for layer in layers if layer['rule'])}"}
    if one is None:
        return {"line": f"-ser 1,{layers[0]['beta']:.9g}", "says": f"As decided, in every layer. {NOT_APPLIED}."}
    loss = f", and lose {one['relative_loss']:.4g} instead of {one['instead_of']:.4g}" if "instead_of" in one else ""
    says = f"One threshold, where each layer has its own: a token would use as many experts{loss}, mean of the layers."
    return {"line": f"-ser 1,{one['beta']:.9g}", "says": f"{says} {NOT_APPLIED}."}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
