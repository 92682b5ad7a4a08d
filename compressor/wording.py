"""How things are said to people: sizes, times, counts, what a name may have meant; texts known by their digests."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

_PATH = re.compile(
    r"(?:(?<=file://)|(?<![\w/.~<])(?:(?<!:)|(?!//)))(?:~[\w.-]*(?:/[^\s/\"'`,;)\]}]+)+|(?:/[^\s/\"'`,;)\]}]+){2,})/?"
)
"""An absolute path within a text."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What follows `unknown NAME`: `; did you mean 'keep'?`, or a full stop."""
    closest = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {closest[0]!r}?" if closest else "."


def digest(whole: str | Iterable[str | bytes]) -> str:
    """`sha256:` and 16 hex digits of a text, or of parts one after another."""
    found = hashlib.sha256()
    for part in [whole] if isinstance(whole, str) else whole:
        found.update(part.encode() if isinstance(part, str) else part)
    return f"sha256:{found.hexdigest()[:16]}"


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of one on the Hugging Face hub, `owner/name`, by its client's rules."""
    found = re.fullmatch(r"\b[\w.-]{1,96}\b/\b[\w.-]{1,96}\b", name, re.ASCII)
    return found is not None and not re.search(r"--|\.\.|\.git$", name)


def without_paths(said: Any) -> Any:
    """The same JSON or text with absolute paths cut to their last names: where things are on a machine is private."""
    if isinstance(said, dict):
        return {without_paths(key): without_paths(value) for key, value in said.items()}
    if isinstance(said, list | tuple):
        return [without_paths(one) for one in said]
    if not isinstance(said, str):
        return said
    whole = PureWindowsPath(said) if "\\" in said else PurePosixPath(said)
    is_path = whole.is_absolute() and "\n" not in said
    return whole.name if is_path else _PATH.sub(lambda found: PurePosixPath(found[0]).name, said)


def runs(numbers: Iterable[int]) -> list[range]:
    """`[0, 1, 2, 5]` → `[range(0, 3), range(5, 6)]`."""
    found: list[range] = []
    for number in numbers:
        if found and number == found[-1].stop:
            found[-1] = range(found[-1].start, number + 1)
        else:
            found.append(range(number, number + 1))
    return found


def ids_said(ids: Iterable[int]) -> str:
    """`[0, 1, 2, 5]` → `0–2, 5`."""
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs(ids))


def counted(number: int, thing: str) -> str:
    """`1 expert`, `2 experts`; `1 batch`, `2 batches`."""
    several = f"{thing}es" if thing.endswith(("s", "ch", "x")) else f"{thing}s"
    return f"{number:,} {thing if number == 1 else several}"


def human_bytes(count: int) -> str:
    """`93405585408` → `93.4 GB` (powers of 1000)."""
    return _human(count, (" B", " kB", " MB", " GB", " TB", " PB"))


def human_seconds(seconds: float) -> str:
    """`4980` → `1 h 23 min`."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def human_count(count: int) -> str:
    """`46702792704` → `46.7B`: thousands K, millions M, billions B, trillions T."""
    return _human(count, ("", "K", "M", "B", "T"))


def _human(count: float, units: Sequence[str]) -> str:
    for unit in units:
        if count < 999.5 or unit == units[-1]:
            break
        count /= 1000
    decimals = 0 if unit == units[0] else next((d for limit, d in ((9.995, 2), (99.95, 1)) if count < limit), 0)
    return f"{count:.{decimals}f}{unit}"
