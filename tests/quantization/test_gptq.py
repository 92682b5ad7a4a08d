"""GPTQ by hand, against elimination one input after another, and in runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from in_threads import together
from tiny_models import random_model, tiny_model, token_ids, write_checkpoint, write_token_file
from weight_runs import stopped_and_whole

import compressor
from compressor import MoEModel, RecipeError
from compressor.checkpoint.resume_state import ObservationJournal
from compressor.observe.statistic import linear_sites
from compressor.plugins import load_plugins
from compressor_quantization.gptq import add_squares, gptq, order_of, owed
from compressor_quantization.rounding import Grid, grid_for
from compressor_quantization.schemes import Scheme


def naive(weight_OI: torch.Tensor, hessian_II: torch.Tensor, grid: Grid, dampening: float) -> torch.Tensor:
    """The largest input left is rounded; the others take the values that are best then, with the inverse of what is
    left of H; and so on. float64.
    """
    squares_I = hessian_II.diagonal()
    mean = float(squares_I.mean())
    damped_II = hessian_II.double() + torch.diag((squares_I == 0) * mean + dampening * mean).double()
    left = squares_I.argsort(descending=True, stable=True).tolist()
    own_OI, found_OI = weight_OI.double().clone(), torch.zeros_like(weight_OI)
    while left:
        at = left[0]
        inverse = torch.linalg.inv(damped_II[left][:, left])
        found_OI[:, at] = torch.where(weight_OI[:, at] == 0, 0, grid.rounded(own_OI.float())[:, at])
        lost_O = (own_OI[:, at] - found_OI[:, at]) / inverse[0, 0]
        own_OI[:, left] -= lost_O[:, None] * inverse[0]
        left = left[1:]
    return found_OI


def rounded(weight_OI: torch.Tensor, hessian_II: torch.Tensor, dampening: float, grid: Grid) -> torch.Tensor:
    order_I = order_of(hessian_II.diagonal())
    owed_II = owed(hessian_II, order_I, dampening)
    assert owed_II is not None
    return grid.numbers(gptq(weight_OI, order_I, owed_II, grid))


def loss(weight_OI: torch.Tensor, found_OI: torch.Tensor, inputs_TI: torch.Tensor) -> float:
    return float(((weight_OI - found_OI) @ inputs_TI.T).double().square().sum())


def test_two_inputs_by_hand() -> None:
    """Input 0 is the larger: 0.6 becomes 1, 0.4 too much; so input 1 should be 0.7 − 0.4 · H₁₀ / H₁₁ = 0.3, which is 0.
    To the nearest both would be 1, at a loss of 0.65 instead of 0.25.
    """
    hessian = torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    weight = torch.tensor([[0.6, 0.7]])
    grid = Grid(Scheme("W4A16", 2), torch.ones(1, 1))
    found = rounded(weight, hessian, 1e-9, grid)
    assert found.tolist() == [[1.0, 0.0]]
    assert grid.rounded(weight).tolist() == [[1.0, 1.0]]
    lost = [(weight - one) @ hessian @ (weight - one).T for one in (found, grid.rounded(weight))]
    assert [float(one) for one in lost] == pytest.approx([0.25, 0.65])


@pytest.mark.parametrize("name", ["W4A16", "W8A16", "W4A16_ASYM", "FP8_DYNAMIC", "FP8_BLOCK"])
def test_against_elimination(name: str) -> None:
    """More inputs than a block has; with one that was never there, and weights that are 0."""
    generator = torch.Generator().manual_seed(3)
    inputs_TI = torch.randn(400, 160, generator=generator) @ torch.randn(160, 160, generator=generator)
    inputs_TI[:, 7] = 0
    weight_OI = torch.randn(6, 160, generator=generator)
    weight_OI[:, 11::20] = 0
    before_OI = weight_OI.clone()
    grid = grid_for(weight_OI, Scheme(name, None if name.startswith("FP8") else 32))
    hessian_II = inputs_TI.T @ inputs_TI
    found = rounded(weight_OI, hessian_II, 0.01, grid)
    assert torch.equal(weight_OI, before_OI)
    expected = naive(weight_OI, hessian_II, grid, 0.01)
    assert (found != expected).float().mean() < 0.01  # a number that lies between two may go either way
    assert loss(weight_OI, found, inputs_TI) == pytest.approx(loss(weight_OI, expected, inputs_TI), rel=0.05)
    assert loss(weight_OI, found, inputs_TI) < 0.8 * loss(weight_OI, grid.rounded(weight_OI), inputs_TI)
    assert not found[:, 11::20].any()
    assert torch.equal(grid.rounded(found), found)
    assert torch.equal(grid.numbers(grid.codes(found)), found)


def test_what_cannot_be_inverted() -> None:
    """Fewer tokens than inputs are no matter; figures that are no numbers are."""
    few_TI = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    assert owed(few_TI.T @ few_TI, torch.arange(16), 0.01) is not None
    assert owed(torch.full((4, 4), torch.nan), torch.arange(4), 0.01) is None
    assert order_of(torch.tensor([1.0, 3.0, 3.0, 2.0])).tolist() == [0, 3, 2, 1]


def test_half_of_a_symmetric_matrix_is_enough() -> None:
    """More inputs than are added up at once; `owed` fills in what lies above the diagonal."""
    inputs_TI = torch.randn(40, 600, generator=torch.Generator().manual_seed(0))
    hessian_II = torch.zeros(600, 600)
    for part_TI in inputs_TI.split(25):
        add_squares(hessian_II, part_TI)
    assert hessian_II[0, 599] == 0
    assert owed(hessian_II, torch.arange(600), 0.01) is not None
    torch.testing.assert_close(hessian_II, inputs_TI.T @ inputs_TI)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_site_has_its_weights(name: str) -> None:
    """[outputs, inputs], however the model has them."""
    moe = MoEModel(tiny_model(name))
    [layer, *_] = moe.layers
    sites = {site.name: site for site in linear_sites(moe.model, layer)}
    shapes = {name: (32, 24) if "down" in name else (48, 32) for name in ("experts.gate_up_proj", "experts.down_proj")}
    own = dict(moe.model.get_submodule(layer.experts).named_parameters())
    for site, shape in shapes.items():
        weight = sites[site].weight(3)
        assert tuple(weight.shape) == shape
        stored = own[site.removeprefix("experts.")][3]
        assert torch.equal(weight, stored.T if name == "gpt_oss" else stored)
    q_proj = sites["self_attn.q_proj.weight"]
    assert torch.equal(q_proj.weight(None), moe.model.get_parameter(layer.linears[q_proj.name]))


# In runs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gptq")
    model = random_model("mixtral", hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    tokens = write_token_file(folder / "tokens.jsonl", token_ids(16, 24).tolist())
    return {
        "model": str(write_checkpoint(model.bfloat16(), folder / "model")),
        "calibration": {"batch_size": 8, "data": [{"tokens": str(tokens), "samples": 16}]},
    }


def passes(**options: Any) -> list[dict[str, Any]]:
    scheme = {"scheme": "W4A16", "group_size": 32, "attention": True}
    return [{"expert_pruning": {"keep": 6}}, {"quantization": scheme | options}]


def test_nearer_than_to_the_nearest(run: dict[str, Any], tmp_path: Path) -> None:
    """From memory and from disk the same bytes, whose answers are nearer to those before."""
    records = {}
    for weights, method in (("memory", "gptq"), ("disk", "gptq"), ("disk", "rtn")):
        recipe = {**run, "passes": passes(method=method), "weights": weights}
        records[method] = compressor.compress(recipe, output=tmp_path / f"{method} {weights}").record["passes"][1]
    both = [(tmp_path / f"gptq {weights}" / "model.safetensors").read_bytes() for weights in ("memory", "disk")]
    assert both[0] == both[1]
    assert both[0] != (tmp_path / "rtn disk" / "model.safetensors").read_bytes()
    differences = [records[method]["checks"]["external_difference"] for method in ("gptq", "rtn")]
    assert differences[0] < 0.8 * differences[1]
    assert "rounded by gptq" in records["gptq"]["description"]["notes"]


@pytest.mark.nightly
def test_experts_with_too_few_tokens_are_named(run: dict[str, Any], tmp_path: Path) -> None:
    """With so few that all are rounded to the nearest, the same bytes are written."""
    few = {**run, "passes": passes(method="gptq", min_tokens=10**6), "weights": "disk"}
    [_, entry] = compressor.compress(few, output=tmp_path / "few").record["passes"]
    compressor.compress({**run, "passes": passes(), "weights": "disk"}, output=tmp_path / "rtn")
    assert [layer["to_nearest"] for layer in entry["decision"]["layers"].values()] == [[0, 1, 2, 3, 4, 5]] * 2
    assert "to_nearest" in [column["key"] for column in entry["description"]["columns"]]
    both = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("few", "rtn")]
    assert both[0] == both[1]


@pytest.mark.nightly
def test_interrupted_between_layers(run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def is_last(name: str) -> bool:
        names.append(name)
        return len(names) == 3

    recipe = {**run, "passes": passes(method="gptq"), "weights": "disk"}
    found, whole = stopped_and_whole(recipe, tmp_path, monkeypatch, (ObservationJournal, "put"), is_last)
    assert found == whole


def test_several_processes_are_refused_before_anything_is_read(run: dict[str, Any], tmp_path: Path) -> None:
    recipe = {**run, "model": "nowhere", "passes": passes(method="gptq"), "output": str(tmp_path / "out")}
    says = "passes[1].quantization: quantization cannot share its work out among 2 processes; run it in one"
    for error in together(2, lambda processes: compressor.compress(recipe, processes=processes)):
        assert isinstance(error, RecipeError)
        assert says in str(error)


def test_sums_are_counted() -> None:
    """Σ x xᵀ of 64 and of 96 inputs of each of 8 experts, and of 64 of each of q, k and v and o; none of `rtn`."""
    moe = MoEModel(random_model("mixtral", hidden_size=64, intermediate_size=96, num_hidden_layers=1))
    kind = load_plugins().methods["quantization"]
    for options, expected in (
        ({"method": "gptq"}, 8 * (64**2 + 96**2)),
        ({"method": "gptq", "attention": True}, 8 * (64**2 + 96**2) + 4 * 64**2),
        ({}, 0),
    ):
        method = kind(kind.options_type(scheme="W4A16", **options), {})
        assert method.bytes_of_sums(moe.layers[0], 64, 1) == 4 * expected


def test_an_option_without_effect(run: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"quantization\.dampening: `method: rtn` looks at no text"):
        compressor.check({**run, "passes": passes(dampening=0.1), "output": str(tmp_path / "out")})
