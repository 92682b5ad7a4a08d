"""Masking leaves no trace, keeping all changes nothing, and removing is masking."""

from __future__ import annotations

import weakref

import pytest
import torch
from by_hand import ROUTING, choose, correction_bias, router_logits
from tiny_models import FEW, keep_six, tiny_model, token_ids
from torch.overrides import _get_current_function_mode_stack
from traces import assert_untouched, traces

from compressor import MoEModel, UnsupportedModelError
from compressor.model.uneven import slice_layer

IDS = token_ids(3, 17)
ATTENTION_MASK = torch.ones_like(IDS)
ATTENTION_MASK[1, 12:] = 0


@torch.no_grad()
def logits(model):
    """Of real tokens."""
    return model(IDS, attention_mask=ATTENTION_MASK).logits[ATTENTION_MASK.bool()]


@pytest.mark.parametrize("name", FEW)
def test_keeping_all_changes_no_logit(name):
    moe = MoEModel(tiny_model(name))
    every = {layer.path: range(layer.num_experts) for layer in moe.layers}
    before = logits(moe.model)
    with moe.masked(every):
        assert torch.equal(logits(moe.model), before)
    moe.keep(every)
    assert torch.equal(logits(moe.model), before)


@pytest.mark.parametrize("name", FEW)
def test_masking_leaves_no_trace(name):
    moe = MoEModel(tiny_model(name))
    before, untouched = traces(moe.model), logits(moe.model)
    with moe.masked(keep_six(moe)):
        masked = logits(moe.model)
    assert not torch.equal(masked, untouched)
    assert_untouched(moe.model, before)
    assert torch.equal(logits(moe.model), untouched)

    with pytest.raises(ZeroDivisionError), moe.masked(keep_six(moe)):  # noqa: PT012
        logits(moe.model)
        raise ZeroDivisionError
    assert_untouched(moe.model, before)

    router = moe.model.get_submodule(moe.layers[1].router)
    breaks = router.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), moe.masked(keep_six(moe)):
        logits(moe.model)
    breaks.remove()
    assert_untouched(moe.model, before)
    assert torch.equal(logits(moe.model), untouched)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3", "deepseek4"])
def test_router_that_fails_within_its_forward(name):
    """The mask that is in force inside a router does not outlive a failure there."""
    moe = MoEModel(tiny_model(name))
    before, untouched = traces(moe.model), logits(moe.model)
    router = moe.model.get_submodule(moe.layers[0].router)
    with moe.masked(keep_six(moe)):
        masked = logits(moe.model)
        with pytest.raises(RuntimeError):
            router(torch.zeros(3, 5, 7))  # of the wrong width
        assert torch.equal(logits(moe.model), masked)
    assert_untouched(moe.model, before)
    assert torch.equal(logits(moe.model), untouched)


@pytest.mark.parametrize("name", FEW)
def test_masking_one_layer_of_several_and_masks_within_masks(name):
    moe = MoEModel(tiny_model(name))
    first, second = moe.layers[0].path, moe.layers[1].path
    kept = keep_six(moe)
    with moe.masked({first: kept[first]}), moe.masked({second: kept[second]}):
        nested = logits(moe.model)
    with moe.masked({path: kept[path] for path in (first, second)}):
        assert torch.equal(logits(moe.model), nested)
    with moe.masked({first: [0, 1, 2, 3, 4, 5, 6, 7]}), moe.masked({first: kept[first]}):
        once = logits(moe.model)
    with moe.masked({first: kept[first]}):
        assert torch.equal(logits(moe.model), once)


@pytest.mark.parametrize("name", FEW)
def test_removed_equals_masked(name):
    moe = MoEModel(tiny_model(name))
    untouched = logits(moe.model)
    with moe.masked(keep_six(moe)):
        masked = logits(moe.model)
    moe.keep(keep_six(moe))
    removed = logits(moe.model)
    relative = (removed - masked).norm(dim=-1) / masked.norm(dim=-1)
    assert relative.max() < 2e-6
    assert ((masked - untouched).norm(dim=-1) / untouched.norm(dim=-1)).max() > 0.1  # there is something to see


@pytest.mark.parametrize("name", FEW)
def test_removed_equals_masked_in_bfloat16_but_for_ties(name):
    """A router of six rows may round otherwise than one of eight. Every token answers alike, but those whose choice
    hangs on that rounding in some layer, and those that attend to such a token.
    """
    moe = MoEModel(tiny_model(name, "bfloat16"))
    kept = keep_six(moe)
    with moe.masked(kept), chosen_experts(moe) as masked_choices:
        masked = logits(moe.model).double()
    original = {layer.path: moe.model.get_submodule(layer.path) for layer in moe.layers}
    ranked = {path: (router_weights_of(block), kept[path]) for path, block in original.items()}
    moe.keep(kept)
    with chosen_experts(moe) as removed_choices:
        removed = logits(moe.model).double()

    explained = torch.zeros_like(ATTENTION_MASK, dtype=torch.bool)
    for path, (logits_of, ids) in ranked.items():
        for (row, column), experts in masked_choices[path].items():
            now = {ids[expert] for expert in removed_choices[path][row, column][0]}
            if now == experts[0] or explained[row, : column + 1].any():
                continue
            assert is_tie(name, logits_of(experts[1]), ids, experts[0], now), (path, row, column)
            explained[row, column] = True
    explained = explained.cumsum(1).bool()[ATTENTION_MASK.bool()]
    relative = (removed - masked).norm(dim=-1) / masked.norm(dim=-1)
    assert relative[~explained].max() < 5e-2
    assert explained.float().mean() < 0.5


