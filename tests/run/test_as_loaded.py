"""`evaluate` measures whatever transformers loads; what is said of formats that recipes cannot work on."""

from __future__ import annotations

import io
import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.test_quantised import planned_for, recipe_for, source_of
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_models import tiny_folder, token_ids
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import compressor
from compressor import CheckpointError, RecipeError, UnsupportedModelError
from compressor.checkpoint.find import read_config
from compressor.checkpoint.quantization import loading_problem, reading_problem
from compressor.report.terminal import print_summary
from compressor.run import check
from compressor.run.apply import apply
from compressor.run.pipeline import evaluate

INT8 = {
    "_type": "Int8WeightOnlyConfig",
    "_version": 2,
    "_data": {
        "granularity": {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}},
        "group_size": None,
        "set_inductor_config": True,
    },
}
EXPERTS = ("re:.*experts.gate_up_proj", "re:.*experts.down_proj")


def torchao_folder(folder: Path, *, with_experts: bool = True) -> Path:
    """A Mixtral as torchao 0.18 saves it through transformers: int8 weights in pieces, what they are in the header."""
    shutil.copytree(tiny_folder("mixtral"), folder)
    pieces: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for name, tensor in _fused(load_file(folder / "model.safetensors")).items():
        path, _, leaf = name.rpartition(".")
        on_disk = path.replace(".mlp.", ".block_sparse_moe.")
        is_packed = ".self_attn." in name or (with_experts and ".experts." in name)
        about[name] = {"_type": "Tensor"}
        if not is_packed:
            pieces[f"{on_disk}.{leaf}"] = tensor.bfloat16()
            continue
        scale = tensor.abs().amax(-1, keepdim=True) / 127
        qdata = (tensor / scale).round().to(torch.int8)
        for piece, value in (
            ("qdata", qdata),
            ("scale", scale),
            ("zero_point", torch.zeros_like(scale).to(torch.int8)),
        ):
            pieces[f"{on_disk}._{leaf}_{piece}"] = value.contiguous()
        data = {
            "act_quant_kwargs": None,
            "reduce_range": False,
            "block_size": [*[1] * (tensor.dim() - 1), tensor.shape[-1]],
            "dtype": {"_type": "torch.dtype", "_data": "bfloat16"},
        }
        about[name] = {"_type": "Int8Tensor", "_data": data, "_tensor_data_names": ["zero_point", "qdata", "scale"]}
    header = {name: json.dumps(value) for name, value in about.items()}
    save_file(pieces, folder / "model.safetensors", header | {"tensor_names": json.dumps([*about]), "format": "pt"})
    by_name = dict.fromkeys((r"re:.*self_attn\..*_proj", *EXPERTS), INT8)
    kinds = {
        "_type": "FqnToConfig",
        "_version": 1,
        "_data": {"fqn_to_config": by_name, "module_fqn_to_config": by_name},
    }
    quantisation = {
        "quant_method": "torchao",
        "quant_type": {"default": kinds if with_experts else INT8},
        "include_input_output_embeddings": False,
        "modules_to_not_convert": None,
        "untie_embedding_weights": False,
    }
    raw = read_config(folder) | {"dtype": "bfloat16", "quantization_config": quantisation}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def _fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the model's names, experts stacked."""
    found = {
        name.replace("block_sparse_moe.", "mlp."): tensor for name, tensor in tensors.items() if ".experts." not in name
    }
    for layer in range(3):
        w1, w2, w3 = (
            torch.stack([tensors[f"model.layers.{layer}.block_sparse_moe.experts.{e}.{w}.weight"] for e in range(8)])
            for w in ("w1", "w2", "w3")
        )
        found[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat([w1, w3], 1)
        found[f"model.layers.{layer}.mlp.experts.down_proj"] = w2
    return found


def decision_of(tmp_path: Path) -> Path:
    recipe = recipe_for(tiny_folder("mixtral"), tmp_path) | {"output": str(tmp_path / "pruned")}
    recipe.pop("evaluate")
    compressor.compress(recipe)
    return tmp_path / "pruned/compressor/decision.json"


def test_what_is_said_of_torchao_is_true_and_leads_somewhere(tmp_path: Path) -> None:
    source = torchao_folder(tmp_path / "source")
    decision, recipe = decision_of(tmp_path), recipe_for(source, tmp_path)
    [note] = [note for note in check.inspect(str(source))["notes"] if "quantised" in note]
    assert note == (
        "the checkpoint is quantised (torchao), and a recipe cannot work on it: transformers reads this format in its "
        "packed form only; the bytes named are those of the unquantised model in bfloat16. Prune the unquantised "
        "model, then quantise the result; `compressor evaluate` measures both."
    )
    for act in (planned_for, compressor.compress):
        with pytest.raises(UnsupportedModelError) as refusal:
            act(recipe)
        assert str(refusal.value) == (
            f"recipe model: {source}: the checkpoint is quantised (torchao), and its weights cannot be read as "
            "numbers: transformers reads this format in its packed form only. Prune the unquantised model, then "
            "quantise the result; `compressor evaluate` measures both."
        )
    with pytest.raises(UnsupportedModelError) as refusal:
        apply(decision, str(source), tmp_path / "out", other_model=True)
    assert str(refusal.value) == (
        "model.layers.0.block_sparse_moe.experts._down_proj_qdata: a piece of a weight that torchao has taken apart, "
        "and its experts cannot be taken out of that. Apply the decision to the unquantised model, then quantise the "
        "result."
    )
    assert not (tmp_path / "out").exists()


def test_torchao_that_has_left_experts_alone_is_edited(tmp_path: Path) -> None:
    source = torchao_folder(tmp_path / "source", with_experts=False)
    # experts are stacked there, as transformers' loader takes them too
    apply(decision_of(tmp_path), str(source), tmp_path / "out", other_model=True)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    name = "model.layers.0.self_attn.k_proj._weight_qdata"
    assert torch.equal(before[name], after[name])
    assert after["model.layers.1.block_sparse_moe.experts.down_proj"].shape == (6, 32, 24)


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.parametrize("with_experts", [True, False])
def test_torchao_is_measured(with_experts: bool, tmp_path: Path) -> None:
    source = torchao_folder(tmp_path / "source", with_experts=with_experts)
    found = evaluate(recipe_for(source, tmp_path), str(source))["evaluation"]["after"]
    plain = evaluate(recipe_for(source, tmp_path), str(tiny_folder("mixtral")))["evaluation"]["after"]
    assert found["perplexity"]["tokens"]["perplexity"] == pytest.approx(
        plain["perplexity"]["tokens"]["perplexity"], rel=0.03
    )
    assert found["size"]["parameters"] == plain["size"]["parameters"]
    assert found["size"]["active_parameters"] == plain["size"]["active_parameters"]
    against = evaluate(recipe_for(source, tmp_path), str(source), against=str(tiny_folder("mixtral")))["evaluation"]
    assert against["after"]["perplexity"] == found["perplexity"]
    assert 0 < against["fidelity"]["tokens"]["kl"] < 0.05
    assert found["size"]["bytes"] < 0.6 * plain["size"]["bytes"]


@pytest.mark.skipif(find_spec("torchao") is not None, reason="torchao is installed")
def test_a_package_that_is_missing_is_named_before_weights_are_read(tmp_path: Path) -> None:
    source = torchao_folder(tmp_path / "source")
    (source / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError) as refusal:
        evaluate(recipe_for(source, tmp_path), str(source))
    assert str(refusal.value).startswith(
        f"{source}: the checkpoint is quantised (torchao), and transformers cannot load it here: "
    )
    assert "torchao" in str(refusal.value).partition("load it here: ")[2]


@pytest.mark.parametrize("problem", [reading_problem, lambda quantisation: loading_problem(quantisation, "cpu")])
def test_the_package_that_our_extra_brings(problem: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.checkpoint.quantization.find_spec", lambda name: None)
    assert problem({"quant_method": "compressed-tensors", "format": "pack-quantized"}) == (
        'the package compressed-tensors is missing (`pip install "moe-compressor[quantised]"`)'
    )


def test_nobodys_format_cannot_be_measured(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny_folder("mixtral"), source)
    raw = read_config(source) | {"quantization_config": {"quant_method": "nobody_knows"}}
    (source / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UnsupportedModelError, match=r"\(nobody_knows\), and transformers cannot load it here: Unknown"):
        evaluate(recipe_for(source, tmp_path), str(source))


# --- not quantised


def dense_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_a_dense_model_is_measured(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "source")
    recipe = recipe_for(source, tmp_path, random=2, speed=True)
    found = evaluate(recipe, str(source))
    model = AutoModelForCausalLM.from_pretrained(source)
    ids = token_ids(20, 24)[:8]
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert found["evaluation"]["after"]["perplexity"]["tokens"]["mean_loss"] == pytest.approx(loss, rel=1e-5)
    parameters = model.num_parameters()
    size = {"parameters": parameters, "active_parameters": parameters, "bytes": 4 * parameters}
    assert found["evaluation"]["after"]["size"] == size
    assert found["model"]["routers"] == []
    assert "experts_per_token" not in found["evaluation"]["after"]
    print_summary(found, console := Console(file=io.StringIO()))
    assert "active parameters" in console.file.getvalue()  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedModelError, match="no routed experts found"):
        compressor.compress(recipe)
    same = evaluate(recipe, str(source), against=str(source))["evaluation"]["fidelity"]["tokens"]
    assert (same["kl"], same["agreement"], same["delta_nll"]) == (0, 1, 0)


def test_a_model_whose_experts_cannot_be_understood_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_folder("mixtral")
    recipe = recipe_for(source, tmp_path)
    known = evaluate(recipe, str(source))["evaluation"]["after"]

    def refuse(*_: object, **__: object) -> None:
        raise UnsupportedModelError("its experts hang on each other.")

    monkeypatch.setattr(check, "structure_of", refuse)
    found = evaluate(recipe, str(source))["evaluation"]["after"]
    assert found["perplexity"] == known["perplexity"]
    assert found["size"] == known["size"] | {"active_parameters": None}
    with pytest.raises(RecipeError, match="weights cannot be read from disk: its experts hang on each other"):
        evaluate(recipe | {"weights": "disk"}, str(source))


def test_a_dense_model_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "source")
    with pytest.raises(RecipeError, match=r"memory: about .* weights cannot be read one decoder layer at a time"):
        evaluate(recipe_for(source, tmp_path) | {"memory": "10MB"}, str(source))


