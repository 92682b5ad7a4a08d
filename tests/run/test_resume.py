"""Runs that are interrupted and go on: the same bytes, nothing twice, and refused where something has changed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_folder, token_ids, write_token_file

import compressor
from compressor import CalibrationError, CheckpointError, CompressorError, DiskError, RecipeError, VerificationError
from compressor.checkpoint.output import OutputFolder
from compressor.checkpoint.resume_state import Journal, ObservationJournal, digest, flatten, unflatten
from compressor.data.sequences import TokenBatch
from compressor.machine.progress import Progress
from compressor.model.moe_model import MoEModel
from compressor.observe import layerwise
from compressor.plugin import RoutedTokens, Statistic
from compressor.testing import tiny

Recipe = dict[str, Any]
WEIGHTS = "model.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder("mixtral"), tmp_path / "model"))


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Recipe:
    return recipe_for(model, tmp_path)


@dataclass(frozen=True)
class Whole:
    """A run that nothing has interrupted."""

    recipe: Recipe
    record: dict[str, Any]
    files: dict[str, bytes]

    def to(self, output: Path) -> Recipe:
        """Its recipe, with another output."""
        return deepcopy(self.recipe) | {"output": str(output)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Whole]:
    """progressive → the run."""

    @cache
    def run(progressive: bool) -> Whole:
        folder = tmp_path_factory.mktemp("whole")
        recipe = recipe_for(tiny_folder("mixtral"), folder)
        recipe["passes"][0]["expert_pruning"]["progressive"] = progressive
        return Whole(recipe, compressor.compress(recipe).record, files(folder / "out"))

    return run


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Of a run that was stopped, for all that must leave it as it is."""
    folder = tmp_path_factory.mktemp("stopped")
    recipe = recipe_for(tiny_folder("mixtral"), folder)
    interrupted(recipe, pytest.MonkeyPatch(), 2)
    return recipe


def recipe_for(model: Path, tmp_path: Path) -> Recipe:
    tokens = write_token_file(tmp_path / "tokens.jsonl", token_ids(30, 24).tolist())
    return {
        "model": str(model),
        "calibration": {"batch_size": 8, "data": [{"tokens": str(tokens), "samples": 24}]},
        "passes": [{"expert_pruning": {"keep": 6}}, {"dynamic_skipping": {}}],
        "evaluate": {"perplexity": [{"tokens": str(tokens), "samples": 8}]},
        "output": str(tmp_path / "out"),
    }


def files(folder: Path) -> dict[str, bytes]:
    """What must be alike: all but the record, which says how long things took."""
    names = (WEIGHTS, "config.json", "compressor/statistics.safetensors", "compressor/decision.json")
    return {name: (folder / name).read_bytes() for name in names}


def interrupted(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, after: int, **others: Any) -> None:
    """A run that is stopped after some layers."""
    kept = ObservationJournal.put
    done = 0

    def put(self: ObservationJournal, layer: str, figures: Any) -> None:
        nonlocal done
        kept(self, layer, figures)
        done += 1
        if done == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ObservationJournal, "put", put)
        with pytest.raises(KeyboardInterrupt):
            compressor.compress(recipe, **others)


