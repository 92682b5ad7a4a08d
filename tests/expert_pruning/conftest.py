"""What the tests of expert pruning share: layers and tokens made by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compressor import MoELayer, RoutedTokens, RoutingRule


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    return Path(__file__).parents[1] / "golden" / "mixtral_seed1"


@pytest.fixture(scope="session")
def make_layer() -> Callable[..., MoELayer]:
    """A layer of which only the counts matter."""

    def make(
        num_experts: int, top_k: int, *, num_groups: int = 1, num_chosen_groups: int = 1, path: str = "layers.0.mlp",
        **others: Any,
    ) -> MoELayer:  # fmt: skip
        return MoELayer(
            path=path,
            num_experts=num_experts,
            top_k=top_k,
            num_groups=num_groups,
            num_chosen_groups=num_chosen_groups,
            router="layers.0.mlp.gate",
            experts="layers.0.mlp.experts",
            tensors={},
            integers={},
            containers={},
            id_tensors=(),
            parameters_per_expert=1,
            router_probe=None,  # type: ignore[arg-type]
            **others,
        )

    return make


@pytest.fixture(scope="session")
def make_tokens(make_layer: Callable[..., MoELayer]) -> Callable[..., RoutedTokens]:
    """Tokens [T, H] at a layer whose experts are the matrices [E, H, H]; `choose` is the router: logits → ids, weights.

    `choose` must leave experts with logits of −inf alone.
    """

    def make(
        hidden_TH: Tensor,
        matrices_EHH: Tensor,
        logits_TE: Tensor,
        top_k: int,
        choose: Callable[[Tensor], tuple[Tensor, Tensor]],
        rule: RoutingRule | None,
    ) -> RoutedTokens:
        num_experts = len(matrices_EHH)

        def replay(kept: list[int], top_k: int | None = None) -> tuple[Tensor, Tensor]:
            dropped = [expert for expert in range(num_experts) if expert not in kept]
            masked = logits_TE.clone()
            masked[:, dropped] = float("-inf")
            return choose(masked)

        index_TK, weights_TK = choose(logits_TE)
        return RoutedTokens(
            layer=make_layer(num_experts, top_k),
            hidden_TH=hidden_TH,
            logits_TE=logits_TE,
            index_TK=index_TK,
            weights_TK=weights_TK,
            rule=rule,
            replay=replay,
            evaluate_experts=lambda x, e: torch.einsum("ch,cmhg->cmg", x, matrices_EHH[e]),
        )

    return make
