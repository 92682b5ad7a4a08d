"""Constants in the place of experts: the figures by hand and against plain loops, the choice against all sets."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from in_threads import together

from compressor import Processes, UnsupportedModelError
from compressor.selection.choose import Fixed
from compressor.selection.constants import ERRORS, VALUES, ConstantErrors, by_constants, minimised, objective_of
from compressor.selection.objective import Objective
from compressor.selection.scores import ChoiceError


def plain(logits, top_k):
    weights, index = logits.double().softmax(-1).topk(top_k, dim=-1)
    return index, weights


def figures_of(batches, processes=None):
    statistic = ConstantErrors(batches[0].layer)
    statistic.share(processes or Processes())
    for tokens in batches:
        statistic.update(tokens)
    assert not statistic.again()
    return statistic.tensors()


@pytest.fixture
def random_batch(make_tokens):
    """Tokens [T, 4] of six linear experts and one that nobody chooses, top-3."""

    def make(seed, num_tokens=20, domain="one"):
        generator = torch.Generator().manual_seed(seed)
        hidden_TH = torch.randn(num_tokens, 4, generator=generator)
        logits_TN = torch.randn(num_tokens, 7, generator=generator)
        logits_TN[:, 6] = -30.0
        matrices = torch.randn(7, 4, 4, generator=torch.Generator().manual_seed(0))
        tokens = make_tokens(hidden_TH, matrices, logits_TN, 3, plain, None)
        tokens.domain = domain
        return tokens

    return make


def slow(batches):
    """(constants [E, H], Σ over a domain's tokens of w_i w_j ⟨E_i − c_i, E_j − c_j⟩) by loops, in float64."""
    size, hidden = batches[0].layer.num_experts, batches[0].hidden_TH.shape[1]

    def pairs(tokens):
        for hidden_H, index_K, weights_K in zip(tokens.hidden_TH, tokens.index_TK, tokens.weights_TK, strict=True):
            answers_KH = tokens.evaluate_experts(hidden_H[None], index_K[None])[0].double()
            yield list(zip(index_K.tolist(), weights_K.double(), answers_KH, strict=True))

    values, weight = torch.zeros(size, hidden, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    domains = list(dict.fromkeys(tokens.domain for tokens in batches))
    squared = dict.fromkeys(domains, 0.0)
    for tokens in batches:
        for chosen in pairs(tokens):
            squared[tokens.domain] += float(sum(one * answer_H for _, one, answer_H in chosen).square().sum())
    for tokens in batches:
        for chosen in pairs(tokens):
            for expert, one, answer_H in chosen:
                values[expert] += one**2 * answer_H / squared[tokens.domain]
                weight[expert] += one**2 / squared[tokens.domain]
    values = values / weight.clamp_min(1e-30)[:, None]
    errors = torch.zeros(len(domains), size, size, dtype=torch.float64)
    for tokens in batches:
        for chosen in pairs(tokens):
            for i, w_i, e_i in chosen:
                for j, w_j, e_j in chosen:
                    errors[domains.index(tokens.domain), i, j] += w_i * w_j * ((e_i - values[i]) @ (e_j - values[j]))
    return values, errors


def test_by_hand(make_tokens):
    """Experts answer x, 3x and 5x; two tokens of one number each, top-2, not renormalised.

    x = 1: 0.5·1 + 0.25·3      x = 2: 0.5·6 + 0.25·2     (the third expert is not chosen)
    c_0 = (.5²·1 + .25²·2)/(.5² + .25²) = 1.2    c_1 = (.25²·3 + .5²·6)/(.25² + .5²) = 5.4
    F_00 = (.5·(1 − 1.2))² + (.25·(2 − 1.2))² = .01 + .04 = .05
    F_11 = (.25·(3 − 5.4))² + (.5·(6 − 5.4))² = .36 + .09 = .45
    F_01 = (−.1)(−.6) + (.2)(.3) = .06 + .06 = .12
    """
    scales = torch.tensor([1.0, 3.0, 5.0])[:, None, None]
    logits = torch.tensor([[0.5, 0.25, 0.125], [0.25, 0.5, 0.125]])
    tokens = make_tokens(torch.tensor([[1.0], [2.0]]), scales, logits, 2, lambda given, k: given.topk(k)[::-1], None)
    found = figures_of([tokens])
    assert found[VALUES][:, 0].tolist() == pytest.approx([1.2, 5.4, 0.0])
    expected = torch.tensor([[[0.05, 0.12, 0.0], [0.12, 0.45, 0.0], [0.0, 0.0, 0.0]]], dtype=torch.float64)
    torch.testing.assert_close(found[ERRORS], expected, rtol=1e-5, atol=1e-6)


def test_against_loops(random_batch):
    batches = [random_batch(0), random_batch(1, domain="two"), random_batch(2)]
    values, errors = slow(batches)
    found = figures_of(batches)
    torch.testing.assert_close(found[VALUES].double(), values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[ERRORS], errors, rtol=1e-4, atol=1e-5)
    assert found[VALUES][6].abs().max() == 0  # no token chose it
    assert found[ERRORS][:, 6].abs().max() == 0


def test_the_error_of_a_set_is_what_replacing_it_does_to_the_output(random_batch):
    tokens = random_batch(3)
    found = figures_of([tokens])
    answers_TKH = tokens.evaluate_experts(tokens.hidden_TH, tokens.index_TK)
    for replaced in ([0], [1, 4], [0, 2, 3, 5]):
        gone_TK = torch.isin(tokens.index_TK, torch.tensor(replaced))
        change_TKH = (found[VALUES][tokens.index_TK] - answers_TKH) * gone_TK[..., None]
        squared = (tokens.weights_TK.float()[..., None] * change_TKH).sum(1).square().sum()
        assert float(found[ERRORS][0, replaced][:, replaced].sum()) == pytest.approx(float(squared), rel=1e-4)


def test_processes_that_share_the_batches_find_the_same(random_batch):
    batches = [random_batch(0), random_batch(1)]
    shares = [batches[:1], batches[1:], []]  # no token comes to the third

    def work(processes):
        statistic = ConstantErrors(batches[0].layer)
        statistic.share(processes)
        for tokens in shares[processes.rank]:
            statistic.update(tokens)
        statistic.again()
        return statistic.tensors() if shares[processes.rank] else None

    alone, (first, second, _) = figures_of(batches), together(3, work)
    torch.testing.assert_close(first[ERRORS] + second[ERRORS], alone[ERRORS], rtol=1e-6, atol=1e-8)
    for one in (first, second):
        torch.testing.assert_close(one[VALUES], alone[VALUES])


def test_a_block_that_changes_what_experts_answer_is_refused(random_batch):
    tokens = random_batch(0)
    tokens.lift = lambda outputs: 2 * outputs
    with pytest.raises(UnsupportedModelError, match="constants cannot stand for them"):
        figures_of([tokens])
    statistic = ConstantErrors(tokens.layer, must=False)  # nobody asked for constants: then there are none
    statistic.update(tokens)
    assert not statistic.again()
    assert statistic.tensors() == {}


# The choice ------------------------------------------------------------------------------------------------


def random_errors(num_experts, num_domains, seed=0):
    generator = torch.Generator().manual_seed(seed)
    roots = torch.randn(num_domains, num_experts, 6, generator=generator).double()
    return {ERRORS: roots @ roots.mT, VALUES: torch.zeros(num_experts, 2)}


def objective(num_domains, blend="mean"):
    names = [f"d{number}" for number in range(num_domains)]
    return Objective.of_batches(names, torch.arange(1.0, 1 + num_domains), blend)


def best_of_all(figures, num_dropped, wanted, fixed):
    def value(dropped):
        return float(minimised(wanted, figures[ERRORS][:, dropped][:, :, dropped].sum((1, 2))))

    free = [
        list(one)
        for one in combinations(range(figures[ERRORS].shape[1]), num_dropped)
        if set(fixed.forbidden) <= set(one) and not set(fixed.staying) & set(one)
    ]
    return min(map(value, free)), value


@pytest.mark.parametrize("blend", ["mean", "worst", "pooled", {"d0": 2, "d1": 1}])
@pytest.mark.parametrize("fixed", [Fixed(), Fixed((1, 4), (6,), (2,))])
def test_all_sets_are_looked_at_or_searched(make_layer, blend, fixed):
    figures, wanted, layer = random_errors(10, 2), objective(2, blend), make_layer(10, 2)
    best, value = best_of_all(figures, 4, wanted, fixed)
    exact, cost = by_constants(layer, figures, 6, wanted, fixed, 1000)
    searched, _ = by_constants(layer, figures, 6, wanted, fixed, 1)
    assert exact["search"] == "exact"
    assert value(exact["dropped"]) == pytest.approx(best)
    assert value(searched["dropped"]) <= best * 1.1
    for found in (exact, searched):
        assert set(fixed.forbidden) <= set(found["dropped"])
        assert not set(fixed.staying) & set(found["dropped"])
        assert sorted(found["kept"] + found["dropped"]) == list(range(10))
    assert cost > 0


def test_swaps_mend_what_greedy_removal_does(make_layer):
    """Expert 0 alone costs least; but 1 and 2 cancel each other out."""
    errors = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, -1.9], [0.0, -1.9, 2.0]], dtype=torch.float64)[None]
    figures = {ERRORS: errors, VALUES: torch.zeros(3, 1)}
    found, cost = by_constants(make_layer(3, 1), figures, 1, objective(1), Fixed(), 0)
    assert found["dropped"] == [1, 2]
    assert found["swaps"] == 1
    assert cost == pytest.approx(0.2**0.5)


def test_losses_are_those_of_each_domain():
    figures = {"batch.domain": torch.tensor([0, 1, 0]), "batch.squared_output": torch.tensor([4.0, 1.0, 5.0]).double()}
    found = objective_of(figures, ["one", "two"], "mean")
    assert found.norm_D.tolist() == [3.0, 1.0]
    assert float(minimised(found, torch.tensor([2.25, 0.25]))) == pytest.approx((2.25 / 9 + 0.25 / 1) / 2)


def test_without_figures_it_is_refused(make_layer):
    with pytest.raises(ChoiceError, match="no constants were gathered"):
        by_constants(make_layer(3, 1), {}, 1, objective(1), Fixed(), 0)
