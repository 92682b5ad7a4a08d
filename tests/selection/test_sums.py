"""Sums per domain and expert: by hand, and against plain loops over the tokens of real models."""

from __future__ import annotations

import pytest
import routers
import torch
from by_hand import expert_outputs, routing_weights
from tiny_models import FEW, tiny_model, token_ids

from compressor import MoEModel
from compressor.data.sequences import TokenBatch, make_batches
from compressor.machine.progress import Progress
from compressor.observe.forward import model_inputs
from compressor.observe.layerwise import observe
from compressor.selection.activation_sums import SUMS, ExpertSums

# Three tokens choose two of four experts each. Experts answer x, 2x, −x and 7x; nobody chooses the last.
#
#   token x = (3, 4):  expert 0 with 0.6 (share 3/4), ‖f‖ =  5      expert 1 with 0.2 (share 1/4), ‖f‖ = 10
#   token x = (0, 2):  expert 1 with 0.1 (share 1/4), ‖f‖ =  4      expert 0 with 0.3 (share 3/4), ‖f‖ =  2
#   token x = (6, 8):  expert 2 with 0.5 (share 1/2), ‖f‖ = 10      expert 0 with 0.5 (share 1/2), ‖f‖ = 10
HIDDEN = torch.tensor([[3.0, 4.0], [0.0, 2.0], [6.0, 8.0]])
EXPERTS = torch.eye(2) * torch.tensor([1.0, 2.0, -1.0, 7.0])[:, None, None]
INDEX = torch.tensor([[0, 1], [1, 0], [2, 0]])
WEIGHTS = torch.tensor([[0.6, 0.2], [0.1, 0.3], [0.5, 0.5]])
BY_HAND = {
    "tokens": [3.0, 2.0, 1.0, 0.0],
    "weight": [1.4, 0.3, 0.5, 0.0],
    "share": [2.0, 0.5, 0.5, 0.0],
    "norm": [17.0, 14.0, 10.0, 0.0],
    "squared_norm": [129.0, 116.0, 100.0, 0.0],
    "weighted_norm": [3 + 0.6 + 5, 2 + 0.4, 5.0, 0.0],
    "squared_weighted_norm": [9 + 0.36 + 25, 4 + 0.16, 25.0, 0.0],
    "share_norm": [3.75 + 1.5 + 5, 2.5 + 1, 5.0, 0.0],
    "largest": [8.0, 8.0, 8.0, 0.0],
}


@pytest.fixture
def three_tokens(make_tokens):
    def make(part=slice(None), weights_TK=WEIGHTS, domain="", num_extra=0):
        tokens = make_tokens(
            HIDDEN[part],
            EXPERTS,
            torch.zeros(len(HIDDEN[part]), 4),
            2,
            lambda logits, top_k: (INDEX[part], weights_TK[part]),
            None,
            num_extra,
        )
        tokens.domain = domain
        return tokens

    return make


def figures(*batches, outputs=False):
    sums = ExpertSums(batches[0].layer, outputs=outputs)
    for tokens in batches:
        sums.update(tokens)
    return sums.tensors()


# By hand ---------------------------------------------------------------------------------------------------


def test_by_hand(three_tokens):
    found = figures(three_tokens(), outputs=True)
    for name, expected in BY_HAND.items():
        assert found[f"sums.{name}"].dtype == torch.float64
        torch.testing.assert_close(found[f"sums.{name}"], torch.tensor([expected], dtype=torch.float64), msg=name)
    assert found["sums.output"].tolist() == [[[9.0, 14.0], [6.0, 12.0], [-6.0, -8.0], [0.0, 0.0]]]
    # the layer answers (3, 4), (0, 1) and (0, 0)
    assert found["batch.squared_output"].tolist() == pytest.approx([26.0])
    assert found["batch.num_tokens"].tolist() == [3]
    assert found["batch.domain"].tolist() == [0]


def test_nothing_but_what_was_asked_for(three_tokens):
    names = {f"sums.{name}" for name in (*SUMS, "largest")}
    names |= {"batch.squared_output", "batch.num_tokens", "batch.domain"}
    assert figures(three_tokens()).keys() == names
    assert figures(three_tokens(), outputs=True).keys() == names | {"sums.output", "sums.spread"}


def test_domains_are_kept_apart_in_order_of_first_appearance(three_tokens):
    last, first, middle = (three_tokens(slice(i, i + 1), domain=name) for i, name in ((2, "b"), (0, "a"), (1, "b")))
    found = figures(last, first, middle, outputs=True)
    assert found["sums.tokens"].tolist() == [[2.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]]
    assert found["sums.norm"].tolist() == [[12.0, 4.0, 10.0, 0.0], [5.0, 10.0, 0.0, 0.0]]
    assert found["sums.largest"].tolist() == [[8.0, 4.0, 8.0, 0.0], [4.0, 8.0, 0.0, 0.0]]
    assert found["sums.output"][:, 0].tolist() == [[6.0, 10.0], [3.0, 4.0]]
    assert found["batch.domain"].tolist() == [0, 1, 0]
    assert found["batch.squared_output"].tolist() == pytest.approx([0.0, 25.0, 1.0])


def test_a_domain_whose_tokens_never_come_here(three_tokens):
    found = figures(three_tokens(slice(0, 0), domain="images"), three_tokens(domain="text"), outputs=True)
    assert found["sums.tokens"].tolist() == [[0.0] * 4, [3.0, 2.0, 1.0, 0.0]]
    assert found["sums.output"][:, 0].tolist() == [[0.0, 0.0], [9.0, 14.0]]
    assert found["batch.num_tokens"].tolist() == [0, 3]


