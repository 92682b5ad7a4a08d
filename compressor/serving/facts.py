"""What rules ask about a checkpoint, from its config.json and its layers as they are or will be."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compressor.checkpoint.quantization import format_of, quantisation_of

if TYPE_CHECKING:
    from compressor.model.structure import MoELayer
    from compressor.serving.rules import Serve


def facts_of(
    raw: Mapping[str, Any],
    layers: Sequence[MoELayer],
    *,
    most: int = 0,
    found: Collection[str] = (),
    padded: bool = False,
    skipping: bool = False,
    extra_layers: bool = False,
    serve: Serve | None = None,
) -> dict[str, Any]:
    """Fact → value, None where a run will find it. `most`: experts of a layer before; `found`, `padded`: as of `Plan`;
    `skipping`: whether the config says so; `extra_layers`: whether some are left out; `serve` has degrees.
    """
    text, stored = raw.get("text_config") or {}, quantisation_of(raw)
    routed = [max(layer.num_experts for layer in layers)] if padded else [layer.num_experts for layer in layers]
    held = routed if padded else [layer.num_with_weights for layer in layers]
    constants = None if "constants" in found else any(layer.constants for layer in layers)
    replacing = [layer.path.split(".") for layer in layers if layer.constants or constants is None]
    open_counts, bits = "num_experts" in found, any(layer.bits for layer in layers)
    groups = max(layer.num_groups for layer in layers)
    experts = None if len({*routed}) > 1 or (open_counts and not constants) else routed[0]
    return {
        "architecture": str((raw.get("architectures") or ["a class without a name"])[0]),
        "model_type": str(raw.get("model_type")),
        "experts": experts,  # that the router of every layer chooses among
        "groups": groups,  # 1 where the choice is not limited to some
        "per_group": experts and experts // groups,
        "top_k": max(layer.top_k for layer in layers),
        "mean": round(sum(held) / len(held)),  # experts with weights in a layer
        "most": max(most, *routed, 0),
        "uneven": len({*held}) > 1 or (open_counts and not padded),  # whether layers hold different numbers of experts
        "constants": constants,  # whether experts answer constants, or are never chosen
        "nested": any(sum(map(str.isdecimal, path)) > 1 for path in replacing),
        "selection_bias": any(layer.selection_biases for layer in layers),
        "skipping": skipping or any(layer.skip_rule for layer in layers),
        "zeros": any(layer.zeros for layer in layers),
        "quantised": stored is not None or bits,
        "quantisation": None if bits else str(stored.get("format") or format_of(stored)) if stored else "none",
        "extra_layers": extra_layers,
        "attention_heads": raw.get("num_attention_heads") or text.get("num_attention_heads"),
        "keys": {*raw, *text},
        "tensor_parallel": serve.tensor_parallel if serve else 1,
        "expert_parallel": serve.expert_parallel if serve else 1,
    }
