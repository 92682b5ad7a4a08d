"""The search for many experts, by hand and against the literal layer: mask the logits, route again, compare outputs."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import routers
import torch
from routers import output

from compressor import UnsupportedModelError
from compressor.method import Decision
from compressor.model.routing_rule import GroupRule
from compressor.plugin import RoutingRule
from compressor.selection.greedy import GreedySearch, Search
from compressor.selection.objective import Objective
from compressor.selection.reference import SetLosses, kept_at_random, relative_losses
from compressor.selection.token_grams import joined, num_ranks, token_grams
from compressor.selection.token_state import TokenState, bytes_of_token

CLOSED = (
    "softmax",
    "softmax_in_order_of_ids",
    "softmax_not_renormalised",
    "softmax_not_renormalised_scaled",
    "sigmoid_biased_scaled",
)
# experts, chosen, kept, chosen by the smaller layer, what else can be chosen, whether the target is another output
SHAPES = [(8, 2, 4, None, 0, False), (9, 3, 5, 2, 0, False), (7, 3, 4, None, 2, False), (8, 2, 5, None, 0, True),
          (8, 4, 5, 3, 1, True), (6, 1, 2, None, 0, False)]  # fmt: skip


def slow_error(tokens, kept, top_k=None):
    """‖F(x; kept) − target‖² of one batch."""
    wanted = output(tokens, tokens.index_TK, tokens.weights_TK) if tokens.target_TH is None else tokens.target_TH
    return float((output(tokens, *tokens.replay(list(kept), top_k)) - wanted.double()).square().sum())


@pytest.fixture
def make_batches(make_tokens):
    """Batches at one layer: the same experts and the same router for all of them."""

    def make(router, num_batches, num_tokens, num_experts, top_k, seed, num_extra=0, has_target=False):
        whole = routers.random_tokens(
            make_tokens, router, num_batches * num_tokens, num_experts, top_k, seed, num_extra
        )
        generator = torch.Generator().manual_seed(seed)
        if has_target:
            whole.target_TH = torch.randn(whole.hidden_TH.shape, generator=generator)
        return [part_of(whole, slice(i * num_tokens, (i + 1) * num_tokens)) for i in range(num_batches)]

    return make


def part_of(tokens, part):
    def replay(kept, top_k=None):
        index, weights = tokens.replay(kept, top_k)
        return index[part], weights[part]

    return dataclasses.replace(
        tokens,
        hidden_TH=tokens.hidden_TH[part],
        logits_TE=tokens.logits_TE[part],
        index_TK=tokens.index_TK[part],
        weights_TK=tokens.weights_TK[part],
        target_TH=None if tokens.target_TH is None else tokens.target_TH[part],
        replay=replay,
    )


def searched(batches, counts, **options):
    search = GreedySearch(batches[0].layer, counts, **options)
    for tokens in batches:
        search.update(tokens)
    while search.again():
        for tokens in batches:
            search.update(tokens)
    return search.tensors()


def kept_of(figures, row=0):
    return figures["greedy.kept"][row].nonzero()[:, 0].tolist()


# By hand ---------------------------------------------------------------------------------------------------


def test_three_tokens_three_experts_by_hand(make_tokens):
    """Top-1, experts that answer 1, 2 and 4, hidden states 1. Tokens prefer 0, then 1; 1, then 0; 2, then 1.

    Without 0: the first token goes from 1 to 2: error 1. Without 1: the second from 2 to 1: 1. Without 2: the third
    from 4 to 2: 4. Of the two that tie, the lower id goes. Then without 1 as well all tokens go to 2: 9 + 4 + 0 = 13;
    without 2: 1 + 0 + 4 = 5, so 2 goes.
    """
    tokens = make_tokens(
        torch.ones(3, 1),
        torch.tensor([1.0, 2.0, 4.0]).reshape(3, 1, 1),
        torch.tensor([[3.0, 2.0, 1.0], [2.0, 3.0, 1.0], [1.0, 2.0, 3.0]]),
        1,
        lambda logits, top_k: routers.softmax(logits, top_k, None),
        RoutingRule("softmax", True, 1.0),
    )
    figures = searched([tokens], [2, 1])
    assert figures["greedy.order"].tolist() == [0, 2]
    assert figures["greedy.path_squared_error"].flatten().tolist() == pytest.approx([1.0, 5.0])
    assert figures["greedy.counts"].tolist() == [2, 1]
    assert [kept_of(figures, 0), kept_of(figures, 1)] == [[1, 2], [1]]
    assert figures["greedy.num_swaps"].tolist() == [0, 0]


def test_top_two_renormalised_by_hand(make_tokens):
    """Weights 2:1:1 of outputs 1, 2, 4: 2/3 · 1 + 1/3 · 2 = 4/3 with all; without expert 1, 2/3 · 1 + 1/3 · 4 = 2."""
    tokens = make_tokens(
        torch.ones(1, 1),
        torch.tensor([1.0, 2.0, 4.0]).reshape(3, 1, 1),
        torch.tensor([[2.0, 1.0 + 1e-6, 1.0]]).log(),
        2,
        lambda logits, top_k: routers.softmax(logits, top_k, None),
        RoutingRule("softmax", True, 1.0),
    )
    (state,) = states([tokens], 3)
    state.keep(torch.ones(3, dtype=torch.bool))
    # without 0: (2 + 4) / 2 = 3; without 1: 2; without 2: nothing changes
    assert state.removal_BE[0].tolist() == pytest.approx([(3 - 4 / 3) ** 2, (2 - 4 / 3) ** 2, 0.0], rel=1e-4)
    assert state.losses().tolist() == [0.0]


# Against the literal layer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("router", CLOSED)
def test_every_loss_on_the_way_is_the_layers(make_batches, router, shape):
    num_experts, top_k, num_kept, lower, extra, has_target = shape
    batches = make_batches(router, 3, 20, num_experts, top_k, 1, extra, has_target)
    figures = searched(batches, [num_kept], top_k=lower, num_ranks=num_experts + extra)
    dropped = figures["greedy.order"].tolist()
    assert len(dropped) == num_experts - num_kept
    for step in range(len(dropped)):
        kept = [expert for expert in range(num_experts) if expert not in dropped[: step + 1]]
        expected = torch.tensor([slow_error(tokens, kept, lower) for tokens in batches], dtype=torch.float64)
        torch.testing.assert_close(figures["greedy.path_squared_error"][step], expected, rtol=2e-6, atol=1e-6)
    expected = [slow_error(tokens, kept_of(figures), lower) for tokens in batches]
    assert figures["greedy.squared_error"][0].tolist() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("router", CLOSED)
def test_greedy_and_swaps_are_near_the_best_of_all_sets(make_batches, router):
    ratios = []
    for seed in range(4):
        batches = make_batches(router, 2, 60, 10, 3, seed)
        found = kept_of(searched(batches, [5], num_ranks=10))
        value = sum(slow_error(tokens, found) ** 0.5 for tokens in batches)
        best = min(
            sum(slow_error(tokens, kept) ** 0.5 for tokens in batches) for kept in itertools.combinations(range(10), 5)
        )
        ratios.append(value / best)
    assert min(ratios) >= 1 - 1e-6
    assert sorted(ratios)[2] < 1.02
    assert max(ratios) < 1.1


def states(batches, ranks, top_k=None):
    layer = batches[0].layer
    parts = [
        token_grams(tokens, chunk, number)
        for number, tokens in enumerate(batches)
        for chunk in tokens.ranked_outputs(ranks)
    ]
    state = TokenState(
        joined(parts), batches[0].rule, num_chosen=layer.top_k, top_k=top_k or layer.top_k, num_batches=len(batches)
    )
    return [state]


def search_of(batches, ranks, **options):
    objective = Objective.of_batches(["a"] * len(batches), torch.ones(len(batches)))
    return Search(batches[0].layer, states(batches, ranks), objective, **options)


def value_of(batches, kept):
    return sum(slow_error(tokens, kept) ** 0.5 for tokens in batches)


@pytest.mark.parametrize("router", CLOSED)
def test_the_table_of_removals(make_batches, router):
    batches = make_batches(router, 2, 30, 8, 3, 5)
    search = search_of(batches, 8)
    for _ in range(3):
        expected = [value_of(batches, set(search.kept) - {expert}) for expert in search.kept]
        found = search.removals()
        torch.testing.assert_close(
            found[list(search.kept)], torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0
        )
        assert found[~search.is_left_N].isinf().all()
        next(search.remove(len(search.kept) - 1))


@pytest.mark.parametrize("router", ["softmax", "softmax_in_order_of_ids", "sigmoid_biased_scaled"])
def test_the_table_of_swaps(make_batches, router):
    batches = make_batches(router, 2, 30, 8, 2, 6)
    search = search_of(batches, 8)
    # squared errors are sums of changes, each right to the rounding of the largest term; an error of 0 shows their root
    sizes = [float(output(one, one.index_TK, one.weights_TK).square().sum()) for one in batches]
    rounding = sum((16 * 2**-53 * size) ** 0.5 for size in sizes)
    for kept in ([0, 2, 3, 6, 7], [1, 4, 5], [0, 1, 2, 3, 4, 5, 6]):
        search.keep(kept)
        assert search.is_exact
        table = search.swap_table()
        for gone, back in itertools.product(range(8), range(8)):
            if gone in kept and back not in kept:
                expected = value_of(batches, {*kept, back} - {gone})
                assert float(table[gone, back]) == pytest.approx(expected, rel=1e-5, abs=rounding)
            else:
                assert table[gone, back].isinf()


def test_the_table_of_swaps_where_all_are_rescaled_is_near(make_batches):
    """An estimate: of swaps tried, the best of four is kept only if it truly helps."""
    batches = make_batches("softmax_not_renormalised", 2, 200, 10, 3, 6)
    search = search_of(batches, 10)
    search.keep([0, 2, 3, 6, 7])
    table = search.swap_table()
    assert not search.is_exact
    pairs = [(gone, back) for gone in (0, 2, 3, 6, 7) for back in (1, 4, 5, 8, 9)]
    found = torch.stack([table[pair] for pair in pairs])
    expected = torch.tensor([value_of(batches, {0, 2, 3, 6, 7, back} - {gone}) for gone, back in pairs])
    assert float(((found - expected) / expected).abs().max()) < 0.05
    before = value_of(batches, search.kept)
    search.swap()
    assert value_of(batches, search.kept) <= before


def test_swaps_do_not_disturb_the_path(make_batches):
    batches = make_batches("softmax", 2, 40, 12, 3, 3)
    both, one = searched(batches, [8, 5], num_ranks=12), searched(batches, [5], num_ranks=12)
    assert both["greedy.order"].tolist() == one["greedy.order"].tolist()
    assert torch.equal(both["greedy.kept"][1], one["greedy.kept"][0])
    assert (both["greedy.squared_error"].sqrt().sum(1) <= both["greedy.before_swaps"].sqrt().sum(1) + 1e-9).all()


def test_it_is_the_same_every_time_and_in_any_chunks(make_batches, monkeypatch):
    batches = make_batches("softmax", 2, 40, 12, 3, 4)
    whole = searched(batches, [6])
    monkeypatch.setattr("compressor.model.routed_tokens._ROWS_PER_EXPERT", 2)
    monkeypatch.setattr("compressor.selection.token_state._TOKENS_AT_ONCE", 7)
    monkeypatch.setattr("compressor.selection.token_state._PAIRS_AT_ONCE", 5)
    monkeypatch.setattr("compressor.selection.greedy._TABLE_CELLS", 60)
    cut = searched(batches, [6])
    assert torch.equal(whole["greedy.kept"], cut["greedy.kept"])
    torch.testing.assert_close(whole["greedy.squared_error"], cut["greedy.squared_error"], rtol=1e-6, atol=0)


# Fixed experts, domains, starts ----------------------------------------------------------------------------


def test_protected_and_forbidden(make_batches):
    batches = make_batches("softmax", 2, 40, 8, 2, 3)
    free = searched(batches, [4])
    first = free["greedy.order"].tolist()[0]
    best = kept_of(free)[0]
    figures = searched(batches, [4], protected=lambda: [first], forbidden=[best])
    assert first in kept_of(figures)
    assert best not in kept_of(figures)
    assert figures["greedy.order"].tolist()[0] == best


@pytest.mark.parametrize("blend", ["mean", "worst", "pooled", {"a": 1}])
def test_domains(make_batches, blend):
    """The value that is minimised is that of the blend: no other set of this size found by one more swap is better."""
    batches = make_batches("softmax", 4, 30, 8, 2, 9)
    for tokens, domain in zip(batches, ["a", "b", "a", "b"], strict=True):
        tokens.domain = domain
        if domain == "b":
            tokens.evaluate_experts = lambda x, e, inner=tokens.evaluate_experts: 10 * inner(x, e)
    kept = set(kept_of(searched(batches, [4], blend=blend, num_ranks=8)))
    sizes = torch.tensor([float(output(t, t.index_TK, t.weights_TK).square().sum()) for t in batches])
    objective = Objective.of_batches(["a", "b", "a", "b"], sizes, blend)

    def value(of):
        return float(objective(torch.tensor([slow_error(tokens, of) for tokens in batches], dtype=torch.float64)))

    swapped = [value(kept - {gone} | {back}) for gone in kept for back in set(range(8)) - kept]
    assert value(kept) <= min(swapped) * (1 + 1e-6)


def test_other_starts_are_never_worse(make_batches):
    for seed in range(4):
        batches = make_batches("softmax", 2, 40, 12, 3, seed)
        one, more = (searched(batches, [4], num_starts=starts, num_ranks=12) for starts in (0, 2))
        assert (
            float(more["greedy.squared_error"].sqrt().sum()) <= float(one["greedy.squared_error"].sqrt().sum()) + 1e-9
        )


# Ranks -----------------------------------------------------------------------------------------------------


def test_number_of_ranks(make_layer):
    layer = make_layer(64, 8)
    assert [num_ranks(layer, kept) for kept in (60, 48, 47, 32, 26, 25, 8)] == [12, 16, 24, 24, 24, 40, 40]
    assert num_ranks(layer, 32, top_k=4) == 12
    assert num_ranks(make_layer(8, 2), 6) == 4
    assert num_ranks(make_layer(64, 8, num_groups=8, num_chosen_groups=4), 32) == 40  # 8 chosen and 32 dropped


def test_tokens_short_of_ranks_get_more(make_batches):
    batches = make_batches("softmax", 3, 60, 16, 3, 2)
    few = GreedySearch(batches[0].layer, [8], num_ranks=4)
    for tokens in batches:
        few.update(tokens)
    assert few.again()
    for tokens in batches:
        few.update(tokens)
    figures = few.tensors()
    assert figures["greedy.ranks"].tolist() == [4, 8]
    all_ranks = searched(batches, [8], num_ranks=16)
    looked = searched(batches, [8], num_ranks=4)
    assert len(looked["greedy.ranks"]) >= 2
    assert float(looked["greedy.coverage"][0]) < 0.2
    value = value_of(batches, kept_of(looked))
    assert value <= 1.05 * value_of(batches, kept_of(all_ranks))
    assert float(all_ranks["greedy.coverage"][0]) == 0.0


def test_memory(make_batches):
    """At most 3 KB a token for top-8 with 24 ranks, renormalised."""
    figures = searched(make_batches("softmax", 1, 50, 40, 8, 0), [20])
    assert figures["greedy.ranks"].tolist() == [24]
    assert 2304 < bytes_of_token(24, 24, 0, 8, rescales_all=False) <= 3072


# Groups ----------------------------------------------------------------------------------------------------


@pytest.fixture
def make_grouped(make_tokens):
    def make(num_groups, num_chosen, size, top_k, seed, score="best two", num_tokens=80):
        generator = torch.Generator().manual_seed(seed)
        num_experts = num_groups * size
        rule = RoutingRule(
            "sigmoid", True, 2.5, torch.randn(num_experts, generator=generator).double() * 0.2,
            GroupRule(num_groups, num_chosen, score, float("-inf")),
        )  # fmt: skip
        tokens = make_tokens(
            torch.randn(num_tokens, 6, generator=generator),
            torch.randn(num_experts, 6, 6, generator=generator),
            torch.randn(num_tokens, num_experts, generator=generator) * 1.5,
            top_k,
            rule.choose,
            rule,
        )
        tokens.layer = dataclasses.replace(tokens.layer, num_groups=num_groups, num_chosen_groups=num_chosen)
        return tokens

    return make


@pytest.mark.parametrize("score", ["best", "best two"])
def test_groups(make_grouped, score):
    """Every loss on the way is the layer's, groups keep equally many, and the result is near the best of all sets."""
    for seed in range(3):
        tokens = make_grouped(3, 2, 4, 3, seed, score)
        figures = searched([tokens], [6], num_ranks=12)
        kept = kept_of(figures)
        assert [sum(expert // 4 == group for expert in kept) for group in range(3)] == [2, 2, 2]
        assert float(figures["greedy.squared_error"][0, 0]) == pytest.approx(slow_error(tokens, kept), rel=1e-5)
        pairs = [itertools.combinations(range(4 * group, 4 * group + 4), 2) for group in range(3)]
        best = min(slow_error(tokens, sum(parts, ())) for parts in itertools.product(*pairs))
        assert slow_error(tokens, kept) ** 0.5 <= 1.15 * best**0.5


# What cannot be searched -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("router", "says"), [
    ("sequential", "its router's rule has no closed form"),
    ("softmax_biased", "its router's rule adds a bias to a softmax, so ranks change when experts go"),
])  # fmt: skip
def test_routers_that_cannot_be_read_off_ranks(make_batches, router, says):
    batches = make_batches(router, 1, 10, 8, 2, 0)
    with pytest.raises(UnsupportedModelError) as error:
        searched(batches, [4])
    assert str(error.value).startswith(f"layers.0.mlp: {says}, and its sets of experts are too many")
    assert "criterion: reap" in str(error.value)


