"""The command `compressor`: parse, call, print.

Nothing heavy is imported before a command needs it, so that `--help` is quick. Exit status: 0 done, 1 our bug, 2 the
user can mend it, 130 interrupted, 141 whoever read the output is gone (`| head`).
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from compressor._version import __version__
from compressor.errors import CompressorError, PluginError, ProcessError, RecipeError, writing

if TYPE_CHECKING:
    from rich.console import Console

    from compressor.plugins import Plugins
    from compressor.recipe.schema import LoadedRecipe

_LONGEST_SAYING = 30.0
"""Seconds."""
_READER_GONE = 141
"""The status of a command that SIGPIPE has ended."""


class _Commands(TyperGroup):
    """Commands whose help says of a value what it is, not its type, and nothing where there is none to give."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _in_plain_words(super().get_params(ctx))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        found: Any = super().get_command(ctx, cmd_name)
        if found is not None:
            _in_plain_words(found.get_params(ctx))
        return found


def _in_plain_words(parameters: list[Any]) -> list[Any]:
    for one in parameters:
        if one.param_type_name == "argument":
            one.display_type_rich = lambda ctx: None
        if one.metavar is None:
            one.metavar = "" if getattr(one, "is_flag", False) else one.name.upper()
    return parameters


app = typer.Typer(
    name="compressor",
    cls=_Commands,
    help="Make Mixture-of-Experts language models smaller, and measure what it costs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _names_of_recipes(incomplete: str) -> list[str]:
    from compressor.recipe.shipped import shipped

    return [name for name in shipped() if name.startswith(incomplete)]


RecipeFile = Annotated[
    Path,
    typer.Argument(
        help="The recipe: a YAML file, or the name of one of ours (`compressor recipes`).",
        show_default=False,
        autocompletion=_names_of_recipes,
    ),
]
ModelArgument = Annotated[str, typer.Argument(help="A hub id, a local folder, or demo.", show_default=False)]
ModelOption = Annotated[str | None, typer.Option("--model", help="Take this model instead of the recipe's.")]
OutputOption = Annotated[Path | None, typer.Option("--output", help="Write here instead of the recipe's output.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change one value, such as passes.0.expert_pruning.keep=4. May be given again.",
        metavar="PATH=VALUE",
    ),
]
WithoutOption = Annotated[
    list[str] | None, typer.Option("--without", help="Do not load this plugin. May be given again.", metavar="PLUGIN")
]
PluginOption = Annotated[
    list[Path] | None,
    typer.Option("--plugin", help="Load this Python file as a plugin too. May be given again.", metavar="FILE.py"),
]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists already.")]
ResumeOption = Annotated[
    bool,
    typer.Option("--resume", help="Go on with an interrupted run, in the layer that it was in; not with --overwrite."),
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights", help="memory: all at once; disk: one decoder layer at a time; auto: as they fit.", metavar="WHERE"
    ),
]
MemoryOption = Annotated[
    str | None, typer.Option("--memory", help="Memory that the run may use, such as 16GB.", metavar="SIZE")
]
DeviceMemoryOption = Annotated[
    str | None, typer.Option("--device-memory", help="The same on the accelerator.", metavar="SIZE")
]
DiskOption = Annotated[
    str | None, typer.Option("--disk", help="Disk that the run may use, its output included.", metavar="SIZE")
]
GpusOption = Annotated[
    int | None,
    typer.Option("--gpus", help="For another machine, with N GPUs; give all budgets too.", metavar="N", min=0),
]
TflopsOption = Annotated[
    int | None, typer.Option("--tflops", help="Say how long: TFLOP/s of all its devices.", metavar="N", min=1)
]
DiskSpeedOption = Annotated[
    int | None, typer.Option("--disk-speed", help="Say how long: MB/s of its disk.", metavar="N", min=1)
]
CommandsOption = Annotated[bool, typer.Option("--allow-commands", help="Run the programs that the recipe names.")]
PushOption = Annotated[bool, typer.Option("--push", help="Upload the output to the hub, as the recipe's `push` says.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no tables; errors only.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Make Mixture-of-Experts language models smaller, and measure what it costs."""
    if version:
        with _printing():
            print(__version__)
        raise typer.Exit


@app.command()
def run(
    recipe: RecipeFile,
    model: ModelOption = None,
    output: OutputOption = None,
    set_: SetOption = None,
    overwrite: OverwriteOption = False,
    resume: ResumeOption = False,
    weights: WeightsOption = None,
    memory: MemoryOption = None,
    device_memory: DeviceMemoryOption = None,
    disk: DiskOption = None,
    allow_commands: CommandsOption = False,
    push: PushOption = False,
    without: WithoutOption = None,
    plugin: PluginOption = None,
    quiet: QuietOption = False,
    json_: JsonOption = False,
) -> None:
    """Run a recipe: prune, measure before and after, and save the smaller model.

    `torchrun --nproc-per-node 2 -m compressor run RECIPE` does so in two processes.
    """
    _calm()
    from compressor.machine.distributed import Processes
    from compressor.machine.progress import Progress

    set_ = [*(set_ or []), *_settings(weights=weights, memory=memory, device_memory=device_memory, disk=disk)]
    with Processes.joined() as processes, _notes_shown():
        loaded, _, target = _loaded(recipe, model, output, set_, without, plugin, allow_commands=allow_commands)
        progress = Progress.detect(quiet=quiet or not processes.is_first)
        methods = ", ".join(one.spec.method for one in loaded.passes)
        progress.say(f"{loaded.recipe.model}: {methods}; into {target}. Looking at the model's config")
        from compressor.report.terminal import print_summary
        from compressor.run import pipeline  # torch, which takes seconds, not before the recipe is known to be right

        result = pipeline.compress(
            recipe,
            overrides=set_,
            model_reference=model,
            output=output,
            overwrite=overwrite,
            resume=resume,
            allow_commands=allow_commands,
            push=push,
            without=without or [],
            plugin_files=plugin or [],
            progress=progress,
            processes=processes,
        )
        if processes.is_first:
            done = f"\nWritten to {result.folder}.{_how_to_load(result.record, result.folder)}"
            _show(result.record, print_summary, done, as_json=json_, quiet=quiet)


def _how_to_load(record: dict[str, Any], folder: Path | None) -> str:
    if "files_only" in record:
        return f" Nothing of what {record['files_only']} left was loaded or measured."
    others = "" if {"uneven", "constants"} & record.keys() else " or plain transformers"
    others += ", which runs it unskipped" if others and "skipping" in record else ""
    return f" Load it with compressor.load({str(folder)!r}){others}."


@contextmanager
def _notes_shown() -> Iterator[None]:
    """Say what an error brings along, such as what is kept; a traceback would show it itself."""
    try:
        yield
    except (CompressorError, KeyboardInterrupt, SystemExit) as error:
        for note in getattr(error, "__notes__", ()):
            _complain(note)
        raise


def _settings(**given: str | None) -> list[str]:
    """Options that stand for keys and were given, as a recipe reads them: as texts in YAML, like those of --set."""
    return [f"--{key.replace('_', '-')}={value}" for key, value in given.items() if value is not None]


def _loaded(
    recipe: Path,
    model: str | None,
    output: Path | None,
    set_: list[str],
    without: list[str] | None,
    plugin: list[Path] | None,
    *,
    allow_commands: bool,
) -> tuple[LoadedRecipe, Plugins, Path]:
    """The recipe, the plugins it was checked by, and its output, which it must have."""
    from compressor.plugins import load_plugins
    from compressor.recipe.schema import load_recipe

    plugins = load_plugins(without or [], files=plugin or [])
    given: dict[str, Any] = {"methods": plugins.methods, "criteria": plugins.criteria, "allow_commands": allow_commands}
    loaded = load_recipe(recipe, overrides=set_, model=model, output=output, **given)
    if loaded.recipe.output is None:
        raise loaded.error((), "no `output`. Name a folder for the smaller model there, or with --output.")
    return loaded, plugins, loaded.recipe.output


@app.command()
def check(
    recipe: RecipeFile,
    model: ModelOption = None,
    output: OutputOption = None,
    set_: SetOption = None,
    weights: WeightsOption = None,
    memory: MemoryOption = None,
    device_memory: DeviceMemoryOption = None,
    disk: DiskOption = None,
    gpus: GpusOption = None,
    tflops: TflopsOption = None,
    disk_speed: DiskSpeedOption = None,
    overwrite: OverwriteOption = False,
    resume: ResumeOption = False,
    allow_commands: CommandsOption = False,
    push: PushOption = False,
    without: WithoutOption = None,
    plugin: PluginOption = None,
    quiet: QuietOption = False,
    json_: JsonOption = False,
) -> None:
    """Say whether `run` with the same options can work, what will be kept and dropped, and what it needs.

    Reads no weights.
    """
    _calm()
    set_ = [*(set_ or []), *_settings(weights=weights, memory=memory, device_memory=device_memory, disk=disk)]
    loaded, plugins, target = _loaded(recipe, model, output, set_, without, plugin, allow_commands=allow_commands)
    from compressor.checkpoint.output import OutputFolder
    from compressor.machine.progress import Progress
    from compressor.report.terminal import print_plan
    from compressor.run import check
    from compressor.run.elsewhere import Machine
    from compressor.run.push import check_push

    folder = OutputFolder(target, overwrite=overwrite, resume=resume) if gpus is None else None
    machine, progress = Machine(gpus, tflops, disk_speed), Progress.detect(quiet=quiet)
    notes = check_push(loaded, may_push=push)
    preview = check.check(loaded, plugins.adapters, folder=folder, progress=progress, machine=machine)
    preview.plan["notes"] += notes
    _show(preview.plan, print_plan, as_json=json_, quiet=quiet)


@app.command()
def inspect(
    model: ModelArgument,
    trust_remote_code: TrustOption = False,
    without: WithoutOption = None,
    plugin: PluginOption = None,
    json_: JsonOption = False,
) -> None:
    """Show a model's experts, and what fewer of them would save. Reads no weights."""
    _calm()
    from compressor.plugins import load_plugins
    from compressor.report.terminal import print_inspection
    from compressor.run import check

    adapters = load_plugins(without or [], files=plugin or []).adapters
    info = check.inspect(model, trust_remote_code=trust_remote_code, adapters=adapters)
    _show(info, print_inspection, as_json=json_)


@app.command("serve-check")
def serve_check(
    folder: Annotated[str, typer.Argument(help="A checkpoint, such as a run's output.", show_default=False)],
    engine: Annotated[str | None, typer.Option("--engine", help="Only this one; status 2 if its answer is no.")] = None,
    tensor_parallel: Annotated[int, typer.Option("--tensor-parallel", help="Devices that share each layer.")] = 1,
    expert_parallel: Annotated[int, typer.Option("--expert-parallel", help="Devices that share the experts.")] = 1,
    trust_remote_code: TrustOption = False,
    without: WithoutOption = None,
    plugin: PluginOption = None,
    json_: JsonOption = False,
) -> None:
    """Say which engines run a checkpoint, and by which rules. Reads no weights."""
    _calm()
    from compressor.report.figures import serving_table
    from compressor.run import verbs

    how: dict[str, Any] = {"tensor_parallel": tensor_parallel, "expert_parallel": expert_parallel}
    how |= {"trust_remote_code": trust_remote_code, "without": without or [], "plugin_files": plugin or []}
    found = verbs.serve_check(folder, engine, **how)
    _show(found, lambda found, console: serving_table(found).show(console), as_json=json_)
    if engine and found["serving"][0]["answer"] == "no":
        raise typer.Exit(2)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="A method: show this one only.", show_default=False)] = None,
    without: WithoutOption = None,
    plugin: PluginOption = None,
    json_: JsonOption = False,
) -> None:
    """List the installed plugins, their methods, and the options of each."""
    _calm()
    from compressor.plugins import load_plugins
    from compressor.report.terminal import methods_json, print_methods

    plugins = load_plugins(without or [], files=plugin or []).only(name)
    _show(methods_json(plugins) if json_ else plugins, print_methods, as_json=json_)


