"""Scales and rounding, by hand and against the obvious loops."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from compressor_quantization.rounding import grid_for
from compressor_quantization.schemes import Scheme, packed

SHRUNK = [1 - 0.04 * step for step in range(8)]


def by_hand(group: list[float], *, symmetric: bool) -> tuple[float, list[float]]:
    """The least squared error of one group of 4 bits, and the numbers that have it: one weight after another."""
    best: tuple[float, list[float]] | None = None
    low, high = min([*group, 0.0]), max([*group, 0.0])
    if symmetric:
        high = max(high, -low)
        low = -high
    for part in SHRUNK:
        scale = (high - low) * part / 15 or 1.0
        zero = 0 if symmetric else min(7, max(-8, round(-8 - low * part / scale)))
        numbers = [(min(7, max(-8, round(one / scale + zero))) - zero) * scale for one in group]
        error = sum((one - number) ** 2 for one, number in zip(group, numbers, strict=True))
        if best is None or error < best[0] - 1e-15:
            best = error, numbers
    assert best is not None
    return best


def test_two_groups_by_hand() -> None:
    """By the largest number the scale would be 7.5 / 7.5 = 1, and −7.5 would be 0.5 off; with 0.96 it is 0.18, and the
    others 0.04, 0.08 and 0.12: Σ² is 0.0548, and with 0.92 0.109. A group of nothing stays nothing.
    """
    weight = torch.tensor([[-7.5, 1.0, -2.0, 3.0, 0.0, 0.0, 0.0, 0.0]])
    grid = grid_for(weight, Scheme("W4A16", 4))
    assert grid.zero_point is None
    assert grid.scale.tolist() == [[pytest.approx(0.96), 1.0]]
    assert grid.rounded(weight)[0].tolist() == pytest.approx([-7.68, 0.96, -1.92, 2.88, 0, 0, 0, 0])


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM"])
def test_no_scale_that_is_tried_loses_less(name: str) -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)) + (name == "W4A16_ASYM")
    grid = grid_for(weight, Scheme(name, 8))
    found = grid.rounded(weight).reshape(-1, 8)
    for group, numbers in zip(weight.reshape(-1, 8), found, strict=True):
        error, _ = by_hand(group.tolist(), symmetric=name == "W4A16")
        assert float((group - numbers).double().square().sum()) == pytest.approx(error, rel=1e-4)
    plain = weight.reshape(-1, 8).abs().amax(1, keepdim=True) / 7.5
    rounded = (weight.reshape(-1, 8) / plain).round().clamp(-8, 7) * plain
    assert (found - weight.reshape(-1, 8)).norm() < (rounded - weight.reshape(-1, 8)).norm()


def test_asymmetric_by_hand() -> None:
    """From 0 to 15: the scale is 1 and the zero point −8, so that 0 is 0 and 15 is 15."""
    weight = torch.tensor([[15.0, 3.0, 0.0, 7.0]])
    grid = grid_for(weight, Scheme("W4A16_ASYM", 4))
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
    with pytest.raises(ValueError, match="it holds NaN or infinity"):
        grid_for(torch.tensor([[1.0, torch.nan]]), Scheme("W4A16", 2))


def test_bits_a_weight() -> None:
    assert Scheme("W4A16", 128).bits_of((256, 256)) == 4 + 16 / 128
    assert Scheme("W4A16_ASYM", 128).bits_of((256, 256)) == 4 + 20 / 128
    assert Scheme("W8A16").bits_of((64, 256)) == 8 + 16 / 256
    assert Scheme("FP8_BLOCK").bits_of((256, 192)) == 8 + 4 * 16 / (256 * 192)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_as_the_library_does(bits: int) -> None:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 64), generator=torch.Generator().manual_seed(0))
    for one in (codes.to(torch.int8), codes.to(torch.int8)[:, :36], codes.to(torch.int8)[:, :35]):
        assert torch.equal(packed(one, bits), pack_to_int32(one, bits))
