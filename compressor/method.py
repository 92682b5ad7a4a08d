"""What a compression method is: the classes that a plugin subclasses.

A method goes through three steps. Each step takes only what the step before it left behind:

    observe   `statistic(layer)` makes one accumulator per MoE layer, `input_statistic(site)` one per linear map; the
              core feeds them every calibration batch
    decide    `decide(layers, statistics)` is a pure function of the figures: no model, no data
    edit      `edit(layer, decision)` applies the decision to one layer's weights, wherever they are

`check` comes before all of them and needs the model's config only. A method never runs the model and knows no other
method.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Self, TypeVar

from pydantic import BaseModel, ConfigDict

from compressor.data.sources import BaseSource
from compressor.report.description import EXPERT_IDS, Description
from compressor.wording import counted

if TYPE_CHECKING:
    from torch import Tensor

    from compressor.data.sequences import TokenBatch
    from compressor.machine.memory_estimate import Work
    from compressor.machine.progress import Progress
    from compressor.model.layer_weights import LayerWeights
    from compressor.model.moe_model import MoEModel
    from compressor.model.structure import MoELayer
    from compressor.observe.statistic import Gathered, InputStatistic, LinearSite, Statistic


class Decision(dict[str, Any]):
    """What a method decided, as JSON: `{"layers": {PATH: {...}}}`; PATH is the MoE block's module path in the original
    model. `tensors` are what is no JSON, by layer path and name; most methods need none.
    """

    def __init__(self, decided: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]] | None = None) -> None:
        super().__init__(decided)
        self.tensors = tensors or {}

    @classmethod
    def of(cls, decided: Mapping[str, Any]) -> Decision:
        """The same, if it is a plain mapping without tensors."""
        return decided if isinstance(decided, cls) else cls(decided)

    def by_layer(self) -> dict[str, Decision]:
        """The same for one layer each, by its path."""
        whole = {key: value for key, value in self.items() if key != "layers"}
        return {
            path: Decision(
                {**whole, "layers": {path: layer}}, {path: self.tensors[path]} if path in self.tensors else {}
            )
            for path, layer in self["layers"].items()
        }

    @property
    def shapes(self) -> dict[str, dict[str, list[int]]]:
        """The tensors' shapes, by layer path and name."""
        return {path: {name: list(one.shape) for name, one in of.items()} for path, of in self.tensors.items()}


class Options(BaseModel):
    """Base class of a method's options: frozen, unknown keys refused, every field with a description.

    The options *are* the schema: `compressor methods` prints them, and mistakes are reported with their place.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")


OptionsT = TypeVar("OptionsT", bound=Options)


@dataclass(frozen=True)
class Plan:
    """What a method will do, known from the config alone.

    `layers` are those that `check` was given, in their order, as they will be: made with `fewer_experts`, or with
    `dataclasses.replace` of `top_k`, `skip_rule`, `zeros` or `bits`. Whatever fills a layer's zeros says `zeros=None`,
    and is refused where there are some. `notes` are sentences for the user.
    """

    layers: Sequence[MoELayer]
    notes: Sequence[str] = ()
    changes_values: bool = False
    """Whether experts or routers get other numbers: refused where weights are quantised, or stored with other `bits`
    by a pass before, before anything is observed.
    """
    found: Sequence[str] = ()
    """What the run finds, `num_experts` or `constants`: layers may differ in it then from these."""
    padded: bool = False
    """Whether files hold as many experts in every layer as in the largest, some of them switched off."""

    def __repr__(self) -> str:
        skipping = sum(layer.skip_rule is not None for layer in self.layers)
        skips = f", {counted(skipping, 'layer')} that will skip" if skipping else ""
        num_experts = sum(layer.num_experts for layer in self.layers)
        return f"Plan({counted(num_experts, 'expert')} in {counted(len(self.layers), 'layer')}{skips})"


@dataclass(frozen=True)
class Measuring:
    """What is measured of candidates: on how many `tokens` of calibration text, at most how many of each layer."""

    tokens: int
    candidates: int

    @property
    def tokens_compared(self) -> int:
        """Whole decisions are compared on so many: twice as many, since they are fewer."""
        return 2 * self.tokens

    def forwards(self, num_layers: int) -> float:
        """What it costs, in forwards of that text."""
        return self.candidates * (num_layers + 1) / 2


@dataclass(frozen=True)
class Training:
    """What `Method.train` may use beside the checkpoint that it is given."""

    batches: Sequence[TokenBatch]
    """The pass's calibration text, right-padded ids with a mask."""
    held_out: Sequence[TokenBatch]
    """Held-out text, where the method asks for it: to judge by, not to train on."""
    original: Path | None
    """The checkpoint that the recipe began with; None where that was a live model of no folder."""
    work: Path
    """A folder that stays until the pass is done, also when the run is stopped: what it holds is there to resume from.
    It is gone where the run would be another one."""
    device: str
    seed: int
    progress: Progress
    load: Callable[[Path], Any]
    """A checkpoint's folder → its model in memory, on the device, as `compressor.load` loads it."""
    save: Callable[[Any, Path, Path], None]
    """(model, the folder that it was loaded from, `target`): written as the checkpoint that it came from is."""


