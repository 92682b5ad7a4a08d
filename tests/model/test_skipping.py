"""Skipping in a live model: equal to weights of 0, off and on, one model at a time, saved and read back."""

from __future__ import annotations

import copy
import inspect
import json
import pickle

import pytest
import tiny_models
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from tiny_models import token_ids, write_token_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import compressor
from compressor import CheckpointError, MoEModel, SkipRule, UnsupportedModelError
from compressor.model.routed_tokens import RealTokens
from compressor.testing.checks import expert_matrix_size, save
from compressor.testing.tiny import answers, tiny_inputs, tiny_model

HALF = SkipRule("ratio", True, beta=0.5)
RULES = {
    "ratio": HALF,
    "tail_mass": SkipRule("tail_mass", True, beta=0.3),
    "contribution": SkipRule("contribution", True, beta=0.5, expert_norms=(1.0, 0.2, 3.0, 1.0, 0.5, 2.0, 1.0, 4.0)),
    "top_k": SkipRule("top_k", True, top_k=2, normalise_over=4),
}


def everywhere(moe, rule=HALF):
    return {layer.path: rule for layer in moe.layers}


def logits(model, ids=None):
    with torch.no_grad():
        return model(token_ids(2, 12) if ids is None else ids).logits


def small(name="qwen3_moe", **changes):
    return MoEModel(tiny_model(name, **{"top_k": 4, **changes}))


# Equal to weights of zero


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "olmoe", "gpt_oss"])
def test_every_rule_equals_weights_of_zero(name, rule):
    moe = small(name, **({"num_experts": 16} if name == "deepseek_v3" and rule != "contribution" else {}))
    inputs = tiny_inputs(moe.model)
    untouched = answers(moe.model, inputs)
    with moe.zeroed(everywhere(moe, RULES[rule])):
        expected = answers(moe.model, inputs)
    assert not torch.equal(expected, untouched)
    moe.skip(everywhere(moe, RULES[rule]))
    torch.testing.assert_close(answers(moe.model, inputs), expected, rtol=1e-4, atol=1e-5)


