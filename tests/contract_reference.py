"""docs/contract.md: every name that a plugin may use, with its signature and docstring, read from the sources.

    python tests/contract_reference.py > docs/contract.md

`test_plugin_kit.py` compares names and signatures.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import compressor.plugin
from compressor.plugins import HOOKS

GROUPS = {
    "Offer it": "hookimpl PLUGIN_API",
    "A method": "Method Options Plan Decision OptionError Measuring Training Description Column",
    "For methods": "fewer_experts check_layer_names kept_at_random allocate measured_of Healing FilePath "
    "FileName TaskSource",
    "Layers and their weights": "MoELayer LayerWeights Expert ExpertTensors SkipRule MoEModel count_problem",
    "What is observed": "Statistic RoutedTokens RankedStatistic RankedChunk JoinedStatistic InputStatistic LinearSite "
    "Gathered Rule Processes",
    "A criterion": "Criterion ExpertFigures",
    "A method that chooses experts": "ExpertSelection SelectionOptions fewest_losses",
    "An adapter": "Adapter find_structure Structure ConfigLeaf RoutingRule",
    "Errors": "CompressorError RecipeError PluginError ProgramError CalibrationError CheckpointError "
    "UnsupportedModelError",
}
BESIDE = {"Expert": "model.layer_weights", "ExpertTensors": "model.layer_weights"}
"""What is handed to plugins and never imported by them."""
GROUPS["More"] = " ".join(sorted({*compressor.plugin.__all__} - {*" ".join(GROUPS.values()).split()}))
COMMAND = "python tests/contract_reference.py > docs/contract.md"
HEAD = f"""# What a plugin may use

Generated from the classes by `{COMMAND}`; [write a plugin](plugins.md) tells it as a story.
All names are in `compressor.plugin`, but for what is only handed to plugins: {{beside}}. A plugin's module has
functions marked `@hookimpl`, each of which returns a list: {{hooks}}.
"""


@cache
def body_of(module: str) -> tuple[ast.stmt, ...]:
    path = Path(str(import_module(f"compressor.{module}").__file__))
    return tuple(ast.parse(path.read_text(encoding="utf-8")).body)


def home_of(name: str) -> str:
    """The module that defines it."""
    if name in BESIDE:
        return BESIDE[name]
    found = compressor.plugin._HOME.get(name)
    return found or ("errors" if name.endswith("Error") else "plugins")


def signature(function: ast.FunctionDef, *, is_method: bool) -> str:
    arguments = ast.parse(f"def f({ast.unparse(function.args)}): ...").body[0]
    assert isinstance(arguments, ast.FunctionDef)
    decorators = {ast.unparse(one) for one in function.decorator_list}
    if is_method and "staticmethod" not in decorators:
        (arguments.args.posonlyargs or arguments.args.args).pop(0)
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    if decorators & {"property", "cached_property"}:
        return f"{function.name}{returns.replace(' ->', ':', 1)}"
    return f"{function.name}({ast.unparse(arguments.args)}){returns}"


def documented(body: list[ast.stmt] | tuple[ast.stmt, ...]) -> Iterator[tuple[ast.stmt, str]]:
    """Each statement with the text that documents it: its own docstring, or the text that stands behind it."""
    for statement, behind in zip(body, [*body[1:], ast.Pass()], strict=True):
        text = ""
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            text = ast.get_docstring(statement) or ""
        elif isinstance(behind, ast.Expr) and isinstance(behind.value, ast.Constant):
            text = inspect.cleandoc(str(behind.value.value))
        yield statement, text


def members(found: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """(signature, text) of what a class has without a _."""
    for statement, text in documented(found.body):
        if isinstance(statement, ast.FunctionDef) and not statement.name.startswith("_"):
            yield signature(statement, is_method=True), text
        elif isinstance(statement, ast.AnnAssign) and not ast.unparse(statement.target).startswith("_"):
            yield f"{ast.unparse(statement.target)}: {ast.unparse(statement.annotation)}", text
        elif isinstance(statement, ast.Assign) and not ast.unparse(statement).startswith(("_", "model_config")):
            yield ast.unparse(statement), text


def entry(name: str) -> Iterator[str]:
    """The lines of one name."""
    for statement, text in documented(body_of(home_of(name))):
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            bases = ", ".join(map(ast.unparse, statement.bases))
            own = [one for one in statement.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
            yield f"### `class {name}({bases})`" if bases else f"### `class {name}`"
            yield from ("", text, "")
            if own:
                yield f"* `{signature(own[0], is_method=True).partition(' ->')[0].replace('__init__', name)}`"
            for line, about in members(statement):
                yield f"* `{line}`" + (f": {' '.join(about.split())}" if about else "")
        elif isinstance(statement, ast.FunctionDef) and statement.name == name:
            yield from (f"### `{signature(statement, is_method=False)}`", "", text)
        elif isinstance(statement, ast.Assign | ast.AnnAssign) and ast.unparse(statement).startswith(f"{name} = "):
            yield from (f"### `{ast.unparse(statement)}`", "", text)


def contract() -> str:
    """The whole page."""
    hooks, beside = (", ".join(f"`{name}`" for name in names) for names in (HOOKS, BESIDE))
    lines = [HEAD.format(hooks=hooks, beside=beside)]
    for title, names in ((title, names) for title, names in GROUPS.items() if names):
        lines.append(f"## {title}\n")
        for name in names.split():
            lines += [*entry(name), ""]
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


def names_and_signatures(page: str) -> list[str]:
    """What a page says without its sentences."""
    return [line.partition("`: ")[0].rstrip("`") for line in page.splitlines() if line.startswith(("### `", "* `"))]


if __name__ == "__main__":
    print(contract(), end="")