@app.command()
def recipes(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A recipe: print it, as a file to begin with.", show_default=False, autocompletion=_names_of_recipes
        ),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """List the recipes that come with this; or print one: `compressor recipes quickstart > recipe.yaml`."""
    from compressor.recipe.shipped import described
    from compressor.report.terminal import print_recipes

    found = described(name)
    then = "`compressor run NAME` runs one, `compressor recipes NAME` prints it." if name is None else None
    _show(found, print_recipes if name is None else lambda one, _: print(one[0]["text"], end=""), then, as_json=json_)


@app.command()
def init(
    model: ModelArgument,
    output: Annotated[
        Path, typer.Option("--output", help="Write it here, where nothing may be yet.", metavar="FILE")
    ] = Path("recipe.yaml"),
    trust_remote_code: TrustOption = False,
    without: WithoutOption = None,
    plugin: PluginOption = None,
    json_: JsonOption = False,
) -> None:
    """Write a commented recipe for a model: what it can keep, and how its weights fit here. Reads no weights."""
    _calm()
    if output.exists():
        raise RecipeError(f"{output}: it exists already, and is not overwritten; name another file with --output.")
    from compressor.plugins import load_plugins
    from compressor.run.new_recipe import new_recipe

    plugins = load_plugins(without or [], files=plugin or [])
    text = new_recipe(model, plugins, file=output, trust_remote_code=trust_remote_code)
    with writing(output), output.open("x", encoding="utf-8") as file:
        file.write(text)
    then = f"Written to {output}. `compressor check {output}` says what it will do, `compressor run {output}` does it."
    _show({"output": str(output), "text": text}, lambda _, console: None, then, as_json=json_)


