"""Long work shows itself: a bar with the time left in a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

Advance = Callable[[], None]
Style = Literal["bar", "lines", "quiet"]

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Says what is going on, on standard error, so that standard output holds results only."""

    def __init__(self, style: Style = "quiet") -> None:
        self.style = style

    @classmethod
    def detect(cls, *, quiet: bool = False) -> Progress:
        """Bars where standard error is a terminal, plain lines where it is not."""
        if quiet:
            return cls("quiet")
        return cls("bar" if sys.stderr.isatty() else "lines")

    def say(self, text: str) -> None:
        """One line about a step."""
        if self.style != "quiet":
            print(text, file=sys.stderr, flush=True)

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Advance]:
        """A step of `total` equal parts; call what is yielded after each part."""
        if self.style == "quiet":
            yield lambda: None
        elif self.style == "bar":
            with self._bar(title, total) as advance:
                yield advance
        else:
            with self._lines(title, total) as advance:
                yield advance

    @contextmanager
    def _bar(self, title: str, total: int) -> Iterator[Advance]:
        from rich import progress as bars
        from rich.console import Console

        columns = (
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
            bars.TextColumn("left"),
            bars.TimeRemainingColumn(),
        )
        with bars.Progress(*columns, console=Console(stderr=True)) as display:
            task = display.add_task(title, total=total)
            yield lambda: display.advance(task)

    @contextmanager
    def _lines(self, title: str, total: int) -> Iterator[Advance]:
        started = spoken = time.monotonic()
        done = 0
        self.say(f"{title} ...")

        def advance() -> None:
            nonlocal done, spoken
            done += 1
            now = time.monotonic()
            if done < total and now - spoken >= _SECONDS_BETWEEN_LINES:
                left = (now - started) / done * (total - done)
                self.say(f"{title}: {done} of {total}, about {left:.0f} s left")
                spoken = now

        yield advance
        self.say(f"{title}: done in {time.monotonic() - started:.1f} s")
