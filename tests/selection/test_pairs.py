"""Losses of single experts and of pairs: by hand, against the exact search and plain loops; and their greedy search."""

from __future__ import annotations

import itertools

import pytest
import routers
import torch
from routers import ROUTERS
from tiny_models import tiny_model, token_ids

from compressor import MoEModel
from compressor.data.sequences import make_batches
from compressor.machine.progress import Progress
from compressor.observe.layerwise import observe
from compressor.observe.statistic import JoinedStatistic
from compressor.plugin import RoutingRule
from compressor.selection.exact import SubsetErrors
from compressor.selection.pair_losses import PairLosses, fewest_losses


@pytest.fixture
def random_tokens(make_tokens):
    return lambda *shape, **others: routers.random_tokens(make_tokens, *shape, **others)


def figures(*batches):
    pairs = PairLosses(batches[0].layer)
    for tokens in batches:
        pairs.update(tokens)
    return pairs.tensors()


# By hand ---------------------------------------------------------------------------------------------------

SCALES = torch.tensor([1.0, 3.0, 5.0])
"""Three experts answer x, 3x and 5x; top-2; one number a token, so ⟨E_i, E_j⟩ is a product."""


def by_hand(make_tokens, logits, rule, choose):
    hidden_TH = torch.tensor([[1.0], [2.0]])
    tokens = make_tokens(hidden_TH, SCALES[:, None, None], torch.tensor(logits).log(), 2, choose, rule)
    return figures(tokens)


def renormalised(logits, top_k):
    weights, index = logits.double().softmax(-1).topk(top_k, dim=-1)
    return index, weights / weights.sum(-1, keepdim=True)


def plain(logits, top_k):
    weights, index = logits.double().softmax(-1).topk(top_k, dim=-1)
    return index, weights


PROBABILITIES = [[0.6, 0.3, 0.1], [0.2, 0.3, 0.5]]


