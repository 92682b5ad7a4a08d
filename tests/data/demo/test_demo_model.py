from __future__ import annotations

import json
import math
from itertools import islice

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import compressor.data.demo
from compressor.data.demo import model_folder
from compressor.data.demo.corpus import DOMAINS, documents
from compressor.data.demo.tasks import task_configs
from compressor.errors import CheckpointError

# Bounds with room for another Python's text; training.json and docs/demo.md have the measured figures.
HIGHEST_PERPLEXITY = {"code": 22.0, "prose": 42.0, "arithmetic": 3.6}
LOWEST_ACCURACY = {"demo_arithmetic": 0.85, "demo_code": 0.4, "demo_prose": 0.4}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_folder())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def outputs(model, tokenizer):
    """Loss and router logits on eight windows of 256 tokens of each domain's held-out text."""
    by_domain = {}
    for domain in DOMAINS:
        texts = islice(documents(domain, "held-out", seed=3), 60)
        rows = [ids for text in texts if len(ids := tokenizer(text[:1500])["input_ids"]) >= 256]
        ids = torch.tensor([row[:256] for row in rows[:8]])
        assert len(ids) == 8
        with torch.no_grad():
            by_domain[domain] = model(input_ids=ids, labels=ids, output_router_logits=True)
    return by_domain


def test_files_are_small_and_name_no_folder():
    files = list(model_folder().iterdir())
    assert sorted(file.name for file in files) == sorted(compressor.data.demo.MODEL_FILES)
    assert sum(file.stat().st_size for file in files) <= 10_000_000
    assert "/" not in json.dumps(json.loads((model_folder() / "training.json").read_text())["settings"])


def test_missing_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(compressor.data.demo, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(CheckpointError, match=r"config.json, .*model.safetensors.* missing; install"):
        model_folder()


def test_architecture(model):
    config = model.config
    assert type(model).__name__ == "MixtralForCausalLM"
    assert (config.num_hidden_layers, config.num_local_experts, config.num_experts_per_tok) == (4, 8, 2)
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (128, 256, 2048)
    assert config.use_cache is True
    assert config.output_router_logits is False
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, 2)
    assert model.generation_config.pad_token_id == 2
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert sum(p.numel() for p in model.parameters()) == 3_609_728


def test_checkpoint_holds_every_weight_in_bfloat16():
    model, report = AutoModelForCausalLM.from_pretrained(model_folder(), output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_tokenizer_returns_the_text_and_splits_digits(tokenizer):
    for text in ("37+58=95\n", "def f(x):\n    return x  # é, 漢\n", " leading, and  double  spaces "):
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer.tokenize("1024") == ["1", "0", "2", "4"]
    assert not [t for t in tokenizer.get_vocab() if len(t) > 1 and any(c in "0123456789" for c in t)]
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    assert len(tokenizer) == 2048


@pytest.mark.parametrize("domain", DOMAINS)
def test_held_out_text_is_learned(outputs, domain):
    assert math.exp(float(outputs[domain].loss)) < HIGHEST_PERPLEXITY[domain]


def test_sums_never_seen_are_mostly_right(model, tokenizer):
    right = 0
    texts = list(islice(documents("arithmetic", "held-out", seed=5), 40))
    for text in texts:
        *worked, asked = text.splitlines()[:5]
        left, value = asked.split("=")
        prompt = tokenizer("\n".join([*worked, f"{left}="]), return_tensors="pt")
        generated = model.generate(**prompt, max_new_tokens=4, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        right += tokenizer.decode(generated).split("\n")[0] == value
    assert right >= 0.8 * len(texts)


def shares_of_experts(output) -> torch.Tensor:
    """The share of choices that each expert gets, [layers, experts]; rows sum to one."""
    chosen = [logits.topk(2, dim=-1).indices.flatten() for logits in output.router_logits]
    return torch.stack([torch.bincount(layer, minlength=8) / len(layer) for layer in chosen])


def test_experts_differ_by_domain(outputs):
    """Half the summed difference of shares is the part of the choices that would have to move."""
    shares = {domain: shares_of_experts(output) for domain, output in outputs.items()}
    for one, other in (("code", "arithmetic"), ("prose", "arithmetic"), ("code", "prose")):
        moved = (shares[one] - shares[other]).abs().sum(dim=1).mean() / 2
        assert moved > (0.4 if other == "arithmetic" else 0.1), (one, other, moved)


def test_every_expert_is_used(outputs):
    shares = torch.stack([shares_of_experts(output) for output in outputs.values()])
    assert shares.amax(dim=0).min() > 0.02


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
def test_tasks_are_answered_above_chance(model, tokenizer):
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_defaults=False).load(list(task_configs().values()))
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16)
    results = evaluator.evaluate(lm=harness, task_dict=tasks, limit=40, bootstrap_iters=0)["results"]
    for task, lowest in LOWEST_ACCURACY.items():
        assert results[task]["acc,none"] >= lowest
        assert results[task]["acc_norm,none"] >= lowest