def router_weights_of(block):
    """Hidden state [H] → (logits [E] float64, correction biases), of the router as it is now."""
    import copy

    frozen = copy.deepcopy(block)
    return lambda hidden_H: (router_logits(frozen, hidden_H[None])[0].tolist(), correction_bias(frozen))


def is_tie(name, logits_and_bias, ids, chosen, now, num_draws=400):
    """Whether rounding a logit to bfloat16 (8 bits: relative error 2⁻⁸) can lead to both choices."""
    values, bias = logits_and_bias
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(num_draws):
        noise = 1 + (torch.rand(len(values), generator=generator) * 2 - 1) * 2**-7
        found.append(set(choose(ROUTING[name], [v * float(n) for v, n in zip(values, noise, strict=True)], bias, ids)))
    return chosen in found and now in found


class chosen_experts:
    """Records path → {(row, column): (set of chosen experts, the router's input)} while the model runs."""

    def __init__(self, moe):
        self.moe = moe

    def __enter__(self):
        self.found = {layer.path: {} for layer in self.moe.layers}
        self.hooks = [
            self.moe.model.get_submodule(layer.router).register_forward_hook(self._recorder(layer))
            for layer in self.moe.layers
        ]
        return self.found

    def _recorder(self, layer):
        def record(_, args, output):
            hidden_TH = args[0].reshape(-1, args[0].shape[-1])
            position = layer.router_probe.index_position
            index = output.float().topk(layer.top_k).indices if position is None else output[position]
            rows = zip(ATTENTION_MASK.nonzero().tolist(), ATTENTION_MASK.flatten().nonzero()[:, 0], strict=True)
            for place, token in rows:
                self.found[layer.path][tuple(place)] = (
                    set(index.view(-1, layer.top_k)[token].tolist()),
                    hidden_TH[token],
                )

        return record

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


# What else a model may be in when it is pruned -------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3", "deepseek4"])
def test_batch_of_one_token(name):
    moe = MoEModel(tiny_model(name))
    ids = token_ids(1, 1)
    with torch.no_grad():
        with moe.masked(keep_six(moe)):
            masked = moe.model(input_ids=ids).logits
        moe.keep(keep_six(moe))
        torch.testing.assert_close(moe.model(input_ids=ids).logits, masked, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3", "mixtral4", "deepseek4"])
def test_gradients_before_during_and_after(name):
    model = tiny_model(name).train()
    moe = MoEModel(model)
    before = traces(model)
    model(IDS).logits.sum().backward()
    with moe.masked(keep_six(moe)):
        loss = model(IDS).logits.sum()
    loss.backward()
    assert_untouched(model, before)
    dropped = [e for e in range(8) if e not in keep_six(moe)[moe.layers[0].path]]
    router = moe.model.get_submodule(moe.layers[0].router)
    model.zero_grad()
    with moe.masked(keep_six(moe)):
        model(IDS).logits.square().sum().backward()
    assert router.weight.grad is None or not router.weight.grad[dropped].any()
    moe.keep(keep_six(moe))
    assert model.training
    model(IDS).logits.square().sum().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    frozen = MoEModel(tiny_model(name).requires_grad_(False))
    frozen.keep(keep_six(frozen))
    assert not any(p.requires_grad for p in frozen.model.parameters())


def test_tied_embeddings_stay_tied():
    from tiny_models import random_model

    model = random_model("mixtral", tie_word_embeddings=True)
    moe = MoEModel(model)
    moe.keep(keep_six(moe))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_every_way_of_running_experts(name, implementation):
    model = tiny_model(name)
    model.set_experts_implementation(implementation)
    moe = MoEModel(model)
    with moe.masked(keep_six(moe)):
        masked = logits(model)
    moe.keep(keep_six(moe))
    assert ((logits(model) - masked).norm(dim=-1) / masked.norm(dim=-1)).max() < 2e-6


def test_masked_layer_must_exist():
    moe = MoEModel(tiny_model("mixtral"))
    with pytest.raises(KeyError, match=r"no MoE layer at 'model.layers.9.mlp'; the layers are \['model.layers.0.mlp'"):
        moe.masked({"model.layers.9.mlp": [0, 1]}).__enter__()


def test_router_without_a_linear_map_cannot_be_masked():
    moe = MoEModel(tiny_model("mixtral"))
    router = moe.model.get_submodule(moe.layers[0].router)
    router.forward = lambda hidden: (None, torch.ones(len(hidden), 2), torch.zeros(len(hidden), 2, dtype=torch.int64))
    with pytest.raises(UnsupportedModelError) as error, moe.masked(keep_six(moe)):
        logits(moe.model)
    assert str(error.value) == (
        "model.layers.0.mlp.gate: saw no linear map with its weights inside its forward, so logits are unknown."
    )
    assert _get_current_function_mode_stack() == []


def test_of_the_weights_before_an_edit_one_layer_is_there_at_a_time(monkeypatch):
    moe = MoEModel(tiny_model("mixtral"))
    before = [weakref.ref(moe.model.get_parameter(next(iter(layer.tensors)))) for layer in moe.layers]
    there = []

    def counted(*args):
        there.append(sum(ref() is not None for ref in before))
        return slice_layer(*args)

    monkeypatch.setattr("compressor.model.moe_model.slice_layer", counted)
    moe.keep({layer.path: range(layer.num_experts) for layer in moe.layers})
    assert there == [3, 2, 1]
