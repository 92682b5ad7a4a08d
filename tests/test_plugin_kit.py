"""`compressor plugin new`: the project works, docs/plugins.md builds the same one, what is refused; contract.md."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from contract_reference import BESIDE, COMMAND, GROUPS, contract, names_and_signatures
from test_plugins import Cli, InstallFrom, write_distribution

import compressor.plugin
from compressor.plugin_kit.new import Kind, new_project, rendered
from compressor.plugins import load_plugins
from compressor.recipe.schema import load_recipe

ROOT = Path(__file__).parents[1]
NAMES: dict[Kind, str] = {"method": "rare_zeros", "criterion": "loudest", "adapter": "specialists"}
New = Callable[[Kind], Path]


@pytest.fixture(autouse=True)
def _names_are_free() -> Iterator[None]:
    yield
    for name in NAMES.values():
        sys.modules.pop(name, None)


@pytest.fixture
def new(tmp_path: Path, cli: Cli) -> New:
    """Write a project by the command."""

    def write(kind: Kind) -> Path:
        done = cli("plugin", "new", NAMES[kind], f"--{kind}", "--folder", tmp_path / "project")
        assert (done.status, done.err) == (0, "")
        return tmp_path / "project"

    return write


def lay_out(project: Path, name: str, into: Path) -> None:
    """Lay the project out as an installed distribution, by what its pyproject.toml says."""
    about = tomllib.loads((project / "pyproject.toml").read_text())
    [(entry, module)] = about["project"]["entry-points"]["compressor"].items()
    assert about["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"] == [f"{module}.py"]
    into.mkdir()
    distribution = about["project"]["name"].replace("-", "_")
    assert write_distribution(into, distribution, {entry: module}, (project / f"{name}.py").read_text()) == module


@pytest.mark.parametrize(
    "kind", ["method", *(pytest.param(kind, marks=pytest.mark.nightly) for kind in list(NAMES)[1:])]
)
def test_its_own_tests_pass(kind: Kind, new: New, tmp_path: Path, install_from: InstallFrom, cli: Cli) -> None:
    project = new(kind)
    lay_out(project, NAMES[kind], tmp_path / "installed")
    install_from(tmp_path / "installed")
    assert f"{NAMES[kind].replace('_', '-')}  (from " in cli("methods").out
    options = ("-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-c", project / "pyproject.toml")
    assert pytest.main([str(one) for one in (*options, project / "tests")]) == pytest.ExitCode.OK


@pytest.mark.parametrize("kind", NAMES)
def test_what_is_written(kind: Kind, new: New) -> None:
    """The plugin is one by its file as well, its recipe names it, and all else can be read by what reads it."""
    project, name = new(kind), NAMES[kind]
    found = {path.relative_to(project).as_posix() for path in project.rglob("*") if path.is_file()}
    assert found == {
        *(".github/workflows/test.yml", "README.md", "pyproject.toml", "recipe.yaml"),
        *(f"{name}.py", f"tests/test_{name}.py"),
    }
    plugins = load_plugins(files=[project / f"{name}.py"])
    [mine] = [plugin for plugin in plugins.plugins if plugin.name == name]
    assert [one.name for one in (*mine.methods, *mine.criteria, *mine.adapters)] == [name]
    load_recipe(project / "recipe.yaml", methods=plugins.methods, criteria=plugins.criteria)
    [job] = yaml.safe_load((project / ".github" / "workflows" / "test.yml").read_text())["jobs"].values()
    assert "python -m pytest" in [step.get("run") for step in job["steps"]]
    for path in project.rglob("*.*"):
        text = path.read_text() if path.is_file() else ""
        assert "{{" not in text
        assert "{%" not in text
        assert not re.search(r" \n|\n\n\n\n|\n\n$", text), path


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("rare_zeros",), "say what it shall be, and only one: --method, --criterion or --adapter."),
        (("rare_zeros", "--method", "--adapter"), "say what it shall be, and only one: --method, --criterion or"),
        (
            ("rare-zeros", "--method"),
            "'rare-zeros' is no name for a plugin; use lower-case letters, digits and _, such",
        ),
        (("Zeros", "--method"), "'Zeros' is no name for a plugin"),
        (("class", "--method"), "'class' is no name for a plugin"),
        (("wanda", "--criterion"), "there is a module or plugin called 'wanda' already; take another name."),
        (("reap", "--criterion"), "there is a method or criterion called 'reap' already; take another name."),
        (("json", "--adapter"), "there is a module or plugin called 'json' already; take another name."),
        (("rare_zeros", "--method", "--folder", "there"), "there exists already; name another one with --folder."),
        (
            ("rare_zeros", "--method", "--folder", "file/in"),
            "file/in: the project cannot be written there: Not a direct",
        ),
    ],
)
def test_what_is_refused(
    words: tuple[str, ...], says: str, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    done = cli("plugin", "new", *words)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith(f"error: {says}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"]


def test_the_tutorial_builds_the_same_project() -> None:
    """Every line of the project's code, tests, recipe and pyproject.toml stands in docs/plugins.md, in its order; only
    methods of a class are moved to the left, as ruff formats them there.
    """
    page = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    for kind, name in NAMES.items():
        files = rendered(name, kind)
        shown = (
            [f"{name}.py"]
            if kind != "method"
            else [f"{name}.py", f"tests/test_{name}.py", "recipe.yaml", "pyproject.toml"]
        )
        for path in shown:
            blocks = re.findall(rf"<!-- {path} -->\n```\w+\n(.*?)```", page, re.DOTALL)
            told, written = (
                [line.strip() for line in text.split("\n") if line] for text in ("".join(blocks), files[path])
            )
            assert told == written, path


def test_the_reference_of_the_contract() -> None:
    """Whose names and signatures are those of the classes; of the sentences only that there are some."""
    page, made = (ROOT / "docs" / "contract.md").read_text(encoding="utf-8"), contract()
    assert names_and_signatures(page) == names_and_signatures(made), COMMAND
    assert sorted(" ".join(GROUPS.values()).split()) == sorted([*compressor.plugin.__all__, *BESIDE])
    assert len(names_and_signatures(page)) > 300
    assert "* `edit(layer: LayerWeights, decision: Decision) -> None`: Apply the decision to one layer" in page


@pytest.mark.nightly
def test_installed_beside_our_wheel(tmp_path: Path) -> None:
    """Both built, installed by pip where nothing else of ours is, and its tests run there."""
    for kind, name in NAMES.items():
        new_project(name, kind, tmp_path / name, load_plugins())
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    wheel = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "wheel")]
    subprocess.run(wheel, cwd=ROOT, check=True, capture_output=True)
    projects = [*(tmp_path / "wheel").iterdir(), *(tmp_path / name for name in NAMES.values())]
    subprocess.run([*pip, "--target", site, *projects], check=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    where = "import compressor, rare_zeros; print(compressor.__file__, rare_zeros.__file__)"
    for command, says in (
        (["-c", where], f"{site}/compressor/__init__.py {site}/rare_zeros.py"),
        (["-m", "compressor", "methods", "rare_zeros"], "rare-zeros  (from rare-zeros 0.1.0)"),
        *(
            (["-m", "pytest", "-q", "-c", tmp_path / name / "pyproject.toml", tmp_path / name / "tests"], "passed")
            for name in NAMES.values()
        ),
    ):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path / "wheel",
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert says in done.stdout
