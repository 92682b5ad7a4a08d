"""Scales and zero points, without files. Dimensions: O outputs, I inputs, G groups of g inputs with a scale each.

A weight w is stored as a whole number q, or an 8-bit float, and read as (q − z) · s; z is 0 where it is symmetric.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compressor_quantization.schemes import Scheme

_SHRUNK = {4: (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76, 0.72), 8: (1.0,)}
"""Parts of a group's range that are tried, by bits: a smaller scale cuts the largest weights and rounds all others
less. In 8 bits cutting never pays."""
_NUMBERS_AT_ONCE = 2**16
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

    def codes(self, numbers_OI: Tensor) -> Tensor:
        """Numbers on the grid as q, one byte each: int8, of floats their bits."""
        scale_OI, zero_OI = self.wide(numbers_OI.shape)
        if self.scheme.is_float:
            return (numbers_OI / scale_OI).to(torch.float8_e4m3fn).view(torch.int8)
        return (numbers_OI / scale_OI).add_(zero_OI).round_().to(torch.int8)

    def numbers(self, codes_OI: Tensor) -> Tensor:
        """The inverse of `codes`."""
        scale_OI, zero_OI = self.wide(codes_OI.shape)
        whole_OI = codes_OI.view(torch.float8_e4m3fn) if self.scheme.is_float else codes_OI
        return (whole_OI.float() - zero_OI) * scale_OI

    def rounded(self, weight_OI: Tensor) -> Tensor:
        """The nearest numbers of the grid, float32 as they are before they are rounded to the model's dtype."""
        scale_OI, zero_OI = self.wide(weight_OI.shape)
        return round_to(self.scheme, weight_OI.float(), scale_OI, zero_OI)


def round_to(scheme: Scheme, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """(q − z) · s, with q the nearest of the scheme's numbers: float32 of any shape. 0 stays 0."""
    if scheme.is_float:
        most = torch.finfo(torch.float8_e4m3fn).max
        return (weight / scale).clamp_(-most, most).to(torch.float8_e4m3fn).float() * scale
    levels = (weight / scale).add_(zero).round_().clamp_(*scheme.levels)
    return levels.sub_(zero).mul_(scale)


def grid_for(weight_OI: Tensor, scheme: Scheme) -> Grid:
    """The grid on which a matrix loses least: of whole numbers each group has the scale of least squared error among
    those tried. Raises ValueError for NaN and infinity.
    """
    if not torch.isfinite(torch.stack(weight_OI.aminmax())).all():
        raise ValueError("it holds NaN or infinity")
    if scheme.is_float:
        largest = _blocks(weight_OI.float(), scheme).abs().amax((1, 3))
        return Grid(scheme, _stored(largest / torch.finfo(torch.float8_e4m3fn).max, weight_OI.dtype))
    size = scheme.group_of(weight_OI.shape[1])
    groups_Ng = weight_OI.reshape(-1, size)
    found = [
        _search(part.float(), scheme, weight_OI.dtype)
        for part in torch.split(groups_Ng, max(1, _NUMBERS_AT_ONCE // size))
    ]
    scale_OG, zero_OG = (torch.cat(one).reshape(len(weight_OI), -1) for one in zip(*found, strict=True))
    return Grid(scheme, scale_OG, None if scheme.symmetric else zero_OG.to(torch.int8))


def _search(groups_Ng: Tensor, scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(scale [N, 1] in the dtype it is stored in, zero point [N, 1]) of least squared error."""
    low_N1, high_N1 = (one.unsqueeze(1) for one in groups_Ng.aminmax(dim=1))
    low_N1, high_N1 = low_N1.clamp_(max=0), high_N1.clamp_(min=0)
    least, most = scheme.levels
    if scheme.symmetric:
        high_N1 = torch.maximum(high_N1, -low_N1)
        low_N1 = -high_N1
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for part in _SHRUNK[scheme.bits]:
        scale_N1 = _stored((high_N1 - low_N1) * (part / (most - least)), dtype)
        wide_N1 = scale_N1.float()
        zero_N1 = torch.zeros_like(wide_N1)
        if not scheme.symmetric:
            zero_N1 = (least - low_N1 * part / wide_N1).round_().clamp_(least, most)
        error_N1 = (round_to(scheme, groups_Ng, wide_N1, zero_N1) - groups_Ng).norm(dim=1, keepdim=True)
        if best is None:
            best = error_N1, scale_N1, zero_N1
        else:
            is_less = error_N1 < best[0]
            best = (
                torch.where(is_less, error_N1, best[0]),
                torch.where(is_less, scale_N1, best[1]),
                torch.where(is_less, zero_N1, best[2]),
            )
    assert best is not None
    return best[1], best[2]


def _stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As it will be read; 1 where all weights are 0, and never so small that it would be stored as 0."""
    scale = torch.where(scale == 0, 1.0, scale).clamp(min=torch.finfo(dtype).tiny)
    return scale.to(dtype)


def _blocks(weight_OI: Tensor, scheme: Scheme) -> Tensor:
    """[O / o, o, I / i, i] with blocks of o × i, filled up with zeros."""
    num_outputs, num_inputs = weight_OI.shape
    rows, columns = scheme.block_of(num_inputs)
    filled = torch.nn.functional.pad(weight_OI, (0, -num_inputs % columns, 0, -num_outputs % rows))
    return filled.reshape(-(-num_outputs // rows), rows, -(-num_inputs // columns), columns)


def _spread(of_each: Tensor, scheme: Scheme, shape: torch.Size) -> Tensor:
    rows, columns = scheme.block_of(shape[1])
    wide: Tensor = of_each.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]
    return wide
