"""The method `quantization`: the last pass of a recipe stores experts' matrices, and on request those of attention and
dense parts, in 4 or 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compressor.plugin import Column, Decision, Description, Method, OptionError, Options, Plan
from compressor_quantization.schemes import Scheme, SchemeName

if TYPE_CHECKING:
    from compressor.plugin import Gathered, MoELayer


class QuantizationOptions(Options):
    """What is stored in how many bits."""

    scheme: SchemeName = Field(
        description="of experts: whole numbers of 4 or 8 bits (`W4A16`, `W8A16`; `…_ASYM` with zero points), or "
        "8-bit floats with a scale for each output or block (`FP8_DYNAMIC`, `FP8_BLOCK`)"
    )
    group_size: int | Literal["channel"] | None = Field(
        default=None, description="inputs that share a scale, or `channel`: all of an output's; 128 by default"
    )
    attention: bool | SchemeName = Field(
        default=False, description="linear maps outside the MoE blocks as well, by the same scheme or another one"
    )
    dense: bool | SchemeName = Field(
        default=False, description="shared experts, and decoder layers without experts, as well, likewise"
    )


class Quantization(Method[QuantizationOptions]):
    """Store weights in fewer bits, in the format that vLLM and transformers read (compressed-tensors)."""

    name = "quantization"
    version = "1"
    api = 2
    options_type: ClassVar[type[Options]] = QuantizationOptions
    needs_text = False

    def check(self, layers: Sequence[MoELayer]) -> Plan:
        """Every matrix must be one that the scheme can store, and that is read again."""
        if not find_spec("compressed_tensors"):
            raise OptionError(
                None, 'the package compressed-tensors is missing (`pip install "moe-compressor[quantised]"`)'
            )
        schemes, size = self._schemes, self.options.group_size
        if size is not None and all(one.is_float for one in schemes.values()):
            raise OptionError("group_size", f"{self.options.scheme} stores 8-bit floats, not in groups; leave it out")
        if size is not None and size != "channel" and size < 1:
            raise OptionError("group_size", f"a group has at least one input; found {size}")
        others = {schemes[place] for place in ("layer", "block") if place in schemes}
        if len(others) > 1:
            raise OptionError(
                "dense", "transformers reads one scheme of all that are no experts: give that of `attention`"
            )
        for layer in layers:
            self._check_layer(layer, has_others=bool(others - {schemes["expert"]}))
        return Plan([replace(layer, bits=_bits(schemes["expert"], layer)) for layer in layers], changes_values=True)

    def _check_layer(self, layer: MoELayer, *, has_others: bool) -> None:
        if layer.constants:
            raise OptionError(
                None,
                f"{layer.path}: some of its experts answer constants, and vLLM refuses that beside quantised experts",
            )
        if layer.skip_rule is not None:
            raise OptionError(None, f"{layer.path}: it skips experts, and nothing reads a quantised one that does")
        if layer.is_list and has_others:
            raise OptionError(
                None, f"{layer.path}: transformers reads its experts as it reads attention, so in one scheme with it"
            )
        for name, shape in layer.shapes.items():
            place = _place(layer, name)
            scheme = self._schemes.get(place)
            if scheme is None or shape[0] == 1:
                continue
            if problem := scheme.problem(name, shape, is_stacked=place == "expert" and not layer.is_list):
                is_by_size = scheme.group is not None and scheme.symmetric
                option = "group_size" if is_by_size else "scheme" if place == "expert" else None
                raise OptionError(option, f"{layer.path}: {problem}")

    @property
    def _schemes(self) -> Mapping[str, Scheme]:
        """By place, as `StoredMatrices` has it: what is stored otherwise."""
        asked = {
            "expert": True,
            "layer": self.options.attention,
            "block": self.options.dense,
            "dense": self.options.dense,
        }
        names = {place: self.options.scheme if one is True else one for place, one in asked.items() if one}
        size = 128 if self.options.group_size is None else self.options.group_size
        group = None if size == "channel" else size
        return {place: Scheme(one, None if one.startswith("FP8") else group) for place, one in names.items()}

    def decide(self, layers: Sequence[MoELayer], statistics: Gathered) -> Decision:
        """Nothing but the scheme of each layer: weights are rounded to the nearest."""
        scheme = self._schemes["expert"]
        return Decision(
            {"layers": {layer.path: {"scheme": scheme.name, "bits": _bits(scheme, layer)} for layer in layers}}
        )

    def describe(self, decision: Decision) -> Description:
        """The experts' scheme, and what else is stored otherwise."""
        also = [f"{key}: {self._schemes[place].name}" for key, place in _ALSO.items() if place in self._schemes]
        size = self.options.group_size or 128
        in_groups = [] if self._schemes["expert"].is_float else [f"scales of whole numbers: {_groups_said(size)}"]
        return Description([Column("scheme"), Column("bits", "bits a weight of the experts")], [*in_groups, *also])

    def external(self, source: Path, target: Path, decision: Decision) -> None:
        """Write the checkpoint with these matrices stored otherwise."""
        from compressor_quantization.storage import write

        schemes = self._schemes
        places = {name: place for name, place in self.matrices.places.items() if place in schemes}
        write(source, target, {name: (schemes[place], place == "expert") for name, place in places.items()})


_ALSO = {"attention": "layer", "dense": "block"}


def _groups_said(size: int | str) -> str:
    return "one for each output" if size == "channel" else f"one for each {size} inputs"


def _place(layer: MoELayer, name: str) -> str:
    """Where one of a layer's matrices is, as `LinearSite` has it."""
    if name not in layer.linears:
        return "expert"
    return "block" if layer.holds(layer.linears[name]) else "layer"


def _bits(scheme: Scheme, layer: MoELayer) -> float:
    """Bits a weight of a layer's experts, with their scales."""
    shapes = [shape for name, shape in layer.shapes.items() if name not in layer.linears]
    stored = sum(scheme.bits_of(shape) * prod(shape) for shape in shapes)
    return round(stored / sum(map(prod, shapes)), 4) if shapes else float(scheme.bits)
