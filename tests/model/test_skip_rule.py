"""Rules of skipping: numbers worked out by hand, and the JSON that other engines read."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from compressor import SkipRule
from compressor.model.skipping.install import rules_json, rules_of

NAN = float("nan")


def kept(rule, weights, index=None, **more):
    weights = torch.tensor(weights)
    index = torch.arange(weights.shape[-1]).expand_as(weights) if index is None else torch.tensor(index)
    norms = None if rule.expert_norms is None else torch.tensor(rule.expert_norms)
    return rule.kept(index, weights, norms_E=norms, **more).tolist()


def weights_after(rule, weights):
    weights = torch.tensor(weights)
    mask = rule.kept(torch.arange(weights.shape[-1]).expand_as(weights), weights)
    return rule.reweighted(weights, mask)


# Which experts stay


def test_ratio_to_the_largest_wherever_it_stands():
    """0.1 / 0.5 = 0.2 and 0.25 / 0.5 = 0.5, by a threshold of 0.5: what equals it stays (the paper's w₂ < β w₁)."""
    rule = SkipRule("ratio", True, beta=0.5)
    assert kept(rule, [[0.1, 0.5, 0.25, 0.125]]) == [[False, True, True, False]]
    assert kept(rule, [[0.5, 0.1, 0.125, 0.25]]) == [[True, False, False, True]]


def test_ratio_of_one_leaves_the_largest_only():
    assert kept(SkipRule("ratio", True, beta=1.0), [[0.2, 0.5, 0.5, 0.4]]) == [[False, True, True, False]]


def test_tail_mass_is_the_papers_rule():
    """Weights 8 4 2 2 of 16: the tails behind 1, 2, 3 experts are 8/16, 4/16, 2/16. The smallest i with a tail ≤ β."""
    weights = [[2.0, 8.0, 2.0, 4.0]]
    for beta, expected in (
        (0.1, [True, True, True, True]),
        (0.125, [True, True, False, True]),  # of two that weigh the same the one that stands behind goes
        (0.2, [True, True, False, True]),
        (0.25, [False, True, False, True]),
        (0.49, [False, True, False, True]),
        (0.5, [False, True, False, False]),
        (1.0, [False, True, False, False]),
    ):
        assert kept(SkipRule("tail_mass", True, beta=beta), weights) == [expected], beta


def test_tail_mass_against_its_definition():
    generator = torch.Generator().manual_seed(0)
    weights_TK = torch.rand(200, 6, generator=generator)
    for beta in (0.05, 0.2, 0.6):
        found = SkipRule("tail_mass", False, beta=beta).kept(torch.zeros(200, 6, dtype=torch.int64), weights_TK)
        for weights, mask in zip(weights_TK.double().tolist(), found.tolist(), strict=True):
            order = sorted(range(6), key=lambda i: -weights[i])
            num_kept = next(i for i in range(1, 7) if sum(weights[m] for m in order[i:]) <= beta * sum(weights) + 1e-7)
            assert {i for i in range(6) if mask[i]} == set(order[:num_kept])


def test_contribution_is_weight_times_norm():
    """w n = 0.5·1, 0.3·4, 0.2·2 = 0.5, 1.2, 0.4 against 1.2: 0.417, 1, 0.333. The largest weight stays as well."""
    norms = (1.0, 4.0, 2.0)
    weights = [[0.5, 0.3, 0.2]]
    assert kept(SkipRule("contribution", True, beta=0.4, expert_norms=norms), weights) == [[True, True, False]]
    assert kept(SkipRule("contribution", True, beta=0.5, expert_norms=norms), weights) == [[True, True, False]]
    assert kept(SkipRule("contribution", True, beta=0.3, expert_norms=norms), weights) == [[True, True, True]]
    # norms go by expert, not by place
    reversed_index = [[2, 1, 0]]
    found = kept(SkipRule("contribution", True, beta=0.4, expert_norms=norms), [[0.2, 0.3, 0.5]], reversed_index)
    assert found == [[False, True, True]]


def test_contribution_tells_equal_weights_apart():
    """All weights are the largest; only the one that contributes most of them cannot be skipped."""
    rule = SkipRule("contribution", False, beta=0.5, expert_norms=(1.0, 4.0))
    assert kept(rule, [[1.0, 1.0]]) == [[False, True]]


def test_top_k_keeps_the_largest():
    assert kept(SkipRule("top_k", False, top_k=2), [[0.1, 0.4, 0.2, 0.3]]) == [[False, True, False, True]]


@pytest.mark.parametrize(
    "rule",
    [
        SkipRule("ratio", True, beta=1.0),
        SkipRule("tail_mass", True, beta=1.0),
        SkipRule("contribution", True, beta=1.0, expert_norms=(1.0,) * 8),
        SkipRule("top_k", True, top_k=1),
    ],
)
def test_the_largest_weight_is_never_skipped(rule):
    weights_TK = torch.rand(300, 8, generator=torch.Generator().manual_seed(1))
    norms_E = torch.ones(8)
    mask = rule.kept(torch.arange(8).expand(300, -1), weights_TK, norms_E=norms_E)
    assert mask.gather(1, weights_TK.argmax(1, keepdim=True)).all()
    assert not mask.all()


def test_what_is_no_expert_is_not_skipped():
    """Ids from 3 up are identity experts, which cost nothing."""
    rule = SkipRule("ratio", False, beta=0.9)
    assert kept(rule, [[0.5, 0.1, 0.1]], [[0, 3, 1]], num_experts=3) == [[True, True, False]]
    assert kept(SkipRule("top_k", False, top_k=1), [[0.5, 0.1, 0.1]], [[0, 3, 1]], num_experts=3) == [
        [True, True, False]
    ]


def test_nan_weights_skip_nothing():
    for rule in (SkipRule("ratio", True, beta=0.9), SkipRule("tail_mass", True, beta=0.9)):
        assert kept(rule, [[NAN, 0.1, 0.2]]) == [[True, True, True]]
    assert kept(SkipRule("ratio", True, beta=0.9), [[0.0, 0.0]]) == [[True, True]]


# What the others weigh then


def test_kept_weights_keep_the_tokens_own_sum():
    """0.5 + 0.25 + 0.125 = 0.875; without 0.125 what is left, 0.75, is scaled to 0.875 and not to 1."""
    found = weights_after(SkipRule("ratio", True, beta=0.4), [[0.5, 0.25, 0.125]])
    assert found.tolist() == [[pytest.approx(0.5 * 0.875 / 0.75), pytest.approx(0.25 * 0.875 / 0.75), 0.0]]
    assert float(found.sum()) == pytest.approx(0.875)


def test_without_renormalising_weights_stay_as_they_are():
    assert weights_after(SkipRule("ratio", False, beta=0.4), [[0.5, 0.25, 0.125]]).tolist() == [[0.5, 0.25, 0.0]]


def test_sums_above_one_are_kept_too():
    found = weights_after(SkipRule("ratio", True, beta=0.5), [[2.0, 0.5]])
    assert found.tolist() == [[2.5, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_that_skips_nothing_has_its_own_weights_to_the_bit(dtype):
    weights_TK = torch.rand(500, 5, generator=torch.Generator().manual_seed(2)).to(dtype)
    rule = SkipRule("ratio", True, beta=0.3)
    mask = rule.kept(torch.arange(5).expand(500, -1), weights_TK)
    whole_T = mask.all(1)
    assert whole_T.any()
    assert not whole_T.all()
    found = rule.reweighted(weights_TK, mask)
    assert found.dtype == dtype
    assert torch.equal(found[whole_T], weights_TK[whole_T])


@pytest.mark.parametrize(
    "rule", [SkipRule("ratio", True, beta=0.5), SkipRule("top_k", True, top_k=1, normalise_over=1)]
)
def test_a_token_that_no_expert_counts_for_stays_so(rule):
    """All its weights are 0, as sigmoids may underflow to; beside it another token skips."""
    found = weights_after(rule, [[0.0, 0.0], [0.9, 0.1]])
    assert found.tolist() == [[0.0, 0.0], [pytest.approx(1.0), 0.0]]


def test_top_k_normalised_over_more():
    """Weights 0.4 0.3 0.2 0.1. Two of them as they are, normalised over 4; over 3 they are divided by 0.9; over 2 by
    0.7, the mass of the two themselves.
    """
    weights = [[0.2, 0.4, 0.1, 0.3]]
    for over, expected in ((None, 0.4 / 0.7), (2, 0.4 / 0.7), (3, 0.4 / 0.9), (4, 0.4), (16, 0.4)):
        found = weights_after(SkipRule("top_k", True, top_k=2, normalise_over=over), weights)
        assert found[0, 1] == pytest.approx(expected), over
        assert found[0, 3] == pytest.approx(expected * 0.75), over
        assert found[0, 0] == found[0, 2] == 0
    assert weights_after(SkipRule("top_k", False, top_k=2), weights)[0, 1] == pytest.approx(0.4)


# The rule as data


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "softmax", "renormalise": True, "beta": 0.5}, "unknown rule 'softmax'; known are ratio, tail_mass"),
        ({"rule": "ratio", "renormalise": 1, "beta": 0.5}, "`renormalise` should be true or false, found 1"),
        ({"rule": "ratio", "renormalise": True}, "the rule ratio needs `beta`, found nothing"),
        ({"rule": "ratio", "renormalise": True, "beta": 0.5, "top_k": 2}, "needs `beta`, found `beta` and `top_k`"),
        ({"rule": "contribution", "renormalise": True, "beta": 0.5}, "needs `beta` and `expert_norms`, found `beta`"),
        ({"rule": "ratio", "renormalise": True, "beta": 0.0}, "`beta` should be a number above 0, up to 1, found 0.0"),
        ({"rule": "ratio", "renormalise": True, "beta": 1.5}, "up to 1, found 1.5"),
        ({"rule": "ratio", "renormalise": True, "beta": NAN}, "up to 1, found nan"),
        ({"rule": "ratio", "renormalise": True, "beta": "0.5"}, "up to 1, found '0.5'"),
        (
            {"rule": "contribution", "renormalise": True, "beta": 0.5, "expert_norms": [1.0, NAN]},
            "`expert_norms` should be finite numbers from 0 up",
        ),
        ({"rule": "contribution", "renormalise": True, "beta": 0.5, "expert_norms": 3}, "should be a list, found 3"),
        ({"rule": "top_k", "renormalise": True, "top_k": 0}, "`top_k` should be a whole number from 1 up, found 0"),
        (
            {"rule": "top_k", "renormalise": True, "top_k": 4, "normalise_over": 2},
            "`normalise_over` should be at least `top_k`, found 2 and 4",
        ),
        ({"rule": "ratio", "renormalise": True, "beta": 0.5, "normalise_over": 8}, "should be at least `top_k`"),
        (
            {"rule": "top_k", "renormalise": False, "top_k": 2, "normalise_over": 8},
            "`normalise_over` means nothing where the router does not renormalise",
        ),
        ({"rule": "ratio", "renormalise": True, "beta": 10**400}, "`beta` should be a number above 0, up to 1"),
        (
            {"rule": "contribution", "renormalise": True, "beta": 0.5, "expert_norms": [1.0, 1e39]},
            "`expert_norms` should be finite numbers from 0 up, in float32",
        ),
        ({"rule": "ratio", "beta": 0.5}, "a rule has the keys beta, expert_norms"),
        ({"rule": "ratio", "renormalise": True, "beta": 0.5, "colour": 1}, "found beta, colour, renormalise, rule"),
    ],
)
def test_what_is_no_rule_is_refused(settings, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        SkipRule.from_json(settings)


@pytest.mark.parametrize(
    "rule",
    [
        SkipRule("ratio", True, beta=0.25),
        SkipRule("tail_mass", False, beta=0.1),
        SkipRule("contribution", True, beta=0.2, expert_norms=(1.0, 0.5)),
        SkipRule("top_k", True, top_k=2, normalise_over=8),
    ],
)
def test_json_there_and_back(rule):
    data = json.loads(json.dumps(rules_json({"model.layers.0.mlp": rule})))
    assert data["version"] == 1
    assert None not in data["layers"]["model.layers.0.mlp"].values()

    config = SimpleNamespace(compressor={"format": 1, "skipping": data})
    assert rules_of(config) == {"model.layers.0.mlp": rule}


def test_another_threshold_and_fewer_experts():
    rule = SkipRule("contribution", True, beta=0.2, expert_norms=(1.0, 2.0, 3.0))
    assert rule.at(0.4) == SkipRule("contribution", True, beta=0.4, expert_norms=(1.0, 2.0, 3.0))
    assert rule.of_experts([0, 2]) == SkipRule("contribution", True, beta=0.2, expert_norms=(1.0, 3.0))
    with pytest.raises(ValueError, match="the rule top_k needs `top_k`, found `beta` and `top_k`"):
        SkipRule("top_k", True, top_k=2).at(0.3)


@pytest.mark.parametrize(
    ("rule", "num_experts", "top_k", "problem"),
    [
        (SkipRule("ratio", True, beta=0.5), 8, 1, "each token chooses one expert, so there is nothing to skip"),
        (SkipRule("ratio", True, beta=0.5), 8, 2, None),
        (SkipRule("contribution", True, beta=0.5, expert_norms=(1.0,) * 6), 8, 2, "knows 6 experts, the layer has 8"),
        (
            SkipRule("top_k", True, top_k=2),
            8,
            2,
            "each token chooses 2 experts, so keeping the largest 2 skips nothing",
        ),
        (SkipRule("top_k", True, top_k=2, normalise_over=9), 8, 4, "there are no 9 to normalise over"),
    ],
)
def test_rules_that_do_not_fit_a_layer(rule, num_experts, top_k, problem):
    found = rule.problem(num_experts, top_k)
    assert found == problem if problem is None else problem in found


def test_the_rule_in_a_decision():
    """A layer's entry has figures beside the rule; a rule that is none is no rule."""
    entry = {"rule": "ratio", "renormalise": True, "beta": 0.3, "mean_experts": 1.5, "held_out": {"mean_experts": 1.6}}
    assert SkipRule.of(entry) == SkipRule("ratio", True, beta=0.3)
    with pytest.raises(ValueError, match="beta"):
        SkipRule.of(entry | {"beta": 3})
