"""GPTQ (Frantar et al., arXiv 2210.17323): what rounding one input's weights loses, the weights of later inputs make up
for, as far as the inputs seen on calibration text allow. Dimensions: E experts, T tokens, O outputs, I inputs, B inputs
of a block.

As llm-compressor has it: scales are fixed beforehand, and inputs are rounded in the order of their size. Different:
scales are those of least squared error; an input that was never there is rounded like any other; a weight that is 0
stays 0, and what that loses is made up for too, so that patterns of zeros survive. And what later weights are told is
read off a factor of H itself, with the losses so far (Chee et al., QuIP, arXiv 2307.13304, theorem 6: the same
numbers), so that H is never inverted.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from compressor.plugin import InputStatistic, LinearSite
from compressor_quantization.rounding import Grid, codes_of, grid_for, nearest_
from compressor_quantization.schemes import Scheme, packed

_AT_ONCE, _FEW = 128, 16
"""Inputs that are told of all losses outside of their block at once, and few of them of the block's, so that what one
has to be told stays in a processor's cache.
"""
_ROWS = 256
"""Rows of Σ x xᵀ that are added up together, as far as the diagonal: what lies above it is the same."""


class Rounded(InputStatistic):
    """Σ x xᵀ [I, I] of each expert's own tokens, float32, while the layer is observed; then its matrices on their
    grids: of the layer only these are left, packed as they will be stored.
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
        add_squares(self._hessians[number], wide_TI)
        self._tokens[number] = self._tokens.get(number, 0) + len(wide_TI)

    def tensors(self) -> dict[str, Tensor]:
        """By place and scheme: `packed` [E, O, …], `scale` [E, O, G], of zero points `zero` [E, O, G], and `nearest`
        [E]: whether they are those of rounding to the nearest. Without E where it is no expert's matrix.
        """
        is_experts = self._site.place == "expert"
        experts: list[int | None] = [*range(self._site.layer.num_experts)] if is_experts else [None]
        found = [self._round(expert) for expert in experts]
        names = ("packed", "scale", "nearest", "zero")[: len(found[0])]
        tensors = {
            name: torch.stack(list(one)).cpu() for name, one in zip(names, zip(*found, strict=True), strict=True)
        }
        start = f"{self._site.place}.{self._scheme}"
        return {f"{start}.{name}": one if is_experts else one[0] for name, one in tensors.items()}

    def _round(self, expert: int | None) -> tuple[Tensor, ...]:
        weight_OI = self._site.weight(expert)
        grid = grid_for(weight_OI, self._scheme)
        hessian_II = self._hessians.pop(expert or 0, None)
        owed_II = None
        if hessian_II is not None and self._tokens[expert or 0] >= self._min_tokens:
            order_I = order_of(hessian_II.diagonal())
            owed_II = owed(hessian_II, order_I, self._dampening)
        codes_OI = grid.codes(weight_OI) if owed_II is None else gptq(weight_OI, order_I, owed_II, grid)
        codes = packed(codes_OI, self._scheme), grid.scale, torch.tensor(owed_II is None)
        return codes if grid.zero_point is None else (*codes, grid.zero_point)


def add_squares(hessian_II: Tensor, inputs_TI: Tensor) -> None:
    """Σ x xᵀ, in place: of what lies above the diagonal only what is convenient."""
    for start in range(0, len(hessian_II), _ROWS):
        rows = slice(start, start + _ROWS)
        hessian_II[rows, : rows.stop].addmm_(inputs_TI[:, rows].T, inputs_TI[:, : rows.stop])


def order_of(squares_I: Tensor) -> Tensor:
    """Inputs, of which the last one is rounded first, and has the largest Σ x²."""
    return squares_I.argsort(descending=True, stable=True).flip(0)


def owed(hessian_II: Tensor, order_I: Tensor, dampening: float) -> Tensor | None:
    """What input i is told of the loss of input j, which is rounded before it: [j, i] in this order, lower triangular,
    of what `add_squares` has added up, and fills in; None where H damped cannot be factored. With L of H = L Lᵀ it is
    L_ji / L_ii.
    """
    for start in range(0, len(hessian_II), _ROWS):
        rows = slice(start, start + _ROWS)
        hessian_II[:start, rows] = hessian_II[rows, :start].T
    damped_II = hessian_II[order_I][:, order_I]
    diagonal_I = damped_II.diagonal()
    diagonal_I += torch.where(diagonal_I == 0, diagonal_I.mean(), 0) + dampening * diagonal_I.mean()
    for _ in range(3):
        lower_II, failed = torch.linalg.cholesky_ex(damped_II)
        if not failed and torch.isfinite(lower_II.diagonal()).all():
            return lower_II.div_(lower_II.diagonal().clone())  # type: ignore[no-any-return]
        diagonal_I += 0.1 * diagonal_I.mean()  # rounding of nearly dependent inputs
    return None


def gptq(weight_OI: Tensor, order_I: Tensor, owed_II: Tensor, grid: Grid) -> Tensor:
    """The codes of a matrix, int8 [O, I]: input by input in this order, from the last on,

    q_i = round(w_i + Σ_j (w_j − q_j) · owed_ji), of the inputs j that are done
    """
    weight_IO = weight_OI.float().T.contiguous()[order_I]
    codes_IO, lost_IO = torch.empty_like(weight_IO, dtype=torch.int8), torch.empty_like(weight_IO)
    for block in _backwards(len(weight_IO), _AT_ONCE):
        own_BO, owed_BB, lost_BO = weight_IO[block], owed_II[block, block], lost_IO[block]
        scale_BO, zero_BO = grid.by_input(weight_OI.shape, order_I[block])
        inverse_BO = scale_BO.reciprocal().masked_fill_(own_BO == 0, 0)  # so that it stays 0
        levels_BO = torch.addmm(own_BO, owed_II[block.stop :, block].T, lost_IO[block.stop :])
        zeros = [None] * len(own_BO) if zero_BO is None else [*zero_BO]
        of_each = [*zip(levels_BO, inverse_BO, own_BO, scale_BO, lost_BO, zeros, strict=True)]
        for few in _backwards(len(own_BO), _FEW):
            levels_BO[few].addmm_(owed_BB[few.stop :, few].T, lost_BO[few.stop :])
            for i in reversed(range(few.start, few.stop)):
                level_O, inverse_O, own_O, scale_O, lost_O, zero_O = of_each[i]
                done = slice(i + 1, few.stop)
                nearest_(level_O.addmv_(lost_BO[done].T, owed_BB[done, i]).mul_(inverse_O), grid.scheme, zero_O)
                torch.addcmul(own_O, level_O, scale_O, value=-1, out=lost_O)
        codes_IO[block] = codes_of(levels_BO, grid.scheme, zero_BO)
    return codes_IO[order_I.argsort()].T.contiguous()


def _backwards(length: int, size: int) -> Iterator[slice]:
    for stop in range(length, 0, -size):
        yield slice(max(0, stop - size), stop)