def test_a_quantised_model_is_loaded_by_transformers_where_it_fits_and_read_in_layers_where_asked(
    tmp_path: Path,
) -> None:
    source = source_of("mixtral", tmp_path / "source")
    recipe = recipe_for(source, tmp_path)
    original = str(tiny_folder("mixtral"))
    loaded, read = (
        evaluate(recipe | {"weights": where}, str(source), against=original)["evaluation"]
        for where in ("memory", "disk")
    )
    assert loaded["after"]["size"] == read["after"]["size"]
    assert loaded["after"]["perplexity"] == read["after"]["perplexity"]
    assert loaded["fidelity"] == read["fidelity"]
    assert 0 < loaded["fidelity"]["tokens"]["kl"] < 0.1


def test_a_format_that_loads_and_does_not_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: object, **__: object) -> None:
        raise ImportError("its kernel is not here")

    monkeypatch.setattr("transformers.MixtralForCausalLM.forward", forward)
    source = source_of("mixtral", tmp_path / "source")
    with pytest.raises(UnsupportedModelError) as refusal:
        evaluate(recipe_for(source, tmp_path), str(source))
    assert str(refusal.value) == (
        f"{source}: transformers loads the quantised checkpoint, and cannot run it here: its kernel is not here"
    )


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    source = dense_folder(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"1 tensor\(s\) are missing from the checkpoint: model.layers.1.mlp.up_p"
    ):
        evaluate(recipe_for(source, tmp_path), str(source))


def test_a_dtype_is_torchs_or_its_name() -> None:
    for dtype in ("float64", torch.float64):
        assert compressor.load(tiny_folder("mixtral"), dtype=dtype)[0].dtype is torch.float64
    with pytest.raises(compressor.CheckpointError, match="found 'fp32', expected auto, or one of torch's"):
        compressor.load(tiny_folder("mixtral"), dtype="fp32")