def test_renormalised_by_hand(make_tokens):
    """Token 1 (x = 1): 2/3·1 + 1/3·3 = 5/3.  Token 2 (x = 2): 3/8·6 + 5/8·10 = 8.5.

    without 0:  token 1 → 3/4·3 + 1/4·5 = 3.5      token 2 does not notice
    without 1:  token 1 → 6/7·1 + 1/7·5 = 11/7     token 2 → 2/7·2 + 5/7·10 = 54/7
    without 2:  token 1 does not notice             token 2 → 2/5·2 + 3/5·6 = 4.4
    pairs:      0 and 1 of token 1: (2/3·1)(1/3·3) = 2/3; 1 and 2 of token 2: (3/8·6)(5/8·10) = 14.0625
    """
    found = by_hand(make_tokens, PROBABILITIES, RoutingRule("softmax", True, 1.0), renormalised)
    without = [(3.5 - 5 / 3) ** 2, (11 / 7 - 5 / 3) ** 2 + (54 / 7 - 8.5) ** 2, (4.4 - 8.5) ** 2]
    assert found["pairs.loss"][0].diagonal().tolist() == pytest.approx(without, rel=1e-6)
    expected = [[without[0], 2 / 3, 0.0], [2 / 3, without[1], 14.0625], [0.0, 14.0625, without[2]]]
    torch.testing.assert_close(found["pairs.loss"], torch.tensor([expected], dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_rescaled_by_hand(make_tokens):
    """Not renormalised, so who did not choose the dropped expert is rescaled too: by 1/0.8 and 1/0.9.

    Token 1: 0.6·1 + 0.3·3 = 1.5.  Token 2: 0.3·6 + 0.5·10 = 6.8.
    without 0:  token 1 → (0.3·3 + 0.1·5)/0.4 = 3.5     token 2 → 6.8/0.8 = 8.5
    without 1:  token 1 → (0.6·1 + 0.1·5)/0.7 = 11/7    token 2 → (0.2·2 + 0.5·10)/0.7 = 54/7
    without 2:  token 1 → 1.5/0.9 = 5/3                 token 2 → (0.2·2 + 0.3·6)/0.5 = 4.4
    """
    found = by_hand(make_tokens, PROBABILITIES, RoutingRule("softmax", False, 1.0), plain)
    without = [
        (3.5 - 1.5) ** 2 + (8.5 - 6.8) ** 2,
        (11 / 7 - 1.5) ** 2 + (54 / 7 - 6.8) ** 2,
        (5 / 3 - 1.5) ** 2 + (4.4 - 6.8) ** 2,
    ]
    assert found["pairs.loss"][0].diagonal().tolist() == pytest.approx(without, rel=1e-6)
    assert found["pairs.loss"][0, 0, 1] == found["pairs.loss"][0, 1, 0] == pytest.approx(0.6 * 1 * 0.3 * 3)
    assert found["pairs.loss"][0, 1, 2] == pytest.approx(0.3 * 6 * 0.5 * 10)


def test_a_token_that_is_sure_of_one_expert(make_tokens):
    """Its probability is 1 within rounding; without it the other two are what they are among themselves."""
    logits_TN = torch.tensor([[60.0, 1.0, 0.0]])
    tokens = make_tokens(
        torch.ones(1, 1), SCALES[:, None, None], logits_TN, 2, plain, RoutingRule("softmax", False, 1.0)
    )
    p = 1 / (1 + torch.e**-1)
    assert figures(tokens)["pairs.loss"][0, 0, 0] == pytest.approx((3 * p + 5 * (1 - p) - 1) ** 2, rel=1e-6)


# Against the exact search and plain loops ------------------------------------------------------------------

SHAPES = [(2, 1), (3, 2), (5, 1), (6, 3), (7, 2), (6, 5)]


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("num_extra", [0, 2])
def test_single_experts_are_the_search_over_all_sets_of_one(random_tokens, router, num_extra):
    for seed, (num_experts, top_k) in enumerate(SHAPES):
        tokens = random_tokens(router, 11, num_experts, top_k, seed, num_extra=num_extra)
        exact = SubsetErrors(tokens.layer, [num_experts - 1])
        exact.update(tokens)
        expected = exact.tensors()["subsets.squared_error"]
        found = figures(tokens)["pairs.loss"].diagonal(dim1=1, dim2=2)
        limit = 1e-6 * float(routers.output(tokens, tokens.index_TK, tokens.weights_TK).square().sum())
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=limit, msg=f"{num_experts} experts, top {top_k}")


@pytest.mark.parametrize("router", ROUTERS)
def test_single_experts_are_what_the_router_says(random_tokens, router):
    """Mask one expert, route again, put the output together, compare."""
    tokens = random_tokens(router, 40, 6, 2, seed=5, num_extra=1)
    full = routers.output(tokens, tokens.index_TK, tokens.weights_TK)
    found = figures(tokens)["pairs.loss"][0].diagonal()
    for expert in range(6):
        kept = [other for other in range(6) if other != expert]
        error = (routers.output(tokens, *tokens.replay(kept)) - full).square().sum()
        assert float(found[expert]) == pytest.approx(float(error), rel=1e-4), expert


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("num_extra", [0, 2])
def test_pairs_are_the_plain_loop(random_tokens, router, num_extra):
    tokens = random_tokens(router, 15, 6, 3, seed=2, num_extra=num_extra)
    outputs_TKH = tokens.evaluate_experts(tokens.hidden_TH, tokens.index_TK).double()
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for index_K, weights_K, outputs_KH in zip(tokens.index_TK.tolist(), tokens.weights_TK, outputs_TKH, strict=True):
        for i, j in itertools.permutations(range(3), 2):
            if max(index_K[i], index_K[j]) < 6:
                product = outputs_KH[i] @ outputs_KH[j]
                expected[index_K[i], index_K[j]] += float(weights_K[i]) * float(weights_K[j]) * product
    found = figures(tokens)
    expected.diagonal().copy_(found["pairs.loss"][0].diagonal())
    torch.testing.assert_close(found["pairs.loss"][0], expected, rtol=1e-5, atol=1e-5)


def test_domains_and_batches_add_up(random_tokens):
    batches = [random_tokens("softmax", 8, 5, 2, seed=seed) for seed in (1, 2, 3)]
    for tokens, domain in zip(batches, ("a", "b", "a"), strict=True):
        tokens.domain = domain
    found, alone = figures(*batches), [figures(tokens) for tokens in batches]
    torch.testing.assert_close(found["pairs.loss"][0], alone[0]["pairs.loss"][0] + alone[2]["pairs.loss"][0])
    torch.testing.assert_close(found["pairs.loss"][1], alone[1]["pairs.loss"][0])


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "deepseek_v3", "phimoe", "gpt_oss", "deepseek4"])
def test_real_models(name):
    """Some routers are asked again for every expert, others are not; padding is between the tokens."""
    moe = MoEModel(tiny_model(name))
    batches = make_batches([token_ids(length, seed=length) for length in (13, 5, 9)], batch_size=2)
    groups = moe.layers[-1].num_groups
    statistics = {
        layer.path: JoinedStatistic([PairLosses(layer)] + ([SubsetErrors(layer, [7])] if groups == 1 else []))
        for layer in moe.layers
    }
    for path, found in observe(moe, batches, statistics, Progress()).items():
        diagonal = found["pairs.loss"][0].diagonal()
        assert (diagonal >= 0).all()
        assert diagonal.count_nonzero() > 4
        torch.testing.assert_close(found["pairs.loss"][0], found["pairs.loss"][0].T)
        if groups == 1:
            expected = found["subsets.squared_error"].sum(0)
            torch.testing.assert_close(diagonal, expected, rtol=2e-4, atol=1e-6, msg=path)