def test_zeroed_is_what_it_says_by_a_loop_over_experts():
    """The layer's output, expert by expert, with the weights that the rule leaves."""
    moe = small("mixtral")
    (layer, *_) = moe.layers
    block = moe.model.get_submodule(layer.path)
    hidden_TH = torch.randn(30, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, weights_TK, index_TK = block.gate(hidden_TH)
    expected = torch.zeros(30, 64)
    for token in range(30):
        largest = max(weights_TK[token].tolist())
        kept = [i for i in range(4) if float(weights_TK[token, i]) >= 0.5 * largest]
        left = sum(float(weights_TK[token, i]) for i in kept)
        for i in kept:
            expert = int(index_TK[token, i])
            gate, up = (block.experts.gate_up_proj[expert] @ hidden_TH[token]).chunk(2)
            output = block.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
            expected[token] += float(weights_TK[token, i]) / left * output.detach()
    with torch.no_grad():
        with moe.zeroed(everywhere(moe)):
            torch.testing.assert_close(block(hidden_TH[None])[0], expected, rtol=1e-4, atol=1e-5)
        moe.skip(everywhere(moe))
        torch.testing.assert_close(block(hidden_TH[None])[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 2, 300])
def test_one_token_and_many(num_tokens):
    """One token is given fewer experts, many are taken apart into pairs, a thousand at a time."""
    moe = small("mixtral", top_k=8)
    ids = token_ids(1, num_tokens) % 90
    with moe.zeroed(everywhere(moe)):
        expected = logits(moe.model, ids)
    moe.skip(everywhere(moe))
    torch.testing.assert_close(logits(moe.model, ids), expected, rtol=1e-4, atol=1e-4)


class _GroupedRows(TorchDispatchMode):
    """Multiply-adds of grouped matrix products, which the FLOP counter does not know."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "grouped_mm" in str(func):
            kwargs = kwargs or {}
            given, weight = args[0], args[1]
            offsets = args[2] if len(args) > 2 else kwargs["offs"]
            self.total += 2 * int(offsets[-1]) * weight.shape[-2] * weight.shape[-1]
            assert int(offsets[-1]) == len(given), "rows that nobody needs"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_only_pairs_that_stay_are_evaluated(implementation):
    moe = small("mixtral")
    moe.model.requires_grad_(False)
    moe.model.set_experts_implementation(implementation)

    def flops():
        with moe.counted() as counter, FlopCounterMode(display=False) as counted, _GroupedRows() as grouped:
            logits(moe.model)
        return counted.get_total_flops() + grouped.total, counter

    before, _ = flops()
    moe.skip(everywhere(moe))
    after, counter = flops()
    gone = sum(24 * (4 - used) for used in counter.experts_per_token.values())
    assert before - after == pytest.approx(2 * expert_matrix_size(moe.model, moe.layers[0]) * gone)
    assert gone > 10


def test_skipping_nothing_is_the_layers_own_run(monkeypatch):
    """The experts get the very tensors that their block gives them."""
    moe = small("mixtral")
    untouched, given = logits(moe.model), []
    moe.skip(everywhere(moe, HALF.at(1e-30)))
    own = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "grouped_mm", lambda *args: (given.append(args), own(*args))[1])
    assert torch.equal(logits(moe.model), untouched)
    assert [tuple(index.shape) for _, _, index, _ in given] == [(24, 4)] * 3


# Off and on


def test_off_and_on_and_another_threshold():
    moe = small("mixtral")
    untouched = logits(moe.model)
    assert not moe.skips
    assert moe.skip_rules == {}
    moe.skip(everywhere(moe))
    half = logits(moe.model)
    assert moe.skips
    assert moe.skip_rules == everywhere(moe)
    with moe.unskipped():
        assert not moe.skips
        assert moe.skip_rules == everywhere(moe)
        assert torch.equal(logits(moe.model), untouched)
    assert torch.equal(logits(moe.model), half)
    moe.skip({path: rule.at(0.9) for path, rule in moe.skip_rules.items()})
    assert not torch.equal(logits(moe.model), half)
    moe.skip({})
    assert not moe.skips
    assert not hasattr(moe.config, "compressor")
    assert torch.equal(logits(moe.model), untouched)


def test_only_the_layers_named_skip():
    moe = small("mixtral")
    first, *_ = moe.layers
    moe.skip({first.path: HALF})
    with moe.counted() as counter:
        logits(moe.model)
    assert list(counter.experts_per_token) == [first.path]


def test_a_model_of_its_own():
    """Neither another model of the class nor a copy made before or after is concerned."""
    one, other = small("mixtral"), small("mixtral")
    untouched, before = logits(other.model), copy.deepcopy(one.model)
    one.skip(everywhere(one))
    half = logits(one.model)
    after = copy.deepcopy(one.model)
    assert torch.equal(logits(other.model), untouched)
    assert torch.equal(logits(before), untouched)
    assert torch.equal(logits(after), half)
    MoEModel(after).skip({})
    assert torch.equal(logits(after), untouched)
    assert torch.equal(logits(one.model), half)


@pytest.mark.parametrize("rule", ["ratio", "top_k"])
@pytest.mark.parametrize("made", ["copied", "pickled"])
def test_a_copy_has_no_part_in_contexts(made, rule):
    """It skips, though the model that it was made of was paused, and is counted by nobody."""
    moe = small("mixtral")
    rules = everywhere(moe, HALF if rule == "ratio" else SkipRule("top_k", True, top_k=2, normalise_over=8))
    moe.skip(rules)
    half = logits(moe.model)
    with moe.counted() as counter, moe.unskipped():
        twin = copy.deepcopy(moe.model) if made == "copied" else pickle.loads(pickle.dumps(moe.model))
        assert MoEModel(twin).skips
        assert torch.equal(logits(twin), half)
    assert counter.tokens == {}
    assert torch.equal(logits(twin), half)
    MoEModel(twin).skip({})
    assert not MoEModel(twin).skips
    with moe.unskipped():
        assert torch.equal(logits(twin), logits(moe.model))


def test_a_run_on_a_model_that_is_paused(tmp_path):
    """What the run hands out skips, and was measured skipping."""
    moe = small("mixtral", top_k=2)
    tokens = write_token_file(tmp_path / "tokens.jsonl", token_ids(30, 24).tolist())
    text = [{"tokens": str(tokens), "samples": 24}]
    settings = {
        "model": "live",
        "calibration": {"data": text},
        "passes": [{"dynamic_skipping": {}}],
        "evaluate": {"perplexity": text},
    }
    moe.skip(everywhere(moe))
    with moe.unskipped():
        result = compressor.compress(settings, model=moe.model)
    assert MoEModel(result.model).skips
    used = result.record["evaluation"]["after"]["experts_per_token"]["tokens"]
    assert all(number < 1.7 for number in used.values())


def test_nothing_begins_to_skip_within_unskipped():
    moe = small("mixtral")
    first, *_ = moe.layers
    untouched = logits(moe.model)
    moe.skip({first.path: HALF})
    with moe.unskipped():
        moe.skip(everywhere(moe))
        assert not moe.skips
        assert torch.equal(logits(moe.model), untouched)
    assert [state for state in vars(moe.model) if "compressor" in state] == []
    half = logits(moe.model)
    moe.skip(everywhere(moe))
    assert torch.equal(logits(moe.model), half)
    moe.skip({})
    with moe.unskipped():
        moe.skip(everywhere(moe, SkipRule("top_k", True, top_k=2, normalise_over=8)))
        assert torch.equal(logits(moe.model), untouched)
    assert not torch.equal(logits(moe.model), untouched)


@pytest.mark.parametrize("name", ["dbrx", "jetmoe", "llama4_text"])
def test_copies_of_what_is_not_decorated(name):
    moe = small(name, top_k=2)
    inputs = tiny_inputs(moe.model)
    untouched = answers(moe.model, inputs)
    moe.skip(everywhere(moe, HALF.at(0.9)))
    half, after = answers(moe.model, inputs), copy.deepcopy(moe.model)
    moe.skip({})
    assert torch.equal(answers(after, inputs), half)
    MoEModel(after).skip({})
    assert torch.equal(answers(after, inputs), untouched)
    leftover = [key for module in after.modules() for key in module.__dict__ if key in ("forward", "_compressor_skip")]
    assert leftover == []
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in after.modules())


@pytest.mark.parametrize(
    ("name", "renormalise", "dtype"), [("mixtral4", True, "float32"), ("deepseek4", False, "bfloat16")]
)
def test_experts_in_a_list_of_remote_code(name, renormalise, dtype):
    moe = MoEModel(tiny_models.tiny_model(name, dtype))
    moe.model.requires_grad_(False)
    rules = everywhere(moe, SkipRule("ratio", renormalise, beta=0.7))
    untouched = logits(moe.model)
    with moe.zeroed(rules):
        expected = logits(moe.model)
    with FlopCounterMode(display=False) as before:
        logits(moe.model)
    moe.skip(rules)
    with moe.counted() as counter, FlopCounterMode(display=False) as after:
        found = logits(moe.model)
    assert not torch.equal(expected, untouched)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    gone = sum(24 * (2 - used) for used in counter.experts_per_token.values())
    wanted = 2 * expert_matrix_size(moe.model, moe.layers[0]) * gone
    assert before.get_total_flops() - after.get_total_flops() == pytest.approx(wanted)
    moe.skip({})
    assert torch.equal(logits(moe.model), untouched)


def test_a_block_that_hands_its_experts_other_tokens_is_refused():
    moe = MoEModel(tiny_models.tiny_model("mixtral4"))
    moe.skip(everywhere(moe))
    block = moe.model.get_submodule(moe.layers[0].path)
    block.experts[3].register_forward_pre_hook(lambda module, args: (args[0] * 2,), prepend=True)
    with pytest.raises(UnsupportedModelError, match="expert 3 is not given the tokens that its router sent to it"):
        logits(moe.model)


def test_experts_that_share_their_weights_skip_alike():
    moe = small("mixtral")
    first, second, _ = moe.layers
    moe.model.get_submodule(second.path).experts = moe.model.get_submodule(first.path).experts
    moe.skip({first.path: HALF, second.path: HALF})
    with pytest.raises(ValueError, match="share their experts, so they must skip by the same rule"):
        moe.skip({first.path: HALF, second.path: HALF.at(0.3)})


# More choices than the model takes


def test_normalising_over_more_than_the_router_chooses():
    """Two of the router's best four, with the weights that they have among the best eight."""
    moe = small("qwen3_moe", norm_topk_prob=True)
    rules = everywhere(moe, SkipRule("top_k", True, top_k=2, normalise_over=8))
    untouched = logits(moe.model)
    layer = moe.layers[0]
    block = moe.model.get_submodule(layer.path)
    hidden_TH = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    scores_TE = torch.nn.functional.linear(hidden_TH, block.gate.weight).softmax(-1)
    best_T2 = scores_TE.topk(2, dim=-1)  # of all eight the scores add up to 1
    expected = torch.zeros(20, 64)
    for token in range(20):
        for weight, expert in zip(best_T2.values[token], best_T2.indices[token], strict=True):
            gate, up = (block.experts.gate_up_proj[expert] @ hidden_TH[token]).chunk(2)
            output = block.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
            expected[token] += (weight * output).detach()
    moe.skip(rules)
    with torch.no_grad():
        torch.testing.assert_close(block(hidden_TH[None])[0], expected, rtol=1e-4, atol=1e-5)
    assert moe.config.num_experts_per_tok == 4  # as plain readers must find it
    with moe.unskipped():
        assert torch.equal(logits(moe.model), untouched)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("gemma4_text", "reads from the config that it is to name 4 experts"),
        ("deepseek_v4", "names 4 experts, whatever it is asked"),
    ],
)
def test_routers_that_cannot_be_asked_for_more(name, problem):
    moe = small(name)
    with pytest.raises(UnsupportedModelError, match=problem):
        moe.skip(everywhere(moe, SkipRule("top_k", True, top_k=2, normalise_over=6)))
    moe.skip(everywhere(moe, SkipRule("top_k", True, top_k=2, normalise_over=4)))


