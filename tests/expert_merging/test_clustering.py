"""HC-SMoE's formulas: by hand, against a slow version, and against every expert run on every token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compressor.model.routing_rule import RoutingRule
from compressor.plugin import Gathered, OptionError
from compressor_expert_merging import ExpertMerging, ExpertMergingOptions
from compressor_expert_merging.clustering import MeanOutputs, average_linkage, shares


def by_hand(*points: float) -> torch.Tensor:
    return torch.tensor(points, dtype=torch.float64)[:, None]


def test_average_linkage_by_hand():
    """0 and 1 are joined, then 10 and 12; then 5 is on average 4.5 from the first and 6 from the second."""
    points = by_hand(0, 10, 1, 5, 12)
    assert average_linkage(points, 5) == [[0], [1], [2], [3], [4]]
    assert average_linkage(points, 4) == [[0, 2], [1], [3], [4]]
    assert average_linkage(points, 3) == [[0, 2], [1, 4], [3]]
    assert average_linkage(points, 2) == [[0, 2, 3], [1, 4]]


@pytest.mark.parametrize(
    ("last", "clusters"),
    [
        (5.5, [[0, 1], [2, 3]]),
        (5.9, [[0, 1, 2], [3]]),
    ],  # the nearest members would join 0, 1, 2 twice, the farthest 2, 3
)
def test_it_is_the_average_that_counts_not_the_nearest_or_farthest(last, clusters):
    """{0, 1} and 3.1 are 2.1 near, 3.1 far and 2.6 on average."""
    assert average_linkage(by_hand(0, 1, 3.1, last), 2) == clusters


def test_of_equal_distances_the_first_pair_is_joined():
    assert average_linkage(by_hand(0, 1, 2, 3), 3) == [[0, 1], [2], [3]]


def slow_linkage(points: torch.Tensor, num_clusters: int) -> list[list[int]]:
    """The definition, written down once more: every pair of members, every time."""
    clusters = [[number] for number in range(len(points))]
    while len(clusters) > num_clusters:
        best = None
        for a in range(len(clusters)):
            for b in range(a + 1, len(clusters)):
                pairs = [(points[i] - points[j]).square().sum().sqrt() for i in clusters[a] for j in clusters[b]]
                mean = float(sum(pairs)) / len(pairs)
                if best is None or mean < best[0]:
                    best = (mean, a, b)
        assert best is not None
        _, a, b = best
        clusters = [sorted(clusters[a] + clusters[b]) if n == a else one for n, one in enumerate(clusters) if n != b]
    return clusters


@pytest.mark.parametrize("seed", range(3))
def test_average_linkage_against_the_slow_one(seed):
    points = torch.randn(11, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for count in range(1, 12):
        assert average_linkage(points, count) == slow_linkage(points, count)


def test_shares_by_hand():
    chosen, clusters = torch.tensor([3.0, 1.0, 0.0, 0.0, 7.0], dtype=torch.float64), [[0, 1], [2, 3], [4]]
    assert shares(chosen, clusters, by_use=True).tolist() == [0.75, 0.25, 0.5, 0.5, 1.0]
    assert shares(chosen, clusters, by_use=False).tolist() == [0.5, 0.5, 0.5, 0.5, 1.0]


def top_k(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    weights, index = logits.softmax(-1).topk(k, dim=-1)
    return index, weights / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize("num_extra", [0, 1])
def test_figures_are_of_every_expert_on_every_token(make_tokens, num_extra):
    generator = torch.Generator().manual_seed(0)
    hidden, matrices, logits = (torch.randn(*shape, generator=generator) for shape in ((9, 3), (5, 3, 3), (9, 5)))
    tokens = make_tokens(hidden, matrices, logits, 2, top_k, RoutingRule("softmax", 2, True), num_extra=num_extra)
    statistic = MeanOutputs(tokens.layer)
    statistic.update(tokens)
    statistic.update(tokens)
    figures, num_experts = statistic.tensors(), 5 - num_extra
    every = torch.einsum("th,ehg->eg", hidden.double(), matrices.double())[:num_experts]
    torch.testing.assert_close(figures["outputs"], 2 * every, rtol=1e-5, atol=1e-5)
    counts = tokens.index_TK.flatten().bincount(minlength=5)[:num_experts]
    assert figures["chosen"].tolist() == (2 * counts).tolist()
    assert figures["seen"] == 18


def method(**options: Any) -> ExpertMerging:
    return ExpertMerging(ExpertMergingOptions(**options))


def gathered(path: str, outputs: list[float], chosen: list[float]) -> Gathered:
    figures = {"outputs": by_hand(*outputs), "chosen": by_hand(*chosen)[:, 0], "seen": torch.tensor(1.0)}
    return Gathered({path: figures})


def test_the_member_chosen_most_survives_of_equals_the_first(make_layer):
    layer = make_layer(5, 2)
    decision = method(keep=2).decide([layer], gathered(layer.path, [0, 10, 1, 5, 12], [2, 6, 8, 0, 6]))
    assert decision["layers"][layer.path] == {"kept": [1, 2], "dropped": [0, 3, 4], "clusters": [[1, 4], [0, 2, 3]]}
    assert decision.tensors[layer.path]["share"].tolist() == [0.2, 0.5, 0.8, 0, 0.5]


def test_groups_of_the_router_are_never_joined(make_layer):
    layer = make_layer(6, 2, num_groups=2, num_chosen_groups=1)
    decision = method(keep=4).decide([layer], gathered(layer.path, [0, 9, 5, 5, 5.5, 0], [1, 1, 1, 1, 1, 1]))
    assert decision["layers"][layer.path]["clusters"] == [[0], [1, 2], [3, 4], [5]]


def test_what_check_says(make_layer):
    layer = make_layer(8, 2)
    plan = method(keep=6).check([layer])
    assert (plan.layers, plan.changes_values) == ([make_layer(6, 2)], True)
    with pytest.raises(OptionError, match="it has 8 experts and cannot keep 9") as error:
        method(keep=9).check([layer])
    assert error.value.option == "keep"
    with pytest.raises(OptionError, match=r"its experts cannot be compared: they sort pairs"):
        method(keep=6).check([make_layer(8, 2, watch_problem="they sort pairs")])
