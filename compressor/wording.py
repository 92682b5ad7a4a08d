"""How numbers are said to people: sizes, times, counts; and texts that are too long to be read."""

from __future__ import annotations

from collections.abc import Sequence


def shortened(text: str, most: int) -> str:
    """A text of at most so many characters: of a longer one the middle is left out."""
    return text if len(text) <= most else f"{text[: most - most // 3 - 1]}…{text[len(text) - most // 3 :]}"


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
