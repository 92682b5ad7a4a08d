"""Whole runs: other counts in other layers, a mean, fewer experts per token, padding; saved, loaded again, applied."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny_folder, token_ids, write_token_file
from transformers import AutoModelForCausalLM

import compressor
from compressor import MoEModel
from compressor.run.apply import apply


@pytest.fixture
def run(tmp_path):
    """An architecture and options → (the record's pass, the folder, the model before)."""

    def go(name, **options):
        tokens = write_token_file(tmp_path / "tokens.jsonl", token_ids(6, 24).tolist())
        recipe = {
            "model": str(tiny_folder(name)),
            "calibration": {"batch_size": 3, "data": [{"tokens": str(tokens)}]},
            "passes": [{"expert_pruning": options}],
        }
        result = compressor.compress(recipe, output=tmp_path / "out")
        (done,) = result.record["passes"]
        return done, result.folder, AutoModelForCausalLM.from_pretrained(tiny_folder(name))

    return go


def logits(model):
    with torch.no_grad():
        return model(token_ids(2, 15, seed=9)).logits


def assert_as_masked(done, model, original):
    """The model in the folder answers as the original with the dropped experts masked."""
    decision = done["decision"]
    kept = {path: layer["kept"] for path, layer in decision["layers"].items()}
    with MoEModel(original.eval()).masked(kept, top_k=decision.get("top_k")):
        expected = logits(original)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def counts(done):
    return [len(layer["kept"]) for layer in done["decision"]["layers"].values()]


def test_counts_by_layer(run, tmp_path):
    done, folder, original = run("mixtral", keep={0: 5, 2: 3})
    assert counts(done) == [5, 8, 3]
    assert done["options"]["keep"] == {"0": 5, "2": 3}
    model, _ = compressor.load(folder)
    assert_as_masked(done, model, original)
    apply(folder / "compressor" / "record.json", str(tiny_folder("mixtral")), tmp_path / "applied")
    again, _ = compressor.load(tmp_path / "applied")
    assert torch.equal(logits(again), logits(model))


def test_a_mean(run):
    done, folder, original = run("mixtral", keep={"mean": 5}, replace="none")
    assert sum(counts(done)) == 15
    assert done["decision"]["budget"]["num_kept"] == 15
    assert json.loads((folder / "compressor" / "decision.json").read_text())["passes"][0]["decision"]["budget"]
    assert_as_masked(done, compressor.load(folder)[0], original)


@pytest.mark.parametrize(
    ("name", "options"), [("mixtral", {"keep": 8}), pytest.param("olmoe", {"keep": 6}, marks=pytest.mark.nightly)]
)
def test_fewer_experts_per_token(run, tmp_path, name, options):
    done, folder, original = run(name, **options, top_k=1)
    assert done["decision"]["top_k"] == 1
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.num_experts_per_tok == 1
    assert_as_masked(done, model, original)
    apply(folder / "compressor" / "decision.json", str(tiny_folder(name)), tmp_path / "applied")
    assert (tmp_path / "applied" / "config.json").read_text() == (folder / "config.json").read_text()


@pytest.mark.parametrize("name", ["glm4_moe", pytest.param("gpt_oss", marks=pytest.mark.nightly)])
def test_padded(run, name):
    done, folder, original = run(name, keep={1: 4, 2: 6}, padded=True)
    assert min(counts(done)) == 4
    model = AutoModelForCausalLM.from_pretrained(folder)  # without this library
    assert_as_masked(done, model.eval(), original)
