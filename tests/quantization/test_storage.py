"""What is written: read by the format's description, by transformers, and beside what llm-compressor writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from edit.test_disk import shard_up
from safetensors.torch import load_file
from tiny_models import random_model, token_ids, write_checkpoint, write_token_file
from transformers import AutoConfig, AutoModelForCausalLM

import compressor
from compressor import CheckpointError, PluginError, RecipeError
from compressor.run.pipeline import evaluate
from compressor_quantization import storage
from compressor_quantization.schemes import Scheme

Tensors = dict[str, torch.Tensor]
SMALL = {"hidden_size": 64, "num_hidden_layers": 2}
FACTS = json.loads((Path(__file__).parent / "facts.json").read_text())


def write_model(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    width = {"intermediate_size": 96} if name == "mixtral" else {"moe_intermediate_size": 96, "intermediate_size": 96}
    width |= {"shared_expert_intermediate_size": 96} if name == "qwen2_moe" else {}
    return write_checkpoint(random_model(name, **(SMALL | width | changes)).to(dtype), folder)


def tensors_of(folder: Path) -> Tensors:
    return {name: one for path in sorted(folder.glob("*.safetensors")) for name, one in load_file(path).items()}


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def recipe(model: Path, options: Mapping[str, Any], *before: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"model": str(model), "passes": [*before, {"quantization": dict(options)}], **others}


# A reader written from the description of the format -------------------------------------------------------


def unpacked(words_RW: torch.Tensor, bits: int, num_columns: int) -> torch.Tensor:
    """Number i of a row has the bits from i · bits on, the lowest first, of its 32-bit words; 2^(bits − 1) is 0."""
    rows = []
    for row in words_RW.tolist():
        whole = sum((word % 2**32) << (32 * place) for place, word in enumerate(row))
        rows.append([(whole >> (place * bits)) % 2**bits - 2 ** (bits - 1) for place in range(num_columns)])
    return torch.tensor(rows)


def spread(of_each: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Of each group, output or block to each weight."""
    for dim in (0, 1):
        size = -(-shape[dim] // of_each.shape[dim]) if of_each.shape[dim] < shape[dim] else 1
        size = 128 if of_each.shape[dim] > 1 and shape[dim] > 128 and dim == 0 else size
        of_each = of_each.repeat_interleave(size, dim).narrow(dim, 0, shape[dim])
    return of_each


def read(folder: Path) -> Tensors:
    """All weights as numbers."""
    stored, groups = tensors_of(folder), config_of(folder)["quantization_config"]["config_groups"].values()
    found: Tensors = {}
    for name, one in stored.items():
        module, _, leaf = name.rpartition(".")
        scale = stored.get(f"{module}.weight_scale")
        if scale is None or leaf == "bias":
            found[name] = one
        if leaf == "weight" and scale is not None:
            found[name] = (one.float() * spread(scale, tuple(one.shape)).float()).to(scale.dtype)
        if leaf != "weight_packed" or scale is None:
            continue
        shape = tuple(stored[f"{module}.weight_shape"].tolist())
        bits = 32 * one.shape[1] // shape[1]
        assert any(group["weights"]["num_bits"] == bits for group in groups)
        levels = unpacked(one, bits, shape[1])
        if (zero := stored.get(f"{module}.weight_zero_point")) is not None:
            levels = levels - spread(unpacked(zero.T, bits, shape[0]).T, shape)
        found[f"{module}.weight"] = levels.to(scale.dtype) * spread(scale, shape)
    return found


def loaded(folder: Path, *, dequantise: bool) -> Any:
    """As transformers loads it: as numbers, or packed and unpacked when it first runs."""
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = {**config.quantization_config, "dequantize": dequantise}
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values())
    model(token_ids(1, 4))
    return model


