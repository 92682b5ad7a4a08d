"""Sharing out a number of experts: by hand, against every possible allocation, and a case that greed gets wrong."""

from __future__ import annotations

import itertools

import pytest
import torch

from compressor.selection.allocation import allocate, possible_totals

INF = float("inf")


def costs(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def by_brute_force(costs_LC, total):
    """Of all tuples of counts, in lexicographic order, the first of least cost."""
    best, found = INF, None
    for counts in itertools.product(range(costs_LC.shape[1]), repeat=len(costs_LC)):
        cost = 0.0
        for layer in reversed(range(len(counts))):  # as the sums are formed there, so that ties are the same ties
            cost = costs_LC[layer, counts[layer]].item() + cost
        if sum(counts) == total and cost < best:
            best, found = cost, list(counts)
    return found


def by_greed(costs_LC, total):
    """Start with all experts; again and again drop the one that adds least."""
    counts = [costs_LC.shape[1] - 1] * len(costs_LC)
    while sum(counts) > total:
        added = [float(row[count - 1] - row[count]) for row, count in zip(costs_LC, counts, strict=True)]
        counts[added.index(min(added))] -= 1
    return counts


# two layers of three experts; columns are the counts 0, 1, 2, 3


def test_two_layers_by_hand():
    table = costs([INF, 9, 4, 0], [INF, 5, 1, 0])
    assert allocate(table, 6) == [3, 3]
    assert allocate(table, 5) == [3, 2]  # 0 + 1; the other is 4 + 0
    assert allocate(table, 4) == [2, 2]  # 4 + 1; 0 + 5 is the same, but later; 9 + 0
    assert allocate(table, 3) == [2, 1]  # 4 + 5; the other is 9 + 1
    assert allocate(table, 2) == [1, 1]


def test_a_tie_goes_to_the_allocation_whose_first_layers_keep_fewest():
    assert allocate(costs([INF, 2, 1, 0], [INF, 2, 1, 0]), 4) == [1, 3]
    assert allocate(costs([0, 0, 0], [0, 0, 0], [0, 0, 0]), 3) == [0, 1, 2]


def test_where_greed_is_wrong():
    # the first expert of layer 0 costs more than that of layer 1, the second next to nothing more
    table = costs([INF, 3.1, 3, 0], [INF, 5, 2, 0])
    assert by_greed(table, 4) == [2, 2]  # 2, then 3: 5 in all
    assert allocate(table, 4) == [1, 3]  # 3.1


def test_a_cost_may_fall_as_experts_go():
    assert allocate(costs([INF, 1, 5, 0], [INF, 4, 3, 0]), 4) == [1, 3]


def test_one_layer():
    assert allocate(costs([INF, INF, 2, 0]), 2) == [2]


@pytest.mark.parametrize("total", [1, 3, 9])
def test_what_cannot_be(total):
    table = costs([INF, INF, 1, INF, 0], [INF, INF, 1, INF, 0])
    with pytest.raises(ValueError, match=f"no possible counts of 2 layers add up to {total}"):
        allocate(table, total)


def test_every_allocation_of_random_costs():
    generator = torch.Generator().manual_seed(0)
    compared = 0
    for trial in range(60):
        num_layers, num_counts = 1 + trial % 4, 3 + trial % 3
        table = torch.rand(num_layers, num_counts, generator=generator, dtype=torch.float64)
        if trial % 2:
            table = (table * 4).round()  # many ties
        table[torch.rand(table.shape, generator=generator) < 0.2] = INF
        for total in range(num_layers * (num_counts - 1) + 1):
            expected = by_brute_force(table, total)
            if expected is None:
                with pytest.raises(ValueError, match="add up to"):
                    allocate(table, total)
            else:
                assert allocate(table, total) == expected
                compared += 1
    assert compared > 300


def test_the_table_is_not_changed_and_may_be_float32():
    table = costs([INF, 9, 4, 0], [INF, 5, 1, 0]).float()
    before = table.clone()
    assert allocate(table, 5) == [3, 2]
    assert torch.equal(table, before)


def test_possible_totals():
    assert possible_totals([[2, 3, 4], [2, 3, 4]]) == [4, 5, 6, 7, 8]
    assert possible_totals([[4, 6, 8], [4, 6, 8]]) == [8, 10, 12, 14, 16]
    assert possible_totals([[2], [5, 8]]) == [7, 10]