def test_groups_hold_no_more():
    moe = small("deepseek_v3", num_experts=16)  # two groups, one of them chosen
    with pytest.raises(UnsupportedModelError, match="its router chooses among 8 experts, so it cannot name 9"):
        moe.skip(everywhere(moe, SkipRule("top_k", True, top_k=2, normalise_over=9)))


# Counting


def test_counter_by_hand():
    moe = small("mixtral")
    moe.skip(everywhere(moe))
    layer = moe.layers[0]
    chosen = []
    hook = moe.model.get_submodule(layer.router).register_forward_hook(lambda _, __, out: chosen.append(out[1]))
    with moe.counted() as counter:
        logits(moe.model)
        logits(moe.model, token_ids(1, 5, seed=3))
    hook.remove()
    weights_TK = torch.cat(chosen)
    used = (weights_TK >= 0.5 * weights_TK.amax(1, keepdim=True)).sum()
    assert counter.tokens[layer.path] == 29
    assert counter.experts_per_token[layer.path] == pytest.approx(int(used) / 29)
    logits(moe.model)  # nobody counts here
    assert counter.tokens[layer.path] == 29


def test_padding_does_not_count_wherever_it_stands():
    moe = small("mixtral")
    moe.skip(everywhere(moe))
    ids = token_ids(2, 9)
    with moe.counted() as alone, torch.no_grad():
        moe.model(input_ids=ids)
    for pad in (lambda t: torch.nn.functional.pad(t, (0, 4)), lambda t: torch.nn.functional.pad(t, (4, 0))):
        mask = pad(torch.ones_like(ids))
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with moe.counted() as padded, torch.no_grad():
            moe.model(input_ids=pad(ids), attention_mask=mask, position_ids=positions)
        assert padded.tokens == alone.tokens
        assert padded.experts_per_token == pytest.approx(alone.experts_per_token)


