"""Long work shows itself: a bar with the time left in a terminal, plain lines elsewhere, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from compressor.wording import human_seconds

Update = Callable[[int, int], None]
"""Called as (parts done so far, parts in all) after each part."""
Style = Literal["bar", "lines", "quiet"]

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Says what is going on, on standard error, so that standard output holds results only."""

    def __init__(self, style: Style = "quiet") -> None:
        self.style = style

    @classmethod
    def detect(cls, *, quiet: bool = False) -> Progress:
        """Bars where standard error is a terminal, plain lines where it is not."""
        if quiet or sys.stderr is None:
            return cls("quiet")
        return cls("bar" if sys.stderr.isatty() else "lines")

    def say(self, text: str) -> None:
        """One line about a step."""
        if self.style == "quiet":
            return
        try:
            print(text, file=sys.stderr, flush=True)
        except OSError:  # whoever read it is gone, or its disk is full: no reason to end the work
            self.style = "quiet"

    @contextmanager
    def task(self, title: str) -> Iterator[Update]:
        """A step of some parts: call what is yielded whenever another part is done."""
        if self.style == "quiet":
            yield lambda done, total: None
        elif self.style == "bar":
            with self._bar(title) as update:
                yield update
        else:
            with self._lines(title) as update:
                yield update

    @contextmanager
    def _bar(self, title: str) -> Iterator[Update]:
        from rich import progress as bars
        from rich.console import Console
        from rich.text import Text

        class Amounts(bars.ProgressColumn):
            """Parts done, time taken and time left, as far as they are known."""

            def render(self, task: bars.Task) -> Text:
                taken = f"{human_seconds(int(task.elapsed or 0))}"
                if task.total is None:
                    return Text(taken)
                left = task.time_remaining if not task.finished else None
                expected = f", {human_seconds(int(left))} left" if left else ""
                return Text(f"{task.completed:,.0f} of {task.total:,.0f}, {taken}{expected}")

        columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), Amounts())
        with bars.Progress(*columns, console=Console(stderr=True)) as display:
            task = display.add_task(title, total=None)
            yield lambda done, total: display.update(task, completed=done, total=total)

    @contextmanager
    def _lines(self, title: str) -> Iterator[Update]:
        started = spoken = time.monotonic()
        self.say(f"{title} ...")

        def update(done: int, total: int) -> None:
            nonlocal spoken
            now = time.monotonic()
            if 0 < done < total and now - spoken >= _SECONDS_BETWEEN_LINES:
                left = (now - started) / done * (total - done)
                self.say(f"{title}: {done:,} of {total:,}, about {human_seconds(left)} left")
                spoken = now

        yield update
        self.say(f"{title}: done in {time.monotonic() - started:.1f} s")
