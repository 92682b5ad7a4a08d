"""Extra prediction layers (MTP, next-n heads) that a checkpoint has and transformers does not build, end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from edit.test_disk import FP8, blocks_fp8
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3PreTrainedModel
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoePreTrainedModel

import compressor
from compressor.checkpoint.headers import verify_files
from compressor.edit.extra_layers import ExtraLayers
from compressor.plugins import load_plugins
from compressor.recipe.schema import load_recipe
from compressor.run import check

Cli = Callable[..., Any]
WriteRecipe = Callable[..., Path]
Refused = Callable[..., str]
Json = dict[str, Any]

VOCAB_SIZE = 64
_COMMON: Json = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_DEEPSEEK: Json = _COMMON | {
    "num_hidden_layers": 61,
    "first_k_dense_replace": 59,
    "n_routed_experts": 8,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
_GLM: Json = _COMMON | {
    "num_hidden_layers": 46,
    "first_k_dense_replace": 44,
    "n_routed_experts": 8,
    "n_group": 1,
    "topk_group": 1,
    "head_dim": 8,
}
_QWEN: Json = _COMMON | {
    "num_hidden_layers": 2,
    "num_experts": 8,
    "head_dim": 8,
    "shared_expert_intermediate_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "num_nextn_predict_layers": 1,
}

# name → (model type, settings, a layer with the tensors of an extra one, what the extra one's names begin with)
MODELS = {
    "deepseek_v3": ("deepseek_v3", _DEEPSEEK, "model.layers.60", "model.layers.61"),
    "glm4_moe": ("glm4_moe", _GLM, "model.layers.45", "model.layers.46"),
    "qwen3_next": ("qwen3_next", _QWEN, "model.layers.1", "mtp.layers.0"),
}
NAMES = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def few_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of 61 and 46 layers with three, whose classes ignore the one behind them; as published they are nightly."""
    for name, owner in (("deepseek_v3", DeepseekV3PreTrainedModel), ("glm4_moe", Glm4MoePreTrainedModel)):
        settings = MODELS[name][1] | {"num_hidden_layers": 3, "first_k_dense_replace": 1}
        monkeypatch.setitem(MODELS, name, (name, settings, "model.layers.2", "model.layers.3"))
        monkeypatch.setattr(owner, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.3.*"])


def announced(folder: Path) -> int:
    """What serving software reads, as vLLM does: the number of layers to build for drafts."""
    config = AutoConfig.from_pretrained(folder)
    value = getattr(config, "num_nextn_predict_layers", 0)
    assert isinstance(value, int)
    return value


def config_of(folder: Path) -> Json:
    config = json.loads((folder / "config.json").read_text())
    assert isinstance(config, dict)
    return config


def write_config(folder: Path, **changes: Any) -> None:
    config = {key: value for key, value in (config_of(folder) | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def extra_tensors(tensors: dict[str, torch.Tensor], layer: str, prefix: str) -> dict[str, torch.Tensor]:
    """A copy of one layer under the extra layer's name, and what joins the two streams there."""
    copied = {prefix + name.removeprefix(layer): t + 1 for name, t in tensors.items() if name.startswith(layer + ".")}
    assert any(".experts.7." in name for name in copied)
    joined = prefix if prefix.startswith("model") else prefix.partition(".")[0]
    return copied | {f"{joined}.eh_proj.weight": torch.ones(16, 32), f"{joined}.enorm.weight": torch.ones(16)}


def write_model(folder: Path, name: str, *, sharded: bool = False) -> dict[str, torch.Tensor]:
    """A checkpoint with an extra prediction layer, which is returned; sharded as published: it has its own file."""
    model_type, settings, layer, prefix = MODELS[name]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).save_pretrained(folder)
    write_config(folder, num_nextn_predict_layers=1)
    tensors = load_file(folder / "model.safetensors")
    extra = extra_tensors(tensors, layer, prefix)
    if not sharded:
        save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})
        return extra
    (folder / "model.safetensors").unlink()
    files = {"model-00001-of-00002.safetensors": tensors, "model-00002-of-00002.safetensors": extra}
    for file, held in files.items():
        save_file(held, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {tensor: file for file, held in files.items() for tensor in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return extra


_EACH_PUSH = ("qwen3_next single",)
PUBLISHED = [
    pytest.param(one, marks=() if one in _EACH_PUSH else pytest.mark.nightly)
    for one in (f"{name} {form}" for name in MODELS for form in ("single", "sharded"))
]


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """Name, folder and extra tensors of a checkpoint with an extra prediction layer. Shared: never write into it."""
    name, form = request.param.split()
    folder = tmp_path_factory.mktemp("models") / name
    return name, folder, write_model(folder, name, sharded=form == "sharded")


def expected(name: str, extra: dict[str, torch.Tensor]) -> Json:
    prefix = MODELS[name][3]
    return {
        "tensors": len(extra),
        "bytes": sum(4 * tensor.numel() for tensor in extra.values()),
        "layers": [prefix if prefix.startswith("model") else "mtp"],
        "config": {"num_nextn_predict_layers": [1, 0]},
    }


def sentence(about: Json) -> str:
    size = f"{about['bytes'] / 1000:.1f} kB"
    return (
        f"the checkpoint has {about['tensors']} tensors ({size}) of extra prediction layers, {about['layers'][0]}, "
        f"that transformers does not build; the smaller checkpoint is written without them and "
        f"`num_nextn_predict_layers` becomes 0"
    )


def plan_of(recipe: Path) -> Json:
    """The plan but for the model's name."""
    found = check.check(load_recipe(recipe, methods=load_plugins().methods)).plan
    return {key: value for key, value in found.items() if key != "model"}


def says_no_drafts(found: Json) -> bool:
    """Whether vLLM's answer says that extra layers are left out."""
    return "its extra prediction layers are left out" in str(found["serving"][1])


def compare_with_plain(output: Path, smaller: Any, source: Path, extra: Json) -> None:
    """The output is what the plain Auto class loads whole, without the extra layer and its announcement."""
    assert announced(source) == 1
    assert announced(output) == 0
    model, info = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(smaller) is type(model)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, smaller(ids).logits)
    names = tensors_of(output).keys()
    assert len(names) > len(extra)
    assert not names & extra.keys()
    before, after = config_of(source), config_of(output)
    counts = {"n_routed_experts", "num_experts", "num_local_experts"}
    spellings = {"rope_theta", "partial_rotary_factor", "rope_parameters", "torch_dtype", "dtype"}
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert "num_nextn_predict_layers" in changed
    assert changed <= {"num_nextn_predict_layers"} | counts | spellings


def test_run(published: Any, cli: Cli, recipe: WriteRecipe, tmp_path: Path) -> None:
    name, source, extra = published
    answer = cli("run", recipe(model=source))
    assert answer.status == 0, answer.err
    about = expected(name, extra)
    assert sentence(about) in answer.out + answer.err
    output = tmp_path / "out"
    record = json.loads((output / "compressor" / "record.json").read_text())
    assert record["left_out"] == about
    assert says_no_drafts(record)
    assert says_no_drafts(compressor.serve_check(output))
    assert not says_no_drafts(compressor.serve_check(source))
    compare_with_plain(output, compressor.load(output)[0], source, extra)
    card = (output / "README.md").read_text()
    assert (
        f"The original's extra prediction layers, `{about['layers'][0]}`, with {about['tensors']} tensors "
        f"({about['bytes'] / 1000:.1f} kB), are not in this checkpoint, because transformers does not build them; in "
        f"its `config.json` `num_nextn_predict_layers` is 0.\n"
    ) in card


def test_apply(published: Any, cli: Cli, recipe: WriteRecipe, tmp_path: Path) -> None:
    name, source, extra = published
    assert cli("run", "--quiet", recipe(model=source)).status == 0
    answer = cli("apply", tmp_path / "out" / "compressor" / "record.json", source, "--output", tmp_path / "again")
    assert answer.status == 0, answer.err
    assert sentence(expected(name, extra)) in answer.out + answer.err
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "out" / "config.json").read_bytes()
    again, out = (tensors_of(tmp_path / name) for name in ("again", "out"))  # `apply` keeps the source's shards
    assert again.keys() == out.keys()
    assert all(torch.equal(again[key], out[key]) for key in out)
    decision = json.loads((tmp_path / "again" / "compressor" / "decision.json").read_text())
    assert decision["left_out"] == expected(name, extra)
    once_more = tmp_path / "again" / "compressor" / "decision.json"
    assert cli("apply", "--quiet", once_more, source, "--output", tmp_path / "third").status == 0
    compare_with_plain(tmp_path / "third", compressor.load(tmp_path / "third")[0], source, extra)


