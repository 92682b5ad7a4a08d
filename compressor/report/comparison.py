"""Several outputs beside the same original: tables, and quality against bytes as a picture; takes `compare`'s JSON."""

from __future__ import annotations

from collections.abc import Iterator

from compressor.report.charts import chart, series
from compressor.report.description import Json
from compressor.report.figures import NOTHING, fidelity_cells, metric_said, signed, union
from compressor.report.html import picture_page
from compressor.report.tables import Table
from compressor.wording import human_bytes


def comparison_tables(found: Json) -> list[Table]:
    """All outputs, the original first; then text by text, tasks and speed, as far as records have them."""
    return [table for table in (_all_table(found), *_text_tables(found), _tasks_table(found), _speed_table(found))
            if table.rows]  # fmt: skip


def comparison_page(found: Json) -> str:
    """The tables and the picture as one HTML page."""
    title = found.get("title") or f"{len(found['outputs'])} outputs of {found['original']['reference']}"
    return picture_page(title, comparison_tables(found), filter(None, [picture(found)]))


def _name(one: Json) -> str:
    return f"{one['name']} *" if one["on_front"] else str(one["name"])


def _all_table(found: Json) -> Table:
    original, outputs = found["original"], found["outputs"]
    there = original["bytes"] is not None
    first = (human_bytes(original["bytes"]), f"{original['bits']:.2f}") if there else (NOTHING, NOTHING)
    rows: list[tuple[str, ...]] = [("the original", *first, "0", "100", "0")]
    for one in outputs:
        cells = [cell.split(" ±")[0] for cell in fidelity_cells(one["mean"])] if one["mean"] else [NOTHING] * 3
        rows.append((_name(one), human_bytes(one["bytes"]), f"{one['bits']:.2f}", *cells))
    below = [
        "bits: of the files of weights, for each weight of the original.",
        "KL(original ‖ output), same likeliest token, loss: means over texts.",
    ]
    if any(one["on_front"] for one in outputs):
        below.append("* no other is both smaller and closer to the original.")
    columns = ["output", ">on disk", ">bits", ">KL, nats", ">same %", ">loss, nats"]
    if "experts" in original:
        columns.insert(1, ">experts")
        rows = [(row[0], str(one["experts"]), *row[1:]) for row, one in zip(rows, [original, *outputs], strict=True)]
    title = found.get("title") or f"Beside {original['reference']}"
    return Table(title, columns, rows, [*below, *found.get("notes", ())])


def _text_tables(found: Json) -> Iterator[Table]:
    """Each figure, text by text, with its standard error."""
    kl = [{text: one["kl"] for text, one in output["fidelity"].items()} for output in found["outputs"]]
    texts = sorted(union(*kl), key=lambda text: -sum(one[text] for one in kl))  # the worst first
    titles = ("KL to the original, nats a token", "Same likeliest token, %", "Loss, nats a token")
    for number, title in enumerate(titles) if texts else ():
        rows = [
            (_name(one), *(fidelity_cells(one["fidelity"][text])[number] for text in texts)) for one in found["outputs"]
        ]
        yield Table(title, ("output", *(f">{text}" for text in texts)), rows)


def _tasks_table(found: Json) -> Table:
    """What tasks say: of the original, then of each output, with the difference and its paired error."""
    names = [
        (task, metric)
        for task, result in found["original"]["tasks"].items()
        if result.get("group") is None
        for metric in result["metrics"]
    ]
    rows = [("the original", *(_task_cell(found["original"], *one) for one in names))]
    rows += [(_name(one), *(_task_cell(one, *name) for name in names)) for one in found["outputs"]]
    columns = ("output", *(f">{task} {metric}" for task, metric in names))
    below = ["Below: the difference to the original in points, ± its paired standard error."]
    return Table("Tasks", columns, rows if names else [], below)


def _task_cell(one: Json, task: str, metric: str) -> str:
    measured = one["tasks"].get(task, {}).get("metrics", {}).get(metric)
    flips = one.get("paired", {}).get(task, {}).get(metric)
    is_share = flips is not None or metric.startswith("acc")
    beside = f"\n{signed(100 * flips['difference'], '.1f')} ± {100 * flips['error']:.1f}" if flips else ""
    return metric_said(measured, is_share) + beside


def _speed_table(found: Json) -> Table:
    rows = [
        (_name(one), *(_ratio(one["speed"].get(f"{key}_ratio")) for key in ("prefill", "decode")))
        for one in found["outputs"]
        if "speed" in one
    ]
    below = ["Against the original, each in its own run: median [smallest–largest] of alternated rounds."]
    return Table("Speed", ("output", ">prefill", ">decode"), rows, below)


def _ratio(ratio: Json | None) -> str:
    return NOTHING if ratio is None else f"×{ratio['median']:.2f} [{ratio['min']:.2f}–{ratio['max']:.2f}]"


def picture(found: Json) -> Json | None:
    """KL on a logarithmic axis by bytes, a line through the outputs that no other one beats; None without any KL."""
    there = [one for one in found["outputs"] if one["mean"] and one["mean"]["kl"] > 0]
    front, others = ([(one["bytes"], one["mean"]["kl"], one["name"]) for one in there if one["on_front"] is is_front]
                     for is_front in (True, False))  # fmt: skip
    chance = [(one["bytes"], min(one["random"]), max(one["random"])) for one in there if one.get("random")]
    original = [(found["original"]["bytes"], 0, "the original")]
    drawn = [
        series("no other is both smaller and closer", sorted(front)),
        series("others", others, "points"),
        series("random choices", chance, "band"),
        series("the original", original, "mark"),
    ]
    title = "KL to the original, mean over texts, by bytes on disk"
    return chart(title, drawn, x="bytes", y="KL, nats a token", log=True) if there else None
