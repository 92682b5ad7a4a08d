"""Files of other tools, by hand: what each form says, and why each bad one is refused."""

from __future__ import annotations

import base64
import io
import json
import pickle
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from compressor.model.structure import MoELayer
from compressor.plugin import OptionError
from compressor_kept_experts import KeptExperts, KeptExpertsOptions


def layer(number: int, num_experts: int = 4, **changes: Any) -> MoELayer:
    told = {"path": f"model.layers.{number}.mlp", "num_experts": num_experts, "top_k": 2, "num_groups": 1}
    return MoELayer.described({**told, "num_chosen_groups": 1, "parameters_per_expert": 1, **changes})


DENSE_FIRST = [layer(1), layer(2)]
"""Of a model whose decoder layer 0 has no experts."""
KEPT = [[0, 2], [1, 2, 3]]


def kept(
    tmp_path: Path, data: Any, name: str = "ids.json", *, layers: Any = DENSE_FIRST, **options: Any
) -> list[list[int]]:
    """What stays by a file of ids, from `check` and `decide`, which must agree."""
    file = tmp_path / name
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    return _decided(KeptExpertsOptions(file=file, **options), layers)


def chosen(file: Path, keep: int = 2, *, layers: Any = DENSE_FIRST) -> list[list[int]]:
    return _decided(KeptExpertsOptions(counts=file, keep=keep), layers)


def _decided(options: KeptExpertsOptions, layers: Any) -> list[list[int]]:
    method = KeptExperts(options)
    method.model = "owner/Some-MoE"
    plan = method.check(layers)
    decided = method.decide(layers, {})["layers"]  # type: ignore[arg-type]
    found = [decided[one.path]["kept"] for one in layers]
    assert [one.num_experts for one in plan.layers] == [len(ids) for ids in found]
    for one, ids in zip(layers, found, strict=True):
        assert sorted([*ids, *decided[one.path]["dropped"]]) == list(range(one.num_experts))
    return found


@pytest.mark.parametrize(
    "data",
    [
        {"1": [2, 0], "2": [1, 2, 3]},
        {"0": [], "1": [0, 2], "2": [1, 2, 3]},
        {"0": [0, 2], "1": [1, 2, 3]},  # by place: there is no experts' layer 0
        {"model.layers.1.mlp": [0, 2], "model.layers.2.mlp": [1, 2, 3]},  # llm-compressor's report_path
        {"language_model.layers.1.mlp.experts": [0, 2], "language_model.layers.2.mlp.experts": [1, 2, 3]},
        {"layer_1": [0, 2], "layer_2": [1, 2, 3], "seed": 3},
        [[0, 2], [1, 2, 3]],
        [None, [0, 2], [1, 2, 3]],
        {"model": "mirror/some-moe", "kept": {"1": [0, 2], "2": [1, 2, 3]}},
        {"dropped": {"1": [1, 3], "2": [0]}},
        {"layers": {"1": {"kept": [0, 2], "dropped": [1, 3]}, "2": {"kept": [1, 2, 3]}}},
        {
            "schema_version": 1,
            "layers": [
                {"layer": 2, "original_expert_count": 4, "retained_expert_ids": [1, 2, 3], "pruned_expert_ids": [0]},
                {"layer": 1, "original_expert_count": 4, "retained_expert_ids": [0, 2], "pruned_expert_ids": [1, 3]},
            ],
        },
    ],
)
def test_forms_of_kept_ids(tmp_path: Path, data: Any) -> None:
    assert kept(tmp_path, data) == KEPT