def plain(folder: Path, tensors: Tensors, target: Path) -> Any:
    """A model of these numbers, which is quantised in no way."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).bfloat16()
    del model.config.quantization_config
    model.save_pretrained(target)
    from safetensors.torch import save_file

    save_file({name: one.contiguous() for name, one in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16)


READ = {
    "mixtral": {"scheme": "W4A16", "group_size": 32, "attention": "W8A16"},
    "qwen3_moe": {"scheme": "W8A16", "group_size": "channel", "attention": "W4A16_ASYM"},
    "qwen2_moe": {"scheme": "FP8_DYNAMIC", "attention": "W8A16", "dense": "W8A16", "group_size": 32},
    "deepseek_v3": {"scheme": "W4A16", "group_size": 8, "attention": True, "dense": True},
}


@pytest.mark.parametrize(
    "name",
    ["mixtral", *(pytest.param(one, marks=pytest.mark.nightly) for one in READ if one != "mixtral")],
)
def test_read_by_the_description_and_by_transformers(name: str, tmp_path: Path) -> None:
    """The same numbers, and they are the nearest ones of each grid; what is not asked for is as it was."""
    more = {"num_hidden_layers": 2} if name == "deepseek_v3" else {}
    source = write_model(name, tmp_path / "model", **more)
    if name == "qwen2_moe":
        source = shard_up(source)
    compressor.compress(recipe(source, READ[name], weights="disk"), output=tmp_path / "out")
    before, found = tensors_of(source), read(tmp_path / "out")
    assert found.keys() == before.keys()
    changed = {key for key in before if not torch.equal(before[key], found[key])}
    parts = [".experts."]
    parts += [".self_attn."] if "attention" in READ[name] else []
    parts += [".shared_expert", "layers.0.mlp."] if "dense" in READ[name] else []
    wanted = {key for key, one in before.items() if one.ndim == 2 and any(part in key for part in parts)}
    wanted -= {key for key in wanted if "gate.weight" in key or "expert_gate" in key}
    assert changed == wanted
    for key in changed:
        assert (found[key] - before[key]).norm() / before[key].norm() < 0.17, key
    expected = plain(tmp_path / "out", found, tmp_path / "plain")
    ways = (True,) if "W4A16_ASYM" in READ[name].values() else (True, False)  # zero points are read as numbers only
    for dequantise in ways:
        model = loaded(tmp_path / "out", dequantise=dequantise)
        for key, one in expected.state_dict().items():
            assert torch.equal(model.state_dict()[key], one), (key, dequantise)


TIED = {
    "in one scheme": {"scheme": "W4A16", "group_size": 32},
    "in two, behind pruning, in many files": {"scheme": "W8A16", "group_size": 32, "attention": "W4A16"},
    "of floats": {"scheme": "FP8_DYNAMIC", "attention": True},
}


@pytest.mark.parametrize("case", TIED)
def test_a_head_tied_to_the_embedding_stays_what_it_is(case: str, tmp_path: Path) -> None:
    """No file names it, so the list of what is not quantised has to: transformers would look for its packed weight."""
    source = write_model("mixtral", tmp_path / "model", tie_word_embeddings=True, num_hidden_layers=1)
    before = [{"expert_pruning": {"keep": 6, "criterion": "aimer"}}] if "pruning" in case else []
    source = shard_up(source) if before else source
    compressor.compress(recipe(source, TIED[case], *before), output=tmp_path / "out")
    assert "lm_head" in config_of(tmp_path / "out")["quantization_config"]["ignore"]
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(model.lm_head.weight, tensors_of(source)["model.embed_tokens.weight"])
    ids = token_ids(1, 4)
    assert torch.equal(model(ids).logits, compressor.load(tmp_path / "out")[0](ids).logits)


FEW_CASES = ("mixtral FP8_BLOCK", "qwen3_moe W4A16_ASYM")


@pytest.mark.parametrize(
    "case",
    [pytest.param(one, marks=() if one in FEW_CASES else pytest.mark.nightly) for one in FACTS if one != "about"],
)
def test_the_same_names_shapes_types_and_config_as_llm_compressor(case: str, tmp_path: Path) -> None:
    name, scheme = case.split()
    facts, is_asymmetric = FACTS[case], scheme.endswith("ASYM")
    width = {"mixtral": "intermediate_size", "qwen3_moe": "moe_intermediate_size"}[name]
    counts = {"num_local_experts": 2} if name == "mixtral" else {"num_experts": 2}
    sizes = {"hidden_size": 128, "num_hidden_layers": 1, "num_key_value_heads": 4, "head_dim": 32}
    source = write_model(name, tmp_path / "model", **(sizes | {width: 128} | counts))
    options = {"scheme": "W8A16", "attention": scheme} if is_asymmetric else {"scheme": scheme}
    compressor.compress(recipe(source, options), output=tmp_path / "out")
    stored, config = tensors_of(tmp_path / "out"), config_of(tmp_path / "out")["quantization_config"]
    about = {key: [str(one.dtype).removeprefix("torch."), list(one.shape)] for key, one in stored.items()}
    if is_asymmetric:  # of experts that is not read
        q_proj = {key: one for key, one in facts["tensors"].items() if "q_proj" in key}
        assert {key: one for key, one in about.items() if "q_proj" in key} == q_proj
        assert config["config_groups"]["config_group_1"] == facts["config"]["config_groups"]["config_group_0"]
    else:
        assert {key: one for key, one in about.items() if key in facts["tensors"]} == facts["tensors"]
        assert {key for key in about if ".experts.1." in key} == {key for key in facts["tensors"] if "experts" in key}
        assert config == facts["config"] | {"version": config["version"]}


# In runs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tokens(tmp_path: Path) -> dict[str, Any]:
    rows = write_token_file(tmp_path / "tokens.jsonl", token_ids(12, 24).tolist())
    return {
        "calibration": {"batch_size": 4, "data": [{"tokens": str(rows), "samples": 8}]},
        "evaluate": {"perplexity": [{"tokens": str(rows), "name": "text", "samples": 4}]},
    }


def test_behind_pruning_from_memory_and_from_disk(tokens: dict[str, Any], tmp_path: Path) -> None:
    """The same bytes; measured as `evaluate` measures it."""
    source = write_model("mixtral", tmp_path / "model")
    passes = {"expert_pruning": {"keep": {"0": 6, "1": 4}}}
    run = recipe(source, {"scheme": "W4A16", "group_size": 32}, passes, **tokens)
    records = {}
    for weights in ("memory", "disk"):
        records[weights] = compressor.compress({**run, "weights": weights}, output=tmp_path / weights).record
    for name in ("model.safetensors", "config.json", "compressor/decision.json"):
        assert (tmp_path / "memory" / name).read_bytes() == (tmp_path / "disk" / name).read_bytes()
    record = records["disk"]
    assert 0 < record["passes"][1]["checks"]["external_difference"] < 0.5
    assert record["passes"][1]["decision"]["layers"]["model.layers.0.mlp"] == {"scheme": "W4A16", "bits": 4.5}
    alone = evaluate({**run, "output": None}, str(tmp_path / "disk"))["evaluation"]["after"]
    assert alone["perplexity"] == record["evaluation"]["after"]["perplexity"]
    experts = [name.split(".")[5] for name in tensors_of(tmp_path / "disk") if "layers.1.block_sparse_moe.exp" in name]
    assert {*experts} == {"0", "1", "2", "3"}
    assert "quantization" in (tmp_path / "disk" / "README.md").read_text()


@pytest.mark.nightly
def test_interrupted_while_it_writes(tokens: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = shard_up(write_model("mixtral", tmp_path / "model"))
    run = recipe(source, {"scheme": "FP8_DYNAMIC"}, {"expert_pruning": {"keep": 6}}, weights="disk", **tokens)
    compressor.compress(run, output=tmp_path / "whole")
    save, calls = storage.save_file, []

    def stop(*args: Any) -> None:
        save(*args)
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage, "save_file", stop)
        with pytest.raises(KeyboardInterrupt):
            compressor.compress(run, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    compressor.compress(run, output=tmp_path / "out", resume=True)
    names = sorted(path.name for path in (tmp_path / "whole").glob("model*"))
    assert len(names) > 3
    for name in (*names, "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_two_of_four_zeros_stay(tokens: dict[str, Any], tmp_path: Path) -> None:
    source = write_model("mixtral", tmp_path / "model")
    run = recipe(source, {"scheme": "W4A16", "group_size": 32}, {"wanda": {}}, **tokens)
    compressor.compress({**run, "evaluate": None}, output=tmp_path / "out")
    experts = {name: one for name, one in read(tmp_path / "out").items() if ".experts." in name}
    assert len(experts) == 48
    for one in experts.values():
        assert (one.reshape(-1, 4) == 0).sum(1).ge(2).all()
        assert one.ne(0).float().mean() > 0.3


def test_names_that_transformers_does_not_know_are_caught(
    tokens: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As llm-compressor's release names Mixtral's experts: transformers would initialise them at random."""
    source = write_model("mixtral", tmp_path / "model")
    save = storage.save_file

    def renamed(tensors: Tensors, *args: Any) -> None:
        names = {".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}
        for old, new in names.items():
            tensors = {name.replace(old, new): one for name, one in tensors.items()}
        save(tensors, *args)

    monkeypatch.setattr(storage, "save_file", renamed)
    with pytest.raises(
        PluginError, match=r"what its external step has left is refused: .* missing from the checkpoint"
    ):
        compressor.compress(recipe(source, {"scheme": "FP8_DYNAMIC"}, **tokens), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


REFUSED = {
    "group": (
        {"scheme": "W4A16", "group_size": 48},
        "group_size: model.layers.0.mlp: the 64 inputs of experts.gate_up_proj cannot be divided into groups of 48; "
        "try another size",
    ),
    "larger": (
        {"scheme": "W4A16"},
        "group_size: model.layers.0.mlp: experts.gate_up_proj has 64 inputs, fewer than a group of 128; take a smaller "
        "one, or `channel`",
    ),
    "none": ({"scheme": "W4A16", "group_size": 0}, "group_size: a group has at least one input; found 0"),
    "of floats": (
        {"scheme": "FP8_DYNAMIC", "group_size": 32},
        "group_size: FP8_DYNAMIC stores 8-bit floats, not in groups; leave it out",
    ),
    "zero points": (
        {"scheme": "W4A16_ASYM", "group_size": 32},
        "scheme: model.layers.0.mlp: experts.gate_up_proj: neither transformers nor vLLM reads zero points of experts; "
        "take W4A16 for them",
    ),
    "blocks": (
        {"scheme": "FP8_BLOCK"},
        "scheme: model.layers.0.mlp: experts.gate_up_proj: transformers reads no scales of blocks of experts; take "
        "FP8_DYNAMIC for them",
    ),
    "part of a block": (
        {"scheme": "FP8_DYNAMIC", "attention": "FP8_BLOCK"},
        "model.layers.0.mlp: self_attn.q_proj.weight of [64, 64] cannot be divided into blocks of 128 × 128; take FP8_",
    ),
    "three": (
        {"scheme": "W4A16", "group_size": 32, "attention": "FP8_DYNAMIC", "dense": True},
        "dense: transformers reads one scheme of all that are no experts: give that of `attention`",
    ),
    "skipping": ({"scheme": "FP8_DYNAMIC"}, "it skips experts, and nothing reads a quantised one that does"),
    "constants": ({"scheme": "FP8_DYNAMIC"}, "some of its experts answer constants, and vLLM refuses that beside "),
    "twice": ({"scheme": "FP8_DYNAMIC"}, "weights are stored with 8.2222 bits by then, and nothing edits that"),
}
BEFORE: dict[str, dict[str, Any]] = {
    "skipping": {"dynamic_skipping": {}},
    "constants": {"expert_pruning": {"keep": 6, "replace": "constants"}},
    "twice": {"quantization": {"scheme": "FP8_DYNAMIC"}},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_check_refuses(case: str, tokens: dict[str, Any], tmp_path: Path) -> None:
    options, says = REFUSED[case]
    wide = {"hidden_size": 160} if options["scheme"] == "FP8_BLOCK" else {}
    run = recipe(write_model("mixtral", tmp_path / "model", num_hidden_layers=1, **wide), options, **tokens)
    run["passes"][:0] = [BEFORE[case]] if case in BEFORE else []
    run |= {"output": str(tmp_path / "out")}
    with pytest.raises(RecipeError) as error:
        compressor.check(run)
    assert says in str(error.value)


def test_without_the_package(tokens: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor_quantization.method.find_spec", lambda name: None)
    run = recipe(write_model("mixtral", tmp_path / "model"), {"scheme": "FP8_DYNAMIC"}, **tokens)
    with pytest.raises(
        RecipeError, match=r'compressed-tensors is missing \(`pip install "moe-compressor\[quantised\]"`'
    ):
        compressor.check(run | {"output": str(tmp_path / "out")})


def test_a_quantised_checkpoint_is_not_quantised_again(tokens: dict[str, Any], tmp_path: Path) -> None:
    run = recipe(write_model("mixtral", tmp_path / "model"), {"scheme": "FP8_DYNAMIC"})
    compressor.compress(run, output=tmp_path / "once")
    again = recipe(tmp_path / "once", {"scheme": "W4A16", "group_size": 32}) | {"output": str(tmp_path / "twice")}
    with pytest.raises(RecipeError, match="quantization changes numbers of experts, and the checkpoint is quantised"):
        compressor.check(again)


@pytest.mark.parametrize("name", ["gpt_oss", "granitemoe"])
def test_experts_in_one_tensor_are_refused(name: str, tmp_path: Path) -> None:
    """By `check`, whether they would be read from memory or from disk."""
    source = write_checkpoint(random_model(name), tmp_path / "model")
    run = recipe(source, {"scheme": "FP8_DYNAMIC"}) | {"output": str(tmp_path / "out")}
    with pytest.raises(
        RecipeError, match=r"passes\[0\].quantization: .*: files hold the matrices of all its experts in "
    ):
        compressor.check(run)


def test_a_weight_that_is_no_number_is_named(tmp_path: Path) -> None:
    model = random_model("mixtral", **SMALL)
    model.model.layers[1].mlp.experts.down_proj.data[3, 2, 1] = torch.inf
    source = write_checkpoint(model, tmp_path / "model")
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=f"{name} cannot be stored as W8A16: it holds NaN or infinity"):
        storage.write(source, tmp_path / "out", {name: (Scheme("W8A16"), True)})
