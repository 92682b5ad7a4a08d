"""The closed rule of each router, and the rule's own arithmetic by hand."""

from __future__ import annotations

import math

import pytest
import torch
from by_hand import ROUTING, choose, correction_bias, router_logits
from tiny_models import ARCHITECTURES, random_model, tiny_model, token_ids

from compressor import MoEModel
from compressor.model.routed_tokens import RealTokens
from compressor.plugin import RoutingRule

# name → (score, renormalised, scale, has a correction bias, and what groups are chosen by); None: no closed form
RULES = {
    "mixtral": ("softmax", True, 1.0, False),
    "qwen2_moe": ("softmax", False, 1.0, False),
    "qwen3_moe": ("softmax", True, 1.0, False),
    "qwen3_moe_not_normalised": ("softmax", False, 1.0, False),
    "olmoe": ("softmax", False, 1.0, False),
    "granitemoe": ("softmax", True, 1.0, False),
    "phimoe": None,
    "deepseek_v2": ("softmax", False, 1.5, False),
    "deepseek_v2_groups": ("softmax", False, 1.0, False, "best"),
    "deepseek_v3": ("sigmoid", True, 2.5, True, "best two"),
    "gpt_oss": ("softmax", True, 1.0, False),
    "glm4_moe": ("sigmoid", True, 1.0, True),
    "mixtral4": ("softmax", True, 1.0, False),
    "deepseek4": ("softmax", False, 1.5, False),
}


@torch.no_grad()
def each_layer(moe, look, ids):
    """Call `look(tokens)` for every layer while the model runs."""
    with moe.watched({layer.path: look for layer in moe.layers}, RealTokens(torch.ones(ids.numel(), dtype=torch.bool))):
        moe.model(ids)


def facts(rule):
    if rule is None:
        return None
    groups = () if rule.groups is None else (rule.groups.score,)
    return (rule.score, rule.renormalise, rule.scale, rule.bias is not None, *groups)


def rules(moe, ids):
    found = []
    each_layer(moe, lambda tokens: found.append(facts(tokens.rule)), ids)
    return found


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in ARCHITECTURES), *((name, "bfloat16") for name in ("qwen2_moe", "deepseek_v3"))],
)
def test_rule_found(name, dtype):
    moe = MoEModel(tiny_model(name, dtype))
    assert rules(moe, token_ids(4, 32)) == [RULES[name]] * len(moe.layers)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("deepseek_v3", {"n_group": 1, "topk_group": 1}, ("sigmoid", True, 2.5, True)),
        ("glm4_moe", {"norm_topk_prob": False}, ("sigmoid", False, 1.0, True)),
        ("glm4_moe", {"norm_topk_prob": False, "routed_scaling_factor": 1.8}, ("sigmoid", False, 1.8, True)),
        ("olmoe", {"norm_topk_prob": True}, ("softmax", True, 1.0, False)),
        ("mixtral", {"num_experts_per_tok": 7}, ("softmax", True, 1.0, False)),
        ("qwen3_moe", {"norm_topk_prob": False, "num_experts_per_tok": 1}, ("softmax", False, 1.0, False)),
        ("qwen3_moe", {"num_experts": 32, "num_experts_per_tok": 4}, ("softmax", True, 1.0, False)),
    ],
)
def test_rule_follows_the_config(name, changes, expected):
    moe = MoEModel(random_model(name, **changes))
    assert rules(moe, token_ids(4, 32)) == [expected] * len(moe.layers)


