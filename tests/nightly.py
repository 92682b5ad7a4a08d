"""When tests marked `nightly` run: every architecture in every dtype, many minutes, and the same answer as long as
neither the code that they prove nor transformers changes.

`nightly.json` says which code and which transformers they were last passed with; a complete run that passes writes it.
As long as there is none, they are run by hand only, and each run says so.
The whole suite runs them where that is not so any more, and leaves them out where it is; so does a run of some files,
always. By hand: `./test.sh -m nightly` runs them alone, `./test.sh -m "not nightly"` all others, and one that is named
(`test_every_architecture.py::test_passes_every_check[mixtral-float32]`) runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers

ROOT = Path(__file__).parents[1]
NAME = "nightly tests"
RECORD = Path(__file__).with_name("nightly.json")
PROVEN = (
    "compressor/checkpoint",
    "compressor/edit",
    "compressor/machine/distributed.py",
    "compressor/model",
    "compressor/observe",
    "compressor/testing",
    "tests/testing/test_every_architecture.py",
)
"""Files, and folders of Python files, that nightly tests prove."""


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Nightly(config, proven_now()), NAME)


def may_run(config: pytest.Config) -> bool:
    """Whether any test that is marked so is going to be run."""
    return config.pluginmanager.get_plugin(NAME).are_run or any("::" in argument for argument in config.args)


def proven_now() -> dict[str, str]:
    """What a run proves: the version of transformers, and a digest of each source."""
    paths = [path for name in PROVEN for path in sorted((ROOT / name).rglob("*.py")) or [ROOT / name]]
    return {"transformers": transformers.__version__} | {
        path.relative_to(ROOT).as_posix(): hashlib.sha256(path.read_text("utf-8").encode()).hexdigest()[:16]
        for path in paths
    }


def changes(now: dict[str, str], record: Path) -> list[str]:
    """The names of all that is not as it was when nightly tests last passed."""
    then = json.loads(record.read_text("utf-8")) if record.exists() else {}
    return sorted(name for name in now.keys() | then if now.get(name) != then.get(name))


class Nightly:
    """Of one process: the one that was started, or a worker, which is told what to do."""

    def __init__(self, config: pytest.Config, now: dict[str, str], record: Path = RECORD) -> None:
        self.config, self.now, self.record = config, now, record
        self.changed = changes(now, record)
        self.was_passed = record.exists()
        self.is_whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
        self.is_worker = hasattr(config, "workerinput")
        self.found = self.passed = 0

    @property
    def are_run(self) -> bool:
        """Whether nightly tests are run without being named."""
        if self.is_worker:
            return bool(self.config.workerinput["nightly"])  # type: ignore[attr-defined]
        return "nightly" in self.config.option.markexpr or (self.is_whole and self.was_passed and bool(self.changed))

    def line(self) -> str:
        """What is done, and why."""
        if self.config.option.markexpr:
            return f"nightly tests: by -m {self.config.option.markexpr!r}"
        if self.are_run:
            since = f"{self.changed[0]} and {len(self.changed) - 1} more" if self.changed[1:] else self.changed[0]
            return f'nightly tests: run, for {since} changed since they last passed; -m "not nightly" leaves them out'
        unchanged = "nothing that they prove has changed" if self.was_passed else "never passed as a whole so far"
        why = unchanged if self.is_whole else "not the whole suite"
        return f"nightly tests: left out, {why}; -m nightly runs them"

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["nightly"] = self.are_run

    @pytest.hookimpl(trylast=True)
    def pytest_sessionstart(self) -> None:
        reporter = self.config.pluginmanager.getplugin("terminalreporter")
        if reporter and not self.is_worker:
            reporter.write_line(self.line())

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        nightly = [item for item in items if item.get_closest_marker("nightly")]
        self.found = len(nightly)
        if self.is_worker:
            self.config.workeroutput["nightly"] = self.found  # type: ignore[attr-defined]
        if not self.are_run:
            left_out = [item for item in nightly if not is_named(item.nodeid, self.config.args)]
            self.config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if item not in left_out]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed += report.when == "call" and report.passed and "nightly" in report.keywords

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.found = getattr(node, "workeroutput", {}).get("nightly", 0)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if not self.is_worker and self.is_whole and exitstatus == 0 and 0 < self.found == self.passed:
            self.record.write_text(json.dumps(self.now, indent=1) + "\n", "utf-8")


def is_named(nodeid: str, arguments: Sequence[str]) -> bool:
    """Whether the command line names this very test, not just its file or folder."""
    names = [argument.replace("\\", "/").rpartition("tests/")[2] for argument in arguments if "::" in argument]
    return nodeid.removeprefix("tests/").startswith(tuple(names))
