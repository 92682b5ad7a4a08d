"""What models are given and asked for, whatever their class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

from compressor import MoEModel, UnsupportedModelError
from compressor.data.sequences import TokenBatch
from compressor.machine.progress import Progress
from compressor.model.routed_tokens import RealTokens
from compressor.observe import forward, layerwise
from compressor.plugin import RoutedTokens, Statistic
from compressor.testing import tiny

IDS = torch.randint(3, 99, (3, 7), generator=torch.Generator().manual_seed(0))
LENGTHS = (7, 4, 6)
ONE_PASS = ("switch_transformers", "diffusion_gemma", "muse_spark_text", "openai_privacy_filter", "gemma4", "mixtral")


def padded() -> TokenBatch:
    mask = torch.arange(7)[None] < torch.tensor(LENGTHS)[:, None]
    return TokenBatch(IDS.masked_fill(~mask, 0), mask)


def whole(row: int) -> TokenBatch:
    ids = IDS[row : row + 1, : LENGTHS[row]]
    return TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool))


@pytest.mark.parametrize("model_type", ONE_PASS)
def test_padding_changes_no_answer(model_type: str) -> None:
    """An encoder-decoder's decoder and a block-diffusion model's canvas see none of it either."""
    model = tiny.tiny_model(model_type).train()
    together = forward.logits(model, padded())
    alone = torch.cat([forward.logits(model, whole(row)) for row in range(3)])
    assert together.shape == alone.shape == (sum(LENGTHS), alone.shape[1])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert model.training


def test_answers_of_a_class_without_a_head_are_its_hidden_states() -> None:
    model = tiny_model("mixtral")
    batch = whole(0)
    batch = TokenBatch(batch.input_ids % 64, batch.attention_mask)
    with torch.no_grad():
        expected = model.lm_head(forward.logits(model.model, batch))
    assert torch.equal(forward.logits(model, batch), expected)


@pytest.mark.parametrize("model_type", ["switch_transformers", "gemma4", "muse_spark_text", "mixtral"])
def test_base_model_takes_the_same_inputs(model_type: str) -> None:
    model = tiny.tiny_model(model_type).eval()
    body = model.base_model
    with torch.no_grad():
        answers = [body(**forward.model_inputs(body, batch))[0] for batch in (padded(), whole(1))]
    torch.testing.assert_close(answers[0][1:2, :4], answers[1], rtol=1e-4, atol=1e-4)


def names(model: Any, batch: TokenBatch) -> set[str]:
    return set(forward.model_inputs(model, batch))


def test_arguments() -> None:
    causal, two_parts = tiny.tiny_model("mixtral"), tiny.tiny_model("switch_transformers")
    assert names(causal, whole(0)) == {"input_ids", "use_cache"}
    assert names(causal, padded()) == {"input_ids", "attention_mask", "use_cache"}
    assert names(two_parts, whole(0)) == {"input_ids", "decoder_input_ids", "use_cache"}
    given = forward.model_inputs(two_parts, padded())
    assert given.keys() == names(two_parts, whole(0)) | {"attention_mask", "decoder_attention_mask"}
    assert torch.equal(given["input_ids"], given["decoder_input_ids"])
    assert torch.equal(given["attention_mask"], given["decoder_attention_mask"])


# Layer by layer --------------------------------------------------------------------------------------------


class Recorded(Statistic):
    """What a layer was given, in the order in which it was."""

    log: list[tuple[str, str]]

    def __init__(self, path: str, log: list[tuple[str, str]], looks: int = 1) -> None:
        self.path, self.log, self.looks = path, log, looks
        self.hidden: list[Tensor] = []
        self.targets: list[Tensor | None] = []

    def update(self, tokens: RoutedTokens) -> None:
        for _ in tokens.ranked_outputs(tokens.layer.top_k):
            pass
        self.log.append((self.path, tokens.domain))
        self.hidden.append(tokens.hidden_TH.clone())
        self.targets.append(tokens.target_TH)

    def again(self) -> bool:
        self.looks -= 1
        return self.looks > 0

    def tensors(self) -> dict[str, Tensor]:
        self.log.append((self.path, "figures"))
        return {"batches": torch.tensor(len(self.hidden))}


def batches_of(model: Any) -> list[TokenBatch]:
    whole = TokenBatch(IDS % 64, torch.ones_like(IDS, dtype=torch.bool), "one")
    mask = torch.arange(7)[None] < torch.tensor(LENGTHS)[:, None]
    return [whole, TokenBatch((IDS % 64).masked_fill(~mask, 0), mask, "two")]


def observed(moe: MoEModel, looks: int = 1, **options: Any) -> tuple[dict[str, Recorded], list[tuple[str, str]]]:
    log: list[tuple[str, str]] = []
    statistics = {layer.path: Recorded(layer.path, log, looks) for layer in moe.layers}
    figures = layerwise.observe(moe, batches_of(moe.model), statistics, Progress(), **options)
    assert list(figures) == list(statistics)
    return statistics, log


@torch.no_grad()
def one_batch_after_another(moe: MoEModel, masks: dict[str, list[int]]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """(input, output) of every layer from plain runs of the model under masks: what walking must not change."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {layer.path: [] for layer in moe.layers}

    def visit(tokens: RoutedTokens) -> None:
        for _ in tokens.ranked_outputs(tokens.layer.top_k):
            pass
        assert tokens.output_TH is not None
        found[tokens.layer.path].append((tokens.hidden_TH.clone(), tokens.output_TH))

    def run(visitors: dict[str, Any]) -> None:
        real = RealTokens()
        with moe.watched(visitors, real):
            for batch in batches_of(moe.model):
                real.mask_T = batch.attention_mask.flatten()
                moe.model.base_model(**forward.model_inputs(moe.model.base_model, batch))

    if not masks:
        run(dict.fromkeys(found, visit))
    for layer in moe.layers if masks else ():  # a masked layer cannot be watched: each on its own, behind the masks
        with moe.masked({path: kept for path, kept in masks.items() if path < layer.path}):
            run({layer.path: visit})
    return found