def test_pruneset_of_hope(tmp_path: Path) -> None:
    """Ids that go, by place among the MoE layers; which is to be said, since nothing in the file says so."""
    data = {"0": [1, 3], "1": [0]}
    assert kept(tmp_path, data, "pruneset.json", ids="dropped") == KEPT
    with pytest.raises(OptionError, match="a pruneset of HOPE holds the ids that go: say `ids: dropped`"):
        kept(tmp_path, data, "pruneset.json")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"1": [0, 2]}, "names the layers 1, and the MoE layers are 1, 2"),
        ({"1": [0, 1], "2": [0, 1], "3": [0, 1]}, "names the layers 1, 2, 3, and the MoE layers are 1, 2"),
        ({"1": [0, 0], "2": [1]}, "model.layers.1.mlp: it names the expert 0 twice"),
        ({"1": [0, 4], "2": [1]}, "it names the expert 4, and ids go from 0 to 3"),
        ({"1": [0, -1], "2": [1]}, "it names the expert -1"),
        ({"1": [0, True], "2": [1, 2]}, r"expected a list of expert ids, found \[0, true\]"),
        ({"1": "0,1", "2": [1, 2]}, "expected a list of expert ids, found 0,1"),
        ({"1": [0, 1, 2, 3], "2": [0, 1, 2, 3]}, "keeps every expert of every layer, so nothing would change"),
        ({"1": [0], "2": [0, 1]}, "model.layers.1.mlp: cannot keep 1 experts: each token chooses 2"),
        ({"1": [0, 1], "model.layers.1.mlp": [2, 3]}, "it names layer 1 twice"),
        ('{"1": [0, 1], "2": [0, 1], "1": [2, 3]}', "it has the key 1 twice"),
        ([{"layer": 1, "kept": [0, 1]}, {"layer": 1, "kept": [0, 1]}], "it names a layer twice"),
        (
            {"model": "other/Another-MoE", "kept": {"1": [0, 2], "2": [1, 2]}},
            "is of other/Another-MoE, and this is owner/",
        ),
        ({"layers": [{"layer": 1, "num_experts": 128, "kept": [0, 1]}]}, "layers of 128 experts, and these have 4"),
        ({"layers": [{"layer": 1, "num_experts": [4], "kept": [0, 1]}]}, r"layers of \[4\] experts, and these have 4"),
        ({"9" * 5000: [0, 1], "2": [1, 2]}, "expected layers by number or path"),
        ('{"1": [0, %s], "2": [1, 2]}' % ("9" * 5000), "it is no JSON: Exceeds the limit"),
        ({"layers": [{"layer": 1, "experts": [0, 1]}]}, "expected ids under a key such as kept or dropped"),
        ({"recipe": {"sparsity": 0.5}}, "expected layers by number or path"),
        ({}, "expected layers by number or path"),
        ("3", "expected layers, found 3"),
        ('{"1": [0', "it is no JSON"),
        ({"passes": []}, "a decision of this library; `compressor apply` takes it"),
    ],
)
def test_bad_ids_are_refused(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        kept(tmp_path, data)
    assert caught.value.option == "file"
    assert str(caught.value).startswith(str(tmp_path)) or "cannot keep" in message


def test_what_file_and_option_say_differently(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="it calls its ids kept, and `ids` dropped"):
        kept(tmp_path, {"kept": {"1": [0, 1], "2": [0, 1]}}, ids="dropped")


def test_groups_keep_equally_many(tmp_path: Path) -> None:
    grouped = [layer(0, 8, num_groups=2, num_chosen_groups=1)]
    assert kept(tmp_path, {"0": [0, 1, 4, 7]}, layers=grouped) == [[0, 1, 4, 7]]
    with pytest.raises(OptionError, match=r"its 2 groups must keep equally many, found \[3, 1\]"):
        kept(tmp_path, {"0": [0, 1, 2, 7]}, layers=grouped)
    file = tmp_path / "counts.json"
    file.write_text(json.dumps({"0": [9, 8, 7, 6, 0, 1, 2, 3]}))
    assert chosen(file, 4, layers=grouped) == [[0, 1, 6, 7]]
    with pytest.raises(OptionError, match="the groups need equally many"):
        chosen(file, 5, layers=grouped)


def test_layers_of_one_number_are_told_by_path(tmp_path: Path) -> None:
    """As in composites, whose towers both have a layer 0."""
    both = [layer(0, path="vision.layers.0.mlp"), layer(0, path="text.layers.0.mlp")]
    by_path = {"text.layers.0.mlp": [0, 1], "vision.layers.0.mlp": [2, 3]}
    assert kept(tmp_path, by_path, layers=both) == [[2, 3], [0, 1]]
    with pytest.raises(
        OptionError, match=r"tells no layer of this model from another; name them by path, such as vision"
    ):
        kept(tmp_path, {"0": [0, 1], "1": [0, 1]}, layers=both)


COUNTS = [[[5, 1, 1, 0], [0, 0, 3, 3]], [[0, 1, 1, 9], [0, 2, 0, 0]]]
"""Two steps of two layers of four experts: in all 5, 2, 2, 9 and 0, 2, 3, 3."""
ROUTED = [[[0, 3], [2, 3]], [[3, 1], [2, 1]], [[0, 1], [3, 2]]]
"""Three tokens, two layers, two chosen: 0, 1 and 3 twice in the first, so the lower ids stay; 2 and 3 in the second."""


def npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.asarray(array))
    return stream.getvalue()