class Matrices(Protocol):
    """What the tensors in a checkpoint's files are matrices of; see `edit.stored_matrices`."""

    @property
    def places(self) -> Mapping[str, str]:
        """Where each matrix is, by name on disk: `expert`, `block`, `layer`, `dense` or `other`."""

    def as_stored(self, layer: str, name: str, rows: Tensor) -> Mapping[str, Tensor]:
        """What belongs to the rows [outputs, …] of a site's matrices, of experts [E, outputs, …], by name on disk."""


class OptionError(ValueError):
    """An option cannot be met by this model: `option`, None the pass. The core adds its place in the recipe."""

    def __init__(self, option: str | None, message: str) -> None:
        super().__init__(message)
        self.option = option


def check_layer_names(layers: Sequence[MoELayer], option: str, by_layer: Mapping[str, Any]) -> None:
    """Raise OptionError unless every key of an option names a layer, by number or path, and none is named twice."""
    known = list(dict.fromkeys(layer.number or layer.path for layer in layers))
    for name in by_layer:
        if not any(name in layer.names for layer in layers):
            raise OptionError(
                option,
                f"there is no MoE layer {name}; the MoE layers are {', '.join(known)} (or by path, such as "
                f"{layers[0].path}).",
            )
    for layer in layers:
        given = [name for name in layer.names if name in by_layer]
        if len(given) > 1:
            raise OptionError(option, f"{layer.path}: named twice, as {' and as '.join(given)}; keep one of them.")


def fewer_experts(layer: MoELayer, num_kept: int, option: str, top_k: int | None = None) -> MoELayer:
    """The layer with so many experts left, of which a token chooses `top_k` (None: as many as now), for a Plan.

    Raises OptionError at `option`, or at `top_k`, where that cannot be, or where the layer could not go on skipping.
    """
    from compressor.model.moe_model import count_problem

    layer = replace(layer, top_k=top_k or layer.top_k)
    check_skipping(layer, "top_k")
    if problem := count_problem(layer, num_kept):
        raise OptionError(option, f"{layer.path}: {problem}.")
    smaller = layer.with_count(num_kept)
    check_skipping(smaller, option)
    return smaller


def check_skipping(layer: MoELayer, option: str | None = None) -> None:
    """Raise OptionError where a layer cannot skip by the rule that it has by then."""
    from compressor.model.skipping.install import skip_problem

    if layer.skip_rule is not None and (problem := skip_problem(layer, layer.skip_rule)):
        raise OptionError(
            option,
            f"{layer.path}: the model skips experts by then, and could not go on skipping: {problem}. Prune first, and "
            f"let the pruned model skip",
        )


