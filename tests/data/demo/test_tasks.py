from __future__ import annotations

import pytest

from compressor.data.demo.tasks import build_documents, task_configs
from compressor.errors import EvaluationError

TASKS = ("demo_arithmetic", "demo_code", "demo_prose")


def test_the_three_tasks():
    assert tuple(task_configs()) == TASKS


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", ["train", "held-out"])
def test_four_hundred_questions_of_four_choices(task, split):
    questions = build_documents(task, split)
    assert len(questions) == 400
    assert len({question["context"] for question in questions}) == 400
    for question in questions:
        assert len(set(question["choices"])) == 4
        assert question["context"].strip()
    positions = [question["answer"] for question in questions]
    assert all(70 <= positions.count(index) <= 130 for index in range(4))


@pytest.mark.parametrize("task", TASKS)
def test_questions_depend_on_seed_and_split_alone(task):
    first = build_documents(task, "held-out", 20)
    assert first == build_documents(task, "held-out", 20, seed=0)
    assert first != build_documents(task, "held-out", 20, seed=1)
    train = build_documents(task, "train", 20)
    assert not {q["context"] for q in first} & {q["context"] for q in train}


def test_arithmetic_answers_are_right_and_not_given_away():
    for question in build_documents("demo_arithmetic", "held-out"):
        *worked, asked = question["context"].split("\n")
        assert not any(line.startswith(asked) for line in worked)
        assert int(question["choices"][question["answer"]]) == eval(asked.rstrip("="))
        assert all(int(choice) >= 0 for choice in question["choices"])


def test_choices_of_code_look_alike():
    for question in build_documents("demo_code", "held-out", 50):
        indents = {len(choice) - len(choice.lstrip()) for choice in question["choices"]}
        lengths = [len(choice) for choice in question["choices"]]
        assert len(indents) == 1
        assert max(lengths) - min(lengths) <= 12


def test_mistakes_are_named():
    with pytest.raises(EvaluationError, match="no task 'demo_poetry'; known: demo_arithmetic, demo_code, demo_prose"):
        build_documents("demo_poetry", "train")
    with pytest.raises(EvaluationError, match="100000 questions asked for, the held-out text gives"):
        build_documents("demo_prose", "held-out", 100_000)


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_loads_a_task_with_its_training_documents():
    from lm_eval.tasks import TaskManager

    config = task_configs()["demo_arithmetic"]
    task = TaskManager(include_defaults=False).load([config])["tasks"]["demo_arithmetic"]
    assert task.has_training_docs()
    assert len(task.training_docs()) == len(task.test_docs()) == 400
    document = task.training_docs()[0]
    assert task.doc_to_text(document) == document["context"]
    assert task.doc_to_choice(document)[task.doc_to_target(document)] == document["choices"][document["answer"]]
