"""A pruned checkpoint is an ordinary one: transformers alone, in a process that cannot import this library, reads it,
and gives the same logits to the bit.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import (
    ARCHITECTURES,
    is_remote,
    keep_six,
    random_model,
    tiny_folder,
    tiny_model,
    token_ids,
    write_checkpoint,
    write_token_file,
)

from compressor import MoEModel, SkipRule, compress
from compressor.checkpoint.find import Checkpoint
from compressor.checkpoint.load import load_model
from compressor.checkpoint.output import OutputFolder
from compressor.checkpoint.save import save_checkpoint
from compressor.data.sequences import TokenBatch
from compressor.edit.verify import save_verified
from compressor.testing.checks import save

READER = """
import json, sys
sys.modules["compressor"] = None        # importing it is an error from here on
sys.modules["compressor_expert_pruning"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
jobs, ids, answers = json.load(open(sys.argv[1])), torch.tensor(json.loads(sys.argv[2])), {}
for key, job in jobs.items():
    model, info = AutoModelForCausalLM.from_pretrained(
        job["folder"], dtype="auto", trust_remote_code=job["remote"], output_loading_info=True)
    model.eval()
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()       # off the file: see compressor.checkpoint.load.align
    assert not any(info.values()), (key, info)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()   # into memory laid out as the live model's: see test_saved_to_the_bit
    with torch.no_grad():
        answers[key + "/logits"] = model(ids).logits
        answers[key + "/generated"] = model.generate(
            ids[:1], max_new_tokens=8, do_sample=False, eos_token_id=None, use_cache=not job["remote"])
    answers[key + "/parameters"] = torch.tensor(model.num_parameters())
try:
    import compressor
    raise SystemExit("this library was there")
except ImportError:
    pass

# with this library on the path again: a model that skips, out of a pickle that names its classes
del sys.modules["compressor"]
sys.path[:0] = json.loads(sys.argv[4])
model = torch.load("skipping.pt", weights_only=False)
with torch.no_grad():
    answers["pickled/logits"] = model(ids).logits
save_file({key: value.contiguous() for key, value in answers.items()}, sys.argv[3])
"""
IDS = token_ids(2, 12, seed=8)
SAVED = [
    ("mixtral", "float32"),
    ("deepseek_v3", "bfloat16"),
    ("gpt_oss", "float32"),
    ("phimoe", "bfloat16"),
    ("mixtral4", "float32"),
    ("deepseek4", "bfloat16"),
]


def generated(model, name):
    with torch.no_grad():
        return model.generate(
            IDS[:1], max_new_tokens=8, do_sample=False, eos_token_id=None, use_cache=not is_remote(name)
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pruned")


@pytest.fixture(scope="module")
def live(folder):
    """name, dtype → the live model that was pruned and written to `folder / name-dtype`."""
    rows = [token_ids(length, seed=length).tolist() for length in (40, 33, 48, 21, 48, 40)]
    tokens = write_token_file(folder / "tokens.jsonl", rows)
    models = {}
    for name, dtype in SAVED:
        if dtype == "bfloat16":
            # ties decide there what a run would find, so the sets are given
            moe = MoEModel(tiny_model(name, dtype))
            moe.keep(keep_six(moe))
            source = Checkpoint(name, tiny_folder(name), is_remote(name))
            with OutputFolder(folder / f"{name}-{dtype}") as output:
                save_verified(moe, source, output, TokenBatch(IDS, torch.ones_like(IDS, dtype=torch.bool)))
                output.finish()
            models[name, dtype] = moe.model
            continue
        recipe = {
            "model": str(tiny_folder(name)),
            "trust_remote_code": is_remote(name),
            "calibration": {"batch_size": 2, "data": [{"tokens": str(tokens)}]},
            "passes": [{"expert_pruning": {"keep": 6}}],
            "output": str(folder / f"{name}-{dtype}"),
        }
        models[name, dtype] = compress(recipe).model
    return models


@pytest.fixture(scope="module")
def skipping(folder):
    """A live model that skips, written to `folder / skipping` and pickled."""
    moe = MoEModel(tiny_model("mixtral"))
    rule = SkipRule("ratio", True, beta=0.9)
    moe.skip({layer.path: rule for layer in moe.layers})
    save(moe, folder / "skipping")
    torch.save(moe.model, folder / "skipping.pt")
    return moe


@pytest.fixture(scope="module")
def answers(folder, live, skipping):
    """What transformers alone makes of all of them, in one process."""
    jobs = {f"{n}-{d}": {"folder": str(folder / f"{n}-{d}"), "remote": is_remote(n)} for n, d in live}
    jobs["skipping"] = {"folder": str(folder / "skipping"), "remote": False}
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    (folder / "reader.py").write_text(READER, encoding="utf-8")
    ids, path = json.dumps(IDS.tolist()), json.dumps([*filter(None, sys.path)])
    command = [sys.executable, "-I", "reader.py", "jobs.json", ids, "answers.safetensors", path]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "answers.safetensors")


@pytest.mark.parametrize(("name", "dtype"), SAVED)
def test_transformers_alone_gives_the_same_logits(name, dtype, live, answers):
    model = live[name, dtype]
    with torch.no_grad():
        logits = model(IDS).logits
    assert logits.dtype == getattr(torch, dtype)
    assert torch.equal(answers[f"{name}-{dtype}/logits"], logits)
    assert torch.equal(answers[f"{name}-{dtype}/generated"], generated(model, name))
    assert int(answers[f"{name}-{dtype}/parameters"]) == model.num_parameters()
    original = tiny_model(name, dtype)
    assert model.num_parameters() < original.num_parameters()
    with torch.no_grad():
        assert not torch.equal(original(IDS).logits, logits)


def test_transformers_alone_runs_a_model_that_skips_unskipped(skipping, answers):
    with torch.no_grad(), skipping.unskipped():
        torch.testing.assert_close(answers["skipping/logits"], skipping.model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_pickle_skips_in_a_fresh_process(skipping, answers):
    with torch.no_grad():
        torch.testing.assert_close(answers["pickled/logits"], skipping.model(IDS).logits, rtol=1e-4, atol=1e-4)
        with skipping.unskipped():
            assert not torch.allclose(answers["pickled/logits"], skipping.model(IDS).logits, rtol=1e-2)


COUNT_KEYS = {
    "mixtral": {"num_local_experts", "num_experts"},
    "qwen2_moe": {"num_experts"},
    "qwen3_moe": {"num_experts", "num_local_experts"},
    "qwen3_moe_not_normalised": {"num_experts", "num_local_experts"},
    "olmoe": {"num_experts", "num_local_experts"},
    "granitemoe": {"num_local_experts"},
    "phimoe": {"num_local_experts"},
    "deepseek_v2": {"n_routed_experts", "num_experts"},
    "deepseek_v2_groups": {"n_routed_experts", "num_experts"},
    "deepseek_v3": {"n_routed_experts", "num_local_experts"},
    "gpt_oss": {"num_local_experts", "num_experts"},
    "glm4_moe": {"n_routed_experts", "num_local_experts"},
    "mixtral4": {"num_local_experts"},
    "deepseek4": {"n_routed_experts"},
}


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_count_under_every_name_that_readers_know(name, tmp_path):
    pruned_and_saved(tiny_folder(name), tmp_path / "pruned", is_remote(name))
    written = read_json(tmp_path / "pruned" / "config.json")
    assert {key for key in written if written[key] == 6 and "expert" in key} == COUNT_KEYS[name]
    assert not {key for key in written if written[key] == 8 and "expert" in key}


@pytest.mark.parametrize(("name", "dtype"), SAVED)
def test_config(name, dtype, folder, live):
    """The source's own, with the rope under every name that readers know."""
    source, written = (
        read_json(tiny_folder(name) / "config.json"),
        read_json(folder / f"{name}-{dtype}" / "config.json"),
    )
    assert written["dtype"] == written["torch_dtype"] == dtype
    if not is_remote(name):
        assert written["rope_parameters"] == source["rope_parameters"]
        assert written["rope_theta"] == source["rope_parameters"]["rope_theta"]
        scaled = source["rope_parameters"]["rope_type"] != "default"
        assert scaled == (name == "gpt_oss") == ("rope_scaling" in written)
    changed = COUNT_KEYS[name] | {"dtype", "torch_dtype", "rope_theta", "rope_scaling"}
    assert {k: v for k, v in written.items() if k not in changed} == {
        k: v for k, v in source.items() if k not in changed
    }


@pytest.mark.parametrize(("name", "dtype"), SAVED)
def test_other_files_are_carried_to_the_byte(name, dtype, folder, live):
    source, output = tiny_folder(name), folder / f"{name}-{dtype}"
    carried = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE", "generation_config.json"}
    if is_remote(name):
        carried |= {f"modeling_{name}.py", f"configuration_{name}.py"}
        carried -= {"generation_config.json"} - {path.name for path in source.iterdir()}
    for file in carried:
        assert (output / file).read_bytes() == (source / file).read_bytes(), file
    weights = {path.name for path in output.glob("*.safetensors")}
    assert weights == {"model.safetensors"}


@pytest.mark.parametrize(("name", "dtype"), SAVED)
def test_saved_to_the_bit(name, dtype, folder, live):
    """transformers leaves weights where the file has them, 8 bytes off the boundary that fast products like. torch then
    rounds some of them otherwise in the last bit, so `load_model` moves them; else sound checkpoints would be refused.
    """
    again = load_model(Checkpoint(name, folder / f"{name}-{dtype}", is_remote(name)))
    assert {tensor.data_ptr() % 64 for tensor in [*again.parameters(), *again.buffers()]} == {0}
    tensors = live[name, dtype].state_dict()
    assert tensors.keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in again.state_dict().items())
    for seed in range(5):
        ids = token_ids(2, 12, seed=seed)
        with torch.no_grad():
            assert torch.equal(again(ids).logits, live[name, dtype](ids).logits)