class Method(ABC, Generic[OptionsT]):
    """A compression method: sets `name`, `version`, `api`, `options_type`; the hook `compressor_methods` offers it."""

    name: ClassVar[str]
    """The recipe key, such as `expert_pruning`."""
    version: ClassVar[str]
    """Written into every record; change it when the same figures would lead to another decision."""
    api: ClassVar[int]
    """The `PLUGIN_API` that it was written for; a method of another version is refused by name."""
    options_type: ClassVar[type[Options]]
    expert_ids: ClassVar[Sequence[str]] = EXPERT_IDS
    """What of a layer's decision are ids of experts, in lists or in lists of lists: shown as the original model's."""

    def __init__(self, options: OptionsT, criteria: Mapping[str, Any] | None = None) -> None:
        """`criteria` are the installed ones, by name (compressor.plugin.Criterion), for methods that score experts."""
        self.options = options
        self.criteria: Mapping[str, Any] = criteria or {}

    @property
    def progressive(self) -> bool:
        """Whether each layer is to be observed on what comes out of the layers already edited, by `preview` or, without
        one, by `edit`, which then writes nothing outside the MoE block.

        `decide` is then asked for one layer at a time as well, and must answer the same for it as for all together.
        """
        return False

    @property
    def needs_text(self) -> bool:
        """Whether its statistics are to be shown calibration text. Where not, none is read and nothing is run for it:
        they see no batch, and norms of a layer's weights are all that the core adds (`Statistic.weight_norms`).
        """
        return True

    @property
    def needs_original(self) -> bool:
        """Whether layers are to be observed beside the model that the recipe began with: `RoutedTokens.target_TH` is
        what the layer put out there, on the original's own activations. The original is read once more.
        """
        return False

    @property
    def fits_weights(self) -> bool:
        """Whether weights are fitted to its text: then a text that is measured too is refused."""
        return False

    def plainer(self) -> tuple[Method[OptionsT], str] | None:
        """(the same without what it adds if a recipe says nothing of it, what that is), which is taken where the model,
        a later pass or the memory allows no more; None where it adds nothing.
        """
        return None

    def sources(self) -> Sequence[BaseSource]:
        """Calibration text of the method's own, used instead of the recipe's for this pass; none by default."""
        return ()

    def bytes_per_token(self, layer: MoELayer) -> float:
        """What the layer's statistic keeps of every token of the calibration text until the layer is done, roughly."""
        return 0.0

    def bytes_of_sums(self, layer: MoELayer, hidden: int, num_domains: int) -> int:
        """What it keeps beside that, however long the text is, of so many sources; `hidden` is a token's width."""
        return 0

    def bytes_of_training(self, layers: Sequence[MoELayer], work: Work) -> int:
        """What `train` holds in memory at its peak, of a model of this size, roughly; 0 where that is no model."""
        return 0

    @property
    def held_out(self) -> bool:
        """Whether held-out text is observed too: `Gathered.held_out` names it, and nothing may be decided by it."""
        return False

    @property
    def needs_held_out(self) -> bool:
        """Whether it cannot decide where no text is left to hold out: refused when the text has been read."""
        return False

    @property
    def needs_matrices(self) -> bool:
        """Whether `external` asks `matrices` for experts' own ones: refused where files hold several in one tensor."""
        return False

    @property
    def alone(self) -> bool:
        """Whether it cannot share text out among several processes: refused there before anything is read."""
        return False

    @property
    def program(self) -> Sequence[str]:
        """The program of the user's that it runs, with its arguments: refused unless the user allows commands."""
        return ()

    @property
    def max_kl(self) -> float | None:
        """How far the answers of what `external` leaves may be from those before it, in nats a token; None: any."""
        return None

    @property
    def leaves_model(self) -> bool:
        """Whether what `external` leaves can be loaded. Where not it is the last pass, only its files are put out, and
        the record says that nothing of them was measured.
        """
        return True

    def check_domains(self, domains: Sequence[str]) -> None:
        """Say whether the names of the calibration sources are what the options expect. Raises OptionError."""

    def check_tokens(self, most: int) -> None:
        """Say whether so many calibration tokens, as many as its sources may have, are enough. Raises OptionError."""

    @abstractmethod
    def check(self, layers: Sequence[MoELayer]) -> Plan:
        """Say how these layers will be afterwards, before any weight is read. Raises OptionError if it cannot be."""

    def statistic(self, layer: MoELayer) -> Statistic | None:
        """Make the accumulator for one layer, or None if this layer needs no figures."""
        return None

    def input_statistic(self, site: LinearSite) -> InputStatistic | None:
        """Make the accumulator for what one linear map is given, a matrix of a layer's experts or a map beside them, or
        None if that is not needed. In progressive mode only a matrix of the experts.
        """
        return None

    def measuring(self, layers: Sequence[MoELayer]) -> Measuring | None:
        """Whether, and on how much text, `candidates` are to be measured; None by default. Not in progressive mode."""
        return None

    def candidates(self, layers: Sequence[MoELayer], layer: MoELayer, statistics: Gathered) -> Sequence[Decision]:
        """What might be decided of one of the layers, each a decision of it alone, by its figures. The core runs the
        model under the `preview` of each, and `measuring.measured_of` has then, from the layer's figures, what its
        answers lose, in nats a token, domain by domain. A pure function; none by default.
        """
        return ()

    @abstractmethod
    def decide(self, layers: Sequence[MoELayer], statistics: Gathered) -> Mapping[str, Any]:
        """Turn the figures into a decision: JSON, or a `Decision` where it has tensors.

        `statistics` maps a layer's path to the tensors that its statistic returned. Must be a pure function: same
        figures, same decision. Raises OptionError where the figures cannot tell what the options ask for.
        """

    def alternatives(self, layers: Sequence[MoELayer], statistics: Gathered) -> Mapping[str, Decision]:
        """Decisions to choose from, by what makes them up; the first is that of `decide`. Where there are several, the
        core measures what the model's answers lose under the `preview` of each, on text of `measuring`, and takes the
        one of least `cost`; the decision then says under `chosen` what all of them lose. The same object under several
        names is measured once. None by default.
        """
        return {}

    def observing_for(self, others: Sequence[Self]) -> Self:
        """One whose figures `others`, which differ from it in how many experts they keep, can decide by as well: what
        `sweep` observes with. By default itself, where its figures answer any count.
        """
        return self

    def cost(self, kl: Mapping[str, float]) -> float:
        """One number of what answers lose in each domain, in nats a token: the mean, unless a method knows better."""
        return math.fsum(kl.values()) / len(kl)

    def edit(self, layer: LayerWeights, decision: Decision) -> None:
        """Apply the decision to one layer: write its experts' numbers, and say what to keep or skip. Every method
        defines it, or `external`.

        Asked once a layer, and once more on copies in float32 where it asks for weights, so it must be a pure function
        of decision and layer. Weights are read only if it asks for them, one decoder layer at a time.
        """

    def external(self, source: Path, target: Path, decision: Decision) -> None:
        """Write into the empty folder `target` what is to become of the checkpoint in `source`, which is only read. A
        method that defines it edits no layer. What it leaves is loaded again: it has the same experts and vocabulary.
        Asked in the first process alone; `matrices` says what is in the files.
        """

    def train(self, source: Path, target: Path, decision: Decision, training: Training) -> Mapping[str, float] | None:
        """The same for a method that needs text, the original or more time than a run may have: it defines this one
        instead of `external`. Numbers that it returns are in the record's `checks`.
        """
        self.external(source, target, decision)
        return None

    model: str = ""
    """What the recipe calls the model; set by the core before it asks for `check`, in a run."""

    matrices: Matrices
    """What the tensors of `source` are, by their names there; set by the core before it asks for `external`."""

    def config_changes(self, decision: Decision) -> Mapping[str, Any]:
        """Keys of config.json that the edited model has besides, or otherwise; none by default. What the core sets
        itself (expert counts, top-k, dtype, its own `compressor`) is refused by name.
        """
        return {}

    def preview(self, moe: MoEModel, decision: Decision) -> AbstractContextManager[object] | None:
        """A context in which the untouched model computes what the edited one will, or None if there is no such thing.

        The decision may speak of some of the layers: then only they are previewed. The core compares the two on a
        calibration batch in every run, and stops if they differ; without a preview, it compares with what the edit has
        written before anything is removed.
        """
        return None

    def describe(self, decision: Decision) -> Description:
        """How the decision is shown to people, in tables, model card and page: all of it by default. Its `expert_ids`
        are the original model's here.
        """
        return Description.of(decision)

    def by_expert(
        self, layers: Sequence[MoELayer], statistics: Gathered, decision: Decision
    ) -> Mapping[str, Mapping[str, Sequence[float | None]]]:
        """What the page's map of experts says of each, beside what becomes of it: layer path → what that is called → a
        number for every expert that the pass saw, None where there is none. Nothing by default.
        """
        return {}

    def control(self, decision: Decision, layers: Sequence[MoELayer], seed: int) -> Decision | str:
        """The same decision by chance, which `evaluate.random` measures under `preview`; or why there is none, as what
        follows the method's name. `layers` are as the pass saw them. The same seed makes the same decision.
        """
        return "draws nothing at random"


