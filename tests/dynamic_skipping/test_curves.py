"""Curves against a slow, obvious version: for a threshold, skip, reweight and compare outputs, token by token."""

from __future__ import annotations

import pytest
import torch

from compressor import CheckpointError, MoEModel, SkipRule
from compressor.model.routed_tokens import RealTokens
from compressor.plugin import RoutedTokens
from compressor.testing.tiny import answers, tiny_inputs, tiny_model
from compressor_dynamic_skipping.curves import NUM_BINS, FixedCount, SkipCurves, bins_of, edges, expert_norms
from compressor_dynamic_skipping.thresholds import Curve, beta_for_mean, uncertainty


def observed(name, fixed=None, top_k=4, parts=("a", "b"), held_out=(), **changes):
    """(layer, its statistic, the tokens it saw) of the second MoE layer of a tiny model."""
    moe = MoEModel(tiny_model(name, top_k=top_k, **changes))
    layer = moe.layers[min(1, len(moe.layers) - 1)]
    statistic, seen = SkipCurves(layer, fixed), []

    def visit(tokens: RoutedTokens) -> None:
        tokens.domain, tokens.held_out = parts[len(seen)], parts[len(seen)] in held_out
        statistic.update(tokens)
        seen.append(tokens)

    for number in range(len(parts)):
        inputs = tiny_inputs(moe.model, seed=number, length=30)
        real = RealTokens(torch.ones(inputs["input_ids"].numel(), dtype=torch.bool))
        with moe.watched({layer.path: visit}, real):
            answers(moe.model, inputs)
    return layer, statistic, seen


@torch.no_grad()
def slowly(layer, tokens, rule):
    """(experts used, share of weights kept, squared error, squared output), summed over the tokens."""
    norms = None if rule.expert_norms is None else torch.tensor(rule.expert_norms)
    kept_TK = rule.kept(tokens.index_TK, tokens.weights_TK, layer.num_experts, norms)
    outputs_TKH = tokens.evaluate_experts(tokens.hidden_TH, tokens.index_TK).double()
    used = share = error = size = 0.0
    for token in range(tokens.num_tokens):
        weights = tokens.weights_TK[token].double()
        left = torch.where(kept_TK[token], weights, 0.0)
        new = left * weights.sum() / left.sum() if rule.renormalise else left
        used += int((kept_TK[token] & (tokens.index_TK[token] < layer.num_experts)).sum())
        share += float(left.sum() / weights.sum())
        error += float(((new - weights) @ outputs_TKH[token]).square().sum())
        size += float((weights @ outputs_TKH[token]).square().sum())
    return used, share, error, size