def test_check_and_inspect(published: Any, cli: Cli, recipe: WriteRecipe, tmp_path: Path) -> None:
    name, source, extra = published
    for answer in (cli("check", recipe(model=source)), cli("inspect", source)):
        assert sentence(expected(name, extra)) in " ".join(answer.out.split())
    without = tmp_path / "without"
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(without)
    with_, without_ = (plan_of(recipe(model=folder)) for folder in (source, without))
    assert with_.pop("notes") == [sentence(expected(name, extra)), *without_.pop("notes")]
    for found, is_less in ((with_, True), (without_, False)):
        found["needs"].pop("available")  # another number from one moment to the next
        assert says_no_drafts(found) == is_less
        found.pop("serving")
    assert with_ == without_


def test_live_model(published: Any, tokens: Path, tmp_path: Path) -> None:
    name, source, extra = published
    recipe = {
        "model": "mine",
        "calibration": {"batch_size": 2, "data": [{"tokens": str(tokens)}]},
        "passes": [{"expert_pruning": {"keep": 6}}],
        "output": str(tmp_path / "out"),
    }
    result = compressor.compress(recipe, model=AutoModelForCausalLM.from_pretrained(source))
    assert result.record["left_out"] == expected(name, extra)
    compare_with_plain(tmp_path / "out", result.model, source, extra)


