"""The method `kept_experts`: what another tool has chosen, or counted, without text and without running the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, ClassVar

from compressor.plugin import Decision, Description, Method, OptionError, Options, Plan, fewer_experts
from compressor_kept_experts.options import KeptExpertsOptions

if TYPE_CHECKING:
    from compressor.plugin import Gathered, LayerWeights, MoELayer, MoEModel


class KeptExperts(Method[KeptExpertsOptions]):
    """Keep the experts that another tool has chosen, or has counted most often."""

    name = "kept_experts"
    version = "1"
    api = 2
    options_type: ClassVar[type[Options]] = KeptExpertsOptions
    needs_text = False

    def check(self, layers: Sequence[MoELayer]) -> Plan:
        """The file is of this model, and its counts are possible."""
        kept, note = self._read(layers)
        option = "keep" if self.options.keep is not None else "file"
        return Plan([fewer_experts(layer, len(kept[layer.path]), option) for layer in layers], [note])

    def _read(self, layers: Sequence[MoELayer]) -> tuple[Mapping[str, Sequence[int]], str]:
        """(layer path → the ids that stay, how the file was read)."""
        from compressor_kept_experts import reading

        options, option = self.options, "file" if self.options.file is not None else "counts"
        file = options.file or options.counts
        assert file is not None
        try:
            reading.refuse_other(file, options.sha256)
            if options.keep is None:
                return reading.kept_ids(file, layers, options.ids, self.model)
            for layer in layers:
                fewer_experts(layer, options.keep, "keep")
            return reading.most_chosen(file, layers, options.keep, self.model)
        except reading.UnfitFileError as error:
            raise OptionError(option, f"{file}: {error}.") from error

    def decide(self, layers: Sequence[MoELayer], statistics: Gathered) -> Decision:
        """What the file says, as it is then."""
        kept, note = self._read(layers)
        ids = {layer.path: range(layer.num_experts) for layer in layers}
        decided = {path: {"kept": [*of], "dropped": [i for i in ids[path] if i not in of]} for path, of in kept.items()}
        return Decision({"layers": decided, "read": note})

    def preview(self, moe: MoEModel, decision: Decision) -> AbstractContextManager[object]:
        """Removed means masked."""
        return moe.masked({path: layer["kept"] for path, layer in decision["layers"].items()})

    def edit(self, layer: LayerWeights, decision: Decision) -> None:
        """Remove the experts that are not kept."""
        layer.keep(decision["layers"][layer.path]["kept"])

    def describe(self, decision: Decision) -> Description:
        """Who stays, and how that was read."""
        return Description(Description.of(decision).columns, [decision["read"]])

    def control(self, decision: Decision, layers: Sequence[MoELayer], seed: int) -> Decision | str:
        """As many experts of every layer."""
        from compressor.plugin import kept_at_random

        return kept_at_random(decision, layers, seed)
