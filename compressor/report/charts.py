"""Charts as JSON, which the page's script draws: series of points, by layer or by a number."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from compressor.report.description import SEARCH_LOSS, Json
from compressor.report.figures import experts_of, short_labels, shown_columns, shown_layers, union
from compressor.wording import ids_said

Point = Sequence[Any]
"""x and y, then what is said of it; in a band x, the least and the largest y."""


def chart(title: str, series: Sequence[Json], *, names: Sequence[str] = (), **axes: Any) -> Json:
    """One picture. With `names` each x is the number of one of them, else a number, of bytes if the axis is called so.
    The y axis begins at 0, or is a logarithm. `axes`: `x` and `y`, what they are called, and `log`.
    """
    return {"title": title, "names": [*names], "series": [one for one in series if one["points"]], **axes}


def series(name: str, points: Iterable[Point], kind: str = "line") -> Json:
    """Points joined by a `line` or alone (`points`), `bars` from 0, or a `band`. Those without a value are left out."""
    return {"name": name, "kind": kind, "points": [[*point] for point in points if None not in point[:2]]}


# --- by layer ---


def by_layer(done: Json, record: Json) -> Iterator[Json]:
    """The columns of a pass's decision that are to be drawn: two as bars, of more all but the first as lines. Beside
    experts per token as the calibration text tells them, those that were counted while the model was measured.
    """
    paths, by_plot = list(done["decision"].get("layers", {})), dict[str, list[tuple[str, Sequence[Any]]]]()
    for column, values in shown_columns(done, record):
        numbers = [value if isinstance(value, int | float) else None for value in values]
        by_plot.setdefault(column.plot, []).append((column.heading, numbers))
    by_plot.pop("", None)
    kept = [len(layer["kept"]) for layer in shown_layers(done, record).values() if "kept" in layer]
    if len({*kept}) > 1:
        by_plot = {"experts kept": [("experts kept", kept)], **by_plot}
    for title, drawn in by_plot.items():
        found = [
            series(name, enumerate(values), "bars" if number == 0 or len(drawn) == 2 else "line")
            for number, (name, values) in enumerate(drawn)
        ]
        if title == "experts per token":
            found = [*_counted(record, "before", paths)[:1], *found, *_counted(record, "after", paths)]
        pattern, labels = short_labels(paths)
        yield chart(f"{title}, by layer", found, x=pattern, names=[*labels.values()])


def _counted(record: Json, side: str, paths: Sequence[str]) -> list[Json]:
    """Experts that a token used on each text that was measured."""
    used = ((record.get("evaluation") or {}).get(side) or {}).get("experts_per_token") or {}
    said = {"before": "before", "after": "counted"}[side]
    return [series(f"{said}: {name}", enumerate(map(by.get, paths))) for name, by in used.items()]


# --- quality against size ---


def quality(done: Json) -> Iterator[Json]:
    """What is lost by how many experts stay, as far as a pass has measured it, and where the choice and chance are."""
    layers = [layer for layer in done["decision"].get("layers", {}).values() if "kept" in layer and "dropped" in layer]
    counts = [len(layer["kept"]) + len(layer["dropped"]) for layer in layers]
    if not layers:
        return
    share = 100 * sum(len(layer["kept"]) for layer in layers) / sum(counts)
    x, random = "experts that stay, %", done.get("random") or {}
    nats = [*_by_nats(done["decision"], share), *_chance(random.get("kl", {}).values(), share)]
    if any(one["points"] for one in nats):
        yield chart("What the answers lose", nats, x=x, y="KL, nats a token", log=True)
    told = [one[SEARCH_LOSS] for one in done.get("experts", {}).values() if SEARCH_LOSS in one]
    if told and len({*counts}) == 1:
        path = [sorted(loss for loss in losses if loss is not None) for losses in told]
        means = [0.0, *(statistics.fmean(losses) for losses in zip(*path, strict=False))]
        along = [(100 * (1 - gone / counts[0]), loss) for gone, loss in enumerate(means)]
        own = {"random": [], "ours": statistics.fmean(layer.get("relative_loss", 0.0) for layer in layers)}
        chance = _chance([random.get("relative_loss", own)], share, "calibration text")
        found = [series("as the search lets experts go", along), *chance]
        yield chart("What the layers lose", found, x=x, y="relative loss, mean over layers")


def _by_nats(decision: Json, share: float) -> Iterator[Json]:
    """Counts that were measured, each layer alone, added up where all layers keep the same share; and the choices."""
    budget, curves = decision.get("budget", {}), []
    for path, by in budget.get("measured", {}).items():
        layer = decision["layers"][path]
        num_experts = len(layer["kept"]) + len(layer["dropped"])
        curves.append(
            {100 * int(count) / num_experts: statistics.fmean(one["kl"].values()) for count, one in by.items()}
        )
    shares = sorted(set.intersection(*map(set, curves))) if curves else ()
    points = [(one, sum(curve[one] for curve in curves)) for one in shares]
    yield series("same share of every layer: layers alone, added up", points)
    if "summed_kl" in budget:
        yield series("chosen: layers alone, added up", [(share, budget["summed_kl"], "chosen")], "points")
    alternatives = (decision.get("chosen") or {}).get("alternatives", {})
    compared = [(share, one["cost"], name) for name, one in alternatives.items()]
    yield series("choices compared: all layers together", compared, "points")


def _chance(compared: Iterable[Json], share: float, text: str = "measured text") -> Iterator[Json]:
    """The choice, and the least and most that random ones lose, as means over texts."""
    values = [one for one in compared if "ours" in one]
    if not values:
        return
    draws = [statistics.fmean(draw) for draw in zip(*(one["random"] for one in values), strict=True)]
    if draws:
        yield series(f"random choices, {text}", [(share, min(draws), max(draws))], "band")
    ours = statistics.fmean(one["ours"] for one in values)
    yield series(f"chosen, {text}", [(share, ours, "chosen")], "points")


# --- every expert ---

_STATES = {
    "k": "kept",
    "s": "kept, skipped by some tokens",
    "d": "dropped",
    "m": "merged into another",
    "c": "answers a constant",
    "n": "never chosen",
}


def experts(record: Json) -> Json | None:
    """What becomes of each expert after all passes, by the original's ids, and the figures of each from the first pass
    that has some; None where nothing is known of single experts.
    """
    counts, states, figures = experts_of(record), dict[str, list[str]](), dict[str, Any]()
    for done in record.get("passes", []):
        gone = {"constants": "c", "never_chosen": "n"}.get(done["decision"].get("replace", ""), "d")
        named, told = done.get("original_ids", {}), done.get("experts", {})
        for path, layer in shown_layers(done, record).items():
            if "kept" in layer:
                dropped = layer.get("dropped", [])
                counts.setdefault(path, 1 + max([*layer["kept"], *dropped, *named.get(path, [])]))
                state = states.setdefault(path, ["k"] * counts[path])
                letter = "m" if "clusters" in layer else gone
                states[path] = [letter if expert in dropped else one for expert, one in enumerate(state)]
            if path in told and path not in figures:
                ids = named.get(path, range(counts[path]))
                at = {name: dict(zip(ids, values, strict=False)) for name, values in told[path].items()}
                figures[path] = {name: [of.get(expert) for expert in range(counts[path])] for name, of in at.items()}
    for path in {*record.get("skipping", {})} & {*counts}:
        states[path] = ["s" if one == "k" else one for one in states.get(path, ["k"] * counts[path])]
    paths = [path for path in counts if path in states or path in figures]
    if not paths:
        return None
    shown = ["".join(states.get(path, "k" * counts[path])) for path in paths]
    pattern, labels = short_labels(paths)
    stay = [sum(letter in "ks" for letter in state) for state in shown]
    each = ids_said(range(min(stay), max(stay) + 1))
    return {
        "said": f"{sum(stay):,} of {sum(map(len, shown)):,} experts stay, {each} in a layer.",
        "pattern": pattern,
        "layers": [*labels.values()],
        "states": shown,
        "words": {letter: word for letter, word in _STATES.items() if any(letter in state for state in shown)},
        "measures": [
            {"name": name, "values": [figures.get(path, {}).get(name, []) for path in paths]}
            for name in union(*figures.values())
        ],
    }
