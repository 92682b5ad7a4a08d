"""Several outputs side by side: what each takes on disk, and how far its answers are from the same original's.

The figures are those of records. Records are set beside each other only if they were measured on the same text, against
the same original.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compressor.checkpoint import headers
from compressor.checkpoint.find import find_checkpoint, with_weights
from compressor.errors import CheckpointError, EvaluationError, RecipeError
from compressor.evaluation.size import bytes_on_disk
from compressor.run.record import RECORD, recorded

Json = dict[str, Any]
_HELP = "`recipe` and `against` (--recipe, --against) measure it"


def side_by_side(
    folders: Sequence[str | Path], against: str | None = None, measure: Callable[[str], Json] | None = None
) -> Json:
    """See `compare`. `measure` makes the record of a folder beside the original `against`."""
    paths = list(dict.fromkeys(map(Path, folders)))
    if not paths:
        raise RecipeError("no folder to compare; name at least one.")
    records = {path: recorded(path) for path in paths}
    problems = {path: _problem(path, record) for path, record in records.items()}
    if against is not None and measure is not None:
        original = with_weights(find_checkpoint(against))
        wanted = headers.fingerprint(original.folder, original.shards)
        lacking = [path for path in paths if problems[path] or _original(records[path])["fingerprint"] != wanted]
        if not lacking and _unlike(records):
            lacking = paths[:1]
        for path in (*lacking, *(path for path in paths if path not in lacking)):
            if path in lacking or (lacking and _unlike({one: records[one] for one in (lacking[0], path)})):
                records[path] = measure(str(path)) | {"passes": records[path].get("passes", [])}
    else:
        for problem in filter(None, problems.values()):
            raise CheckpointError(f"{problem}; {_HELP}.")
    if unlike := _unlike(records):
        raise EvaluationError(f"{unlike}; {_HELP} alike.")
    return figures_of_all(records)


def _problem(folder: Path, record: Json) -> str | None:
    """Why a record does not say how far the folder's model is from its original."""
    if not record:
        return f"{folder}: it has no compressor/{RECORD}"
    evaluation = record.get("evaluation") or {}
    if not {"before", "after", "text"} <= evaluation.keys():
        return f"{folder}: its record has no `evaluation` beside its original"
    if evaluation["after"].get("bytes_on_disk") != bytes_on_disk(folder):
        return f"{folder}: its weights are other files than those that its record has measured"
    if _original(record)["fingerprint"] is None:
        return f"{folder}: its original was a live model, which no fingerprint tells from others"
    return None


def _original(record: Json) -> Json:
    """What it was compared with."""
    found: Json = record["against"] if "against" in record else record["model"]
    return found


def _unlike(records: Mapping[Path, Json]) -> str | None:
    """Which record cannot stand beside the first one, and why; None where all can."""
    about = {path: _measured_on(record) for path, record in records.items()}
    first = next(iter(about))
    for path, found in about.items():
        for what, theirs in about[first].items():
            if found[what] != theirs:
                return f"{path}: {what} is {found[what] or 'none'}, that of {first} {theirs or 'none'}"
    return None


def _measured_on(record: Json) -> dict[str, str]:
    """What makes figures of two records comparable, each as a text."""
    evaluation = record["evaluation"]
    tasks = evaluation["after"]["tasks"].values()
    return {
        "the original's fingerprint": str(_original(record)["fingerprint"]),
        "its text": ", ".join(sorted(f"{one['name']} {one['fingerprint']}" for one in evaluation["text"])),
        "what its tasks asked": ", ".join(sorted(f"{one['name']} {one['fingerprint']}" for one in tasks)),
    }


def figures_of_all(records: Mapping[Path, Json]) -> Json:
    """The figures, in the order given."""
    first = next(iter(records.values()))
    before = first["evaluation"]["before"]
    parameters, num_bytes = before["size"]["parameters"], before.get("bytes_on_disk")
    ends = [path.resolve().name for path in records]
    names = ends if len(set(ends)) == len(ends) else list(map(str, records))
    outputs = [
        _figures(name, path, record, parameters) for name, (path, record) in zip(names, records.items(), strict=True)
    ]
    for one in outputs:
        one["on_front"] = one["mean"] is not None and not any(_beats(other, one) for other in outputs)
    return {
        "original": {
            **_original(first),
            "parameters": parameters,
            "bytes": num_bytes,
            "bits": None if num_bytes is None else 8 * num_bytes / parameters,
            "tasks": before["tasks"],
        },
        "text": first["evaluation"]["text"],
        "outputs": outputs,
    }


def _figures(name: str, folder: Path, record: Json, parameters: int) -> Json:
    evaluation = record["evaluation"]
    after, fidelity = evaluation["after"], evaluation.get("fidelity", {})
    paired = {
        task: {metric: {**flips, **_difference(**flips)} for metric, flips in by_metric.items()}
        for task, by_metric in evaluation["paired"].items()
    }
    return {
        "name": name,
        "folder": str(folder),
        "methods": [done["method"] for done in record["passes"]],
        "bytes": after["bytes_on_disk"],
        "bits": 8 * after["bytes_on_disk"] / parameters,
        "mean": _mean(list(fidelity.values())),
        "fidelity": fidelity,
        "perplexity": after["perplexity"],
        "tasks": after["tasks"],
        "paired": paired,
        **({"speed": evaluation["speed"]} if evaluation.get("speed") else {}),
    }


def _mean(fidelity: Sequence[Json]) -> Json | None:
    """Each figure's mean over texts, which are weighted alike, and its standard error; None without text."""
    found: Json = {}
    for key in ("kl", "agreement", "delta_nll") if fidelity else ():
        errors = [one[f"{key}_error"] for one in fidelity]
        found[key] = math.fsum(one[key] for one in fidelity) / len(fidelity)
        found[f"{key}_error"] = None if None in errors else math.hypot(*errors) / len(errors)
    return found or None


def _difference(gained: int, lost: int, both_right: int, both_wrong: int, **_: Any) -> dict[str, float]:
    """By how much the share of right answers has grown, and its paired error √(((gained + lost)/n − d²) / n)."""
    count = gained + lost + both_right + both_wrong
    difference = (gained - lost) / count
    return {"difference": difference, "error": math.sqrt(((gained + lost) / count - difference**2) / count)}


def _beats(other: Json, one: Json) -> bool:
    """Whether an output is no larger and no farther from the original than one, and better in one of the two."""
    if other["mean"] is None or one["mean"] is None:
        return False
    ours, theirs = (one["bytes"], one["mean"]["kl"]), (other["bytes"], other["mean"]["kl"])
    return theirs != ours and all(their <= our for their, our in zip(theirs, ours, strict=True))
