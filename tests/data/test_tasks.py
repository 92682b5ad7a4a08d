"""Training text of lm-eval tasks: which documents, and how they are rendered. All offline, on data made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compressor.data import lm_eval_tasks
from compressor.data.demo import model_folder
from compressor.data.lm_eval_tasks import named_in
from compressor.data.packing import load_sequences
from compressor.data.sources import TaskSource
from compressor.errors import CalibrationError

ROWS = [{"question": f"q{i}", "answer": i % 2, "text": f"a{i}", "choices": ["no", "yes"]} for i in range(6)]


def training_texts(*arguments: Any, **options: Any) -> list[str]:
    return [text for text, _ in lm_eval_tasks.training_texts(*arguments, **options)]


@pytest.fixture
def make_task(tmp_path: Path) -> Any:
    """Write a task file over local data: `splits` says which of train, validation and test there are."""

    def make(name: str, splits: dict[str, str], body: str) -> Path:
        for split in set(splits.values()):
            rows = [{**row, "question": f"{split} {row['question']}"} for row in ROWS]
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = ", ".join(f"{split}: {tmp_path}/{split}.jsonl" for split in sorted(set(splits.values())))
        keys = {"train": "training_split", "validation": "validation_split", "test": "test_split"}
        lines = "".join(f"{keys[kind]}: {split}\n" for kind, split in splits.items())
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{{files}}}}}\n{lines}{body}"
        )
        return tmp_path

    return make


CHOICE = """output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: answer
doc_to_choice: choices
"""
BOTH = {"train": "one", "test": "two"}


def by_task(folder: Path, name: str, **options: Any) -> list[str]:
    return sorted(training_texts(name, task_path=folder, **options))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (CHOICE, ["Q: one q0\nA: no", "Q: one q1\nA: yes"]),
        (CHOICE + 'description: "Say so.\\n\\n"\n', ["Say so.\n\nQ: one q0\nA: no", "Say so.\n\nQ: one q1\nA: yes"]),
        (CHOICE + "target_delimiter: ''\n", ["Q: one q0\nA:no", "Q: one q1\nA:yes"]),
        (
            "output_type: generate_until\ndoc_to_text: '{{question}} ='\ndoc_to_target: text\n"
            "metric_list: [{metric: exact_match}]\n",
            ["one q0 = a0", "one q1 = a1"],
        ),
        (
            "output_type: loglikelihood\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{text}}'\n"
            "metric_list: [{metric: acc}]\n",
            ["one q0a0", "one q1a1"],
        ),
        (  # several right answers: the first
            "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: choices\n"
            "metric_list: [{metric: exact_match}]\n",
            ["one q0 no", "one q1 no"],
        ),
        (  # as in winogrande: the choices are put into the prompt, and the text after them is the same
            "output_type: multiple_choice\ndoc_to_text: answer\ndoc_to_target: text\n"
            "doc_to_choice: \"{{[question + ' 0', question + ' 1']}}\"\n",
            ["one q0 0 a0", "one q1 1 a1"],
        ),
    ],
    ids=["choice", "description", "delimiter", "generate", "loglikelihood", "several answers", "several prompts"],
)
def test_documents_are_rendered_as_the_task_does(make_task: Any, body: str, expected: list[str]) -> None:
    folder = make_task("mine", BOTH, body)
    assert by_task(folder, "mine")[:2] == expected


def test_it_is_what_the_model_is_asked_when_it_is_measured(make_task: Any) -> None:
    """Prompt and right choice of lm-eval's own requests, for the same documents."""
    folder = make_task("mine", {"train": "one", "test": "one_too"}, CHOICE)
    (folder / "one_too.jsonl").write_text((folder / "one.jsonl").read_text())
    loaded = lm_eval_tasks.load_tasks(["mine"], task_path=folder)
    (task,) = loaded.tasks.values()
    task.build_all_requests(rank=0, world_size=1)
    asked = {"".join(request.args) for request in task.instances}
    assert set(by_task(folder, "mine")) < asked


def test_documents_are_shuffled_by_the_seed(make_task: Any) -> None:
    folder = make_task("mine", BOTH, CHOICE)
    orders = {tuple(training_texts("mine", task_path=folder, seed=seed)) for seed in range(4)}
    assert len(orders) > 1
    assert {tuple(sorted(order)) for order in orders} == {tuple(by_task(folder, "mine"))}
    assert training_texts("mine", task_path=folder, seed=3) == training_texts("mine", task_path=folder, seed=3)


# Which documents -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("splits", "first"),
    [
        ({"train": "one", "validation": "two", "test": "three"}, "one"),
        ({"train": "one", "validation": "two"}, "one"),
        ({"validation": "two", "test": "three"}, "two"),
    ],
)
def test_never_the_documents_that_are_measured(make_task: Any, splits: dict[str, str], first: str) -> None:
    folder = make_task("mine", splits, CHOICE)
    assert all(text.startswith(f"Q: {first} ") for text in by_task(folder, "mine"))


