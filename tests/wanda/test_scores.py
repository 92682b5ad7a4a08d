"""Which weights become zero: by hand, and against one weight after another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor_wanda.scores import Norms, sparse


def test_two_of_four_by_hand() -> None:
    """Scores of the first output: 4·1, 3·10, 2·1, 1·10 | 1·1, 2·1, 3·1, 4·1."""
    weight = torch.tensor([[4.0, 3, 2, 1, 1, 2, 3, 4], [-1, 1, -1, 1, 0, 0, 5, 0]])
    norm = torch.tensor([1.0, 10, 1, 10, 1, 1, 1, 1])
    assert sparse(weight, norm, "2:4").tolist() == [[0, 3, 0, 1, 0, 0, 3, 4], [0, 1, 0, 1, 0, 0, 5, 0]]
    # half of each output: its scores are 4 30 2 10 1 2 3 4 (of equals the first go), and 1 10 1 10 0 0 5 0
    assert sparse(weight, norm, "unstructured").tolist() == [[4, 3, 0, 1, 0, 0, 0, 4], [0, 1, -1, 1, 0, 0, 5, 0]]
    assert sparse(weight, norm, "4:8").tolist() == sparse(weight, norm, "unstructured").tolist()
    assert sparse(weight, norm, "unstructured", 0.25).tolist()[0] == [4, 3, 0, 1, 0, 2, 3, 4]


def test_an_expert_without_tokens_goes_by_its_weights() -> None:
    weight = torch.tensor([[4.0, -3, 2, 1]])
    assert sparse(weight, torch.zeros(4), "2:4").tolist() == [[4, -3, 0, 0]]


def slowly(weight_OI: Tensor, norm_I: Tensor, size: int, num_zeros: int) -> Tensor:
    found = weight_OI.clone()
    for row, weights in enumerate(weight_OI.tolist()):
        for start in range(0, len(weights), size):
            scores = [(abs(weights[i]) * float(norm_I[i]), i) for i in range(start, start + size)]
            for _, i in sorted(scores)[:num_zeros]:
                found[row, i] = 0
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("pattern", "size", "zeros"), [("2:4", 4, 2), ("4:8", 8, 4), ("unstructured", 24, 12)])
def test_against_one_weight_after_another(dtype: torch.dtype, pattern: str, size: int, zeros: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(10, 24, generator=generator).to(dtype)
    norm_I = (torch.rand(24, generator=generator) * 4).round() + 1  # many ties in half precision
    found = sparse(weight_OI, norm_I, pattern)
    assert found.dtype == dtype
    assert torch.equal(found, slowly(weight_OI, norm_I, size, zeros))
    assert torch.equal(sparse(weight_OI.T.contiguous().T, norm_I, pattern), found)
    assert torch.equal(sparse(found, norm_I, pattern), found)


def test_widths_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="6 inputs of a matrix cannot be taken 4 at a time for 2:4 zeros"):
        sparse(torch.ones(2, 6), torch.ones(6), "2:4")


def test_norms_by_hand() -> None:
    of_experts, of_one = Norms(3, "expert"), Norms(3, "layer")
    of_experts.update(torch.tensor([[1.0, 2], [3, 0]]), 1)
    of_experts.update(torch.tensor([[1.0, 1]]), 0)
    of_experts.update(torch.tensor([[2.0, 2]]), 1)
    of_one.update(torch.tensor([[1.0, 2], [3, 0]]), None)
    assert of_experts.tensors()["squares.expert"].tolist() == [[1, 1], [14, 8], [0, 0]]
    assert of_experts.tensors()["tokens"].tolist() == [1, 3, 0]
    assert of_one.tensors()["squares.layer"].tolist() == [10, 4]
    assert of_one.tensors()["tokens"].tolist() == 2
    assert of_one.tensors()["squares.layer"].dtype == torch.float64
