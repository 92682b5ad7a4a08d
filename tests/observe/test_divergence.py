"""KL of two models' answers: by hand, against a loop in float64, and its edges."""

from __future__ import annotations

import math

import pytest
import torch

from compressor.observe import divergence
from compressor.observe.divergence import kl_divergences


def test_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.25, 0.5]])
    expected = 0.5 * math.log(2) + 0.25 * math.log(1 / 2)
    assert kl_divergences(p.log(), q.log()).item() == pytest.approx(expected, rel=1e-6)


def test_equals_a_loop_in_float64_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    one, other = torch.randn(7, 11), torch.randn(7, 11)
    slow = []
    for a, b in zip(one.double(), other.double(), strict=True):
        p, q = a.exp() / a.exp().sum(), b.exp() / b.exp().sum()
        slow.append(sum(float(x * (x / y).log()) for x, y in zip(p, q, strict=True)))
    monkeypatch.setattr(divergence, "_CHUNK_ELEMENTS", 33)
    torch.testing.assert_close(kl_divergences(one, other), torch.tensor(slow, dtype=torch.float64), rtol=1e-5, atol=0)


def test_equal_logits_give_exactly_0_and_no_token_nothing() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 9, dtype=torch.bfloat16)
    assert kl_divergences(logits, logits.clone()).tolist() == [0.0] * 5
    assert kl_divergences(logits[:0], logits[:0]).tolist() == []


def test_an_id_that_both_exclude_counts_nothing_and_one_that_only_the_other_excludes_is_infinite() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert kl_divergences(p, torch.tensor([[0.5, 0.5, 0.0]]).log()).item() == 0.0
    assert kl_divergences(p, torch.tensor([[1.0, 0.0, 0.0]]).log()).item() == math.inf