def observed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers that are observed from now on."""
    layers: list[str] = []
    put = ObservationJournal.put
    monkeypatch.setattr(
        ObservationJournal, "put", lambda self, layer, one: (layers.append(layer), put(self, layer, one))
    )
    return layers


@pytest.mark.parametrize(
    ("after", "progressive"),
    [(1, False), (3, True), *(pytest.param(*one, marks=pytest.mark.nightly) for one in ((2, True), (5, False)))],
)
def test_goes_on_and_ends_with_the_same_bytes(
    whole: Callable[[bool], Whole], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, progressive: bool
) -> None:
    expected = whole(progressive)
    recipe = expected.to(tmp_path / "out")
    interrupted(recipe, monkeypatch, after)
    assert not (tmp_path / "out").exists()
    layers = observed(monkeypatch)
    result = compressor.compress(recipe, resume=True)
    assert result.folder == tmp_path / "out"
    assert len(layers) == 6 - after  # two passes of three layers; what was done is not done again
    assert files(tmp_path / "out") == expected.files
    for when in ("before", "after"):
        found, alone = (record["evaluation"][when] for record in (result.record, expected.record))
        assert found["perplexity"] == alone["perplexity"]
    assert not list(tmp_path.glob(".*"))


MEASURED = {"keep": {"mean": 6}, "measured_tokens": 256, "measured_counts": 2, "replace": "none"}


@pytest.mark.parametrize("weights", [pytest.param("memory", marks=pytest.mark.nightly), "disk"])
def test_stopped_before_it_is_known_where_the_text_stands(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    """A layer whose figures are known is passed as it was then: what a search makes of experts' outputs differs from
    the model's own by rounding, here by more, which the layers behind would see.
    """
    ranked_outputs = RoutedTokens.ranked_outputs

    def rounded(self: RoutedTokens, num_ranks: int) -> Iterator[Any]:
        yield from ranked_outputs(self, num_ranks)
        assert self.experts_output_TH is not None
        self.experts_output_TH = self.experts_output_TH * (1 + 2**-12)

    monkeypatch.setattr(RoutedTokens, "ranked_outputs", rounded)
    recipe["passes"], recipe["weights"] = [{"expert_pruning": MEASURED}], weights
    compressor.compress(recipe, output=tmp_path / "whole")
    interrupted(recipe, monkeypatch, 1)
    compressor.compress(recipe, resume=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.nightly
@pytest.mark.parametrize("wanted", [8, 30])
def test_killed_at_many_moments(recipe: Recipe, tmp_path: Path, wanted: int) -> None:
    recipe["passes"][1] = {"expert_pruning": {"keep": 4, "progressive": True}}
    recipe["calibration"]["data"][0]["samples"] = 12
    del recipe["evaluate"]
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    (tmp_path / "runs").mkdir()
    command = [sys.executable, Path(__file__).parents[1] / "killed.py", tmp_path / "recipe.json", tmp_path / "runs"]
    command += [str(wanted), "1"]
    answer = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, timeout=600)
    assert answer.returncode == 0, answer.stderr[-2000:]
    kills, with_work, runs = map(int, answer.stdout.split())
    assert kills >= wanted
    assert with_work >= wanted // 6, "the moments were too early to tell anything"
    assert runs >= 1 + (wanted > 8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda recipe: recipe["passes"][0].update(expert_pruning={"keep": 5}), "keep was 6, is 5"),
        (lambda recipe: recipe["calibration"].update(batch_size=4), "recipe.calibration.batch_size was 8, is 4"),
        (lambda recipe: recipe["evaluate"].update(batch_size=3), "recipe.evaluate.batch_size was 8, is 3"),
    ],
)
def test_another_recipe_is_refused(stopped: Recipe, change: Callable[[Recipe], None], says: str) -> None:
    recipe = deepcopy(stopped)
    change(recipe)
    with pytest.raises(CheckpointError, match=f"^the run cannot go on: .*{says}"):
        compressor.compress(recipe, resume=True)
    assert not Path(recipe["output"]).exists()


def test_another_model_is_refused(recipe: Recipe, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(recipe, monkeypatch, 2)
    tensors = load_file(model / WEIGHTS)
    tensors["lm_head.weight"] += 1
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"^the run cannot go on: model\.fingerprint was 'sha256:\w+', is 'sha256:"
    ):
        compressor.compress(recipe, resume=True)


def test_the_same_model_elsewhere_is_not_another(
    recipe: Recipe, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(recipe, monkeypatch, 2)
    recipe["model"] = str(model.rename(tmp_path / "moved"))
    layers = observed(monkeypatch)
    compressor.compress(recipe, resume=True)
    assert len(layers) == 4


def test_other_text_is_refused(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(recipe, monkeypatch, 2)
    write_token_file(Path(recipe["calibration"]["data"][0]["tokens"]), token_ids(30, 24, seed=5).tolist())
    with pytest.raises(CheckpointError, match=r"^the run cannot go on: text\.tokens was 'sha256:\w+', is 'sha256:"):
        compressor.compress(recipe, resume=True)


def test_another_version_is_refused(stopped: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.machine.environment.versions", lambda _: {"torch": "1.0"})
    with pytest.raises(CheckpointError, match=r"^the run cannot go on: .*versions\.torch was '\S+', is '1\.0'"):
        compressor.compress(stopped, resume=True)


@pytest.mark.parametrize(
    ("mistake", "error", "says"),
    [
        ({"passes": [{"expert_pruning": {"keep": 5}}, {"dynamic_skipping": {}}]}, CheckpointError, "keep was 6, is 5"),
        ({"passes": [{"expert_pruning": {"keep": 99}}]}, RecipeError, "keep"),
        ({"seed": 1}, CheckpointError, "recipe.seed was 0, is 1"),
        ({"memory": "1MB"}, RecipeError, "memory"),
        ({"model": "nowhere/nothing"}, CheckpointError, "the hub cannot be reached"),
        ({"model": "demo"}, CheckpointError, "model.fingerprint was"),
        ({"calibration": {"data": [{"tokens": "nothing.jsonl"}]}}, CalibrationError, "nothing.jsonl"),
    ],
)
def test_a_refusal_to_go_on_costs_nothing_that_was_done(
    stopped: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    mistake: Recipe,
    error: type[CompressorError],
    says: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    journal = Path(stopped["output"]).with_name(".out.partial") / "journal"
    kept = sorted(journal.rglob("*"))
    assert len(kept) > 2
    with pytest.raises(error, match=says):
        compressor.compress({**stopped, **mistake}, resume=True)
    assert sorted(journal.rglob("*")) == kept


def test_what_was_refused_can_go_on(
    whole: Callable[[bool], Whole], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A mistake in the command costs nothing that was done."""
    recipe = whole(False).to(tmp_path / "out")
    interrupted(recipe, monkeypatch, 2)
    recipe["passes"][0]["expert_pruning"]["keep"] = 5
    with pytest.raises(CheckpointError, match="cannot go on"):
        compressor.compress(recipe, resume=True)
    recipe["passes"][0]["expert_pruning"]["keep"] = 6
    layers = observed(monkeypatch)
    compressor.compress(recipe, resume=True)
    assert len(layers) == 4
    assert files(tmp_path / "out") == whole(False).files


