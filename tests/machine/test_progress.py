"""What a step says of itself while it lasts."""

from __future__ import annotations

import io
import re
import sys

import pytest

from compressor.machine import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [40, 80])
def test_a_bar_says_only_what_is_known(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys, "stderr", Terminal())
    for parts in (0, 1, 3):
        with progress.Progress.detect().task("observing") as update:
            for done in range(parts + 1):
                update(done, parts) if parts else None
    said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sys.stderr.getvalue())  # type: ignore[attr-defined]
    assert not re.search(r"\?|-:--|0:00:00|\b0 s left", said), said
    assert "observing" in said
    assert "3 of 3" in said


def test_lines_say_when_it_will_be_done(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = iter([0.0, 100.0, 100.0, 200.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with progress.Progress("lines").task("observing") as update:
        update(1, 100)
        update(100, 100)
    assert capsys.readouterr().err.splitlines() == [
        "observing ...",
        "observing: 1 of 100, about 2 h 45 min left",
        "observing: done in 200.0 s",
    ]