@pytest.mark.usefixtures("few_layers")
@NAMES
def test_announced_but_not_there(name: str, cli: Cli, recipe: WriteRecipe, tmp_path: Path) -> None:
    extra = write_model(tmp_path / "model", name)
    tensors = {key: tensor for key, tensor in tensors_of(tmp_path / "model").items() if key not in extra}
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    answer = cli("run", recipe(model=tmp_path / "model"))
    assert answer.status == 0
    assert "extra prediction" not in answer.out + answer.err
    assert "left_out" not in json.loads((tmp_path / "out" / "compressor" / "record.json").read_text())
    assert "extra prediction" not in (tmp_path / "out" / "README.md").read_text()
    assert announced(tmp_path / "out") == 1
    assert "extra prediction" not in cli("check", recipe(model=tmp_path / "model")).out


def test_only_the_index_at_hand(cli: Cli, tmp_path: Path) -> None:
    """As for a model on the hub whose weights are not downloaded."""
    extra = write_model(tmp_path / "model", "qwen3_next", sharded=True)
    for shard in verify_files(tmp_path / "model"):
        shard.path.unlink()
    says = f"has {len(extra)} tensors of extra prediction layers, mtp, that transformers does not build"
    assert says in " ".join(cli("inspect", tmp_path / "model").out.split())


@pytest.mark.usefixtures("few_layers")
def test_layers_that_the_class_has_are_not_extra(cli: Cli, recipe: WriteRecipe, tmp_path: Path) -> None:
    """As glm4_moe ignores layer 46 of its smaller model, which the larger one has."""
    settings = _GLM | {"num_hidden_layers": 5, "first_k_dense_replace": 3}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("glm4_moe", **settings))
    model.save_pretrained(tmp_path / "model")
    assert model.config.num_nextn_predict_layers == 1
    answer = cli("run", recipe(model=tmp_path / "model"))
    assert answer.status == 0
    assert "extra prediction" not in answer.out + answer.err
    assert any(name.startswith("model.layers.3.mlp.experts.5.") for name in tensors_of(tmp_path / "out"))


