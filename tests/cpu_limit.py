"""A test that needs more than a few seconds of a processor is marked as `slow` or `nightly`, or it fails.

Seconds of the processor, of the test and the processes that it waited for, but not of what its fixtures make.
Processors differ: before a test fails, a fixed piece of work is timed on this one, and the limit grows by how much
slower it is than where `REFERENCE` was measured. With several threads nothing is checked: threads that wait for each
other spin, and how long depends on what else the machine does.
"""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Generator

import pytest
import torch

LIMIT = 5.0
REFERENCE = 0.20
"""CPU seconds of `work` on one core of a Xeon of 2.1 GHz that had nothing else to do."""
SECONDS_OF_AN_IMPORT = 0.003
"""Of a module: whichever test is the first to need lm-eval pays for a thousand."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    started, imported = cpu_seconds(), len(sys.modules)
    yield
    check(item, cpu_seconds() - started - SECONDS_OF_AN_IMPORT * (len(sys.modules) - imported))


def check(item: pytest.Item, seconds: float) -> None:
    """Fail a test that has no mark and took longer than this machine explains."""
    is_marked = item.get_closest_marker("slow") or item.get_closest_marker("nightly")
    if seconds > LIMIT and not is_marked and torch.get_num_threads() == 1:
        factor = slowness()
        if seconds > LIMIT * factor:
            pytest.fail(message(item.nodeid, seconds, factor), pytrace=False)


def cpu_seconds() -> float:
    """Of this process, all its threads, and its children that have ended."""
    return sum(os.times()[:4])


def message(name: str, seconds: float, factor: float) -> str:
    """Why a test fails, and what to do."""
    return (
        f"{name} took {seconds:.1f} CPU seconds; {LIMIT:.0f} × {factor:.1f} are allowed on this machine. "
        "Make it smaller, or mark it: @pytest.mark.slow if each push needs it, @pytest.mark.nightly if not."
    )


def slowness() -> float:
    """How many times longer this machine takes than that of `REFERENCE`; at least 1. The worst of three."""
    return max(1.0, *(_seconds_of_work() / REFERENCE for _ in range(3)))


def _seconds_of_work() -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def work() -> None:
    """What tests do most: build small modules, copy them, run them."""
    for _ in range(40):
        layers = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(24)))
        copy.deepcopy(layers)(torch.ones(8, 32))
