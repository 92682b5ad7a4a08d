"""Names of modules in what a checkpoint says of its quantisation, after experts have gone and others have new numbers.

Lists (`ignore`, `modules_to_not_convert`, `ignored_layers`, `targets` …) and keys name modules, ends of names that hold
in every layer, or patterns: `re:` and a regular expression, globs, bare regular expressions. Each reader has its own
way with them, so all ways count: what fits a module must fit it by its new name, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from compressor.errors import UnsupportedModelError

Names = Mapping[str, str | None]
"""Every module on disk → its name afterwards, None where it goes."""
_Fits = Callable[[str], bool]

_PREFIX = re.compile(r"(re|[+-]):")
_PATTERN = re.compile(r"[*?\[\](){}|^$+\\]")


def renamed(value: Any, modules: Names, reference: str) -> Any:
    """A value of a JSON file with modules, in lists and as keys, under their new names; patterns that would fit others
    become names. Raises UnsupportedModelError, with the pattern, where that cannot be.
    """
    if isinstance(value, dict):
        found = {}
        for key, one in value.items():
            if (new := _key(key, modules, reference)) is not None:
                found[new] = renamed(one, modules, reference)
        return found
    if isinstance(value, list):
        others = [renamed(one, modules, reference) for one in value if not isinstance(one, str)]
        return [*_in_list([one for one in value if isinstance(one, str)], modules, reference), *others]
    return value


def _key(key: str, modules: Names, reference: str) -> str | None:
    exact = _exact(key, modules)
    if exact is not None:
        return exact[0]
    fits = _reading(key, reference)
    if fits is None or _is_kept_by([fits], modules):
        return key
    raise _refusal(key, reference)


def _in_list(entries: Sequence[str], modules: Names, reference: str) -> Iterator[str]:
    exact = {entry: found for entry in entries if (found := _exact(entry, modules)) is not None}
    readings = {entry: _reading(entry, reference) for entry in entries if entry not in exact}
    apart = {entry: fits for entry, fits in readings.items() if fits is not None and not _is_kept_by([fits], modules)}
    together = _is_kept_by(list(apart.values()), modules)  # one entry for each expert, of every layer at once
    left = [new for new in modules.values() if new is not None] if apart else []
    for entry in entries:
        if entry in exact:
            yield from filter(None, exact[entry])
        elif entry not in apart:
            yield entry
        elif together:
            if any(map(apart[entry], left)):
                yield entry
        elif _PREFIX.match(entry) or _PATTERN.search(entry):
            yield from _expanded(apart[entry], modules)
        else:
            raise _refusal(entry, reference)


def _exact(name: str, modules: Names) -> tuple[str | None] | None:
    """A module's new name, None where it goes; None where it names none. Readers drop `model.` or add to it."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        head, rest = ".".join(parts[:end]), parts[end:]
        first, _, behind = head.partition(".")
        for known, before, less in ((head, "", ""), (behind, first + ".", ""), ("model." + head, "", "model.")):
            if known in modules:
                new = modules[known]
                return (None if new is None else ".".join([before + new.removeprefix(less), *rest]),)
    return None


def _reading(entry: str, reference: str) -> _Fits | None:
    """Whether a name fits, in any way that an entry is read; None for one that can tell no experts apart."""
    try:
        if prefix := _PREFIX.match(entry):
            pattern = re.compile(entry[prefix.end() :])
            return lambda name: pattern.match(name) is not None
    except re.error as error:
        raise UnsupportedModelError(
            f"{reference}: its quantisation has the pattern {entry!r}, which is no regular expression: {error}."
        ) from error
    if not _PATTERN.search(entry):
        is_end_of_name = "." in entry and re.search(r"\d", entry)
        return (lambda name: entry in name) if is_end_of_name else None
    try:
        bare = re.compile(entry)
    except re.error:  # then it is a glob, and nothing else
        return lambda name: fnmatchcase(name, entry)
    return lambda name: fnmatchcase(name, entry) or bare.match(name) is not None


def _is_kept_by(readings: Iterable[_Fits], modules: Names) -> bool:
    """Whether what fits by an old name fits by the new one, and the other way round."""
    fits = list(readings)
    moved = ((old, new) for old, new in modules.items() if new is not None and new != old)
    return all(any(one(old) for one in fits) == any(one(new) for one in fits) for old, new in moved)


def _expanded(fits: _Fits, modules: Names) -> list[str]:
    """The new names of all modules that fit and hold no other module that does."""
    found = {new for old, new in modules.items() if new is not None and fits(old)}
    return sorted(found - {name.rpartition(".")[0] for name in found})


def _refusal(entry: str, reference: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{reference}: its quantisation names experts by {entry!r}, which would fit others; name modules one by one."
    )