# Other sources and other ways to save ----------------------------------------------------------------------


def pruned_and_saved(source: Path, output: Path, trust_remote_code: bool = False):
    moe = MoEModel(load_model(Checkpoint("source", source, trust_remote_code)))
    moe.keep(keep_six(moe))
    output.mkdir()
    leaf = moe.structure.num_experts_leaf
    save_checkpoint(moe.model, source, output, {leaf: 6})
    return moe.model


@pytest.mark.parametrize(
    ("name", "old_count", "new_count"),
    [
        ("qwen3_moe", "num_experts", "num_local_experts"),
        ("mixtral", "num_local_experts", "num_experts"),
        ("deepseek_v3", "n_routed_experts", "num_local_experts"),
    ],
)
def test_source_written_by_transformers_4(name, old_count, new_count, tmp_path):
    """Its config.json knows rope_theta and torch_dtype, and one name of the count."""
    source = write_checkpoint(random_model(name), tmp_path / "source")
    raw = read_json(source / "config.json")
    rope = raw.pop("rope_parameters")
    count = raw.pop(old_count, None) or raw.pop(new_count)
    raw.pop(new_count, None)
    raw |= {old_count: count, "rope_theta": rope["rope_theta"], "torch_dtype": raw.pop("dtype")}
    (source / "config.json").write_text(json.dumps(raw), encoding="utf-8")

    model = pruned_and_saved(source, tmp_path / "pruned")

    again = load_model(Checkpoint("pruned", tmp_path / "pruned"))
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    written = read_json(tmp_path / "pruned" / "config.json")
    assert written[old_count] == written[new_count] == 6
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == rope["rope_theta"]


