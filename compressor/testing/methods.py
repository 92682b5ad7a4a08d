"""What every method must pass, as one function for anybody's tests.

from compressor.testing import check_method
check_method("my_method", {"share": 0.5})      # its name in recipes, and its options
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.errors import VerificationError
from compressor.observe.statistics_file import load_statistics
from compressor.run.apply import apply
from compressor.run.decide_again import decide
from compressor.run.pipeline import compress
from compressor.testing.tiny import tiny_inputs, tiny_model

_NUM_SEQUENCES = 40
"""Half of them are held-out text."""


def check_method(name: str, options: Mapping[str, Any], *, model_type: str = "mixtral") -> None:
    """Run an installed method on a tiny random model: loaded and from disk it must write the same bytes, as must what
    `decide` and `apply` make of its figures, and it must work behind a pass that has removed experts. Raises
    VerificationError where bytes differ, and whatever the library or the method raise.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = tiny_model(model_type)
        model.save_pretrained(folder / "model")
        rows = tiny_inputs(model, batch=_NUM_SEQUENCES, length=24)["input_ids"].tolist()
        (folder / "ids.jsonl").write_text("\n".join(json.dumps({"input_ids": row}) for row in rows), encoding="utf-8")
        text = {"tokens": str(folder / "ids.jsonl"), "samples": _NUM_SEQUENCES // 2}
        recipe: dict[str, Any] = {
            "model": str(folder / "model"),
            "calibration": {"data": [text]},
            "passes": [{name: dict(options)}],
        }
        for weights in ("memory", "disk"):
            compress({**recipe, "weights": weights}, output=folder / weights)
        figures, decision = (folder / "disk" / "compressor" / at for at in ("statistics.safetensors", "decision.json"))
        has_figures = figures.exists() and load_statistics(figures)[0]
        apply(decide(figures, name, **options) if has_figures else decision, recipe["model"], folder / "apply")
        for other in ("disk", "apply"):
            for path in (folder / "memory" / "config.json", *(folder / "memory").glob("*.safetensors")):
                if path.read_bytes() != (folder / other / path.name).read_bytes():
                    raise VerificationError(f"{name}: {path.name} differs between a run in memory and {other}.")
        pruned = {"expert_pruning": {"keep": 6, "criterion": "frequency"}}
        compress({**recipe, "passes": [pruned, *recipe["passes"]]}, output=folder / "behind")
