"""The method `fine_tuning`: LoRA beside the experts, or all weights, trained on text and merged before saving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compressor.plugin import Decision, Method, OptionError, Options, Plan

if TYPE_CHECKING:
    from compressor.plugin import Gathered, MoELayer, Training, Work

Part = Literal["attention", "shared", "router"]


class FineTuningOptions(Options):
    """What is trained, towards what, and for how long."""

    train: Literal["lora", "full"] = Field(
        default="lora", description="small matrices beside the parts named, or all weights, experts too"
    )
    parts: tuple[Part, ...] = Field(
        default=("attention", "shared"),
        min_length=1,
        description="of lora: maps beside the MoE block, maps in it beside the experts, the router",
    )
    loss: Literal["distill", "next_token"] = Field(
        default="distill", description="KL to the original's next token, or the text's own next token"
    )
    steps: int = Field(default=200, ge=1, description="batches trained on; text that ends is begun again")
    learning_rate: float = Field(
        default=1e-3, gt=0, description="at its largest; all weights want less, such as 0.0001"
    )
    rank: int = Field(default=16, ge=1, description="of lora's matrices")
    save_every: int = Field(default=50, ge=1, description="steps after which a stopped run can resume")


class FineTuning(Method[FineTuningOptions]):
    """Train what a smaller model has left on text, towards the original's answers, where held-out text agrees."""

    name = "fine_tuning"
    version = "1"
    api = 2
    options_type: ClassVar[type[Options]] = FineTuningOptions
    held_out = needs_held_out = fits_weights = True

    def check(self, layers: Sequence[MoELayer]) -> Plan:
        """There must be peft for lora, and something to train in every layer."""
        if self.options.train == "full":
            return Plan(layers, changes_values=True)
        if zeros := [layer for layer in layers if layer.zeros]:
            raise OptionError(
                "train",
                f"lora may fill the {zeros[0].zeros} zeros that there are by then; `full` keeps them, or put the pass "
                f"that makes them behind this one",
            )
        if find_spec("peft") is None:
            raise OptionError(
                "train", "lora needs peft, which is not installed: pip install 'moe-compressor[fine-tuning]'"
            )
        if not any(self._trained(layer) for layer in layers):
            raise OptionError("parts", f"no layer has {' or '.join(self.options.parts)} that could be trained")
        return Plan([replace(layer, zeros=None) for layer in layers], changes_values=True)

    def _trained(self, layer: MoELayer) -> list[str]:
        """The weights of a layer that lora stands beside, by their names in the model."""
        parts = self.options.parts
        beside = {at: "shared" if layer.holds(at) else "attention" for at in layer.linears.values()}
        return [at for at, part in beside.items() if part in parts] + (
            list(layer.router_weights) if "router" in parts else []
        )

    def bytes_of_training(self, layers: Sequence[MoELayer], work: Work) -> int:
        """The model and what it is distilled from, 4 bytes each of what is trained, its gradient and Adam's two means,
        and what a batch's tokens leave for going back: of 12 vectors and each chosen expert's in every layer, and
        probabilities of every word, of both models.
        """
        hidden, itemsize = work.hidden, 4 if self.options.train == "full" else work.itemsize
        teacher = work.bytes_total if self.options.loss == "distill" else 0
        trained = work.bytes_total // work.itemsize
        if self.options.train == "lora":
            shapes = [
                ({at: layer.shapes[name] for name, at in layer.linears.items()}).get(one, (layer.num_experts, hidden))
                for layer in layers
                for one in self._trained(layer)
            ]
            trained = self.options.rank * sum(map(sum, shapes))
            teacher += work.bytes_total + itemsize * sum(rows * columns for rows, columns in shapes)
        vectors = [12 + layer.top_k * (3 + 5 * layer.parameters_per_expert / (3 * hidden**2)) for layer in layers]
        of_token = itemsize * hidden * sum(vectors) + 4 * 6 * work.vocabulary
        return teacher + 16 * trained + round(work.batch_tokens * of_token)

    def decide(self, layers: Sequence[MoELayer], statistics: Gathered) -> dict[str, Any]:
        """Which weights are trained: how is learnt when they are."""
        if self.options.train == "full":
            return {"layers": {layer.path: {"trained": "all weights"} for layer in layers}}
        return {"layers": {layer.path: {"trained": self._trained(layer)} for layer in layers}}

    def train(self, source: Path, target: Path, decision: Decision, training: Training) -> Mapping[str, float]:
        """Train, merge, and save, where the loss on held-out text has fallen."""
        from compressor_fine_tuning import tuning

        teacher = None
        if self.options.loss == "distill":
            if training.original is None:
                raise OptionError("loss", "the original is a live model, and no folder of it is there to distil from")
            teacher = training.load(training.original)
        model = training.load(source)
        before = tuning.mean_loss(model, teacher, training.held_out)
        names = None
        if self.options.train == "lora":
            names = [name for layer in decision["layers"].values() for name in layer["trained"]]
        model = tuning.tuned(model, teacher, names, self.options, training)
        after = tuning.mean_loss(model, teacher, training.held_out)
        if not after < before:
            raise OptionError(
                None,
                f"on held-out text the loss does not fall: {before:.4f} nats a token before, {after:.4f} after "
                f"{self.options.steps} steps. Give more text, fewer steps or a smaller learning_rate, or leave it out",
            )
        training.progress.say(f"fine_tuning: held-out loss {before:.4f} → {after:.4f} nats a token")
        training.save(model, source, target)
        return {"held_out_loss_before": before, "held_out_loss_after": after}