# Fewest losses ---------------------------------------------------------------------------------------------


def loss(pairs_EE, dropped):
    return float(pairs_EE[dropped][:, dropped].sum())


def test_fewest_losses_by_hand():
    """1 and 3 are the cheapest one by one (1 + 1), but not together (+ 2·5); 1 with 0 is: 1 + 2 = 3."""
    pairs = torch.diag(torch.tensor([2.0, 1.0, 9.0, 1.0]))
    pairs[1, 3] = pairs[3, 1] = 5.0
    pairs[0, 3] = pairs[3, 0] = 1.0
    assert fewest_losses(pairs, 3) == [0, 2, 3]
    assert fewest_losses(pairs, 2) == [2, 3]
    assert fewest_losses(pairs, 4) == [0, 1, 2, 3]


def test_swaps_mend_what_greed_spoils():
    """Greed drops 0 first (1.0), which does not go with any other; the best two are 1 and 2: 1.1 + 1.1 − 2."""
    pairs = torch.diag(torch.tensor([1.0, 1.1, 1.1, 5.0]))
    pairs[0, 1:] = pairs[1:, 0] = 4.0
    pairs[1, 2] = pairs[2, 1] = -1.0
    assert fewest_losses(pairs, 2) == [0, 3]


def random_pairs(num_experts, seed):
    """As tokens make them: a Gram matrix with a smaller diagonal."""
    rows = torch.randn(num_experts, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    pairs = rows @ rows.T
    pairs.diagonal().mul_(0.9)
    return pairs


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_no_swap_is_left(num_groups):
    for seed in range(20):
        pairs, group = random_pairs(8, seed), torch.arange(8) // (8 // num_groups)
        kept = fewest_losses(pairs, 4, num_groups)
        dropped = [expert for expert in range(8) if expert not in kept]
        assert torch.bincount(group[kept], minlength=num_groups).tolist() == [4 // num_groups] * num_groups
        for gone, back in itertools.product(kept, dropped):
            if group[gone] == group[back]:
                assert loss(pairs, [e for e in dropped if e != back] + [gone]) >= loss(pairs, dropped) - 1e-9


def test_nearly_always_the_best_of_all(random_tokens):
    best = 0
    for seed in range(20):
        pairs = figures(random_tokens("softmax", 100, 9, 3, seed))["pairs.loss"][0]
        kept = fewest_losses(pairs, 5)
        found = loss(pairs, [expert for expert in range(9) if expert not in kept])
        best += found <= min(loss(pairs, list(one)) for one in itertools.combinations(range(9), 4)) + 1e-9
    assert best >= 18


def test_protected_stay_and_forbidden_go():
    pairs = torch.diag(torch.arange(1.0, 7.0))
    assert fewest_losses(pairs, 3) == [3, 4, 5]
    assert fewest_losses(pairs, 3, protected=[0, 1]) == [0, 1, 5]
    assert fewest_losses(pairs, 3, forbidden=[5, 4]) == [1, 2, 3]
    assert fewest_losses(pairs, 4, 2, protected=[0], forbidden=[5]) == [0, 2, 3, 4]


def test_of_equal_losses_the_lowest_id_goes():
    assert fewest_losses(torch.eye(5), 3) == [2, 3, 4]
    assert fewest_losses(torch.zeros(4, 4), 2, 2) == [1, 3]
