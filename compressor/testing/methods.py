"""What every method must pass, as one function for anybody's tests.

from compressor.testing import check_method
check_method("my_method", {"share": 0.5}).raise_for_failures()      # its name in recipes, and its options
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from compressor.errors import CompressorError
from compressor.run.apply import apply
from compressor.run.decide_again import decide
from compressor.run.pipeline import compress
from compressor.testing.checks import Check, Report
from compressor.testing.tiny import tiny_inputs, tiny_model

_NUM_SEQUENCES = 40
"""Half of them are held-out text."""


def check_method(name: str, options: Mapping[str, Any], *, model_type: str = "mixtral") -> Report:
    """Run an installed method on a tiny random model: loaded and from disk it must write the same bytes, as must what
    `decide` and `apply` make of its figures, and it must work behind a pass that has removed experts. What the library
    refuses ends up in the report; what the method's own code raises is raised.
    """
    report = Report(f"{name} on a tiny {model_type}")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = tiny_model(model_type)
        model.save_pretrained(folder / "model")
        rows = tiny_inputs(model, batch=_NUM_SEQUENCES, length=24)["input_ids"].tolist()
        (folder / "ids.jsonl").write_text("".join(f'{{"input_ids": {row}}}\n' for row in rows), encoding="utf-8")
        text = {"tokens": str(folder / "ids.jsonl"), "samples": _NUM_SEQUENCES // 2}
        recipe = {"model": str(folder / "model"), "calibration": {"data": [text]}}
        own, pruned = {name: dict(options)}, {"expert_pruning": {"keep": 6, "criterion": "frequency"}}
        whole, behind = {**recipe, "passes": [own]}, {**recipe, "passes": [pruned, own]}
        checks: dict[str, Callable[[], Any]] = {
            "runs in memory": partial(compress, whole, overrides=["weights=memory"], output=folder / "memory"),
            "from disk to the same bytes": partial(_from_disk, folder, whole),
            "decided and applied again to the same bytes": partial(_again, folder, name, options),
            "behind expert_pruning": partial(compress, behind, output=folder / "behind"),
        }
        for check, run in checks.items():
            try:
                problem = run()
            except CompressorError as error:
                problem = str(error)
            is_problem = isinstance(problem, str)
            report.checks.append(Check(check, not is_problem, str(problem) if is_problem else ""))
            if is_problem:
                break  # all others go by what this one has written
    return report


def _from_disk(folder: Path, recipe: Mapping[str, Any]) -> str | None:
    compress(recipe, overrides=["weights=disk"], output=folder / "disk")
    return _difference(folder / "memory", folder / "disk")


def _again(folder: Path, name: str, options: Mapping[str, Any]) -> str | None:
    """From the figures, where it has some, else from the decision."""
    statistics, decision = (
        folder / "memory" / "compressor" / file for file in ("statistics.safetensors", "decision.json")
    )
    apply(
        decide(statistics, name, **options) if statistics.exists() else decision,
        str(folder / "model"),
        folder / "again",
    )
    return _difference(folder / "memory", folder / "again")


def _difference(one: Path, other: Path) -> str | None:
    for path in (one / "config.json", *sorted(one.glob("*.safetensors"))):
        if path.read_bytes() != (other / path.name).read_bytes():
            return f"{path.name} differs"
    return None
