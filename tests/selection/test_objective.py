"""Losses of domains and their blends, by hand.

Four batches: two of code with squared errors 9 and 16 (roots 3 and 4), one of prose with 4 (2), one of code with 1 (1).
The layer's output has squared norms 100, 100, 16 and 400 (roots 10, 10, 4 and 20). So

    code    loss 3 + 4 + 1 = 8,  norm 10 + 10 + 20 = 40,  relative 0.2
    prose   loss 2,              norm 4,                  relative 0.5
"""

from __future__ import annotations

import pytest
import torch

from compressor.selection.objective import Blend, Objective, blend_weights

DOMAINS = ["code", "code", "prose", "code"]
SQUARED_ERRORS = torch.tensor([9.0, 16.0, 4.0, 1.0], dtype=torch.float64)
SQUARED_OUTPUT = torch.tensor([100.0, 100.0, 16.0, 400.0], dtype=torch.float64)


def made(blend: Blend) -> Objective:
    return Objective.of_batches(DOMAINS, SQUARED_OUTPUT, blend)


def test_losses_by_domain() -> None:
    objective = made("mean")
    assert objective.domains == ("code", "prose")
    assert objective.norm_D.tolist() == [40.0, 4.0]
    assert objective.losses(SQUARED_ERRORS).tolist() == [8.0, 2.0]
    assert objective.relative(objective.losses(SQUARED_ERRORS)).tolist() == pytest.approx([0.2, 0.5])


@pytest.mark.parametrize(
    ("blend", "expected", "is_relative"),
    [
        ("mean", 0.35, True),
        ("worst", 0.5, True),
        ("pooled", 10.0, False),
        ({"code": 2, "prose": 1}, 0.3, True),
        ({"prose": 3}, 0.5, True),
    ],
)
def test_blends(blend: Blend, expected: float, is_relative: bool) -> None:
    objective = made(blend)
    assert float(objective(SQUARED_ERRORS)) == pytest.approx(expected)
    assert objective.is_relative is is_relative


def test_one_domain_is_the_published_objective() -> None:
    """Σ_b ‖·‖, to the bit: dividing by a constant could make ties out of what are none."""
    for blend in ("mean", "worst", "pooled", {"text": 3.0}):
        objective = Objective.of_batches(["text"] * 4, SQUARED_OUTPUT, blend)
        assert float(objective(SQUARED_ERRORS)) == 10.0
        assert not objective.is_relative


def test_many_sets_at_once() -> None:
    """The last dimension is the batches; all before it stay."""
    sets = torch.stack([SQUARED_ERRORS, 4 * SQUARED_ERRORS]).reshape(2, 1, 4)
    assert made("mean")(sets).tolist() == [[pytest.approx(0.35)], [pytest.approx(0.7)]]


def test_a_domain_whose_output_is_zero_loses_nothing() -> None:
    objective = Objective.of_batches(["a", "b"], torch.tensor([0.0, 4.0]), "mean")
    assert float(objective(torch.tensor([0.0, 1.0]))) == pytest.approx(0.25)


def test_rounding_below_zero_is_zero() -> None:
    assert float(made("pooled")(torch.tensor([-1e-12, 0.0, 0.0, 0.0]))) == 0.0


def test_weights() -> None:
    assert blend_weights("mean", ["a", "b"]).tolist() == [0.5, 0.5]
    assert blend_weights({"b": 3, "a": 1}, ["a", "b", "c"]).tolist() == [0.25, 0.75, 0.0]
