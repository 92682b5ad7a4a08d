"""The method `quantization`: the last pass of a recipe stores experts' matrices, and on request those of attention and
dense parts, in 4 or 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compressor.plugin import Column, Decision, Description, Method, OptionError, Options, Plan
from compressor_quantization.schemes import Scheme, SchemeName

if TYPE_CHECKING:
    from torch import Tensor

    from compressor.plugin import Gathered, InputStatistic, LinearSite, MoELayer
    from compressor_quantization.rounding import Grid


class QuantizationOptions(Options):
    """What is stored in how many bits."""

    scheme: SchemeName = Field(
        description="of experts: whole numbers of 4 or 8 bits (`W4A16`, `W8A16`; `…_ASYM` with zero points), or "
        "8-bit floats with a scale for each output or block (`FP8_DYNAMIC`, `FP8_BLOCK`)"
    )
    group_size: int | Literal["channel"] | None = Field(
        default=None, description="inputs that share a scale, or `channel`: all of an output's; 128 by default"
    )
    method: Literal["rtn", "gptq"] = Field(
        default="rtn", description="each weight to the nearest number, or so that errors make up for each other on text"
    )
    min_tokens: int = Field(
        default=128, ge=1, description="an expert that fewer tokens come to is rounded to the nearest, `gptq` only"
    )
    dampening: float = Field(
        default=0.01, gt=0, description="added to each input's Σ x², as a share of their mean, `gptq` only"
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
    version = "2"
    api = 2
    options_type: ClassVar[type[Options]] = QuantizationOptions
    expert_ids = ("to_nearest",)
    needs_matrices = True

    @property
    def needs_text(self) -> bool:
        """What inputs a matrix is given matters where errors are to make up for each other."""
        return self.options.method == "gptq"

    @property
    def alone(self) -> bool:
        """A matrix is rounded by the inputs of all processes, and what it becomes is no sum."""
        return self.options.method == "gptq"

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
        self._check_method(layers)
        for layer in layers:
            self._check_layer(layer, has_others=bool(others - {schemes["expert"]}))
        return Plan([replace(layer, bits=_bits(schemes["expert"], layer)) for layer in layers], changes_values=True)

    def _check_method(self, layers: Sequence[MoELayer]) -> None:
        changed = [name for name in ("min_tokens", "dampening") if name in self.options.model_fields_set]
        if self.options.method == "rtn" and changed:
            raise OptionError(changed[0], "`method: rtn` looks at no text, so it would have no effect; leave it out")
        for layer in layers if self.options.method == "gptq" else ():
            if layer.watch_problem:
                raise OptionError("method", f"{layer.path}: its experts cannot be observed: {layer.watch_problem}")

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
            place = layer.place_of(name)
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

    def input_statistic(self, site: LinearSite) -> InputStatistic | None:
        """What rounds a site's matrices when its layer has been seen, `gptq` only."""
        from compressor_quantization.gptq import Rounded

        scheme = self._schemes.get(site.place) if self.options.method == "gptq" else None
        if scheme is None or site.layer.shapes[site.name][0] == 1:
            return None
        return Rounded(site, scheme, self.options.min_tokens, self.options.dampening)

    def bytes_of_sums(self, layer: MoELayer, hidden: int, num_domains: int) -> int:
        """Σ x xᵀ in float32, of each expert for each of its matrices, and of the maps beside them; `gptq` only."""
        if self.options.method == "rtn":
            return 0
        places = {name: layer.place_of(name) for name in layer.shapes}
        return sum(
            4 * layer.shapes[name][1] ** 2 * (layer.num_experts if place == "expert" else 1)
            for name, place in places.items()
            if place in self._schemes
        )

    def decide(self, layers: Sequence[MoELayer], statistics: Gathered) -> Decision:
        """The scheme of each layer; with `gptq` the rounded matrices as well, and the experts with too few tokens."""
        scheme = self._schemes["expert"]
        decided: dict[str, Any] = {
            layer.path: {"scheme": scheme.name, "bits": _bits(scheme, layer)} for layer in layers
        }
        tensors: dict[str, dict[str, Tensor]] = {}
        for layer in layers if self.options.method == "gptq" else ():
            own = tensors.setdefault(layer.path, {})
            nearest: set[int] = set()
            for place, own_scheme in self._schemes.items():
                found = _of_place(statistics[layer.path], place, own_scheme)
                if place == "expert" and not found:
                    raise KeyError(f"matrices of experts as {scheme}")
                for name, figures in found.items():
                    if place == "expert":
                        nearest |= {*figures["nearest"].nonzero().flatten().tolist()}
                    own |= {f"{name}.{key}": one for key, one in figures.items() if key != "nearest"}
            decided[layer.path]["to_nearest"] = sorted(nearest)
        return Decision({"layers": decided}, tensors)

    def describe(self, decision: Decision) -> Description:
        """The experts' scheme, and what else is stored otherwise."""
        also = [f"{key}: {self._schemes[place].name}" for key, place in _ALSO.items() if place in self._schemes]
        size = self.options.group_size or 128
        is_unseen = any(layer.get("to_nearest") for layer in decision["layers"].values())
        unseen = [Column("to_nearest", "experts with too few tokens, rounded to the nearest")] if is_unseen else []
        in_groups = [] if self._schemes["expert"].is_float else [f"scales of whole numbers: {_groups_said(size)}"]
        columns = [Column("scheme"), Column("bits", "bits a weight of the experts"), *unseen]
        return Description(columns, [f"rounded by {self.options.method}", *in_groups, *also])

    def external(self, source: Path, target: Path, decision: Decision) -> None:
        """Write the checkpoint with these matrices stored otherwise."""
        from compressor_quantization.storage import write

        schemes = self._schemes
        places = {name: place for name, place in self.matrices.places.items() if place in schemes}
        stored = {name: (schemes[place], place == "expert") for name, place in places.items()}
        write(source, target, stored, self._known(decision))

    def _known(self, decision: Decision) -> dict[str, tuple[Tensor, Grid]]:
        """The decision's matrices by name on disk, packed, and their grid."""
        from compressor_quantization.rounding import Grid

        found: dict[str, tuple[Tensor, Grid]] = {}
        for path, tensors in decision.tensors.items():
            for name in [key.removesuffix(".packed") for key in tensors if key.endswith(".packed")]:
                parts = {
                    key: self.matrices.as_stored(path, name, tensors[f"{name}.{key}"])
                    for key in ("packed", "scale", "zero")
                    if f"{name}.{key}" in tensors
                }
                for on_disk, words in parts["packed"].items():
                    zero = parts["zero"][on_disk] if "zero" in parts else None
                    scheme = self._schemes[self.matrices.places[on_disk]]
                    found[on_disk] = words, Grid(scheme, parts["scale"][on_disk], zero)
        return found


_ALSO = {"attention": "layer", "dense": "block"}


def _of_place(figures: Mapping[str, Tensor], place: str, scheme: Scheme) -> dict[str, dict[str, Tensor]]:
    """What was found there by this scheme: site → name → tensor."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, one in sorted(figures.items()):
        name, _, leaf = key.removeprefix("inputs.").partition(f".{place}.{scheme}.")
        if key.startswith("inputs.") and leaf:
            found.setdefault(name, {})[leaf] = one
    return found


def _groups_said(size: int | str) -> str:
    return "one for each output" if size == "channel" else f"one for each {size} inputs"


def _bits(scheme: Scheme, layer: MoELayer) -> float:
    """Bits a weight of a layer's experts, with their scales."""
    shapes = [shape for name, shape in layer.shapes.items() if name not in layer.linears]
    stored = sum(scheme.bits_of(shape) * prod(shape) for shape in shapes)
    return round(stored / sum(map(prod, shapes)), 4) if shapes else float(scheme.bits)