def test_generating_counts_every_token_once():
    """Two prompts of 5 and 8 tokens, padded on the left, and 6 tokens each, of which the last is not read."""
    moe = small("mixtral")
    moe.skip(everywhere(moe))
    ids = token_ids(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with moe.counted() as counter:
        text = moe.model.generate(
            ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None
        )
    assert text.shape == (2, 14)
    assert set(counter.tokens.values()) == {5 + 8 + 2 * 5}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_generating_with_a_cache_of_fixed_size_counts_the_same(name, attention):
    """generate() then hands the model masks of four dimensions; gpt-oss has one more for its window of 8."""
    moe = small(name)
    if name == "mixtral":
        moe.model.set_attn_implementation(attention)
    moe.skip(everywhere(moe))
    ids = token_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with moe.counted() as counter:
        moe.model.generate(
            ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None,
            cache_implementation="static", disable_compile=True,
        )  # fmt: skip
    assert set(counter.tokens.values()) == {5 + 9 + 2 * 3}
    assert not counter.may_count_padding


@pytest.mark.parametrize("kind", ["bool", "least", "-inf", "-10000"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_masks_of_who_sees_whom(kind, side):
    moe = small("mixtral")
    moe.skip(everywhere(moe))
    ids, real = token_ids(2, 6), torch.ones(2, 6, dtype=torch.bool)
    real[0, : 2 if side == "left" else 0] = False
    real[0, 6 if side == "left" else 4 :] = False
    sees = torch.ones(6, 6, dtype=torch.bool).tril() & real[:, None, None, :]
    hidden = {"bool": None, "least": torch.finfo(torch.float32).min, "-inf": float("-inf"), "-10000": -10000.0}[kind]
    mask = sees if hidden is None else torch.zeros(2, 1, 6, 6).masked_fill(~sees, hidden)
    with moe.counted() as counter, torch.no_grad():
        cache = DynamicCache(config=moe.model.config)
        named = "cache" if "cache" in inspect.signature(moe.model.forward).parameters else "past_key_values"
        moe.model(ids[:, :4], attention_mask=mask[:, :, :4, :4], **{named: cache})
        moe.model(ids[:, 4:], attention_mask=mask[:, :, 4:], **{named: cache})
    assert set(counter.tokens.values()) == {10}
    assert not counter.may_count_padding


def test_a_mask_that_does_not_tell_is_said_to():
    moe = small("mixtral")
    moe.skip(everywhere(moe))
    ids = token_ids(1, 6)
    with moe.counted() as counter, torch.no_grad():
        moe.model(ids, attention_mask=torch.zeros(1, 1, 6, 6, dtype=torch.int64))
    assert set(counter.tokens.values()) == {6}
    assert counter.may_count_padding


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_what_gradient_checkpointing_computes_anew_is_not_counted_again():
    moe = small("mixtral")
    moe.skip(everywhere(moe))
    moe.model.train()
    moe.model.gradient_checkpointing_enable()
    ids = token_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    with moe.counted() as counter:
        moe.model(ids, attention_mask=mask, use_cache=False).logits.sum().backward()
    assert set(counter.tokens.values()) == {10}


def test_generate_with_a_cache_is_generate_without():
    moe = small("mixtral")
    moe.skip(everywhere(moe))
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = token_ids(3, 6)
    assert torch.equal(moe.model.generate(ids, **settings), moe.model.generate(ids, use_cache=False, **settings))


# torch.compile


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
def test_compiled_answers_as_uncompiled():
    """With graph breaks, as for any code whose shapes depend on data."""
    moe = small("mixtral")
    moe.skip(everywhere(moe))
    expected = logits(moe.model)
    torch._dynamo.reset()
    compiled = torch.compile(moe.model, backend="eager")
    torch.testing.assert_close(logits(compiled), expected, rtol=1e-4, atol=1e-5)
    with moe.unskipped():
        torch.testing.assert_close(logits(compiled), logits(moe.model), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="depends on the data; compile without fullgraph=True"):
        logits(torch.compile(moe.model, backend="eager", fullgraph=True))
    torch._dynamo.reset()


# Saved, and read back


def test_loaded_again_with_us_and_without(tmp_path):
    moe = small("mixtral")
    untouched = logits(moe.model)
    moe.skip(everywhere(moe))
    half = logits(moe.model)
    save(moe, tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["compressor"]
    assert entry == {
        "format": 1,
        "skipping": {
            "version": 1,
            "layers": {layer.path: {"rule": "ratio", "renormalise": True, "beta": 0.5} for layer in moe.layers},
        },
    }
    model, _ = compressor.load(tmp_path)
    torch.testing.assert_close(logits(model), half, rtol=1e-4, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(plain), untouched, rtol=1e-4, atol=1e-4)
    assert compressor.restore(plain) is plain
    torch.testing.assert_close(logits(plain), half, rtol=1e-4, atol=1e-4)


def write_with_entry(folder, **changes):
    """A model that skips, whose entry in config.json says something else."""
    moe = small("mixtral")
    moe.skip(everywhere(moe))
    save(moe, folder)
    config = json.loads((folder / "config.json").read_text())
    config["compressor"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"version": 2, "layers": {}}, r"`compressor.skipping` should be \{\"version\": 1.*found version 2"),
        ({"version": 1, "layers": []}, "should be"),
        ({"version": True, "layers": {}}, "found version True"),
        ({"layers": {}}, "found version None and the keys layers"),
        ({"version": 1, "layers": {}, "shared": True}, "found version 1 and the keys version, layers, shared. A newer"),
        ({"version": 1, "layers": {"model.layers.0.mlp": HALF.to_json() | {"beta": 10**400}}}, "`beta` should be a"),
        ([], r"`compressor` should be \{\"format\": 1, \"skipping\""),
        ({"version": 1, "layers": {"model.layers.9.mlp": HALF.to_json()}}, "no MoE layer 'model.layers.9.mlp'"),
        ({"version": 1, "layers": {"model.layers.0.mlp": 0.5}}, "model.layers.0.mlp: a rule has the keys"),
        ({"version": 1, "layers": {"model.layers.0.mlp": HALF.to_json() | {"beta": 2}}}, "up to 1, found 2"),
        (
            {"version": 1, "layers": {"model.layers.0.mlp": RULES["contribution"].to_json() | {"expert_norms": [1.0]}}},
            "the rule knows 1 experts, the layer has 8",
        ),
    ],
)
def test_damaged_rules_are_refused(tmp_path, part, message):
    write_with_entry(tmp_path, skipping=part)
    with pytest.raises(CheckpointError, match=message):
        compressor.load(tmp_path)


@pytest.mark.parametrize("number", [1.0, True])
def test_a_format_is_a_whole_number(tmp_path, number):
    write_with_entry(tmp_path, format=number)
    with pytest.raises(CheckpointError, match=r"`compressor` should be \{\"format\": 1"):
        compressor.load(tmp_path)


def test_an_unknown_part_of_our_key_is_of_a_newer_version(tmp_path):
    save(small("mixtral"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"compressor": {"format": 1, "merging": {}}}))
    with pytest.raises(CheckpointError, match="A newer version of moe-compressor may read it"):
        compressor.load(tmp_path)


