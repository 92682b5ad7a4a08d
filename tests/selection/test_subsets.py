"""The formulas of `subsets.py` against numbers worked out by hand: three tokens, two or three experts."""

from __future__ import annotations

import pytest
import torch

from compressor.plugin import RoutingRule
from compressor.selection.exact import (
    SubsetErrors,
    SubsetTables,
    _first_choices,
    choice_errors,
    choice_weights,
    dropped_subsets,
    num_subsets,
    ranks_needed,
    rescaled_errors,
    surviving_ranks,
)


def float64(values):
    return torch.tensor(values, dtype=torch.float64)


def squared_errors(tokens, counts, top_k=None):
    errors = SubsetErrors(tokens.layer, counts, top_k)
    errors.update(tokens)
    return errors.tensors()["subsets.squared_error"][0]


# Which sets there are --------------------------------------------------------------------------------------


def test_dropped_sets_are_in_lexicographic_order(make_layer):
    assert dropped_subsets(make_layer(4, 2), 2) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert num_subsets(make_layer(4, 2), 2) == 6


def test_every_group_drops_equally_many(make_layer):
    layer = make_layer(6, 2, num_groups=2, num_chosen_groups=1)
    assert dropped_subsets(layer, 4) == [(0, 3), (0, 4), (0, 5), (1, 3), (1, 4), (1, 5), (2, 3), (2, 4), (2, 5)]
    assert num_subsets(layer, 4) == 9


def test_sets_of_groups_are_sorted_as_whole_sets(make_layer):
    layer = make_layer(8, 2, num_groups=2, num_chosen_groups=2)
    dropped = dropped_subsets(layer, 4)
    assert dropped == sorted(dropped)
    assert (dropped[0], dropped[6], dropped[-1]) == ((0, 1, 4, 5), (0, 2, 4, 5), (2, 3, 6, 7))
    assert len(dropped) == num_subsets(layer, 4) == 36


@pytest.mark.parametrize(
    ("num_experts", "top_k", "num_kept", "ranks"),
    [(8, 2, 6, 4), (8, 2, 4, 6), (8, 2, 2, 8), (8, 3, 4, 7), (4, 3, 3, 4)],
)
def test_ranks_needed(make_layer, num_experts, top_k, num_kept, ranks):
    assert ranks_needed(make_layer(num_experts, top_k), num_kept) == ranks


@pytest.mark.parametrize(
    ("num_experts", "num_extra", "top_k", "lower", "num_kept", "ranks"),
    [
        (8, 0, 2, 1, 6, 3),  # one of the first three, and the two that are chosen now
        (8, 0, 4, 1, 7, 4),  # one of the first two, and the four that are chosen now
        (8, 0, 4, 2, 8, 4),
        (8, 0, 2, 1, 1, 8),
        (4, 2, 2, None, 2, 4),
        (4, 2, 3, None, 1, 6),
        (4, 1, 3, None, 1, 5),
    ],
)
def test_ranks_needed_for_fewer_choices_and_extra_ones(
    make_layer, num_experts, num_extra, top_k, lower, num_kept, ranks
):
    assert ranks_needed(make_layer(num_experts, top_k, num_extra_choices=num_extra), num_kept, lower) == ranks


def test_tables_of_several_counts(make_layer):
    tables = SubsetTables.build(make_layer(3, 1), [2, 3], torch.device("cpu"))
    assert tables.dropped == [(0,), (1,), (2,), ()]
    assert tables.keep_SN.tolist() == [[0.0, 1, 1], [1, 0, 1], [1, 1, 0], [1, 1, 1]]
    assert tables.num_ranks == 2


# What a token chooses when a set is gone -------------------------------------------------------------------


def test_surviving_ranks():
    order = torch.tensor([[0, 1, 2], [2, 0, 1], [1, 2, 0]])
    keep = torch.tensor([[0.0, 1, 1], [1, 0, 1], [1, 1, 0]])  # expert 0, 1, 2 dropped
    expected = [[0b110, 0b101, 0b011], [0b101, 0b011, 0b110], [0b011, 0b110, 0b101]]
    assert surviving_ranks(order, keep).tolist() == expected


def test_surviving_ranks_ignores_experts_beyond_the_ranks():
    order = torch.tensor([[2, 0], [1, 2]])
    keep = torch.tensor([[0.0, 1, 1], [1, 0, 1]])
    assert surviving_ranks(order, keep).tolist() == [[0b01, 0b11], [0b11, 0b10]]


def test_first_choices():
    choices = torch.tensor([[0, 1], [0, 2], [1, 2]])
    #                                                   {0,1}       {0,2} {1,2} all
    assert _first_choices(3, choices).tolist() == [0, 0, 0, 0, 0, 1, 2, 0]


def test_first_choices_of_one():
    #                                                             none 0  1  0,1 2  0,2 1,2 all
    assert _first_choices(3, torch.tensor([[0], [1], [2]])).tolist() == [0, 0, 1, 0, 2, 0, 1, 0]


CHOICES = torch.tensor([[0, 1], [0, 2], [1, 2]])