def test_source_in_several_files(tmp_path):
    source = tmp_path / "source"
    random_model("mixtral").save_pretrained(source, max_shard_size="100KB")
    assert (source / "model.safetensors.index.json").exists()
    model = pruned_and_saved(source, tmp_path / "pruned")
    assert not (tmp_path / "pruned" / "model.safetensors.index.json").exists()
    with torch.no_grad():
        again = load_model(Checkpoint("pruned", tmp_path / "pruned"))
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_model_without_a_source(tmp_path):
    moe = MoEModel(random_model("qwen3_moe"))
    moe.keep(keep_six(moe))
    save_checkpoint(moe.model, None, tmp_path, {moe.structure.num_experts_leaf: 6})
    written = read_json(tmp_path / "config.json")
    assert written["num_experts"] == written["num_local_experts"] == 6
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"]
    with torch.no_grad():
        assert torch.equal(load_model(Checkpoint("it", tmp_path))(IDS).logits, moe.model(IDS).logits)


def test_tied_embeddings_are_saved_once(tmp_path):
    source = write_checkpoint(random_model("mixtral", tie_word_embeddings=True), tmp_path / "source")
    model = pruned_and_saved(source, tmp_path / "pruned")
    assert "lm_head.weight" not in load_file(tmp_path / "pruned" / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(load_model(Checkpoint("it", tmp_path / "pruned"))(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "mixtral4"])
def test_no_dropped_weight_is_left_on_disk(name, folder, live):
    """Neither as a tensor nor hidden in a larger one."""
    size = sum(tensor.nbytes for tensor in {id(t): t for t in live[name, "float32"].state_dict().values()}.values())
    on_disk = (folder / f"{name}-float32" / "model.safetensors").stat().st_size
    assert size <= on_disk < size + 20_000