def test_an_error_that_comes_again_leaves_nothing_the_first_time(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise VerificationError("another answer")

    monkeypatch.setattr("compressor.edit.backend.save_verified", fails)
    with pytest.raises(VerificationError, match="another answer"):
        compressor.compress(recipe)
    assert not list(tmp_path.glob(".*"))


def test_work_of_another_run_is_not_thrown_away(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    interrupted(recipe, monkeypatch, 2)
    says = rf"^recipe output: {tmp_path / 'out'}: an interrupted run's work is in .*--resume"
    with pytest.raises(CheckpointError, match=says):
        compressor.compress(recipe)
    recipe["passes"][0]["expert_pruning"]["keep"] = 5
    compressor.compress(recipe, overwrite=True)
    assert not list(tmp_path.glob(".*"))


def test_nothing_to_go_on_from_begins_at_the_beginning(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    compressor.compress(recipe, resume=True, progress=Progress("lines"))
    assert "there is nothing to go on from; the run starts at the beginning" in capsys.readouterr().err


def stopped_when_whole(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, **others: Any) -> None:
    rename = Path.rename

    def stop(self: Path, target: Path) -> Path:
        if target == Path(recipe["output"]):
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            compressor.compress(recipe, **others)
    assert not Path(recipe["output"]).exists()


@pytest.mark.parametrize("overwrite", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_a_run_stopped_when_its_output_was_whole_needs_only_the_name(
    whole: Callable[[bool], Whole], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    expected = whole(False)
    recipe = expected.to(tmp_path / "out")
    if overwrite:
        compressor.compress({**recipe, "passes": recipe["passes"][:1]})
    stopped_when_whole(recipe, monkeypatch, overwrite=overwrite)
    monkeypatch.setattr("compressor.run.pipeline.InMemory", None)  # no model is read
    result = compressor.compress(recipe, resume=True)
    assert (result.folder, result.model) == (tmp_path / "out", None)
    assert result.record["passes"][0]["decision"] == expected.record["passes"][0]["decision"]
    assert files(tmp_path / "out") == expected.files
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("resume", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_a_whole_output_is_not_taken_for_another_recipes(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    stopped_when_whole(recipe, monkeypatch)
    recipe["passes"][0]["expert_pruning"]["keep"] = 5
    with pytest.raises(CheckpointError, match=f"^recipe output: {tmp_path / 'out'} exists already"):
        compressor.compress(recipe, resume=resume)
    assert 'num_local_experts": 6' in (tmp_path / "out" / "config.json").read_text()
    assert not list(tmp_path.glob(".*"))


def test_a_run_that_was_to_replace_goes_on_to_replace(
    whole: Callable[[bool], Whole], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = whole(False).to(tmp_path / "out")
    compressor.compress({**recipe, "passes": recipe["passes"][:1], "evaluate": None})
    interrupted(recipe, monkeypatch, 2, overwrite=True)
    layers = observed(monkeypatch)
    compressor.compress(recipe, resume=True)
    assert len(layers) == 4
    assert files(tmp_path / "out") == whole(False).files


def test_live_models_do_not_go_on(recipe: Recipe, model: Path) -> None:
    live, tokenizer = compressor.load(model)
    with pytest.raises(RecipeError, match=r"^a run goes on .* only where a checkpoint is read"):
        compressor.compress(recipe, live, tokenizer, resume=True)


def test_second_run_on_one_output_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out"):
        with pytest.raises(CheckpointError, match=r"^recipe output: .*: another run is writing "):
            compressor.compress(recipe)
        assert (tmp_path / ".out.partial").is_dir()
    assert not list(tmp_path.glob(".*"))


def test_disk_full_in_the_journal(
    whole: Callable[[bool], Whole], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = whole(False).to(tmp_path / "out")
    kept = ObservationJournal.put_streams

    def full(self: ObservationJournal, unit: str, *others: Any) -> None:
        if unit == "model.layers.2":
            raise OSError(28, "No space left on device")
        kept(self, unit, *others)

    with monkeypatch.context() as patch:
        patch.setattr(ObservationJournal, "put_streams", full)
        with pytest.raises(DiskError, match="writing failed: No space left on device"):
            compressor.compress(recipe)
    compressor.compress(recipe, resume=True)
    assert files(tmp_path / "out") == whole(False).files


EVALUATION = "evaluation before.json"
FIRST, SECOND = "0.expert_pruning", "1.dynamic_skipping"
LAYER = "model.layers.0.mlp.safetensors"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def other_kind(path: Path) -> None:
    path.write_text("[]")


@pytest.mark.parametrize(
    ("piece", "damage", "num_again", "progressive"),
    [
        (EVALUATION, cut, 0, False),
        pytest.param(EVALUATION, other_kind, 0, False, marks=pytest.mark.nightly),
        pytest.param(EVALUATION, Path.unlink, 0, True, marks=pytest.mark.nightly),
        (f"{FIRST}/{LAYER}", cut, 1, False),
        pytest.param(f"{FIRST}/{LAYER}", cut, 1, True, marks=pytest.mark.nightly),
        (f"{FIRST}/{LAYER}", Path.unlink, 1, True),
        pytest.param(f"{FIRST}/done.json", cut, 0, True, marks=pytest.mark.nightly),
        pytest.param(f"{FIRST}/done.json", Path.unlink, 0, False, marks=pytest.mark.nightly),
        (f"{SECOND}/{LAYER}", cut, 1, True),
        pytest.param(f"{SECOND}/{LAYER}", Path.unlink, 1, False, marks=pytest.mark.nightly),
        (f"{SECOND}/streams-0-model.layers.1/standing.json", cut, 0, False),
        pytest.param(
            f"{SECOND}/streams-0-model.layers.1/standing.json", other_kind, 0, False, marks=pytest.mark.nightly
        ),
        (f"{SECOND}/streams-0-model.layers.1/0.safetensors", cut, 0, True),
        pytest.param(
            f"{SECOND}/streams-0-model.layers.1/0.safetensors", Path.unlink, 0, False, marks=pytest.mark.nightly
        ),
    ],
)
def test_a_damaged_piece_is_named_and_done_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    whole: Callable[[bool], Whole],
    progressive: bool,
    piece: str,
    damage: Callable[[Path], None],
    num_again: int,
) -> None:
    recipe = whole(progressive).to(tmp_path / "out")
    with monkeypatch.context() as patch:  # before the last of five layers is there, all stand before the last but one
        patch.setattr(ObservationJournal, "forget_streams", lambda *_, **__: None)
        interrupted(recipe, monkeypatch, 5)
    path = tmp_path / ".out.partial" / "journal" / piece
    damage(path)
    layers = observed(monkeypatch)
    compressor.compress(recipe, resume=True, progress=Progress("lines"))
    says = f"{path}: this part of the journal is damaged, and what it held is done again: "
    assert capsys.readouterr().err.count(says) == (damage is not Path.unlink)
    assert len(layers) == 1 + num_again
    assert files(tmp_path / "out") == whole(progressive).files


@pytest.mark.parametrize(
    "damage", [cut, *(pytest.param(one, marks=pytest.mark.nightly) for one in (other_kind, Path.unlink))]
)
def test_a_journal_of_which_nobody_knows_what_it_is_about_is_kept(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    interrupted(recipe, monkeypatch, 3)
    path = tmp_path / ".out.partial" / "journal" / "run.json"
    content = path.read_bytes()
    damage(path)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=f"^the run cannot go on: {path} cannot be read.* Put it back, or"):
            compressor.compress(recipe, resume=True)
    path.write_bytes(content)
    layers = observed(monkeypatch)
    compressor.compress(recipe, resume=True)
    assert len(layers) == 3


@pytest.mark.parametrize(
    "piece",
    [
        pytest.param("journal/edited 0.expert_pruning.json", marks=pytest.mark.nightly),
        pytest.param("journal/edited 1.expert_pruning.json", marks=pytest.mark.nightly),
        f"stages/1.expert_pruning/{WEIGHTS}",
    ],
)
def test_a_damaged_checkpoint_between_passes_is_written_again(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: str
) -> None:
    recipe |= {"weights": "disk", "passes": [{"expert_pruning": {"keep": 6}}, {"expert_pruning": {"keep": 4}}]}
    compressor.compress(recipe, output=tmp_path / "whole")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("compressor.run.pipeline.OnDisk.save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compressor.compress(recipe)
    cut(tmp_path / ".out.partial" / piece)
    layers = observed(monkeypatch)
    compressor.compress(recipe, resume=True)
    assert not layers
    assert files(tmp_path / "out") == files(tmp_path / "whole")


# --- the walk, whatever the model carries from layer to layer


class Recorded(Statistic):
    def __init__(self) -> None:
        self.seen: dict[str, torch.Tensor] = {}

    def update(self, tokens: Any) -> None:
        self.seen[f"{len(self.seen)}"] = tokens.hidden_TH.clone()

    def tensors(self) -> dict[str, torch.Tensor]:
        return self.seen


class Stopped(Recorded):
    def update(self, tokens: Any) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "model_type",
    [
        "mixtral",
        "switch_transformers",
        "gemma4",
        *(
            pytest.param(one, marks=pytest.mark.nightly)
            for one in ("diffusion_gemma", "jetmoe", "openai_privacy_filter", "inkling2_loop")
        ),
    ],
)
def test_every_kind_of_model_goes_on(model_type: str, tmp_path: Path) -> None:
    moe = MoEModel(tiny.tiny_model(model_type))
    inputs = [tiny.tiny_inputs(moe.model, seed=seed)["input_ids"] for seed in range(2)]
    batches = [TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool)) for ids in inputs]
    paths = [layer.path for layer in moe.layers if layer.watch_problem is None]
    expected = layerwise.observe(moe, batches, {path: Recorded() for path in paths}, Progress())
    journal = ObservationJournal(tmp_path)
    for number in range(len(paths)):
        statistics = {path: Stopped() if place == number else Recorded() for place, path in enumerate(paths)}
        with pytest.raises(KeyboardInterrupt):
            layerwise.observe(moe, batches, statistics, Progress(), journal=journal)
    found = layerwise.observe(moe, batches, {path: Recorded() for path in paths}, Progress(), journal=journal)
    assert list(found) == list(expected)
    for path, figures in expected.items():
        for name, value in figures.items():
            assert torch.equal(found[path][name], value), path


def test_layers_that_were_passed_are_not_run_again(tmp_path: Path) -> None:
    moe = MoEModel(tiny.tiny_model("mixtral"))
    ids = tiny.tiny_inputs(moe.model)["input_ids"]
    batches = [TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool))]
    paths = [layer.path for layer in moe.layers]
    journal = ObservationJournal(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        layerwise.observe(moe, batches, {path: Recorded() for path in paths[:-1]} | {paths[-1]: Stopped()}, Progress(),
                     journal=journal)  # fmt: skip
    run: list[str] = []
    for name, module in moe.model.named_modules():
        if name.endswith("self_attn"):
            module.register_forward_hook(lambda *_, name=name: run.append(name))
    layerwise.observe(moe, batches, {path: Recorded() for path in paths}, Progress(), journal=journal)
    assert run == [f"model.layers.{len(paths) - 1}.self_attn"]


def test_what_cannot_be_answered_from_the_record_is_run_again(tmp_path: Path) -> None:
    """A journal that does not lead to where the batches stood costs time, not correctness."""
    moe = MoEModel(tiny.tiny_model("mixtral"))
    ids = tiny.tiny_inputs(moe.model)["input_ids"]
    batches = [TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool))]
    paths = [layer.path for layer in moe.layers]
    expected = layerwise.observe(moe, batches, {path: Recorded() for path in paths}, Progress())
    journal = ObservationJournal(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        layerwise.observe(moe, batches, {path: Recorded() for path in paths[:-1]} | {paths[-1]: Stopped()}, Progress(),
                     journal=journal)  # fmt: skip
    [snapshot] = journal.snapshots().values()
    standing = journal.standing(snapshot.unit, 0)
    assert standing is not None
    [(_, (tree, tensors))] = standing.outputs.items()
    changed = type(standing)({"model.layers": (tree, [tensors[0] + 1])}, standing.digest)
    journal.put_streams(snapshot.unit, snapshot.passed, [changed], snapshot.figures)
    found = layerwise.observe(moe, batches, {path: Recorded() for path in paths}, Progress(), journal=journal)
    assert all(torch.equal(found[path]["0"], expected[path]["0"]) for path in paths)


# --- the journal itself


def test_arrangement_of_tensors() -> None:
    first, second = torch.arange(3), torch.ones(2, 2)
    value = (first, [None, {"a": second, "b": 3}], "x")
    tree, tensors = flatten(value)
    again = unflatten(json.loads(json.dumps(tree)), tensors)
    assert again[0] is first
    assert again[1][1]["a"] is second
    assert (again[1][0], again[1][1]["b"], again[2], type(again), type(again[1])) == (None, 3, "x", tuple, list)
    with pytest.raises(TypeError, match="set cannot be written down"):
        flatten((first, {1}))


def test_digest_tells_values_shapes_and_types_apart() -> None:
    values = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.tensor([0, 0, 0, 1.0])]
    assert len({digest(((value,), {})) for value in values}) == 4
    assert digest((values[0], {"mask": values[1]})) == digest((values[0].clone(), {"mask": values[1].clone()}))


def test_notes(tmp_path: Path) -> None:
    about = {"model": "a", "versions": {"torch": "2"}}
    journal = Journal(tmp_path / "journal", about)
    journal.begin()
    assert not journal.has_work
    journal.note("evaluation before", {"x": 1.5})
    assert journal.has_work
    assert journal.noted("evaluation before") == {"x": 1.5}
    assert journal.noted("evaluation after") is None
    Journal(tmp_path / "journal", about).go_on()
    with pytest.raises(CheckpointError, match=r"versions\.torch was '2', is '3'\. Set it back"):
        Journal(tmp_path / "journal", {"model": "a", "versions": {"torch": "3"}}).go_on()
    with pytest.raises(CheckpointError, match=r"versions\.numpy was not there, is 1"):
        Journal(tmp_path / "journal", {"model": "a", "versions": {"torch": "2", "numpy": 1}}).go_on()


@pytest.mark.nightly
@pytest.mark.parametrize("weights", ["memory", "disk"])
def test_files_that_may_not_grow(weights: str, recipe: Recipe, tmp_path: Path) -> None:
    """At whatever write the disk is full, one error says so, nothing appears, and the run goes on with more room."""
    script = (
        "import json, resource, signal, sys, torch\n"
        "torch.set_num_threads(1)\n"
        "import compressor\n"
        "recipe, limits = json.loads(sys.argv[1]), json.loads(sys.argv[2])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "for limit in limits:\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        "    try:\n"
        "        compressor.compress(recipe, resume=True)\n"
        "        print('done')\n"
        "        break\n"
        "    except compressor.DiskError as error:\n"
        "        print(str(error))\n"
    )
    recipe |= {"weights": weights, "output": str(tmp_path / weights)}
    whole = tmp_path / f"whole-{weights}"
    compressor.compress(recipe, output=whole)
    largest = max(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    limits = [100, 1000, 5000, 20_000, 50_000, largest // 2, largest - 1, 10 * largest]
    command = [sys.executable, "-c", script, json.dumps(recipe), json.dumps(limits)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert answer.returncode == 0, answer.stderr[-2000:]
    *failures, last = answer.stdout.splitlines()
    assert last == "done"
    assert len(failures) >= 4
    says = f"{tmp_path / weights}: writing failed: File too large. Nothing is left under that name."
    assert set(failures) == {says}
    assert files(tmp_path / weights) == files(whole)
    assert not list(tmp_path.glob(".*"))
