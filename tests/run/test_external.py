"""A pass that turns the checkpoint into another one: measured as it is served, verified, refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from checkpoint.test_quantised import linear_fp8
from edit.test_disk import FP8, shard_up
from safetensors.torch import load_file, save_file
from tiny_models import tiny_folder, tiny_model, token_ids, write_token_file
from transformers import AutoModelForCausalLM

import compressor
from compressor import CheckpointError, RecipeError
from compressor.plugin import Decision, Gathered, Method, MoELayer, Options, Plan, PluginError, Training
from compressor.plugins import load_plugins
from compressor.run import check, external, pipeline
from compressor.run.apply import apply

Recipe = dict[str, Any]
Step = Callable[[Path, Path], None]
WEIGHTS = "model.safetensors"


class NoOptions(Options):
    pass


class Cast(Method[NoOptions]):
    """Somebody else's converter: it copies a checkpoint and stores it in bfloat16."""

    name = "cast"
    version = "1"
    api = 2
    options_type: ClassVar[type[Options]] = NoOptions
    needs_text = False
    asked: ClassVar[list[Path]] = []
    does: ClassVar[Sequence[Step]] = ()
    """What the converter does besides."""

    def check(self, layers: Sequence[MoELayer]) -> Plan:
        return Plan([dataclasses.replace(layer, bits=16) for layer in layers])

    def decide(self, layers: Sequence[MoELayer], statistics: Gathered) -> Decision:
        return Decision({"layers": {layer.path: {"stored as": "bfloat16"} for layer in layers}})

    def external(self, source: Path, target: Path, decision: Decision) -> None:
        self.asked.append(source)
        assert not any(target.iterdir())
        shutil.copytree(source, target, dirs_exist_ok=True)
        tensors = {name: tensor.bfloat16() for name, tensor in load_file(source / WEIGHTS).items()}
        save_file(tensors, target / WEIGHTS, {"format": "pt"})
        change_config(target, dtype="bfloat16", torch_dtype="bfloat16")
        for step in self.does:
            step(source, target)


class Nudge(Method[NoOptions]):
    """It moves the last norm, as training would, and may be stopped in between."""

    name = "nudge"
    version = "1"
    api = 2
    options_type: ClassVar[type[Options]] = NoOptions
    fits_weights = held_out = True
    given: ClassVar[list[tuple[Path, Training]]] = []
    stops: ClassVar[bool] = False

    def check(self, layers: Sequence[MoELayer]) -> Plan:
        return Plan(layers, changes_values=True)

    def decide(self, layers: Sequence[MoELayer], statistics: Gathered) -> dict[str, Any]:
        return {"layers": {layer.path: {} for layer in layers}}

    def train(self, source: Path, target: Path, decision: Decision, training: Training) -> None:
        self.given.append((source, training))
        step = training.work / "step"
        done = int(step.read_text()) if step.exists() else 0
        step.write_text("1")
        if self.stops:
            raise KeyboardInterrupt
        model = training.load(source)
        with torch.no_grad():
            model.model.norm.weight.mul_(2 + done)
        training.save(model, source, target)