def test_bias_is_the_model_s_own():
    moe = MoEModel(tiny_model("glm4_moe"))

    def look(tokens):
        bias = moe.model.get_submodule(tokens.layer.router).e_score_correction_bias
        assert torch.equal(tokens.rule.bias, bias.double())

    each_layer(moe, look, token_ids(4, 32))


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule])
def test_rule_is_the_router_under_random_masks(name):
    """Twenty sets of kept experts, of all sizes (by group equal ones): ids and weights as the router gives them."""
    moe = MoEModel(tiny_model(name))
    generator = torch.Generator().manual_seed(3)
    compared = []

    def look(tokens):
        for draw in range(20):
            num_kept = 2 + draw % 7
            kept = torch.randperm(8, generator=generator)[:num_kept].sort().values.tolist()
            if tokens.rule.groups is not None:
                halves = [4 * half + torch.randperm(4, generator=generator)[: 2 + draw % 3] for half in (0, 1)]
                kept = torch.cat(halves).sort().values.tolist()
            dropped = [expert for expert in range(8) if expert not in kept]
            masked = tokens.logits_TE.index_fill(1, torch.tensor(dropped, dtype=torch.int64), float("-inf"))
            index, weights = tokens.rule.choose(masked, 2)
            router_index, router_weights = tokens.replay(kept)
            ours = torch.zeros(tokens.num_tokens, 8, dtype=torch.float64).scatter_(1, index, weights)
            theirs = torch.zeros_like(ours).scatter_(1, router_index, router_weights.double())
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
            compared.append(kept)

    each_layer(moe, look, token_ids(8, 32))
    assert len(compared) == 20 * len(moe.layers)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_masked_router_by_hand(name):
    """In a masked model: the router's own choice and weights, against loops that never knew the dropped experts."""
    moe = MoEModel(tiny_model(name))
    layer = moe.layers[0]
    block, router = moe.model.get_submodule(layer.path), moe.model.get_submodule(layer.router)
    probe = layer.router_probe
    generator = torch.Generator().manual_seed(4)
    hidden_TH = torch.randn(40, 32, generator=generator)
    logits_TE, bias = router_logits(block, hidden_TH), correction_bias(block)
    for _ in range(20):
        halves = [4 * half + torch.randperm(4, generator=generator)[:2] for half in (0, 1)]
        kept = torch.cat(halves).sort().values.tolist()
        with torch.no_grad(), moe.masked({layer.path: kept}):
            output = router(hidden_TH[None] if name == "deepseek4" else hidden_TH)
        expected = [choose(ROUTING[name], logits, bias, kept) for logits in logits_TE.tolist()]
        if probe.index_position is None:
            assert torch.equal((output != float("-inf")).all(0).nonzero()[:, 0], torch.tensor(kept))
            continue
        index, weights = output[probe.index_position].tolist(), output[probe.weights_position].tolist()
        for token, by_hand in enumerate(expected):
            found = dict(zip(index[token], weights[token], strict=True))
            assert found == pytest.approx(by_hand, rel=1e-5)


def test_bias_that_decides_for_few_tokens_is_not_overlooked():
    """So small that no choice among the first tokens hangs on it: later ones may."""
    model = random_model("glm4_moe")
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.mul_(1e-3)
    moe = MoEModel(model)
    assert rules(moe, token_ids(2, 8)) == [RULES["glm4_moe"]] * len(moe.layers)


@pytest.mark.parametrize("name", ["mixtral", "deepseek4"])
def test_rule_must_explain_every_batch(name):
    """A router that is not what it seemed on the first batch is asked itself from then on; first and third batch have
    the closed rule, the second has none.
    """
    moe = MoEModel(tiny_model(name))
    path = moe.layers[0].path
    router = moe.model.get_submodule(moe.layers[0].router)
    probe = moe.layers[0].router_probe
    original, found = router.forward, []

    def twisted(hidden):
        output = list(original(hidden))
        output[probe.weights_position] = output[probe.weights_position].flip(-1)
        return tuple(output)

    real = RealTokens(torch.ones(16, dtype=torch.bool))
    with torch.no_grad(), moe.watched({path: lambda tokens: found.append(facts(tokens.rule))}, real):
        for number in range(3):
            router.forward = twisted if number == 1 else original
            moe.model(token_ids(2, 8, seed=number))
    assert found == [RULES[name], None, RULES[name]]


@pytest.mark.parametrize("name", ["qwen2_moe", "glm4_moe", "deepseek_v2"])
def test_rule_is_found_on_few_tokens_too(name):
    """A first batch of one token leaves more than one rule possible in principle; the masks tell them apart."""
    moe = MoEModel(tiny_model(name))
    for seed in range(10):
        assert rules(moe, token_ids(1, 1 + seed % 3, seed=seed)) == [RULES[name]] * len(moe.layers)


# The arithmetic --------------------------------------------------------------------------------------------

LOG = math.log


