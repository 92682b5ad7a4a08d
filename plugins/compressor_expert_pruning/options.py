"""The options of expert pruning: how many experts stay, in the words of a recipe.

``keep: 6`` means six in every layer and ``keep: 0.75`` three quarters of them; ``keep: {0: 8, 3: 4}`` counts by layer,
those not named keep all; ``keep: {mean: 6}`` six on average, shared out among the layers where it costs least; ``drop:
2`` the complement of a count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    Tag,
    model_validator,
)

from compressor import MoELayer, Options

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
    if isinstance(keep, Budget) or (isinstance(keep, Mapping) and "mean" in keep):
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
    """A number of experts to share out among the layers."""

    mean: Annotated[Number, AfterValidator(_possible_mean)] = Field(
        description="experts that a layer keeps on average: a number (6, 5.5), or a fraction between 0 and 1 (0.75)"
    )

    def total(self, layers: list[int]) -> int:
        """Experts to keep in all, given each layer's number of experts; to the nearest one, halves upwards."""
        is_fraction = isinstance(self.mean, float) and self.mean < 1
        return int(self.mean * (sum(layers) if is_fraction else len(layers)) + 0.5)


Keep = Annotated[
    Annotated[Amount, Tag("amount")] | Annotated[CountsOfLayers, Tag("layers")] | Annotated[Budget, Tag("budget")],
    Discriminator(_kind),
]


class ExpertPruningOptions(Options):
    """How many experts stay: `keep` or `drop`, one of them; and how many each token chooses among them."""

    keep: Keep | None = Field(
        default=None,
        description="experts to keep: a count (6) or a fraction (0.75) for every layer; counts by layer "
        "({0: 8, 3: 4}: number or path of the layer, those not named keep all); or a mean "
        "({mean: 6}: shared out among the layers so that their squared losses add up to least)",
    )
    drop: StrictInt | None = Field(default=None, ge=1, description="experts to drop from every layer: a count")
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
    max_subsets: StrictInt = Field(
        default=20_000, ge=1, description="refuse to search more sets of experts per layer than this"
    )

    @model_validator(mode="after")
    def _one_of_keep_and_drop(self) -> ExpertPruningOptions:
        if (self.keep is None) == (self.drop is None):
            raise ValueError("say how many experts stay with one of `keep` and `drop`, for example `keep: 6`")
        return self

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

    def num_kept(self, layer: MoELayer) -> int | None:
        """The count of a layer, None if the figures have to say; fractions go to the nearest count, halves upwards."""
        if self.budget:
            return None
        if self.drop is not None:
            return layer.num_experts - self.drop
        amount = self.keep
        if isinstance(amount, dict):
            amount = next((amount[name] for name in names(layer) if name in amount), layer.num_experts)
        assert isinstance(amount, int | float)
        return amount if isinstance(amount, int) else int(amount * layer.num_experts + 0.5)


def number(layer: MoELayer) -> str | None:
    """The decoder layer's number: the first integer in the block's path; `model.layers.3.mlp` → "3"."""
    return next((part for part in layer.path.split(".") if part.isdecimal()), None)


def names(layer: MoELayer) -> list[str]:
    """What a recipe may call a layer: the path of its block, or its number."""
    return [layer.path, *filter(None, [number(layer)])]
