"""What a record says, as rows and lines for terminal, model card and page; takes plain JSON."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from compressor.report.description import EXPERT_IDS, Column, Description, Json, flat
from compressor.report.tables import Table
from compressor.wording import counted, human_bytes, human_count, ids_said

NOTHING = "–"
MAX_COUNT_ROWS = 16
ACCURACIES = ("acc", "acc_norm")


class Figure(NamedTuple):
    """One row of the figures before and after: text, ready to print."""

    name: str
    before: str
    after: str
    change: str  # and what stands below it


def summary_tables(record: Json) -> list[Table]:
    """Figures before and after, how far answers are from the original's, each pass alone, as far as known."""
    rows = figures(record)
    columns = ("figure", ">before", ">after", ">change")
    tables = [Table("Figures", columns, rows, [*legend(rows, record)]), fidelity_table(record), alone_table(record)]
    tables.append(serving_table(record))
    return [table for table in tables if table.rows]


def serving_table(found: Json) -> Table:
    """Which engines run a checkpoint, and why; without rows where nothing is said of it."""
    rows = [(one["engine"], one["answer"], serving_said(one)) for one in found.get("serving", ())]
    return Table("Where it can be served", ("engine", "runs", "why"), rows)


def serving_said(answer: Json) -> str:
    """Why an engine answers so, and the counts of which that is not said."""
    counts = " and ".join(map(str, answer["nearest"]))
    near = [f"{'not so with' if answer['answer'] == 'yes' else 'what passes:'} {counts}"] if counts else []
    return "; ".join([*(rule["says"] for rule in answer["rules"]), *near]) or "no rule speaks of this class"


def figures(record: Json) -> list[Figure]:
    """The rows of the table of figures: quality, size, speed, memory. Accuracies in percent with one standard error,
    changes in points; perplexities and sizes as a ratio after / before. A group's tasks are left to the record.
    """
    evaluation = record.get("evaluation") or {}
    before, after = (evaluation.get(side) or {} for side in ("before", "after"))
    return [
        *_perplexity_rows(before.get("perplexity", {}), after.get("perplexity", {})),
        *_task_rows(before.get("tasks", {}), after.get("tasks", {}), evaluation.get("paired") or {}),
        *_generation_rows(before.get("generation") or {}, after.get("generation") or {}),
        *_used_rows(before, after),
        *_size_rows(before, after),
        *_speed_rows(evaluation.get("speed") or {}),
        *_memory_rows(before, after, evaluation.get("speed") or {}),
    ]


def fidelity_table(record: Json) -> Table:
    """How far answers are from the original's, the worst text first; without rows where that was not measured."""
    by_text = list(((record.get("evaluation") or {}).get("fidelity") or {}).values())
    rows = [(one["name"], *fidelity_cells(one)) for one in sorted(by_text, key=lambda one: -one["kl"])]
    below = ["KL(original ‖ this): 0 for the original itself; ± one standard error."]
    kept = sorted({one["vocabulary"] for one in by_text if isinstance(one["vocabulary"], str)})
    below += [f"KL is a lower bound: it tells the {one} apart." for one in kept]
    columns = ("text", ">KL, nats", ">same likeliest %", ">loss, nats")
    return Table("Against the original, token by token", columns, rows, below)


def fidelity_cells(one: Json) -> tuple[str, str, str]:
    """KL, share of the same likeliest tokens in percent, and loss, each with its standard error."""

    def said(key: str, factor: float, form: str) -> str:
        value, error = factor * one[key], one[f"{key}_error"]
        shown = signed(value, form) if key == "delta_nll" else format(value, f"z{form}")
        return shown + (f" ± {format(factor * error, form)}" if error is not None else "")

    return said("kl", 1, ".4f"), said("agreement", 100, ".1f"), said("delta_nll", 1, ".4f")


def _fidelity_rows(evaluation: Json) -> Iterator[Figure]:
    """The same as rows of what each pass does alone."""
    for name, one in (evaluation.get("fidelity") or {}).items():
        kl, agreement, _ = fidelity_cells(one)
        yield Figure(f"KL {name}", "0", kl, "")
        yield Figure(f"same likeliest {name} %", "100", agreement, "")


