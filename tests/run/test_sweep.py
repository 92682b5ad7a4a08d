"""Several totals of one pass: observed once, each decided and measured as a run of its own is; nothing else written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import small_mixtral, token_ids, write_checkpoint, write_token_file

import compressor
from compressor import CheckpointError, RecipeError
from compressor.checkpoint.resume_state import ObservationJournal
from compressor.report.comparison import comparison_tables
from compressor.run import pipeline

Json = dict[str, Any]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and text: to calibrate, and two to measure. Never write into it."""
    folder = tmp_path_factory.mktemp("sweep")
    write_checkpoint(small_mixtral(max_position_embeddings=32), folder / "model")
    for seed, name in enumerate(("calibration", "first", "second")):
        write_token_file(folder / f"{name}.jsonl", token_ids(6, 24, seed=seed).tolist())
    return folder


def recipe(folder: Path, keep: Any = 6, **options: Any) -> Json:
    return {
        "model": str(folder / "model"),
        "calibration": {"batch_size": 3, "data": [{"tokens": str(folder / "calibration.jsonl")}]},
        "passes": [{"expert_pruning": {"keep": keep, **options}}],
        "evaluate": {"perplexity": [{"tokens": str(folder / f"{name}.jsonl")} for name in ("first", "second")]},
    }


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def without_sizes(found: Json) -> list[Json]:
    """In memory all weights have one dtype, on disk they are as they are stored, with headers."""
    return [{key: value for key, value in one.items() if key not in ("bytes", "bits")} for one in found["outputs"]]


def same_as_a_run(row: Json, asked: Json) -> None:
    """A run of this total alone records the same: under a mask as with experts removed."""
    [name] = asked["passes"][0]
    asked["passes"] = [{name: {**asked["passes"][0][name], "keep": row["keep"]}}]
    record = compressor.compress(asked).record
    decided = record["passes"][0]["decision"]["layers"]
    assert row["counts"] == {path: len(one["kept"]) for path, one in decided.items()}
    assert row["experts"] == sum(row["counts"].values())
    assert row["parameters"] == record["evaluation"]["after"]["size"]["parameters"]
    for text, recorded in record["evaluation"]["fidelity"].items():
        for figure, value in recorded.items():
            expected = pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value
            assert row["fidelity"][text][figure] == expected


def test_memory_and_disk_alike_and_as_runs_record(shared: Path, tmp_path: Path) -> None:
    asked = recipe(shared, {"mean": 6, "min": 3}, measured_counts=2, choose="given")
    found = compressor.sweep(asked, [4, 0.75])
    assert [(one["name"], one["keep"]) for one in found["outputs"]] == [
        ("keep 0.75", {"mean": 0.75, "min": 3}),
        ("keep 4", {"mean": 4, "min": 3}),
    ]
    assert [one["experts"] for one in (found["original"], *found["outputs"])] == [16, 12, 8]
    same_as_a_run(found["outputs"][1], recipe(shared, **asked["passes"][0]["expert_pruning"]))
    for row in found["outputs"]:
        said = f"would lose {row['even']['summed_kl']:.4g} instead of {row['summed_kl']:.4g} (layers added up)."
        assert f"{row['experts'] // 2} experts in every layer, which every engine reads, {said}" in found["notes"]
    lost = {text: sum(row["fidelity"][text]["kl"] for row in found["outputs"]) for text in ("first", "second")}
    worst_first = sorted(lost, key=lambda text: -lost[text])
    assert [*comparison_tables(found)[1].headings] == ["output", *worst_first]
    page = tmp_path / "page.html"
    from_disk = compressor.sweep(asked, [4, 0.75], overrides=["weights=disk"], output=page)
    assert without_sizes(from_disk) == without_sizes(found)
    assert names(tmp_path) == ["page.html", "page.json"]
    assert json.loads(page.with_suffix(".json").read_text()) == from_disk
    assert all(f'"{name}"' in page.read_text() for name in ("keep 0.75", "keep 4"))


@pytest.mark.parametrize(
    "options",
    [
        {"replace": "measured"},
        pytest.param({"criterion": "reap"}, marks=pytest.mark.nightly),
        pytest.param({"search": "greedy", "ranks": 8}, marks=pytest.mark.nightly),
        pytest.param({"criterion": "mone", "blend": "worst"}, marks=pytest.mark.nightly),
    ],
)
def test_every_way_of_choosing(options: Json, shared: Path) -> None:
    found = compressor.sweep(recipe(shared, 6, **options), [6, 4])
    same_as_a_run(found["outputs"][0], recipe(shared, **options))


