"""Expert pruning is exact: every set's loss equals that of running the masked block, batch by batch, set by set."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest
import torch
from by_hand import ROUTING, expert_outputs, routing_weights
from tiny_models import FEW, random_model, tiny_model, token_ids

from compressor import MoEModel
from compressor.data.sequences import make_batches
from compressor.machine.progress import Progress
from compressor.observe.forward import model_inputs
from compressor.observe.layerwise import observe
from compressor.plugin import Gathered
from compressor.selection.exact import dropped_subsets, num_subsets
from compressor_expert_pruning import ExpertPruning, ExpertPruningOptions

LENGTHS = (21, 17, 9, 21, 5, 1, 30)  # batches of 3, 3 and 1 sequences; two with padding, one without
BATCHES = make_batches([token_ids(length, seed=length) for length in LENGTHS], batch_size=3)


def figures(moe, method, batches=BATCHES):
    statistics = {layer.path: method.statistic(layer) for layer in moe.layers}
    return Gathered(observe(moe, batches, statistics, Progress()))


@torch.no_grad()
def block_inputs(moe, batches=BATCHES):
    """path → per batch what the block is given [B, S, H], from plain runs of the untouched model."""
    found = {layer.path: [] for layer in moe.layers}
    hooks = [
        moe.model.get_submodule(layer.path).register_forward_pre_hook(
            lambda _, args, kwargs, path=layer.path: found[path].append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for layer in moe.layers
    ]
    for batch in batches:
        moe.model(**model_inputs(moe.model, batch))
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def slow_errors(moe, path, inputs, sets, batches=BATCHES):
    """[B, S] float64: ‖F(x; S) − F(x)‖²_Frobenius by running the block under every mask; real tokens only."""
    block = moe.model.get_submodule(path)

    def run(hidden, mask):
        output = block(hidden)
        output = output[0] if isinstance(output, tuple) else output
        return output[mask].double()

    errors = torch.zeros(len(batches), len(sets), dtype=torch.float64)
    for row, (hidden, batch) in enumerate(zip(inputs, batches, strict=True)):
        full = run(hidden, batch.attention_mask)
        for column, kept in enumerate(sets):
            with moe.masked({path: kept}):
                errors[row, column] = (run(hidden, batch.attention_mask) - full).square().sum()
    return errors


def kept_sets(layer, num_kept):
    """In the order of dropped ids; written out, not taken from the plugin."""
    size = layer.num_experts // layer.num_groups
    groups = [range(start, start + size) for start in range(0, layer.num_experts, size)]
    num_dropped = size - num_kept // layer.num_groups
    dropped = sorted(tuple(sum(parts, ())) for parts in product(*(combinations(g, num_dropped) for g in groups)))
    return [[expert for expert in range(layer.num_experts) if expert not in gone] for gone in dropped]


def assert_exact(moe, num_kept, batches=BATCHES):
    method = ExpertPruning(ExpertPruningOptions(keep=num_kept))
    found, inputs = figures(moe, method, batches), block_inputs(moe, batches)
    decision = method.decide(moe.layers, found)
    for layer in moe.layers:
        sets = kept_sets(layer, num_kept)
        slow = slow_errors(moe, layer.path, inputs[layer.path], sets, batches)
        fast = found[layer.path]["subsets.squared_error"]
        assert fast.shape == slow.shape == (len(batches), num_subsets(layer, num_kept))
        torch.testing.assert_close(fast.sqrt(), slow.sqrt(), rtol=1e-5, atol=1e-5)
        losses = slow.sqrt().sum(0)
        torch.testing.assert_close(fast.sqrt().sum(0), losses, rtol=1e-5, atol=0)
        decided = decision["layers"][layer.path]
        assert decided["kept"] == sets[int(losses.argmin())]
        assert decided["loss"] == pytest.approx(float(losses.min()), rel=1e-5)
        assert decided["median_loss"] == pytest.approx(float(losses.quantile(0.5)), rel=1e-5)
        assert found[layer.path]["batch.num_tokens"].tolist() == [int(batch.attention_mask.sum()) for batch in batches]


def all_but(*each_push: str) -> list[Any]:
    """`FEW`, nightly but for these."""
    return [pytest.param(name, marks=() if name in each_push else pytest.mark.nightly) for name in FEW]


@pytest.mark.parametrize("name", FEW)
def test_losses_of_all_sets_of_six(name):
    assert_exact(MoEModel(tiny_model(name)), 6)


@pytest.mark.parametrize("name", all_but("mixtral", "phimoe"))
def test_losses_of_all_sets_of_four(name):
    assert_exact(MoEModel(tiny_model(name)), 4, BATCHES[:1])


@pytest.mark.parametrize(
    ("name", "changes", "num_kept"),
    [
        ("mixtral", {"num_experts_per_tok": 1}, 2),
        pytest.param("mixtral", {"num_experts_per_tok": 7}, 7, marks=pytest.mark.nightly),
        ("qwen3_moe_not_normalised", {"num_experts_per_tok": 1}, 3),
        pytest.param("qwen3_moe_not_normalised", {"num_experts_per_tok": 4}, 4, marks=pytest.mark.nightly),
        ("mixtral", {"num_local_experts": 3}, 2),
        ("gpt_oss", {"hidden_size": 8, "head_dim": 2}, 6),
        pytest.param("deepseek_v3", {"n_group": 1, "topk_group": 1}, 5, marks=pytest.mark.nightly),
        ("deepseek_v3", {"n_group": 2, "topk_group": 2}, 6),
        ("glm4_moe", {"norm_topk_prob": False, "routed_scaling_factor": 1.8}, 6),
    ],
)
def test_losses_under_other_settings(name, changes, num_kept):
    assert_exact(MoEModel(random_model(name, **changes)), num_kept, BATCHES[:2])


@torch.no_grad()
@pytest.mark.parametrize("name", FEW)
def test_losses_by_hand(name):
    """Once more without any of the model's code: Σ_e (w_e(S) − w_e) E_e(x) from the weights, in float64."""
    moe = MoEModel(tiny_model(name))
    batch = BATCHES[:1]
    found = figures(moe, ExpertPruning(ExpertPruningOptions(keep=6)), batch)
    layer = moe.layers[-1]
    block = moe.model.get_submodule(layer.path)
    hidden_TH = block_inputs(moe, batch)[layer.path][0][batch[0].attention_mask]
    outputs_TEH, full_TE = expert_outputs(name, block, hidden_TH), routing_weights(name, block, hidden_TH)
    for column, kept in enumerate(kept_sets(layer, 6)):
        delta_TE = routing_weights(name, block, hidden_TH, kept) - full_TE
        by_hand = (delta_TE[..., None] * outputs_TEH).sum(1).square().sum()
        assert float(found[layer.path]["subsets.squared_error"][0, column]) == pytest.approx(float(by_hand), rel=2e-5)
    norm = (full_TE[..., None] * outputs_TEH).sum(1).square().sum()
    assert float(found[layer.path]["batch.squared_output"][0]) == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize("name", all_but("mixtral", "deepseek_v3"))
