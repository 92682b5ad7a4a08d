"""Outputs side by side: figures are their records', and what cannot stand beside each other is refused by name."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_folder, token_ids, write_token_file

import compressor
from compressor import CheckpointError, EvaluationError, RecipeError
from compressor.run import pipeline
from compressor.run.side_by_side import _difference

Json = dict[str, Any]
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and two outputs: with six experts and with four. Never write into it."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny_folder("mixtral"), folder / "model")
    for name, seed in (("first", 1), ("second", 2)):
        write_token_file(folder / f"{name}.jsonl", token_ids(6, 24, seed=seed).tolist())
    for keep in (6, 4):
        compressor.compress(recipe(folder, keep), output=folder / f"keep{keep}")
    return folder


def recipe(folder: Path, keep: int, texts: tuple[str, ...] = ("first", "second")) -> Json:
    return {
        "model": str(folder / "model"),
        "calibration": {"data": [{"tokens": str(folder / "first.jsonl"), "samples": 4}]},
        "passes": [{"expert_pruning": {"keep": keep}}],
        "evaluate": {"perplexity": [{"tokens": str(folder / f"{name}.jsonl")} for name in texts]},
    }


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Folder:
    """A copy of an output, to spoil."""
    return lambda name: Path(shutil.copytree(made / name, tmp_path / name))


def record_of(folder: Path) -> Json:
    return dict(json.loads((folder / "compressor" / "record.json").read_text()))


def change(folder: Path, at: str, value: Any) -> None:
    record = inner = record_of(folder)
    *keys, last = at.split(".")
    for key in keys:
        inner = inner[int(key) if key.isdecimal() else key]
    inner[int(last) if last.isdecimal() else last] = value
    (folder / "compressor" / "record.json").write_text(json.dumps(record))


def test_figures_are_those_of_records(made: Path) -> None:
    found = compressor.compare([made / "keep4", made / "keep6"])
    assert json.loads(json.dumps(found)) == found
    assert [one["name"] for one in found["outputs"]] == ["keep4", "keep6"]
    for one in found["outputs"]:
        evaluation = record_of(Path(one["folder"]))["evaluation"]
        num_bytes = (Path(one["folder"]) / "model.safetensors").stat().st_size
        assert one["bytes"] == num_bytes
        assert one["bits"] == 8 * num_bytes / evaluation["before"]["size"]["parameters"]
        assert one["fidelity"] == evaluation["fidelity"]
        by_text = evaluation["fidelity"].values()
        assert one["mean"]["kl"] == pytest.approx(sum(text["kl"] for text in by_text) / 2)
        assert one["mean"]["kl_error"] == pytest.approx(math.sqrt(sum(text["kl_error"] ** 2 for text in by_text)) / 2)
        assert one["methods"] == ["expert_pruning"]
    original = found["original"]
    assert original["bits"] == 8 * (made / "model" / "model.safetensors").stat().st_size / original["parameters"]
    assert original["bits"] == pytest.approx(32, rel=0.05)  # float32, and names


def test_the_front(made: Path, folder: Folder) -> None:
    """One that is larger and farther from the original than another is not on it."""
    worse = folder("keep6")
    for text in ("first", "second"):
        change(worse, f"evaluation.fidelity.{text}.kl", 50.0)
    found = compressor.compare([made / "keep4", made / "keep6", worse])
    assert [one["on_front"] for one in found["outputs"]] == [True, True, False]
    assert [one["name"] for one in found["outputs"]][1:] == [str(made / "keep6"), str(worse)]  # two of one name


def test_errors_are_paired() -> None:
    """Ten documents, of which three became right and one wrong: 0.2 ± √((0.4 − 0.04) / 10)."""
    found = _difference(gained=3, lost=1, both_right=4, both_wrong=2, p_value=0.6)
    assert found == {"difference": 0.2, "error": pytest.approx(math.sqrt(0.036))}


REFUSED: dict[str, tuple[str, Any, type[Exception], str]] = {
    "text": ("evaluation.text.1.fingerprint", "sha256:other", EvaluationError, "its text is first sha256:"),
    "original": ("model.fingerprint", "sha256:other", EvaluationError, "the original's fingerprint is sha256:other,"),
    "tasks": (
        "evaluation.after.tasks",
        {"arc": {"name": "arc", "fingerprint": "sha256:arc"}},
        EvaluationError,
        "what its tasks asked is arc sha256:arc, that of ",
    ),
    "live": ("model.fingerprint", None, CheckpointError, "its original was a live model"),
    "bytes": ("evaluation.after.bytes_on_disk", 7, CheckpointError, "its weights are other files than those that"),
    "not measured": ("evaluation", None, CheckpointError, "its record has no `evaluation` beside its original"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compared_is_named(case: str, made: Path, folder: Folder) -> None:
    at, value, kind, says = REFUSED[case]
    spoilt = folder("keep6")
    change(spoilt, at, value)
    with pytest.raises(kind) as error:
        compressor.compare([made / "keep4", spoilt])
    assert str(error.value).startswith(f"{spoilt}: {says}")
    assert "--recipe, --against" in str(error.value)


def test_folders_that_are_none(made: Path, folder: Folder) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        compressor.compare([made / "nothing"])
    with pytest.raises(CheckpointError, match=r"model: it has no compressor/record\.json; "):
        compressor.compare([made / "model"])
    spoilt = folder("keep6")
    (spoilt / "compressor" / "record.json").write_text("{")
    with pytest.raises(CheckpointError, match="it cannot be read as a record"):
        compressor.compare([spoilt])
    for settings in ({"against": "demo"}, {"without": ["wanda"]}, {"overrides": ["seed=1"]}):
        with pytest.raises(RecipeError, match="go together"):
            compressor.compare([made / "keep6"], **settings)


def test_folders_without_a_record_are_measured_and_their_original_once(
    made: Path, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no other one."""
    bare, asked, measured = [folder("keep6"), folder("keep4")], [], pipeline._alone_measured
    original = str(made / "model")
    alone = [compressor.evaluate(recipe(made, 6), str(one), against=original)["evaluation"] for one in bare]

    def watched(job: Any, *arguments: Any, **how: Any) -> Any:
        asked.append(job.recipe.model)
        return measured(job, *arguments, **how)

    monkeypatch.setattr(pipeline, "_alone_measured", watched)
    for one in bare:
        shutil.rmtree(one / "compressor")
    found = compressor.compare([made / "keep4", *bare], recipe=recipe(made, 6), against=original)
    assert asked == [original, *map(str, bare)]
    before = compressor.compare([made / "keep4", made / "keep6"])["outputs"]
    assert found["outputs"][0] == before[0] | {"name": str(made / "keep4")}
    assert [one["methods"] for one in found["outputs"][1:]] == [[], []]
    assert [one["fidelity"] for one in found["outputs"][1:]] == [one["fidelity"] for one in alone]


