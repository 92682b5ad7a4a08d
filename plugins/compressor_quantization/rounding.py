"""Scales and zero points, without files. Dimensions: O outputs, I inputs, N groups of g inputs with a scale each (G of
an output), S scales that are tried.

A weight w is stored as a whole number q, or an 8-bit float, and read as (q − z) · s; z is 0 where it is symmetric. Work
is done in pieces that stay in a processor's cache, and figures of groups are left until the last one is through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2

import torch
from torch import Tensor

from compressor_quantization.schemes import Scheme

_NUM_TRIED = 4
_NUMBERS_AT_ONCE = 2**16
_MOST = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class Grid:
    """The numbers that a matrix can be stored as: `scale` [O, G], or one for each block, in the dtype in which it is
    stored; `zero_point` [O, G] int8, None where it is symmetric.
    """

    scheme: Scheme
    scale: Tensor
    zero_point: Tensor | None = None

    def wide(self, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of every weight, float32: [O, I] each."""
        scale_OI, zero = _spread(self.scale.float(), self.scheme, shape), self.zero_point
        return scale_OI, None if zero is None else _spread(zero.float(), self.scheme, shape)

    def by_input(self, shape: torch.Size, order_I: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same with inputs first, in an order: [I, O] each."""
        rows, columns = self.scheme.block_of(shape[1])

        def spread(of_each: Tensor) -> Tensor:
            return of_each.float().T.repeat_interleave(rows, 1)[:, : shape[0]][order_I // columns]

        return spread(self.scale), None if self.zero_point is None else spread(self.zero_point)

    def codes(self, weight_OI: Tensor) -> Tensor:
        """The nearest q of each weight, one byte each: int8, of floats their bits. [O, I]"""
        found_OI, start = torch.empty_like(weight_OI, dtype=torch.int8), 0
        for part_OI in _pieces(weight_OI, self.scheme):
            of_rows = slice(start, start := start + len(part_OI))
            found_OI[of_rows] = self._of_rows(of_rows)._codes(part_OI.float())
        return found_OI

    def _of_rows(self, rows: slice) -> Grid:
        per_scale = self.scheme.block_of(1)[0]
        own = slice(rows.start // per_scale, -(-rows.stop // per_scale))
        return Grid(self.scheme, self.scale[own], None if self.zero_point is None else self.zero_point[own])

    def _codes(self, weight_OI: Tensor) -> Tensor:
        scheme, scale = self.scheme, self.scale.float()
        if scheme.is_float:
            wide_OI = scale if scheme.name == "FP8_DYNAMIC" else self.wide(weight_OI.shape)[0]
            return (weight_OI / wide_OI).clamp_(-_MOST, _MOST).to(torch.float8_e4m3fn).view(torch.int8)
        zero_OG1 = None if self.zero_point is None else self.zero_point.unsqueeze(2)
        levels_OGg = weight_OI.view(*scale.shape, -1) * scale.reciprocal().unsqueeze(2)
        return codes_of(nearest_(levels_OGg, scheme, zero_OG1), scheme, zero_OG1).view(weight_OI.shape)

    def numbers(self, codes_OI: Tensor) -> Tensor:
        """What codes are read as: (q − z) · s, float32 as they are before they are rounded to the model's dtype."""
        scale_OI, zero_OI = self.wide(codes_OI.shape)
        whole_OI = codes_OI.view(torch.float8_e4m3fn) if self.scheme.is_float else codes_OI
        return (whole_OI.float() - (0 if zero_OI is None else zero_OI)) * scale_OI

    def rounded(self, weight_OI: Tensor) -> Tensor:
        """The nearest numbers of the grid, as `numbers` has them."""
        return self.numbers(self.codes(weight_OI))


def nearest_(levels: Tensor, scheme: Scheme, zero: Tensor | None = None) -> Tensor:
    """The nearest q − z of w / s, in place, float32 of any shape. 0 stays 0."""
    if scheme.is_float:
        return levels.copy_(levels.clamp_(-_MOST, _MOST).to(torch.float8_e4m3fn))
    if zero is None:
        return levels.round_().clamp_(*scheme.levels)
    return levels.add_(zero).round_().clamp_(*scheme.levels).sub_(zero)


def codes_of(levels: Tensor, scheme: Scheme, zero: Tensor | None = None) -> Tensor:
    """One byte for each q of q − z: int8, of floats their bits."""
    if scheme.is_float:
        return levels.to(torch.float8_e4m3fn).view(torch.int8)
    return (levels if zero is None else levels + zero).to(torch.int8)


def grid_for(weight_OI: Tensor, scheme: Scheme) -> Grid:
    """The grid on which a matrix loses least, of those tried. Raises ValueError for NaN and infinity."""
    if scheme.is_float:
        largest = torch.cat([_largest(part.float(), scheme) for part in _pieces(weight_OI, scheme)])
        return Grid(scheme, _stored(_finite(largest) / _MOST, weight_OI.dtype))
    size = scheme.group_of(weight_OI.shape[1])
    parts = tried(scheme.bits, size)
    found = [_fits(part.float().view(-1, size), scheme, parts) for part in _pieces(weight_OI, scheme)]
    scale_SN, gain_SN, zero_1N = (torch.cat(one, 1) for one in zip(*found, strict=True))
    best_1N = gain_SN.max(0, keepdim=True).indices
    scale_OG, zero_OG = (one.view(len(weight_OI), -1) for one in (scale_SN.gather(0, best_1N), zero_1N))
    return Grid(
        scheme, _stored(_finite(scale_OG), weight_OI.dtype), None if scheme.symmetric else zero_OG.to(torch.int8)
    )


def tried(bits: int, size: int) -> Sequence[float]:
    """Parts of a group's range: a smaller one cuts the largest weights and rounds all others less, which is worth more
    the more there are. In 8 bits cutting never pays.
    """
    first = min(1.06, 1.02 - 0.04 * log2(size / 64))
    return [first - 0.06 * step for step in range(_NUM_TRIED)] if bits == 4 else [1.0]


def _fits(groups_Ng: Tensor, scheme: Scheme, parts: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """(scale [S, N], what it gains [S, N], zero point [1, N]): each part's numbers q − z have a scale that suits them
    best, Σ w (q − z) / Σ (q − z)². What is lost is Σ w² less the gain, [Σ w (q − z)]² / Σ (q − z)².
    """
    high_N, low_N = groups_Ng.amax(1).clamp_(min=0), groups_Ng.amin(1).clamp_(max=0)
    least, most = scheme.levels
    if scheme.symmetric:
        high_N = torch.maximum(high_N, -low_N)
        low_N = -high_N
    step_N = (high_N - low_N).div_(most - least)
    inverse_N = step_N.clamp(min=torch.finfo(torch.float32).tiny * 4).reciprocal_()
    zero_N = torch.zeros_like(low_N) if scheme.symmetric else (least - low_N * inverse_N).round_().clamp_(least, most)
    if len(parts) == 1:
        return step_N[None], step_N[None], zero_N[None]
    zero_N1 = None if scheme.symmetric else zero_N[:, None]
    levels_Ng, products_Ng = torch.empty_like(groups_Ng), torch.empty_like(groups_Ng)
    both_2SN = groups_Ng.new_empty(2, len(parts), len(groups_Ng))
    for of_part, both_2N in zip(parts, both_2SN.unbind(1), strict=True):
        torch.mul(groups_Ng, (inverse_N / of_part)[:, None], out=levels_Ng)
        nearest_(levels_Ng, scheme, zero_N1)
        torch.sum(torch.mul(groups_Ng, levels_Ng, out=products_Ng), 1, out=both_2N[0])
        torch.sum(torch.mul(levels_Ng, levels_Ng, out=products_Ng), 1, out=both_2N[1])
    scale_SN = both_2SN[0] / both_2SN[1].clamp_(min=1)
    return scale_SN, both_2SN[0] * scale_SN, zero_N[None]


def _pieces(weight_OI: Tensor, scheme: Scheme) -> Sequence[Tensor]:
    """Whole blocks of outputs."""
    num_inputs = weight_OI.shape[1]
    per_scale = scheme.block_of(num_inputs)[0]
    return torch.split(weight_OI, max(1, _NUMBERS_AT_ONCE // num_inputs // per_scale) * per_scale)


def _finite(figures: Tensor) -> Tensor:
    if not torch.isfinite(figures).all():
        raise ValueError("it holds NaN or infinity")
    return figures


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As it will be read; 1 where all weights are 0, and never so small that it would be stored as 0."""
    scale = torch.where(scale == 0, 1.0, scale).clamp(min=torch.finfo(dtype).tiny)
    return scale.to(dtype)


def _largest(weight_OI: Tensor, scheme: Scheme) -> Tensor:
    """The largest |w| of each block, the last ones of which may be smaller: [O / rows, I / columns]."""
    num_outputs, num_inputs = weight_OI.shape
    rows, columns = scheme.block_of(num_inputs)
    filled = torch.nn.functional.pad(weight_OI, (0, -num_inputs % columns, 0, -num_outputs % rows))
    by_column = filled.abs().reshape(len(filled), -1, columns).amax(2)
    largest: Tensor = by_column.reshape(-1, rows, by_column.shape[1]).amax(1)
    return largest


def _spread(of_each: Tensor, scheme: Scheme, shape: torch.Size) -> Tensor:
    rows, columns = scheme.block_of(shape[1])
    wide: Tensor = of_each.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]
    return wide
