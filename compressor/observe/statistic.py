"""What a statistic is: figures gathered at a MoE layer.

A statistic adds up one batch after another. What it returns are raw sums, one row per batch or one number per expert,
so that figures of several files, processes or domains can be joined later.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from compressor.errors import shortened
from compressor.machine.distributed import Processes
from compressor.model.expert_products import expert_matrices, matrix_names, own_tensors, show_inputs
from compressor.model.modules import tensor_at
from compressor.model.routed_tokens import RankedChunk, RoutedTokens
from compressor.model.structure import MoELayer
from compressor.observe.reductions import Rule, Statistics
from compressor.wording import counted


class Gathered(dict[str, Mapping[str, Tensor]]):
    """What was observed: layer path → name → figures.

    `domains` are the names of the calibration sources, in the order in which figures kept apart by source have them;
    those of `held_out` among them were observed to see what a decision does to other text, not to decide by.
    """

    def __init__(self, layers: Statistics, domains: Sequence[str] = ("",), held_out: Sequence[str] = ()) -> None:
        super().__init__(layers)
        self.domains = tuple(domains)
        self.held_out = tuple(held_out)

    def __repr__(self) -> str:
        return f"Gathered({counted(len(self), 'layer')}; {shortened(', '.join(filter(None, self.domains)), 160)})"


class Statistic(ABC):
    """Accumulates figures over the calibration batches at one MoE layer."""

    weight_norms: bool = False
    """Whether the layer's figures should hold the norms of its experts' weights too: `weights.l1`, `weights.squared`,
    `weights.count`, [E] each.
    """
    optional: bool = False
    """Whether it is no error if no token comes to the layer: there are no figures of it then."""

    own_rules: Mapping[str, Rule] = {}
    """How figures that belong to one run are joined over its processes, where their names do not follow `RULES`. In
    several processes any other figure is refused.
    """
    processes: Processes = Processes()

    def share(self, processes: Processes) -> None:
        """Told before the first batch which processes share the batches: each sees some of them."""
        self.processes = processes

    @abstractmethod
    def update(self, tokens: RoutedTokens) -> None:
        """Add one batch. Padding tokens are not among `tokens`."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The figures of this process's batches so far, on the CPU; sums in float64. The core joins them with those of
        other processes, by `RULES` and `own_rules`; a process that no token came to is not asked.
        """

    def again(self) -> bool:
        """Whether every batch has to be seen once more, in the same order, before the figures are whole.

        Asked when all batches have been seen. A statistic that says True gets them all again through `update`. Asked in
        every process, also where no token came to the layer; so this is the place to exchange what `tensors` needs,
        and the answers must be the same.
        """
        return False


@dataclass(frozen=True)
class LinearSite:
    """A linear map whose inputs can be observed, by its name in `LayerWeights`: a matrix of a layer's experts
    (`expert`), a linear map beside them in the MoE block, such as a shared expert's (`block`), or any other in the
    decoder layer, such as attention's (`layer`).
    """

    layer: MoELayer
    name: str
    place: Literal["expert", "block", "layer"]
    weight: Callable[[int | None], Tensor] = field(repr=False, compare=False)
    """The matrix [outputs, inputs] of an expert, None of another map: there while its layer is observed, up to the call
    of `InputStatistic.tensors`.
    """


def linear_sites(model: Any, layer: MoELayer) -> list[LinearSite]:
    """The linear maps of a MoE layer and of the decoder layer around it. The model may be without weights."""

    @cache
    def input_dims() -> Mapping[str, int]:
        return expert_matrices(model, layer).input_dims

    def of_expert(name: str, expert: int | None) -> Tensor:
        owned = (own for own in own_tensors(model, layer) if own.name == name and own.expert in (None, expert))
        matrix = next(owned).of(expert or 0)
        return matrix if input_dims()[name] else matrix.T

    def beside(at: str, expert: int | None) -> Tensor:
        return tensor_at(model, at).detach()

    weights = {name: partial(of_expert, name) for name in matrix_names(model, layer)}
    weights |= {name: partial(beside, at) for name, at in layer.linears.items()}
    return [LinearSite(layer, name, layer.place_of(name), weight) for name, weight in weights.items()]


class InputStatistic(ABC):
    """Accumulates figures of what a linear map is given, as sums over tokens, which processes can add."""

    @abstractmethod
    def update(self, inputs_TI: Tensor, expert: int | None) -> None:
        """Add inputs [T, I], in the model's dtype, of one expert's own tokens, or of all tokens where it is no expert's
        matrix. Padding tokens are not among them. `expert` is its id, as the pass sees it.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The sums so far, on the CPU, in float64: `inputs.SITE.NAME` among the layer's figures."""


