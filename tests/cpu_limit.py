"""A test that needs more than a few seconds of a processor, marked neither `slow` nor `nightly`, is named at the end.

Named, not failed: processors differ and are shared, so nothing may hang on how long a test took. Counted are seconds of
the processor, of the test and of the processes that it waited for, but not of what its fixtures make.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator

import pytest

LIMIT = 5.0
SECONDS_OF_AN_IMPORT = 0.003
"""Of a module: whichever test is the first to need lm-eval pays for a thousand."""
PROPERTY = "CPU seconds, too many without a mark"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    started, imported = cpu_seconds(), len(sys.modules)
    yield
    note(item, cpu_seconds() - started - SECONDS_OF_AN_IMPORT * (len(sys.modules) - imported))


def note(item: pytest.Item, seconds: float) -> None:
    """Have the report of a test that has no mark carry its seconds, if they are too many."""
    if seconds > LIMIT and not (item.get_closest_marker("slow") or item.get_closest_marker("nightly")):
        item.user_properties.append((PROPERTY, round(seconds, 1)))


def cpu_seconds() -> float:
    """Of this process, all its threads, and its children that have ended."""
    return sum(os.times()[:4])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name them, the longest first, and what to do."""
    found = {
        report.nodeid: seconds
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, seconds in getattr(report, "user_properties", ())
        if name == PROPERTY
    }
    for name, seconds in sorted(found.items(), key=lambda pair: -pair[1]):
        terminalreporter.write_line(f"{name} took {seconds} CPU seconds: make it smaller, or mark it slow or nightly")