def test_all_sets_for_some_totals_and_a_search_for_others(shared: Path) -> None:
    """Of 8 experts there are 28 sets of 6 and 70 of 4."""
    found = compressor.sweep(recipe(shared, 6, max_subsets=30), [4, 6])
    searched = compressor.sweep(recipe(shared, 6, search="greedy"), [4, 6])
    assert [one["counts"] for one in found["outputs"]] == [one["counts"] for one in searched["outputs"]]
    same_as_a_run(found["outputs"][0], recipe(shared, max_subsets=30))


def test_a_live_model_is_left_as_it_is_and_calibration_text_is_named(shared: Path) -> None:
    asked = recipe(shared) | {"evaluate": None}
    model = small_mixtral(max_position_embeddings=32)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    found = compressor.sweep(asked, [6], model)
    assert [one["name"] for one in found["text"]] == ["calibration"]
    assert found["notes"] == ["This is calibration text, by which was decided: other text loses more."]
    assert all(bool((one == before[name]).all()) for name, one in model.state_dict().items())
    assert "page" not in found


def test_chance_beside_it(shared: Path) -> None:
    asked = recipe(shared)
    asked["evaluate"]["random"] = 2
    found = compressor.sweep(asked, [5, 6])
    assert re.fullmatch(r"KL grows ×\d\.\d\d from 12 to 10 experts\.", found["notes"][0])
    assert re.fullmatch(r"As many experts by chance lose \S+ at 12, \S+ at 10 \(KL, median\)\.", found["notes"][1])
    row = found["outputs"][1]
    assert len(row["random"]) == 2
    recorded = compressor.compress(recipe(shared, 5) | {"evaluate": asked["evaluate"]}).record["passes"][0]["random"][
        "kl"
    ]
    means = [sum(one) / 2 for one in zip(*(recorded[text]["random"] for text in ("first", "second")), strict=True)]
    assert row["random"] == pytest.approx(means, rel=1e-4)


