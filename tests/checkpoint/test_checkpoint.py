"""Finding, verifying and saving checkpoints: what the command line's tests do not reach."""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import tiny_folder, write_checkpoint
from transformers import AutoConfig

from compressor.checkpoint.classes import auto_class, model_class, next_token_problem
from compressor.checkpoint.extra_layers import find_left_out
from compressor.checkpoint.find import Checkpoint, find_checkpoint, load_config
from compressor.checkpoint.headers import fingerprint, refuse_not_finite, verify_files
from compressor.checkpoint.load import load_model, load_tokenizer
from compressor.checkpoint.output import OutputFolder, disk_errors_named, kept_for
from compressor.checkpoint.resume_state import Journal
from compressor.errors import CheckpointError, UnsupportedModelError
from compressor.testing import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards with an index, and a config; no model."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "mixtral"}')
    save_file({"a": torch.arange(50_000.0), "b": torch.ones(2, 3)}, path / "one.safetensors")
    save_file({"c": torch.ones(4, dtype=torch.bfloat16)}, path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def digest(folder: Path) -> str:
    return fingerprint(folder, verify_files(folder))


def test_headers_are_read_without_weights(folder: Path) -> None:
    one, two = verify_files(folder)
    assert dict(one.tensors) == {"a": ("F32", (50_000,)), "b": ("F32", (2, 3))}
    assert dict(two.tensors) == {"c": ("BF16", (4,))}
    assert one.num_bytes == (folder / "one.safetensors").stat().st_size


def test_files_that_the_index_does_not_name_do_not_matter(folder: Path) -> None:
    (folder / "consolidated.safetensors").write_bytes(b"another format's copy")
    assert len(verify_files(folder)) == 2


def test_fingerprint_tells_checkpoints_apart(folder: Path) -> None:
    first = digest(folder)
    assert first == digest(folder)
    tensors = load_file(folder / "one.safetensors")
    tensors["a"][-1] += 1
    save_file(tensors, folder / "one.safetensors")
    second = digest(folder)
    (folder / "config.json").write_text('{"model_type": "qwen3_moe"}')
    assert len({first, second, digest(folder)}) == 3


def test_find(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_checkpoint(str(folder)) == Checkpoint(str(folder), folder)
    monkeypatch.setenv("HOME", str(folder.parent))
    assert find_checkpoint("~/model").folder == folder
    monkeypatch.chdir(folder.parent)
    assert find_checkpoint("model").folder == Path("model")
    assert (find_checkpoint("demo").folder / "config.json").exists()


def test_tokenizer_files(folder: Path) -> None:
    found = Checkpoint("x", folder)
    assert not found.has_tokenizer
    assert load_tokenizer(found) is None
    (folder / "tokenizer.model").write_bytes(b"")
    assert found.has_tokenizer


def test_not_finite_buffers_are_named() -> None:
    module = torch.nn.Linear(2, 2)
    module.register_buffer("ids", torch.tensor([1, 2]))
    refuse_not_finite([*module.named_parameters(), *module.named_buffers()], "mine")
    module.register_buffer("scale", torch.tensor([1.0, float("-inf")]))
    with pytest.raises(CheckpointError, match=r"mine: tensor scale holds 1 value\(s\) that are NaN or infinite"):
        refuse_not_finite([*module.named_parameters(), *module.named_buffers()], "mine")


# --- which class is built


def class_of(config: Any) -> Any:
    return model_class(Checkpoint("mine", Path("nowhere")), config)


@pytest.mark.parametrize(
    ("model_type", "name", "auto", "problem"),
    [
        ("mixtral", "MixtralForCausalLM", "AutoModelForCausalLM", None),
        ("gemma4", "Gemma4ForConditionalGeneration", "AutoModelForCausalLM", None),
        ("mistral4", "Mistral4ForCausalLM", "AutoModelForImageTextToText", None),
        ("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", "AutoModelForImageTextToText", None),
        ("switch_transformers", "SwitchTransformersForConditionalGeneration", "AutoModelForSeq2SeqLM",
         "is an encoder-decoder"),
        ("openai_privacy_filter", "OpenAIPrivacyFilterForTokenClassification", "AutoModelForTokenClassification",
         "has no language-model head"),
        ("sarvam_moe", "Glm4MoeForCausalLM", "AutoModelForCausalLM", None),
        ("muse_spark_text", "MuseSparkTextModel", "AutoModel", "has no language-model head"),
        ("diffusion_gemma", "DiffusionGemmaForBlockDiffusion", "AutoModelForImageTextToText",
         "refines a whole block of tokens at a time"),
    ],
)  # fmt: skip
def test_first_class_that_an_auto_class_knows(model_type: str, name: str, auto: str, problem: str | None) -> None:
    config = tiny.tiny_config(model_type)
    config.architectures = None
    cls = class_of(config)
    assert cls.__name__ == name
    assert auto_class(cls, config) == auto
    assert next_token_problem(cls, config) == problem
    assert getattr(transformers, auto)._model_mapping[type(config)] is cls


@pytest.mark.parametrize("model_type", ["llama4", "qwen3_5_moe", "dots3_note"])
def test_composite_is_not_built_as_its_text_model(model_type: str) -> None:
    """AutoModelForCausalLM takes the text config out of a composite's, and would leave the rest behind."""
    config = tiny.tiny_config(model_type)
    config.architectures = None
    cls = class_of(config)
    assert cls.config_class is type(config)
    assert transformers.AutoModelForCausalLM._model_mapping[type(config)] is not cls


@pytest.mark.parametrize(
    ("named", "built"),
    [
        ("MixtralModel", "MixtralModel"),
        ("MixtralForTokenClassification", "MixtralForTokenClassification"),
        ("MixtralForCausalLM", "MixtralForCausalLM"),
        ("LlamaForCausalLM", "MixtralForCausalLM"),  # no class for this config
        ("OurOwnForCausalLM", "MixtralForCausalLM"),
    ],
)
def test_class_that_the_config_names(named: str, built: str) -> None:
    config = tiny.tiny_config("mixtral")
    config.architectures = [named]
    assert class_of(config).__name__ == built


@pytest.mark.parametrize("name", ["MixtralModel", "MixtralForTokenClassification"])
def test_loads_through_the_class_that_was_saved(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = getattr(transformers, name)(tiny.tiny_config("mixtral")).eval()
    write_checkpoint(model, tmp_path)
    loaded = load_model(Checkpoint("mine", tmp_path))
    assert type(loaded) is type(model)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded.state_dict().items())


def test_code_of_the_checkpoint_runs_only_if_trusted() -> None:
    folder = tiny_folder("mixtral4")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    trusted = model_class(Checkpoint("mine", folder, trust_remote_code=True), config)
    assert trusted.__name__ == "Mixtral4ForCausalLM"
    assert trusted.__module__.startswith("transformers_modules.")
    assert auto_class(trusted, config) == "AutoModelForCausalLM"
    assert next_token_problem(trusted, config) is None
    with pytest.raises(UnsupportedModelError, match="mine: model type 'mixtral4' has no model class in transformers"):
        model_class(Checkpoint("mine", folder), config)


def test_causal_language_model_is_preferred_in_a_checkpoints_code() -> None:
    folder = tiny_folder("mixtral4")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    config.auto_map = {"AutoModel": "modeling_mixtral4.Mixtral4Model", **config.auto_map}
    found = Checkpoint("mine", folder, trust_remote_code=True)
    assert model_class(found, config).__name__ == "Mixtral4ForCausalLM"
    del config.auto_map["AutoModelForCausalLM"]
    assert model_class(found, config).__name__ == "Mixtral4Model"


def test_class_without_a_forward_is_refused() -> None:
    with pytest.raises(UnsupportedModelError) as refusal:
        class_of(tiny.tiny_config("qwen3_omni_moe"))
    assert str(refusal.value) == (
        "mine: Qwen3OmniMoeForConditionalGeneration has no forward, so it cannot be run. What can be compressed is its "
        "`thinker` (load it with Qwen3OmniMoeThinkerForConditionalGeneration, save it with `save_pretrained`)."
    )


@pytest.mark.parametrize("model_type", ["aria", "mistral_large4"])
def test_loading_like_a_live_composite(model_type: str, tmp_path: Path) -> None:
    """Each part gets its own implementations: a vision tower knows none for experts."""
    model = tiny.tiny_model(model_type)
    model.save_pretrained(tmp_path)
    live = load_model(Checkpoint("mine", tmp_path))
    live.config.text_config._experts_implementation = "eager"
    again = load_model(Checkpoint("mine", tmp_path), like=live)
    assert again.config.text_config._experts_implementation == "eager"
    parts = [("", live.config), *((key, getattr(live.config, key)) for key in live.config.sub_configs)]
    for key, part in parts:
        other = getattr(again.config, key) if key else again.config
        for name in ("_attn_implementation", "_experts_implementation"):
            assert getattr(other, name) == getattr(part, name)


# --- what transformers does not build


def write_names(folder: Path, config: Any, names: list[str]) -> None:
    """A checkpoint of empty tensors: only their names count."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: torch.zeros(2, 3, dtype=torch.bfloat16) for name in names}, folder / "model.safetensors")


def step3p7_config(**changes: Any) -> dict[str, Any]:
    """As published: two extra layers announced, every list padded for them."""
    text: dict[str, Any] = tiny.tiny_config("step3p7").to_dict()["text_config"]
    for key in [key for key in text if "mtp" in key or key in ("rope_parameters", "per_layer_config")]:
        del text[key]
    text |= {
        "num_nextn_predict_layers": 2,
        "layer_types": ["full_attention"] * 5,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse", "sparse"],
        "swiglu_limits": [1.0, 2.0, 3.0, 4.0, 5.0],
        "rope_theta": [1e4] * 5,
        "eos_token_id": [1, 2, 3, 4, 5],
    }
    assert text["num_hidden_layers"] == 3
    return {
        "architectures": ["Step3p7ForConditionalGeneration"],
        "model_type": "step3p7",
        "text_config": text | changes,
    }


def test_lists_padded_for_extra_layers_are_cut(tmp_path: Path) -> None:
    names = [f"model.layers.{number}.{end}" for number in (2, 3, 4) for end in ("enorm.weight", "eh_proj.weight")]
    write_names(tmp_path / "model", step3p7_config(), names)
    found = Checkpoint("mine", tmp_path / "model")
    config = load_config(found)
    left_out = find_left_out(found, config, model_class(found, config))
    assert left_out is not None
    assert left_out.to_json() == {
        "tensors": 4,
        "bytes": 4 * 12,
        "layers": ["model.layers.3", "model.layers.4"],
        "config": {"text_config.num_nextn_predict_layers": [2, 0]},
        "list_lengths": {
            f"text_config.{key}": [5, 3] for key in ("layer_types", "mlp_layer_types", "swiglu_limits", "rope_theta")
        },
    }
    raw = step3p7_config(num_nextn_predict_layers=0)
    (tmp_path / "model" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(
        CheckpointError, match=r"`num_hidden_layers` \(3\) must be equal to the number of `layer_types`"
    ):
        load_config(found)  # so cutting is needed
    raw = step3p7_config()
    left_out.patch(raw)
    (tmp_path / "model" / "config.json").write_text(json.dumps(raw))
    again = load_config(found).text_config
    assert again.num_nextn_predict_layers == 0
    assert again.layer_types == config.text_config.layer_types
    assert again.mlp_layer_types == config.text_config.mlp_layer_types == ["dense", "sparse", "sparse"]
    assert again.swiglu_limits == [1.0, 2.0, 3.0]
    assert again.eos_token_id == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("keys", "changed"),
    [
        ({"num_nextn_predict_layers": 2}, {"num_nextn_predict_layers": [2, 0]}),
        ({"mtp_num_hidden_layers": 1, "mtp_hidden_size": 8}, {"mtp_num_hidden_layers": [1, 0]}),
        ({"num_mtp_modules": 3, "use_mtp": True}, {"num_mtp_modules": [3, 0]}),
        ({"mtp_config": {"num_nextn_predict_layers": 1}}, {"mtp_config.num_nextn_predict_layers": [1, 0]}),
        ({"num_nextn_predict_layers": 0, "mtp_loss_weight": 1, "mtp_layer_types": ["full_attention"]}, {}),
        ({}, {}),
    ],
)
def test_integers_that_announce_extra_layers(keys: dict[str, Any], changed: Any, tmp_path: Path) -> None:
    raw = tiny.tiny_config("qwen3_next").to_dict() | keys
    write_names(tmp_path / "model", json.loads(json.dumps(raw, default=str)), ["mtp.fc.weight", "model.norm.weight"])
    found = Checkpoint("mine", tmp_path / "model")
    config = load_config(found)
    left_out = find_left_out(found, config, model_class(found, config))
    assert left_out is not None
    assert left_out.to_json() == {"tensors": 1, "bytes": 12, "layers": ["mtp"], "config": changed}


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("deepseek_v3", ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
        ("axk2", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.2.inv_freq"]),
        ("deepseek_v3", ["model.layers.0.mlp.experts.61.gate_proj.weight"]),
        ("glm4_moe", ["model.layers.3.enorm.weight"]),  # another number than the class ignores
        ("mixtral", ["mtp.fc.weight", "model.layers.61.enorm.weight"]),
    ],
)
def test_what_is_no_extra_layer_or_not_ignored(model_type: str, names: list[str], tmp_path: Path) -> None:
    write_names(tmp_path / "model", json.loads(tiny.tiny_config(model_type).to_json_string()), names)
    found = Checkpoint("mine", tmp_path / "model")
    config = load_config(found)
    assert find_left_out(found, config, model_class(found, config)) is None


# --- the output folder


def test_output_appears_only_when_finished(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with OutputFolder(target) as output:
        (output.path / "file").write_text("x")
        assert not target.exists()
        assert output.hidden.parent == target.parent
        output.finish()
    assert (target / "file").read_text() == "x"
    assert list(target.parent.iterdir()) == [target]


def test_output_left_early_leaves_nothing(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out") as output:
        (output.path / "file").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_overwriting_swaps_whole_folders(tmp_path: Path) -> None:
    for text in ("first", "second"):
        with OutputFolder(tmp_path / "out", overwrite=True) as output:
            (output.path / text).write_text(text)
            output.finish()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compressor", "second"]
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


class Killed(BaseException):
    """What a kill is to a test: nothing catches it, and no context is left by it."""


def killed_while_finishing(target: Path, number: int, *, overwrite: bool) -> bool:
    """Whether `finish` was killed: before its `number`-th call of the file system."""
    left: int | None = None

    def hook(event: str, _: object) -> None:
        nonlocal left
        if left is not None and event.startswith(("os.", "shutil.", "open")):
            left -= 1
            if left == 0:
                left = None
                raise Killed

    output = OutputFolder(target, overwrite=overwrite)
    output.__enter__()
    output.journal.begin()
    output.journal.note("evaluation before", {})
    (output.path / "new").write_text("new")
    sys.addaudithook(hook)
    left = number
    try:
        output.finish()
    except Killed:
        output._lock.release()
        return True
    finally:
        left = None
    return False


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_anywhere_while_finishing(tmp_path: Path, overwrite: bool) -> None:
    """The journal is there to go on from, or the output gets its name; what it replaces is there till then."""
    for number in itertools.count(1):
        target = tmp_path / str(number) / "out"
        if overwrite:
            with OutputFolder(target) as output:
                (output.path / "first").write_text("first")
                output.finish()
        if not killed_while_finishing(target, number, overwrite=overwrite):
            break
        was_completed = OutputFolder(target).complete()
        if (target / "new").exists():
            assert list(target.parent.iterdir()) == [target]
            assert {path.name for path in target.iterdir()} == {"compressor", "new"}
        else:
            assert not was_completed
            assert (target / "first").exists() == overwrite
            assert Journal(kept_for(target, "journal")).noted("evaluation before") == {}
            with OutputFolder(target, resume=True) as output:
                assert output.resume
                (output.path / "new").write_text("again")
                output.finish()
            assert list(target.parent.iterdir()) == [target]
    assert number > 15
    assert list(target.parent.iterdir()) == [target]


def test_a_target_that_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    says = rf"^{tmp_path / 'out'} did not exist when the run .* in {tmp_path / '.out.partial' / 'output'}: remove one"

    def run() -> None:
        with OutputFolder(tmp_path / "out") as output:
            (tmp_path / "out").mkdir()
            output.finish()

    with pytest.raises(CheckpointError, match=says):
        run()
    with pytest.raises(CheckpointError, match=says):
        OutputFolder(tmp_path / "out").complete()
    (tmp_path / "out").rmdir()
    assert OutputFolder(tmp_path / "out").complete()
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_link_to_our_own_folder_is_not_replaced(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out") as output:
        output.finish()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with (
        pytest.raises(CheckpointError, match="link is a link. Give the folder that it should lead to"),  # noqa: RUF043
        OutputFolder(tmp_path / "link", overwrite=True),
    ):
        pass
    assert (tmp_path / "out" / "compressor").is_dir()


def test_space_is_asked_of_the_outputs_file_system(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out") as output:
        output.require_space(1)
        with pytest.raises(CheckpointError, match=r"the smaller model needs 1000 PB of disk, "):
            output.require_space(10**18)


def test_other_errors_of_the_system_are_not_dressed_up(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), disk_errors_named(tmp_path):
        os.open(tmp_path, os.O_WRONLY)


# --- headers that lie


def write_file(path: Path, header: Any, num_bytes: int) -> None:
    """A safetensors file with any header, as JSON or text, and that many bytes behind it."""
    text = header if isinstance(header, str) else json.dumps(header)
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(num_bytes))


def entry(begin: int, end: int, shape: Any = (4,), dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "num_bytes", "says"),
    [
        ({"a": entry(0, 4), "b": entry(2, 6)}, 6, "invalid offset for tensor `b`. Download or copy it again."),
        ({"a": entry(0, 4), "b": entry(6, 10)}, 10, "invalid offset for tensor `b`"),
        ({"a": entry(4, 8)}, 8, "invalid offset for tensor `a`"),
        ({"a": entry(0, 4), "b": entry(4, 8)}, 6, "file not fully covered"),
        ({"a": entry(0, 4)}, 5, "file not fully covered"),
        ({"a": entry(4, 0)}, 4, "invalid offset for tensor `a`"),
        ({"a": entry(-4, 0)}, 4, "integer `-4`, expected usize"),
        ({"a": entry(0, 4, [2.0, 2])}, 4, "floating point `2.0`, expected usize"),
        ({"a": entry(0, 4, [-2, -2])}, 4, "integer `-2`, expected usize"),
        ({"a": entry(0, 4, [2, 3])}, 4, "invalid shape, data type, or offset for tensor"),
        ({"a": entry(0, 4, dtype="F32")}, 4, "invalid shape, data type, or offset for tensor"),
        ({"a": entry(0, 4, dtype="U7")}, 4, "unknown variant `U7`"),
        ('{"a": %s, "a": %s}' % ((json.dumps(entry(0, 4)),) * 2), 4, "a is listed twice"),
        ({"a": [0, 4]}, 4, "expected string or map"),
    ],
)  # fmt: skip
def test_header_that_lies(header: Any, num_bytes: int, says: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_file(path, header, num_bytes)
    with pytest.raises(CheckpointError) as refusal:
        verify_files(tmp_path)
    assert str(refusal.value).startswith(f"{path}: damaged, cut short, or not a safetensors file: ")
    assert says in str(refusal.value)


def test_header_of_small_numbers_and_of_none(tmp_path: Path) -> None:
    header = {"b": entry(4, 6, [4], "F4"), "none": entry(4, 4, [0, 7], "F32"), "a": entry(0, 4), "one": entry(6, 7, [])}
    write_file(tmp_path / "model.safetensors", header | {"__metadata__": {"format": "pt"}}, 7)
    [shard] = verify_files(tmp_path)
    assert list(shard.tensors) == ["a", "none", "b", "one"]
    assert dict(shard.sizes) == {"a": 4, "none": 0, "b": 2, "one": 1}
    start = (tmp_path / "model.safetensors").stat().st_size - 7
    assert dict(shard.offsets) == {"a": start, "none": start + 4, "b": start + 4, "one": start + 6}
    assert dict(shard.metadata) == {"format": "pt"}


@pytest.mark.parametrize("name", ["../one.safetensors", "/one.safetensors", "deep/../../one.safetensors"])
def test_index_that_leaves_the_folder(name: str, folder: Path) -> None:
    (folder.parent / "one.safetensors").write_bytes((folder / "one.safetensors").read_bytes())
    index = {"weight_map": {"a": name, "b": name, "c": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as refusal:
        verify_files(folder)
    assert str(refusal.value) == (
        f"{folder}/model.safetensors.index.json: cannot be read as an index of shards: it names {name}, which is "
        f"outside the checkpoint's folder"
    )


def test_index_that_names_a_tensor_twice(folder: Path) -> None:
    text = '{"weight_map": {"a": "one.safetensors", "b": "one.safetensors", "a": "two.safetensors"}}'
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="cannot be read as an index of shards: a is listed twice"):
        verify_files(folder)


def test_tensor_in_two_shards(folder: Path) -> None:
    save_file({"c": torch.ones(4), "a": torch.ones(2)}, folder / "two.safetensors")
    with pytest.raises(CheckpointError) as refusal:
        verify_files(folder)
    assert str(refusal.value) == f"{folder}: a is in two shards, one.safetensors and two.safetensors."


def test_tensor_that_the_index_does_not_name(folder: Path) -> None:
    save_file({"c": torch.ones(4), "d": torch.ones(2)}, folder / "two.safetensors")
    with pytest.raises(CheckpointError) as refusal:
        verify_files(folder)
    assert str(refusal.value) == (
        f"{folder}: two.safetensors holds d, which model.safetensors.index.json does not name: they do not belong "
        f"together."
    )


def test_links_keep_their_mode(tmp_path: Path) -> None:
    """A hard link is the other folder's file too: finishing must not change that."""
    (tmp_path / "source").write_text("x")
    (tmp_path / "source").chmod(0o600)
    with OutputFolder(tmp_path / "out") as output:
        os.link(tmp_path / "source", output.path / "linked")
        (output.path / "own").write_text("y")
        (output.path / "own").chmod(0o600)
        output.finish()
    assert (tmp_path / "source").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "out" / "own").stat().st_mode & 0o777 != 0o600
