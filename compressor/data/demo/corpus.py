"""Three domains of text that every Python installation carries, so that the demo needs no download.

* ``code``: the standard library's sources without their docstrings (comments stay), one document a file.
* ``prose``: the topics of ``pydoc`` and the standard library's longer docstrings, one document each.
* ``arithmetic``: generated lines such as ``37+58=95``, forty to a document.

About a tenth is held out: by file (a file's code and its docstrings are on the same side), by topic, and for
arithmetic by the left side of a line, so that no held-out sum occurs in the training split in this order of
operands.

Not covered: a docstring copied into a second module can be on both sides (one is, in Python 3.11). The text
is that of the running interpreter, another version's differs slightly. Nothing is imported from the standard
library to read it, except the data module ``pydoc_data.topics``.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import random
import sysconfig
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

from compressor.errors import CalibrationError

Domain = Literal["code", "prose", "arithmetic"]
Split = Literal["train", "held-out"]
Source = TypeVar("Source")

DOMAINS: tuple[Domain, ...] = ("code", "prose", "arithmetic")
SPLITS: tuple[Split, ...] = ("train", "held-out")

HELD_OUT_PERCENT = 10
MIN_DOCSTRING_CHARACTERS = 200
MIN_CODE_CHARACTERS = 400
LINES_PER_ARITHMETIC_DOCUMENT = 40
NUM_ARITHMETIC_DOCUMENTS: dict[Split, int] = {"train": 5000, "held-out": 500}

# Installed packages, tests, bundled grammars and generated tables: not the text of the standard library.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
    | {"__pycache__", "encodings", "pydoc_data", "ensurepip"}
)
_SKIPPED_FILES = frozenset({"html/entities.py"})

_HOLDS_STATEMENTS = (ast.stmt, ast.excepthandler, ast.match_case)

# (operator, its share of the lines, largest left operand, largest right operand)
_OPERATIONS = (("+", 0.5, 99, 99), ("-", 0.35, 99, 99), ("*", 0.15, 12, 12))


def documents(domain: Domain, split: Split, seed: int = 0) -> Iterator[str]:
    """The documents of one domain and split, in an order that depends on ``seed`` (for a given Python); of
    ``arithmetic`` other lines. Files are read as the iterator advances. Raises CalibrationError for an unknown domain
    or split, and for a Python without sources.
    """
    if domain not in _READERS:
        raise CalibrationError(f"demo text: no domain {domain!r}; known: {', '.join(DOMAINS)}")
    if split not in SPLITS:
        raise CalibrationError(f"demo text: no split {split!r}; known: {', '.join(SPLITS)}")
    return _READERS[domain](split, seed)


def split_of(name: str) -> Split:
    """The side of a file (path below the standard library), topic or sum, by a hash: about a tenth is held out."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return "held-out" if int.from_bytes(digest, "big") % 100 < HELD_OUT_PERCENT else "train"


def _code(split: Split, seed: int) -> Iterator[str]:
    for path in _shuffled(_source_files(split), seed):
        code, _ = _texts_of(path)
        if len(code) >= MIN_CODE_CHARACTERS:
            yield code


def _prose(split: Split, seed: int) -> Iterator[str]:
    topics = _topics(split)
    seen: set[str] = set()
    sources: list[Path | str] = [*_source_files(split), *topics]
    for source in _shuffled(sources, seed):
        passages = [_without_doctests(topics[source])] if isinstance(source, str) else _texts_of(source)[1]
        for passage in passages:
            if len(passage) > MIN_DOCSTRING_CHARACTERS and passage not in seen:
                seen.add(passage)
                yield passage


def _arithmetic(split: Split, seed: int) -> Iterator[str]:
    rng = random.Random(f"{split}/{seed}")
    for _ in range(NUM_ARITHMETIC_DOCUMENTS[split]):
        lines = (_draw_sum(rng, split) for _ in range(LINES_PER_ARITHMETIC_DOCUMENT))
        yield "".join(f"{left}={value}\n" for left, value in lines)


