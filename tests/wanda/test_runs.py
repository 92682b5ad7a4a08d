"""Whole runs with zeros, and with scales: in memory, from disk, interrupted, between other passes, applied; refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_folder, token_ids, write_checkpoint, write_token_file
from torch import nn
from weight_runs import files, recipe, stopped_and_whole

import compressor
from compressor import MoEModel, RecipeError
from compressor.checkpoint.resume_state import Journal, ObservationJournal
from compressor.data.sequences import make_batches
from compressor.observe import forward
from compressor.run.apply import apply
from compressor.testing.tiny import tiny_model

CHAIN = (
    {"expert_pruning": {"keep": 6}},
    {"output_scale": {}},
    {"wanda": {"attention": True, "shared_experts": True}},
    {"dynamic_skipping": {}},
)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return write_token_file(tmp_path / "tokens.jsonl", token_ids(40, 24).tolist())


def has_two_of_four(weight_OI: torch.Tensor) -> bool:
    return bool((weight_OI.reshape(-1, 4) == 0).sum(1).ge(2).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("mixtral", marks=pytest.mark.nightly), "qwen2_moe"])
def test_in_memory_from_disk_and_applied_are_the_same_bytes(name: str, tokens: Path, tmp_path: Path) -> None:
    model = tiny_folder(name)
    memory = compressor.compress(recipe(tokens, *CHAIN, weights="memory", model=model), output=tmp_path / "memory")
    compressor.compress(recipe(tokens, *CHAIN, weights="disk", model=model), output=tmp_path / "disk")
    assert files(tmp_path / "memory") == files(tmp_path / "disk")
    apply(tmp_path / "disk" / "compressor" / "decision.json", str(model), tmp_path / "applied")
    assert files(tmp_path / "applied")["model.safetensors"] == files(tmp_path / "memory")["model.safetensors"]
    for entry in memory.record["passes"][1:3]:
        assert entry["checks"]["edited_against_float32"] < 1e-7
    for tensor_name, tensor in load_file(tmp_path / "memory" / "model.safetensors").items():
        is_sparse = "experts." in tensor_name or "shared_expert." in tensor_name or "self_attn" in tensor_name
        if is_sparse and tensor.ndim == 2:
            assert has_two_of_four(tensor), tensor_name
        elif "norm" not in tensor_name and "bias" not in tensor_name and "shared_expert_gate" not in tensor_name:
            assert not has_two_of_four(tensor), tensor_name


def test_progressive(tokens: Path, tmp_path: Path) -> None:
    """In memory and from disk it is the same, the first layer as otherwise, and later ones are given something else."""
    runs = {
        "memory": {"weights": "memory", "options": {"progressive": True}},
        "disk": {"weights": "disk", "options": {"progressive": True}},
        "plain": {"weights": "memory", "options": {}},
    }
    for name, one in runs.items():
        passes = {"wanda": one["options"]}
        compressor.compress(recipe(tokens, passes, weights=one["weights"]), output=tmp_path / name)
    memory, disk, plain = (
        load_file(tmp_path / name / "compressor" / "decision.safetensors") for name in ("memory", "disk", "plain")
    )
    assert all(torch.equal(own, disk[name]) for name, own in memory.items())
    same = {name.split("/")[1] for name, own in memory.items() if torch.allclose(own, plain[name], rtol=1e-4)}
    assert same == {min(name.split("/")[1] for name in memory)}
    assert files(tmp_path / "memory")["model.safetensors"] == files(tmp_path / "disk")["model.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type",
    [
        "gpt_oss",
        "dbrx",
        *(pytest.param(one, marks=pytest.mark.nightly) for one in ("llama4_text", "switch_transformers")),
    ],
)
def test_zeros_lie_among_the_inputs_whatever_the_layout(model_type: str, tokens: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tiny_model(model_type), tmp_path / "model")
    results = [
        compressor.compress(recipe(tokens, {"wanda": {}}, weights=weights, model=folder), output=tmp_path / weights)
        for weights in ("memory", "disk")
    ]
    assert files(tmp_path / "memory") == files(tmp_path / "disk")
    moe = MoEModel(results[0].model)
    for layer in moe.layers:
        tensors = {name: one for name, one in moe.model.named_parameters() if name.startswith(f"{layer.experts}.")}
        matrices = [one for one in tensors.values() if one.squeeze().ndim > 1 and "bias" not in one.__dict__]
        transposed = model_type in ("gpt_oss", "llama4_text")
        for name, one in tensors.items():
            if one.ndim > 1 and "bias" not in name:
                rows = one.reshape(-1, one.shape[-1])
                if transposed:
                    rows = one.transpose(-1, -2)
                elif name.endswith("mlp.w2"):  # multiplied from the other side
                    rows = one.reshape(layer.num_experts, -1, one.shape[-1]).transpose(-1, -2)
                assert has_two_of_four(rows.contiguous()), name
        assert matrices


def test_norms_are_those_of_an_experts_own_tokens(tokens: Path, tmp_path: Path) -> None:
    """Against a plain run with hooks in a model whose experts are modules in a list."""
    folder = write_checkpoint(tiny_model("switch_transformers"), tmp_path / "model")
    result = compressor.compress(recipe(tokens, {"wanda": {}}, model=folder), output=tmp_path / "out")
    found = load_file(tmp_path / "out" / "compressor" / "decision.safetensors")
    model, _ = compressor.load(folder)
    path = MoEModel(model).layers[0].path
    squares: dict[str, torch.Tensor] = {}
    for child, module in model.get_submodule(f"{path}.experts").named_children():

        def keep(module: nn.Module, args: tuple[torch.Tensor, ...], child: str = child) -> None:
            squares[child] = squares.get(child, 0) + args[0].double().square().sum(0)

        module.wi.register_forward_pre_hook(keep)
    rows = [torch.tensor(json.loads(line)["input_ids"]) for line in tokens.read_text().splitlines()[:24]]
    with torch.no_grad():
        for batch in make_batches(rows, 8, ""):
            model(**forward.model_inputs(model, batch))
    norms = found[f"0/{path}/experts.*.wi.weight"]
    for child, expected in squares.items():
        torch.testing.assert_close(norms[int(child.rpartition("_")[2])], expected.sqrt().float(), rtol=1e-4, atol=1e-5)
    unseen = result.record["passes"][0]["decision"]["layers"][path]["without_tokens"]
    assert unseen == [expert for expert in range(len(norms)) if not norms[expert].any()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "number"),
    [
        ("disk", 7),
        *(
            pytest.param(*one, marks=pytest.mark.nightly)
            for one in [("memory", 5), ("memory", 7), ("disk", 2), ("disk", 4), ("disk", 5)]
        ),
    ],
)
def test_interrupted_between_layers_ends_with_the_same_bytes(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str, number: int
) -> None:
    """The figures of layer 2 of pruning, 1 and 2 of scaling beside the original, and 1 of the norms are the last."""
    names: list[str] = []

    def is_last(name: str) -> bool:
        names.append(name)
        return len(names) == number

    run = recipe(tokens, *CHAIN[:3], weights=weights)
    found, whole = stopped_and_whole(run, tmp_path, monkeypatch, (ObservationJournal, "put"), is_last)
    assert found == whole


@pytest.mark.nightly
def test_interrupted_after_an_edit_ends_with_the_same_bytes(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recipe(tokens, *CHAIN[:3], weights="disk")
    kept_by = (Journal, "note")
    found, whole = stopped_and_whole(run, tmp_path, monkeypatch, kept_by, lambda name: name == "edited 1.output_scale")
    assert found == whole


def test_decided_again(tokens: Path, tmp_path: Path) -> None:
    compressor.compress(recipe(tokens, {"wanda": {"attention": True}}), output=tmp_path / "out")
    statistics = tmp_path / "out" / "compressor" / "statistics.safetensors"
    options = {"pattern": "unstructured", "sparsity": 0.25, "attention": True}
    decided = compressor.decide(statistics, "wanda", output=tmp_path / "other.json", **options)
    apply(tmp_path / "other.json", str(tiny_folder("mixtral")), tmp_path / "applied")
    whole = compressor.compress(recipe(tokens, {"wanda": options}), output=tmp_path / "whole")
    assert whole.record["passes"][0]["decision"] == decided["passes"][0]["decision"]
    assert (tmp_path / "applied" / "model.safetensors").read_bytes() == files(tmp_path / "whole")["model.safetensors"]


def test_decided_again_of_other_places(tokens: Path, tmp_path: Path) -> None:
    """Zeros come where the options of the decision ask for them, not where those of the run did."""
    folder = tiny_folder("qwen2_moe")
    both = {"attention": True, "shared_experts": True}
    for name, options in (("all", both), ("experts", {}), ("merged", None)):
        passes = {"wanda": options} if options is not None else {"expert_merging": {"keep": 6}}
        compressor.compress(recipe(tokens, passes, model=folder), output=tmp_path / name)
    files_of = {one: tmp_path / one / "compressor" / "statistics.safetensors" for one in ("all", "experts", "merged")}
    decided = compressor.decide(files_of["all"], "wanda", output=tmp_path / "some.json", shared_experts=True)
    shapes = next(iter(decided["passes"][0]["tensors"].values()))
    assert any("shared_expert." in name for name in shapes)
    assert not any("self_attn" in name for name in shapes)
    with pytest.raises(RecipeError, match=r"wanda\.attention: the figures have none of linear maps outside"):
        compressor.decide(files_of["experts"], "wanda", attention=True)
    with pytest.raises(RecipeError, match=r"another method than wanda: 0\.expert_merging has no 'inputs of experts'"):
        compressor.decide(files_of["merged"], "wanda")


def test_what_cannot_be_is_refused(tokens: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_folder("mixtral"), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    (model / "config.json").write_text(json.dumps(config))
    jetmoe = write_checkpoint(tiny_model("jetmoe"), tmp_path / "jetmoe")
    nemotron = write_checkpoint(tiny_model("nemotron_h"), tmp_path / "nemotron")
    for passes, of, says in (
        ([{"wanda": {}}], model, r"passes\[0\]\.wanda: .* the checkpoint is quantised"),
        ([{"wanda": {}}], jetmoe, r"passes\[0\]\.wanda: model\.layers\.0\.mlp: its experts cannot be observed"),
        ([{"wanda": {"attention": True}}], nemotron, r"passes\[0\]\.wanda\.attention: .* has no linear map outside"),
        ([{"wanda": {"sparsity": 0.3}}], None, r"passes\[0\]\.wanda\.sparsity: 2:4 is half of the weights"),
        ([{"wanda": {}}, {"expert_merging": {"keep": 6}}], None, r"passes\[1\]\.expert_merging: .*zeros"),
        ([{"output_scale": {}}], None, r"passes\[0\]\.output_scale: in no layer does the loss on held-out text fall"),
    ):
        with pytest.raises(RecipeError, match=says):
            compressor.compress(recipe(tokens, *passes, model=of), output=tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_scales_without_held_out_text_are_refused_before_the_model_is_loaded(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = recipe(tokens, *CHAIN[:2])
    del everything["calibration"]["data"][0]["samples"]
    monkeypatch.delattr("compressor.run.pipeline.load_moe")
    says = r"passes\[1\]\.output_scale: output_scale judges by held-out text, and none is left"
    with pytest.raises(RecipeError, match=says):
        compressor.compress(everything, output=tmp_path / "out")
