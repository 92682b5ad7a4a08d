"""Scales and zero points, without files. Dimensions: O outputs, I inputs, G groups of g inputs with a scale each.

A weight w is stored as a whole number q, or an 8-bit float, and read as (q − z) · s; z is 0 where it is symmetric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor_quantization.schemes import Scheme

_SHRUNK = {4: (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72), 8: (1.0,)}
"""Parts of a group's range that are tried, by bits: a smaller scale cuts the largest weights and rounds all others
less. In 8 bits cutting never pays."""
_NUMBERS_AT_ONCE = 2**15
"""So many stay in a processor's cache while all scales are tried."""


@dataclass(frozen=True)
class Grid:
    """The numbers that a matrix can be stored as: `scale` [O, G], or one for each block, in the dtype in which it is
    stored; `zero_point` [O, G] int8, None where it is symmetric.
    """

    scheme: Scheme
    scale: Tensor
    zero_point: Tensor | None = None

    def wide(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Scale and zero point of every weight, float32: [O, I] each, views."""
        zero = torch.zeros_like(self.scale) if self.zero_point is None else self.zero_point
        return _spread(self.scale.float(), self.scheme, shape), _spread(zero.float(), self.scheme, shape)

    def codes(self, weight_OI: Tensor) -> Tensor:
        """The nearest q of each weight, one byte each: int8, of floats their bits. [O, I]"""
        found, start = [], 0
        for part_OI in some_rows(weight_OI, self.scheme):
            of_rows = slice(start, start := start + len(part_OI))
            found.append(_codes(part_OI.float(), self.of_rows(of_rows)))
        return torch.cat(found)

    def of_rows(self, rows: slice) -> Grid:
        """The grid of some outputs, whole blocks of them but at the end."""
        per_scale = self.scheme.block_of(1)[0]
        own = slice(rows.start // per_scale, -(-rows.stop // per_scale))
        return Grid(self.scheme, self.scale[own], None if self.zero_point is None else self.zero_point[own])

    def numbers(self, codes_OI: Tensor) -> Tensor:
        """What codes are read as: (q − z) · s, float32 as they are before they are rounded to the model's dtype."""
        scale_OI, zero_OI = self.wide(codes_OI.shape)
        whole_OI = codes_OI.view(torch.float8_e4m3fn) if self.scheme.is_float else codes_OI
        return (whole_OI.float() - zero_OI) * scale_OI

    def rounded(self, weight_OI: Tensor) -> Tensor:
        """The nearest numbers of the grid, as `numbers` has them."""
        return self.numbers(self.codes(weight_OI))


def round_to(scheme: Scheme, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """(q − z) · s, with q the nearest of the scheme's numbers: float32 of any shape. 0 stays 0."""
    if scheme.is_float:
        most = torch.finfo(torch.float8_e4m3fn).max
        return (weight / scale).clamp_(-most, most).to(torch.float8_e4m3fn).float() * scale
    levels = weight * scale.reciprocal()
    if zero is None:
        return levels.round_().clamp_(*scheme.levels).mul_(scale)
    return levels.add_(zero).round_().clamp_(*scheme.levels).sub_(zero).mul_(scale)


def grid_for(weight_OI: Tensor, scheme: Scheme) -> Grid:
    """The grid on which a matrix loses least: of whole numbers each group has the scale of least squared error among
    those tried. Raises ValueError for NaN and infinity.
    """
    dtype, size = weight_OI.dtype, scheme.group_of(weight_OI.shape[1])
    if scheme.is_float:
        most = torch.finfo(torch.float8_e4m3fn).max
        parts = [_largest(part.float(), scheme) / most for part in some_rows(weight_OI, scheme)]
        return Grid(scheme, _stored(_finite(torch.cat(parts)), dtype))
    found = [_search(part.float().view(-1, size), scheme, dtype) for part in some_rows(weight_OI, scheme)]
    scale_OG, zero_OG = (torch.cat(one).reshape(len(weight_OI), -1) for one in zip(*found, strict=True))
    return Grid(scheme, scale_OG, None if scheme.symmetric else zero_OG.to(torch.int8))


def some_rows(weight_OI: Tensor, scheme: Scheme) -> Sequence[Tensor]:
    """A matrix in pieces of whole blocks of outputs, which stay in a processor's cache while all scales are tried."""
    num_inputs = weight_OI.shape[1]
    per_scale = scheme.block_of(num_inputs)[0]
    return torch.split(weight_OI, max(1, _NUMBERS_AT_ONCE // num_inputs // per_scale) * per_scale)


def _codes(weight_OI: Tensor, grid: Grid) -> Tensor:
    scheme, scale = grid.scheme, grid.scale.float()
    if scheme.is_float:
        most = torch.finfo(torch.float8_e4m3fn).max
        wide_OI = scale if scheme.name == "FP8_DYNAMIC" else grid.wide(weight_OI.shape)[0]
        return (weight_OI / wide_OI).clamp_(-most, most).to(torch.float8_e4m3fn).view(torch.int8)
    levels_OGg = weight_OI.view(*scale.shape, -1) * scale.reciprocal().unsqueeze(2)
    if grid.zero_point is not None:
        levels_OGg.add_(grid.zero_point.unsqueeze(2))
    return levels_OGg.round_().clamp_(*scheme.levels).to(torch.int8).view(weight_OI.shape)


def _search(groups_Ng: Tensor, scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(scale [N] in the dtype it is stored in, zero point [N]) of least squared error, of S that are tried."""
    high_N, low_N = groups_Ng.amax(1).clamp_(min=0), groups_Ng.amin(1).clamp_(max=0)
    least, most = scheme.levels
    if scheme.symmetric:
        high_N = torch.maximum(high_N, -low_N)
        low_N = -high_N
    part_S1 = torch.tensor(_SHRUNK[scheme.bits])[:, None]
    tried_SN = _stored(_finite(high_N - low_N) * part_S1 / (most - least), dtype)
    scale_SN1 = tried_SN.float().unsqueeze(2)
    zero_SN1 = torch.zeros(1).expand(scale_SN1.shape)
    if not scheme.symmetric:
        zero_SN1 = (least - low_N[:, None] * part_S1[..., None] / scale_SN1).round_().clamp_(least, most)
    inverse_SN1, lost_SN, lost_Ng = scale_SN1.reciprocal(), torch.empty(tried_SN.shape), torch.empty_like(groups_Ng)
    for number in range(len(part_S1)) if len(part_S1) > 1 else ():
        torch.mul(groups_Ng, inverse_SN1[number], out=lost_Ng)
        if scheme.symmetric:
            lost_Ng.round_().clamp_(least, most)
        else:
            lost_Ng.add_(zero_SN1[number]).round_().clamp_(least, most).sub_(zero_SN1[number])
        lost_Ng.mul_(scale_SN1[number]).sub_(groups_Ng)
        torch.linalg.vecdot(lost_Ng, lost_Ng, out=lost_SN[number])
    best_1N = torch.zeros(1, len(groups_Ng), dtype=torch.int64)
    if len(part_S1) > 1:
        best_1N = lost_SN.min(0, keepdim=True).indices
    return tried_SN.gather(0, best_1N)[0], zero_SN1[..., 0].gather(0, best_1N)[0]


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
