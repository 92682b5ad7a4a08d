"""The options of choosing experts: how many stay, and how they are found, in the words of a recipe.

``keep: 6`` means six in every layer and ``keep: 0.75`` three quarters of them; ``keep: {0: 8, 3: 4}`` counts by layer,
those not named keep all; ``keep: {mean: 6}`` six on average, shared out among the layers where it costs least; ``drop:
2`` the complement of a count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    Tag,
    model_serializer,
    model_validator,
)

from compressor.method import Options

if TYPE_CHECKING:
    from compressor.model.structure import MoELayer

Number = StrictInt | StrictFloat


def _possible(amount: int | float) -> int | float:
    if isinstance(amount, float) and not 0 < amount < 1:
        raise ValueError(f"found {amount}; a fraction lies between 0 and 1, a count is a whole number")
    if isinstance(amount, int) and amount < 1:
        raise ValueError(f"found {amount}; keep at least 1 expert, and at least as many as a token chooses")
    return amount


def _possible_mean(mean: int | float) -> int | float:
    if not 0 < mean < math.inf or (isinstance(mean, float) and mean == 1.0):
        raise ValueError(f"found {mean}; a mean is a number of experts such as 6 or 5.5, or a fraction such as 0.75")
    return mean


def _as_text(key: Any) -> Any:
    return str(key) if isinstance(key, int) and not isinstance(key, bool) else key


def _kind(keep: Any) -> str:
    if isinstance(keep, Budget) or (isinstance(keep, Mapping) and {"mean", "fraction"} & set(keep)):
        return "budget"
    return "layers" if isinstance(keep, Mapping) else "amount"


def _not_empty(counts: dict[str, int | float]) -> dict[str, int | float]:
    if not counts:
        raise ValueError("found an empty mapping; name at least one layer, such as {3: 4}, or give a count")
    return counts


Amount = Annotated[Number, AfterValidator(_possible)]
LayerName = Annotated[str, BeforeValidator(_as_text)]
CountsOfLayers = Annotated[dict[LayerName, Amount], AfterValidator(_not_empty)]


class Budget(Options):
    """A number of experts to share out among the layers: so many on average, or a fraction of all."""

    mean: Annotated[Number, AfterValidator(_possible_mean)] | None = Field(
        default=None,
        description="experts that a layer keeps on average: a number (6, 5.5), or a fraction between 0 and 1 (0.75)",
    )
    fraction: StrictFloat | None = Field(default=None, gt=0, lt=1, description="the same as a fraction of all: 0.75")
    min: StrictInt | None = Field(default=None, ge=1, description="experts that every layer keeps at least")
    max: StrictInt | None = Field(default=None, ge=1, description="experts that every layer keeps at most")

    @model_validator(mode="after")
    def _one_amount(self) -> Budget:
        if (self.mean is None) == (self.fraction is None):
            raise ValueError("say how many stay with one of `mean` and `fraction`, such as {mean: 6}")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"found `min` {self.min} above `max` {self.max}")
        return self

    @model_serializer
    def _as_written(self) -> dict[str, int | float]:
        return {name: value for name, value in self if value is not None}

    @property
    def amount(self) -> int | float:
        """What was asked for: experts of a layer, or below 1 a fraction of all."""
        amount = self.mean if self.mean is not None else self.fraction
        assert amount is not None
        return amount

    def total(self, layers: list[int]) -> int:
        """Experts to keep in all, given each layer's number of experts; to the nearest one, halves upwards."""
        is_fraction = isinstance(self.amount, float) and self.amount < 1
        return int(self.amount * (sum(layers) if is_fraction else len(layers)) + 0.5)

    def allows(self, count: int) -> bool:
        """Whether a layer may keep so many."""
        return (self.min or 1) <= count and (self.max is None or count <= self.max)


Keep = Annotated[
    Annotated[Amount, Tag("amount")] | Annotated[CountsOfLayers, Tag("layers")] | Annotated[Budget, Tag("budget")],
    Discriminator(_kind),
]


def _known_blend(blend: Any) -> Any:
    if isinstance(blend, dict):
        if not blend:
            raise ValueError("found an empty mapping; give each domain its weight, such as {code: 2, prose: 1}")
        for domain, weight in blend.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"found {weight} as the weight of {domain!r}; a weight is a number from 0 up")
        if not any(blend.values()):
            raise ValueError("all weights are 0; at least one domain must count")
    return blend


def _experts_of_layers(experts: dict[str, list[int]]) -> dict[str, list[int]]:
    for layer, ids in experts.items():
        if not ids or len(set(ids)) != len(ids) or min(ids) < 0:
            raise ValueError(f"layer {layer}: found {ids}; give different expert ids from 0 up")
    return experts


BlendOption = Annotated[
    Literal["mean", "worst", "pooled"] | dict[str, StrictInt | StrictFloat], AfterValidator(_known_blend)
]
ExpertsOfLayers = Annotated[dict[LayerName, list[StrictInt]], AfterValidator(_experts_of_layers)]