ARCHITECTURES = ("mixtral", "olmoe", "deepseek_v3", "gpt_oss", "phimoe", "mixtral4")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_batches_pass_a_layer_before_the_next_one(name: str) -> None:
    moe = MoEModel(tiny_model(name).train())
    statistics, log = observed(moe)
    assert moe.model.training
    moe.model.eval()
    expected = [(layer.path, what) for layer in moe.layers for what in ("one", "two", "figures")]
    assert log == expected
    plain = one_batch_after_another(moe, {})
    for path, statistic in statistics.items():
        assert all(torch.equal(ours, theirs) for ours, (theirs, _) in zip(statistic.hidden, plain[path], strict=True))
        assert statistic.targets == [None, None]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_progressive(name: str) -> None:
    """A layer sees what comes out of the edited layers before it; its target is the original model's output."""
    moe = MoEModel(tiny_model(name).eval())
    kept = {layer.path: [0, 1, 4, 5] for layer in moe.layers}
    statistics, log = observed(moe, edited=lambda path, figures: moe.masked({path: kept[path]}))
    assert log == [(layer.path, what) for layer in moe.layers for what in ("one", "two", "figures")]
    plain, edited = one_batch_after_another(moe, {}), one_batch_after_another(moe, kept)
    for path, statistic in statistics.items():
        for number in range(2):
            torch.testing.assert_close(statistic.hidden[number], edited[path][number][0], rtol=1e-5, atol=1e-6)
            target = statistic.targets[number]
            assert target is not None
            assert torch.equal(target, plain[path][number][1])
    last = moe.layers[-1].path
    assert not torch.allclose(plain[last][0][0], edited[last][0][0], rtol=1e-3)  # it does make a difference


def test_attention_passes() -> None:
    """One for the layer-wise walk, two for the progressive one, whatever the number of layers."""
    model = tiny_model("mixtral")
    moe = MoEModel(model)
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(counted)
    observed(moe)
    assert count == 2 * len(model.model.layers)
    count = 0
    observed(moe, edited=lambda path, figures: moe.masked({path: [0, 1]}))
    assert count == 2 * 2 * len(model.model.layers)


def test_a_second_look_gives_the_same_tokens() -> None:
    moe = MoEModel(tiny_model("mixtral"))
    for options in ({}, {"edited": lambda path, figures: moe.masked({path: [0, 1, 2]})}):
        statistics, log = observed(moe, looks=3, **options)
        for path, statistic in statistics.items():
            first, *others = (statistic.hidden[i : i + 2] for i in (0, 2, 4))
            assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
            assert [what for at, what in log if at == path] == ["one", "two"] * 3 + ["figures"]


def test_nothing_is_left_behind_after_an_error() -> None:
    class Fails(Recorded):
        def update(self, tokens: RoutedTokens) -> None:
            super().update(tokens)
            if tokens.domain == "two":
                raise ValueError("enough")

    model = tiny_model("mixtral").eval()
    moe = MoEModel(model)
    before = forward.logits(model, batches_of(model)[0])
    log: list[tuple[str, str]] = []
    with pytest.raises(ValueError, match="enough"):
        layerwise.observe(moe, batches_of(model), {moe.layers[1].path: Fails(moe.layers[1].path, log)}, Progress())
    assert torch.equal(forward.logits(model, batches_of(model)[0]), before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    observed(moe)


def test_blocks_with_a_cache_are_not_run_twice() -> None:
    moe = MoEModel(tiny.tiny_model("diffusion_gemma").eval())
    statistics = {layer.path: Recorded(layer.path, []) for layer in moe.layers}
    with pytest.raises(UnsupportedModelError, match="its block holds attention that writes a cache"):
        layerwise.observe(moe, [whole(0)], statistics, Progress(), edited=lambda path, figures: moe.masked({}))
