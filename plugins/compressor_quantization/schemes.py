"""The schemes by name, as compressed-tensors describes them, and how one matrix is stored by its compressors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from compressor_quantization.rounding import Grid

SchemeName = Literal["W4A16", "W8A16", "W4A16_ASYM", "W8A16_ASYM", "FP8_BLOCK", "FP8_DYNAMIC"]
_BLOCK = 128


@dataclass(frozen=True)
class Scheme:
    """How matrices are stored: `group` inputs share a scale, None: all of an output's. For whole numbers alone."""

    name: SchemeName
    group: int | None = None

    def __str__(self) -> str:
        return self.name if self.is_float else f"{self.name}-{self.group or 'channel'}"

    @property
    def is_float(self) -> bool:
        """Whether weights are 8-bit floats."""
        return self.name.startswith("FP8")

    @property
    def symmetric(self) -> bool:
        """Whether there are no zero points."""
        return not self.name.endswith("_ASYM")

    @property
    def bits(self) -> int:
        """Of a weight, without its scale."""
        return 4 if self.name.startswith("W4") else 8

    @property
    def levels(self) -> tuple[int, int]:
        """The smallest and the largest whole number."""
        return -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1

    def group_of(self, num_inputs: int) -> int:
        """How many inputs share a scale."""
        return self.group or num_inputs

    def block_of(self, num_inputs: int) -> tuple[int, int]:
        """How many outputs and inputs share a scale."""
        return (_BLOCK, _BLOCK) if self.name == "FP8_BLOCK" else (1, self.group_of(num_inputs))

    def bits_of(self, shape: Sequence[int]) -> float:
        """Bits a weight of a matrix [outputs, inputs], with scales of 16 bits and zero points."""
        rows, columns = self.block_of(shape[1])
        scales = -(-shape[0] // rows) * -(-shape[1] // columns)
        return self.bits + scales * (16 + (0 if self.symmetric else self.bits)) / (shape[0] * shape[1])

    def problem(self, name: str, shape: Sequence[int], *, is_stacked: bool) -> str | None:
        """Why a matrix [outputs, inputs] cannot be stored so that it is read again, in words; None where it can.
        `is_stacked`: transformers puts the experts' matrices into one tensor when it reads them.
        """
        num_inputs = shape[1]
        if self.group is not None and num_inputs < self.group:
            return (
                f"{name} has {num_inputs} inputs, fewer than a group of {self.group}; take a smaller one, or `channel`"
            )
        if self.group is not None and num_inputs % self.group:
            return f"the {num_inputs} inputs of {name} cannot be divided into groups of {self.group}; try another size"
        if is_stacked and not self.symmetric:
            return (
                f"{name}: neither transformers nor vLLM reads zero points of experts; take "
                f"{self.name.removesuffix('_ASYM')} for them"
            )
        if self.name != "FP8_BLOCK":
            return None
        if is_stacked and num_inputs > _BLOCK:
            return f"{name}: transformers reads no scales of blocks of experts; take FP8_DYNAMIC for them"
        if not is_stacked and (num_inputs % _BLOCK or (shape[0] > _BLOCK and shape[0] % _BLOCK)):  # inputs: by 128, too
            return f"{name} of {list(shape)} cannot be divided into blocks of {_BLOCK} × {_BLOCK}; take FP8_DYNAMIC"
        return None

    def described(self, targets: Sequence[str]) -> Any:
        """The library's description of it, with the format in which it is stored."""
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

        if self.is_float:
            return preset_name_to_scheme(self.name, list(targets)).model_copy(update={"format": "float-quantized"})
        strategy = "group" if self.group else "channel"
        weights = QuantizationArgs(
            num_bits=self.bits, type="int", strategy=strategy, group_size=self.group, symmetric=self.symmetric
        )
        return QuantizationScheme(targets=list(targets), weights=weights, format="pack-quantized")

    def stored(self, packed: Tensor, grid: Grid, shape: Sequence[int]) -> dict[str, Tensor]:
        """What a matrix [outputs, inputs] becomes, name → tensor, of its codes as `packed` has them."""
        import torch
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        if self.is_float:
            return {"weight": packed.view(torch.float8_e4m3fn), "weight_scale": grid.scale}
        made = {"weight_packed": packed, "weight_scale": grid.scale, "weight_shape": torch.tensor(shape)}
        if grid.zero_point is not None:
            made["weight_zero_point"] = pack_to_int32(grid.zero_point, self.bits, packed_dim=0)
        return made


def packed(codes_OI: Tensor, scheme: Scheme) -> Tensor:
    """int32 [O, I · bits / 32]: as the library's `pack_to_int32`, which takes four times as long on a processor; 8-bit
    floats as they are.
    """
    import sys

    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    bits = scheme.bits
    if scheme.is_float:
        return codes_OI
    if sys.byteorder != "little" or codes_OI.shape[1] * bits % 32:
        return pack_to_int32(codes_OI, bits)  # type: ignore[no-any-return]
    bytes_OI = (codes_OI.contiguous() + 2 ** (bits - 1)).view(torch.uint8)  # int8 wraps around
    if bits == 4:
        pairs_OP = bytes_OI.view(torch.int16)
        bytes_OI = (pairs_OP | pairs_OP >> 4).to(torch.uint8)  # the lower byte of each
    words_OW: Tensor = bytes_OI.view(torch.int32)
    return words_OW


def config_of(schemes: Sequence[tuple[Scheme, Sequence[str]]], ignore: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of config.json: each scheme with what it is for, and the modules that stay as they are."""
    import compressed_tensors
    from compressed_tensors.quantization import QuantizationConfig

    groups = {f"config_group_{number}": one.described(targets) for number, (one, targets) in enumerate(schemes)}
    formats = {one.format for one in groups.values()}
    config = QuantizationConfig(
        config_groups=groups,
        quantization_status="compressed",
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        ignore=list(ignore),
    )
    return {"version": compressed_tensors.__version__, "transform_config": {}, **config.model_dump(mode="json")}