# Together with removing experts


@pytest.mark.parametrize("rule", RULES)
def test_experts_removed_from_a_model_that_skips(rule, tmp_path):
    """The same as removing them first and skipping with what is left of the rule; saved and read back."""
    kept = [0, 2, 3, 5, 6, 7]
    one, other = small("mixtral"), small("mixtral")
    one.skip(everywhere(one, RULES[rule]))
    one.keep({layer.path: kept for layer in one.layers})
    other.keep({layer.path: kept for layer in other.layers})
    unskipped = logits(other.model)
    other.skip(everywhere(other, RULES[rule].of_experts(kept)))
    assert one.skip_rules == other.skip_rules
    found = logits(one.model)
    assert torch.equal(found, logits(other.model))
    assert not torch.equal(found, unskipped)
    save(one, tmp_path)
    model, _ = compressor.load(tmp_path)
    torch.testing.assert_close(logits(model), found, rtol=1e-4, atol=1e-4)


def test_other_numbers_of_experts_by_layer_and_skipping(tmp_path):
    moe = small("mixtral")
    moe.skip(everywhere(moe, RULES["contribution"]))
    moe.keep({layer.path: range(8 - number) for number, layer in enumerate(moe.layers)})
    assert set(moe.config.compressor) == {"format", "num_experts", "skipping"}
    found = logits(moe.model)
    save(moe, tmp_path)
    model, _ = compressor.load(tmp_path)
    torch.testing.assert_close(logits(model), found, rtol=1e-4, atol=1e-4)
    again = MoEModel(model)
    assert [len(rule.expert_norms) for rule in again.skip_rules.values()] == [8, 7, 6]


def test_removing_so_much_that_nothing_is_left_to_skip_is_refused():
    moe = small("mixtral")
    moe.skip(everywhere(moe, SkipRule("top_k", True, top_k=2)))
    before = logits(moe.model)
    with pytest.raises(ValueError, match=r"could not go on like this: .* keeping the largest 2 skips nothing"):
        moe.keep({layer.path: range(8) for layer in moe.layers}, top_k=2)
    assert torch.equal(logits(moe.model), before)


def test_masked_and_skipping():
    moe, other = small("mixtral"), small("mixtral")
    kept = {layer.path: [0, 1, 2, 5, 6, 7] for layer in moe.layers}
    moe.skip(everywhere(moe))
    other.keep(kept)
    other.skip(everywhere(other))
    with moe.masked(kept):
        torch.testing.assert_close(logits(moe.model), logits(other.model), rtol=1e-4, atol=1e-5)


# Refused


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        (
            {"model.layers.7.mlp": HALF},
            ValueError,
            "no MoE layer 'model.layers.7.mlp' to skip experts in; the layers are",
        ),
        (
            {"model.layers.0.mlp": SkipRule("top_k", True, top_k=4)},
            ValueError,
            "model.layers.0.mlp: each token chooses 4 experts, so keeping the largest 4 skips nothing",
        ),
        (
            {"model.layers.0.mlp": SkipRule("contribution", True, beta=0.5, expert_norms=(1.0,))},
            ValueError,
            "the rule knows 1 experts, the layer has 8",
        ),
    ],
)
def test_rules_that_do_not_fit(rules, error, message):
    moe = small("mixtral")
    moe.skip(everywhere(moe))
    before = logits(moe.model)
    for use in (moe.skip, lambda given: moe.zeroed(given).__enter__()):
        with pytest.raises(error, match=message):
            use(rules)
    assert torch.equal(logits(moe.model), before)
    assert moe.skip_rules == everywhere(moe)


@pytest.mark.parametrize("name", ["switch_transformers", "zaya"])
def test_top_1_has_nothing_to_skip(name):
    moe = MoEModel(tiny_model(name))
    with pytest.raises(ValueError, match="each token chooses one expert, so there is nothing to skip"):
        moe.skip(everywhere(moe))