def test_a_pass_behind_says_what_can_be(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare mean may let experts answer constants, but not where weights are edited behind it."""
    asked = recipe(shared, {"mean": 6})
    monkeypatch.setattr(pipeline, "_swept", lambda job, subject, totals, folder: {"notes": [], "totals": totals})
    for behind, replace in (([], None), ([{"wanda": {"pattern": "2:4"}}], "none")):
        found = compressor.sweep({**asked, "passes": [*asked["passes"], *behind]}, [6, 5])
        assert [total.resolved.method.options.replace for total in found["totals"]] == [replace, replace]
        assert all(len(total.loaded.passes) == 1 for total in found["totals"])


# What is refused, before any work --------------------------------------------------------------------------


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight is read, and no text but the first sequences."""

    def refuse(*_: Any) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(pipeline, "_read_texts", refuse)
    monkeypatch.setattr(pipeline, "_workpiece", refuse)


@pytest.mark.usefixtures("no_work")
def test_totals_that_cannot_be_are_named_together(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        compressor.sweep(recipe(shared), [9, 6, 1], output=tmp_path / "page.html")
    lines = str(error.value).splitlines()
    assert [line.split()[1] for line in lines] == [f"passes.0.expert_pruning.keep={keep}" for keep in (9, 1)]
    assert "it has 8 experts and cannot keep 9" in lines[0]
    assert lines[1].endswith("The nearest possible count is 2.")
    with pytest.raises(RecipeError, match=r"a mean of 9 is 18 experts in 2 layers, .* nearest possible mean is 8"):
        compressor.sweep(recipe(shared, {"mean": 6}), [6, 9])
    with pytest.raises(RecipeError, match=r"keep=six .*found 'six'"):
        compressor.sweep(recipe(shared), ["six"])
    with pytest.raises(RecipeError, match="no total to sweep"):
        compressor.sweep(recipe(shared), [])
    assert names(tmp_path) == []


REFUSED: dict[str, tuple[list[Json], str]] = {
    "none": ([{"dynamic_skipping": {}}], "over the `keep` of one pass; no pass would have it here"),
    "several": ([{"expert_pruning": {"keep": 6}}] * 2, "expert_pruning, expert_pruning would have it here"),
    "before": ([{"wanda": {"pattern": "2:4"}}, {"expert_pruning": {"keep": 6}}], "wanda comes before expert_pruning"),
    "progressive": ([{"expert_pruning": {"keep": 6, "progressive": True}}], "leave it out to sweep"),
    "by layer": ([{"expert_pruning": {"keep": {"0": 6}}}], "counts by layer are no total"),
    "no preview": ([{"expert_merging": {"keep": 6}}], "expert_merging has no preview"),
}


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("case", REFUSED)
def test_recipes_that_cannot_be_swept(case: str, shared: Path) -> None:
    passes, says = REFUSED[case]
    with pytest.raises(RecipeError, match=says):
        compressor.sweep(recipe(shared) | {"passes": passes}, [6])


@pytest.mark.usefixtures("no_work")
def test_without_text_or_with_a_page_in_the_way(shared: Path, tmp_path: Path) -> None:
    asked = recipe(shared, criterion="aimer")
    with pytest.raises(RecipeError, match="reads no text, so there is none to measure"):
        compressor.sweep({**asked, "evaluate": None}, [6])
    with pytest.raises(RecipeError, match=r"page: a sweep writes a page, .* a name in \.html"):
        compressor.sweep(asked, [6], output=tmp_path / "page")
    (tmp_path / "page.json").write_text("mine")
    with pytest.raises(RecipeError, match=r"page\.json exists already"):
        compressor.sweep(asked, [6], output=tmp_path / "page.html")
    with pytest.raises(RecipeError, match=r"goes on .* only where a checkpoint is read"):
        compressor.sweep(asked, [6], resume=True)
    assert (tmp_path / "page.json").read_text() == "mine"


# Going on, and the commands --------------------------------------------------------------------------------


def test_goes_on_behind_what_was_observed(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, page = recipe(shared, criterion="ean"), tmp_path / "page.html"
    put, layers, stop = ObservationJournal.put, list[str](), 2

    def watched(self: ObservationJournal, layer: str, figures: Any) -> None:
        put(self, layer, figures)
        layers.append(layer)
        if len(layers) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(ObservationJournal, "put", watched)
    with pytest.raises(KeyboardInterrupt) as error:
        compressor.sweep(asked, [6, 4], output=page)
    assert "--resume goes on with it" in error.value.__notes__[0]
    with pytest.raises(CheckpointError, match="--resume goes on, --overwrite drops it"):
        compressor.sweep(asked, [6, 4], output=page)
    with pytest.raises(CheckpointError, match=r"keep\.1 was 'keep 4', is 'keep 5'"):
        compressor.sweep(asked, [6, 5], output=page, resume=True)
    found = compressor.sweep(asked, [6, 4], output=page, resume=True)
    assert len(layers) == 2  # both were done
    assert without_sizes(found) == without_sizes(compressor.sweep(asked, [6, 4]))
    assert names(tmp_path) == ["page.html", "page.json"]


def test_the_command(shared: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recipe(shared) | {"output": str(tmp_path / "out")}
    asked["passes"].append({"dynamic_skipping": {}})
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(asked))
    monkeypatch.setenv("COLUMNS", "80")
    answer = cli("sweep", file, "--keep", "4, 6", "--quiet", "--json")
    assert (answer.status, answer.err) == (0, "")
    found = json.loads(answer.out)
    assert [one["name"] for one in found["outputs"]] == ["keep 6", "keep 4"]
    assert found["notes"][-1] == "Left out, though behind it in the recipe: dynamic_skipping."
    assert found["page"] == str(tmp_path / "out-sweep.html")
    assert names(tmp_path) == ["out-sweep.html", "out-sweep.json", "recipe.yaml"]
    assert "out-sweep.html exists already" in cli("sweep", file, "--keep", "4,6").err
    answer = cli("sweep", file, "--keep", "6", "--set", "evaluate.perplexity.1.name=other", "--overwrite")
    assert answer.status == 0
    assert max(map(len, answer.out.splitlines()[:-1])) <= 80
    assert "keep 6 *" in answer.out
    assert "Written to" in answer.out


def test_deciding_several_again(shared: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    compressor.compress(recipe(shared) | {"evaluate": None}, output=tmp_path / "run")
    decide = ("decide", tmp_path / "run/compressor/statistics.safetensors", "--criterion", "reap")
    answer = cli(*decide, "--keep", "4,0.75", "--output", tmp_path / "again.json", "--json")
    assert answer.status == 0, answer.err
    found = json.loads(answer.out)
    assert list(found) == [str(tmp_path / f"again-keep-{keep}.json") for keep in (4, 0.75)]
    for path, decided in found.items():
        assert json.loads(Path(path).read_text()) == decided
    assert [
        [len(one["kept"]) for one in each["passes"][0]["decision"]["layers"].values()] for each in found.values()
    ] == [
        [4, 4],
        [6, 6],
    ]
    before = names(tmp_path)
    assert "cannot keep 9" in cli(*decide, "--keep", "5,9", "--output", tmp_path / "folder").err
    assert names(tmp_path) == before
    assert cli(*decide, "--keep", "5,6", "--output", tmp_path / "folder").status == 0
    assert (tmp_path / "folder-keep-5" / "report.html").exists()
