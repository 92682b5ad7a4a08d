"""The method `expert_pruning`: exact search over all sets of kept experts, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from pydantic import Field, StrictFloat, StrictInt, model_validator
from torch import Tensor

from compressor import (
    Decision,
    Method,
    MoELayer,
    MoEModel,
    OptionError,
    Options,
    Plan,
    RoutedTokens,
    Statistic,
    count_problem,
)
from compressor_expert_pruning.subsets import (
    SubsetTables,
    best_subset,
    dropped_subsets,
    num_subsets,
    ranks_needed,
    squared_errors,
)

_MAX_RANKS = 20


class ExpertPruningOptions(Options):
    """How many experts stay in every MoE layer: `keep` or `drop`, one of them."""

    keep: StrictInt | StrictFloat | None = Field(
        default=None,
        description="experts to keep in every layer: a count (6), or a fraction between 0 and 1 (0.75)",
    )
    drop: StrictInt | None = Field(default=None, ge=1, description="experts to drop from every layer: a count")
    max_subsets: StrictInt = Field(
        default=20_000, ge=1, description="refuse to search more sets of experts per layer than this"
    )

    @model_validator(mode="after")
    def _one_of_keep_and_drop(self) -> ExpertPruningOptions:
        if (self.keep is None) == (self.drop is None):
            raise ValueError("say how many experts stay with one of `keep` and `drop`, for example `keep: 6`")
        if isinstance(self.keep, float) and not 0 < self.keep < 1:
            raise ValueError(f"found keep: {self.keep}; a fraction lies between 0 and 1, a count is a whole number")
        if isinstance(self.keep, int) and self.keep < 1:
            raise ValueError(
                f"found keep: {self.keep}; keep at least 1 expert, and at least as many as a token chooses"
            )
        return self

    def num_kept(self, num_experts: int) -> int:
        """The count for a layer of `num_experts`; a fraction is rounded to the nearest count, halves upwards."""
        if self.drop is not None:
            return num_experts - self.drop
        assert self.keep is not None
        return self.keep if isinstance(self.keep, int) else int(self.keep * num_experts + 0.5)


class ExpertPruning(Method[ExpertPruningOptions]):
    """Keep the set of experts that changes each MoE layer's output least on calibration text (arXiv 2402.14800)."""

    name = "expert_pruning"
    version = "1"
    options_type: ClassVar[type[Options]] = ExpertPruningOptions

    def check(self, layers: Sequence[MoELayer]) -> Plan:
        """Possible counts only; and few enough sets to look at all of them."""
        notes = []
        for layer in layers:
            num_kept = self.options.num_kept(layer.num_experts)
            self._check_count(layer, num_kept)
            sets, ranks = num_subsets(layer, num_kept), ranks_needed(layer, num_kept)
            if sets > self.options.max_subsets or ranks > _MAX_RANKS:
                limit = (
                    f"the limit is {self.options.max_subsets:,} (`max_subsets`)"
                    if sets > self.options.max_subsets
                    else f"each token would need its best {ranks} experts, the limit is {_MAX_RANKS}"
                )
                raise OptionError(
                    self._count_option,
                    f"{layer.path}: keeping {num_kept} of {layer.num_experts} experts means {sets:,} possible sets per "
                    f"layer, too many to look at all of them: {limit}. Drop fewer experts.",
                )
            notes.append(f"{sets:,} sets of {num_kept} experts per layer, all of them looked at")
        return Plan({layer.path: self.options.num_kept(layer.num_experts) for layer in layers}, sorted(set(notes)))

    @property
    def _count_option(self) -> str:
        return "drop" if self.options.drop is not None else "keep"

    def _check_count(self, layer: MoELayer, num_kept: int) -> None:
        if num_kept == layer.num_experts:
            raise OptionError(self._count_option, f"{layer.path}: all {num_kept} experts would stay: nothing to prune.")
        if num_kept < 1:
            raise OptionError(
                self._count_option,
                f"{layer.path}: it has {layer.num_experts} experts, so dropping {self.options.drop} would leave none.",
            )
        problem = count_problem(layer, num_kept)
        if problem:
            raise OptionError(self._count_option, f"{layer.path}: {problem}.")

    def statistic(self, layer: MoELayer) -> Statistic:
        """The squared errors of every set, per batch."""
        return SubsetErrors(layer, self.options.num_kept(layer.num_experts))

    def decide(self, layers: Sequence[MoELayer], statistics: Mapping[str, Mapping[str, Tensor]]) -> Decision:
        """Per layer: the ids kept, their loss, and the loss as a fraction of the output's own norm."""
        decided: dict[str, Any] = {}
        for layer in layers:
            figures = statistics[layer.path]
            num_kept = self.options.num_kept(layer.num_experts)
            dropped, losses_S = best_subset(figures["squared_error"], dropped_subsets(layer, num_kept))
            norm = float(figures["squared_output"].sqrt().sum())
            loss = float(losses_S.min())
            decided[layer.path] = {
                "kept": [expert for expert in range(layer.num_experts) if expert not in dropped],
                "dropped": list(dropped),
                "loss": loss,
                "relative_loss": loss / norm if norm else 0.0,
                "median_loss": float(losses_S.quantile(0.5)),
                "sets": len(losses_S),
            }
        return {"layers": decided}

    def preview(self, moe: MoEModel, decision: Decision) -> AbstractContextManager[object]:
        """Removed means masked."""
        return moe.masked(_kept(decision))

    def edit(self, moe: MoEModel, decision: Decision) -> None:
        """Remove the experts that are not kept."""
        moe.keep(_kept(decision))


def _kept(decision: Decision) -> dict[str, list[int]]:
    return {path: layer["kept"] for path, layer in decision["layers"].items()}


class SubsetErrors(Statistic):
    """Per batch B and set S: the squared error of the layer's output; and per batch the squared norm of the output."""

    def __init__(self, layer: MoELayer, num_kept: int) -> None:
        self.layer = layer
        self.num_kept = num_kept
        self._tables: SubsetTables | None = None
        self._errors_BS: list[Tensor] = []
        self._outputs_B: list[Tensor] = []
        self._num_tokens_B: list[int] = []

    def update(self, tokens: RoutedTokens) -> None:
        """Add the row of one batch."""
        if self._tables is None:
            self._tables = SubsetTables.build(self.layer, self.num_kept, tokens.hidden_TH.device)
        self._errors_BS.append(squared_errors(tokens, self._tables, self.num_kept).cpu())
        assert tokens.output_TH is not None
        self._outputs_B.append(tokens.output_TH.float().square().sum(dtype=torch.float64).cpu())
        self._num_tokens_B.append(tokens.num_tokens)

    def tensors(self) -> dict[str, Tensor]:
        """squared_error [B, S], squared_output [B] float64; num_tokens [B] int64."""
        return {
            "squared_error": torch.stack(self._errors_BS),
            "squared_output": torch.stack(self._outputs_B),
            "num_tokens": torch.tensor(self._num_tokens_B),
        }