def test_records_of_other_text_are_measured_again(made: Path, folder: Folder) -> None:
    """Where the recipe that measures another folder has less text."""
    bare = folder("keep6")
    shutil.rmtree(bare / "compressor")
    found = compressor.compare([made / "keep4", bare], recipe=recipe(made, 6, ("second",)), against=str(made / "model"))
    assert [list(one["fidelity"]) for one in found["outputs"]] == [["second"], ["second"]]
    assert found["outputs"][0]["methods"] == ["expert_pruning"]
    kept = [record_of(made / name)["evaluation"]["fidelity"]["second"]["kl"] for name in ("keep4", "keep6")]
    assert [one["mean"]["kl"] for one in found["outputs"]] == pytest.approx(kept, rel=1e-3)


def test_a_record_of_a_newer_version_is_refused_by_name(folder: Folder) -> None:
    spoilt = folder("keep4")
    change(spoilt, "format", 3)
    with pytest.raises(
        CheckpointError, match=r"keep4/compressor/record\.json: it is a record of format 3; this version"
    ):
        compressor.compare([spoilt])


def test_the_command(made: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    folders, page = (made / "keep4", made / "keep6"), tmp_path / "page.html"
    answer = cli("compare", *folders, "--page", page)
    assert (answer.status, answer.err) == (0, "")
    assert "keep4 *" in answer.out
    assert "data-chart='" in page.read_text()
    assert json.loads(cli("compare", *folders, "--json").out) == compressor.compare(folders)
    assert "error: " + str(tmp_path) in cli("compare", *folders, "--page", tmp_path).err
