"""Watching: the model answers as before, and what a statistic is given is what the weights say."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from by_hand import expert_outputs, router_logits, routing_weights, weighted_sum
from tiny_models import FEW, keep_six, tiny_model, token_ids
from traces import assert_untouched, traces

from compressor import CheckpointError, MoEModel, UnsupportedModelError
from compressor.model.routed_tokens import RealTokens

IDS = token_ids(3, 19)
ATTENTION_MASK = torch.ones_like(IDS)
ATTENTION_MASK[0, 11:] = 0
ATTENTION_MASK[2, 16:] = 0
REAL = ATTENTION_MASK.bool()


@torch.no_grad()
def watch(moe, visitor, ids=IDS, mask=ATTENTION_MASK):
    """Logits of real tokens, with `visitor` at every layer."""
    real = RealTokens(mask.bool().flatten())
    with moe.watched({layer.path: visitor for layer in moe.layers}, real):
        return moe.model(ids, attention_mask=mask).logits[mask.bool()]


@torch.no_grad()
def logits(moe, ids=IDS, mask=ATTENTION_MASK):
    return moe.model(ids, attention_mask=mask).logits[mask.bool()]


def inputs_of_blocks(moe, ids=IDS, mask=ATTENTION_MASK):
    """path → what the block is given at real tokens [T, H]; from a plain run."""
    found = {}

    def recorder(path):
        def record(_, args, kwargs):
            hidden = args[0] if args else kwargs["hidden_states"]
            found[path] = hidden[mask.bool()]

        return record

    with ExitStack() as stack:
        for layer in moe.layers:
            block = moe.model.get_submodule(layer.path)
            stack.callback(block.register_forward_pre_hook(recorder(layer.path), with_kwargs=True).remove)
        logits(moe, ids, mask)
    return found


def all_outputs(tokens, num_ranks=8):
    """(expert ids, outputs) of every token, put together from the chunks."""
    chunks = list(tokens.ranked_outputs(num_ranks))
    assert [chunk.start for chunk in chunks] == [0, *(chunk.stop for chunk in chunks[:-1])]
    assert chunks[-1].stop == tokens.num_tokens
    return torch.cat([chunk.order_cM for chunk in chunks]), torch.cat([chunk.outputs_cMH for chunk in chunks])


@pytest.mark.parametrize(("dtype", "num_ranks"), [("float32", 0), ("float32", 3), ("float32", 8), ("bfloat16", 8)])
@pytest.mark.parametrize("name", FEW)
def test_model_answers_as_before(name, dtype, num_ranks):
    """To rounding: the layer's output is put together from the outputs that the visitor asked for, if any."""
    moe = MoEModel(tiny_model(name, dtype))
    before, untouched = traces(moe.model), logits(moe)
    watched = watch(moe, lambda tokens: all_outputs(tokens, num_ranks) if num_ranks else None)
    assert_untouched(moe.model, before)
    assert torch.equal(logits(moe), untouched)
    if not num_ranks or moe.layers[0].is_list:
        assert torch.equal(watched, untouched)
    relative = (watched - untouched).double().norm(dim=-1) / untouched.double().norm(dim=-1)
    # in half precision the sum over experts is rounded elsewhere; a choice that hangs on it may fall anew
    assert relative.median() < (1e-6 if dtype == "float32" else 1e-2)
    assert (relative < (2e-6 if dtype == "float32" else 5e-2)).double().mean() >= (1.0 if dtype == "float32" else 0.8)


@pytest.mark.parametrize("name", FEW)
def test_what_a_statistic_is_given(name):
    """Against plain loops over tokens and experts, in float64."""
    moe = MoEModel(tiny_model(name))
    hidden = inputs_of_blocks(moe)
    seen = []

    def compare(tokens):
        path = tokens.layer.path
        block = moe.model.get_submodule(path)
        assert tokens.num_tokens == int(REAL.sum())
        assert tokens.index_TK.dtype == torch.int64
        assert tokens.logits_TE.dtype == torch.float32
        torch.testing.assert_close(tokens.hidden_TH, hidden[path], rtol=1e-5, atol=1e-5)
        x_TH = tokens.hidden_TH
        torch.testing.assert_close(tokens.logits_TE.double(), router_logits(block, x_TH), rtol=1e-5, atol=1e-5)
        weights_TE = routing_weights(name, block, x_TH)
        given_TE = torch.zeros_like(weights_TE).scatter_(1, tokens.index_TK, tokens.weights_TK.double())
        torch.testing.assert_close(given_TE, weights_TE, rtol=1e-5, atol=1e-6)
        outputs_TEH = expert_outputs(name, block, x_TH)
        order_TM, outputs_TMH = all_outputs(tokens)
        assert outputs_TMH.dtype == torch.float32
        expected_TMH = outputs_TEH.gather(1, order_TM[..., None].expand(outputs_TMH.shape))
        torch.testing.assert_close(outputs_TMH.double(), expected_TMH, rtol=1e-5, atol=1e-5)
        routed_TH = weighted_sum(weights_TE, outputs_TEH)
        torch.testing.assert_close(tokens.output_TH.double(), routed_TH, rtol=1e-5, atol=1e-5)
        seen.append(path)

    watch(moe, compare)
    assert seen == [layer.path for layer in moe.layers]


