"""A record, a plan, an inspection or decisions, printed as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from compressor.report import figures
from compressor.report.comparison import comparison_tables
from compressor.report.description import Json
from compressor.report.tables import Table, show_facts
from compressor.report.verdict import verdict
from compressor.wording import counted, human_bytes, human_count, human_seconds


def print_summary(record: Json, console: Console) -> None:
    """The verdict, what was done, the figures before and after, and which experts each pass kept in each layer."""
    if said := verdict(record):
        console.print(Text(said, style="bold"), end="\n\n")
    show_facts(
        {
            "model": record["model"]["reference"],
            "architecture": record["model"].get("architecture"),
            "against": record.get("against", {}).get("reference"),
            "passes": ", ".join(done["method"] for done in record.get("passes", [])),
            "images": record.get("images", {}).get("said"),
            "output": record.get("output"),
            "time": ", ".join(f"{step} {human_seconds(value)}" for step, value in record.get("seconds", {}).items()),
        },
        console,
    )
    for table in figures.summary_tables(record):
        table.show(console)
    for done in record.get("passes", []):
        _print_decision(done, record, console)


def print_comparison(found: Json, console: Console) -> None:
    """Outputs side by side, as `compare` gives them."""
    for table in comparison_tables(found):
        table.show(console)


def print_plan(plan: Json, console: Console) -> None:
    """What a recipe will do to a model, before any weight is read.

    ``plan``: ``model``, ``architecture``, ``layers`` (each ``path``, ``num_experts``, ``top_k``, ``kept``,
    ``dropped``, all but the path numbers of experts), ``parameters`` and ``bytes`` (``{"before", "after"}``),
    ``expert_parameters``, ``dtype``, ``needs`` (as `Work.to_json` gives them), ``notes``.
    """
    show_facts({"model": plan["model"], "architecture": plan.get("architecture"), "dtype": plan.get("dtype")}, console)
    rows = [
        (label, str(count), f"{one['num_experts']} → {one['kept']}", str(one["dropped"]), str(one["top_k"]))
        for label, count, one in figures.collapse(plan["layers"], ("num_experts", "top_k", "kept", "dropped"))
    ]
    Table("Layers", ("layers", ">count", ">experts", ">dropped", ">top-k"), rows).show(console)
    sizes = [
        (name, human(plan[name]["before"]), human(plan[name]["after"]), figures.ratio_said(*plan[name].values()))
        for name, human in (("parameters", human_count), ("bytes", human_bytes))
        if plan.get(name)
    ]
    Table("Size", ("", ">before", ">after", ">change"), sizes).show(console)
    if plan.get("expert_parameters"):
        share = plan["expert_parameters"] / plan["parameters"]["before"]
        console.print(Text(f"Experts hold {human_count(plan['expert_parameters'])} parameters, {share:.1%} of all."))
    if plan.get("needs"):
        _print_needs(plan["needs"], console)
    figures.serving_table(plan).show(console)
    _print_notes(plan.get("notes") or [], console)


_TAKEN = {"disk": "reading and writing", "computing": "computing"}
_WAITING = {"memory": "memory", "file": "files on the output's disk"}


def _print_needs(needs: Json, console: Console) -> None:
    """How the weights are held, and what the run needs for that."""
    how = (
        "all in memory"
        if needs["weights"] == "memory"
        else f"one decoder layer at a time: {needs['layers']} of {human_bytes(needs['largest_layer'])} at most"
    )
    there = f", {human_bytes(needs['available'])} are there"
    rows = [
        ("weights", how),
        ("hidden states", f"{human_bytes(needs['text'])}, in {_WAITING[needs['hidden_states']]}"),
        ("memory", f"{human_bytes(needs['memory'])}{there}; mapped files beside it, as far as there is room"),
    ]
    if needs["device_memory"]:
        rows.append(("device memory", human_bytes(needs["device_memory"])))
    rows.append(("disk", human_bytes(needs["disk"])))
    reading = f"the weights {counted(needs['readings'], 'time')}, {human_bytes(needs['bytes_read'])}"
    if needs.get("tasks_at_once"):
        reading += f"; for tasks once more for every {needs['tasks_at_once']:,} tokens asked, before and after"
    rows.append(("reading", reading))
    if needs.get("flop"):
        each = (
            f"2 for each of {human_count(needs['parameters_at_work'])} parameters at work, {needs['tokens']:,} tokens"
        )
        rows.append(("computing", f"{needs['flop'] / 1e12:,.1f} TFLOP, {each}; searches, tasks, training on top"))
    if seconds := needs.get("seconds"):
        parts = [f"{human_seconds(value)} {_TAKEN[key]}" for key, value in seconds.items()]
        rows.append(("time", f"{human_seconds(sum(seconds.values()))}: {', '.join(parts)}, at the speeds given"))
    Table("Needs", ("", "about"), rows).show(console)


def print_inspection(info: Json, console: Console) -> None:
    """A model's MoE layers, and what each smaller number of experts would save.

    ``info``: ``model``, ``architecture``, ``layers`` (each ``path``, ``num_experts``, ``top_k``, ``router``,
    ``parameters_per_expert``), ``parameters``, ``bytes``, ``expert_parameters``, ``expert_bytes``, ``dtype``,
    ``notes``.
    """
    show_facts({"model": info["model"], "architecture": info.get("architecture"), "dtype": info.get("dtype")}, console)
    rows = [
        (
            *(label, str(count), str(layer["num_experts"]), str(layer["top_k"])),
            *(layer.get("router") or figures.NOTHING, human_count(layer["parameters_per_expert"])),
        )
        for label, count, layer in figures.collapse(
            info["layers"], ("num_experts", "top_k", "router", "parameters_per_expert")
        )
    ]
    Table("MoE layers", ("layers", ">count", ">experts", ">top-k", "router", ">each expert"), rows).show(console)
    parameters, experts = info["parameters"], info["expert_parameters"]
    console.print(
        Text(
            f"{human_count(parameters)} parameters ({human_bytes(info['bytes'])}), of which experts hold "
            f"{human_count(experts)} ({human_bytes(info['expert_bytes'])}, {experts / parameters:.1%})."
        )
    )
    savings = []
    for count in figures.sensible_counts(info["layers"]):
        dropped = sum(max(0, layer["num_experts"] - count) * layer["parameters_per_expert"] for layer in info["layers"])
        saved = round(dropped * info["expert_bytes"] / experts)
        numbers = (human_count(parameters - dropped), human_bytes(info["bytes"] - saved), human_bytes(saved))
        savings.append((str(count), *numbers, f"{saved / info['bytes']:.1%}"))
    headings = (">experts", ">parameters", ">bytes", ">saved", ">of all")
    Table("With fewer experts in every layer", headings, savings).show(console)
    figures.serving_table(info).show(console)
    _print_notes(info.get("notes") or [], console)


def print_methods(plugins: Sequence[Any], console: Console) -> None:
    """The installed plugins (`compressor.plugins.Plugin`), what they offer, and each method's options."""
    for plugin in plugins:
        console.print(Text(f"{plugin.name}  (from {plugin.distribution} {plugin.version})", style="bold"))
        for method in plugin.methods:
            summary = (method.__doc__ or "").strip().split("\n")[0]
            console.print(
                Padding(Text(f"{method.name} (version {method.version}): {summary}"), (0, 0, 0, 2), expand=False)
            )
            for name, field in method.options_type.model_fields.items():
                value = None if field.is_required() else field.get_default(call_default_factory=True)
                said = str(value).lower() if isinstance(value, bool) else value
                default = "" if value in (None, {}, ()) else f"; default {said}"
                default = "; required" if field.is_required() else default
                about = Text(f"{name}: ", style="bold") + Text(
                    f"{_type_name(field.annotation)}{default}", style="not bold"
                )
                console.print(Padding(about, (0, 0, 0, 4), expand=False))
                console.print(Padding(Text(field.description or ""), (0, 0, 0, 8), expand=False))
        Table("criteria", ("criterion", "source"), [(one.name, one.source) for one in plugin.criteria]).show(console)
    if not plugins:
        console.print(Text("No plugins are installed."))


