"""Every routed-expert architecture of the installed transformers: found by code, so a newer one extends the test.

Each push finds the structure of all `REPRESENTATIVES` and runs every check on some. The structure of all types, and all
checks on all of them in both dtypes, are nightly tests (`nightly.py` says when they run).
"""

from __future__ import annotations

import re
from pathlib import Path

import nightly
import pytest
import tiny_models
import torch
import transformers
from architectures_table import row, structure_cells

from compressor import UnsupportedModelError
from compressor.model.find_structure import find_structure
from compressor.model.structure import Structure
from compressor.testing.checks import check_model
from compressor.testing.tiny import (
    answers,
    auto_class,
    candidate_types,
    model_class,
    tiny_config,
    tiny_inputs,
    tiny_model,
)

TABLE = Path(__file__).parents[2] / "docs" / "architectures.md"

REPRESENTATIVES = {
    "mixtral": "softmax over the chosen; stacked in memory, one tensor per expert on disk",
    "qwen2_moe": "not renormalised: dropping an expert changes every token; a shared expert with a gate",
    "phimoe": "no closed rule; two experts whatever the config says",
    "deepseek_v2": "groups without a bias, dense layers before those with experts",
    "deepseek_v3": "groups, and a bias that only chooses, in float32; padded",
    "deepseek_v4": "experts looked up by token in some layers",
    "gpt_oss": "biases of experts and of the router's linear map; stacked on disk",
    "dbrx": "all experts in one flat dimension, counted in a part of the config; the block chooses",
    "ernie4_5_moe": "a bias whose second dimension is the experts'",
    "gemma4": "no block of its own; layers of several kinds, a composite whose language model counts",
    "jetmoe": "two blocks in a layer, which sort pairs of tokens and experts",
    "llama4_text": "every expert runs every token, its input scaled",
    "longcat_flash": "choices that are no experts; a router that does not call its linear map",
    "minimax_m2": "the bias lives on the block",
    "switch_transformers": "experts in a list, one per token by a mask; encoder and decoder",
    "zaya": "a router that reads the config while it runs, top-1, one row more than experts",
}
"""What makes a representative: each stands for a way to dispatch, to route, to store or to count that no other of these
has. `traits` names those that can be seen in a structure; a type with another fails a test until it, or one like it, is
added here.
"""