def test_padding_changes_no_loss(name):
    """A batch, and the same batch with more padding of another id."""
    moe = MoEModel(tiny_model(name))
    method = ExpertPruning(ExpertPruningOptions(keep=6))
    (batch,) = BATCHES[:1]
    wider = type(batch)(
        torch.cat([batch.input_ids, torch.full((3, 7), 9)], dim=1),
        torch.cat([batch.attention_mask, torch.zeros(3, 7, dtype=torch.bool)], dim=1),
    )
    plain, padded = figures(moe, method, [batch]), figures(moe, method, [wider])
    for path, tensors in plain.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(padded[path][key], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    ["mixtral", *(pytest.param(one, marks=pytest.mark.nightly) for one in ("phimoe", "deepseek_v3", "deepseek4"))],
)
def test_same_text_same_figures(name):
    method = ExpertPruning(ExpertPruningOptions(keep=6))
    first, second = (figures(MoEModel(tiny_model(name)), method) for _ in range(2))
    for path, tensors in first.items():
        assert all(torch.equal(second[path][key], tensor) for key, tensor in tensors.items())


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        "mixtral",
        "gpt_oss",
        "deepseek4",
        *(pytest.param(one, marks=pytest.mark.nightly) for one in ("glm4_moe", "mixtral4", "qwen2_moe")),
    ],
)
def test_set_that_keeps_every_chosen_expert(name):
    """It costs 0, exactly, so that ties between such sets stay ties; unless a softmax over the kept rescales all."""
    moe = MoEModel(tiny_model(name))
    batches = make_batches([token_ids(3)], batch_size=1)
    found = figures(moe, ExpertPruning(ExpertPruningOptions(keep=6)), batches)
    num_free = 0
    for layer in moe.layers:
        block = moe.model.get_submodule(layer.path)
        weights_TE = routing_weights(name, block, block_inputs(moe, batches)[layer.path][0][0])
        chosen = set(weights_TE.nonzero()[:, 1].tolist())
        errors = found[layer.path]["subsets.squared_error"][0].tolist()
        for kept, error in zip(kept_sets(layer, 6), errors, strict=True):
            is_free = chosen <= set(kept) and ROUTING[name].renormalise
            assert (error == 0.0) == is_free
            num_free += is_free
    assert num_free or not ROUTING[name].renormalise


def test_number_and_order_of_sets():
    """Eight choose two; with two groups four choose one, twice."""
    layer = MoEModel(tiny_model("mixtral")).layers[0]
    assert num_subsets(layer, 6) == len(dropped_subsets(layer, 6)) == 28
    assert dropped_subsets(layer, 6)[:3] == [(0, 1), (0, 2), (0, 3)]
    grouped = MoEModel(tiny_model("deepseek_v3")).layers[0]
    assert num_subsets(grouped, 6) == len(dropped_subsets(grouped, 6)) == 16
    assert dropped_subsets(grouped, 6)[:5] == [(0, 4), (0, 5), (0, 6), (0, 7), (1, 4)]


@pytest.mark.parametrize("name", all_but("gpt_oss"))
def test_half_precision_losses_are_near(name):
    """Outputs are rounded to 8 bits and ties may fall otherwise, so: to a few percent, and the best set is among the
    best.
    """
    moe = MoEModel(tiny_model(name, "bfloat16"))
    found, inputs = figures(moe, ExpertPruning(ExpertPruningOptions(keep=6))), block_inputs(moe)
    for layer in moe.layers[:1]:
        slow = slow_errors(moe, layer.path, inputs[layer.path], kept_sets(layer, 6)).sqrt().sum(0)
        fast = found[layer.path]["subsets.squared_error"].sqrt().sum(0)
        torch.testing.assert_close(fast, slow, rtol=0.05, atol=0)
        assert slow[fast.argmin()] <= slow.min() * 1.03