@pytest.mark.parametrize("rule", ["ratio", "tail_mass", "contribution"])
@pytest.mark.parametrize(
    "name",
    [
        "mixtral",
        "longcat_flash",
        "phimoe",
        *(pytest.param(one, marks=pytest.mark.nightly) for one in ("olmoe", "deepseek_v3")),
    ],
)
def test_what_a_threshold_reaches(name, rule):
    top_k = 2 if name == "phimoe" else 4
    layer, statistic, seen = observed(name, top_k=top_k, num_experts=16)
    figures = statistic.tensors()
    renormalises = name in ("mixtral", "deepseek_v3")
    assert bool(figures["same.renormalises"]) == renormalises
    curve = Curve.of(rule, figures, [0, 1])
    norms = tuple(expert_norms(figures, [0, 1]).tolist()) if rule == "contribution" else None
    assert curve.tokens == 120
    for number in (1, NUM_BINS // 2, NUM_BINS - 700, NUM_BINS - 200, NUM_BINS - 1):
        beta = curve.beta_at(number)
        found = curve.reached(beta)
        one = SkipRule(rule, renormalises, beta=beta, expert_norms=norms)
        used, share, error, size = (sum(values) for values in zip(*(slowly(layer, t, one) for t in seen), strict=True))
        assert found.mean_experts == pytest.approx(used / 120, abs=1e-5), beta
        assert found.kept_mass == pytest.approx(share / 120, abs=1e-6)
        assert found.relative_loss == pytest.approx((error / size) ** 0.5, rel=1e-4, abs=1e-6)


def test_medians_are_those_of_all_scores_held_out_text_aside():
    _, statistic, seen = observed("mixtral", parts=("a", "b", "c"), held_out=("c",))
    scores = []
    for tokens in seen[:2]:
        for weights in tokens.weights_TK.tolist():
            largest = max(weights)
            scores += [weight / largest for weight in weights if weight != largest]
    figures = statistic.tensors()
    scores.sort()
    middle = (scores[(len(scores) - 1) // 2] + scores[len(scores) // 2]) / 2
    assert float(figures["skip.ratio.median"]) == pytest.approx(middle, rel=1e-6)
    assert float(figures["skip.ratio.mean"]) == pytest.approx(sum(scores) / len(scores), rel=1e-6)


def test_norms_are_means_over_the_tokens_that_chose_an_expert():
    layer, statistic, seen = observed("mixtral", parts=("a", "b"), held_out=("b",))
    figures, (tokens, _) = statistic.tensors(), seen
    with torch.no_grad():
        outputs_TKH = tokens.evaluate_experts(tokens.hidden_TH, tokens.index_TK)
    found = expert_norms(figures, [0])
    for expert in range(layer.num_experts):
        norms = outputs_TKH[tokens.index_TK == expert].norm(dim=-1)
        if len(norms):
            assert float(found[expert]) == pytest.approx(float(norms.mean()), rel=1e-4)
    none = dict(figures, **{"sums.skip.chosen": torch.zeros(2, 8), "sums.skip.norm": torch.zeros(2, 8)})
    assert expert_norms(none, [0]).tolist() == [0.0] * 8


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", pytest.param("olmoe", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("over", [3, 4, 8])
def test_fixed_counts_against_the_running_model(name, over):
    """Two experts of every token: the change of the layer's output is what the layer that skips puts out."""
    if name == "olmoe" and over != 4:
        pytest.skip("its router does not renormalise")
    changes = {"norm_topk_prob": True} if name == "qwen3_moe" else {}
    layer, statistic, seen = observed(name, FixedCount(2, over), **changes)
    renormalises = name != "olmoe"
    figures = statistic.tensors()
    gone, _, error = figures[f"sums.skip.top_k.2.{over}"].sum(0).tolist()
    assert gone == 2 * 120
    moe = MoEModel(tiny_model(name, top_k=4, **changes))
    block = moe.model.get_submodule(layer.path)
    rule = SkipRule("top_k", renormalises, top_k=2, normalise_over=over if renormalises else None)
    wanted = 0.0
    with torch.no_grad():
        for tokens in seen:
            whole = block(tokens.hidden_TH[None])[0]
            moe.skip({layer.path: rule})
            wanted += float((block(tokens.hidden_TH[None])[0] - whole).double().square().sum())
            moe.skip({})
    assert error == pytest.approx(wanted, rel=1e-4)


def test_layers_that_cannot_be_asked_have_no_errors():
    _, statistic, _ = observed("jetmoe", top_k=2)
    figures = statistic.tensors()
    assert not any(name.startswith("skip.contribution") or "norm" in name for name in figures if "renorm" not in name)
    curve = Curve.of("ratio", figures, [0, 1])
    assert curve.squared_output is None
    reached = curve.reached(0.5)
    assert reached.relative_loss is None
    assert 1 < reached.mean_experts < 2


def test_batches_are_let_go_of_once_added_up():
    _, statistic, _ = observed("mixtral")
    assert len(statistic._batches) == 2
    statistic.tensors()
    assert statistic._batches == []


def test_nan_weights_are_named():
    moe = MoEModel(tiny_model("mixtral"))
    layer = moe.layers[0]
    inputs = tiny_inputs(moe.model)
    real = RealTokens(torch.ones(inputs["input_ids"].numel(), dtype=torch.bool))
    statistic = SkipCurves(layer)

    def spoilt(tokens):
        tokens.weights_TK = tokens.weights_TK.clone().index_fill_(0, torch.tensor([3]), float("nan"))
        statistic.update(tokens)

    with (
        pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp: the router gives weights that are not finite"),
        moe.watched({layer.path: spoilt}, real),
    ):
        answers(moe.model, inputs)


# Bins and thresholds


def test_bins_and_their_edges():
    assert bins_of(torch.tensor([0.0, 2.0**-17, 2.0**-16, 0.5, 0.75, 1.0])).tolist() == [
        0, 0, 1, NUM_BINS - 1 - 512, NUM_BINS - 1 - 256, NUM_BINS - 1
    ]  # fmt: skip
    assert len(edges()) == NUM_BINS
    assert torch.equal(bins_of(edges()), torch.arange(NUM_BINS))
    values = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    number = bins_of(values)
    assert (edges()[number] <= values).all()
    assert (values < torch.cat([edges(), torch.tensor([2.0])])[number + 1]).all()


def curve(steps, tokens=10.0, experts=20.0, rule="ratio", squared_output=100.0):
    """From (score, share, error) of each expert that may be skipped."""
    figures = {
        "sums.skip.tokens": torch.tensor([tokens]),
        "sums.skip.experts": torch.tensor([experts]),
        f"sums.skip.{rule}": torch.zeros(1, NUM_BINS, 3, dtype=torch.float64),
    }
    if squared_output is not None:
        figures["sums.skip.squared_output"] = torch.tensor([squared_output])
    for score, share, error in steps:
        row = torch.tensor([1.0, share, error], dtype=torch.float64)
        figures[f"sums.skip.{rule}"][0, bins_of(torch.tensor([score]))] += row
    return Curve.of(rule, figures, [0])


TEN = [(0.05 + 0.1 * number, 0.02 * number, 1.0 + number) for number in range(10)]
"""Ten tokens of two experts; the second ones score 0.05, 0.15 … 0.95."""


def test_curve_by_hand():
    one = curve(TEN)
    assert (one.most, one.fewest) == (2.0, 1.0)
    found = one.reached(0.5)  # 0.05 to 0.45 go: five experts, shares 0 + 0.02 + … + 0.08, errors 1 + … + 5
    assert found.mean_experts == pytest.approx(1.5)
    assert found.kept_mass == pytest.approx(1 - 0.2 / 10)
    assert found.relative_loss == pytest.approx((15 / 100) ** 0.5)
    assert one.reached(1.0).mean_experts == pytest.approx(1.0)


@pytest.mark.parametrize("mean", [1.0, 1.3, 1.9])
def test_threshold_for_a_mean(mean):
    one = curve(TEN)
    assert one.reached(beta_for_mean([one], mean)).mean_experts == pytest.approx(mean)


def test_threshold_for_a_mass():
    """Dropping the first six takes 0 + 0.02 + … + 0.1 = 0.3 of 10, the seventh 0.12 more."""
    one = curve(TEN)
    beta = one.beta_for_mass(0.965)
    assert 0.55 < beta <= 0.65
    assert one.reached(beta).kept_mass == pytest.approx(0.97)


def test_tail_mass_thresholds_skip_what_equals_them_too():
    one = curve([(0.25, 0.1, 1.0), (0.5, 0.1, 1.0)], rule="tail_mass")
    beta = beta_for_mean([one], 1.9)
    assert 0.25 <= beta < 0.5
    rule = SkipRule("tail_mass", True, beta=beta)
    weights = torch.tensor([[0.75, 0.25], [0.5, 0.5]])  # tails of 0.25 and 0.5
    assert rule.kept(torch.zeros(2, 2, dtype=torch.int64), weights).tolist() == [[True, False], [True, True]]


def test_one_threshold_for_all_layers():
    """Of the other layer's, all second experts score below 0.5: with 0.5, it uses 1 and this one 1.5."""
    one, other = curve(TEN), curve([(score / 2, 0.0, 0.0) for score, _, _ in TEN], tokens=10.0)
    beta = beta_for_mean([one, other], 1.25)
    assert 0.475 < beta <= 0.55
    assert one.reached(beta).mean_experts == pytest.approx(1.5)
    assert other.reached(beta).mean_experts == pytest.approx(1.0)


def test_layers_count_alike_however_many_tokens_come_to_them():
    """Of one layer's 100 tokens 30 score below 0.5, of the other's 10 tokens 5."""
    many = curve([(0.25, 0.0, 0.0)] * 30 + [(0.75, 0.0, 0.0)] * 70, tokens=100.0, experts=200.0)
    beta = beta_for_mean([many, curve(TEN)], 2 - (0.3 + 0.5) / 2)
    assert 0.45 < beta <= 0.55


@pytest.mark.parametrize("mean", [0.9, 2.0, 2.5])
def test_means_out_of_reach(mean):
    with pytest.raises(ValueError, match="can be brought from 2 down to 1"):
        beta_for_mean([curve(TEN)], mean)


def test_uncertainty_by_hand():
    """Ten tokens of 1 or 2 experts, 1.5 on average: a variance of (1.5 − 1)(2 − 1.5) at most; 2 √(0.25 / 10)."""
    assert uncertainty(curve(TEN), 1.5) == pytest.approx(2 * (0.25 / 10) ** 0.5)
    assert uncertainty(curve(TEN), 2.0) == 0.0


def test_figures_of_two_texts_add_up():
    """One statistic over both, or two of one each: the same curve, domain by domain."""
    _, together, _ = observed("mixtral")
    _, first, _ = observed("mixtral", parts=("a",))
    whole, part = together.tensors(), first.tensors()
    for name in ("sums.skip.tokens", "sums.skip.ratio", "sums.skip.tail_mass", "sums.skip.norm"):
        assert torch.allclose(whole[name][0], part[name][0])
    assert not torch.allclose(whole["sums.skip.ratio"][0], whole["sums.skip.ratio"][1])
