"""What the method's options accept, how they round, and every message by its text."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from compressor.plugin import OptionError
from compressor_expert_pruning import ExpertPruning, ExpertPruningOptions


def method(**options):
    return ExpertPruning(ExpertPruningOptions(**options))


def refusal(layer, **options):
    with pytest.raises(OptionError) as caught:
        method(**options).check([layer])
    return str(caught.value)


@pytest.mark.parametrize("options", [{}, {"keep": 6, "drop": 2}])
def test_one_of_keep_and_drop(options):
    with pytest.raises(ValidationError, match="say how many experts stay with one of `keep` and `drop`"):
        ExpertPruningOptions(**options)


@pytest.mark.parametrize("fraction", [0.0, 1.0, 1.5, -0.5])
def test_a_fraction_lies_between_0_and_1(fraction):
    with pytest.raises(ValidationError, match=f"found {fraction}; a fraction lies between 0 and 1"):
        ExpertPruningOptions(keep=fraction)


@pytest.mark.parametrize("count", [0, -2])
def test_a_count_is_at_least_1(count):
    with pytest.raises(ValidationError, match=f"found {count}; keep at least 1 expert"):
        ExpertPruningOptions(keep=count)


@pytest.mark.parametrize(
    "options", [{"drop": 0}, {"drop": 1.5}, {"keep": "6"}, {"keep": True}, {"keep": 6, "max_subsets": 0}]
)
def test_other_values_are_refused(options):
    with pytest.raises(ValidationError):
        ExpertPruningOptions(**options)


@pytest.mark.parametrize(
    ("options", "num_experts", "num_kept"),
    [
        ({"keep": 6}, 8, 6),
        ({"drop": 3}, 8, 5),
        ({"keep": 0.75}, 8, 6),
        ({"keep": 0.5}, 16, 8),
        ({"keep": 0.5}, 5, 3),  # 2.5: halves upwards, not to the even count
        ({"keep": 0.5}, 7, 4),
        ({"keep": 0.7}, 8, 6),  # 5.6
        ({"keep": 0.68}, 8, 5),  # 5.44
    ],
)
def test_counts_and_fractions(make_layer, options, num_experts, num_kept):
    plan = method(**options).check([make_layer(num_experts, 2)])
    assert [(layer.path, layer.num_experts) for layer in plan.layers] == [("layers.0.mlp", num_kept)]


def test_the_plan_says_how_many_sets(make_layer):
    plan = method(keep=8).check([make_layer(16, 2)])
    assert list(plan.notes) == ["12,870 sets of 8 experts per layer, all of them looked at"]


def test_too_many_sets(make_layer):
    message = refusal(make_layer(64, 8), keep=32, search="exact")
    assert "layers.0.mlp: keeping 32 of 64 experts means 1,832,624,140,942,590,534 possible sets per layer" in message
    assert "the limit is 20,000 (`max_subsets`)" in message


def test_max_subsets_is_the_largest_number_allowed(make_layer):
    layer = make_layer(8, 2)
    method(keep=4, max_subsets=70).check([layer])
    message = refusal(layer, keep=4, max_subsets=69, search="exact")
    assert "means 70 possible sets per layer, too many to look at all of them: the limit is 69" in message


def test_too_many_ranks(make_layer):
    method(keep=22).check([make_layer(24, 18)])
    message = refusal(make_layer(24, 18), keep=21, search="exact")
    assert "each token would need its best 21 experts, the limit is 20" in message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": 8}, "all 8 experts would stay: nothing to prune"),
        ({"keep": 0.99}, "all 8 experts would stay: nothing to prune"),
        ({"keep": 9}, "it has 8 experts and cannot keep 9"),
        ({"keep": 1}, "each token chooses 2, and fewer than 2 is no choice. The nearest possible count is 2"),
        ({"keep": 0.1}, "each token chooses 2, and fewer than 2 is no choice. The nearest possible count is 2"),
        ({"drop": 7}, "each token chooses 2, and fewer than 2 is no choice. The nearest possible count is 2"),
    ],
)
def test_counts_that_no_layer_can_keep(make_layer, options, said):
    assert said in refusal(make_layer(8, 2), **options)


def test_groups_keep_equally_many(make_layer):
    layer = make_layer(8, 2, num_groups=2, num_chosen_groups=1)
    assert "the groups need equally many experts" in refusal(layer, keep=5)
    assert [left.num_experts for left in method(keep=6).check([layer]).layers] == [6]


def test_the_message_names_the_option_that_was_given(make_layer):
    for options in ({"keep": 8}, {"drop": 9}):
        with pytest.raises(OptionError) as caught:
            method(**options).check([make_layer(8, 2)])
        assert caught.value.option == next(iter(options))
