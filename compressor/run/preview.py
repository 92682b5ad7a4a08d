"""What is known of a run before any weight is read: what `check` finds out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compressor.checkpoint.extra_layers import LeftOut
from compressor.checkpoint.find import Checkpoint
from compressor.data.lm_eval_tasks import LoadedTasks
from compressor.errors import shortened
from compressor.machine.memory_estimate import PLACEMENTS, Placement
from compressor.model.structure import MoELayer, Structure, layers_said
from compressor.wording import counted, human_bytes


@dataclass(frozen=True)
class Limits:
    """What a model can be given: ids below `num_embeddings`, in sequences of `max_positions`, if it names a limit."""

    num_embeddings: int
    max_positions: int | None


@dataclass(frozen=True)
class Preview:
    """What a recipe will do, by config and recipe alone; `plan` is what `terminal.print_plan` takes."""

    checkpoint: Checkpoint | None
    """None of a live model that came from none."""
    structure: Structure | None
    """None where nothing is known of its experts, if it has any: such a model can be measured."""
    auto_class: str
    left_out: LeftOut | None
    plan: dict[str, Any]
    limits: Limits
    place: Placement = PLACEMENTS[0]
    """Where weights and hidden states are to be."""
    devices: tuple[str, ...] = ("cpu",)
    """What computes: of several devices, each some of the layers."""
    tokens_at_once: int = 0
    """How much text passes a layer together while it is measured from disk."""
    tokenizer: Any | None = None
    reader: Any | None = None
    """What text is read by: the tokenizer, or where rows have images an `ImageReader`."""
    tasks: LoadedTasks | None = None
    """Those to measure, with their documents."""
    loaded: Any = None
    """The `LoadedRecipe` as it can be carried out, perhaps with `plainer` methods; None where nothing is."""

    def __repr__(self) -> str:
        experts = layers_said(self.structure.layers) if self.structure else "no experts looked for"
        return f"Preview({shortened(str(self.plan.get('model')), 60)}: {experts})"

    @property
    def said(self) -> list[str]:
        """The plan in sentences: what stays, how the weights are held, and its notes, but for that of the device."""
        layers, needs, sizes = self.plan["layers"], self.plan["needs"], self.plan["bytes"]
        before, kept = (sum(layer[key] for layer in layers) for key in ("num_experts", "kept"))
        where = "all in memory" if needs["weights"] == "memory" else "one decoder layer at a time from disk"
        stay = f"{kept:,} of {before:,} experts in {counted(len(layers), 'MoE layer')} stay"
        shrink = f"{human_bytes(sizes['before'])} become {human_bytes(sizes['after'])}"
        room = f"about {human_bytes(needs['memory'])} of the {human_bytes(needs['available'])} that are there"
        plan = f"{stay}, {shrink}; weights {where}, {room}"
        return [plan, *(note for note in self.plan["notes"] if not note.startswith("device auto:"))]

    @property
    def layers(self) -> Sequence[MoELayer]:
        return self.structure.layers if self.structure else ()
