"""Tasks that ask for more than the model's positions: refused before weights are read, or counted and said."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from compressor.checkpoint.find import Checkpoint
from compressor.data.lm_eval_tasks import load_tasks, refuse_long_answers
from compressor.edit.on_disk import OnDisk
from compressor.errors import EvaluationError
from compressor.evaluation.lm_eval import TaskResult, run_tasks
from compressor.machine.distributed import Processes
from compressor.machine.progress import Progress
from compressor.report.terminal import print_summary

CASES = Path(__file__).parents[1] / "cases" / "tasks"
POSITIONS = 32


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    settings = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "eos_token_id": 0}
    return MixtralForCausalLM(MixtralConfig(**settings, **heads, max_position_embeddings=POSITIONS))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = "</s> ? . It rains in town Which word is number 0 1 2 3 4 5 6 alpha beta gamma delta What plus"
    inner = Tokenizer(WordLevel({word: number for number, word in enumerate(words.split())}, unk_token="</s>"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tasks' files over local data, and a short question beside the long ones."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for file in CASES.glob("*.yaml"):
        text = file.read_text().replace("test: ", f"test: {tmp_path}/")
        (tmp_path / file.name).write_text(text)
    (tmp_path / "gen.jsonl").write_text((CASES / "gen.jsonl").read_text())
    short = {"q": "Which word is number 1?", "choices": ["alpha", "beta", "gamma", "delta"], "answer": 1}
    (tmp_path / "long.jsonl").write_text((CASES / "long.jsonl").read_text() + json.dumps(short) + "\n")
    return tmp_path


def with_settings(folder: Path, **settings: Any) -> Any:
    text = (folder / "long_answers.yaml").read_text()
    changed = text.replace('{until: ["\\n"], max_gen_toks: 2048}', json.dumps(settings))
    assert changed != text
    (folder / "long_answers.yaml").write_text(changed)
    return load_tasks(["long_answers"], task_path=folder)


def test_long_answers_are_refused_by_task_and_option(folder: Path, model: Any, tokenizer: Any) -> None:
    tasks = load_tasks(["long_answers", "long_prompts"], task_path=folder)
    refuse_long_answers(tasks.tasks, 2049)
    refuse_long_answers(tasks.tasks, None)
    with pytest.raises(EvaluationError) as error:
        refuse_long_answers(tasks.tasks, 2048)
    assert str(error.value) == (
        "task 'long_answers' has the model write `generation_kwargs: max_gen_toks: 2048`, but the model takes 2048 "
        "positions, question and answer together. Give it a smaller `max_gen_toks`, or leave it out."
    )
    with pytest.raises(EvaluationError, match=r"the model takes 32 positions"):
        run_tasks(model, tokenizer, tasks)


@pytest.mark.parametrize(("settings", "says"), [({"max_new_tokens": 40}, "max_new_tokens: 40"), ({}, "256 tokens, as")])
def test_the_option_may_have_another_name_or_none(folder: Path, settings: Any, says: str) -> None:
    with pytest.raises(EvaluationError, match=says):
        refuse_long_answers(with_settings(folder, until=["\n"], **settings).tasks, POSITIONS)


@pytest.mark.parametrize("wanted", ["many", 0, -3, 2.5])
def test_no_number_of_tokens(folder: Path, wanted: Any) -> None:
    with pytest.raises(EvaluationError, match=rf"'long_answers': `.*max_gen_toks: {wanted}` is no number of tokens\."):
        refuse_long_answers(with_settings(folder, until=["\n"], max_gen_toks=wanted).tasks, POSITIONS)


def test_answers_without_a_token(folder: Path, model: Any, tokenizer: Any) -> None:
    row = {"q": "Which?", "choices": ["alpha", " "], "answer": 0}
    (folder / "long.jsonl").write_text(json.dumps(row) + "\n")
    tasks = load_tasks(["long_prompts"], task_path=folder)
    with pytest.raises(EvaluationError, match=r"'long_prompts': an answer to document 0 has no token of its own\."):
        run_tasks(model, tokenizer, tasks)


def test_prompts_that_are_cut_are_counted(folder: Path, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Four requests each for two long questions, and for one that fits: two of three prompts are cut."""
    tasks = load_tasks(["long_prompts"], task_path=folder)
    result = run_tasks(model, tokenizer, tasks, batch_size=4)["long_prompts"]
    assert (result.documents, result.cut, result.to_json()["cut"]) == (3, 2, 2)
    assert TaskResult.from_json(result.to_json()) == result
    assert run_tasks(model, tokenizer, tasks, limit=1)["long_prompts"].cut == 1
    saved = tmp_path / "model"
    model.save_pretrained(saved)
    settings: dict[str, Any] = {"device": "cpu", "journal": None, "tokens_at_once": 400}
    piece = OnDisk(Checkpoint(str(saved), saved), None, **settings, progress=Progress(), processes=Processes())
    assert piece.ask(tasks, tokenizer, batch_size=4)["long_prompts"] == result


def test_prompts_of_tasks_that_write_are_counted(folder: Path, model: Any, tokenizer: Any) -> None:
    """Questions of six tokens leave 26 positions for the answer."""
    for length, cut in ((26, 0), (27, 6)):
        text = (CASES / "long_answers.yaml").read_text().replace("test: ", f"test: {folder}/")
        (folder / "long_answers.yaml").write_text(text)
        tasks = with_settings(folder, until=["\n"], max_gen_toks=length)
        assert run_tasks(model, tokenizer, tasks, batch_size=3)["long_answers"].cut == cut


def test_answers_longer_than_the_model(folder: Path, model: Any, tokenizer: Any) -> None:
    row = {"q": "Which?", "choices": ["alpha " * POSITIONS, "beta " * (POSITIONS + 1)], "answer": 1}
    (folder / "long.jsonl").write_text(json.dumps(row) + "\n")
    tasks = load_tasks(["long_prompts"], task_path=folder)
    with pytest.raises(
        EvaluationError, match=r"'long_prompts': an answer to document 0 has 33 tokens, .* 32 positions"
    ):
        run_tasks(model, tokenizer, tasks)


def test_what_lm_eval_refuses_is_not_our_bug(folder: Path, model: Any, tokenizer: Any) -> None:
    tasks = with_settings(folder, until=7, max_gen_toks=4)
    with pytest.raises(EvaluationError, match=r"lm-eval cannot ask the model long_answers: \w+Error: "):
        run_tasks(model, tokenizer, tasks)


def test_what_goes_wrong_in_a_model_stays_as_it_is(
    folder: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = load_tasks(["long_prompts"], task_path=folder)
    monkeypatch.setattr(model.model.layers[0].mlp, "experts", torch.nn.Linear(3, 3))
    with pytest.raises((TypeError, RuntimeError)):
        run_tasks(model, tokenizer, tasks)


def test_cut_prompts_stand_below_the_figures() -> None:
    from rich.console import Console

    metric = {"value": 0.5, "standard_error": None, "higher_is_better": True}
    task = {"metrics": {"acc": metric}, "documents": 3, "cut": 2, "group": None}
    said = io.StringIO()
    record = {
        "evaluation": {"after": {"tasks": {"long": task, "short": {**task, "cut": 0}}}},
        "model": {"reference": "x"},
    }
    print_summary(record, Console(file=said, width=300))
    assert (
        "long: 2 of 3 prompts are longer than the model takes, and were asked without their beginnings"
        in said.getvalue()
    )
    assert "short:" not in said.getvalue()
