"""Scales and rounding, by hand and against the obvious loops."""

from __future__ import annotations

from operator import mul

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from compressor_quantization import rounding
from compressor_quantization.rounding import grid_for, tried
from compressor_quantization.schemes import Scheme, packed


def by_hand(group: list[float], *, symmetric: bool) -> list[float]:
    """What a group becomes in 4 bits: of the tries the one whose whole numbers, with the scale that suits them best,
    lose least; then the nearest numbers of that scale. One weight after another.
    """

    def whole(scale: float, zero: int) -> list[int]:
        return [min(7, max(-8, round(one / scale + zero))) - zero for one in group]

    low, high = min([*group, 0.0]), max([*group, 0.0])
    if symmetric:
        high = max(high, -low)
        low = -high
    zero = 0 if symmetric else min(7, max(-8, round(-8 - low * 15 / (high - low))))
    tries = []
    for part in tried(4, len(group)):
        levels = whole((high - low) * part / 15, zero)
        scale = sum(map(mul, group, levels)) / sum(map(mul, levels, levels))
        tries.append((sum((one - level * scale) ** 2 for one, level in zip(group, levels, strict=True)), scale))
    _, scale = min(tries)
    return [level * scale for level in whole(scale, zero)]


def test_two_groups_by_hand() -> None:
    """By the largest number the scale would be 7.5 / 7.5 = 1. 0.94 and 0.88 of it make −8, 1, −2 and 3 of them, which
    the scale (8 · 7.5 + 1 + 4 + 9) / (64 + 1 + 4 + 9) = 74 / 78 suits best, at a loss of 0.045; 1.06 makes −7 of the
    first, and loses 0.056. A group of nothing stays nothing.
    """
    weight = torch.tensor([[-7.5, 1.0, -2.0, 3.0, 0.0, 0.0, 0.0, 0.0]])
    grid = grid_for(weight, Scheme("W4A16", 4))
    assert grid.zero_point is None
    assert grid.scale.tolist() == [[pytest.approx(74 / 78), 1.0]]
    levels = [-8, 1, -2, 3, 0, 0, 0, 0]
    assert grid.rounded(weight)[0].tolist() == pytest.approx([level * 74 / 78 for level in levels])


@pytest.mark.parametrize("size", [8, 64])
@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM"])
def test_the_scale_that_loses_least(name: str, size: int) -> None:
    """As by hand; and with many groups less than with any of eight parts of the largest weight."""
    weight = torch.randn(400, 256, generator=torch.Generator().manual_seed(1))
    groups_Ng = weight.reshape(-1, size)
    found_Ng = grid_for(weight, Scheme(name, size)).rounded(weight).reshape(-1, size)
    for group, numbers in zip(groups_Ng[:24], found_Ng, strict=False):
        expected = torch.tensor(by_hand(group.tolist(), symmetric=name == "W4A16"))
        assert float((numbers - group).norm()) == pytest.approx(float((expected - group).norm()), rel=1e-3)
    high_N1, low_N1 = groups_Ng.amax(1, keepdim=True).clamp(min=0), groups_Ng.amin(1, keepdim=True).clamp(max=0)
    if name == "W4A16":
        high_N1 = torch.maximum(high_N1, -low_N1)
        low_N1 = -high_N1
    lost = []
    for step in range(8):
        scale_N1 = (high_N1 - low_N1) * (1 - 0.04 * step) / 15
        zero_N1 = (-8 - low_N1 / scale_N1 * (1 - 0.04 * step)).round() * (name != "W4A16")
        levels_Ng = (groups_Ng / scale_N1 + zero_N1).round().clamp(-8, 7) - zero_N1
        lost.append((levels_Ng * scale_N1 - groups_Ng).square().sum(1))
    assert (found_Ng - groups_Ng).square().sum() < torch.stack(lost).amin(0).sum()