@app.command()
def schema(
    output: Annotated[
        Path | None, typer.Option("--output", help="Write it here, such as recipe.schema.json.", metavar="FILE")
    ] = None,
    without: WithoutOption = None,
    plugin: PluginOption = None,
) -> None:
    """Print the JSON Schema of recipes, with the options of what is installed: by it editors complete and check.

    `# yaml-language-server: $schema=recipe.schema.json` in a recipe names the file beside it.
    """
    from compressor.plugins import load_plugins
    from compressor.recipe.json_schema import recipe_schema

    plugins = load_plugins(without or [], files=plugin or [])
    found = recipe_schema(plugins.methods, plugins.criteria)
    if output is None:
        return _show(found, lambda _, console: None, as_json=True)
    with writing(output):
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return _show(found, lambda _, console: None, f"Written to {output}.")


@app.command()
def apply(
    decision: Annotated[Path, typer.Argument(help="A decision.json or record.json that a run has written.")],
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", help="Folder for the smaller model.")],
    overwrite: OverwriteOption = False,
    trust_remote_code: TrustOption = False,
    other_model: Annotated[
        bool, typer.Option("--other-model", help="Apply it though it was decided on another model.")
    ] = False,
    hard_link: Annotated[
        bool, typer.Option("--hard-link", help="Link files of weights that stay as they are, instead of copying them.")
    ] = False,
    mtp: Annotated[
        Literal["drop", "keep", "prune"], typer.Option("--mtp", help="Extra prediction layers, as a recipe's `mtp`.")
    ] = "drop",
    without: WithoutOption = None,
    plugin: PluginOption = None,
    quiet: QuietOption = False,
    json_: JsonOption = False,
) -> None:
    """Apply a decision made before to the original model, on disk: no calibration, the same experts."""
    _calm()
    from compressor.machine.progress import Progress
    from compressor.run.apply import apply

    result = apply(
        decision,
        model,
        output,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        other_model=other_model,
        hard_link=hard_link,
        mtp=mtp,
        without=without or [],
        plugin_files=plugin or [],
        progress=Progress.detect(quiet=quiet),
    )
    _show(result.record, lambda _, console: None, f"Written to {output}.", as_json=json_, quiet=quiet)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="An output of `run` or `apply`.", show_default=False)],
    repo: Annotated[str, typer.Argument(help="Its name on the hub, owner/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="For its owner only.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Upload an output to the Hugging Face hub; called again, go on with what was interrupted."""
    from compressor.machine.progress import Progress

    progress = Progress.detect(quiet=quiet)
    if progress.style == "bar":
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    _calm()
    from compressor.run.push import push

    address = push(folder, repo, private=private, overwrite=overwrite, progress=progress)
    _show(address, lambda _, console: None, f"Pushed to {address}.", quiet=quiet)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="The output of a run.", show_default=False)],
    format_: Annotated[str, typer.Option("--format", help="kept-ids, or ser: ik_llama.cpp's option.")],
    output: Annotated[Path | None, typer.Option("--output", help="Write it to this file.", metavar="FILE")] = None,
    json_: JsonOption = False,
) -> None:
    """Print what other tools read: the ids that stay, as JSON by layer, or the line by which an engine skips."""
    from compressor.run import export

    if format_ not in ("kept-ids", "ser"):
        raise RecipeError(f"--format {format_}: expected kept-ids or ser.")
    found = export.kept_ids(folder) if format_ == "kept-ids" else export.ser(folder)
    text, says = (found["line"], found["says"]) if format_ == "ser" else (json.dumps(found), None)
    if output is not None:
        with writing(output):
            output.write_text(f"{text}\n", encoding="utf-8")
    _show(found, lambda _, console: print(f"Written to {output}." if output else text), says, as_json=json_)


@app.command()
def publish_statistics(
    folder: Annotated[Path, typer.Argument(help="The output of a run.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="The folder to write, where nothing may be yet.", show_default=False)],
) -> None:
    """Write a run's figures of experts as a data set for the Hugging Face hub, with its card. Uploads nothing."""
    from compressor.run import export

    rows = export.publish_statistics(folder, output)
    then = f"{rows:,} rows written to {output}. `hf upload OWNER/NAME {output} --repo-type dataset` shares them."
    _show(rows, lambda _, console: None, then)


@app.command()
def decide(
    statistics: Annotated[
        list[Path], typer.Argument(help="statistics.safetensors of a run; of several runs, to add them up.")
    ],
    output: Annotated[Path, typer.Option("--output", help="Folder for the decision and its page; or a .json file.")],
    method: Annotated[str, typer.Option("--method", help="The method whose options follow.")] = "expert_pruning",
    keep: Annotated[
        str | None, typer.Option("--keep", help="Experts to keep: 64, 0.5 or {0: 64, 1: 48}; 64,48: each.")
    ] = None,
    criterion: Annotated[str | None, typer.Option("--criterion", help="Criterion, such as reap.")] = None,
    blend: Annotated[str | None, typer.Option("--blend", help="mean, worst, pooled or {code: 2, prose: 1}.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any other option of the method, such as search=greedy. May be given again.",
            metavar="NAME=VALUE",
        ),
    ] = None,
    without: WithoutOption = None,
    plugin: PluginOption = None,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
    json_: JsonOption = False,
) -> None:
    """Decide again from figures gathered before: another ratio, criterion or blend. Needs no model."""
    _calm()
    from compressor.report.terminal import print_decisions
    from compressor.run import decide_again
    from compressor.run.decide_again import decision_file

    shown = {"as_json": json_, "quiet": quiet}
    given = [*(set_ or []), *_settings(criterion=criterion, blend=blend)]
    how: dict[str, Any] = {"overwrite": overwrite, "without": without or [], "plugin_files": plugin or []}
    if keep and "," in keep and "{" not in keep:
        each = keep.replace(" ", "").split(",")
        several = decide_again.decide_each(each, output, statistics, method, overrides=given, **how)
        then = f"\nWritten to {', '.join(several)}, which `compressor apply` takes."
        together = {"passes": [{**one["passes"][0], "method": path} for path, one in several.items()]}
        _show(several if json_ else together, print_decisions, then, **shown)
        return
    given += _settings(keep=keep)
    decided = decide_again.decide(statistics, method, output=output, overrides=given, **how)
    then = f"`compressor apply {decision_file(output)} MODEL --output FOLDER` makes the smaller model."
    _show(decided, print_decisions, f"\nWritten to {output}. {then}", **shown)


@app.command()
def evaluate(
    model: ModelArgument,
    recipe: Annotated[Path, typer.Option("--recipe", help="Take `evaluate:` from this recipe.")],
    against: Annotated[
        str | None,
        typer.Option("--against", help="Compare it with this model, its original say, which is measured first."),
    ] = None,
    set_: SetOption = None,
    weights: WeightsOption = None,
    memory: MemoryOption = None,
    device_memory: DeviceMemoryOption = None,
    allow_commands: CommandsOption = False,
    without: WithoutOption = None,
    plugin: PluginOption = None,
    quiet: QuietOption = False,
    json_: JsonOption = False,
) -> None:
    """Measure a model as a recipe's `evaluate:` says, without changing anything."""
    _calm()
    from compressor.machine.distributed import Processes
    from compressor.machine.progress import Progress
    from compressor.report.terminal import print_summary
    from compressor.run import pipeline

    with Processes.joined() as processes:
        record = pipeline.evaluate(
            recipe,
            model,
            against=against,
            overrides=[*(set_ or []), *_settings(weights=weights, memory=memory, device_memory=device_memory)],
            allow_commands=allow_commands,
            without=without or [],
            plugin_files=plugin or [],
            progress=Progress.detect(quiet=quiet),
            processes=processes,
        )
        if processes.is_first:
            _show(record, print_summary, as_json=json_)


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Outputs of runs, or checkpoints.", show_default=False)],
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", help="Measure folders without a record by `evaluate:` of this recipe."),
    ] = None,
    against: Annotated[str | None, typer.Option("--against", help="Their original; with --recipe.")] = None,
    json_: JsonOption = False,
    page: Annotated[Path | None, typer.Option("--page", help="Write tables and picture to this HTML file.")] = None,
    set_: SetOption = None,
    without: WithoutOption = None,
    plugin: PluginOption = None,
    quiet: QuietOption = False,
) -> None:
    """Show outputs side by side: bytes, bits a weight, and how far they are from their original."""
    _calm()
    from compressor.machine.progress import Progress
    from compressor.report.comparison import comparison_page
    from compressor.report.terminal import print_comparison
    from compressor.run import pipeline

    progress = Progress.detect(quiet=quiet)
    measured: dict[str, Any] = {"recipe": recipe, "against": against, "overrides": set_ or [], "progress": progress}
    found = pipeline.compare(folders, **measured, without=without or [], plugin_files=plugin or [])
    if page is not None:
        with writing(page):
            page.write_text(comparison_page(found), encoding="utf-8")
    _show(found, print_comparison, as_json=json_, quiet=quiet)


