"""The same medians as the paper's own published code: `tests/golden/README.md` says what was recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import compressor
from compressor.observe.statistics_file import load_statistics


@pytest.mark.parametrize("name", ["r6_float32", "r6_bfloat16"])
def test_medians_and_means_of_the_ratio(golden_folder: Path, tmp_path: Path, name: str) -> None:
    golden = json.loads((golden_folder / f"{name}.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(
        golden_folder,
        dtype=getattr(torch, golden["dtype"]),
        attn_implementation="eager",
        experts_implementation="eager",
    )
    recipe = {
        "model": str(golden_folder),
        "calibration": {"batch_size": 4, "data": [{"tokens": str(golden_folder / "calibration.jsonl")}]},
        "passes": [{"dynamic_skipping": {}}],
    }
    result = compressor.compress(recipe, model=model, output=tmp_path / "out")
    limit = {"float32": 1e-6, "bfloat16": 1e-2}[golden["dtype"]]
    recorded = golden["dynamic_skipping"]
    layers = result.record["passes"][0]["decision"]["layers"]
    for number, layer in enumerate(layers.values()):
        assert layer["rule"] == "ratio"
        assert layer["renormalise"] is True
        assert layer["beta"] == pytest.approx(recorded["betas_median"][str(number)], abs=limit)
        # half of the second experts, by its definition; in bfloat16 several tokens have the median itself
        assert layer["mean_experts"] == pytest.approx(1.5, abs=2e-3 if golden["dtype"] == "float32" else 1e-2)
    (figures,) = load_statistics(tmp_path / "out" / "compressor" / "statistics.safetensors")[0].values()
    for number, path in enumerate(layers):
        assert float(figures[path]["skip.ratio.mean"]) == pytest.approx(recorded["betas_mean"][str(number)], abs=limit)
    # what runs is what was decided
    with compressor.MoEModel(result.model).counted() as counter, torch.no_grad():
        for line in (golden_folder / "calibration.jsonl").read_text().splitlines():
            result.model(input_ids=torch.tensor([json.loads(line)["input_ids"]]))
    used = counter.experts_per_token[next(iter(layers))]
    assert used == pytest.approx(1.5, abs=5e-3 if golden["dtype"] == "float32" else 1e-2)
