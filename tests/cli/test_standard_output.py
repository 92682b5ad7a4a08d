"""Who reads the output may go, and what it is written to may be full: neither is shown as a bug of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compressor.cli import _exit_status
from compressor.machine.progress import Progress

COMMAND = [sys.executable, "-m", "compressor", "--version"]


class Full:
    """A stream whose disk is full."""

    def write(self, text: str) -> None:
        raise OSError(28, "No space left on device")

    def flush(self) -> None:
        pass


def test_a_reader_that_is_gone() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(COMMAND, stdout=writing, stderr=subprocess.PIPE, check=False, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the device that is always full is Linux's")
def test_a_full_disk() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(COMMAND, stdout=full, stderr=subprocess.PIPE, check=False, text=True)
    says = "error: standard output cannot be written: No space left on device.\n"
    assert (done.returncode, done.stderr) == (2, says)


def test_no_output_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert _exit_status(["--version"]) == 0
    monkeypatch.setattr(sys, "stderr", None)
    assert _exit_status(["run", str(tmp_path / "none.yaml")]) == 2
    assert Progress.detect().style == "quiet"


def test_work_goes_on_when_nobody_reads_how_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    progress: Any = Progress("lines")
    monkeypatch.setattr(sys, "stderr", Full())
    with progress.task("observing") as update:
        update(1, 2)
    progress.say("done")
    assert progress.style == "quiet"