@pytest.mark.usefixtures("few_layers")
def test_extra_layers_that_the_class_does_not_ignore_are_refused(
    refused: Refused, recipe: WriteRecipe, tmp_path: Path
) -> None:
    write_model(tmp_path / "model", "deepseek_v3")
    tensors = tensors_of(tmp_path / "model")
    tensors["model.layers.4.enorm.weight"] = torch.ones(16)
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    says = "1 tensor(s) are not expected in the checkpoint: model.layers.4.enorm.weight."
    refused("run", "--quiet", recipe(model=tmp_path / "model"), says=says)


@pytest.mark.usefixtures("few_layers")
def test_key_that_only_the_class_sets(cli: Cli, recipe: WriteRecipe, tmp_path: Path) -> None:
    """DeepseekV3Config announces one layer by default: the smaller config says 0 itself."""
    write_model(tmp_path / "model", "deepseek_v3")
    write_config(tmp_path / "model", num_nextn_predict_layers=None)
    assert announced(tmp_path / "model") == 1
    assert cli("run", "--quiet", recipe(model=tmp_path / "model")).status == 0
    assert config_of(tmp_path / "out")["num_nextn_predict_layers"] == 0
    assert announced(tmp_path / "out") == 0


# Carried over -----------------------------------------------------------------------------------------------