@app.command()
def sweep(
    recipe: RecipeFile,
    keep: Annotated[str, typer.Option("--keep", help="What stays: 8,12,16 or 0.5; means, if the recipe has a mean.")],
    model: ModelOption = None,
    output: Annotated[Path | None, typer.Option("--output", help="The page; default OUTPUT-sweep.html.")] = None,
    set_: SetOption = None,
    overwrite: OverwriteOption = False,
    resume: ResumeOption = False,
    without: WithoutOption = None,
    plugin: PluginOption = None,
    quiet: QuietOption = False,
    json_: JsonOption = False,
) -> None:
    """Show how far one can go: what each of several numbers of experts loses. Writes a page, and no model."""
    _calm()
    from compressor.machine.progress import Progress
    from compressor.report.terminal import print_comparison
    from compressor.run import pipeline

    progress, totals = Progress.detect(quiet=quiet), keep.replace(" ", "").split(",")
    how: dict[str, Any] = {"model_reference": model, "output": output, "overwrite": overwrite, "resume": resume}
    how |= {"overrides": set_ or [], "without": without or [], "plugin_files": plugin or [], "progress": progress}
    with _notes_shown():
        found = pipeline.sweep(recipe, totals, **how)
    then = f"\nWritten to {found['page']}, and as JSON beside it." if "page" in found else None
    _show(found, print_comparison, then, as_json=json_, quiet=quiet)