def sent(array: Any) -> str:
    """As vLLM's server sends it."""
    return base64.b64encode(npy(array)).decode()


def with_dense(array: Any) -> Any:
    """The same with a row of nothing for decoder layer 0."""
    found = np.asarray(array)
    return np.concatenate([np.zeros_like(found[:, :1]), found], axis=1)


@pytest.mark.parametrize("array", [COUNTS, with_dense(COUNTS).tolist(), np.sum(COUNTS, axis=0).tolist()])
def test_logical_count(tmp_path: Path, array: Any) -> None:
    (tmp_path / "counts.json").write_text(json.dumps({"logical_count": array, "rank": 0}))
    assert chosen(tmp_path / "counts.json") == [[0, 3], [2, 3]]
    assert chosen(tmp_path / "counts.json", 3) == [[0, 1, 3], [1, 2, 3]]  # 1 and 2 are as often chosen: the lower id
    (tmp_path / "counts.npy").write_bytes(npy(array))
    assert chosen(tmp_path / "counts.npy") == [[0, 3], [2, 3]]


@pytest.mark.parametrize("array", [ROUTED, with_dense(ROUTED).tolist()])
def test_routed_experts(tmp_path: Path, array: Any) -> None:
    forms = {
        "plain.json": json.dumps(array),
        "named.json": json.dumps({"routed_experts": array}),
        "sent.json": json.dumps(
            {"choices": [{"routed_experts": sent(array[:1])}, {"routed_experts": sent(array[1:])}]}
        ),
    }
    for name, text in forms.items():
        (tmp_path / name).write_text(text)
        assert chosen(tmp_path / name) == [[0, 1], [2, 3]], name
    (tmp_path / "one.npy").write_bytes(npy(array))
    np.savez(tmp_path / "several.npz", routed_experts=array, prompt=np.zeros(3))
    assert chosen(tmp_path / "one.npy") == chosen(tmp_path / "several.npz") == [[0, 1], [2, 3]]


def test_figures_by_layer(tmp_path: Path) -> None:
    """Scores of one's own; they may be negative."""
    (tmp_path / "scores.json").write_text(json.dumps({"1": [-1, -2.5, -0.5, -1], "2": [0, 1, 2, 3]}))
    assert chosen(tmp_path / "scores.json") == [[0, 2], [2, 3]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"logical_count": [[1, 2, 3], [1, 2, 3]]},
            r"its shape is \[2, 3\]; expected counts \[.., layers, 4\] or chosen",
        ),
        ({"logical_count": [1, 2, 3, 4]}, r"its shape is \[4\]"),
        ({"logical_count": [[1, 2, 3, -4], [1, 2, 3, 4]]}, "a count is negative"),
        ({"logical_count": [[1, 2], [1]]}, "expected an array, as nested lists of equal length"),
        ({"logical_count": [[1, 2, 3, 4]] * 4}, "names the layers 0, 1, 2, 3, and the MoE layers are 1, 2"),
        ({"logical_count": [["a", "b", "c", "d"]] * 2}, "expected numbers of tokens or ids"),
        ({"routed_experts": [[[0, 4], [1, 2]]]}, "names an expert outside of 0 to 3"),
        ({"routed_experts": [[[1, 1], [1, 2]]]}, "a token names an expert twice"),
        ({"routed_experts": "not base64!"}, "expected an array"),
        ({"choices": [{"text": "no"}]}, "expected `routed_experts` of every choice"),
        ({"choices": []}, "expected `routed_experts` of every choice"),
        ({"logical_count": [[0, 0, 0, 0], [1, 2, 3, 4]]}, "model.layers.1.mlp: it counts no token there"),
        ({"1": [1, 2, 3], "2": [1, 2, 3, 4]}, r"model.layers.1.mlp: expected 4 numbers, found \[1, 2, 3\]"),
        ('{"1": [1, 2, NaN, 4], "2": [1, 2, 3, 4]}', r"model.layers.1.mlp: expected 4 numbers"),
        ({"1": [1, 2, 3, 10**400], "2": [1, 2, 3, 4]}, r"model.layers.1.mlp: expected 4 numbers"),
        ({"1": [0, 0, 0, 0], "2": [1, 2, 3, 4]}, "model.layers.1.mlp: it counts no token there"),
    ],
)
def test_bad_figures_are_refused(tmp_path: Path, data: Any, message: str) -> None:
    (tmp_path / "counts.json").write_text(data if isinstance(data, str) else json.dumps(data))
    with pytest.raises(OptionError, match=message) as caught:
        chosen(tmp_path / "counts.json")
    assert caught.value.option == "counts"