def test_expert_parallelism_is_refused_when_it_runs():
    moe = small("mixtral")
    moe.skip(everywhere(moe))
    moe.model.get_submodule(moe.layers[0].experts)._is_expert_parallel = True
    with pytest.raises(UnsupportedModelError, match="skipping does not work with expert parallelism"):
        logits(moe.model)


def test_more_choices_at_run_time_than_the_rule_was_made_for():
    moe = small("mixtral")
    moe.skip(everywhere(moe))
    moe.model.get_submodule(moe.layers[0].router).top_k = 5
    with pytest.raises(
        UnsupportedModelError, match="given 5 choices per token, and its rule for skipping is made for 4"
    ):
        logits(moe.model)


# What users do in between


def test_another_experts_implementation_underneath():
    """What the model's config names is what the pairs are evaluated by, while skipping and after."""
    moe, other = small("mixtral"), small("mixtral")
    moe.skip(everywhere(moe))
    moe.model.set_experts_implementation("eager")
    other.model.set_experts_implementation("eager")
    other.skip(everywhere(other))
    assert moe.skips
    assert torch.equal(logits(moe.model), logits(other.model))
    with moe.unskipped():
        pass
    moe.skip({})
    assert moe.model.config._experts_implementation == "eager"
    assert {moe.model.get_submodule(layer.experts).config._experts_implementation for layer in moe.layers} == {"eager"}


def test_two_models_with_one_config():
    first = small("mixtral")
    second = MoEModel(type(first.model)(first.model.config).eval())
    assert second.model.config is first.model.config
    untouched = logits(second.model)
    first.skip(everywhere(first))
    assert torch.equal(logits(second.model), untouched)
    first.skip({})
    assert torch.equal(logits(second.model), untouched)


def test_rules_that_fail_leave_those_that_were_on():
    moe = small("mixtral")
    first, second, _ = moe.layers
    moe.model.get_submodule(second.path).experts = moe.model.get_submodule(first.path).experts
    moe.skip({first.path: HALF, second.path: HALF})
    before = logits(moe.model)
    for use in (moe.skip, lambda rules: moe.zeroed(rules).__enter__()):
        with pytest.raises(ValueError, match="share their experts"):
            use({first.path: HALF, second.path: HALF.at(0.3)})
        assert moe.skips
        assert torch.equal(logits(moe.model), before)


@pytest.mark.parametrize(
    "name", ["mixtral", "jetmoe", *(pytest.param(one, marks=pytest.mark.nightly) for one in ("llama4_text", "dbrx"))]
)
def test_contexts_within_each_other(name):
    moe = small(name, top_k=2 if name == "jetmoe" else 4)
    inputs = tiny_inputs(moe.model)

    def found():
        return answers(moe.model, inputs)

    rules = everywhere(moe, HALF.at(0.8))
    untouched = found()
    moe.skip(rules)
    skipped = found()
    with moe.zeroed(everywhere(moe, HALF.at(0.3))):
        other = found()
        with moe.unskipped():
            assert torch.equal(found(), untouched)
            with moe.unskipped():
                assert torch.equal(found(), untouched)
            assert torch.equal(found(), untouched)
        assert torch.equal(found(), other)
        with moe.zeroed(rules):
            torch.testing.assert_close(found(), skipped, rtol=1e-3, atol=1e-4)
        assert torch.equal(found(), other)
    assert torch.equal(found(), skipped)
    with pytest.raises(KeyboardInterrupt), moe.unskipped():
        raise KeyboardInterrupt
    assert torch.equal(found(), skipped)


def test_counters_go_through_contexts_and_stand_side_by_side():
    moe = small("mixtral")
    moe.skip(everywhere(moe))
    path = moe.layers[0].path
    with moe.counted() as outer:
        logits(moe.model)
        with moe.unskipped():
            logits(moe.model)  # nothing skips, so nothing is counted
        with moe.counted() as inner:
            logits(moe.model)
        moe.skip(everywhere(moe, HALF.at(0.3)))
        logits(moe.model)
    assert outer.tokens[path] == 3 * 24
    assert inner.tokens[path] == 24


