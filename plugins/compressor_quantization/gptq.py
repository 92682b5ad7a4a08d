"""GPTQ (Frantar et al., arXiv 2210.17323): what rounding one input's weights loses, the weights of later inputs make up
for, as far as the inputs seen on calibration text allow. Dimensions: E experts, T tokens, O outputs, I inputs.

As llm-compressor has it: scales are fixed beforehand, and inputs are rounded in the order of their size. Different:
scales are those of least squared error; an input that was never there is rounded like any other; a weight that is 0
stays 0, and what that loses is made up for too, so that patterns of zeros survive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.plugin import InputStatistic, LinearSite
from compressor_quantization.rounding import Grid, grid_for, round_to
from compressor_quantization.schemes import Scheme

_AT_ONCE = 128
"""Inputs whose losses are made up for in their own block, before all later weights are told."""


class Rounded(InputStatistic):
    """Σ x xᵀ [I, I] of each expert's own tokens, float32, while the layer is observed; then its matrices on their
    grids: of the layer only these are left, a byte a weight.
    """

    def __init__(self, site: LinearSite, scheme: Scheme, min_tokens: int, dampening: float) -> None:
        """An expert with fewer tokens is rounded to the nearest; `dampening` is a share of the mean Σ x²."""
        self._site, self._scheme, self._min_tokens, self._dampening = site, scheme, min_tokens, dampening
        self._hessians: dict[int, Tensor] = {}
        self._tokens: dict[int, int] = {}

    def update(self, inputs_TI: Tensor, expert: int | None) -> None:
        """Add one expert's tokens, or all of them."""
        number, wide_TI = expert or 0, inputs_TI.float()
        if number not in self._hessians:
            self._hessians[number] = wide_TI.new_zeros(wide_TI.shape[1], wide_TI.shape[1])
        self._hessians[number].addmm_(wide_TI.T, wide_TI)
        self._tokens[number] = self._tokens.get(number, 0) + len(wide_TI)

    def tensors(self) -> dict[str, Tensor]:
        """By place and scheme: `codes` int8 [E, O, I], `scale` [E, O, G], of zero points `zero` [E, O, G], and
        `nearest` [E]: whether they are those of rounding to the nearest. Without E where it is no expert's matrix.
        """
        is_experts = self._site.place == "expert"
        experts: list[int | None] = [*range(self._site.layer.num_experts)] if is_experts else [None]
        found = [self._round(expert) for expert in experts]
        names = ("codes", "scale", "nearest", "zero")[: len(found[0])]
        tensors = {
            name: torch.stack(list(one)).cpu() for name, one in zip(names, zip(*found, strict=True), strict=True)
        }
        start = f"{self._site.place}.{self._scheme}"
        return {f"{start}.{name}": one if is_experts else one[0] for name, one in tensors.items()}

    def _round(self, expert: int | None) -> tuple[Tensor, ...]:
        weight_OI = self._site.weight(expert)
        grid = grid_for(weight_OI, self._scheme)
        hessian_II = self._hessians.pop(expert or 0, None)
        factor_II = None
        if hessian_II is not None and self._tokens[expert or 0] >= self._min_tokens:
            factor_II = inverse_factor(hessian_II, self._dampening)
        numbers_OI = weight_OI
        if factor_II is not None and hessian_II is not None:
            numbers_OI = gptq(weight_OI, hessian_II.diagonal(), factor_II, grid)
        codes = grid.codes(numbers_OI), grid.scale, torch.tensor(factor_II is None)
        return codes if grid.zero_point is None else (*codes, grid.zero_point)


def order_of(squares_I: Tensor) -> Tensor:
    """Inputs in the order in which they are rounded: the largest Σ x² first."""
    return squares_I.argsort(descending=True, stable=True)


def inverse_factor(hessian_II: Tensor, dampening: float) -> Tensor | None:
    """U, upper triangular, with UᵀU = (H damped)⁻¹, inputs in the order of `order_of`; None where H cannot be inverted
    even so. Row i of it, over its first number, says what the later weights owe to input i.
    """
    order_I = order_of(hessian_II.diagonal())
    damped_II = hessian_II[order_I][:, order_I]
    diagonal_I = damped_II.diagonal()
    diagonal_I += torch.where(diagonal_I == 0, diagonal_I.mean(), 0) + dampening * diagonal_I.mean()
    for _ in range(3):
        lower_II, failed = torch.linalg.cholesky_ex(damped_II)
        if not failed:
            upper_II, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_II), upper=True)
        if not failed and torch.isfinite(upper_II).all():
            return upper_II  # type: ignore[no-any-return]
        diagonal_I += 0.1 * diagonal_I.mean()  # rounding of nearly dependent inputs
    return None


def gptq(weight_OI: Tensor, squares_I: Tensor, factor_II: Tensor, grid: Grid) -> Tensor:
    """The matrix on its grid, float32: column by column in the order of `order_of`, as the paper's algorithm 1 with U.

    q = round(w_i),  e = (w_i − q) / U_ii,  w_j ← w_j − e · U_ij  for the inputs j behind i
    """
    order_I = order_of(squares_I)
    scale_OI, zero_OI = grid.wide(weight_OI.shape)
    left_IO, scale_IO, zero_IO = (one.float().T[order_I].contiguous() for one in (weight_OI, scale_OI, zero_OI))
    found_IO, is_zero_IO, is_symmetric = torch.empty_like(left_IO), left_IO == 0, grid.zero_point is None
    for start in range(0, len(left_IO), _AT_ONCE):
        block = slice(start, start + _AT_ONCE)
        own_BO, errors_BO, factor_BB = left_IO[block], torch.empty_like(left_IO[block]), factor_II[block, block]
        for i, own_O in enumerate(own_BO):
            at = start + i
            number_O = round_to(grid.scheme, own_O, scale_IO[at], None if is_symmetric else zero_IO[at])
            found_IO[at] = number_O.masked_fill_(is_zero_IO[at], 0)
            errors_BO[i] = (own_O - number_O) / factor_BB[i, i]
            own_BO[i + 1 :].addr_(factor_BB[i, i + 1 :], errors_BO[i], alpha=-1)
        left_IO[block.stop :] -= factor_II[block, block.stop :].T @ errors_BO
    return found_IO[order_I.argsort()].T.contiguous()
