"""See, mask or replace the logits inside a router, whatever its code does with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_LINEAR_FUNCTIONS = {
    functional.linear,
    torch.mm,
    torch.matmul,
    torch.addmm,
    torch.Tensor.mm,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
}


class RouterLogits(TorchFunctionMode):
    """While active, records, masks or answers the linear map inside a router, known by its weight: one of `weights`
    [rows, H], a view or a copy. `dropped` rows' logits become −inf; `recorded` replaces the product; `seen`: before
    masking.
    """

    def __init__(
        self, weights: Sequence[Tensor], dropped: Tensor | None = None, recorded: Tensor | None = None
    ) -> None:
        super().__init__()
        self.weights = weights
        self.dropped = dropped
        self.recorded = recorded
        self.seen: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass every call through, but those that produce the router's logits."""
        if func not in _LINEAR_FUNCTIONS or not self._is_router(args, kwargs or {}):
            return func(*args, **(kwargs or {}))
        out = self.recorded if self.recorded is not None else func(*args, **(kwargs or {}))
        self.seen = out
        if self.dropped is not None and len(self.dropped):
            return out.index_fill(-1, self.dropped, float("-inf"))
        return out.clone() if self.recorded is not None else out

    def _is_router(self, args: Any, kwargs: Any) -> bool:
        given = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, Tensor)]  # args[0]: tokens
        return any(_same(value, weight) for value in given for weight in self.weights)


def _same(value: Tensor, weight: Tensor) -> bool:
    if value is weight:
        return True
    if value.shape != weight.shape and value.shape != weight.shape[::-1]:
        return False
    return value.dtype != weight.dtype or value.data_ptr() == weight.data_ptr()