def carried(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors in the files that an output has for extra layers."""
    files = sorted(folder.glob("model_mtp-*.safetensors"))
    assert files
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def pruned(extra: dict[str, torch.Tensor], prefix: str, number: int) -> tuple[list[int], dict[str, torch.Tensor]]:
    """The experts with the longest router rows, and the tensors with these alone, by hand."""
    gate = f"{prefix}.mlp.gate.weight"
    kept = sorted(range(len(extra[gate])), key=lambda expert: -float(extra[gate][expert].norm()))[:number]
    found = {name: tensor for name, tensor in extra.items() if ".experts." not in name}
    found[gate] = extra[gate][sorted(kept)]
    if (bias := f"{prefix}.mlp.gate.e_score_correction_bias") in extra:
        found[bias] = extra[bias][sorted(kept)]
    for new, old in enumerate(sorted(kept)):
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            name = f"{prefix}.mlp.experts.{{}}.{matrix}.weight"
            found[name.format(new)] = extra[name.format(old)]
    return sorted(kept), found


def with_own_rows(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Give the extra layer's router rows of lengths of its own; its tensors."""
    tensors = tensors_of(folder)
    gate = f"{prefix}.mlp.gate.weight"
    tensors[gate] = torch.arange(1.0, 17.0).repeat(8, 1) * torch.tensor([3.0, 1, 7, 5, 2, 8, 4, 6])[:, None]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    first = prefix.partition(".")[0] + "." if prefix.startswith("mtp") else prefix + "."
    return {name: tensor for name, tensor in tensors.items() if name.startswith(first)}


@pytest.mark.usefixtures("few_layers")
@pytest.mark.parametrize(
    "name", ["deepseek_v3", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("glm4_moe", "qwen3_next"))]
)
def test_pruned(name: str, cli: Cli, recipe: WriteRecipe, tmp_path: Path) -> None:
    """In memory, from disk, and by the decision: the same bytes, beside a model that is as without them."""
    source, prefix = tmp_path / "model", MODELS[name][3]
    write_model(source, name)
    kept, wanted = pruned(with_own_rows(source, prefix), prefix, 5)
    assert kept == [2, 3, 5, 6, 7]
    passes = [{"expert_pruning": {"keep": keep, "criterion": "aimer"}} for keep in (6, 5)]
    files = []
    for where in ("memory", "disk"):
        output = tmp_path / where
        made = recipe(model=source, mtp="prune", passes=passes, weights=where, output=output, name=f"{where}.yaml")
        answer = cli("run", made)
        assert answer.status == 0, answer.err
        assert "it gets them by `mtp: prune`, unmeasured" in " ".join((answer.out + answer.err).split())
        files.append(output)
    again = tmp_path / "again"
    decision = tmp_path / "disk" / "compressor" / "decision.json"
    assert cli("apply", "--quiet", decision, source, "--output", again, "--mtp", "prune").status == 0
    for output in (*files, again):
        assert same(carried(output), wanted)
        assert announced(output) == 1
        assert config_of(output) == config_of(again)
        about = json.loads((output / "compressor" / "record.json").read_text())["mtp"]
        assert (about["choice"], about["kept"], about["tensors"]) == ("prune", {prefix: kept}, len(wanted))
        [file] = output.glob("model_mtp-*")
        assert file.read_bytes() == (again / file.name).read_bytes()
        assert f"`{about['layers'][0]}`, are in it, with 5 experts each (" in (output / "README.md").read_text()
        verify_files(output)
    _, info = AutoModelForCausalLM.from_pretrained(again, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.usefixtures("few_layers")
def test_stopped_while_they_are_written(
    cli: Cli, recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--resume` adds them; and an output that has some is a model like any other, to be pruned again."""
    source, prefix = tmp_path / "model", "model.layers.3"
    write_model(source, "glm4_moe")
    _, wanted = pruned(with_own_rows(source, prefix), prefix, 5)
    made = recipe(model=source, mtp="prune", weights="disk", passes=[{"expert_pruning": {"keep": 5}}])
    with monkeypatch.context() as patch:
        patch.setattr(ExtraLayers, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli("run", "--quiet", made).status != 0
    assert not (tmp_path / "out").exists()
    assert cli("run", "--quiet", "--resume", made).status == 0
    assert same(carried(tmp_path / "out"), wanted)
    fewer = recipe(
        model=tmp_path / "out",
        mtp="prune",
        passes=[{"expert_pruning": {"keep": 4, "criterion": "aimer"}}],
        output=tmp_path / "fewer",
    )
    assert cli("run", "--quiet", fewer).status == 0
    assert same(carried(tmp_path / "fewer"), pruned(wanted, prefix, 4)[1])


@pytest.mark.usefixtures("few_layers")
def test_blocks_in_fp8_with_their_scales(cli: Cli, recipe: WriteRecipe, tmp_path: Path) -> None:
    """Stored in FP8 as DeepSeek ships them; the list of what is not quantised gets the experts' new numbers."""
    source, prefix = tmp_path / "model", "model.layers.3"
    write_model(source, "deepseek_v3")
    extra = with_own_rows(source, prefix)
    plain = [f"{prefix}.eh_proj", f"{prefix}.mlp.experts.0", f"{prefix}.mlp.experts.7.up_proj"]
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in tensors_of(source).items():
        linear = tensor.dim() == 2 and ("_proj.weight" in name) and not name.startswith(tuple(plain))
        tensors |= blocks_fp8(name, tensor) if linear else {name: tensor}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    write_config(source, quantization_config=FP8 | {"modules_to_not_convert": plain})
    answer = cli("run", recipe(model=source, mtp="prune"))
    assert answer.status == 0, answer.err
    kept, _ = pruned(extra, prefix, 6)
    assert kept == [0, 2, 3, 5, 6, 7]
    found = carried(tmp_path / "out")
    for new, old in enumerate(kept):
        at, was = (f"{prefix}.mlp.experts.{number}." for number in (new, old))
        wanted = {at + name.removeprefix(was): tensor for name, tensor in tensors.items() if name.startswith(was)}
        assert len(wanted) == {0: 3, 7: 5}.get(old, 6)
        assert same({name: tensor for name, tensor in found.items() if name.startswith(at)}, wanted)
    assert config_of(tmp_path / "out")["quantization_config"]["modules_to_not_convert"] == [
        *plain[:2],
        f"{prefix}.mlp.experts.5.up_proj",
    ]


@pytest.mark.usefixtures("few_layers")
def test_kept_whole(cli: Cli, refused: Refused, recipe: WriteRecipe, tmp_path: Path) -> None:
    """Where the model keeps its number of experts, or the extra layer has none."""
    source = tmp_path / "model"
    extra = write_model(source, "glm4_moe")
    skipping = [{"dynamic_skipping": {"rule": "ratio", "threshold": 0.95}}]
    answer = cli("run", recipe(model=source, mtp="keep", passes=skipping))
    assert answer.status == 0, answer.err
    assert same(carried(tmp_path / "out"), extra)
    assert announced(tmp_path / "out") == 1
    of = {"model": source, "passes": skipping, "weights": "disk", "output": tmp_path / "other"}
    drop, keep = (compressor.check(recipe(mtp=choice, **of)).plan for choice in ("drop", "keep"))
    size = sum(tensor.nbytes for tensor in extra.values())
    assert keep["needs"]["disk"] - drop["needs"]["disk"] == keep["bytes"]["after"] - drop["bytes"]["after"] == size
    says = (
        "its extra prediction layers, model.layers.3: they have 8 experts, the smaller model will have 6, and engines "
        "read one number for both; say `mtp: prune` or `mtp: drop`."
    )
    refused("check", recipe(model=source, mtp="keep", output=tmp_path / "other"), says=says)
    dense = {name: tensor for name, tensor in tensors_of(source).items() if not name.startswith("model.layers.3.mlp")}
    dense["model.layers.3.mlp.up_proj.weight"] = torch.ones(4, 16)
    save_file(dense, source / "model.safetensors", metadata={"format": "pt"})
    for choice in ("keep", "prune"):
        assert cli("run", "--quiet", recipe(model=source, mtp=choice, output=tmp_path / choice)).status == 0
        wanted = {name: tensor for name, tensor in dense.items() if name.startswith("model.layers.3.")}
        assert same(carried(tmp_path / choice), wanted)


@pytest.mark.usefixtures("few_layers")
def test_refused_by_name(refused: Refused, recipe: WriteRecipe, mixtral: Path, tmp_path: Path) -> None:
    refused("check", recipe(mtp="prune"), says="mtp: the model has no extra prediction layers (mtp, nextn) to carry")
    refused("check", recipe(mtp="all"), says="mtp: found 'all', expected 'drop', 'keep' or 'prune'")
    result = compressor.compress({**yaml.safe_load(recipe().read_text()), "output": None})
    decision = tmp_path / "decision.json"
    decision.write_text(json.dumps({"format": 2, "passes": result.record["passes"]}))
    apply = ("apply", decision, mixtral, "--output", tmp_path / "out", "--mtp", "keep")
    refused(
        *apply, says="mtp: keep: it has no extra prediction layers (mtp, nextn) to carry over; leave the option out."
    )
    source = tmp_path / "model"
    write_model(source, "glm4_moe")
    program = [{"expert_pruning": {"keep": 6}}, {"command": {"command": ["true", "{input}", "{output}"]}}]
    says = "mtp: command turns a checkpoint into another one, without them; say `mtp: drop`"
    refused("run", "--quiet", "--allow-commands", recipe(model=source, mtp="prune", passes=program), says=says)
    counts = [{"expert_pruning": {"keep": {1: 6, 2: 5}}}]
    says = (
        "model.layers.3: layers have 5 to 6 experts, and nothing that reads such a model runs extra prediction layers;"
    )
    refused("check", recipe(model=source, mtp="prune", passes=counts), says=says)
    tensors = tensors_of(source)
    tensors["model.layers.3.router.weight"] = tensors.pop("model.layers.3.mlp.gate.weight")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    refused("check", recipe(model=source, mtp="prune"), says="is an expert's, and no router is called mlp.gate.weight")
    tensors["model.layers.3.mlp.gate.weight"] = torch.ones(7, 16)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    refused("check", recipe(model=source, mtp="prune"), says="is F32 [7, 16], expected a router in numbers, [8, 16]")
