"""What decides which tests run, and how long one may take."""

import json
from contextlib import nullcontext
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
    return SimpleNamespace(nodeid=name, get_closest_marker=lambda mark: mark in marks)


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
    ("mark", "seconds", "slowness", "fails"),
    [
        (None, 4.9, 1.0, False),
        (None, 5.1, 1.0, True),
        (None, 14.0, 3.0, False),
        (None, 16.0, 3.0, True),
        ("slow", 60.0, 1.0, False),
        ("nightly", 60.0, 1.0, False),
    ],
)
def test_a_long_test_needs_a_mark(monkeypatch, mark, seconds, slowness, fails):
    monkeypatch.setattr(cpu_limit, "slowness", lambda: slowness)
    says = f"::long took {seconds} CPU seconds; 5 × {slowness} "
    with pytest.raises(pytest.fail.Exception, match=says) if fails else nullcontext():
        cpu_limit.check(item("tests/test_a.py::long", mark), seconds)


def test_a_slow_machine_may_take_longer(monkeypatch):
    seconds = iter([0.1, 0.05, 0.1, 0.3, 0.6, 0.2])
    monkeypatch.setattr(cpu_limit, "_seconds_of_work", lambda: next(seconds))
    monkeypatch.setattr(cpu_limit, "REFERENCE", 0.2)
    assert cpu_limit.slowness() == 1.0
    assert cpu_limit.slowness() == pytest.approx(3.0)


def test_seconds_are_those_of_children_too():
    import subprocess
    import sys

    before = cpu_limit.cpu_seconds()
    subprocess.run([sys.executable, "-I", "-S", "-c", "sum(range(4_000_000))"], check=True)
    assert cpu_limit.cpu_seconds() - before >= 0.03