def test_choice_weights_renormalised():
    found = choice_weights(float64([[0.5, 0.3, 0.2]]), CHOICES, renormalise=True, scale=1.0)
    expected = float64([[[0.625, 0.375, 0.0], [5 / 7, 0.0, 2 / 7], [0.0, 0.6, 0.4]]])
    torch.testing.assert_close(found, expected, rtol=1e-15, atol=0)


def test_choice_weights_scaled():
    found = choice_weights(float64([[0.5, 0.3, 0.2]]), CHOICES, renormalise=False, scale=2.0)
    expected = float64([[[1.0, 0.6, 0.0], [1.0, 0.0, 0.4], [0.0, 0.6, 0.4]]])
    torch.testing.assert_close(found, expected, rtol=1e-15, atol=0)
    renormalised = choice_weights(float64([[0.5, 0.3, 0.2]]), CHOICES, renormalise=True, scale=2.0)
    torch.testing.assert_close(renormalised[0, 0], float64([1.25, 0.75, 0.0]), rtol=1e-15, atol=0)


# What that costs -------------------------------------------------------------------------------------------


def test_choice_errors():
    weights = float64([[[1, 0], [0, 1]], [[2, 0], [0, 3]]])
    gram = float64([[[2, 1], [1, 5]], [[1, -1], [-1, 4]]])
    # (−1, 1) G (−1, 1) = 2 − 2 + 5;  (−2, 3) G (−2, 3) = 4 + 12 + 36
    assert choice_errors(weights, weights[:, 0], gram).tolist() == [[0.0, 5.0], [0.0, 52.0]]


def test_choice_errors_against_another_choice():
    # the whole layer's weights are (1, 1), which is none of the choices: (0, −1) and (−1, 0)
    weights, full = float64([[[1, 0], [0, 1]]]), float64([[1, 1]])
    assert choice_errors(weights, full, float64([[[2, 1], [1, 5]]])).tolist() == [[5.0, 2.0]]


def test_rescaled_errors_against_another_choice():
    # outputs E0 = (2, 0), E1 = (0, 4); softmax 0.75, 0.25; two chosen before, so (1.5, 1), and one now
    weights, full = float64([[[0.75, 0.0], [0.0, 0.25]]]), float64([[0.75, 0.25]])
    keep = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    gram, affinity = float64([[[4, 0], [0, 16]]]), float64([[0.75, 0.25]])
    found = rescaled_errors(weights, full, gram, torch.tensor([[1, 0, 0]]), affinity, keep)
    # without 0: (0, 4), squared error 2.25 + 9; without 1: (2, 0), 0.25 + 1; none dropped: (1.5, 0), 1
    torch.testing.assert_close(found, float64([[11.25, 1.25, 1.0]]), rtol=1e-14, atol=1e-15)


def test_rescaled_errors():
    # outputs E0 = (2, 0), E1 = (0, 4); softmax 0.75, 0.25; one chosen: the full output is (1.5, 0)
    weights = float64([[[0.75, 0.0], [0.0, 0.25]]])
    gram = float64([[[4, 0], [0, 16]]])
    keep = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    found = rescaled_errors(weights, weights[:, 0], gram, torch.tensor([[1, 0, 0]]), float64([[0.75, 0.25]]), keep)
    # without 0: (0, 4), squared error 2.25 + 16; without 1: (2, 0), 0.25; none dropped: 0
    torch.testing.assert_close(found, float64([[18.25, 0.25, 0.0]]), rtol=1e-14, atol=1e-15)


def softmax_router(*, renormalise):
    def choose(logits, top_k):
        weights, index = logits.double().softmax(-1).topk(top_k, dim=-1)
        return index, weights / weights.sum(-1, keepdim=True) if renormalise else weights

    return choose


# three tokens of one dimension; the experts multiply it by 1, 2 and 4
PROBABILITIES = [[0.5, 0.3, 0.2], [0.1, 0.3, 0.6], [0.3, 0.5, 0.2]]
RENORMALISED = [
    (2.8 - 1.375) ** 2 + 0 + (18 / 7 - 13 / 8) ** 2,  # without expert 0
    (13 / 7 - 1.375) ** 2 + (25 / 7 - 10 / 3) ** 2 + (2.2 - 1.625) ** 2,  # without expert 1
    0 + (7 / 4 - 10 / 3) ** 2 + 0,  # without expert 2
]
NOT_RENORMALISED = [
    ((0.3 * 2 + 0.2 * 4) / 0.5 - 1.1) ** 2 + (3.0 / 0.9 - 3.0) ** 2 + ((0.5 * 2 + 0.2 * 4) / 0.7 - 1.3) ** 2,
    ((0.5 + 0.8) / 0.7 - 1.1) ** 2 + ((2.4 + 0.1) / 0.7 - 3.0) ** 2 + ((0.3 + 0.8) / 0.5 - 1.3) ** 2,
    (1.1 / 0.8 - 1.1) ** 2 + ((0.6 + 0.1) / 0.4 - 3.0) ** 2 + (1.3 / 0.8 - 1.3) ** 2,
]