class SelectionOptions(Options):
    """How many experts stay (`keep` or `drop`, one of them), how they are found, and which are not for the choosing."""

    keep: Keep | None = Field(
        default=None,
        description="experts to keep: a count (6) or a fraction (0.75) for every layer; counts by layer "
        "({0: 8, 3: 4}: number or path of the layer, those not named keep all); or a mean "
        "({mean: 6}, or {fraction: 0.75}, with `min` and `max`: shared out among the layers, see `share`)",
    )
    drop: StrictInt | None = Field(default=None, ge=1, description="experts to drop from every layer: a count")
    share: Literal["measured", "loss", "even"] | None = Field(
        default=None,
        description="how a mean is shared out: measured (by what the model's answers lose, in nats, when one layer "
        "alone keeps fewer; the default), loss (by the layers' squared losses), even (as many everywhere as can be)",
    )
    measured_counts: StrictInt | None = Field(
        default=None,
        ge=2,
        description="counts of each layer that are measured; default at most 7, and few enough that it costs no more "
        "than one run over 128 × 2048 tokens",
    )
    measured_tokens: StrictInt | None = Field(
        default=None, ge=256, description="tokens of the calibration text that they are measured on; default 3840"
    )
    replace: Literal["none", "constants", "never_chosen", "measured"] | None = Field(
        default=None,
        description="what answers in the place of the experts that go: none (tokens choose among the others), or "
        "constants (the router stays as it is, and such an expert answers its mean), or never_chosen (as none, but the "
        "router keeps its rows, and its bias switches them off: other counts in other layers in a format of vLLM's), "
        "or measured (none or constants, whichever loses less of the model's answers); default measured for a mean of "
        "which no more is said, where the model's files and later passes take constants, else none",
    )
    choose: Literal["measured", "given"] | None = Field(
        default=None,
        description="measured: several choices, such as a criterion's, or an even split, are compared by what the "
        "model's answers lose under each, and the best is taken; given: what is asked for is; default measured for a "
        "mean of which no more is said. `compressor decide` has no model to ask, and takes the first",
    )
    multiple_of: StrictInt | None = Field(
        default=None,
        ge=2,
        description="let every layer keep a multiple of this number, such as 8, for serving on so many devices: "
        "fractions, `drop` and means go to the nearest multiple, halves upwards; a count has to be one",
    )
    search: Literal["auto", "exact", "greedy"] = Field(
        default="auto",
        description="how the experts that change the layer's output least are found: exact looks at every set, greedy "
        "drops the least missed one after another and then swaps; auto is exact up to `max_subsets` sets per layer",
    )
    criterion: str | None = Field(
        default=None,
        description="keep the experts with the largest scores by this criterion instead of searching, such as reap; "
        "`compressor methods` lists them",
    )
    blend: BlendOption = Field(
        default="mean",
        description="how several calibration sources (domains) count: mean (each the same), worst (the one that loses "
        "most), weights ({code: 2, prose: 1}, by the sources' names), or pooled (as one text)",
    )
    protect: ExpertsOfLayers = Field(
        default_factory=dict, description="experts that must stay: ids by layer, such as {3: [17, 40]}"
    )
    forbid: ExpertsOfLayers = Field(default_factory=dict, description="experts that must go: ids by layer")
    protect_super_experts: StrictBool = Field(
        default=True,
        description="keep experts whose outputs are more than 20 times as large as those of the layer's median expert: "
        "models collapse without them (not where a criterion such as aimer looks at no text, which they are known by)",
    )
    progressive: StrictBool = Field(
        default=False,
        description="observe each layer on what comes out of the layers already pruned, against the original output",
    )
    top_k: StrictInt | None = Field(
        default=None,
        ge=1,
        description="experts that each token chooses from then on, fewer than now; the loss is against the layer as "
        "it is now, so the experts are chosen for it",
    )
    padded: StrictBool = Field(
        default=False,
        description="where layers keep different counts: store the largest of them in every layer and switch the "
        "surplus off in the router, so that the checkpoint loads anywhere; saves that much less memory",
    )
    gather: tuple[Literal["pairs", "outputs"], ...] = Field(
        default=(),
        description="figures to gather beyond those that this pass needs, so that `compressor decide` can use criteria "
        "that need them: pairs (single_removal, quad_mix), outputs (mone)",
    )
    max_subsets: StrictInt = Field(
        default=20_000, ge=1, description="look at all sets of experts of a layer only up to this many"
    )
    ranks: StrictInt | None = Field(
        default=None,
        ge=1,
        description="greedy search: how many of each token's best experts are looked at; default 2, 3 or 5 times as "
        "many as a token chooses, by the share that goes",
    )
    starts: StrictInt | None = Field(
        default=None,
        ge=0,
        description="greedy search: further sets to start swapping from, besides the greedy one; default 0, and 2 "
        "where more than 60 % of the experts go",
    )
    seed: StrictInt | None = Field(default=None, ge=0, description="for the criterion random; default 0")
    _num_kinds: int = 1

    @model_validator(mode="after")
    def _one_of_keep_and_drop(self) -> SelectionOptions:
        if (self.keep is None) == (self.drop is None):
            raise ValueError("say how many experts stay with one of `keep` and `drop`, for example `keep: 6`")
        return self

    @model_validator(mode="after")
    def _every_setting_counts(self) -> SelectionOptions:
        if self.criterion is not None:
            fields = type(self).model_fields
            names = ("search", "ranks", "starts", "max_subsets")
            idle = [name for name in names if getattr(self, name) != fields[name].default]
            if idle:
                raise ValueError(f"`{idle[0]}` would have no effect beside `criterion`: leave one of them out")
            if self.budget is not None and self.share == "loss":
                raise ValueError(
                    "a criterion compares experts of one layer and knows no loss: share a mean out by `measured` or "
                    "`even`"
                )
        elif self.seed is not None:
            raise ValueError("`seed` would have no effect: the search draws nothing at random; leave it out")
        if self.search == "exact" and (self.ranks is not None or self.starts is not None):
            raise ValueError("`ranks` and `starts` would have no effect with `search: exact`: leave them out")
        if self.progressive and self.budget is not None:
            raise ValueError(
                "`progressive` decides a layer before it sees the next, so it cannot share out a mean; give counts"
            )
        if self.replace == "never_chosen" and (self.top_k is not None or self.padded):
            raise ValueError("`top_k` and `padded` mean nothing beside `replace: never_chosen`: leave them out")
        if self.replace in ("constants", "measured"):
            fields = type(self).model_fields
            others = ("top_k", "progressive", "padded", *(("search", "ranks", "starts") if self.with_constants else ()))
            if idle := [name for name in others if getattr(self, name) != fields[name].default]:
                raise ValueError(f"`{idle[0]}` means nothing beside `replace: {self.replace}`: leave one of them out")
        idle = [name for name in ("measured_counts", "measured_tokens") if getattr(self, name) and not self.is_measured]
        if self.choose == "measured" and self.progressive:
            raise ValueError("`progressive` decides a layer before it sees the next: say `choose: given`, or leave it")
        idle += ["share"] if self.share and not self.budget else []
        if idle:
            raise ValueError(f"`{idle[0]}` would have no effect: it is for a mean that is shared out; leave it out")
        return self

    @property
    def replacement(self) -> Literal["none", "constants", "never_chosen", "measured"]:
        """`replace`, or what is done without it."""
        if self.replace is not None:
            return self.replace
        says_more = self.top_k is not None or self.padded or self.multiple_of or self.ranks or self.starts
        return "measured" if self._is_left_to_measuring and self.choose != "given" and not says_more else "none"

    @property
    def with_constants(self) -> bool:
        """Whether the experts that go answer constants."""
        return self.replace == "constants"

    @property
    def kinds(self) -> Sequence[Self]:
        """The same for each that may stand in the place of experts that go: one, unless that is measured."""
        kinds = ("none", "constants") if self.replacement == "measured" else (self.replacement,)
        found = [self.model_copy(update={"replace": kind}) for kind in kinds]
        for one in found:
            one._num_kinds = len(kinds)
        return found

    @property
    def num_kinds(self) -> int:
        """How many of them share what measuring may cost."""
        return self._num_kinds

    @property
    def _is_left_to_measuring(self) -> bool:
        """Whether it is a mean of which no more is said."""
        return self.is_measured and not self.share and self.criterion is None and self.search == "auto"

    @property
    def chooses(self) -> bool:
        """Whether several choices are measured and the best is taken."""
        return self.choose == "measured" or (self.choose is None and self._is_left_to_measuring)

    @property
    def is_measured(self) -> bool:
        """Whether counts are shared out by what the model's answers lose."""
        return self.budget is not None and self.share in (None, "measured")

    @property
    def count_option(self) -> str:
        """The option that says how many experts stay."""
        return "drop" if self.drop is not None else "keep"

    @property
    def budget(self) -> Budget | None:
        """The mean asked for, if it is a mean."""
        return self.keep if isinstance(self.keep, Budget) else None

    @property
    def by_layer(self) -> dict[str, int | float]:
        """The counts of the layers named; empty if the count is not given by layer."""
        return self.keep if isinstance(self.keep, dict) else {}

    def asked(self, layer: MoELayer) -> int | float | None:
        """What was asked of a layer: a count, a number that need not be whole (float), or None: figures decide."""
        if self.budget:
            return None
        if self.drop is not None:
            return float(layer.num_experts - self.drop)
        amount = self.keep
        if isinstance(amount, dict):
            amount = next((amount[name] for name in layer.names if name in amount), layer.num_experts)
        assert isinstance(amount, int | float)
        return amount if isinstance(amount, int) else amount * layer.num_experts

    def num_kept(self, layer: MoELayer) -> int | None:
        """The count of a layer, None if the figures have to say; fractions go to the nearest count, halves upwards."""
        asked = self.asked(layer)
        return None if asked is None else int(asked + 0.5)


def ids_for(layer: MoELayer, experts: Mapping[str, list[int]]) -> list[int]:
    """The ids given for a layer, by its number or its path; empty if it is not named."""
    return next((experts[name] for name in layer.names if name in experts), [])