@pytest.fixture
def does(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has `cast` installed, and sets what it does besides."""

    def load(without: Any = (), **others: Any) -> Any:
        plugins = load_plugins(without, **others)
        return dataclasses.replace(plugins, methods={**plugins.methods, "cast": Cast, "nudge": Nudge})

    monkeypatch.setattr(pipeline, "load_plugins", load)
    monkeypatch.setattr(Cast, "asked", [])
    monkeypatch.setattr(Nudge, "given", [])
    return lambda *steps: monkeypatch.setattr(Cast, "does", steps)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder("mixtral"), tmp_path / "model"))


@pytest.fixture
def recipe(model: Path, tmp_path: Path, does: Callable[..., None]) -> Recipe:
    does()
    tokens = str(write_token_file(tmp_path / "tokens.jsonl", token_ids(12, 24).tolist()))
    return {
        "model": str(model),
        "calibration": {"batch_size": 4, "data": [{"tokens": tokens, "samples": 8}]},
        "passes": [{"expert_pruning": {"keep": 6}}, {"cast": {}}],
        "evaluate": {"perplexity": [{"tokens": tokens, "name": "text", "samples": 4}]},
        "output": str(tmp_path / "out"),
    }


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def figures(record: dict[str, Any]) -> dict[str, Any]:
    """What has been measured of the smaller model, but for the memory that this process has taken."""
    return {key: value for key, value in record["evaluation"]["after"].items() if key != "peak_memory"}


def perplexity(record: dict[str, Any], when: str = "after") -> float:
    return float(record["evaluation"][when]["perplexity"]["text"]["perplexity"])


# What becomes of it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["disk", pytest.param("memory", marks=pytest.mark.nightly)])
def test_behind_another_pass(weights: str, recipe: Recipe, model: Path, tmp_path: Path) -> None:
    """Output, figures and sizes are those of what the step has written; nothing else is left, the source as it was."""
    before = contents(model)
    result = compressor.compress({**recipe, "weights": weights})
    out = tmp_path / "out"
    assert {tensor.dtype for tensor in load_file(out / WEIGHTS).values()} == {torch.bfloat16}
    found, tokenizer = compressor.load(out)
    assert (found.dtype, found.config.num_local_experts) == (torch.bfloat16, 6)
    assert tokenizer is not None
    assert (out / "LICENSE").exists()
    record = json.loads((out / "compressor" / "record.json").read_text())
    assert record == result.record
    assert 0 < record["passes"][1]["checks"]["external_difference"] < 0.2
    alone = pipeline.evaluate({**recipe, "output": None}, str(out))
    assert figures(alone) == figures(record)
    assert perplexity(record) != perplexity(record, "before")
    against = pipeline.evaluate({**recipe, "output": None}, str(out), against=str(model))["evaluation"]
    assert against["fidelity"]["text"]["kl"] == pytest.approx(record["evaluation"]["fidelity"]["text"]["kl"], rel=1e-3)
    assert against["fidelity"]["text"]["kl"] > 0
    assert record["evaluation"]["after"]["bytes_on_disk"] < record["evaluation"]["before"]["bytes_on_disk"] / 2
    assert "bfloat16" in (out / "README.md").read_text()
    assert result.model.dtype == torch.bfloat16
    assert contents(model) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "tokens.jsonl"]


def test_in_memory_and_from_disk_are_the_same(recipe: Recipe, tmp_path: Path) -> None:
    for weights in ("memory", "disk"):
        compressor.compress({**recipe, "weights": weights}, output=tmp_path / weights)
    for name in (WEIGHTS, "compressor/decision.json", "compressor/statistics.safetensors"):
        assert (tmp_path / "memory" / name).read_bytes() == (tmp_path / "disk" / name).read_bytes()


@pytest.mark.parametrize("weights", ["memory", "disk"])
def test_as_the_only_pass(weights: str, recipe: Recipe, model: Path, tmp_path: Path) -> None:
    """From disk the step is given the user's folder itself. It needs no text."""
    before = contents(model)
    only = {key: recipe[key] for key in ("model", "output")}
    compressor.compress({**only, "passes": [{"cast": {}}], "weights": weights})
    assert compressor.load(tmp_path / "out")[0].dtype == torch.bfloat16
    assert contents(model) == before
    assert (Cast.asked == [model]) is (weights == "disk")


def test_of_a_live_model(recipe: Recipe, tmp_path: Path) -> None:
    live = tiny_model("mixtral")
    compressor.compress({**recipe, "evaluate": None}, live)
    assert compressor.load(tmp_path / "out")[0].dtype == torch.bfloat16
    assert live.dtype == torch.float32


def drop_tokenizer(source: Path, target: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE"):
        (target / name).unlink()


def keep_own_license(source: Path, target: Path) -> None:
    (target / "LICENSE").write_text("mine")


def test_a_tokenizer_is_carried_over(recipe: Recipe, model: Path, tmp_path: Path, does: Callable[..., None]) -> None:
    does(drop_tokenizer, keep_own_license)
    compressor.compress(recipe)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "LICENSE").read_text() == "mine"


def test_beside_random_decisions_of_other_passes(recipe: Recipe) -> None:
    recipe["evaluate"]["random"] = 1
    [pruning, cast] = compressor.compress(recipe).record["passes"]
    assert len(pruning["random"]["perplexity"]["text"]["random"]) == 1
    assert cast["random"] == {"problem": "cast draws nothing at random"}


def test_a_skipping_model_skips_on(recipe: Recipe, tmp_path: Path) -> None:
    recipe["passes"].insert(1, {"dynamic_skipping": {}})
    record = compressor.compress(recipe).record
    assert set(record["skipping"]) == {f"model.layers.{n}.mlp" for n in range(3)}
    assert compressor.MoEModel(compressor.load(tmp_path / "out")[0]).skips
    used = record["evaluation"]["after"]["experts_per_token"]["text"]
    assert all(value < 2 for value in used.values())


def test_the_documented_one(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code in docs/plugins.md, as it stands there."""
    page = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text(encoding="utf-8")
    [source] = re.findall(r"```python\n(needs_text = False\n.*?)```", page, re.DOTALL)
    code: dict[str, Any] = {"AutoModelForCausalLM": AutoModelForCausalLM, "Plan": Plan}
    exec(source, code)
    for name in ("needs_text", "check", "decide", "external"):
        monkeypatch.setattr(Cast, name, code[name])
    record = compressor.compress(recipe).record
    model, tokenizer = compressor.load(tmp_path / "out")
    assert (model.dtype, model.config.num_local_experts) == (torch.bfloat16, 6)
    assert tokenizer is not None
    assert 0 < record["passes"][1]["checks"]["external_difference"] < 0.2


def quantise(source: Path, target: Path) -> None:
    """As the large FP8 checkpoints are, in several files."""
    shutil.rmtree(target)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / WEIGHTS).items():
        tensors |= linear_fp8(name, tensor)
    shutil.copytree(source, target)
    save_file(tensors, target / WEIGHTS, {"format": "pt"})
    change_config(shard_up(target), quantization_config=FP8)


def test_a_quantised_one(recipe: Recipe, tmp_path: Path, does: Callable[..., None]) -> None:
    """It is measured as `compressor evaluate` measures it."""
    does(quantise)
    recipe["passes"][0]["expert_pruning"]["keep"] = {"0": 6, "1": 4, "2": 8}
    record = compressor.compress(recipe).record
    assert 0 < record["passes"][1]["checks"]["external_difference"] < 0.2
    alone = pipeline.evaluate({**recipe, "output": None}, str(tmp_path / "out"))
    assert figures(alone) == figures(record)
    assert not (tmp_path / "out" / WEIGHTS).exists()
    sizes = [record["evaluation"][when]["size"] for when in ("before", "after")]
    assert sizes[1]["parameters"] == sizes[0]["parameters"] - 6 * (3 * 24 * 32 + 32)  # with their rows of the router
    assert sizes[1]["active_parameters"] == sizes[0]["active_parameters"]
    assert sizes[1]["bytes"] < sizes[0]["bytes"] / 2


# Several, one behind another -------------------------------------------------------------------------------


@pytest.fixture
def chain(recipe: Recipe, tmp_path: Path) -> Recipe:
    """Other text is measured than the one that weights are fitted to."""
    text = str(write_token_file(tmp_path / "other.jsonl", token_ids(4, 24, seed=9).tolist()))
    evaluate = {"perplexity": [{"tokens": text, "name": "text"}]}
    passes = [{"expert_pruning": {"keep": {"0": 6, "1": 4, "2": 8}}}, {"nudge": {}}, {"nudge": {}}, {"cast": {}}]
    return {**recipe, "passes": passes, "evaluate": evaluate}


def norm(folder: Path) -> torch.Tensor:
    return load_file(folder / WEIGHTS)["model.norm.weight"].float()


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["memory", pytest.param("disk", marks=pytest.mark.nightly)])
def test_each_reads_what_the_one_before_has_left(weights: str, chain: Recipe, model: Path, tmp_path: Path) -> None:
    record = compressor.compress({**chain, "weights": weights}).record
    (first, training), (second, _) = Nudge.given
    assert [path.name for path in (second, *Cast.asked)] == ["1.nudge", "2.nudge"]
    assert first.name == ("0.expert_pruning" if weights == "disk" else "1.nudge.source")
    torch.testing.assert_close(norm(tmp_path / "out"), 4 * norm(model))
    assert training.original == model
    assert [len(batches) for batches in (training.batches, training.held_out)] == [2, 1]
    assert all(one.held_out for one in training.held_out)
    assert [*record["uneven"].values()] == [6, 4, 8]
    assert record["passes"][1]["original_ids"] == record["passes"][3]["original_ids"] != {}
    assert compressor.load(tmp_path / "out")[0].dtype == torch.bfloat16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other.jsonl", "out", "tokens.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["disk", pytest.param("memory", marks=pytest.mark.nightly)])
def test_edits_go_on_behind_one(weights: str, chain: Recipe, model: Path, tmp_path: Path) -> None:
    """Ids in their decisions are those of the original."""
    passes = [chain["passes"][0], {"nudge": {}}, {"expert_pruning": {"keep": 3}}, {"dynamic_skipping": {}}]
    record = compressor.compress({**chain, "passes": passes, "weights": weights}).record
    torch.testing.assert_close(norm(tmp_path / "out"), 2 * norm(model))
    kept = record["passes"][2]["original_ids"]["model.layers.1.mlp"]
    assert kept == record["passes"][0]["decision"]["layers"]["model.layers.1.mlp"]["kept"]
    found = compressor.MoEModel(compressor.load(tmp_path / "out")[0])
    assert {layer.num_experts for layer in found.layers} == {3}
    assert found.skips


@pytest.mark.nightly
@pytest.mark.parametrize("weights", ["memory", "disk"])
def test_a_stopped_chain_goes_on_where_it_was(
    weights: str, chain: Recipe, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: Callable[..., None]
) -> None:
    """What a step has put into its work folder is there again; steps that were whole do not run again."""
    chain["weights"] = weights
    monkeypatch.setattr(Nudge, "stops", True)
    with pytest.raises(KeyboardInterrupt):
        compressor.compress(chain)
    monkeypatch.setattr(Nudge, "stops", False)
    does(interrupt)
    with pytest.raises(KeyboardInterrupt):
        compressor.compress(chain, resume=True)
    does()
    compressor.compress(chain, resume=True)
    assert [source.name for source, _ in Nudge.given[2:]] == ["1.nudge"]
    torch.testing.assert_close(norm(tmp_path / "out"), 3 * 2 * norm(model))


def test_a_stopped_one_goes_on_where_nothing_was_observed(
    chain: Recipe, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain |= {"passes": [{"nudge": {}}]}
    del chain["evaluate"]
    with monkeypatch.context() as within:
        within.setattr(Nudge, "stops", True)
        with pytest.raises(KeyboardInterrupt):
            compressor.compress(chain)
    compressor.compress(chain, resume=True)
    torch.testing.assert_close(norm(tmp_path / "out"), 3 * norm(model))


def test_a_quantised_one_that_nobody_has_announced(chain: Recipe, tmp_path: Path, does: Callable[..., None]) -> None:
    does(quantise)
    chain["passes"] = [{"expert_pruning": {"keep": 6}}, {"cast": {}}, {"nudge": {}}]
    says = r"passes\[2\].nudge: the checkpoint that the pass before has left is quantised, and no pass goes on with it"
    original = Cast.check
    try:
        Cast.check = lambda self, layers: Plan(layers)  # type: ignore[method-assign]
        with pytest.raises(PluginError, match=says):
            compressor.compress(chain)
    finally:
        Cast.check = original  # type: ignore[method-assign]
    assert not (tmp_path / "out").exists()


def test_weights_are_not_fitted_to_what_is_measured(chain: Recipe, recipe: Recipe, tmp_path: Path) -> None:
    chain["evaluate"] = recipe["evaluate"]
    says = r"passes\[1\].nudge: nudge would fit weights to 'tokens', which holds 4 of the 4 sequences"
    with pytest.raises(RecipeError, match=says):
        compressor.compress(chain)
    assert Nudge.given == []
    assert not (tmp_path / "out").exists()


# What is refused -------------------------------------------------------------------------------------------


def fail(source: Path, target: Path) -> None:
    raise KeyError("a bug of somebody else's")


def remove_config(source: Path, target: Path) -> None:
    (target / "config.json").unlink()


def remove_weights(source: Path, target: Path) -> None:
    (target / WEIGHTS).unlink()


def cut_weights(source: Path, target: Path) -> None:
    whole = (target / WEIGHTS).read_bytes()
    (target / WEIGHTS).write_bytes(whole[:-100])


def with_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Step:
    def step(source: Path, target: Path) -> None:
        tensors = load_file(target / WEIGHTS)
        change(tensors)
        save_file(tensors, target / WEIGHTS, {"format": "pt"})

    return step


def more_words(tensors: dict[str, torch.Tensor]) -> None:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:8]])


def other_tokenizer(source: Path, target: Path) -> None:
    text = (target / "tokenizer.json").read_text()
    (target / "tokenizer.json").write_text(text.replace('"w5"', '"other"'))


def link_weights(source: Path, target: Path) -> None:
    (target / WEIGHTS).unlink()
    (target / WEIGHTS).symlink_to(source / WEIGHTS)


def forget_skipping(source: Path, target: Path) -> None:
    left = json.loads((target / "config.json").read_text())
    del left["compressor"]
    (target / "config.json").write_text(json.dumps(left))


def config(**changes: Any) -> Step:
    return lambda source, target: change_config(target, **changes)


REFUSED: dict[str, tuple[Sequence[Step], str]] = {
    "fails": ([fail], 'its external step failed: KeyError: "a bug of somebody else\'s"'),
    "no config": ([remove_config], "no config.json, so this is no checkpoint."),
    "no weights": ([remove_weights], "expected model.safetensors or model.safetensors.index.json, found no weights"),
    "cut short": ([cut_weights], "model.safetensors: damaged, cut short, or not a safetensors file"),
    "link": ([link_weights], "model.safetensors is a link; files are to be there themselves."),
    "other class": ([config(model_type="qwen3_moe")], "its model_type is 'qwen3_moe'; expected 'mixtral'."),
    "experts": ([config(num_local_experts=4, num_experts=4)], "its config has num_local_experts = 4; expected 8."),
    "top k": ([config(num_experts_per_tok=1)], "its config has num_experts_per_tok = 1; expected 2."),
    "vocabulary": (
        [with_tensors(more_words), config(vocab_size=72)],
        "its vocabulary has 72 entries; expected 64.",
    ),
    "tokenizer": ([other_tokenizer], "its tokenizer is another one; leave that of "),
    "missing": (
        [with_tensors(lambda tensors: tensors.__delitem__("model.norm.weight"))],
        "1 tensor(s) are missing from the checkpoint: model.norm.weight.",
    ),
    "mismatched": (
        [with_tensors(lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))],
        "1 tensor(s) have other shapes in the checkpoint: model.norm.weight",
    ),
    "unexpected": (
        [with_tensors(lambda tensors: tensors.update({"model.more": torch.ones(3)}))],
        "1 tensor(s) are not expected in the checkpoint: model.more.",
    ),
    "not finite": (
        [with_tensors(lambda tensors: tensors["lm_head.weight"].fill_(torch.inf))],
        "tensor lm_head.weight holds 2,048 value(s) that are NaN or infinite.",
    ),
    "too large": (
        [with_tensors(lambda tensors: tensors["lm_head.weight"].fill_(3e38))],
        "it answers NaN or infinity to calibration text.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_step_that_is_refused(
    case: str, recipe: Recipe, model: Path, tmp_path: Path, does: Callable[..., None]
) -> None:
    """By name, with its place; nothing is left, and the source is as it was."""
    steps, says = REFUSED[case]
    does(*steps)
    before = contents(model)
    with pytest.raises(PluginError) as error:
        compressor.compress(recipe | {"passes": recipe["passes"][1:]})
    assert str(error.value).startswith("recipe passes[0].cast: ")
    assert says in str(error.value)
    assert contents(model) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tokens.jsonl"]


def write_anew(source: Path, target: Path) -> None:
    save_file({"a": torch.ones(1)}, source / WEIGHTS)


def write_in_place(source: Path, target: Path) -> None:
    path = source / WEIGHTS
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def leave_a_file(source: Path, target: Path) -> None:
    (source / "cache").write_text("")


@pytest.mark.parametrize(
    ("only", "weights", "step"),
    [
        (True, "memory", write_anew),
        pytest.param(True, "disk", write_in_place, marks=pytest.mark.nightly),
        (False, "memory", write_in_place),
        (False, "disk", leave_a_file),
    ],
)
def test_a_step_that_writes_where_it_reads(
    only: bool, weights: str, step: Step, recipe: Recipe, tmp_path: Path, does: Callable[..., None]
) -> None:
    does(step)
    recipe |= {"passes": recipe["passes"][only:], "weights": weights}
    with pytest.raises(PluginError, match=r"its external step has changed .*, which it was given to read"):
        compressor.compress(recipe)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tokens.jsonl"]


def test_a_step_that_loses_what_layers_skip(recipe: Recipe, tmp_path: Path, does: Callable[..., None]) -> None:
    does(forget_skipping)
    recipe["passes"].insert(1, {"dynamic_skipping": {}})
    with pytest.raises(PluginError, match=r"passes\[2\].cast: .* its config has lost, or changed, `compressor`"):
        compressor.compress(recipe)
    assert not (tmp_path / "out").exists()


def test_nothing_reads_a_quantised_one_that_skips(recipe: Recipe, tmp_path: Path, does: Callable[..., None]) -> None:
    does(quantise)
    recipe["passes"].insert(1, {"dynamic_skipping": {}})
    with pytest.raises(PluginError, match=r"it is quantised, and nothing reads a quantised one that skips experts\."):
        compressor.compress(recipe)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"passes": [{"cast": {}}, {"expert_pruning": {"keep": 6}}]},
            "passes[1].expert_pruning: cast has stored weights with 16 bits by then, in files that no pass goes on "
            "with: put expert_pruning before it",
        ),
        (
            {"output": None},
            "passes[1].cast: cast turns a checkpoint into another one, in files, so it needs an `output`",
        ),
        (
            {"evaluate": {"each_pass": True}},
            "evaluate.each_pass: cast turns a checkpoint into another one, which is not measured alone",
        ),
        (
            {"passes": [{"cast": {}}], "evaluate": {"random": 1}},
            "evaluate.random: no pass drops experts, so there is nothing to draw at random; leave it out",
        ),
    ],
)
def test_a_recipe_that_is_refused(changes: Recipe, says: str, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        compressor.compress({key: value for key, value in (recipe | changes).items() if value is not None})
    assert says in str(error.value)
    assert Cast.asked == []
    assert not (tmp_path / "out").exists()


def test_a_check_says_so(recipe: Recipe) -> None:
    plugins = pipeline.load_plugins()
    loaded = pipeline.load_recipe(recipe, methods=plugins.methods, criteria=plugins.criteria)
    plan = check.check(loaded).plan
    assert "cast turns the checkpoint into another one; what that takes only cast knows" in plan["notes"]
    only = dataclasses.replace(loaded, passes=loaded.passes[:1])
    assert plan["needs"]["disk"] == check.check(only).plan["needs"]["disk"] + plan["bytes"]["after"]


def test_apply_refuses_it(recipe: Recipe, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compressor.compress(recipe)
    monkeypatch.setattr("compressor.run.apply.load_plugins", pipeline.load_plugins)
    with pytest.raises(RecipeError, match="cast turns a checkpoint into another one, which only a run does: run its"):
        apply(tmp_path / "out" / "compressor" / "decision.json", str(model), tmp_path / "applied")
    assert not (tmp_path / "applied").exists()


def test_how_far_answers_are() -> None:
    """Twice the logits (0, log 3): chances of 1/4, 3/4 become 1/10, 9/10. KL = (log 2.5)/4 + 3 (log 5/6)/4."""
    given = torch.tensor([[0.0, math.log(3)]] * 2)
    kl = math.log(2.5) / 4 + 3 * math.log(5 / 6) / 4
    found = external.difference(given, 2 * given, max_kl=kl * 1.001)
    assert found == {"external_difference": pytest.approx(1), "external_kl": pytest.approx(kl, rel=1e-5)}
    with pytest.raises(CheckpointError, match=r"its answers are 0\.0923 nats a token from those .* \(`max_kl`\)\."):
        external.difference(given, 2 * given, max_kl=kl * 0.999)


# Interrupted -----------------------------------------------------------------------------------------------


def interrupt(source: Path, target: Path) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("weights", [pytest.param("memory", marks=pytest.mark.nightly), "disk"])
def test_stopped_within_it(weights: str, recipe: Recipe, tmp_path: Path, does: Callable[..., None]) -> None:
    """It runs again, into an empty folder, and the output is that of a run that nothing has stopped."""
    recipe["weights"] = weights
    compressor.compress(recipe, output=tmp_path / "whole")
    does(interrupt)
    with pytest.raises(KeyboardInterrupt):
        compressor.compress(recipe)
    assert not (tmp_path / "out").exists()
    does()
    compressor.compress(recipe, resume=True)
    assert len(Cast.asked) == 3
    same = (WEIGHTS, "config.json", "compressor/decision.json", "compressor/statistics.safetensors")
    for name in same:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("weights", "where", "times"),
    [
        ("disk", "measure", 1),
        pytest.param("memory", "write_record", 2, marks=pytest.mark.nightly),
        pytest.param("memory", "measure", 1, marks=pytest.mark.nightly),
        pytest.param("disk", "write_record", 2, marks=pytest.mark.nightly),
    ],
)
def test_stopped_behind_it(
    where: str, times: int, weights: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is measured what it has left is gone on with; once that has begun to be moved it runs again."""
    recipe["weights"] = weights

    def stop(*args: Any, **others: Any) -> Any:
        if where == "write_record" or args[3] == "after":
            raise KeyboardInterrupt
        return kept(*args, **others)

    kept = getattr(pipeline, where)
    with monkeypatch.context() as within:
        within.setattr(pipeline, where, stop)
        with pytest.raises(KeyboardInterrupt):
            compressor.compress(recipe)
    assert not (tmp_path / "out").exists()
    record = compressor.compress(recipe, resume=True).record
    assert len(Cast.asked) == times
    assert compressor.load(tmp_path / "out")[0].dtype == torch.bfloat16
    assert figures(record) == figures(pipeline.evaluate({**recipe, "output": None}, str(tmp_path / "out")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "tokens.jsonl"]
