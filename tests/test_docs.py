"""The documentation: what it quotes is what is said, its commands, recipes and code can be read, every page is found,
and it builds without a warning.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from reference_pages import COMMAND, FIGURES, RECORD, reference
from torch.distributed.run import get_args_parser

from compressor.cli import app
from compressor.plugin_kit.new import new_project
from compressor.plugins import load_plugins
from compressor.recipe.schema import load_recipe

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"),
    *sorted([*DOCS.glob("*.md"), *(ROOT / "plugins").glob("*/README.md")]),
]
WHOLE = {
    "model": "demo",
    "calibration": {"data": [{"demo": "mix"}]},
    "passes": [{"expert_pruning": {"keep": 6}}],
    "output": "out",
}
"""What a part of a recipe leaves out."""
FENCED = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", re.M | re.S)


def blocks(*languages: str) -> Iterator[tuple[str, str]]:
    """(where, text) of every block in one of these languages."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in FENCED.finditer(text):
            if found[2] in languages:
                line = text.count("\n", 0, found.start()) + 1
                yield f"{page.relative_to(ROOT)}:{line}", textwrap.dedent(found[3])


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command that these words call, and what is left of them. Raises the command line's own error."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "resolve_command") and words and not words[0].startswith("-"):
        _, command, words = command.resolve_command(command.context_class(command), words)
    return command, words


def usage_error(line: str) -> str | None:
    """What the command line says of a whole command; it is not run."""
    try:
        command, words = command_of(shlex.split(line, comments=True)[1:])
        command.make_context("compressor", words)
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's, wherever typer keeps it
            raise
        return str(error.format_message())
    return None


def test_documented_commands_are_understood() -> None:
    lines = [
        (where, f"compressor {called[1]}")
        for where, text in blocks("bash", "console")
        for line in text.splitlines()
        if (called := re.match(r"(?:\$ |torchrun .*)?\bcompressor (.*)", line))
    ]
    assert len(lines) > 15
    assert [(where, line, said) for where, line in lines if (said := usage_error(line))] == []
    assert usage_error("compressor run recipe.yaml --memmory 32GB") is not None
    assert usage_error("compressor runn recipe.yaml") is not None
    assert usage_error("compressor evaluate MODEL") is not None


def test_the_files_for_clusters_are_understood() -> None:
    """By the shell and as YAML; torchrun and the command know their options."""
    script, job = (
        DOCS / "cluster" / "compress.sbatch",
        yaml.safe_load((DOCS / "cluster" / "compress-job.yaml").read_text()),
    )
    if bash := shutil.which("bash"):
        assert subprocess.run([bash, "-n", script], capture_output=True, check=False).stderr == b""
    lines = script.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    [called] = [line for line in lines if "compressor" in line]
    [container] = job["spec"]["template"]["spec"]["containers"]
    commands = [shlex.split(called.partition("torchrun ")[2]), [*container["command"][1:], *container["args"]]]
    for words in commands:
        given = get_args_parser().parse_args(words)
        assert (given.module, given.training_script, given.nproc_per_node) == (True, "compressor", "8")
        assert usage_error(shlex.join(["compressor", *given.training_script_args])) is None
        assert "--resume" in given.training_script_args
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8


def test_commands_in_sentences_are_known() -> None:
    """They may leave out what a whole command needs, but name no command and no option that is not there."""
    mentioned, unknown = 0, []
    for page in PAGES:
        for line in re.findall(r"(?<!`)`compressor ([^`]+)`", FENCED.sub("", page.read_text(encoding="utf-8"))):
            mentioned += 1
            command, words = command_of(line.split())
            known = {"--help"}.union(*(one.opts for one in command.params))
            unknown += [(page.name, line) for word in words if word.startswith("--") and word not in known]
    assert mentioned > 60
    assert unknown == []


def test_documented_recipes_are_right(tmp_path: Path) -> None:
    new_project("rare_zeros", "method", tmp_path / "rare_zeros", load_plugins())
    plugins = load_plugins(files=[tmp_path / "rare_zeros" / "rare_zeros.py"])
    read = 0
    for where, text in blocks("yaml"):
        found = yaml.safe_load(text)
        if found is None:  # a comment
            continue
        given = {"passes": found} if isinstance(found, list) else found
        whole = {**WHOLE, **given}
        loaded = load_recipe(whole, methods=plugins.methods, criteria=plugins.criteria, allow_commands=True)
        assert loaded.passes, where
        read += 1
    assert read > 15


def test_documented_python_compiles() -> None:
    """What begins within a class goes on with the one above it."""
    found = [compile("class Above:\n" * text.startswith(" ") + text, where, "exec") for where, text in blocks("python")]
    assert len(found) > 20


def test_troubleshooting_quotes_real_messages() -> None:
    source = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("compressor", "plugins")
        for path in (ROOT / folder).rglob("*.py")
    )
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [one for bold in re.findall(r"^\*\*(`.*?)\*\*", text, re.M) for one in re.findall(r"`([^`]+)`", bold)]
    assert len(quoted) > 10
    assert [one for one in quoted if one not in source] == []


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = re.findall(r"^([\w./*-]+)$", (DOCS / "index.md").read_text(encoding="utf-8"), re.M)
    pages = {path.stem for path in DOCS.glob("*.md")} - {"index"}
    assert pages - set(listed) == set()
    assert {name for name in listed if "/" not in name} - pages == set()


def test_the_reference_is_that_of_the_sources() -> None:
    assert (DOCS / "reference.md").read_text(encoding="utf-8") == reference(), COMMAND
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "compressor").rglob("*.py"))
    assert [key for keys in RECORD.values() for key in keys if f'"{key}"' not in source] == []
    assert {path.split(".")[1] for path in FIGURES} - {*RECORD["evaluation"]} == set()


@pytest.mark.nightly
def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "-c", "docs", ".", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "docs" / "index.html").exists()


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads((DOCS / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert "cannot keep 9" in capsys.readouterr().out
    assert names["result"]._repr_html_()
    assert names["before"] != names["after"]
    assert list(tmp_path.iterdir()) == []