def test_arrays_that_cannot_be_read(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "two.npz", a=np.zeros(2), b=np.zeros(2))
    np.savez(tmp_path / "objects.npz", logical_count=np.array([{}], dtype=object))
    (tmp_path / "cut.npy").write_bytes(npy(ROUTED)[:60])
    (tmp_path / "cut.npz").write_bytes((tmp_path / "two.npz").read_bytes()[:60])
    for name, message in (
        ("cut.npz", "it is not what NumPy saves"),
        ("objects.npy", "objects in it are pickled"),
        ("objects.npz", "logical_count: Object arrays cannot be loaded"),
        ("two.npz", "expected logical_count or routed_experts, or one array, found a, b"),
        ("cut.npy", "it is not what NumPy saves"),
        ("none.npy", "it cannot be read: No such file"),
    ):
        with pytest.raises(OptionError, match=message):
            chosen(tmp_path / name)


def test_layers_that_differ_have_no_one_array(tmp_path: Path) -> None:
    (tmp_path / "counts.npy").write_bytes(npy(COUNTS))
    with pytest.raises(OptionError, match="differ in experts or choices, so no one array is of all"):
        chosen(tmp_path / "counts.npy", layers=[layer(1), layer(2, 6)])


class Trap:
    """Whoever unpickles it is told."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("it was unpickled",)


@pytest.mark.parametrize("name", ["ids.pt", "ids.pkl", "ids.json", "zipped.json"])
def test_a_pickle_is_never_opened(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    if name == "zipped.json":
        torch.save({"0": Trap()}, file)
    else:
        file.write_bytes(pickle.dumps(Trap()))
    for options in ({"file": file}, {"counts": file, "keep": 2}):
        with pytest.raises(OptionError, match="it is a pickle, which can run any code and is never opened here"):
            _decided(KeptExpertsOptions(**options), DENSE_FIRST)  # type: ignore[arg-type]


def test_observations_of_hope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "observations.h5"
    file.write_bytes(b"\x89HDF\r\n\x1a\n")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(OptionError, match="HDF5 is read by h5py, which is not installed: `pip install h5py`"):
        chosen(file)

    def counts(*chosen: int) -> dict[str, Any]:
        return {"coselect_counts": np.diag(chosen) + 1, "total_tokens": np.array(3)}

    tasks: dict[str, Any] = {
        "code": {"layer_0": counts(5, 0, 0, 1), "layer_1": counts(0, 0, 0, 2), "layer_0-layer_1": {}},
        "prose": {"layer_0": counts(0, 4, 0, 9), "layer_1": counts(3, 0, 0, 2)},
    }

    @contextmanager
    def opened(path: Path, mode: str) -> Any:
        assert (path, mode) == (file, "r")
        yield tasks

    monkeypatch.setitem(sys.modules, "h5py", SimpleNamespace(File=opened))
    assert chosen(file) == [[0, 3], [0, 3]]
    tasks["prose"].pop("layer_1")
    tasks["code"]["layer_1"] = counts(1, 2, 3)
    with pytest.raises(OptionError, match=r"model.layers.2.mlp: expected 4 numbers"):
        chosen(file)
    tasks["prose"]["layer_1"] = {"norm_sums": np.zeros(4)}
    with pytest.raises(OptionError, match="it is not what HOPE observes"):
        chosen(file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of `file` .* and `counts`"),
        ({"file": "a", "counts": "b", "keep": 2}, "give one of `file`"),
        ({"counts": "b"}, "`counts` and `keep` go together"),
        ({"file": "a", "keep": 2}, "`counts` and `keep` go together"),
        ({"counts": "b", "keep": 2, "ids": "kept"}, "`ids` says what a `file` of ids holds"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KeptExpertsOptions(**options)
