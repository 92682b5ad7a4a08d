"""What decides which tests run, and how long one may take."""

import json
from types import SimpleNamespace

import cpu_limit
import nightly
import pytest

TESTPATHS, ARGS = pytest.Config.ArgsSource.TESTPATHS, pytest.Config.ArgsSource.ARGS
NOW = {"transformers": "5.24.0", "compressor/edit/on_disk.py": "aa"}


def run(tmp_path, *, then=NOW, source=TESTPATHS, expression="", **others):
    record = tmp_path / "nightly.json"
    if then is not None:
        record.write_text(json.dumps(then))
    config = SimpleNamespace(args_source=source, args=["tests"], option=SimpleNamespace(markexpr=expression), **others)
    config.deselected = []
    config.hook = SimpleNamespace(pytest_deselected=lambda *, items: config.deselected.extend(items))
    return nightly.Nightly(config, NOW, record)


def item(name, *marks):
    return SimpleNamespace(nodeid=name, user_properties=[], get_closest_marker=lambda mark: mark in marks)


@pytest.mark.parametrize(
    ("then", "source", "expression", "are_run", "says"),
    [
        (NOW, TESTPATHS, "", False, "left out, nothing that they prove has changed"),
        ({**NOW, "transformers": "5.25.0"}, TESTPATHS, "", True, "for transformers changed"),
        ({**NOW, "compressor/gone.py": "bb"}, TESTPATHS, "", True, "for compressor/gone.py changed"),
        ({}, TESTPATHS, "", True, "for compressor/edit/on_disk.py and 1 more changed"),
        (None, TESTPATHS, "", False, "left out, never passed as a whole so far"),
        (None, ARGS, "", False, "left out, not the whole suite"),
        (None, TESTPATHS, "not nightly", True, "by -m 'not nightly'"),  # pytest itself leaves them out then
        (NOW, TESTPATHS, "nightly", True, "by -m 'nightly'"),
        (NOW, ARGS, "nightly", True, "by -m 'nightly'"),
    ],
)
def test_nightly_tests_are_run_when_what_they_prove_has_changed(tmp_path, then, source, expression, are_run, says):
    one = run(tmp_path, then=then, source=source, expression=expression)
    assert one.are_run == are_run
    assert says in one.line()
    items = [item("tests/test_a.py::quick"), item("tests/test_a.py::long", "nightly")]
    one.pytest_collection_modifyitems(items)
    assert [each.nodeid for each in items] == ["tests/test_a.py::quick", "tests/test_a.py::long"][: 1 + are_run]
    assert len(one.config.deselected) == (not are_run)


def test_a_nightly_test_that_is_named_is_run(tmp_path):
    one = run(tmp_path, source=ARGS)
    one.config.args = ["/somewhere/tests/test_a.py::long[x]", "tests/test_b.py"]
    names = ("tests/test_a.py::long[x]", "tests/test_a.py::long[y]", "tests/test_b.py::long")
    items = [item(name, "nightly") for name in names]
    one.pytest_collection_modifyitems(items)
    assert [each.nodeid for each in items] == ["tests/test_a.py::long[x]"]


def test_a_worker_does_as_it_is_told_and_says_what_it_found(tmp_path):
    told = run(tmp_path, source=ARGS, workerinput={"nightly": True}, workeroutput={})
    told.pytest_collection_modifyitems([item("a", "nightly"), item("b", "nightly"), item("c")])
    assert told.config.workeroutput == {"nightly": 2}
    node = SimpleNamespace(workerinput={}, workeroutput={"nightly": 2})
    starter = run(tmp_path)
    starter.pytest_configure_node(node)
    assert node.workerinput == {"nightly": False}
    starter.pytest_testnodedown(node)
    assert starter.found == 2


@pytest.mark.parametrize(
    ("passed", "status", "source", "is_written"),
    [(2, 0, TESTPATHS, True), (1, 0, TESTPATHS, False), (2, 1, TESTPATHS, False), (2, 0, ARGS, False)],
    ids=["all passed", "not all were run", "something failed", "not the whole suite"],
)
def test_only_a_complete_run_that_passed_is_recorded(tmp_path, passed, status, source, is_written):
    one = run(tmp_path, then=None, source=source)
    one.found = 2
    for _ in range(passed):
        one.pytest_runtest_logreport(SimpleNamespace(when="call", passed=True, keywords={"nightly": 1}))
    one.pytest_runtest_logreport(SimpleNamespace(when="call", passed=True, keywords={"slow": 1}))
    one.pytest_sessionfinish(status)
    assert one.record.exists() == is_written
    assert nightly.changes(NOW, one.record) == ([] if is_written else sorted(NOW))


def test_every_source_that_is_proven_exists_and_counts():
    now = nightly.proven_now()
    assert all((nightly.ROOT / name).exists() for name in nightly.PROVEN)
    assert {"transformers", "compressor/model/structure.py", "compressor/edit/on_disk.py"} <= now.keys()
    assert len(set(now.values())) == len(now)


@pytest.mark.parametrize(
    ("mark", "seconds", "is_named"),
    [(None, 4.9, False), (None, 5.1, True), ("slow", 60.0, False), ("nightly", 60.0, False)],
)
def test_a_long_test_without_a_mark_is_named_and_does_not_fail(mark, seconds, is_named):
    one = item("tests/test_a.py::long", mark)
    cpu_limit.note(one, seconds)
    lines = []
    reporter = SimpleNamespace(stats={"passed": [one], "": [object()]}, write_line=lines.append)
    cpu_limit.pytest_terminal_summary(reporter)
    says = [f"tests/test_a.py::long took {seconds} CPU seconds: make it smaller, or mark it slow or nightly"]
    assert lines == (says if is_named else [])


def test_seconds_are_those_of_children_too():
    import subprocess
    import sys

    before = cpu_limit.cpu_seconds()
    subprocess.run([sys.executable, "-I", "-S", "-c", "sum(range(4_000_000))"], check=True)
    assert cpu_limit.cpu_seconds() - before >= 0.03
