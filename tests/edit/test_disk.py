"""Editing a checkpoint on disk: quantised ones, chained passes, links, faults. That it is the edit in memory, byte by
byte, is checked for every architecture by `compressor.testing.check_model`.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import keep_six, random_model, tiny_folder, token_ids
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

import compressor
from compressor.checkpoint.find import Checkpoint
from compressor.checkpoint.headers import fingerprint, verify_files
from compressor.checkpoint.load import load_model
from compressor.checkpoint.output import OutputFolder, disk_errors_named
from compressor.edit import safetensors_writer
from compressor.edit.checkpoint_edit import Edit, meta_model, plan_edit
from compressor.edit.safetensors_writer import ShardEdit, TensorEdit, write_shard
from compressor.errors import CheckpointError, UnsupportedModelError
from compressor.model.moe_model import MoEModel
from compressor.model.structure import ExpertAxis
from compressor.testing.checks import save
from compressor.testing.tiny import tiny_model

Tensors = dict[str, torch.Tensor]
MOE = "model.layers.0.block_sparse_moe."


def tensors_of(folder: Path) -> Tensors:
    return {name: tensor for shard in verify_files(folder) for name, tensor in load_file(shard.path).items()}


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name


def edited(folder: Path, output: Path, *edits: Callable[[MoEModel], object], **write: Any) -> Edit:
    """Edit a folder on disk into another."""
    found = Checkpoint(str(folder), folder, trust_remote_code=True)
    before = meta_model(found)
    after = copy.deepcopy(before)
    for edit in edits:
        edit(after)
    planned = plan_edit(found, before, after)
    output.mkdir()
    planned.write(output, **write)
    assert planned.bytes_after == sum(shard.num_bytes for shard in verify_files(output))
    return planned


def six(moe: MoEModel) -> None:
    moe.keep(keep_six(moe))


def in_memory(folder: Path, output: Path, *edits: Callable[[MoEModel], object]) -> Tensors:
    moe = MoEModel(load_model(Checkpoint(str(folder), folder, trust_remote_code=True)))
    for edit in edits:
        edit(moe)
    save(moe, output)
    return tensors_of(output)


def write_changed(name: str | Any, folder: Path, change: Callable[[str, torch.Tensor], Tensors], **config: Any) -> Path:
    """A copy of a tiny model whose tensors are replaced, and whose config.json gets other keys."""
    if isinstance(name, str):
        shutil.copytree(tiny_folder(name), folder)
    else:
        name.save_pretrained(folder)
    new: Tensors = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        new |= {other: value.contiguous() for other, value in change(key, tensor).items()}
    save_file(new, folder / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def shard_up(folder: Path, num_shards: int = 3) -> Path:
    """Spread the tensors of a folder over several files, by turns."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in range(num_shards):
        file = f"model-{number + 1:05}-of-{num_shards:05}.safetensors"
        part = dict(sorted(tensors.items())[number::num_shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size, "total_parameters": 1, "mine": "kept"}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


# --- what is said of every tensor


def test_plan_says_what_becomes_of_each_tensor() -> None:
    folder = tiny_folder("mixtral")
    found = Checkpoint("mine", folder)
    before = meta_model(found)
    after = copy.deepcopy(before)
    six(after)
    plan = plan_edit(found, before, after)
    about = {name: (one.becomes, one.new_name, one.new_shape) for name, one in plan.tensors.items()}
    assert about[MOE + "experts.0.w1.weight"] == ("copied", MOE + "experts.0.w1.weight", (24, 32))  # kept: 0 2 3 5 6 7
    assert about[MOE + "experts.1.w1.weight"][0] == "dropped"
    assert about[MOE + "experts.2.w1.weight"] == ("renamed", MOE + "experts.1.w1.weight", (24, 32))
    assert about[MOE + "experts.7.w2.weight"] == ("renamed", MOE + "experts.5.w2.weight", (32, 24))
    assert about[MOE + "gate.weight"] == ("cut", MOE + "gate.weight", (6, 32))
    assert about["lm_head.weight"][0] == "copied"
    dropped = 3 * 2 * 3 * 24 * 32 * 4 + 3 * 2 * 32 * 4  # three layers, two experts of three matrices; two router rows
    assert plan.bytes_before - plan.bytes_after - dropped < 8000  # the header is shorter too
    assert plan.bytes_before - plan.bytes_after > dropped
    assert not any((folder / name).exists() for name in ("model.safetensors.partial", "out"))


def test_nothing_removed_is_the_same_file(tmp_path: Path) -> None:
    edited(tiny_folder("mixtral"), tmp_path / "out", lambda moe: moe.keep({x.path: range(8) for x in moe.layers}))
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja", "LICENSE", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny_folder("mixtral") / name).read_bytes()


@pytest.mark.parametrize("name", ["mixtral4", "deepseek4"])
def test_remote_code_with_experts_in_a_list(name: str, tmp_path: Path) -> None:
    edited(tiny_folder(name), tmp_path / "out", six)
    assert_same(tensors_of(tmp_path / "out"), in_memory(tiny_folder(name), tmp_path / "live", six))
    expected = json.loads((tmp_path / "live" / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == expected


def test_stacked_names_for_a_class_that_also_reads_single_experts(tmp_path: Path) -> None:
    """A checkpoint may hold what the class holds, though transformers would save single experts."""
    model = random_model("mixtral")
    folder = tmp_path / "stacked"
    model.save_pretrained(folder, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors_of(folder)
    edited(folder, tmp_path / "out", six)
    found = tensors_of(tmp_path / "out")
    assert torch.equal(
        found["model.layers.0.mlp.experts.down_proj"],
        model.model.layers[0].mlp.experts.down_proj[[0, 2, 3, 5, 6, 7]],
    )
    assert_same(found, in_memory(folder, tmp_path / "live", six))


# --- several passes


def fewer(count: int, **options: Any) -> Callable[[MoEModel], None]:
    """The last experts of every layer, some of them in the first."""

    def keep(moe: MoEModel) -> None:
        kept = {layer.path: range(layer.num_experts - count, layer.num_experts) for layer in moe.layers}
        moe.keep(kept | {moe.layers[0].path: [0, *kept[moe.layers[0].path]][: moe.layers[0].num_experts]}, **options)

    return keep


def test_passes_one_after_another(tmp_path: Path) -> None:
    edits = (six, fewer(4, top_k=1), fewer(3))
    edited(tiny_folder("mixtral"), tmp_path / "out", *edits)
    assert_same(tensors_of(tmp_path / "out"), in_memory(tiny_folder("mixtral"), tmp_path / "live", *edits))
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw == json.loads((tmp_path / "live" / "config.json").read_text())
    assert raw["num_experts_per_tok"] == 1
    assert raw["compressor"]["num_experts"] == {
        "model.layers.0.mlp": 4,
        "model.layers.1.mlp": 3,
        "model.layers.2.mlp": 3,
    }


def test_uneven_checkpoint_is_pruned_further(tmp_path: Path) -> None:
    edited(tiny_folder("mixtral"), tmp_path / "first", fewer(4))
    edited(tmp_path / "first", tmp_path / "out", fewer(3))
    assert_same(tensors_of(tmp_path / "out"), in_memory(tiny_folder("mixtral"), tmp_path / "live", fewer(4), fewer(3)))
    compressor.load(tmp_path / "out")


def six_of_seven(moe: MoEModel) -> None:
    moe.keep({layer.path: [0, 2, 3, 4, 5, 6] for layer in moe.layers})


@pytest.mark.parametrize("then", [(), (six_of_seven,)], ids=["once", "and pruned again"])
def test_padded_experts_stay_switched_off(then: Any, tmp_path: Path) -> None:
    def padded(moe: MoEModel) -> None:
        kept = {layer.path: [1, 2, 3, 4, 5, 7] for layer in moe.layers} | {moe.layers[0].path: [0, 1, 2, 3, 4, 5, 7]}
        moe.keep(kept, padded=True)

    edited(tiny_folder("gpt_oss"), tmp_path / "out", padded, *then)
    found = tensors_of(tmp_path / "out")
    assert_same(found, in_memory(tiny_folder("gpt_oss"), tmp_path / "live", padded, *then))
    assert sum(int((tensor == -1e9).sum()) for tensor in found.values()) == 2


def test_tables_of_expert_ids_after_two_passes(tmp_path: Path) -> None:
    """A stand-in may go in the second pass: ids are redirected once for each, as in memory."""
    source = tmp_path / "source"
    tiny_model("deepseek_v4").save_pretrained(source)
    edits = (
        lambda moe: moe.keep({layer.path: [0, 1, 3, 4, 6, 7] for layer in moe.layers}),
        lambda moe: moe.keep({layer.path: [1, 2, 4] for layer in moe.layers}),
    )
    plan = edited(source, tmp_path / "out", *edits)
    tables = [one for one in plan.tensors.values() if one.becomes == "rewritten"]
    assert tables
    assert all("tid2eid" in one.name for one in tables)
    found = tensors_of(tmp_path / "out")
    assert_same(found, in_memory(source, tmp_path / "live", *edits))
    assert {int(found[one.new_name].max()) for one in tables} == {2}


# --- quantised


def per_expert_fp8(name: str, tensor: torch.Tensor) -> Tensors:
    return blocks_fp8(name, tensor) if ".experts." in name else {name: tensor}


def blocks_fp8(name: str, tensor: torch.Tensor) -> Tensors:
    """Blocks of 8 × 8, each with its scale."""
    rows, columns = tensor.shape
    blocks = tensor.reshape(rows // 8, 8, columns // 8, 8)
    scales = blocks.abs().amax((1, 3)) / 448
    values = (blocks / scales[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
    return {name: values, name + "_scale_inv": scales}


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 8]}


def answers(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(token_ids(2, 12, seed=3)).logits


def dequantised(folder: Path, how: Any) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=how, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def test_fp8_with_scales_of_blocks(tmp_path: Path) -> None:
    """What is left is not touched; dequantised by transformers it answers as if pruned after dequantising."""
    source = write_changed("mixtral", tmp_path / "source", per_expert_fp8, quantization_config=FP8)
    edited(source, tmp_path / "out", six)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    for leaf in ("w1.weight", "w1.weight_scale_inv", "w2.weight", "w3.weight_scale_inv"):
        old, new = before[f"{MOE}experts.7.{leaf}"], after[f"{MOE}experts.5.{leaf}"]
        assert old.dtype == new.dtype
        assert torch.equal(old.view(torch.uint8), new.view(torch.uint8))
    assert len(before) - len(after) == 3 * 2 * 3 * 2
    how = FineGrainedFP8Config(dequantize=True, weight_block_size=(8, 8))
    moe = MoEModel(dequantised(source, how))
    six(moe)
    assert torch.equal(answers(dequantised(tmp_path / "out", how)), answers(moe.model))


def mxfp4(name: str, tensor: torch.Tensor) -> Tensors:
    """Random codes and scales of the right shapes: [E, rows, columns / 32, 16] and [E, rows, columns / 32]."""
    if not name.endswith(("gate_up_proj", "down_proj")):
        return {name: tensor}
    experts, columns, rows = tensor.shape
    generator = torch.Generator().manual_seed(len(name) + rows)
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(120, 126, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
    return {name + "_blocks": blocks, name + "_scales": scales}


def test_mxfp4_stacked(tmp_path: Path) -> None:
    source = write_changed(
        random_model("gpt_oss", intermediate_size=32), tmp_path / "source", mxfp4,
        quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    )  # fmt: skip
    edited(source, tmp_path / "out", six)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    for leaf in ("gate_up_proj_blocks", "gate_up_proj_scales", "gate_up_proj_bias", "down_proj_blocks"):
        name = f"model.layers.1.mlp.experts.{leaf}"
        assert torch.equal(after[name], before[name][[1, 2, 3, 4, 5, 7]])
    moe = MoEModel(dequantised(source, Mxfp4Config(dequantize=True)))
    six(moe)
    assert torch.equal(answers(dequantised(tmp_path / "out", Mxfp4Config(dequantize=True))), answers(moe.model))


def companions(*leaves: tuple[str, tuple[int, ...], torch.dtype]) -> Callable[[str, torch.Tensor], Tensors]:
    """Replace every expert's weight by tensors of these names, with numbers of its own."""

    def change(name: str, tensor: torch.Tensor) -> Tensors:
        if ".experts." not in name:
            return {name: tensor}
        stem, number = name.removesuffix("weight"), int(name.partition(".experts.")[2].partition(".")[0])
        return {stem + leaf: torch.full(shape, number + 1).to(dtype) for leaf, shape, dtype in leaves}

    return change


FORMATS = {
    "gptq": (
        ("qweight", (4, 24), torch.int32), ("qzeros", (1, 3), torch.int32), ("scales", (1, 24), torch.float16),
        ("g_idx", (32,), torch.int32),
    ),
    "compressed-tensors": (
        ("weight_packed", (24, 4), torch.int32), ("weight_scale", (24, 1), torch.bfloat16),
        ("weight_zero_point", (3, 1), torch.int32), ("weight_shape", (2,), torch.int64),
        ("weight_g_idx", (32,), torch.int32),
    ),
    "bitsandbytes": (
        ("weight", (384, 1), torch.uint8), ("weight.absmax", (12,), torch.uint8),
        ("weight.quant_map", (16,), torch.float32), ("weight.nested_absmax", (1,), torch.float32),
        ("weight.quant_state.bitsandbytes__nf4", (90,), torch.uint8),
    ),
    "fp8": (
        ("weight", (24, 32), torch.float8_e4m3fn), ("weight_scale", (), torch.float32),
        ("input_scale", (), torch.float32),
    ),
    "modelopt": (  # NVFP4, two numbers a byte
        ("weight", (24, 16), torch.uint8), ("weight_scale", (24, 2), torch.float8_e4m3fn),
        ("weight_scale_2", (), torch.float32), ("input_scale", (), torch.float32),
    ),
    "nvfp4-pack-quantized": (  # the same, of compressed-tensors
        ("weight_packed", (24, 16), torch.uint8), ("weight_scale", (24, 2), torch.float8_e4m3fn),
        ("weight_global_scale", (1,), torch.float32), ("input_global_scale", (1,), torch.float32),
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", ["mixtral", "mixtral4"])
@pytest.mark.parametrize("method", FORMATS)
def test_everything_of_an_expert_goes_with_it(method: str, model: str, tmp_path: Path) -> None:
    """By the names of converters (mixtral) and of modules in a list (mixtral4)."""
    source = write_changed(
        model, tmp_path / "source", companions(*FORMATS[method]), quantization_config={"quant_method": method}
    )
    shard_up(source)
    edited(source, tmp_path / "out", six)
    found = tensors_of(tmp_path / "out")
    moe, _, rest = next(name for name in sorted(found) if ".experts.0." in name).partition("experts.0.")
    matrix = rest.partition(".")[0]
    for leaf, shape, dtype in FORMATS[method]:
        numbers = []
        for number in range(6):
            tensor = found[f"{moe}experts.{number}.{matrix}.{leaf}"]
            assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
            numbers.append(int(tensor.float().flatten()[0]))
        assert numbers == [1, 3, 4, 6, 7, 8]  # experts 0 2 3 5 6 7
        assert f"{moe}experts.6.{matrix}.{leaf}" not in found
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert index["metadata"]["mine"] == "kept"


def stacked_fp8(name: str, tensor: torch.Tensor) -> Tensors:
    if not name.endswith(("gate_up_proj", "down_proj")):
        return {name: tensor}
    scale = torch.arange(8.0).reshape(8, 1, 1).expand(8, tensor.shape[1] // 8, tensor.shape[2] // 8)
    one = torch.ones(())
    return {name: tensor.to(torch.float8_e4m3fn), name + "_scale_inv": scale, name + "_activation_scale": one}


def test_stacked_fp8_with_stacked_scales(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_changed(random_model("gpt_oss"), source, stacked_fp8, quantization_config=FP8)
    edited(source, tmp_path / "out", six)
    found = tensors_of(tmp_path / "out")
    scale = found["model.layers.0.mlp.experts.down_proj_scale_inv"]
    assert scale[:, 0, 0].tolist() == [0, 2, 3, 5, 6, 7]
    assert found["model.layers.0.mlp.experts.down_proj_activation_scale"].shape == ()


def stacked_nvfp4(name: str, tensor: torch.Tensor) -> Tensors:
    """Numbers of each expert's own, two to a byte, blocks of 16 with a scale each; one scale of all inputs."""
    if not name.endswith(("gate_up_proj", "down_proj")):
        return {name: tensor}
    ids, (_, rows, columns) = torch.arange(8).reshape(8, 1, 1), tensor.shape
    return {
        name: ids.expand(8, rows, columns // 2).to(torch.uint8),
        f"{name}_weight_scale": ids.expand(8, rows, columns // 16).to(torch.float8_e4m3fn),
        f"{name}_weight_scale_2": ids.reshape(8).float(),
        f"{name}_input_scale": torch.ones(()),
    }


def test_stacked_nvfp4_that_only_modelopt_speaks_of(tmp_path: Path) -> None:
    """As its first releases: config.json says nothing of quantisation, and the file beside it all."""
    source = write_changed(random_model("gpt_oss", intermediate_size=32), tmp_path / "source", stacked_nvfp4)
    about = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}
    (source / "hf_quant_config.json").write_text(json.dumps(about))
    edited(source, tmp_path / "out", six)
    found = tensors_of(tmp_path / "out")
    for matrix in ("gate_up_proj", "down_proj"):
        at = f"model.layers.1.mlp.experts.{matrix}"
        for leaf in ("", "_weight_scale", "_weight_scale_2"):
            rows = found[at + leaf].float().reshape(6, -1)
            assert torch.equal(rows, torch.tensor([1.0, 2, 3, 4, 5, 7])[:, None].expand_as(rows))
        assert found[f"{at}_input_scale"].shape == ()
        assert found[at].dtype == torch.uint8
    assert json.loads((tmp_path / "out" / "hf_quant_config.json").read_text()) == about
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    (source / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": None}}))
    assert Checkpoint("mine", source).quantisation is None
    (source / "hf_quant_config.json").write_text(json.dumps({"quantization": "NVFP4"}))
    with pytest.raises(
        CheckpointError, match=r"hf_quant_config\.json: `quantization`: expected a JSON object, found s"
    ):
        _ = Checkpoint("mine", source).quantisation
    (source / "hf_quant_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json: expected a JSON object, found list"):
        edited(source, tmp_path / "other", six)


def test_linear_experts_by_number_where_the_model_stacks_them(tmp_path: Path) -> None:
    """llm-compressor writes gpt-oss with one linear map an expert: names that transformers' class has not."""

    def linear(name: str, tensor: torch.Tensor) -> Tensors:
        if not name.endswith(("gate_up_proj", "down_proj")):
            return {} if name.endswith("proj_bias") else {name: tensor}
        stem, _, leaf = name.rpartition(".")
        return {f"{stem}.{e}.{leaf}.weight_packed": torch.full((3, 2), e, dtype=torch.int32) for e in range(8)}

    source = write_changed("gpt_oss", tmp_path / "source", linear, quantization_config={"quant_method": "x"})
    edited(source, tmp_path / "out", six)
    found = tensors_of(tmp_path / "out")
    values = [int(found[f"model.layers.0.mlp.experts.{e}.down_proj.weight_packed"][0, 0]) for e in range(6)]
    assert values == [0, 2, 3, 5, 6, 7]
    assert "model.layers.0.mlp.experts.6.down_proj.weight_packed" not in found


def packed_flat(name: str, tensor: torch.Tensor) -> Tensors:
    """bitsandbytes on a stacked tensor: all experts' codes in one column."""
    if not name.endswith("gate_up_proj"):
        return {name: tensor}
    return {name: torch.zeros(tensor.numel() // 2, 1, dtype=torch.uint8), name + ".absmax": torch.zeros(192)}


def packed_router(name: str, tensor: torch.Tensor) -> Tensors:
    if not name.endswith("gate.weight"):
        return {name: tensor}
    return {name.removesuffix("weight") + "qweight": torch.zeros(4, 8, dtype=torch.int32)}


def odd_one(name: str, tensor: torch.Tensor) -> Tensors:
    extra = {MOE + "importance": torch.zeros(8)} if name == MOE + "gate.weight" else {}
    return {name: tensor, **extra}


@pytest.mark.parametrize(
    ("model", "change", "says"),
    [
        ("gpt_oss", packed_flat, "model.layers.0.mlp.experts.gate_up_proj [6144, 1]: its 8 experts are packed "
         "together, so none can be taken out of it. Prune the unquantised checkpoint"),
        ("mixtral", packed_router, f"{MOE}gate.qweight [4, 8]: its 8 experts are packed together"),
        ("mixtral", odd_one, f"{MOE}importance: inside a MoE block, and neither the block nor"),
    ],
)  # fmt: skip
def test_what_does_not_keep_experts_apart_is_refused(model: str, change: Any, says: str, tmp_path: Path) -> None:
    source = write_changed(model, tmp_path / "source", change, quantization_config={"quant_method": "x"})
    with pytest.raises(UnsupportedModelError) as refusal:
        edited(source, tmp_path / "out", six)
    assert str(refusal.value).startswith(says)


@pytest.mark.parametrize(("rows", "block", "fits"), [(16, 8, True), (16, 16, True), (12, 8, False), (24, 16, False)])
def test_blocks_that_straddle_flattened_experts_are_refused(rows: int, block: int, fits: bool, tmp_path: Path) -> None:
    """dbrx keeps experts in one dimension, [8 × rows, hidden]: a block of rows must belong to one expert."""

    def quantise(name: str, tensor: torch.Tensor) -> Tensors:
        if not name.endswith("mlp.w1"):
            return {name: tensor}
        scales = torch.arange(-(-tensor.shape[0] // block), dtype=torch.float32)[:, None]
        return {name: tensor.to(torch.float8_e4m3fn), name + "_scale_inv": scales.expand(-1, 2)}

    model = tiny_model("dbrx", ffn_hidden_size=rows)
    settings = {"quant_method": "fp8", "weight_block_size": [block, block]}
    source = write_changed(model, tmp_path / "source", quantise, quantization_config=settings)
    kept = [0, 2, 3, 5, 6, 7]
    keep = lambda moe: moe.keep({layer.path: kept for layer in moe.layers})  # noqa: E731
    if not fits:
        with pytest.raises(UnsupportedModelError, match="its 8 experts are packed together"):
            edited(source, tmp_path / "out", keep)
        return
    edited(source, tmp_path / "out", keep)
    [name] = [key for key in tensors_of(source) if key.endswith("w1_scale_inv")][:1]
    each = rows // block
    expected = [expert * each + row for expert in kept for row in range(each)]
    assert tensors_of(tmp_path / "out")[name][:, 0].tolist() == expected


def test_lists_of_modules_that_are_not_quantised(tmp_path: Path) -> None:
    named = [MOE + "experts.3.w1", MOE + "experts.1", MOE + "experts.1.w2", "lm_head", MOE + "gate", "re:.*gate$"]
    source = write_changed(
        "mixtral", tmp_path / "source", companions(*FORMATS["fp8"]),
        quantization_config={"quant_method": "x", "ignore": named, "groups": {"0": {"targets": ["Linear"]}},
                             "by_module": {MOE + "experts.7.w1": {"bits": 8}, MOE + "experts.1.w1": {"bits": 2}}},
    )  # fmt: skip
    (source / "hf_quant_config.json").write_text(json.dumps({"quantization": {"exclude_modules": named[:2]}}))
    edited(source, tmp_path / "out", six)  # kept: 0 2 3 5 6 7
    raw = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert raw["ignore"] == [MOE + "experts.2.w1", "lm_head", MOE + "gate", "re:.*gate$"]
    assert raw["by_module"] == {MOE + "experts.5.w1": {"bits": 8}}
    assert raw["groups"] == {"0": {"targets": ["Linear"]}}
    beside = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    assert beside == {"quantization": {"exclude_modules": [MOE + "experts.2.w1"]}}


def test_an_expert_that_is_not_there(tmp_path: Path) -> None:
    def lacking(name: str, tensor: torch.Tensor) -> Tensors:
        return {} if name.startswith(MOE + "experts.7.") else companions(*FORMATS["gptq"])(name, tensor)

    source = write_changed("mixtral", tmp_path / "source", lacking, quantization_config={"quant_method": "gptq"})
    with pytest.raises(CheckpointError, match=r"by its config it has 8 experts, the checkpoint holds 7 \("):
        edited(source, tmp_path / "out", six)


# --- against the model's config


@pytest.mark.parametrize(
    ("config", "change", "says"),
    [
        ({"num_local_experts": 6}, None, "mine: 9 tensor(s) have other shapes in the checkpoint: "),
        ({}, lambda n, t: {n: t[:-1]} if n == "lm_head.weight" else {n: t},
         "mine: 1 tensor(s) have other shapes in the checkpoint: lm_head.weight ([63, 32], by its config [64, 32])"),
        ({}, lambda n, t: {} if n == "model.norm.weight" else {n: t},
         "mine: 1 tensor(s) are missing from the checkpoint: model.norm.weight"),
        ({}, lambda n, t: {n: t, n + "_2": t.clone()} if n == "model.norm.weight" else {n: t},
         "mine: 1 tensor(s) are not expected in the checkpoint: model.norm.weight_2"),
        ({}, lambda n, t: {} if n == MOE + "experts.3.w2.weight" else {n: t},
         f"mine: {MOE}experts.3.w2.weight is missing."),
        ({}, lambda n, t: {n: t.int() if n == MOE + "gate.weight" else t},
         f"mine: {MOE}gate.weight holds I32, where the model has numbers like float32."),
    ],
)  # fmt: skip
def test_checkpoint_that_is_not_what_its_config_says(config: Any, change: Any, says: str, tmp_path: Path) -> None:
    source = write_changed("mixtral", tmp_path / "source", change or (lambda n, t: {n: t}), **config)
    found = Checkpoint("mine", source)
    before = meta_model(found)
    with pytest.raises(CheckpointError) as refusal:
        plan_edit(found, before, copy.deepcopy(before))
    assert str(refusal.value).startswith(says)


# --- writing


def test_shards_that_do_not_change_are_linked(tmp_path: Path) -> None:
    source = shard_up(shutil.copytree(tiny_folder("mixtral"), tmp_path / "source"), 3)
    tensors = tensors_of(source)
    for file in source.glob("*.safetensors"):
        file.unlink()
    experts = {name: tensor for name, tensor in tensors.items() if "block_sparse_moe" in name}
    rest = {name: tensor for name, tensor in tensors.items() if name not in experts}
    save_file(rest, source / "a.safetensors", metadata={"format": "pt"})
    save_file(experts, source / "b.safetensors", metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(rest, "a.safetensors") | dict.fromkeys(experts, "b.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    (source / "a.safetensors").chmod(0o640)
    before = {path.name: (path.read_bytes(), path.stat().st_mode) for path in source.iterdir()}
    found = Checkpoint("mine", source)
    model = meta_model(found)
    smaller = copy.deepcopy(model)
    six(smaller)
    plan = plan_edit(found, model, smaller)
    with OutputFolder(tmp_path / "out") as output:
        plan.write(output.path, hard_link=True)
        output.finish()
    assert (tmp_path / "out" / "a.safetensors").samefile(source / "a.safetensors")
    assert not (tmp_path / "out" / "b.safetensors").samefile(source / "b.safetensors")
    assert {path.name: (path.read_bytes(), path.stat().st_mode) for path in source.iterdir()} == before
    assert plan.num_bytes_to_write(hard_link=True) == (tmp_path / "out" / "b.safetensors").stat().st_size
    (tmp_path / "copied").mkdir()
    plan.write(tmp_path / "copied")
    assert not (tmp_path / "copied" / "a.safetensors").samefile(source / "a.safetensors")
    assert_same(tensors_of(tmp_path / "copied"), tensors_of(tmp_path / "out"))


def test_links_into_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    blobs, source = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    shutil.copytree(tiny_folder("mixtral"), blobs)
    source.mkdir(parents=True)
    for path in blobs.iterdir():
        (source / path.name).symlink_to(Path("../../blobs") / path.name)
    edited(source, tmp_path / "out", six, hard_link=True)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert_same(tensors_of(tmp_path / "out"), in_memory(tiny_folder("mixtral"), tmp_path / "live", six))


def test_file_that_loses_all_its_tensors_goes(tmp_path: Path) -> None:
    source = shutil.copytree(tiny_folder("mixtral"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    weight_map = {name: "b.safetensors" if ".experts.1." in name else "a.safetensors" for name in tensors}
    for file in ("a.safetensors", "b.safetensors"):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, source / file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    edited(source, tmp_path / "out", lambda moe: moe.keep({x.path: [0, 2, 3, 4, 5, 6, 7] for x in moe.layers}))
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == ["a.safetensors"]
    with safe_open(tmp_path / "out" / "a.safetensors", "pt") as file:
        assert file.metadata() is None


def test_experts_along_an_inner_dimension_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are gathered in pieces of some bytes, or copied one by one where a piece is larger than that."""
    tensor = torch.arange(5 * 4 * 3, dtype=torch.int16).reshape(5, 4, 3)
    save_file({"a": tensor}, tmp_path / "a.safetensors")
    shard = verify_files(_single(tmp_path))[0]
    cut = TensorEdit("a", "cut", "a", "I16", (5, 4, 3), (5, 2, 3), ExpertAxis(1), (0, 3))
    for chunk in (2**23, 60, 10):
        monkeypatch.setattr(safetensors_writer, "_CHUNK", chunk)
        written = write_shard(ShardEdit(shard, (cut,)), tmp_path / "b.safetensors", hard_link=False)
        assert written == tmp_path / "b.safetensors.partial"
        assert torch.equal(load_file(written)["a"], tensor[:, [0, 3]])


def _single(folder: Path) -> Path:
    (folder / "a.safetensors").rename(folder / "model.safetensors")
    return folder


def test_without_copying_in_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other systems, and copies from one file system to another."""
    monkeypatch.delattr(os, "copy_file_range")
    monkeypatch.setattr(safetensors_writer, "_CHUNK", 1000)
    edited(tiny_folder("mixtral"), tmp_path / "out", six)
    assert_same(tensors_of(tmp_path / "out"), in_memory(tiny_folder("mixtral"), tmp_path / "live", six))


def test_file_that_may_not_grow(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with (
            pytest.raises(CheckpointError, match=r"/out: writing failed: File too large\. Nothing is left"),
            OutputFolder(tmp_path / "out") as output,
            disk_errors_named(tmp_path / "out"),
        ):
            edited(tiny_folder("mixtral"), output.path / "weights", six)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def planned(source: Path) -> Edit:
    found = Checkpoint("mine", source)
    before = meta_model(found)
    after = copy.deepcopy(before)
    six(after)
    return plan_edit(found, before, after)


def test_source_that_is_cut_meanwhile(tmp_path: Path) -> None:
    plan = planned(source := shutil.copytree(tiny_folder("mixtral"), tmp_path / "source"))
    os.truncate(source / "model.safetensors", 100_000)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ends at byte 100,000, its header says later"):
        plan.write(tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_source_that_is_replaced_meanwhile(tmp_path: Path) -> None:
    """Headers are read once, and here a file's would lead to the bytes of another one."""
    plan = planned(source := shutil.copytree(tiny_folder("mixtral"), tmp_path / "source"))
    tensors = load_file(path := source / "model.safetensors")
    save_file({name: tensors[name].half() for name in tensors}, path)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its header is another one .* changed meanwhile\.$"):
        plan.write(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


# --- the command


def decision_of(folder: Path, kept: Mapping[str, list[int]], path: Path) -> Path:
    options = {"keep": 6}
    layers = {layer: {"kept": ids, "dropped": sorted({*range(8)} - {*ids})} for layer, ids in kept.items()}
    about = {"reference": "mine", "fingerprint": fingerprint(folder, verify_files(folder))}
    done = {"method": "expert_pruning", "version": "2", "options": options, "decision": {"layers": layers}}
    path.write_text(json.dumps({"format": 2, "model": about, "passes": [done]}))
    return path


def test_apply_to_a_quantised_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from compressor.machine.progress import Progress
    from compressor.run.apply import apply

    source = write_changed("mixtral", tmp_path / "source", per_expert_fp8, quantization_config=FP8)
    kept = keep_six(meta_model(Checkpoint("mine", source)))
    decision = decision_of(source, kept, tmp_path / "decision.json")
    apply(decision, str(source), tmp_path / "out", progress=Progress("lines"))
    assert "editing on disk, without loading the model" in capsys.readouterr().err
    edited(source, tmp_path / "expected", six)
    assert_same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected"))
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (raw["num_local_experts"], raw["quantization_config"]) == (6, FP8)


def test_skipping_is_refused_on_a_quantised_checkpoint(tmp_path: Path) -> None:
    """It would run unskipped everywhere."""
    from compressor.run.apply import apply

    source = write_changed("mixtral", tmp_path / "source", per_expert_fp8, quantization_config=FP8)
    rule = {"rule": "ratio", "renormalise": True, "beta": 0.5}
    layers = {f"model.layers.{number}.mlp": rule for number in range(3)}
    done = {"method": "dynamic_skipping", "version": "1", "options": {}, "decision": {"layers": layers}}
    (tmp_path / "decision.json").write_text(json.dumps({"format": 2, "passes": [done]}))
    with pytest.raises(UnsupportedModelError, match="no reader skips on a quantised checkpoint"):
        apply(tmp_path / "decision.json", str(source), tmp_path / "out")


def test_apply_loads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compressor.run import apply as applying

    monkeypatch.setattr(applying, "load_model", lambda *_, **__: pytest.fail("weights were read"))
    kept = keep_six(meta_model(Checkpoint("mine", tiny_folder("mixtral"))))
    decision = decision_of(tiny_folder("mixtral"), kept, tmp_path / "decision.json")
    applying.apply(decision, str(tiny_folder("mixtral")), tmp_path / "out", hard_link=True)
    compressor_folder = tmp_path / "out" / "compressor"
    assert json.loads((compressor_folder / "decision.json").read_text())["passes"][0]["method"] == "expert_pruning"


def _refuses(*_: Any) -> None:
    raise UnsupportedModelError("it is stored in another way")


def test_apply_says_why_it_loads_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from compressor.machine.progress import Progress
    from compressor.run import apply as applying

    kept = keep_six(meta_model(Checkpoint("mine", tiny_folder("mixtral"))))
    decision = decision_of(tiny_folder("mixtral"), kept, tmp_path / "decision.json")
    applying.apply(decision, str(tiny_folder("mixtral")), tmp_path / "disk")
    monkeypatch.setattr(applying, "plan_edit", _refuses)
    applying.apply(decision, str(tiny_folder("mixtral")), tmp_path / "memory", progress=Progress("lines"))
    assert "it cannot be edited on disk, because it is stored in another way" in capsys.readouterr().err
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "disk" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()