def alone_table(record: Json) -> Table:
    """What each pass does alone, beside all of them together; without rows where it was not measured. Speed is a ratio
    to the model without any pass; errors and ranges are in the record.
    """
    evaluation = record.get("evaluation") or {}
    alone = evaluation.get("alone") or ()
    columns = [
        {row.name: row for row in [*figures({**record, "evaluation": side}), *_fidelity_rows(side)]}
        for side in [*alone, evaluation]
    ]
    methods = [one["method"] for one in alone]
    headings = [
        f">{one['pass'] + 1}. {one['method']}" if methods.count(one["method"]) > 1 else f">{one['method']}"
        for one in alone
    ]
    rows = []
    for name in dict.fromkeys(name for column in [columns[-1], *columns] for name in column):
        if name.startswith(("process memory", "weights on disk")):
            continue
        known = next(column[name] for column in reversed(columns) if name in column)
        is_speed = name.endswith("tokens/s")
        unchanged = known._replace(after=known.before, change="×1.00")
        cells = [column.get(name, unchanged) for column in columns]
        texts = ["×1.00" if is_speed else known.before, *((cell.change if is_speed else cell.after) for cell in cells)]
        for number, one in enumerate(alone, start=1):
            texts[number] = NOTHING if "problem" in one else texts[number]
        rows.append((name, *(re.split(" [±[]", text)[0] for text in texts)))
    below = [f"{one['method']} alone cannot be measured: {one['problem']}" for one in alone if "problem" in one]
    return Table("Each pass alone", ("figure", ">none", *headings, ">all"), rows if alone else [], below)


def collapse(layers: Sequence[Json], keys: Sequence[str]) -> Iterator[tuple[str, int, Json]]:
    """Runs of consecutive layers alike in ``keys`` and, but for its first number, path: label, count, first."""

    def alike(layer: Json) -> Any:
        return [_split_path(layer["path"])[::2], [layer.get(key) for key in keys]]

    for _, run in itertools.groupby(layers, alike):
        first, *others = run
        yield _label([one["path"] for one in (first, *others)]), 1 + len(others), first


