"""What models write: loops and intervals by hand, continuations by an obvious loop, and whole runs."""

from __future__ import annotations

import copy
import html
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation.test_evaluate import as_sequences
from machine.test_processes import together
from reference_pages import unexplained
from tiny_models import VOCAB_SIZE, small_mixtral, tiny_folder, token_ids, word_tokenizer, write_token_file

import compressor
from compressor import EvaluationError, RecipeError
from compressor.data.sequences import Sequences
from compressor.evaluation import generation as generations
from compressor.evaluation.generation import Generation, Written, generation, loops, wilson


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generations, "PROMPT_TOKENS", 8)
    monkeypatch.setattr(generations, "NEW_TOKENS", 12)


@pytest.fixture(scope="module")
def model() -> Any:
    return small_mixtral(seed=3).eval()


@pytest.fixture(scope="module")
def texts() -> list[Sequences]:
    return [
        as_sequences(*[token_ids(length, seed=length).tolist() for length in lengths], name=name)
        for name, lengths in (("one", (20, 5, 9)), ("two", (16, 16)))
    ]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer([f"w{number}" for number in range(VOCAB_SIZE)], unknown="w0")


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([1, 2, 3, 3, 3, 3, 3, 3, 3, 3], True),
        ([1, 2, 3, 3, 3, 3, 3, 3, 3], False),  # seven tokens
        ([9, 1, 2, 3, 1, 2, 3, 1, 2, 3], True),
        ([9, 2, 3, 1, 2, 3, 1, 2, 3], False),  # not three times
        ([9, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1], True),  # wherever the n-gram begins
        ([1, 2, 3, 1, 2, 3, 1, 2, 3, 9], False),  # and then something else
        ([4, 4, 4, 4, 1, 2], False),
        ([], False),
    ],
)
def test_loops(ids: list[int], expected: bool) -> None:
    assert loops(ids) is expected


def test_wilson_by_hand() -> None:
    assert wilson(5, 10) == pytest.approx([0.236593, 0.763407], abs=1e-6)
    assert wilson(0, 50) == pytest.approx([0, 0.071348], abs=1e-6)
    assert wilson(50, 50) == pytest.approx([1 - 0.071348, 1], abs=1e-6)