def test_padding_in_positional_arguments_and_no_mask_left_over():
    moe = small("mixtral")
    moe.skip(everywhere(moe))
    ids, mask = token_ids(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[0, 5:] = 0
    with moe.counted() as counter, torch.no_grad():
        moe.model(ids, mask)
        moe.model.model(ids)
    assert set(counter.tokens.values()) == {14 + 18}


@pytest.mark.parametrize(
    "name", ["mixtral", "dbrx", *(pytest.param(one, marks=pytest.mark.nightly) for one in ("jetmoe", "llama4_text"))]
)
def test_a_model_that_skips_is_watched_unskipped(name):
    moe = small(name, top_k=2)
    inputs = tiny_inputs(moe.model)
    untouched = answers(moe.model, inputs)
    moe.skip(everywhere(moe, HALF.at(0.9)))
    real = RealTokens(torch.ones(inputs["input_ids"].numel(), dtype=torch.bool))
    with moe.counted() as counter, moe.watched({layer.path: lambda tokens: None for layer in moe.layers}, real):
        torch.testing.assert_close(answers(moe.model, inputs), untouched)
    assert counter.tokens == {}


@pytest.mark.parametrize(
    "name", ["mixtral", *(pytest.param(one, marks=pytest.mark.nightly) for one in ("dbrx", "jetmoe"))]
)
def test_a_lower_top_k_masked_or_kept(name):
    """A pruning pass that also lowers top-k, over a model that skips."""
    moe, other = small(name, top_k=3), small(name, top_k=3)
    inputs = tiny_inputs(moe.model)
    kept = {layer.path: range(8) for layer in moe.layers}
    for one in (moe, other):
        one.skip(everywhere(one, HALF.at(0.7)))
    other.keep(kept, top_k=2)
    with moe.masked(kept, top_k=2):
        torch.testing.assert_close(answers(moe.model, inputs), answers(other.model, inputs), rtol=1e-4, atol=1e-5)


def test_a_router_asked_for_more_stays_so():
    moe, other = small("mixtral"), small("mixtral")
    rules = everywhere(moe, SkipRule("top_k", True, top_k=2, normalise_over=8))
    moe.skip(rules)
    other.skip(rules)
    before, kept = logits(moe.model), {layer.path: range(8) for layer in moe.layers}
    other.keep(kept, top_k=3)
    with moe.masked(kept, top_k=3):
        torch.testing.assert_close(logits(moe.model), logits(other.model), rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(moe.model), before)
    assert other.config.num_experts_per_tok == 3


@pytest.mark.parametrize(
    ("rule", "top_k", "problem"),
    [
        (SkipRule("top_k", True, top_k=2, normalise_over=8), 2, "keeping the largest 2 skips nothing"),
        (SkipRule("top_k", True, top_k=2, normalise_over=8), 1, "chooses one expert, so there is nothing to skip"),
        (HALF, 1, "chooses one expert, so there is nothing to skip"),
    ],
)
def test_a_lower_top_k_that_leaves_nothing_to_skip_is_no_mask(rule, top_k, problem):
    """Nor could such experts be kept: what masks have no effect on is refused alike."""
    moe = small("qwen3_moe")
    kept = {layer.path: range(8) for layer in moe.layers}
    moe.skip(everywhere(moe, rule))
    for use in (lambda: moe.masked({}, top_k=top_k).__enter__(), lambda: moe.keep(kept, top_k=top_k)):
        with pytest.raises(ValueError, match=f"could not go on like this: .*{problem}"):
            use()
    with moe.unskipped(), moe.masked({}, top_k=top_k):
        assert moe.config.num_experts_per_tok == top_k


def test_shared_experts_behind_two_routers_that_are_asked_for_more():
    moe = small("mixtral")
    first, second, _ = moe.layers
    moe.model.get_submodule(second.path).experts = moe.model.get_submodule(first.path).experts
    untouched = logits(moe.model)
    rule = SkipRule("top_k", True, top_k=2, normalise_over=8)
    moe.skip({first.path: rule, second.path: rule})
    assert not torch.equal(logits(moe.model), untouched)
    moe.skip({})
    assert torch.equal(logits(moe.model), untouched)


@pytest.mark.parametrize("name", ["mixtral", "dbrx", "llama4_text"])
def test_no_tokens_at_all(name):
    moe = small(name, top_k=2)
    block = moe.model.get_submodule(moe.layers[0].path)
    moe.skip(everywhere(moe))
    found = block(torch.zeros(1, 0, 64))
    assert (found[0] if isinstance(found, tuple) else found).numel() == 0


def test_a_part_of_a_model_that_skips():
    moe = small("mixtral")
    moe.skip(everywhere(moe))
    half = logits(moe.model)
    part = MoEModel(moe.model.model)
    with part.unskipped():
        assert not moe.skips
    assert torch.equal(logits(moe.model), half)
    with pytest.raises(ValueError, match="a part of a model that skips experts"):
        part.skip({layer.path: HALF.at(0.2) for layer in part.layers})
    assert torch.equal(logits(moe.model), half)
    with part.counted() as counter:
        logits(moe.model)
    assert counter.tokens == {layer.path: 24 for layer in moe.layers}


def test_rules_that_do_not_fit_are_found_before_experts_go():
    moe = small("mixtral")
    moe.config.compressor = {"format": 1, "skipping": {"version": 1, "layers": {"model.layers.9.mlp": HALF.to_json()}}}
    with pytest.raises(ValueError, match=r"no MoE layer .model\.layers\.9\.mlp. to skip experts in"):
        moe.keep({layer.path: range(6) for layer in moe.layers})
    assert moe.layers[0].num_experts == 8


@pytest.mark.parametrize("name", ["dbrx", "llama4_text", "mixtral"])
@pytest.mark.parametrize("first", ["hook", "skip"])
def test_a_forward_that_others_wrap(name, first):
    """As accelerate does for offloading: called while skipping, and left as it is afterwards."""
    moe = small(name, top_k=2)
    inputs = tiny_inputs(moe.model)
    experts = moe.model.get_submodule(moe.layers[0].experts)
    calls = []

    def wrap():
        inner = experts.forward
        experts.forward = lambda *args, **kwargs: (calls.append(1), inner(*args, **kwargs))[1]

    untouched = answers(moe.model, inputs)
    if first == "hook":
        wrap()
    moe.skip(everywhere(moe, HALF.at(0.9)))
    if first == "skip":
        wrap()
    assert not torch.equal(answers(moe.model, inputs), untouched)
    during = len(calls)
    moe.skip({})
    assert torch.equal(answers(moe.model, inputs), untouched)
    assert len(calls) > during > 0


@pytest.mark.parametrize(
    ("name", "then"),
    [
        *(
            pytest.param("mixtral", then, marks=pytest.mark.nightly)
            for then in ("another threshold", "off", "restored", "hooks gone")
        ),
        ("step3p7", "another threshold"),
        ("longcat_flash", "restored"),
        ("dbrx", "off"),
        ("llama4_text", "hooks gone"),
    ],
)
def test_accelerate_comes_after_skipping(name, then):
    """Weights that are offloaded while the model skips; the forward of accelerate wraps ours."""
    moe, other = small(name, top_k=2), small(name, top_k=2)
    inputs = tiny_inputs(moe.model)
    untouched = answers(moe.model, inputs)
    rules, lower = (everywhere(moe, HALF.at(beta)) for beta in (0.9, 0.7))
    moe.skip(rules)
    other.skip(lower if then == "another threshold" else {} if then == "off" else rules)
    for layer in moe.layers:
        add_hook_to_module(moe.model.get_submodule(layer.experts), ModelHook())
    assert not torch.equal(answers(moe.model, inputs), untouched)
    for _ in range(2):
        if then == "another threshold":
            moe.skip(lower)
        elif then == "off":
            moe.skip({})
        elif then == "restored":
            compressor.restore(moe.model)
        else:
            remove_hook_from_submodules(moe.model)
        torch.testing.assert_close(answers(moe.model, inputs), answers(other.model, inputs), rtol=1e-4, atol=1e-5)
    moe.skip({})
    assert torch.equal(answers(moe.model, inputs), untouched)


def test_offloaded_after_skipping():
    moe = small("step3p7", top_k=2)
    inputs = tiny_inputs(moe.model)
    untouched = answers(moe.model, inputs)
    moe.skip(everywhere(moe, HALF.at(0.7)))
    expected = answers(moe.model, inputs)
    moe.skip(everywhere(moe, HALF.at(0.9)))
    cpu_offload(moe.model, execution_device="cpu")
    moe.skip({path: rule.at(0.7) for path, rule in moe.skip_rules.items()})
    torch.testing.assert_close(answers(moe.model, inputs), expected, rtol=1e-4, atol=1e-5)
    moe.skip({})
    assert torch.equal(answers(moe.model, inputs), untouched)


@pytest.mark.parametrize(
    "name",
    [
        "llama4_text",
        "gpt_oss",
        *(pytest.param(one, marks=pytest.mark.nightly) for one in ("step3p7", "longcat_flash", "dbrx", "jetmoe")),
    ],
)
def test_pickled_and_read_back(name):
    moe = small(name, top_k=2)
    inputs = tiny_inputs(moe.model)
    untouched = answers(moe.model, inputs)
    moe.skip(everywhere(moe, HALF.at(0.9)))
    found = pickle.loads(pickle.dumps(moe.model))
    assert torch.equal(answers(found, inputs), answers(moe.model, inputs))
    MoEModel(found).skip({})
    assert torch.equal(answers(found, inputs), untouched)


def test_gradients_are_those_of_weights_of_zero():
    found = []
    for use in ("skip", "zeroed"):
        moe = small("mixtral")
        if use == "skip":
            moe.skip(everywhere(moe))
            moe.model(token_ids(2, 12)).logits.square().mean().backward()
        else:
            with moe.zeroed(everywhere(moe)):
                moe.model(token_ids(2, 12)).logits.square().mean().backward()
        found.append(moe.model.get_submodule(moe.layers[0].experts).gate_up_proj.grad)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


# Experts in a list, between forwards


def test_lists_leave_nothing_behind_a_forward():
    moe = MoEModel(tiny_models.tiny_model("mixtral4"))
    moe.skip(everywhere(moe, HALF.at(0.7)))
    moe.model(token_ids(2, 12)).logits.sum().backward()
    twin = copy.deepcopy(moe.model)
    assert torch.equal(logits(twin), logits(moe.model))
    block = moe.model.get_submodule(moe.layers[0].path)
    block.experts[2](torch.randn(5, 32))  # an expert on its own


def test_lists_pass_what_is_not_finite_on():
    """A NaN in one token's hidden state stays in that token."""
    moe = MoEModel(tiny_models.tiny_model("deepseek4"))
    block = moe.model.get_submodule(moe.layers[0].path)
    hidden = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(0))
    hidden[0, 4] = float("nan")
    moe.skip(everywhere(moe, SkipRule("ratio", False, beta=0.7)))
    with torch.no_grad():
        finite = block(hidden)[0].isfinite().all(-1)
    assert finite.tolist() == [number != 4 for number in range(12)]


def test_lists_are_switched_off_and_on_in_training_too():
    """The block's own rule is found once, and not by shaking its input."""
    moe = MoEModel(tiny_models.tiny_model("mixtral4"))
    moe.model.train()
    moe.skip(everywhere(moe, HALF.at(0.7)))
    half = logits(moe.model)
    with moe.unskipped():
        pass
    assert moe.model.training
    assert torch.equal(logits(moe.model), half)


def test_our_name_without_rules_runs_as_transformers_would():
    """Whoever names our implementation at load, and has no rules, gets transformers' default."""
    moe = small("mixtral")
    untouched = logits(moe.model)
    moe.skip(everywhere(moe))  # registers the name
    assert "compressor_skip" in ALL_EXPERTS_FUNCTIONS
    other = small("mixtral")
    other.model.set_experts_implementation("compressor_skip")
    assert torch.equal(logits(other.model), untouched)
    other.skip(everywhere(other))
    assert torch.equal(logits(other.model), logits(moe.model))
    other.skip({})
    assert torch.equal(logits(other.model), untouched)