class ExpertInputs(Statistic):
    """Shows `sites` of a layer what their matrices are multiplied with; figures of `others` stand beside theirs."""

    def __init__(
        self, model: Any, sites: Mapping[str, InputStatistic], others: Mapping[str, InputStatistic] | None = None
    ) -> None:
        self._model, self._sites, self._others = model, sites, others or {}

    def update(self, tokens: RoutedTokens) -> None:
        """Run the chosen experts once more, and look at their matrices."""
        if self._sites:

            def take(name: str, expert: int, inputs_PI: Tensor) -> None:
                self._sites[name].update(inputs_PI, expert)

            show_inputs(self._model, tokens, list(self._sites), take)

    def tensors(self) -> dict[str, Tensor]:
        """Those of all sites."""
        everything = {**self._sites, **self._others}
        return {f"inputs.{name}.{key}": one for name, of in everything.items() for key, one in of.tensors().items()}


class ImageTokens(Statistic):
    """How many of the places of images chose each expert: `images.tokens` [E] float64, NaN where
    experts are given tokens of a kind alone.
    """

    optional = True

    def __init__(self, layer: MoELayer) -> None:
        self._tokens_E, self._num_experts = torch.zeros(layer.num_choices, dtype=torch.float64), layer.num_experts

    def update(self, tokens: RoutedTokens) -> None:
        """Add one batch."""
        if tokens.is_image_T is not None:
            is_known = len(tokens.is_image_T) == tokens.num_tokens
            chosen = tokens.index_TK.cpu()[tokens.is_image_T if is_known else []].flatten()
            self._tokens_E += torch.bincount(chosen, minlength=len(self._tokens_E)) if is_known else torch.nan

    def tensors(self) -> dict[str, Tensor]:
        """The sums so far."""
        return {"images.tokens": self._tokens_E[: self._num_experts].clone()}


class RankedStatistic(Statistic):
    """A statistic of the outputs of each token's best-ranked experts. Several of them can share these outputs."""

    @abstractmethod
    def num_ranks(self, tokens: RoutedTokens) -> int:
        """How many of each token's ranks are needed; the first ones are the experts chosen."""

    @abstractmethod
    def add(self, tokens: RoutedTokens, chunk: RankedChunk) -> None:
        """Add some of a batch's tokens: exactly `num_ranks` ranks of them. Chunks come in order."""

    def end_batch(self, tokens: RoutedTokens) -> None:
        """All tokens of the batch have been added; `tokens.output_TH` is there."""

    def update(self, tokens: RoutedTokens) -> None:
        """Add one batch."""
        num_ranks = self.num_ranks(tokens)
        for chunk in tokens.ranked_outputs(num_ranks):
            self.add(tokens, chunk)
        self.end_batch(tokens)


class JoinedStatistic(RankedStatistic):
    """Several statistics, with different figures; outputs that the ranked ones share are computed once."""

    def __init__(self, parts: Sequence[Statistic]) -> None:
        self.parts = parts
        self._ranked = [part for part in parts if isinstance(part, RankedStatistic)]
        self._others = [part for part in parts if part not in self._ranked]
        self.weight_norms = any(part.weight_norms for part in parts)
        self.optional = all(part.optional for part in parts)
        self.own_rules = {name: rule for part in parts for name, rule in part.own_rules.items()}

    def share(self, processes: Processes) -> None:
        """Tell all of them."""
        for part in self.parts:
            part.share(processes)

    def update(self, tokens: RoutedTokens) -> None:
        """Add one batch to all of them; a second time only to those that asked for it, each in its own way."""
        if self._again is None and self._ranked:
            super().update(tokens)
        for part in self._others if self._again is None else self._again:
            part.update(tokens)

    def num_ranks(self, tokens: RoutedTokens) -> int:
        """The most that one of them needs."""
        return max(part.num_ranks(tokens) for part in self._ranked)

    def add(self, tokens: RoutedTokens, chunk: RankedChunk) -> None:
        """Give each of them the ranks that it needs."""
        for part in self._ranked:
            part.add(tokens, chunk.first(part.num_ranks(tokens)))

    def end_batch(self, tokens: RoutedTokens) -> None:
        """Tell all of them."""
        for part in self._ranked:
            part.end_batch(tokens)

    def again(self) -> bool:
        """Whether one of them wants the batches again."""
        self._again = [part for part in (self.parts if self._again is None else self._again) if part.again()]
        return bool(self._again)

    def tensors(self) -> dict[str, Tensor]:
        """The figures of all of them."""
        return {name: tensor for part in self.parts for name, tensor in part.tensors().items()}

    _again: Sequence[Statistic] | None = None