def test_no_tokens_and_experts_that_nobody_reaches(make_batches, make_tokens):
    batches = make_batches("softmax", 2, 20, 8, 2, 0)
    empty = part_of(batches[0], slice(0, 0))
    figures = searched([empty, *batches], [4])
    assert float(figures["greedy.squared_error"][0, 0]) == 0.0
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 8, generator=generator)
    logits[:, 5:] -= 100  # nobody's best two is among the last three
    tokens = make_tokens(
        torch.randn(20, 6, generator=generator),
        torch.randn(8, 6, 6, generator=generator),
        logits,
        2,
        lambda logits, top_k: routers.softmax(logits, top_k, None),
        RoutingRule("softmax", True, 1.0),
    )
    assert searched([tokens], [6])["greedy.order"].tolist() == [5, 6]


# The literal losses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", routers.ROUTERS)
def test_literal_losses(make_batches, router):
    batches = make_batches(router, 2, 15, 6, 2, 3)
    sets = [[0, 1, 2, 3, 4, 5], [0, 2, 4], [1, 3, 5]]
    losses = SetLosses(batches[0].layer, sets)
    for tokens in batches:
        losses.update(tokens)
    figures = losses.tensors()
    expected = [[slow_error(tokens, kept) for kept in sets] for tokens in batches]
    torch.testing.assert_close(
        figures["squared_error"], torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5
    )
    assert figures["squared_error"][:, 0].tolist() == pytest.approx([0.0, 0.0], abs=1e-9)
    relative = relative_losses(
        {"squared_error": torch.tensor([[9.0], [16.0]]), "squared_output": torch.tensor([25.0, 4.0])}
    )
    assert relative.tolist() == [1.0]  # (3 + 4) / (5 + 2)


def test_the_same_decision_by_chance(make_layer):
    """As many experts of every layer and group, whatever else is said of the layers; the same for a seed."""
    layers = [make_layer(8, 2), make_layer(8, 2, num_groups=2, num_chosen_groups=1, path="layers.1.mlp")]
    kept = {"layers.0.mlp": {"kept": [0, 1, 2, 3, 4], "loss": 1.0}, "layers.1.mlp": {"kept": [0, 1, 4, 5]}}
    decision = Decision({"layers": kept, "top_k": 1})
    drawn = [kept_at_random(decision, layers, seed) for seed in range(5)]
    assert drawn[0] == kept_at_random(decision, layers, 0)
    assert len({str(one) for one in drawn}) == 5
    for one in drawn:
        assert one["top_k"] == 1
        first, second = (one["layers"][layer.path] for layer in layers)
        assert first.keys() == {"kept"}
        assert len(set(first["kept"])) == 5
        assert [sum(expert < 4 for expert in second["kept"]), len(second["kept"])] == [2, 4]
    whole = Decision({"layers": {layer.path: {"kept": list(range(8))} for layer in layers}})
    assert kept_at_random(whole, layers, 0) == "drops no experts, so there is nothing to draw at random"
