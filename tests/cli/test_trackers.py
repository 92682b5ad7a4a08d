"""Trackers that a recipe names are told of a run, and cost it nothing: here modules that record calls, with signatures
of mlflow 3.17 and trackio 0.43 (wandb 0.31 has trackio's), with which they are compared where these are installed.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from compressor.run.trackers import steps_of

Cli = Callable[..., Any]
WriteRecipe = Callable[..., Path]
PASS = {"expert_pruning": {"keep": 6, "criterion": "aimer"}}
RECORDED = """
calls = []
def _called(name, /, **given):
    calls.append((name, given))
    if name == fails:
        raise ConnectionError("no\\nserver")
fails = None
"""
MLFLOW = f"""{RECORDED}
import contextlib
def active_run(): return None
@contextlib.contextmanager
def start_run(run_id=None, experiment_id=None, run_name=None, nested=False, parent_run_id=None, tags=None,
              description=None, log_system_metrics=None):
    _called("start_run", run_name=run_name, nested=nested)
    yield
    _called("end_run")
def log_params(params, synchronous=None, run_id=None): _called("log_params", params=params)
def log_dict(dictionary, artifact_file, run_id=None): _called("log_dict", file=artifact_file, data=dictionary)
def log_metrics(metrics, step=None, synchronous=None, run_id=None, timestamp=None, model_id=None, dataset=None):
    _called("log_metrics", metrics=metrics, step=step)
def log_artifact(local_path, artifact_path=None, run_id=None): _called("log_artifact", path=local_path)
"""
TRACKIO = f"""{RECORDED}
def init(project, name=None, group=None, space_id=None, server_url=None, dataset_id=None, bucket_id=None, config=None,
         resume="never", settings=None, private=None, embed=True, auto_log_gpu=None, gpu_log_interval=10.0,
         auto_log_cpu=None, cpu_log_interval=10.0, webhook_url=None, webhook_min_level=None):
    print("* Trackio project initialized")
    _called("init", project=project, name=name, config=config)
def log(metrics, step=None): _called("log", metrics=metrics, step=step)
def log_artifact(artifact_or_path, name=None, type=None, aliases=None, overwrite=False):
    _called("log_artifact", path=artifact_or_path, name=name, type=type)
def finish(): _called("finish")
"""
MODULES = {"mlflow": MLFLOW, "trackio": TRACKIO}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Have a module of recorded calls instead of a tracker."""

    def install(name: str) -> Any:
        (tmp_path / "modules").mkdir(exist_ok=True)
        (tmp_path / "modules" / f"{name}.py").write_text(MODULES[name])
        monkeypatch.syspath_prepend(tmp_path / "modules")
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        return importlib.import_module(name)

    yield install
    for name in MODULES:
        sys.modules.pop(name, None)


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "compressor" / "record.json").read_text())


def test_both_are_told_all(installed: Any, cli: Cli, recipe: WriteRecipe, tokens: Path, tmp_path: Path) -> None:
    mlflow, trackio = installed("mlflow"), installed("trackio")
    measured = {"perplexity": [{"tokens": str(tokens)}]}
    answer = cli("run", recipe(passes=[PASS], trackers=["mlflow", "trackio"], evaluate=measured), "--json")
    assert answer.status == 0
    record = record_of(tmp_path / "out")
    assert json.loads(answer.out) == record  # what a tracker prints is not among it
    assert "* Trackio project initialized" in answer.err
    counts = {"experts/before": 8, "experts/after": 6}
    steps = steps_of(record)
    text = {side: record["evaluation"][side]["perplexity"]["ids"]["perplexity"] for side in ("before", "after")}
    assert steps[1] == counts
    assert (
        steps[0].items()
        >= {**counts, "before/perplexity/ids": text["before"], "after/perplexity/ids": text["after"]}.items()
    )
    page = str(tmp_path / "out" / "compressor" / "report.html")
    names = [name for name, _ in mlflow.calls]
    assert names == ["start_run", "log_params", "log_dict", "log_metrics", "log_metrics", "log_artifact", "end_run"]
    assert mlflow.calls[0][1] == {"run_name": "out", "nested": False}
    assert mlflow.calls[2][1] == {"file": "recipe.json", "data": record["recipe"]}
    assert [given for name, given in mlflow.calls if name == "log_metrics"] == [
        {"metrics": steps[0], "step": 0},
        {"metrics": steps[1], "step": 1},
    ]
    assert mlflow.calls[-2] == ("log_artifact", {"path": page})
    assert trackio.calls == [
        ("init", {"project": "moe-compressor", "name": "out", "config": record["recipe"]}),
        ("log", {"metrics": steps[0], "step": 0}),
        ("log", {"metrics": steps[1], "step": 1}),
        ("log_artifact", {"path": page, "name": "out-report", "type": "report"}),
        ("finish", {}),
    ]


