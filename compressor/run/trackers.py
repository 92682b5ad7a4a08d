"""Experiment trackers that a recipe names: when a run is done each gets its recipe, figures, counts by layer and page.
None is a dependency, and none that fails costs the run.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compressor.errors import shortened
from compressor.machine.progress import Progress
from compressor.recipe.schema import LoadedRecipe
from compressor.report.figures import short_labels

_Steps = Mapping[int, Mapping[str, float]]


def check_trackers(loaded: LoadedRecipe) -> None:
    """Raise RecipeError for one that is not installed; a folder of its name here, which wandb leaves, is no package."""
    for number, name in enumerate(loaded.recipe.trackers or ()):
        if (spec := find_spec(name)) is None or spec.origin is None:
            raise loaded.error(("trackers", number), f"{name} is not installed: `pip install {name}`")


def track(loaded: LoadedRecipe, record: Mapping[str, Any], progress: Progress) -> None:
    """Tell the recipe's trackers of a run that is done; it is called as its output, or else its model."""
    place = loaded.recipe.output or Path(loaded.recipe.model)
    page = str(place / "compressor" / "report.html") if loaded.recipe.output else None
    for name in loaded.recipe.trackers or ():
        log = _mlflow if name == "mlflow" else _wandb
        try:
            with contextlib.redirect_stdout(io.StringIO() if progress.style == "quiet" else sys.stderr):
                log(import_module(name), place.name, record["recipe"], steps_of(record), page)
        except Exception as error:  # they fail in any way
            why = shortened(" ".join(f"{type(error).__name__}: {error}".split()), 300)
            progress.say(f"{name} was not told of the run, all is in its record ({why})")


def _mlflow(mlflow: Any, name: str, recipe: dict[str, Any], steps: _Steps, page: str | None) -> None:
    with mlflow.start_run(run_name=name, nested=mlflow.active_run() is not None):
        mlflow.log_params({key: str(value)[:500] for key, value in recipe.items()})
        mlflow.log_dict(recipe, "recipe.json")
        for step, figures in steps.items():
            mlflow.log_metrics(figures, step=step)
        if page:
            mlflow.log_artifact(page)


def _wandb(wandb: Any, name: str, recipe: dict[str, Any], steps: _Steps, page: str | None) -> None:
    """Or trackio, which has the same functions."""
    project = os.environ.get(f"{wandb.__name__.upper()}_PROJECT", "moe-compressor")
    wandb.init(project=project, name=name, config=recipe)
    try:
        for step, figures in steps.items():
            wandb.log(figures, step=step)
        if page and hasattr(wandb, "log_artifact"):
            wandb.log_artifact(page, name=re.sub(r"[^\w.-]", "-", f"{name}-report"), type="report")
    finally:
        wandb.finish()


def steps_of(record: Mapping[str, Any]) -> dict[int, dict[str, float]]:
    """A record's figures by step: at each MoE layer's number its counts, at the first what is not of a layer."""
    evaluation, counts = record.get("evaluation") or {}, {one["path"]: one["num_experts"] for one in record["layers"]}
    found = {f"kl/{text}": one["kl"] for text, one in (evaluation.get("fidelity") or {}).items()}
    for side in ("before", "after"):
        texts, tasks, sizes = ((evaluation.get(side) or {}).get(key, {}) for key in ("perplexity", "tasks", "size"))
        found |= {f"{side}/perplexity/{text}": one["perplexity"] for text, one in texts.items()}
        for task, one in tasks.items():
            found |= {f"{side}/{task}/{metric}": figure["value"] for metric, figure in one["metrics"].items()}
        found |= {f"{side}/{key}": sizes[key] for key in ("parameters", "active_parameters", "bytes") if key in sizes}
    layers = (one for done in record["passes"] for one in done["decision"].get("layers", {}).items())
    kept = counts | {path: len(layer["kept"]) for path, layer in layers if "kept" in layer}
    labels = short_labels([*counts])[1].values()
    numbers = [int(label) if label.isdecimal() else place for place, label in enumerate(labels)]
    both = {path: {"experts/before": counts[path], "experts/after": kept[path]} for path in counts}
    steps = {number: both[path] for number, path in sorted(zip(numbers, counts, strict=True))}
    steps[min(steps)] |= {re.sub(r"[^\w/. -]", "_", name): value for name, value in found.items()}
    return steps