@pytest.mark.parametrize("name", FEW)
def test_order(name):
    """The chosen experts first, then the rest by rank; each expert once."""
    moe = MoEModel(tiny_model(name))

    def look(tokens):
        order_TE = tokens.order(8)
        assert torch.equal(order_TE.sort(1).values, torch.arange(8).expand(tokens.num_tokens, -1))
        assert torch.equal(order_TE[:, :2], tokens.index_TK)
        for num_ranks in (1, 2, 3, 7):
            assert torch.equal(tokens.order(num_ranks), order_TE[:, :num_ranks])
        if tokens.rule is not None:
            ranking_TE = tokens.rule.ranking(tokens.rule.affinity(tokens.logits_TE))
            ranked = ranking_TE.gather(1, order_TE)
            assert (ranked[:, 2:].diff(dim=1) <= 0).all()
            if tokens.rule.groups is None:
                assert (ranked[:, :2].min(1).values >= ranked[:, 2]).all()

    watch(moe, look)


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3", "glm4_moe", "deepseek4"])
def test_shared_experts_are_not_counted(name):
    """The block's whole output is the routed one and the shared one."""
    moe = MoEModel(tiny_model(name))
    layer = moe.layers[0]
    block = moe.model.get_submodule(layer.path)
    shared = block.shared_expert if name == "qwen2_moe" else block.shared_experts
    outputs, routed, own = [], [], []
    hooks = [
        block.register_forward_hook(lambda *hook: outputs.append(hook[2][REAL])),
        shared.register_forward_hook(lambda *hook: own.append(hook[2].reshape(*IDS.shape, -1)[REAL])),
    ]

    def visit(tokens):
        if tokens.layer is layer:
            all_outputs(tokens)
            gate = torch.sigmoid(block.shared_expert_gate(tokens.hidden_TH)) if name == "qwen2_moe" else 1.0
            routed.append((tokens.output_TH, gate))

    watch(moe, visit)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(routed[0][0] + routed[0][1] * own[0], outputs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FEW)
def test_padding_changes_no_figure(name):
    """The same sequence alone, padded with zeros, and padded with other ids."""
    moe = MoEModel(tiny_model(name))
    ids = token_ids(2, 13, seed=5)
    figures = []

    def run(padded, mask):
        found = []

        def visit(tokens):
            found.append((tokens.index_TK, tokens.weights_TK, tokens.logits_TE, *all_outputs(tokens), tokens.output_TH))

        watch(moe, visit, padded, mask)
        figures.append(found)

    run(ids, torch.ones_like(ids))
    mask = torch.cat([torch.ones_like(ids), torch.zeros(2, 6, dtype=torch.int64)], dim=1)
    run(torch.cat([ids, torch.zeros(2, 6, dtype=torch.int64)], dim=1), mask)
    run(torch.cat([ids, token_ids(2, 6, seed=6)], dim=1), mask)
    for other in figures[1:]:
        for alone, padded in zip(figures[0], other, strict=True):
            for a, b in zip(alone, padded, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FEW)
def test_replay_is_what_fewer_experts_would_be_chosen_by(name):
    """Run within a watched forward, for any set; against plain loops that never knew the other experts."""
    moe = MoEModel(tiny_model(name))
    before, seen = traces(moe.model), []

    def compare(tokens):
        block = moe.model.get_submodule(tokens.layer.path)
        for kept in (range(8), keep_six(moe)[tokens.layer.path], [1, 2, 4, 7]):
            index, weights = tokens.replay(kept)
            expected_TE = routing_weights(name, block, tokens.hidden_TH, kept)
            found_TE = torch.zeros_like(expected_TE).scatter_(1, index, weights.double())
            torch.testing.assert_close(found_TE, expected_TE, rtol=1e-5, atol=1e-6)
            seen.append(kept)

    watch(moe, compare)
    assert len(seen) == 3 * len(moe.layers)
    assert_untouched(moe.model, before)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3", "mixtral4", "deepseek4"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1)])
