"""Norms of inputs, and the weights that stay. Dimensions: E experts, T tokens, I inputs, O outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.plugin import InputStatistic


class Norms(InputStatistic):
    """Σ x² of each input over the tokens: [E, I] of a matrix that every expert has, [I] of another."""

    def __init__(self, num_experts: int, place: str) -> None:
        """`place` is where the linear map is, as `LinearSite` has it."""
        self._num_experts, self._place = num_experts, place
        self._squares: Tensor | None = None
        self._tokens: Tensor | None = None

    def update(self, inputs_TI: Tensor, expert: int | None) -> None:
        """Add one expert's tokens, or all of them."""
        squares_I = inputs_TI.double().square().sum(0)
        if self._squares is None or self._tokens is None:
            shape = () if expert is None else (self._num_experts,)
            self._squares, self._tokens = squares_I.new_zeros(*shape, len(squares_I)), squares_I.new_zeros(shape)
        at = ... if expert is None else expert
        self._squares[at] += squares_I
        self._tokens[at] += len(inputs_TI)

    def tensors(self) -> dict[str, Tensor]:
        """`squares.PLACE` [E, I] or [I], and `tokens` [E] or []."""
        if self._squares is None or self._tokens is None:
            return {}
        return {f"squares.{self._place}": self._squares.cpu(), "tokens": self._tokens.cpu()}


def sparse(weight_OI: Tensor, norm_I: Tensor, pattern: str, sparsity: float = 0.5) -> Tensor:
    """The weights with zeros where |w| · ‖x‖ is smallest: among the inputs of each output, or among each few of them in
    a row (`2:4`, `4:8`). Of equals the first go; of an expert that saw nothing only |w| counts.

    Raises ValueError where the inputs cannot be taken four or eight at a time.
    """
    norm_I = norm_I.to(weight_OI.device)
    scores_OI = weight_OI.abs().to(torch.promote_types(weight_OI.dtype, torch.float32))
    if norm_I.any():
        scores_OI = scores_OI * norm_I.to(scores_OI.dtype)
    num_inputs = weight_OI.shape[1]
    size = num_inputs if pattern == "unstructured" else int(pattern.partition(":")[2])
    if num_inputs % size:
        raise ValueError(f"{num_inputs} inputs of a matrix cannot be taken {size} at a time for {pattern} zeros")
    num_zeros = int(num_inputs * sparsity) if pattern == "unstructured" else size // 2
    groups_NS = scores_OI.reshape(-1, size)
    gone_NZ = groups_NS.argsort(dim=1, stable=True)[:, :num_zeros]
    kept_OI = torch.ones_like(groups_NS, dtype=torch.bool).scatter_(1, gone_NZ, value=False).reshape(weight_OI.shape)
    return torch.where(kept_OI, weight_OI, 0)