def test_asymmetric_by_hand() -> None:
    """From 0 to 15: the scale is 1 and the zero point −8, so that 0 is 0 and 15 is 15."""
    weight = torch.tensor([[15.0, 3.0, 0.0, 7.0]])
    grid = grid_for(weight, Scheme("W4A16_ASYM", 4))
    assert grid.zero_point is not None
    assert (grid.scale.item(), grid.zero_point.item()) == (1.0, -8)
    assert grid.rounded(weight).tolist() == weight.tolist()


def test_floats_by_hand() -> None:
    """448 is the largest 8-bit float: of an output whose largest weight it is the scale is 1. Between 16 and 32 they
    are 2 apart. Blocks are of 128 × 128, the last ones smaller.
    """
    weight = torch.tensor([[448.0, 17.4, -19.2, 0.0], [0.0, 0.0, 224.0, -1.0]])
    grid = grid_for(weight, Scheme("FP8_DYNAMIC"))
    assert grid.scale.tolist() == [[1.0], [0.5]]
    assert grid.rounded(weight).tolist() == [[448.0, 18.0, -20.0, 0.0], [0.0, 0.0, 224.0, -1.0]]
    wide = torch.ones(130, 200)
    wide[129, 199] = 448
    scale = grid_for(wide, Scheme("FP8_BLOCK")).scale.flatten()
    assert scale.tolist() == pytest.approx([1 / 448, 1 / 448, 1 / 448, 1.0])


@pytest.mark.parametrize("name", ["W4A16", "W8A16", "W4A16_ASYM", "W8A16_ASYM", "FP8_DYNAMIC", "FP8_BLOCK"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_stay_and_all_else_is_near(name: str, dtype: torch.dtype) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2)) * 0.02
    weight[:, ::2] = 0
    weight[3] = weight[3].abs()
    weight = weight.to(dtype)
    grid = grid_for(weight, Scheme(name, None if name.startswith("FP8") else 32))
    found = grid.rounded(weight)
    assert grid.scale.dtype == dtype
    assert not found[:, ::2].any()
    assert (found - weight).norm() / weight.norm() < (0.15 if "W4" in name else 0.04)


def test_what_is_no_number_is_refused() -> None:
    for number in (torch.nan, torch.inf):
        for name in ("W4A16", "W8A16", "W4A16_ASYM"):
            with pytest.raises(ValueError, match="it holds NaN or infinity"):
                grid_for(torch.tensor([[1.0, number]]), Scheme(name, 2))


@pytest.mark.parametrize("name", ["W4A16", "W8A16_ASYM", "FP8_DYNAMIC", "FP8_BLOCK"])
def test_in_pieces_as_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(300, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    scheme = Scheme(name, None if name.startswith("FP8") else 64)
    before = weight.clone()
    at_once = grid_for(weight, scheme)
    codes = at_once.codes(weight)
    monkeypatch.setattr(rounding, "_NUMBERS_AT_ONCE", 256)
    in_pieces = grid_for(weight, scheme)
    assert torch.equal(in_pieces.scale, at_once.scale)
    assert torch.equal(in_pieces.codes(weight), codes)
    assert torch.equal(weight, before)


def test_bits_a_weight() -> None:
    assert Scheme("W4A16", 128).bits_of((256, 256)) == 4 + 16 / 128
    assert Scheme("W4A16_ASYM", 128).bits_of((256, 256)) == 4 + 20 / 128
    assert Scheme("W8A16").bits_of((64, 256)) == 8 + 16 / 256
    assert Scheme("FP8_BLOCK").bits_of((256, 192)) == 8 + 4 * 16 / (256 * 192)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_as_the_library_does(bits: int) -> None:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 64), generator=torch.Generator().manual_seed(0))
    for one in (codes.to(torch.int8), codes.to(torch.int8)[:, :36], codes.to(torch.int8)[:, :35]):
        assert torch.equal(packed(one, Scheme("W4A16" if bits == 4 else "W8A16")), pack_to_int32(one, bits))