@pytest.mark.parametrize(
    ("splits", "says"),
    [
        ({"test": "three"}, "only test (three), which it is measured on"),
        ({"validation": "two"}, "only validation (two), which it is measured on"),
        ({"train": "one", "test": "one"}, "only train (one), test (one), which it is measured on"),
    ],
)
def test_refused_if_there_are_no_others(make_task: Any, splits: dict[str, str], says: str) -> None:
    folder = make_task("mine", splits, CHOICE)
    with pytest.raises(CalibrationError) as error:
        training_texts("mine", task_path=folder)
    assert f"task 'mine' has no training documents, {says}. Take another task" in str(error.value)
    measured = "test" if "test" in splits else "validation"
    assert f"say `split: {measured}`" in str(error.value)
    assert len(training_texts("mine", task_path=folder, split=measured)) == 6


def test_a_split_that_there_is_not(make_task: Any) -> None:
    folder = make_task("mine", BOTH, CHOICE)
    with pytest.raises(CalibrationError, match=r"^task 'mine' has no validation split; it has train, test.$"):
        training_texts("mine", task_path=folder, split="validation")


def test_groups_take_turns(make_task: Any) -> None:
    folder = make_task("first", BOTH, CHOICE)
    make_task("second", {"train": "four", "test": "two"}, CHOICE)
    (folder / "both.yaml").write_text("group: both\ntask: [first, second]\n")
    texts = training_texts("both", task_path=folder)
    assert [text.split()[1] for text in texts[:4]] in (["one", "four"] * 2, ["four", "one"] * 2)
    assert len(texts) == 12
    make_task("third", {"test": "two"}, CHOICE)
    (folder / "three.yaml").write_text("group: three\ntask: [first, third]\n")
    with pytest.raises(CalibrationError, match="task 'third' has no training documents"):
        training_texts("three", task_path=folder)


def test_documents_that_cannot_be_rendered(make_task: Any) -> None:
    folder = make_task("mine", BOTH, CHOICE)
    rows = [json.loads(line) for line in (folder / "one.jsonl").read_text().splitlines()]
    rows[3]["answer"] = 7
    (folder / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(CalibrationError) as error:
        training_texts("mine", task_path=folder)
    assert str(error.value) == (
        "task 'mine': a document cannot be rendered with its answer: IndexError: list index out of range. Its keys are "
        "['answer', 'choices', 'question', 'text']."
    )


def test_unknown_tasks_and_no_network() -> None:
    with pytest.raises(
        CalibrationError, match=r"calibration task 'demo_codes': unknown task 'demo_codes'. Did you mean"
    ):
        training_texts("demo_codes")


def test_a_task_that_needs_a_network_when_there_is_none(tmp_path: Path) -> None:
    (tmp_path / "far.yaml").write_text(
        f"task: far\ndataset_path: nobody/nothing\ntraining_split: train\ntest_split: test\n{CHOICE}"
    )
    with pytest.raises(CalibrationError) as error:
        training_texts("far", task_path=tmp_path)
    assert "calibration task 'far': task 'far': its documents cannot be read: " in str(error.value)
    assert "download them" in str(error.value)


# As a source -----------------------------------------------------------------------------------------------


def test_a_task_of_the_demo_is_tokenised() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    source = TaskSource(task="demo_arithmetic", samples=3, length=64)
    sequences = load_sequences(source, tokenizer, seed=0)
    assert (sequences.name, len(sequences.ids), sequences.num_tokens) == ("demo_arithmetic", 3, 192)
    assert "=" in tokenizer.decode(sequences.ids[0])


def test_files(make_task: Any) -> None:
    folder = make_task("mine", BOTH, CHOICE)
    source = TaskSource(task=str(folder / "mine.yaml"))
    assert (source.title, source.name_in_index, source.folder) == ("mine", "mine", folder)
    assert len(list(source.documents(seed=0, split="train"))) == 6
    assert TaskSource(task="mine", task_path=folder).title == "mine"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("task: [a, b]\n", "names no task: expected `task: NAME` or `group: NAME`."),
        ("- a\n", "names no task: expected `task: NAME` or `group: NAME`."),
        ("task: 'x\n", "cannot be read: "),
    ],
)
def test_files_that_name_no_task(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(CalibrationError, match=says):
        named_in(tmp_path / "x.yaml")
    with pytest.raises(CalibrationError, match=r"nowhere.yaml cannot be read"):
        named_in(tmp_path / "nowhere.yaml")


def test_functions_in_files_are_not_run_to_find_the_name(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("task: mine\ndoc_to_text: !function nowhere.make\n")
    assert named_in(tmp_path / "x.yaml") == "mine"
    (tmp_path / "x.yaml").write_text("group: ours\ntask: [a, b]\n")
    assert named_in(tmp_path / "x.yaml") == "ours"
