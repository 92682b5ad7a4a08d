"""What models are given and asked for, whatever their class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from compressor import walk
from compressor.calibration import TokenBatch
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
    together = walk.logits(model, padded())
    alone = torch.cat([walk.logits(model, whole(row)) for row in range(3)])
    assert together.shape == alone.shape == (sum(LENGTHS), alone.shape[1])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert model.training


def test_answers_of_a_class_without_a_head_are_its_hidden_states() -> None:
    model = tiny_model("mixtral")
    batch = whole(0)
    batch = TokenBatch(batch.input_ids % 64, batch.attention_mask)
    with torch.no_grad():
        expected = model.lm_head(walk.logits(model.model, batch))
    assert torch.equal(walk.logits(model, batch), expected)


@pytest.mark.parametrize("model_type", ["switch_transformers", "gemma4", "muse_spark_text", "mixtral"])
def test_base_model_takes_the_same_inputs(model_type: str) -> None:
    model = tiny.tiny_model(model_type).eval()
    body = model.base_model
    with torch.no_grad():
        answers = [body(**walk.model_inputs(body, batch))[0] for batch in (padded(), whole(1))]
    torch.testing.assert_close(answers[0][1:2, :4], answers[1], rtol=1e-4, atol=1e-4)


def names(model: Any, batch: TokenBatch) -> set[str]:
    return set(walk.model_inputs(model, batch))


def test_arguments() -> None:
    causal, two_parts = tiny.tiny_model("mixtral"), tiny.tiny_model("switch_transformers")
    assert names(causal, whole(0)) == {"input_ids", "use_cache"}
    assert names(causal, padded()) == {"input_ids", "attention_mask", "use_cache"}
    assert names(two_parts, whole(0)) == {"input_ids", "decoder_input_ids", "use_cache"}
    given = walk.model_inputs(two_parts, padded())
    assert given.keys() == names(two_parts, whole(0)) | {"attention_mask", "decoder_attention_mask"}
    assert torch.equal(given["input_ids"], given["decoder_input_ids"])
    assert torch.equal(given["attention_mask"], given["decoder_attention_mask"])