_READERS: dict[Domain, Callable[[Split, int], Iterator[str]]] = {
    "code": _code,
    "prose": _prose,
    "arithmetic": _arithmetic,
}


def _draw_sum(rng: random.Random, split: Split) -> tuple[str, int]:
    """One sum of this split: its left side (``37+58``) and its value, never negative."""
    shares = [share for _, share, _, _ in _OPERATIONS]
    operator, _, largest_a, largest_b = rng.choices(_OPERATIONS, weights=shares)[0]
    while True:
        a, b = rng.randint(0, largest_a), rng.randint(0, largest_b)
        if operator == "-":
            a, b = max(a, b), min(a, b)
        left = f"{a}{operator}{b}"
        if split_of(left) == split:
            return left, {"+": a + b, "-": a - b, "*": a * b}[operator]


def _shuffled(items: Sequence[Source], seed: int) -> list[Source]:
    return random.Random(seed).sample(items, len(items))


@cache
def _source_files(split: Split) -> list[Path]:
    """The standard library's sources on one side of the split, sorted by their path below its root."""
    return [path for name, path in _all_source_files().items() if split_of(name) == split]


@cache
def _all_source_files() -> dict[str, Path]:
    """The standard library's sources by their path below its root, sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, Path] = {}
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if name not in _SKIPPED_FOLDERS and not name.startswith("config-")]
        paths = (Path(folder, name) for name in files if name.endswith(".py"))
        found |= {path.relative_to(root).as_posix(): path for path in paths}
    if not found:
        raise CalibrationError(f"demo text: no Python sources under {root}; install Python with its library's sources")
    return {
        name: path
        for name, path in sorted(found.items())
        if name not in _SKIPPED_FILES and not name.startswith("_sysconfigdata")
    }


@cache
def _texts_of(path: Path) -> tuple[str, tuple[str, ...]]:
    """A file's code without docstrings, and its docstrings; nothing if it is no Python. Kept: about 10 MB in all."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escape sequences in the standard library's strings
            tree = ast.parse(source)
    except (UnicodeDecodeError, SyntaxError):
        return "", ()
    docstrings = list(_documented(tree))
    texts = (inspect.cleandoc(str(node.value)) for node in docstrings)
    return _without_docstrings(source, docstrings), tuple(_without_doctests(text) for text in texts)


def _documented(tree: ast.Module) -> Iterator[ast.Constant]:
    """The string nodes that are docstrings, in the order of ``ast.walk``, which looks into expressions as well."""
    nodes: deque[ast.AST] = deque([tree])
    while nodes:
        node = nodes.popleft()
        nodes.extend(one for one in ast.iter_child_nodes(node) if isinstance(one, _HOLDS_STATEMENTS))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            match node.body[0]:
                case ast.Expr(value=ast.Constant(value=str()) as docstring):
                    yield docstring


def _without_docstrings(source: str, docstrings: list[ast.Constant]) -> str:
    """The source less the lines of its docstrings. A docstring that shares its line with code stays."""
    lines = source.split("\n")  # as ast counts them: a form feed ends no line
    dropped: set[int] = set()
    for node in docstrings:
        end = node.end_lineno or node.lineno
        if not lines[node.lineno - 1][: node.col_offset].strip():
            dropped.update(range(node.lineno - 1, end))
    kept = (line.rstrip() for index, line in enumerate(lines) if index not in dropped)
    return "\n".join(kept).strip("\n") + "\n"


def _topics(split: Split) -> dict[str, str]:
    """The topics of pydoc by name; empty where the installation leaves them out."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return {name: topics[name] for name in sorted(topics) if split_of(f"topic:{name}") == split}


def _without_doctests(text: str) -> str:
    """The text without interactive sessions: prompts and their output up to the next blank line."""
    kept: list[str] = []
    in_session = False
    for line in text.splitlines():
        in_session = line.lstrip().startswith(">>>") or (in_session and bool(line.strip()))
        if not in_session and (line.strip() or (kept and kept[-1])):
            kept.append(line.rstrip())
    return "\n".join(kept).strip() + "\n"
