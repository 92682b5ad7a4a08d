"""Names and patterns in what a checkpoint says of its quantisation, by the numbers that experts have afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from edit.test_disk import FORMATS, companions, edited, six, write_changed

from compressor import UnsupportedModelError
from compressor.edit.naming import renamed

E = "model.layers.{}.mlp.experts.{}"
LEAVES = ("up_proj", "down_proj")


def modules() -> dict[str, str | None]:
    """Two layers of 12 experts; those of layer 0 lose 1 and 10, those of layer 1 lose 0 and 3."""
    found: dict[str, str | None] = {"lm_head": "lm_head"}
    for layer, gone in ((0, (1, 10)), (1, (0, 3))):
        gate = f"model.layers.{layer}.mlp.gate"
        found[gate] = gate
        left = [expert for expert in range(12) if expert not in gone]
        for expert in range(12):
            new = E.format(layer, left.index(expert)) if expert in left else None
            found[E.format(layer, expert)] = new
            for leaf in LEAVES:
                found[f"{E.format(layer, expert)}.{leaf}"] = new and f"{new}.{leaf}"
    return found


def after(value: Any) -> Any:
    return renamed(value, modules(), "mine")


@pytest.mark.parametrize(
    "entry",
    [
        "lm_head",
        "re:.*gate$",
        "re:.*lm_head",
        "*.mlp.gate*",
        "model.layers.*.mlp.experts.*",
        r"re:.*mlp\.experts\.\d+\.(up|down)_proj$",
        r"model\.layers\.1\.mlp\..*",
        "*lm_head",
        "gate",
        "Linear",
        r"re:.*layers\.0.*\.experts\.10\..*",
        "model.layers.1.mlp",
        "model.layers.1",
        "experts",
    ],
)
def test_what_tells_no_experts_apart_stays(entry: str) -> None:
    assert after({"ignore": [entry], "keys": {entry: 1}}) == {"ignore": [entry], "keys": {entry: 1}}


@pytest.mark.parametrize(
    ("entry", "new"),
    [
        (E.format(0, 2), [E.format(0, 1)]),
        (E.format(0, 11) + ".up_proj", [E.format(0, 9) + ".up_proj"]),
        ("layers.1.mlp.experts.11.up_proj", ["layers.1.mlp.experts.9.up_proj"]),
        ("language_model." + E.format(1, 4), ["language_model." + E.format(1, 2)]),
        (E.format(0, 5) + ".*", [E.format(0, 4) + ".*"]),
        (E.format(0, 1), []),
        (E.format(0, 0), [E.format(0, 0)]),
    ],
)
def test_modules_by_name(entry: str, new: list[str]) -> None:
    assert after([entry]) == new
    assert after({entry: 8}) == dict.fromkeys(new, 8)


@pytest.mark.parametrize(
    ("entry", "fitted"),
    [
        (r"re:.*\.experts\.2\.up_proj", [E.format(0, 1) + ".up_proj", E.format(1, 1) + ".up_proj"]),
        ("model.layers.0.*.experts.5.*", [f"{E.format(0, 4)}.{leaf}" for leaf in sorted(LEAVES)]),
        ("*.experts.1?.up_proj", [f"{E.format(*place)}.up_proj" for place in ((0, 9), (1, 8), (1, 9))]),
        (r"model\.layers\.1\.mlp\.experts\.[12]\.down_proj", [f"{E.format(1, n)}.down_proj" for n in (0, 1)]),
        (r"re:.*\.experts\.3$", [E.format(0, 2)]),
    ],
)  # fmt: skip
def test_a_pattern_that_would_fit_others_becomes_the_names_that_it_fitted(entry: str, fitted: list[str]) -> None:
    assert after(["lm_head", entry]) == ["lm_head", *fitted]


def test_a_list_with_an_entry_for_each_expert_of_any_layer_gets_shorter(tmp_path: Path) -> None:
    """GPTQ's: names within a layer, one list for the modules that are quantised together."""
    named = [f"mlp.experts.{expert}.up_proj" for expert in range(12)]
    assert after({"modules_in_block_to_quantize": [named]}) == {"modules_in_block_to_quantize": [named[:10]]}


@pytest.mark.parametrize("entry", ["mlp.experts.3", "experts.10.up_proj"])
def test_the_end_of_a_name_of_some_expert_in_every_layer_is_refused(entry: str) -> None:
    with pytest.raises(UnsupportedModelError) as refusal:
        after({"ignore": [entry]})
    assert str(refusal.value) == (
        f"mine: its quantisation names experts by {entry!r}, which would fit others; name modules one by one."
    )


@pytest.mark.parametrize("key", [r"+:.*experts\.3\..*", r"-:.*\.experts\.[0-4]\.", "*.experts.11.*"])
def test_patterns_as_keys_are_refused(key: str) -> None:
    with pytest.raises(UnsupportedModelError, match="its quantisation names experts by"):
        after({"dynamic": {key: {"bits": 8}}})


def test_a_pattern_that_is_none() -> None:
    with pytest.raises(UnsupportedModelError, match=r"^mine: .* pattern 're:\*gate', which is no regular expression"):
        after(["re:*gate"])


def test_in_a_checkpoint(tmp_path: Path) -> None:
    """Kept of 8: 0 2 3 5 6 7."""
    about = {"quant_method": "x", "ignore": [r"re:.*layers\.0.*experts\.3\.w1", "*.gate"]}
    source = write_changed("mixtral", tmp_path / "source", companions(*FORMATS["fp8"]), quantization_config=about)
    edited(source, tmp_path / "out", six)
    raw = json.loads((tmp_path / "out/config.json").read_text())
    assert raw["quantization_config"]["ignore"] == ["model.layers.0.block_sparse_moe.experts.2.w1", "*.gate"]