def print_recipes(recipes: Sequence[Json], console: Console) -> None:
    """The recipes that come with the library, as `shipped.described` gives them."""
    for one in recipes:
        about = Text(one["name"], style="bold") + Text(
            f"  {one['model']}: {', '.join(one['passes'])}", style="not bold dim"
        )
        console.print(about)
        console.print(Padding(Text(one["purpose"]), (0, 0, 0, 4), expand=False))


def methods_json(plugins: Sequence[Any]) -> list[Json]:
    """The same; options as JSON Schema."""
    return [
        {
            "plugin": plugin.name,
            "distribution": plugin.distribution,
            "version": plugin.version,
            "methods": [
                {
                    "name": one.name,
                    "version": one.version,
                    "about": one.__doc__,
                    "options": one.options_type.model_json_schema(),
                }
                for one in plugin.methods
            ],
            "criteria": {one.name: one.source for one in plugin.criteria},
        }
        for plugin in plugins
    ]


def _type_name(annotation: Any) -> str:
    """As a recipe's author would say it: without None, and without what checks a value."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin in (Union, UnionType):
        kinds = [_type_name(argument) for argument in arguments if argument is not type(None)]
        return " | ".join(dict.fromkeys(kinds))
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin is not None:
        named = [_type_name(argument) for argument in arguments if argument is not ...]
        return f"{{{': '.join(named)}}}" if issubclass(origin, dict) else f"[{', '.join(named)}]"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields.items()
        return f"{{{', '.join(f'{name}: {_type_name(field.annotation)}' for name, field in fields)}}}"
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).removeprefix("typing.")


def _print_decision(done: Json, record: Json | None, console: Console) -> None:
    table = figures.decision_table(done, record, room=console.width // 2)
    pattern, labels = figures.short_labels([row[0] for row in table.rows])
    rows = [(labels[row[0]], *row[1:]) for row in table.rows]
    if rows:
        Table(f"{table.title}: {pattern}", table.columns, rows).show(console)
    else:
        console.print(Text(f"\n{table.title}", style="bold"))
    _print_notes(figures.decision_notes(done), console)
    figures.random_table(done).show(console)


def print_decisions(decided: Json, console: Console) -> None:
    """The passes of a decision.json: kept and dropped experts, and what each layer loses."""
    for done in decided["passes"]:
        _print_decision(done, None, console)


def _print_notes(notes: Iterable[str], console: Console) -> None:
    for note in notes:
        console.print(Text(f"• {note}"))