def test_few_tokens(name, shape):
    moe = MoEModel(tiny_model(name))
    ids = token_ids(*shape)
    mask = torch.ones_like(ids)
    counts = []
    watched = watch(moe, lambda tokens: (counts.append(tokens.num_tokens), all_outputs(tokens)), ids, mask)
    torch.testing.assert_close(watched, logits(moe, ids, mask), rtol=1e-4, atol=1e-5)
    assert counts == [ids.numel()] * len(moe.layers)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_every_way_of_running_experts(name, implementation):
    model = tiny_model(name)
    model.set_experts_implementation(implementation)
    moe = MoEModel(model)
    watched = watch(moe, all_outputs)
    torch.testing.assert_close(watched, logits(moe), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "mixtral4", "deepseek4"])
def test_failure_within_leaves_no_trace(name):
    moe = MoEModel(tiny_model(name))
    before, untouched = traces(moe.model), logits(moe)
    with pytest.raises(ZeroDivisionError):
        watch(moe, lambda tokens: 1 / 0)
    assert_untouched(moe.model, before)
    breaks = moe.model.get_submodule(moe.layers[1].router).register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        watch(moe, all_outputs)
    breaks.remove()
    assert_untouched(moe.model, before)
    assert torch.equal(logits(moe), untouched)


def test_forward_that_others_have_wrapped_comes_back():
    """accelerate puts its own forward on the instance to move weights between devices."""
    moe = MoEModel(tiny_model("mixtral"))
    experts = moe.model.get_submodule(moe.layers[0].experts)
    calls = []
    original = experts.forward

    def wrapped(*args):
        calls.append(1)
        return original(*args)

    experts.forward = wrapped
    watch(moe, all_outputs)
    assert experts.forward is wrapped
    assert calls


@pytest.mark.parametrize("name", ["mixtral", "deepseek4", "mixtral4"])
def test_model_that_is_trained(name):
    """Outside no_grad and with weights that want gradients, watching does not disturb a backward pass."""
    moe = MoEModel(tiny_model(name).train())
    real = RealTokens(REAL.flatten())
    with moe.watched({layer.path: all_outputs for layer in moe.layers}, real):
        moe.model(IDS, attention_mask=ATTENTION_MASK).logits.square().sum().backward()
    assert moe.model.lm_head.weight.grad is not None
    if name != "deepseek4":  # its experts run without gradients
        assert moe.model.get_submodule(moe.layers[0].router).weight.grad is not None


# Refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "mixtral4"])
def test_mask_of_another_batch(name):
    moe = MoEModel(tiny_model(name))
    path = moe.layers[0].path
    for mask, found in ((None, "None"), (torch.ones(5, dtype=torch.bool), "5")):
        with pytest.raises(UnsupportedModelError) as error, moe.watched({path: all_outputs}, RealTokens(mask)):
            moe.model(IDS)
        assert str(error.value) == (
            f"{path}: its experts are given 57 tokens where the batch has {found}, so padding cannot be told from text."
        )


@pytest.mark.parametrize("name", ["mixtral", "mixtral4", "deepseek4"])
def test_weights_that_are_not_finite(name):
    moe = MoEModel(tiny_model(name))
    layer = moe.layers[0]
    router = moe.model.get_submodule(layer.router)
    saved = router.weight.detach().clone()
    with torch.no_grad():
        router.weight[3, 4] = float("nan")
    with pytest.raises(CheckpointError) as error:
        watch(moe, all_outputs)
    assert str(error.value) == (
        f"{layer.path}: the router's logits are not finite: damaged weights, or too large for torch.float32."
    )
    with torch.no_grad():
        router.weight.copy_(saved)
        for tensor in moe.model.get_submodule(layer.experts).parameters():
            tensor.mul_(1e30)
    with pytest.raises(CheckpointError) as error:
        watch(moe, all_outputs)
    assert str(error.value) == (
        f"{layer.path}: the experts' output on text is not finite: damaged, or too large for torch.float32."
    )


def test_experts_called_otherwise():
    moe = MoEModel(tiny_model("mixtral"))
    block = moe.model.get_submodule(moe.layers[0].path)
    block.forward = lambda hidden: block.experts(hidden.flatten(0, 1), *block.gate(hidden)[::-1])
    with pytest.raises(UnsupportedModelError) as error:
        watch(moe, all_outputs)
    assert str(error.value) == (
        "model.layers.0.mlp.experts: expected (hidden [T, H], ids [T, K], weights [T, K]), found "
        "[(57, 32), (57, 2), (57, 2), (57, 8)]."
    )