@torch.no_grad()
def greedy_by_hand(model: Any, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(12):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == model.generation_config.eos_token_id:
            break
    return ids[len(prompt) :]


def test_figures_are_those_of_continuations_by_hand(model: Any, texts: list[Sequences], tokenizer: Any) -> None:
    """The beginnings of each text's sequences in turn, then their second pieces; ended where the model ends."""
    [one, _, three], [four, five] = (text.ids for text in texts)
    prompts = [ids.tolist() for ids in (one[:8], four[:8], three[:8], five[:8], one[8:16], four[8:], five[8:])]
    model = copy.deepcopy(model)
    model.generation_config.eos_token_id = None
    model.generation_config.eos_token_id = greedy_by_hand(model, prompts[1])[4]
    expected = [greedy_by_hand(model, prompt) for prompt in prompts]
    ended = sum(ids[-1] == model.generation_config.eos_token_id for ids in expected)
    assert 1 <= ended < 7
    found = generation(model, tokenizer, texts, 50, batch_size=3)
    assert (found.prompts, found.prompt_tokens, found.new_tokens) == (7, 8, 12)
    assert found.greedy.loops == sum(map(loops, expected)) / 7
    assert (found.greedy.ends, found.greedy.ends_interval) == (ended / 7, wilson(ended, 7))
    shares = [
        len({tuple(ids[k : k + 4]) for k in range(len(ids) - 3)}) / (len(ids) - 3) for ids in expected if len(ids) > 3
    ]
    assert found.greedy.distinct_4 == pytest.approx(sum(shares) / len(shares))
    said = [
        {name: " ".join(f"w{one}" for one in ids) for name, ids in (("prompt", p), ("greedy", g))}
        for p, g in zip(prompts[:3], expected, strict=False)
    ]
    assert [{key: sample[key] for key in ("prompt", "greedy")} for sample in found.samples] == said
    assert generation(model, None, texts, 2).samples == []


def test_samples_are_the_seeds_and_nothing_else_changes(model: Any, texts: list[Sequences], tokenizer: Any) -> None:
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    model.train()
    first, again, other = (generation(model, tokenizer, texts, 4, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.greedy == other.greedy
    assert [one["sampled"] for one in first.samples] != [one["sampled"] for one in other.samples]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()


def test_several_processes_find_the_same(model: Any, texts: list[Sequences], tokenizer: Any, monkeypatch: Any) -> None:
    alone = generation(model, tokenizer, texts, 5, batch_size=2)
    shared = {}
    for seed, prompts in enumerate(_batches(texts)):
        for how in ({"samples": False}, {"samples": True}):
            shared[f"{prompts.tolist()}{how}"] = generations._continued(model, prompts, 12, seed, **how)

    def continued(model: Any, prompts_BP: torch.Tensor, new_tokens: int, seed: int, **how: Any) -> list[list[int]]:
        return shared[f"{prompts_BP.tolist()}{how}"]  # torch's generator belongs to all threads

    monkeypatch.setattr(generations, "_continued", continued)
    monkeypatch.setattr(generations, "quiet_transformers", torch.no_grad)
    work = lambda p: generation(model, tokenizer, texts, 5, batch_size=2, processes=p)  # noqa: E731
    assert together(2, work) == [alone] * 2
    assert together(4, work) == [alone] * 4  # one without a batch


def _batches(texts: list[Sequences]) -> list[torch.Tensor]:
    prompts = list(generations._pieces(texts, 8))[:5]
    return [torch.stack(prompts[start : start + 2]) for start in (0, 2, 4)]


def test_text_that_is_too_short_is_refused(model: Any) -> None:
    with pytest.raises(EvaluationError, match="generation: no sequence of the measured text has 8 tokens for a prompt"):
        generation(model, None, [as_sequences([1, 2, 3])], 3)


# runs


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    tokens = write_token_file(tmp_path / "tokens.jsonl", token_ids(8, 24).tolist())
    return {
        "model": str(tiny_folder("mixtral")),
        "calibration": {"data": [{"tokens": str(tokens)}]},
        "passes": [{"expert_pruning": {"keep": 6}}, {"dynamic_skipping": {}}],
        "evaluate": {"fidelity": [{"tokens": str(tokens)}], "generation": 5},
        "output": str(tmp_path / "out"),
    }


def test_a_run_says_what_both_models_write(recipe: dict[str, Any], tmp_path: Path) -> None:
    result = compressor.compress(recipe)
    evaluation = json.loads((tmp_path / "out/compressor/record.json").read_text())["evaluation"]
    assert evaluation == result.record["evaluation"]
    assert unexplained(result.record) == []
    before, after = (Generation.from_json(evaluation[side]["generation"]) for side in ("before", "after"))
    assert before.prompts == after.prompts == 5
    assert isinstance(after.sampled, Written)
    assert [one["prompt"] for one in before.samples] == [one["prompt"] for one in after.samples]
    assert [one["greedy"] for one in before.samples] != [one["greedy"] for one in after.samples]
    page, card = ((tmp_path / "out" / name).read_text() for name in ("compressor/report.html", "README.md"))
    for one in (*before.samples, *after.samples):
        assert all(html.escape(text, quote=False) in page for text in one.values())
    for text in (page, card):
        for name in ("loops", "ends", "distinct 4-grams"):
            assert f"greedy: {name} %" in text
            assert f"sampled: {name} %" in text
    again = compressor.evaluate({**recipe, "output": None}, str(tmp_path / "out"))["evaluation"]["after"]
    assert again["generation"] == evaluation["after"]["generation"]  # it skips there too


def test_what_cannot_write_is_refused_by_name(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        RecipeError, match=r"evaluate\.generation: weights cannot be read from disk: `generation` needs a"
    ):
        compressor.check(recipe, overrides=["weights=disk"])
    with pytest.raises(
        RecipeError, match="evaluate: generation has nothing to continue; give text, under `perplexity`"
    ):
        compressor.check({**recipe, "evaluate": {"generation": 5}})
    monkeypatch.setattr("transformers.MixtralForCausalLM.can_generate", lambda: False)
    with pytest.raises(RecipeError, match=r"evaluate\.generation: MixtralForCausalLM has no `generate`, by which it"):
        compressor.check(recipe)