@pytest.mark.parametrize("fails", ["init", "log"])
def test_one_that_fails_costs_the_run_nothing(
    installed: Any, cli: Cli, recipe: WriteRecipe, tmp_path: Path, fails: str
) -> None:
    mlflow, trackio = installed("mlflow"), installed("trackio")
    trackio.fails = fails
    answer = cli("run", recipe(passes=[PASS], trackers=["trackio", "mlflow"]))
    assert answer.status == 0
    said = "trackio was not told of the run, all is in its record (ConnectionError: no server)\n"
    assert said in answer.err
    assert (trackio.calls[-1][0] == "finish") == (fails == "log")
    assert mlflow.calls[-1] == ("end_run", {})
    assert record_of(tmp_path / "out")["recipe"]["trackers"] == ["trackio", "mlflow"]


def test_one_that_is_not_installed_is_refused_before_the_run(
    cli: Cli, recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe(passes=[PASS], trackers=["wandb"])
    (tmp_path / "wandb").mkdir()  # what a run of wandb leaves
    find = importlib.machinery.PathFinder.find_spec
    monkeypatch.setattr("compressor.run.trackers.find_spec", lambda name: find(name, [str(tmp_path)]))
    for command in ("check", "run"):
        answer = cli(command, file)
        assert answer.status == 2
        assert answer.err.splitlines()[-1:] == [
            f"error: {file}:12:3 trackers[0]: wandb is not installed: `pip install wandb`"
        ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [(["tensorboard"], "trackers[0]: "), ([], "trackers: "), ("mlflow", "trackers: ")],
)
def test_wrong_trackers(cli: Cli, recipe: WriteRecipe, given: Any, says: str) -> None:
    answer = cli("check", recipe(passes=[PASS], trackers=given))
    assert (answer.status, answer.err.count("error: ")) == (2, 1)
    assert says in answer.err


def test_a_run_with_other_trackers_is_the_same_run(
    cli: Cli, recipe: WriteRecipe, tmp_path: Path, installed: Any
) -> None:
    installed("trackio")
    assert cli("run", recipe(passes=[PASS])).status == 0
    answer = cli("run", recipe(passes=[PASS], trackers=["trackio"]), "--resume")
    assert "nothing is left to do" in answer.err


def test_layers_are_called_by_their_numbers_and_names_are_what_trackers_take() -> None:
    layers = [{"path": f"model.layers.{number}.mlp", "num_experts": 4} for number in (10, 2)]
    decision = {"layers": {"model.layers.2.mlp": {"kept": [0, 1, 3]}}}
    fidelity = {"demo:code (mine)": {"kl": 0.5, "agreement": 0.9}}
    record = {"layers": layers, "passes": [{"decision": decision}], "evaluation": {"fidelity": fidelity}}
    assert steps_of(record) == {
        2: {"experts/before": 4, "experts/after": 3, "kl/demo_code _mine_": 0.5},
        10: {"experts/before": 4, "experts/after": 4},
    }
    mixed = [{"path": "encoder.1.mlp", "num_experts": 4}, {"path": "decoder.1.mlp", "num_experts": 2}]
    assert [*steps_of({"layers": mixed, "passes": []})] == [0, 1]


@pytest.mark.parametrize("name", ["mlflow", "trackio"])
def test_the_modules_here_are_like_the_real_ones(name: str) -> None:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"{name} is not installed")
    ours: dict[str, Any] = {}
    exec(MODULES[name], ours)
    real = importlib.import_module(name)
    for function in [key for key, value in ours.items() if inspect.isfunction(value) and not key.startswith("_")]:
        assert [*inspect.signature(ours[function]).parameters] == [
            *inspect.signature(getattr(real, function)).parameters
        ]