plugin_app = typer.Typer(cls=_Commands, help="Write a plugin of your own.", no_args_is_help=True)
app.add_typer(plugin_app, name="plugin")


@plugin_app.command()
def new(
    name: Annotated[str, typer.Argument(help="Its name in recipes, such as rare_zeros.", show_default=False)],
    method: Annotated[bool, typer.Option("--method", help="A method that changes weights.")] = False,
    criterion: Annotated[bool, typer.Option("--criterion", help="A criterion that scores experts.")] = False,
    adapter: Annotated[bool, typer.Option("--adapter", help="An adapter that explains an architecture.")] = False,
    folder: Annotated[Path | None, typer.Option("--folder", help="The project's folder; default NAME.")] = None,
    without: WithoutOption = None,
    quiet: QuietOption = False,
) -> None:
    """Write a small project that is a plugin, and works: code, recipe, tests, README, CI."""
    from compressor.plugin_kit.new import new_project
    from compressor.plugins import load_plugins

    kinds = [kind for kind, asked in (("method", method), ("criterion", criterion), ("adapter", adapter)) if asked]
    if len(kinds) != 1:
        raise PluginError("say what it shall be, and only one: --method, --criterion or --adapter.")
    place = folder or Path(name)
    files = new_project(name, kinds[0], place, load_plugins(without or []))  # type: ignore[arg-type]
    then = f"\nThen: cd {place}; compressor run recipe.yaml --plugin {name}.py. Its README tells the rest."
    _show(files, lambda found, console: print(*found, sep="\n"), then, quiet=quiet)