def check(rule, logits, top_k, index, weights):
    found_index, found_weights = rule.choose(torch.tensor(logits), top_k)
    assert found_index.tolist() == index
    assert found_weights.dtype == torch.float64
    torch.testing.assert_close(found_weights, torch.tensor(weights, dtype=torch.float64), rtol=1e-6, atol=0)


def test_softmax_renormalised():
    """Three tokens, three experts, logits are logarithms: the softmax is 1:2:5, 6:3:1 and 1:1:2."""
    logits = [[LOG(1), LOG(2), LOG(5)], [LOG(6), LOG(3), LOG(1)], [LOG(1), LOG(2), LOG(1)]]
    index = [[2, 1], [0, 1], [1, 0]]
    check(RoutingRule("softmax", True, 1.0), logits, 2, index, [[5 / 7, 2 / 7], [6 / 9, 3 / 9], [2 / 3, 1 / 3]])
    check(RoutingRule("softmax", True, 2.5), logits, 1, [[2], [0], [1]], [[2.5], [2.5], [2.5]])


def test_softmax_not_renormalised():
    """The same: what is left of each sum is not shared out, and without expert 2 the sums are 3, 9 and 3."""
    logits = [[LOG(1), LOG(2), LOG(5)], [LOG(6), LOG(3), LOG(1)], [LOG(1), LOG(2), LOG(1)]]
    rule = RoutingRule("softmax", False, 1.5)
    check(rule, logits, 2, [[2, 1], [0, 1], [1, 0]], [[1.5 * 5 / 8, 1.5 / 4], [0.9, 0.45], [0.75, 0.375]])
    dropped = [[*row[:2], float("-inf")] for row in logits]
    check(rule, dropped, 1, [[1], [0], [1]], [[1.0], [1.0], [1.0]])
    check(rule, dropped, 2, [[1, 0], [0, 1], [1, 0]], [[1.0, 0.5], [1.0, 0.5], [1.0, 0.5]])
    assert rule.rescales_all
    assert not RoutingRule("softmax", True, 1.5).rescales_all
    assert not RoutingRule("sigmoid", False, 1.5).rescales_all


def test_sigmoid_with_bias_and_scale():
    """sigmoid(ln 3) = 3/4, (0) = 1/2, (−ln 3) = 1/4, (ln 9) = 9/10. The bias decides who is chosen, not the weights."""
    logits = [[LOG(3), 0.0, -LOG(3), LOG(9)], [-LOG(3), -LOG(3), 0.0, LOG(3)], [LOG(9), LOG(3), 0.0, 0.0]]
    bias = torch.tensor([0.0, 0.0, 1.0, -0.5], dtype=torch.float64)
    # chosen by: [.75, .5, 1.25, .4], [.25, .25, 1.5, .25 (+0)], [.9, .75, 1.5, 0]
    rule = RoutingRule("sigmoid", True, 2.5, bias)
    check(
        RoutingRule("sigmoid", False, 2.0, bias),
        [logits[0], logits[2]],
        2,
        [[2, 0], [2, 0]],
        [[0.5, 1.5], [1.0, 1.8]],
    )
    check(rule, [logits[0], logits[2]], 2, [[2, 0], [2, 0]], [[0.625, 1.875], [2.5 * 5 / 14, 2.5 * 9 / 14]])
    check(rule, [logits[1]], 1, [[2]], [[2.5]])
    # expert 2 gone: its sigmoid is 0, but its bias must not choose it
    gone = [[*row[:2], float("-inf"), row[3]] for row in logits]
    check(rule, [gone[0]], 2, [[0, 1]], [[2.5 * 0.6, 2.5 * 0.4]])


def test_square_root_of_softplus():
    """softplus(ln(e − 1)) = 1, softplus(ln(e⁴ − 1)) = 4."""
    one, two = LOG(math.e - 1), LOG(math.e**4 - 1)
    check(
        RoutingRule("sqrtsoftplus", True, 1.5), [[one, two], [two, one]], 2, [[1, 0], [0, 1]], [[1.0, 0.5], [1.0, 0.5]]
    )
    check(RoutingRule("sqrtsoftplus", False, 1.0), [[one, two]], 2, [[1, 0]], [[2.0, 1.0]])
