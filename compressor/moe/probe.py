"""Run a router alone, on random weights and random tokens, to learn what it returns.

Cheap (one small module, a few tokens, on the CPU) and needs no weights of the real model, so it works for `check` and
`inspect`, which read the config only.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_NUM_TOKENS = 24


@dataclass(frozen=True)
class RouterProbe:
    """What a router's forward answered.

    `index_position` and `weights_position` tell where in its output tuple the chosen expert ids [T, K] and their
    weights [T, K] are; both None where the router returns logits only and its block chooses. `top_k` is the number of
    experts really chosen, which some classes fix whatever the config says.
    """

    class_name: str
    top_k: int | None
    index_position: int | None
    weights_position: int | None
    uses_groups: bool
    returned: str


@torch.no_grad()
def probe_router(router: nn.Module, num_experts: int, fallback_top_k: int | None, num_groups: int) -> RouterProbe:
    """Probe a meta router. `fallback_top_k` is the config's word, believed where the block does the choosing."""
    with torch.device("cpu"):
        real = copy.deepcopy(router).to_empty(device="cpu").float().eval()
    generator = torch.Generator().manual_seed(0)
    width = 0
    for tensor in [*real.parameters(), *real.buffers()]:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) / max(1, tensor.shape[-1]) ** 0.5)
        width = tensor.shape[-1] if tensor.dim() == 2 and num_experts in tensor.shape else width
    hidden = torch.randn(1, _NUM_TOKENS, width, generator=generator)
    output = _call(real, hidden)
    outputs = output if isinstance(output, tuple) else (output,)
    returned = ", ".join(f"{t.dtype}{list(t.shape)}".removeprefix("torch.") for t in outputs if isinstance(t, Tensor))
    index = [i for i, t in enumerate(outputs) if _is_choice(t, num_experts) and not t.is_floating_point()]
    top_k = outputs[index[0]].shape[-1] if index else fallback_top_k
    weights = [
        i for i, t in enumerate(outputs) if isinstance(t, Tensor) and t.is_floating_point() and _last(t) == top_k
    ]
    if not index or not weights:
        return RouterProbe(type(router).__name__, fallback_top_k, None, None, False, returned)
    return RouterProbe(
        class_name=type(router).__name__,
        top_k=top_k,
        index_position=index[0],
        weights_position=weights[-1],
        uses_groups=num_groups > 1 and _uses_groups(real, hidden, outputs[index[0]], index[0]),
        returned=returned,
    )


def _call(router: nn.Module, hidden: Tensor) -> Any:
    """Call with tokens flattened, as transformers 5 does, then with a batch dimension, as older remote code does."""
    try:
        return router(hidden[0])
    except Exception:
        try:
            return router(hidden)
        except Exception as error:  # whatever it needs, we do not have it; the caller names the router
            return (f"{type(error).__name__}: {error}",)


def _last(tensor: Tensor) -> int:
    return tensor.shape[-1] if tensor.dim() else 0


def _is_choice(value: object, num_experts: int) -> bool:
    return isinstance(value, Tensor) and value.dim() >= 2 and 1 <= value.shape[-1] <= num_experts


def _uses_groups(router: nn.Module, hidden: Tensor, index: Tensor, position: int) -> bool:
    """Whether the router reads its group counts at all: some classes carry them and never look.

    Asked by giving it counts that no router can divide its experts by, not by whether groups limited this choice: with
    all groups chosen they limit nothing, and the router still cuts its experts into groups of equal size.
    """
    impossible = copy.deepcopy(router)
    for attribute, value in list(impossible.__dict__.items()):
        if type(value) is int and "group" in attribute:
            setattr(impossible, attribute, 10**6)
    outputs = _call(impossible, hidden)
    if not isinstance(outputs, tuple) or len(outputs) <= position or not isinstance(outputs[position], Tensor):
        return True
    return not torch.equal(index.sort(-1).values, outputs[position].sort(-1).values)