def test_a_target_is_what_the_output_is_measured_by(three_tokens):
    tokens = three_tokens()
    tokens.target_TH = torch.tensor([[1.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    assert figures(tokens)["batch.squared_output"].tolist() == [9.0]


def test_weights_of_zero_have_no_share(three_tokens):
    weights_TK = WEIGHTS.clone()
    weights_TK[0] = 0.0
    found = figures(three_tokens(weights_TK=weights_TK))
    assert found["sums.share"][0].tolist() == pytest.approx([1.25, 0.25, 0.5, 0.0])
    assert found["sums.tokens"].tolist() == [[3.0, 2.0, 1.0, 0.0]]


def test_what_is_no_expert_is_not_counted(three_tokens):
    """Its weight still counts in the shares of the others."""
    found = figures(three_tokens(num_extra=2), outputs=True)
    for name, expected in BY_HAND.items():
        assert found[f"sums.{name}"][0].tolist() == pytest.approx(expected[:2]), name
    assert found["sums.output"].shape == (1, 2, 2)


# Against the slow way --------------------------------------------------------------------------------------


def slow_sums(index_TK, weights_TK, outputs_TEH, num_experts):
    """Token by token, expert by expert."""
    found = {name: [0.0] * num_experts for name in (*SUMS, "largest")}
    for index_K, weights_K, outputs_EH in zip(
        index_TK.tolist(), weights_TK.double().tolist(), outputs_TEH, strict=True
    ):
        for expert, g in zip(index_K, weights_K, strict=True):
            if expert >= num_experts:
                continue
            f, s = outputs_EH[expert].double(), g / sum(weights_K)
            norm = float(f.norm())
            values = (1.0, g, s, norm, norm**2, g * norm, (g * norm) ** 2, s * norm)
            for name, value in zip(SUMS, values, strict=True):
                found[name][expert] += value
            found["largest"][expert] = max(found["largest"][expert], float(f.abs().max()))
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


@pytest.mark.parametrize("router", routers.ROUTERS)
@pytest.mark.parametrize("num_extra", [0, 2])
def test_every_router(make_tokens, router, num_extra):
    tokens = routers.random_tokens(make_tokens, router, 30, 6, 3, seed=1, num_extra=num_extra)
    everything_TE = torch.arange(tokens.layer.num_choices).expand(30, -1)
    outputs_TEH = tokens.evaluate_experts(tokens.hidden_TH, everything_TE)
    found = figures(tokens)
    for name, expected in slow_sums(tokens.index_TK, tokens.weights_TK, outputs_TEH, 6).items():
        torch.testing.assert_close(found[f"sums.{name}"][0], expected, rtol=1e-5, atol=1e-12, msg=name)


LENGTHS = (21, 9, 5, 1)


def observed(moe, batches):
    return observe(moe, batches, {layer.path: ExpertSums(layer, outputs=True) for layer in moe.layers}, Progress())


@torch.no_grad()
@pytest.mark.parametrize("name", FEW)
def test_real_models(name):
    """From the weights alone, in float64, on what the last block is given; with padding between the tokens."""
    moe = MoEModel(tiny_model(name))
    [batch] = make_batches([token_ids(length, seed=length) for length in LENGTHS], batch_size=4)
    found, layer = observed(moe, [batch])[moe.layers[-1].path], moe.layers[-1]
    block, given = moe.model.get_submodule(layer.path), []
    hook = block.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    moe.model(**model_inputs(moe.model, batch))
    hook.remove()
    hidden_TH = given[0].view(*batch.attention_mask.shape, -1)[batch.attention_mask]
    weights_TE, outputs_TEH = routing_weights(name, block, hidden_TH), expert_outputs(name, block, hidden_TH)
    weights_TK, index_TK = weights_TE.topk(layer.top_k)
    for figure, expected in slow_sums(index_TK, weights_TK, outputs_TEH, layer.num_experts).items():
        torch.testing.assert_close(found[f"sums.{figure}"][0], expected, rtol=2e-5, atol=1e-6, msg=figure)
    summed_EH = ((weights_TE > 0)[..., None] * outputs_TEH).sum(0)
    torch.testing.assert_close(found["sums.output"][0].double(), summed_EH, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "deepseek_v3", "deepseek4"])
def test_padding_counts_nowhere(name):
    """Sequences of unequal lengths padded into one batch, and each by itself."""
    moe, rows = MoEModel(tiny_model(name)), [token_ids(length, seed=length) for length in LENGTHS]
    together, apart = (observed(moe, make_batches(rows, batch_size=size)) for size in (4, 1))
    for path, figures_of in together.items():
        assert figures_of["batch.num_tokens"].tolist() == [sum(LENGTHS)]
        assert apart[path]["batch.num_tokens"].tolist() == list(LENGTHS)
        for figure, tensor in figures_of.items():
            if figure.startswith("sums."):
                torch.testing.assert_close(apart[path][figure], tensor, rtol=1e-4, atol=1e-5, msg=figure)


def test_domains_of_batches():
    moe = MoEModel(tiny_model("mixtral"))
    one, other = (make_batches([token_ids(9, seed=seed)], 1)[0] for seed in (1, 2))
    apart = observed(moe, [TokenBatch(b.input_ids, b.attention_mask, d) for b, d in ((one, "code"), (other, "prose"))])
    together = observed(moe, [one, other])
    for path, found in apart.items():
        assert found["batch.domain"].tolist() == [0, 1]
        assert found["sums.tokens"].sum(1).tolist() == [18.0, 18.0]
        for name in SUMS:
            torch.testing.assert_close(found[f"sums.{name}"].sum(0), together[path][f"sums.{name}"][0])
