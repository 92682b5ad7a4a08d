"""Every routed-expert architecture of the installed transformers: found by code, so a newer one extends the test."""

import re
from functools import cache
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers

from compressor import UnsupportedModelError
from compressor.moe import find_structure
from compressor.testing import (
    auto_class,
    candidate_types,
    check_model,
    model_class,
    tiny_config,
    tiny_inputs,
    tiny_model,
)
from compressor.testing.architectures import row

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"

REFUSED = {
    "nllb-moe": "does not run the experts that its router chose",
    "qwen3_omni_moe": "has no forward",
}
"""Types with routed experts that are refused, and a part of the reason."""

BROKEN_UPSTREAM = {("llama4", "5.24.0"): "image_outputs"}
"""(type, transformers) → a part of the error with which its forward fails on text alone."""

FAILS_UPSTREAM = {"longcat_flash": {"top-k lowered"}}
"""Its experts lose a dimension where a token chooses one expert; the tiny model chooses two."""


@cache
def _verdict(model_type: str) -> str:
    """`routed`, or why the structure was refused."""
    try:
        config = tiny_config(model_type)
        find_structure(model_class(model_type), config)
    except UnsupportedModelError as error:
        return str(error)
    except Exception as error:  # a candidate that cannot be made tiny is no architecture with experts: see below
        return f"cannot be built: {error}"
    return "routed"


@cache
def routed_types() -> tuple[str, ...]:
    """The types whose structure is found, and those known to have experts that are refused."""
    return tuple(name for name in candidate_types() if name in REFUSED or _verdict(name) == "routed")


def test_all_types_of_the_census_are_found():
    routed = set(routed_types())
    assert set(REFUSED) <= routed
    if transformers.__version__.startswith("5.23"):
        assert len(routed) == 89


@pytest.mark.parametrize("model_type", ["doge", "bamba"])
def test_candidates_without_routed_experts_are_refused_by_name(model_type):
    assert "doge" in candidate_types()
    with pytest.raises(UnsupportedModelError, match=f"^{model_type}: "):
        find_structure(model_class(model_type), tiny_config(model_type))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", routed_types())
def test_passes_every_check(model_type, dtype):
    if model_type in REFUSED:
        with pytest.raises(UnsupportedModelError, match=REFUSED[model_type]):
            find_structure(model_class(model_type), tiny_config(model_type))
        return
    model = tiny_model(model_type, dtype=dtype)
    if (model_type, transformers.__version__) in BROKEN_UPSTREAM:
        with pytest.raises(AttributeError, match=BROKEN_UPSTREAM[model_type, transformers.__version__]):
            check_model(model, tiny_inputs(model))
        return

    def load(folder):
        return auto_class(model_type).from_pretrained(folder, dtype=dtype)

    report = check_model(model, tiny_inputs(model), load=load)
    failed = {check.name for check in report.failed}
    assert failed == FAILS_UPSTREAM.get(model_type, set()), str(report)
    applies = {check.name for check in report.checks if check.passed}
    assert {"keep all", "removed = masked", "saved"} <= applies, str(report)
    if dtype == torch.float32 and transformers.__version__ == _version_of_the_table():
        assert " | ".join(row(model_type, report, model)) in TABLE.read_text(encoding="utf-8")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["mixtral4", "deepseek4"])
def test_remote_code_with_experts_in_a_list(name, dtype):
    model = tiny_models.tiny_model(name, dtype)
    inputs = {"input_ids": tiny_models.token_ids(2, 12)}
    check_model(model, inputs, trust_remote_code=True).raise_for_failures()


def _version_of_the_table():
    return re.search(r"transformers (\S+)", TABLE.read_text(encoding="utf-8"))[1]


def test_the_table_has_every_type_and_no_other():
    if transformers.__version__ != _version_of_the_table():
        pytest.skip("docs/architectures.md was made with another transformers")
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == ["type", "---", *routed_types()]