@pytest.mark.parametrize("closed_rule", [True, False], ids=["rule", "replay"])
@pytest.mark.parametrize(("renormalise", "expected"), [(True, RENORMALISED), (False, NOT_RENORMALISED)])
def test_three_tokens_three_experts(make_tokens, renormalise, expected, closed_rule):
    tokens = make_tokens(
        torch.ones(3, 1),
        torch.tensor([1.0, 2.0, 4.0]).reshape(3, 1, 1),
        torch.tensor(PROBABILITIES).log(),
        2,
        softmax_router(renormalise=renormalise),
        RoutingRule("softmax", renormalise, 1.0) if closed_rule else None,
    )
    found = squared_errors(tokens, [2])
    torch.testing.assert_close(found, float64(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("closed_rule", [True, False], ids=["rule", "replay"])
@pytest.mark.parametrize(("renormalise", "expected"), [(True, RENORMALISED), (False, NOT_RENORMALISED)])
def test_what_is_no_expert_never_goes_and_counts_in_the_softmax(make_tokens, renormalise, expected, closed_rule):
    """The same figures, but the last of the three is no expert: only two sets of one expert are left."""
    tokens = make_tokens(
        torch.ones(3, 1),
        torch.tensor([1.0, 2.0, 4.0]).reshape(3, 1, 1),
        torch.tensor(PROBABILITIES).log(),
        2,
        softmax_router(renormalise=renormalise),
        RoutingRule("softmax", renormalise, 1.0) if closed_rule else None,
        num_extra=1,
    )
    tables = SubsetTables.build(tokens.layer, [1], torch.device("cpu"))
    assert tables.dropped == [(0,), (1,)]
    assert tables.keep_SN.tolist() == [[0.0, 1, 1], [1, 0, 1]]
    torch.testing.assert_close(squared_errors(tokens, [1]), float64(expected[:2]), rtol=1e-6, atol=0)


# each token chooses one expert instead of two; without expert 0, 1, 2, and with all of them
ONE_RENORMALISED = [
    (2 - 1.375) ** 2 + (4 - 10 / 3) ** 2 + (2 - 1.625) ** 2,
    (1 - 1.375) ** 2 + (4 - 10 / 3) ** 2 + (1 - 1.625) ** 2,
    (1 - 1.375) ** 2 + (2 - 10 / 3) ** 2 + (2 - 1.625) ** 2,
    (1 - 1.375) ** 2 + (4 - 10 / 3) ** 2 + (2 - 1.625) ** 2,
]
ONE_NOT_RENORMALISED = [
    (0.3 * 2 / 0.5 - 1.1) ** 2 + (0.6 * 4 / 0.9 - 3.0) ** 2 + (0.5 * 2 / 0.7 - 1.3) ** 2,
    (0.5 * 1 / 0.7 - 1.1) ** 2 + (0.6 * 4 / 0.7 - 3.0) ** 2 + (0.3 * 1 / 0.5 - 1.3) ** 2,
    (0.5 * 1 / 0.8 - 1.1) ** 2 + (0.3 * 2 / 0.4 - 3.0) ** 2 + (0.5 * 2 / 0.8 - 1.3) ** 2,
    (0.5 * 1 - 1.1) ** 2 + (0.6 * 4 - 3.0) ** 2 + (0.5 * 2 - 1.3) ** 2,
]


@pytest.mark.parametrize("closed_rule", [True, False], ids=["rule", "replay"])
@pytest.mark.parametrize(("renormalise", "expected"), [(True, ONE_RENORMALISED), (False, ONE_NOT_RENORMALISED)])
def test_one_expert_per_token_instead_of_two(make_tokens, renormalise, expected, closed_rule):
    tokens = make_tokens(
        torch.ones(3, 1),
        torch.tensor([1.0, 2.0, 4.0]).reshape(3, 1, 1),
        torch.tensor(PROBABILITIES).log(),
        2,
        softmax_router(renormalise=renormalise),
        RoutingRule("softmax", renormalise, 1.0) if closed_rule else None,
    )
    tables = SubsetTables.build(tokens.layer, [2, 3], torch.device("cpu"), top_k=1)
    assert tables.dropped == [(0,), (1,), (2,), ()]
    assert tables.choices_Pk.tolist() == [[0], [1]]
    torch.testing.assert_close(squared_errors(tokens, [2, 3], 1), float64(expected), rtol=1e-6, atol=0)


def test_the_layers_output_falls_out(make_tokens):
    tokens = make_tokens(
        torch.ones(3, 1),
        torch.tensor([1.0, 2.0, 4.0]).reshape(3, 1, 1),
        torch.tensor(PROBABILITIES).log(),
        2,
        softmax_router(renormalise=True),
        RoutingRule("softmax", True, 1.0),
    )
    assert tokens.output_TH is None
    squared_errors(tokens, [2])
    torch.testing.assert_close(tokens.output_TH, torch.tensor([[1.375], [10 / 3], [1.625]]), rtol=1e-6, atol=0)