def sensible_counts(layers: Sequence[Json]) -> list[int]:
    """Expert counts worth showing, largest first: all up to 16 experts, else at most 16, in steps of 8 from 128 on."""
    most, least = max(layer["num_experts"] for layer in layers), max(2, *(layer["top_k"] for layer in layers))
    step = -(-most // MAX_COUNT_ROWS)
    if most >= 128:
        step = -(-step // 8) * 8
    return list(range(most - step, least - 1, -step))


# --- rows of the figures ---


def _perplexity_rows(before: Json, after: Json) -> Iterator[Figure]:
    for name in union(before, after):
        one, other = before.get(name), after.get(name)
        change = f"×{other['perplexity'] / one['perplexity']:.3f}" if one and other else ""
        yield Figure(f"perplexity {name}", _perplexity(one), _perplexity(other), change)


def _perplexity(result: Json | None) -> str:
    if result is None:
        return NOTHING
    value, error = result["perplexity"], result.get("standard_error")
    with_error = f" ± {value * error:.{_decimals(value)}f}" if error is not None else ""
    return f"{_perplexity_said(value)}{with_error}"


def _perplexity_said(value: float) -> str:
    """The same in every table."""
    return f"{value:,.{_decimals(value)}f}"


def _decimals(value: float) -> int:
    return next((d for limit, d in ((10, 3), (100, 2), (1000, 1)) if value < limit), 0)


def _task_rows(before: Json, after: Json, paired: Json) -> Iterator[Figure]:
    for name in union(before, after):
        one, other = before.get(name), after.get(name)
        if (other or one or {}).get("group") is not None:
            continue
        ones, others = ((result or {}).get("metrics", {}) for result in (one, other))
        for metric in sorted(union(ones, others), key=lambda name: [*ACCURACIES, name].index(name)):
            flips = paired.get(name, {}).get(metric)
            is_share = metric in ACCURACIES or flips is not None
            yield Figure(
                f"{name} {metric}" + (" %" if is_share else ""),
                metric_said(ones.get(metric), is_share),
                metric_said(others.get(metric), is_share),
                _metric_change(ones.get(metric), others.get(metric), is_share) + _flips(flips),
            )


def metric_said(metric: Json | None, is_share: bool) -> str:
    """A task's figure with its standard error, a share in percent."""
    if metric is None:
        return NOTHING
    value, error = metric["value"], metric["standard_error"]
    if not is_share:
        return f"{value:.4g}" + (f" ± {error:.2g}" if error is not None else "")
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def _metric_change(one: Json | None, other: Json | None, is_share: bool) -> str:
    if one is None or other is None:
        return ""
    difference = other["value"] - one["value"]
    return f"{signed(100 * difference, '.1f')} points" if is_share else signed(difference, ".3g")


def _flips(flips: Json | None) -> str:
    if flips is None:
        return ""
    p = f"p={flips['p_value']:.2g}" if flips["p_value"] >= 0.001 else "p<0.001"
    return f"\n+{flips['gained']} −{flips['lost']} ({p})"


def _generation_rows(before: Json, after: Json) -> Iterator[Figure]:
    """What was written: the share that loops, that ends by itself, and of different 4-grams."""
    for mode in ("greedy", "sampled") if before or after else ():
        one, other = (side.get(mode) or {} for side in (before, after))
        for key, name in (("loops", "loops"), ("ends", "ends"), ("distinct_4", "distinct 4-grams")):
            known = [side[key] for side in (one, other) if side.get(key) is not None]
            change = f"{signed(100 * (known[1] - known[0]), '.1f')} points" if len(known) == 2 else ""
            yield Figure(f"{mode}: {name} %", _written(one, key), _written(other, key), change)


def _written(side: Json, key: str) -> str:
    if side.get(key) is None:
        return NOTHING
    low_high, error = side.get(f"{key}_interval"), side.get(f"{key}_error")
    beside = f" [{100 * low_high[0]:.0f}–{100 * low_high[1]:.0f}]" if low_high else ""
    return f"{100 * side[key]:.1f}{beside}" + (f" ± {100 * error:.1f}" if error is not None else "")


def samples(record: Json) -> list[tuple[str, dict[str, str]]]:
    """Prompts, and what was written behind each, before and after."""
    evaluation = record.get("evaluation") or {}
    sides = [((evaluation.get(side) or {}).get("generation") or {}).get("samples", []) for side in ("before", "after")]
    return [
        (
            one["prompt"],
            {f"{mode}, {side}": text[mode] for mode in ("greedy", "sampled") for side, text in texts.items()},
        )
        for one, other in zip(*sides, strict=False)
        for texts in [{"before": one, "after": other}]
    ]


def _used_rows(before: Json, after: Json) -> Iterator[Figure]:
    """Experts that a token used on average over the layers, where one of the models skips some or chooses fewer."""
    used = [side.get("experts_per_token") or {} for side in (before, after)]
    for name in dict.fromkeys([*used[0], *used[1]]):
        one, other = (statistics.mean(side[name].values()) if name in side else None for side in used)
        skips = any(not float(number).is_integer() for side in used for number in side.get(name, {}).values())
        if skips or (None not in (one, other) and one != other):
            texts = [NOTHING if mean is None else f"{mean:.3f}" for mean in (one, other)]
            yield Figure(f"experts/token {name}", texts[0], texts[1], ratio_said(one, other))


def _size_rows(before: Json, after: Json) -> Iterator[Figure]:
    sides = [{**(side.get("size") or {}), "disk": side.get("bytes_on_disk")} for side in (before, after)]
    for key, name, human in (
        ("parameters", "parameters", human_count),
        ("active_parameters", "active parameters", human_count),
        ("bytes", "weights in memory", human_bytes),
        ("disk", "weights on disk", human_bytes),
    ):
        one, other = (side.get(key) for side in sides)
        if one is not None or other is not None:
            yield Figure(name, _text(one, human), _text(other, human), ratio_said(one, other))


def _speed_rows(speed: Json) -> Iterator[Figure]:
    for key in ("prefill", "decode"):
        if speed.get(key):
            one, other = (speed[key][name] for name in speed["names"])
            ratio = speed[f"{key}_ratio"]
            change = f"×{ratio['median']:.2f} [{ratio['min']:.2f}–{ratio['max']:.2f}]"
            yield Figure(f"{key} tokens/s", _rate(one), _rate(other), change)


def _memory_rows(before: Json, after: Json, speed: Json) -> Iterator[Figure]:
    if speed.get("peak_memory"):
        one, other = (speed["peak_memory"][name] for name in speed["names"])
        yield Figure("device memory, peak", human_bytes(one), human_bytes(other), ratio_said(one, other))
    peaks = [side.get("peak_memory") or {} for side in (before, after)]
    one, other = (side.get("host_bytes") for side in peaks)
    if one is not None or other is not None:
        yield Figure("process memory, peak so far", _text(one, human_bytes), _text(other, human_bytes), "")


def legend(rows: Sequence[Figure], record: Json) -> Iterator[str]:
    if any("±" in row.before + row.after for row in rows):
        yield "± one standard error."
    if any(row.name.startswith("perplexity") for row in rows):
        yield "Perplexity: lower is better."
    if any("(p" in row.change for row in rows):
        yield "+ answers that became right, − that became wrong; p: McNemar's exact test."
    if any("[" in row.before + row.after for row in rows):
        yield "Loops: an n-gram three times or more at the end; ends: by itself; [95 %]."
    if any("[" in row.change for row in rows):
        yield "Speed: median ratio [smallest–largest] of alternated rounds in one process."
    evaluation = record.get("evaluation") or {}
    yield from cut_prompts((evaluation.get("after") or {}).get("tasks", {}))
    for when in ("before", "after"):
        if server := (evaluation.get(when) or {}).get("server"):
            where = f" at {server['url']}" if "url" in server else ""
            yield f"Tasks, {when}: answered by {server.get('engine', 'a server')}{where}."
    speed = evaluation.get("speed") or {}
    if speed.get("decode_reason"):
        yield f"No decode speed: {speed['decode_reason']}"


def cut_prompts(tasks: Json) -> Iterator[str]:
    """A sentence for each task (name → its figures as JSON) that was asked without the beginnings of some prompts."""
    for name, task in tasks.items():
        if task.get("cut"):
            yield (
                f"{name}: {task['cut']} of {task['documents']} prompts are longer than the model takes, and were asked "
                f"without their beginnings."
            )


# --- what was kept ---


def _described(done: Json) -> Json:
    """How a pass's decision is to be shown: as its method has said, or else all of it."""
    found: Json = done.get("description") or {"ids": EXPERT_IDS, **Description.of(done["decision"]).to_json()}
    return found


def shown_layers(done: Json, record: Json | None = None) -> dict[str, dict[str, Any]]:
    """A pass's layers with ids as the original model has them, and what was dropped of those that the pass saw."""
    seen = {path: range(count) for path, count in experts_of(record or {}).items()} | done.get("original_ids", {})
    shown, ids = {}, done.get("description", {}).get("ids", EXPERT_IDS)
    for path, decided in done["decision"].get("layers", {}).items():
        layer = shown[path] = dict(decided)
        if path in seen:
            names = dict(enumerate(seen[path]))
            layer |= {key: _named(decided[key], names) for key in ids if key in decided}
            if "kept" in layer:
                layer["dropped"] = [expert for expert in seen[path] if expert not in set(layer["kept"])]
    return shown


def _named(ids: Any, names: Mapping[int, int]) -> Any:
    """Ids, in lists or lists of lists, as the original model has them."""
    return [_named(one, names) for one in ids] if isinstance(ids, list) else names.get(ids, ids)


def shown_columns(done: Json, record: Json | None = None) -> list[tuple[Column, list[Any]]]:
    """The columns of a pass's decision, each with its values, layer by layer, None where it says nothing of one."""
    layers = [flat(layer) for layer in shown_layers(done, record).values()]
    found = [(Column(**one), [layer.get(one["key"]) for layer in layers]) for one in _described(done)["columns"]]
    return [one for one in found if any(value is not None for value in one[1])]


def decision_table(done: Json, record: Json | None = None, *, room: int = 500, details: bool = False) -> Table:
    """What a pass has decided, layer by layer; lists that take more letters than there is `room` are counted."""
    columns, cells = ["layer"], []
    for column, values in shown_columns(done, record):
        if details or not column.detail:
            are_numbers = all(type(value) in (int, float, type(None)) for value in values)
            columns.append(f"{'>' if are_numbers else ''}{column.heading}")
            thing = "expert" if column.key in _described(done)["ids"] else "value"
            cells.append([_value_said(value, room, thing) for value in values])
    return Table(done["method"], columns, [*zip(done["decision"]["layers"], *cells, strict=True)] if cells else [])


def _value_said(value: Any, room: int, thing: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, list) or not value:
        return f"{value:.4g}" if isinstance(value, float) else NOTHING if value in (None, []) else str(value)
    if all(type(one) is int for one in value):
        said = ids_said(value)
    else:
        said, thing = "; ".join(_value_said(one, room, thing) for one in value), "value"
    return said if len(said) <= room else counted(len(value), thing)


def experts_of(record: Json) -> dict[str, int]:
    return {layer["path"]: layer["num_experts"] for layer in record.get("layers", [])}


def decision_notes(done: Json) -> Iterator[str]:
    """What a reader of a decision should know of it, one sentence for each kind of finding."""
    described = _described(done)
    if done.get("original_ids") and any(column["key"] in described["ids"] for column in described["columns"]):
        yield "experts have the original model's ids here; the decision itself has those that this pass saw"
    if problem := (done.get("random") or {}).get("problem"):
        yield f"no random experts to compare with: {problem}"
    yield from described["notes"]


def random_table(done: Json) -> Table:
    """A pass's figures beside random decisions': median, range, how many it beats; no rows without some."""
    random = done.get("random") or {}
    compared = {"loss on calibration text": random["relative_loss"]} if "relative_loss" in random else {}
    compared |= {f"perplexity {name}": values for name, values in random.get("perplexity", {}).items()}
    compared |= {f"KL {name}": values for name, values in random.get("kl", {}).items()}
    rows = []
    for name, values in compared.items():
        others = sorted(values["random"])
        beaten = sum(other > values["ours"] for other in others)
        said = _perplexity_said if name.startswith("perplexity ") else "{:.4g}".format
        shown = (said(values["ours"]), said(statistics.median(others)), f"{said(others[0])}–{said(others[-1])}")
        rows.append((name, *shown, f"{beaten} of {len(others)}"))
    columns = ("against random experts", ">chosen", ">random (median)", ">smallest–largest", ">better than")
    return Table(f"{done['method']}: does it beat chance?", columns, rows)


# --- labels of layers ---


def _split_path(path: str) -> tuple[str, int | None, str]:
    """``model.layers.12.mlp`` → (``model.layers.``, 12, ``.mlp``)."""
    found = re.fullmatch(r"((?:[^.]*[^.\d][^.]*\.)*)(\d+)(\..*|)", path)
    return (found[1], int(found[2]), found[3]) if found else (path, None, "")


def _label(paths: Sequence[str]) -> str:
    before, _, after = _split_path(paths[0])
    numbers = [number for number in (_split_path(path)[1] for path in paths) if number is not None]
    return f"{before}{_numbers(numbers)}{after}"


def _numbers(numbers: Sequence[int]) -> str:
    """0–31, or with even gaps 1, 3, …, 31."""
    steps = {b - a for a, b in itertools.pairwise(numbers)}
    if len(numbers) > 3 and len(steps) == 1 and steps != {1}:
        return f"{{{numbers[0]}, {numbers[1]}, …, {numbers[-1]}}}"
    text = ids_said(numbers)
    return f"{{{text}}}" if "," in text else text


def short_labels(paths: Sequence[str]) -> tuple[str, dict[str, str]]:
    """A pattern shared by all paths (``model.layers.N.mlp``) and each path's number; else the paths."""
    parts = [_split_path(path) for path in paths]
    if len({(before, after) for before, _, after in parts}) == 1 and parts[0][1] is not None:
        before, _, after = parts[0]
        return f"{before}N{after}", {path: str(number) for path, (_, number, _) in zip(paths, parts, strict=True)}
    return "layers", {path: path for path in paths}


def _text(value: int | None, human: Callable[[int], str]) -> str:
    return NOTHING if value is None else human(value)


def as_yaml(data: Any) -> str:
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)


def union(*mappings: Json) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def ratio_said(before: float | None, after: float | None) -> str:
    return f"×{after / before:.3f}" if before and after is not None else ""


def _rate(tokens_per_second: float) -> str:
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 100 else f"{tokens_per_second:.1f}"


def signed(value: float, form: str) -> str:
    """With a sign that is never a hyphen: +0.3, −1.2, and 0.0 without one."""
    text = format(abs(value), form)
    if not float(text):
        return text
    return f"{'+' if value > 0 else '−'}{text}"