IN_PARTS = (
    *("qwen2_moe", "phimoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "dbrx", "ernie4_5_moe", "llama4_text"),
    *("minimax_m2", "zaya"),
)
"""Representatives that tests/model, tests/edit and tests/expert_pruning look at part by part at each push, or that are
`IN_HALF`; every check of them is nightly.
"""

IN_HALF = ("deepseek_v3", "gpt_oss")
"""Representatives for bfloat16 at each push: what stays in float32 there, biases that are rounded."""

REFUSED = {
    "nllb-moe": "does not run the experts that its router chose",
    "qwen3_omni_moe": "has no forward",
}
"""Types with routed experts that are refused, and a part of the reason."""

WITHOUT_EXPERTS = ("no routed experts", "cannot tell how many", "Class validation error", "negative dimension")
"""How a candidate without routed experts is refused; or that no tiny config can be made of it."""

BROKEN_UPSTREAM = {("llama4", "5.24.0"): "image_outputs"}
"""(type, transformers) → a part of the error with which its forward fails on text alone."""

FAILS_UPSTREAM = {"longcat_flash": {"top-k lowered"}}
"""Its experts lose a dimension where a token chooses one expert; the tiny model chooses two."""

CENSUS = ("5.23.", 89)
"""Of this transformers the number of types with routed experts is known: each was built with 8 experts and with 16, and
differed as routed experts do.
"""


def structure_of(model_type: str) -> Structure | str:
    """What is found without weights, or why it is refused."""
    try:
        return find_structure(model_class(model_type), tiny_config(model_type))
    except Exception as error:  # a candidate that cannot be made tiny is told by its text, see `WITHOUT_EXPERTS`
        return str(error)


def traits(structure: Structure) -> set[tuple[str, object]]:
    """What the code treats differently in this structure from others."""
    found: set[tuple[str, object]] = {
        ("experts counted in a part of the config", bool(structure.num_experts_leaf.path))
    }
    for layer in structure.layers:
        probe = layer.router_probe
        found |= {(f"bias on the router: {bias.startswith(layer.router)}", 1) for bias in layer.selection_biases}
        found |= {(f"axis {axis.dim}, flat: {axis.stride > 1}", axis.extra > 0) for axis in layer.tensors.values()}
        found |= {
            ("experts are given", probe.call),
            ("the router answers ids", probe.index_position),
            ("the router reads the config", probe.reads_config),
            ("the block can be run", probe.block_runs),
            ("groups", layer.num_groups > 1),
            ("one expert per token", layer.top_k == 1),
            ("top-k is fixed", layer.top_k_fixed),
            ("other choices", layer.num_extra_choices > 0),
            ("experts in a list", layer.is_list),
            ("ids by token", bool(layer.id_tensors)),
            ("can be watched", layer.watch_problem is None),
            ("can be padded", layer.padding_problem is None),
            ("can be asked for more", layer.wider_problem is None),
        }
    return found


@pytest.mark.slow
def test_representatives_are_found_as_the_table_says_and_others_refused():
    rows = rows_of_the_table()
    for name in REPRESENTATIVES:
        structure = structure_of(name)
        assert isinstance(structure, Structure), structure
        if transformers.__version__ == version_of_the_table():
            assert rows[name].startswith(" | ".join(structure_cells(name, structure)[1:])), name
    for name, reason in REFUSED.items():
        assert reason in structure_of(name)


@pytest.mark.nightly
def test_every_type_is_found_as_the_table_says_and_its_traits_have_a_representative():
    found = {name: structure_of(name) for name in candidate_types()}
    structures = {name: one for name, one in found.items() if isinstance(one, Structure)}
    problems = {name: one for name, one in found.items() if isinstance(one, str)}
    for name, reason in REFUSED.items():
        assert reason in problems.pop(name)
    assert [one for one in problems.items() if not any(says in one[1] for says in WITHOUT_EXPERTS)] == []
    routed = sorted([*structures, *REFUSED])
    if transformers.__version__.startswith(CENSUS[0]):
        assert len(routed) == CENSUS[1]
    if transformers.__version__ == version_of_the_table():
        rows = rows_of_the_table()
        assert [name for name in rows if name not in ("type", "---")] == routed
        for name in structures.keys() - {kind for kind, _ in BROKEN_UPSTREAM}:
            assert rows[name].startswith(" | ".join(structure_cells(name, structures[name])[1:])), name
    covered = set().union(*(traits(structures[name]) for name in REPRESENTATIVES))
    new = {name: traits(structure) - covered for name, structure in structures.items()}
    assert {name: left for name, left in new.items() if left} == {}, "REPRESENTATIVES has nothing like it"


@pytest.mark.parametrize("model_type", ["doge", "bamba"])
def test_candidates_without_routed_experts_are_refused_by_name(model_type):
    with pytest.raises(UnsupportedModelError, match=f"^{model_type}: "):
        find_structure(model_class(model_type), tiny_config(model_type))


def passes_every_check(model_type: str, dtype: torch.dtype) -> None:
    model = tiny_model(model_type, dtype=dtype)
    if (model_type, transformers.__version__) in BROKEN_UPSTREAM:
        with pytest.raises(AttributeError, match=BROKEN_UPSTREAM[model_type, transformers.__version__]):
            check_model(model, tiny_inputs(model))
        return
    answers_as_a_language_model_does(model)

    def load(folder):
        return auto_class(model_type).from_pretrained(folder, dtype=dtype)

    report = check_model(model, tiny_inputs(model), load=load)
    failed = {check.name for check in report.failed}
    assert failed == FAILS_UPSTREAM.get(model_type, set()), str(report)
    applies = {check.name for check in report.checks if check.passed}
    assert {"keep all", "removed = masked", "saved"} <= applies, str(report)
    if dtype == torch.float32 and transformers.__version__ == version_of_the_table():
        assert " | ".join(row(model_type, report, model)) in TABLE.read_text(encoding="utf-8")


def answers_as_a_language_model_does(model) -> None:
    """It is small, and says something else at every token, the same each time: so checks compare something."""
    inputs = tiny_inputs(model)
    found = answers(model, inputs)
    assert not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) < 10_000_000
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert found.shape[:2] == (2, 12)
    assert found.isfinite().all()
    assert (found[:, 1:] - found[:, :-1]).abs().amax(dim=-1).min() > 0.02
    assert torch.equal(found, answers(model, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in REPRESENTATIVES if name not in IN_PARTS])
def test_representative_passes_every_check(model_type):
    passes_every_check(model_type, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", IN_HALF)
def test_representative_passes_every_check_in_half_precision(model_type):
    passes_every_check(model_type, torch.bfloat16)


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_passes_every_check(any_type, dtype):
    """On every type: those without experts, and those that are refused, are told apart by the test above."""
    if isinstance(structure_of(any_type), Structure):
        passes_every_check(any_type, dtype)


def pytest_generate_tests(metafunc):
    """Finding all types takes each worker seconds, before its first test: only where they are run."""
    if "any_type" in metafunc.fixturenames:
        metafunc.parametrize("any_type", candidate_types() if nightly.may_run(metafunc.config) else [])


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "dtype"), [("mixtral4", "float32"), ("deepseek4", "bfloat16")])
def test_remote_code_with_experts_in_a_list(name, dtype):
    model = tiny_models.tiny_model(name, dtype)
    inputs = {"input_ids": tiny_models.token_ids(2, 12)}
    check_model(model, inputs, trust_remote_code=True).raise_for_failures()


def version_of_the_table() -> str:
    return re.search(r"transformers (\S+)", TABLE.read_text(encoding="utf-8"))[1]


def rows_of_the_table() -> dict[str, str]:
    """type → the cells behind it."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    return dict(line.removeprefix("| ").split(" | ", 1) for line in lines if line.startswith("| "))
