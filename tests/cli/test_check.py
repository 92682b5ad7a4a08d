"""`compressor check` means yes: what it refuses `run` refuses with the same words, and what is mended works."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, MixtralForCausalLM

import compressor
from compressor.checkpoint.output import OutputFolder
from compressor.data import sources

Cli = Callable[..., Any]
Refused = Callable[..., str]
WriteRecipe = Callable[..., Path]
MakeModel = Callable[..., Path]
CopyOf = Callable[[Path], Path]

CHAT = [{"role": "user", "content": "w1 w2 w3 w4 w5 w6 w7 w8"}]
TASK = {
    "task": "mine",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl", "train": "rows.jsonl"}},
    "output_type": "multiple_choice",
    "training_split": "train",
    "test_split": "test",
    "doc_to_text": "{{q}}",
    "doc_to_target": "a",
    "doc_to_choice": ["w1", "w2"],
}


@pytest.fixture
def both_refuse(refused: Refused, recipe: WriteRecipe) -> Callable[..., list[str]]:
    """Both commands refuse the recipe with these changes in the same words: the lines of the message, from the place
    in the recipe on, without its file and position.
    """

    def check(*options: str | Path, **changes: Any) -> list[str]:
        path = recipe(**changes)
        message = refused("check", "--quiet", path, *options, says=f"error: {path}:")
        assert refused("run", "--quiet", path, *options, says="") == message
        lines = message.removeprefix("error: ").splitlines()
        return [line.removeprefix(f"{path}:").partition(" ")[2] for line in lines]

    return check


@pytest.fixture
def passes(cli: Cli, recipe: WriteRecipe) -> Callable[..., None]:
    """`check` says yes to the recipe with these changes."""

    def check(*options: str | Path, **changes: Any) -> None:
        answer = cli("check", "--quiet", recipe(**changes), *options)
        assert (answer.status, answer.out, answer.err) == (0, "", "")

    return check


def test_every_source_that_is_wrong_is_named(both_refuse: Any, passes: Any, tmp_path: Path, tokens: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"words": "w1 w2 w3 w4 w5 w6 w7"}\n')
    (tmp_path / "short.txt").write_text("w1 w2")
    (tmp_path / "good.txt").write_text("w1 w2 w3 " * 20)
    (tmp_path / "high.jsonl").write_text('{"input_ids": [1, 2]}\n{"input_ids": [1, 64]}\n')

    def recipe(*wrong: dict[str, Any], perplexity: dict[str, Any]) -> dict[str, Any]:
        with_length = [{**one, "length": 8} for one in wrong]
        return {"data": [*with_length, {"tokens": str(tokens)}], "evaluate": {"perplexity": [perplexity]}}

    found = both_refuse(
        **recipe(
            {"text": "folder"}, {"jsonl": "rows.jsonl"}, {"text": "short.txt"}, perplexity={"tokens": "high.jsonl"}
        )
    )
    assert [line.partition(": ")[0] for line in found] == [
        "calibration.data[0]",
        "calibration.data[1]",
        "calibration.data[2]",
        "evaluate.perplexity[0]",
    ]
    assert found[0].endswith("source 'folder': folder is a folder. Give a file, or the folder as `dataset:`.")
    assert "rows.jsonl:1: no text under 'text'; found the keys ['words']. `field:` names the one " in found[1]
    assert "source 'short' has only 3 tokens, less than one sequence of 8 tokens: lower" in found[2]
    assert "source 'high' holds token id 64, but the model has only 64 embeddings (ids 0 to 63)" in found[3]
    good = {"text": "good.txt"}
    passes(**recipe(good, {"jsonl": "rows.jsonl", "field": "words"}, perplexity=good | {"length": 8}))


def test_files_that_are_not_there_come_first(both_refuse: Any) -> None:
    found = both_refuse(model="/no/such/model", data=[{"text": "nope.txt"}, {"tokens": "no.jsonl"}], device="cuda:99")
    assert [line.partition(": ")[0] for line in found] == ["calibration.data[0]", "calibration.data[1]", "device"]
    assert found[0].endswith("source 'nope': there is no file nope.txt.")


def test_a_length_beyond_the_models_positions(both_refuse: Any, passes: Any, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("w1 w2 w3 " * 40)
    [line] = both_refuse(data=[{"text": "text.txt", "length": 33}])
    says = "source 'text' has sequences of 33 tokens, the limit is 32: lower `length:`."
    assert line == f"calibration.data[0]: {says}"
    passes(data=[{"text": "text.txt", "length": 32}])


def test_chats_without_a_template(
    both_refuse: Any, passes: Any, copy_of: CopyOf, mixtral: Path, tmp_path: Path
) -> None:
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    model = copy_of(mixtral)
    data = [{"jsonl": "chats.jsonl", "length": 8}]
    [line] = both_refuse(model=model, data=data)
    assert line.startswith("calibration.data[0]: source 'chats' holds chats, but the tokenizer has no chat template")
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    passes(model=model, data=data)


def test_text_without_a_tokenizer(
    both_refuse: Any, passes: Any, make_model: MakeModel, tmp_path: Path, tokens: Path
) -> None:
    (tmp_path / "text.txt").write_text("w1 w2 w3 " * 20)
    model = make_model(tmp_path / "bare", tokenizer=False)
    asked = {"tasks": ["demo_code", "demo_prose"], "perplexity": [{"text": "text.txt", "length": 8}]}
    found = both_refuse(model=model, evaluate=asked)
    assert [line.partition(": ")[0] for line in found] == ["evaluate.perplexity[0]"]
    found = both_refuse(model=model, evaluate={"tasks": asked["tasks"]})
    assert [line.partition(": ")[0] for line in found] == ["evaluate.tasks[0]", "evaluate.tasks[1]"]
    assert "the model has no tokenizer; add it, or measure" in found[0]
    passes(model=model, evaluate={"perplexity": [{"tokens": str(tokens)}]})


def test_ids_beyond_the_models(
    both_refuse: Any, passes: Any, make_model: MakeModel, copy_of: CopyOf, mixtral: Path, tmp_path: Path
) -> None:
    """Of tokens that were added to a tokenizer, and that the model never had, only text that holds them is refused."""
    (tmp_path / "text.txt").write_text("w1 w2 w3 new " * 20)
    (tmp_path / "plain.txt").write_text("w1 w2 w3 " * 20)
    model = copy_of(mixtral)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(model)
    [line] = both_refuse(model=model, data=[{"text": "text.txt", "length": 8}])
    assert line.startswith("calibration.data[0]: source 'text' holds token id 64, but the model has only 64 embeddings")
    passes(model=model, data=[{"text": "plain.txt", "length": 8}])
    (tmp_path / "few.jsonl").write_text('{"input_ids": [1, 2, 3]}')
    small = make_model(tmp_path / "small", vocab_size=40)
    [line] = both_refuse(model=small, data=[{"text": "plain.txt", "length": 8}])
    assert line.startswith("model: its tokenizer knows 64 ids, but the model has only 40 embeddings: it belongs to ano")
    assert both_refuse(model=small, evaluate={"tasks": ["demo_code"]}, data=[{"tokens": "few.jsonl"}]) == [line]


# Tasks ------------------------------------------------------------------------------------------------------


def task_folder(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    rows = [{"q": f"w{number} w{number + 1}", "a": number % 2} for number in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"data_files": dict.fromkeys(("train", "test"), str(folder / "rows.jsonl"))}
    (folder / "mine.yaml").write_text(json.dumps({**TASK, "dataset_kwargs": files, **changes}))
    return folder


def test_every_task_that_is_unknown_is_named(both_refuse: Any, passes: Any, tmp_path: Path) -> None:
    folder = task_folder(tmp_path / "tasks")
    found = both_refuse(evaluate={"tasks": ["demo_cod", "mine", "demo_pros"], "task_path": str(folder)})
    assert [line.partition(": ")[0] for line in found] == ["evaluate.tasks[0]", "evaluate.tasks[2]"]
    assert "unknown task 'demo_cod'. Did you mean demo_code" in found[0]
    passes(evaluate={"tasks": ["mine"], "task_path": str(folder), "limit": 2})


def test_settings_of_tasks(both_refuse: Any, tmp_path: Path) -> None:
    [line] = both_refuse(evaluate={"tasks": ["mine"], "task_path": "nowhere"})
    assert line.startswith("evaluate.task_path: task_path nowhere: there is no such folder; ")
    folder = task_folder(tmp_path / "tasks", num_fewshot=0)
    [line] = both_refuse(evaluate={"tasks": ["mine"], "task_path": str(folder), "num_fewshot": 2})
    assert line.startswith("evaluate.num_fewshot: num_fewshot: 2 would have no effect: mine fixed at 0.")


def test_a_task_whose_documents_are_not_there(both_refuse: Any, tmp_path: Path) -> None:
    folder = task_folder(tmp_path / "tasks", dataset_path="owner/name", dataset_kwargs=None)
    [line] = both_refuse(evaluate={"tasks": ["mine"], "task_path": str(folder)})
    assert line.startswith("evaluate.tasks[0]: task 'mine': its documents cannot be read: ")


def test_answers_longer_than_the_model(both_refuse: Any, passes: Any, tmp_path: Path) -> None:
    def evaluate(name: str, **changes: Any) -> dict[str, Any]:
        return {"tasks": ["mine"], "task_path": str(task_folder(tmp_path / name, **changes)), "limit": 2}

    [line] = both_refuse(evaluate=evaluate("choosing", doc_to_choice=["w1", "w2 " * 33]))
    says = "an answer to document 0 has 33 tokens, but the model takes 32 positions. Leave the task out."
    assert line == f"evaluate.tasks[0]: task 'mine': {says}"
    passes(evaluate=evaluate("shorter", doc_to_choice=["w1", "w2 " * 32]))
    writing = {"output_type": "generate_until", "doc_to_choice": None, "generation_kwargs": {"until": ["w9"]}}
    [line] = both_refuse(evaluate=evaluate("writing", **writing))
    assert line.startswith("evaluate.tasks[0]: task 'mine' has the model write 256 tokens, as lm-eval has it, but the ")


def test_a_task_that_cannot_be_put_together(both_refuse: Any, tmp_path: Path) -> None:
    folder = task_folder(tmp_path / "tasks", doc_to_target="{{nothing[0]}}")
    [line] = both_refuse(evaluate={"tasks": ["mine"], "task_path": str(folder)})
    assert line.startswith("evaluate.tasks[0]: ")
    assert "UndefinedError" in line


def test_the_task_of_a_pass(both_refuse: Any, passes: Any, tmp_path: Path) -> None:
    folder = task_folder(tmp_path / "tasks")

    def one_pass(**options: Any) -> list[Any]:
        return [{"task_pruning": {"keep": 6, "length": 8, "samples": 2, **options}}]

    [line] = both_refuse(passes=one_pass(task="demo_cod"))
    assert line.startswith("passes[0].task_pruning.task: calibration task 'demo_cod': unknown task 'demo_cod'.")
    [line] = both_refuse(passes=one_pass(task="nowhere.yaml"))
    assert line.startswith("passes[0].task_pruning.task: task file nowhere.yaml cannot be read: ")
    [line] = both_refuse(passes=one_pass(task="mine", task_path=str(folder), split="validation"))
    assert line.endswith("task 'mine' has no validation split; it has train, test.")
    passes(passes=one_pass(task=str(folder / "mine.yaml")))


def test_a_source_whose_task_file_is_not_there(both_refuse: Any) -> None:
    [line] = both_refuse(data=[{"task": "nowhere.yaml"}])
    assert line.startswith("calibration.data: task file nowhere.yaml cannot be read: ")


# What is measured ---------------------------------------------------------------------------------------------


def test_random_decisions_where_nothing_is_dropped(both_refuse: Any, passes: Any) -> None:
    skipping = [{"dynamic_skipping": {"threshold": 0.2}}]
    [line] = both_refuse(passes=skipping, evaluate={"random": 1})
    says = "no pass drops experts, so there is nothing to draw at random; leave it out"
    assert line == f"evaluate.random: {says}"
    passes(passes=[{"expert_pruning": {"keep": 6}}, *skipping], evaluate={"random": 1})


# The output -----------------------------------------------------------------------------------------------------


def test_an_output_in_the_way(both_refuse: Any, passes: Any, tmp_path: Path, copy_of: CopyOf, mixtral: Path) -> None:
    out = tmp_path / "out"
    (out / "compressor").mkdir(parents=True)
    [line] = both_refuse()
    assert line == f"output: {out} exists already. Choose another output, or pass --overwrite to replace it."
    passes("--overwrite")
    model = copy_of(mixtral)
    [line] = both_refuse(model=model, output=model / "smaller")
    assert (
        line
        == f"output: output {model / 'smaller'} is the model's own folder, holds it, or is in it. Choose another one."
    )
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    [line] = both_refuse(output=tmp_path / "link" / "out")
    assert line == f"output: {tmp_path / 'link' / 'out'}: the output cannot be written there: File exists."


@pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() == 0, reason="whoever may write everywhere is refused nowhere"
)
def test_an_output_that_may_not_be_written(both_refuse: Any, passes: Any, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    [line] = both_refuse(output=folder / "out")
    assert line == f"output: {folder / 'out'}: the output cannot be written there: Permission denied."
    folder.chmod(0o700)
    passes(output=folder / "out")


def test_an_output_that_is_done(cli: Cli, recipe: WriteRecipe, passes: Any, both_refuse: Any) -> None:
    assert cli("run", "--quiet", recipe()).status == 0
    passes("--resume")
    assert cli("run", "--quiet", recipe(), "--resume").status == 0  # nothing is left to do
    [line] = both_refuse("--resume", "--set", "seed=1")
    assert line.startswith("output: ")
    assert "exists already" in line


def test_work_of_a_run_before(both_refuse: Any, cli: Cli, recipe: WriteRecipe, tmp_path: Path) -> None:
    journal = tmp_path / ".out.partial" / "journal"
    journal.mkdir(parents=True)
    (journal / "evaluation before.json").write_text("{}")
    [line] = both_refuse()
    assert line.startswith(f"output: {tmp_path / 'out'}: an interrupted run's work is in ")
    for option in ("--resume", "--overwrite"):
        assert cli("check", "--quiet", recipe(), option).status == 0
    assert (journal / "evaluation before.json").exists()


def test_an_output_that_another_run_writes(both_refuse: Any, tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out"):
        [line] = both_refuse()
    assert line.startswith(f"output: {tmp_path / 'out'}: another run is writing this output; ")


# The model ------------------------------------------------------------------------------------------------------


def test_weights_that_are_not_here_yet(
    cli: Cli, refused: Refused, recipe: WriteRecipe, copy_of: CopyOf, mixtral: Path
) -> None:
    model = copy_of(mixtral)
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    answer = cli("check", recipe(model=model))
    assert answer.status == 0
    assert "the model's weights are not here yet, so only its config was looked at" in " ".join(answer.out.split())
    torch.save(weights, model / "pytorch_model.bin")
    path = recipe(model=model)
    says = f"{path}:5:8 model: {model}: expected model.safetensors or model.safetensors.index.json, found pytorch"
    assert refused("check", path, says=says) == refused("run", "--quiet", path, says=says)


def test_a_model_that_was_given_is_not_copied_for_a_recipe_that_is_wrong(recipe: WriteRecipe, mixtral: Path) -> None:
    model = MixtralForCausalLM.from_pretrained(mixtral)
    model.__deepcopy__ = lambda memo: pytest.fail("it was copied")
    tokenizer = AutoTokenizer.from_pretrained(mixtral)
    for wrong in ({"data": [{"text": "nope.txt"}]}, {"evaluate": {"tasks": ["demo_cod"]}}):
        with pytest.raises(compressor.CompressorError, match=r"calibration.data\[0\]|evaluate.tasks\[0\]"):
            compressor.compress(recipe(**wrong, output=None), model, tokenizer)


# Cheap ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl", "dataset"])
def test_only_the_first_rows_are_read(
    kind: str, cli: Cli, recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows" / "train.jsonl"
    file.parent.mkdir()
    file.write_text('{"text": "w1 w2 w3"}\n' * 1000)
    read: list[str] = []
    document = sources._document
    monkeypatch.setattr(
        sources, "_document", lambda row, *where, **how: read.append(row) or document(row, *where, **how)
    )
    path = {"jsonl": file, "dataset": file.parent}[kind]
    assert cli("check", "--quiet", recipe(data=[{kind: str(path), "length": 8}])).status == 0
    assert len(read) == 2  # four tokens each