class Healing(Method[OptionsT]):
    """A method that brings layers back to the original's output: it fits weights of each layer to what the
    original puts out there, and keeps those with which the layer's loss on held-out text falls. Its decision has
    `scales` of each layer, None of one that keeps its weights.
    """

    needs_original = fits_weights = held_out = needs_held_out = True

    def check(self, layers: Sequence[MoELayer]) -> Plan:
        """Every layer must let its experts be watched."""
        for layer in layers:
            if layer.watch_problem:
                raise OptionError(None, f"{layer.path}: its experts cannot be compared: {layer.watch_problem}")
        return Plan(layers, changes_values=True)

    def falls(self, layers: Mapping[str, Mapping[str, Any]], after: str) -> list[str]:
        """The layers whose `loss`, a share of the original's output, falls by more than rounding until `after`."""
        if not (found := [path for path, one in layers.items() if one["loss"] - one[after] > 1e-6]):
            raise OptionError(None, "in no layer does the loss on held-out text fall: leave this pass out")
        return found

    def describe(self, decision: Decision) -> Description:
        """Its figures, and how many layers keep their weights."""
        shown = [replace(one, detail=one.key == "scales") for one in Description.of(decision).columns]
        columns = [replace(one, title="held-out loss") if one.key == "loss" else one for one in shown]
        scales = [layer["scales"] for layer in decision["layers"].values()]
        note = f"in {scales.count(None)} of {len(scales)} layers the loss does not fall, and nothing changes"
        return Description(columns, [note] if None in scales else [])


BESIDE_NO_EXTERNAL = ("edit", "preview", "control", "config_changes", "progressive")
"""What is never asked of a method that defines `external` or `train`."""


def is_external(method: Method[Any] | type[Method[Any]]) -> bool:
    """Whether a method turns a checkpoint's folder into another one, by `Method.external` or `Method.train`."""
    kind = method if isinstance(method, type) else type(method)
    return kind.external is not Method.external or kind.train is not Method.train