def _calm() -> None:
    """Keep the libraries' own progress bars and advice out of our output; errors still come through."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@contextmanager
def _printing() -> Iterator[None]:
    """Nothing but printing is done within, so that what fails is known to be standard output."""
    try:
        yield
        print(end="", flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python tries once more at its end, and complains
        if isinstance(error, BrokenPipeError):
            raise
        raise CompressorError(f"standard output cannot be written: {error.strerror}.") from error


def _show(
    found: Any,
    as_tables: Callable[[Any, Console], object],
    then: str | None = None,
    *,
    as_json: bool = False,
    quiet: bool = False,
) -> None:
    """Print what a command has found, as JSON or, unless quiet, as tables with a last line below."""
    with _printing():
        if as_json:
            print(json.dumps(found, indent=1))
        elif not quiet:
            as_tables(found, _console())
            if then:
                print(then)


def _console() -> Console:
    from rich.console import Console

    return Console()


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script. Never returns."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may lack letters that tables are drawn with
    sys.exit(_exit_status(arguments))


def _complain(text: str) -> None:
    """One line for the user, if there is somebody to read it."""
    if sys.stderr is not None:
        print(text, file=sys.stderr)


def _exit_status(arguments: list[str] | None) -> int:
    try:
        status: Any = app(arguments, standalone_mode=False)
    except CompressorError as error:
        if not (isinstance(error, ProcessError) and error.told):
            _complain(f"error: {error}")
        return 2
    except SystemExit as error:
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        return _READER_GONE  # rich and click end a command themselves then
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except Exception as error:
        # wrong usage: click's own class, which lives in another place from one typer to the next
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            if os.environ.get("RANK", "0") == "0":  # of several processes all are asked the same
                error.show()
            else:
                time.sleep(_LONGEST_SAYING)  # torchrun ends the first one when another ends: it should have spoken
            return 2
        raise
    if status == 130:  # some typers raise at Ctrl-C, others answer with this status
        _complain("interrupted; nothing is left half done under the output's name")
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    main()
