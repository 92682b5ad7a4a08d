"""Passes one after another: whose ids a decision names, what chance would have done, what is computed only once."""

from __future__ import annotations

import dataclasses
import html
import io
import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from reference_pages import unexplained
from rich.console import Console
from tiny_models import random_model, tiny_folder, token_ids, write_checkpoint, write_token_file

import compressor
from compressor import MoELayer, MoEModel, RecipeError
from compressor.data.sequences import Sequences, make_batches
from compressor.evaluation.perplexity import perplexity
from compressor.machine.progress import Progress
from compressor.observe import forward
from compressor.observe.divergence import kl_divergences
from compressor.plugin import Decision, LayerWeights, Method, Options, Plan, Statistic, fewer_experts, kept_at_random
from compressor.plugins import load_plugins
from compressor.report.figures import shown_layers
from compressor.report.terminal import print_summary
from compressor.run import passes, pipeline
from compressor.wording import ids_said

PATHS = [f"model.layers.{number}.mlp" for number in range(3)]
SUPER = 5


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_token_file(tmp_path / "tokens.jsonl", token_ids(8, 24).tolist())


@pytest.fixture
def recipe(text: Path) -> Callable[..., dict[str, Any]]:
    def make(*passes: dict[str, Any], model: Path | None = None, **others: Any) -> dict[str, Any]:
        data = [{"tokens": str(text), "name": "text"}]
        calibration = {"batch_size": 8, "data": data}
        return {"model": str(model or tiny_folder("mixtral")), "calibration": calibration, "passes": passes, **others}

    return make


# ids


@pytest.fixture
def with_super_expert(tmp_path: Path) -> Path:
    """Expert 5 of the first layer puts out numbers of another size."""
    model = random_model("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[SUPER] *= 200
    return write_checkpoint(model, tmp_path / "model")


def printed(record: dict[str, Any]) -> str:
    text = io.StringIO()
    print_summary(record, Console(file=text, width=200, no_color=True))
    return text.getvalue()


def test_all_ids_of_an_entry_are_those_that_its_pass_saw(
    recipe: Callable[..., dict[str, Any]], with_super_expert: Path, tmp_path: Path
) -> None:
    first = {"expert_pruning": {"keep": 6, "forbid": {0: [0, 1]}}}
    second = {"expert_pruning": {"keep": 4, "forbid": {0: [SUPER - 2]}}}
    settings = recipe(first, second, model=with_super_expert)
    record = compressor.compress(settings, output=tmp_path / "out").record
    one, two = record["passes"]
    assert "original_ids" not in one
    assert one["decision"]["layers"][PATHS[0]]["super_experts"] == [SUPER]
    assert two["original_ids"][PATHS[0]] == one["decision"]["layers"][PATHS[0]]["kept"] == [2, 3, 4, 5, 6, 7]
    layer = two["decision"]["layers"][PATHS[0]]
    assert layer["super_experts"] == [SUPER - 2]
    assert SUPER - 2 in layer["dropped"]
    assert sorted(layer["kept"] + layer["dropped"]) == list(range(6))
    # whoever reads finds the original's ids, all of them
    dropped = ", ".join(str(two["original_ids"][PATHS[0]][expert]) for expert in layer["dropped"])
    card = (tmp_path / "out" / "README.md").read_text()
    drawn = html.unescape((tmp_path / "out" / "compressor" / "report.html").read_text())
    for shown in (printed(record), card, drawn):
        assert f"super experts, whose outputs are extreme: {PATHS[0]}: {SUPER}; all of them stay" in shown
        assert f"dropped of these, which can ruin a model: {PATHS[0]}: {SUPER}" in shown
        assert "experts have the original model's ids here" in shown
    assert f"<td>{dropped}</td>" in drawn
    left = [two["original_ids"][PATHS[0]][expert] for expert in layer["kept"]]
    assert f"| `{PATHS[0]}` | 4 | {ids_said(left)} | " in card


@pytest.mark.parametrize(("name", "weights"), [("decision.json", "disk"), ("record.json", "memory")])
def test_a_decision_of_two_passes_is_applied_as_it_was_carried_out(
    recipe: Callable[..., dict[str, Any]], with_super_expert: Path, tmp_path: Path, name: str, weights: str
) -> None:
    passes = ({"expert_pruning": {"keep": 6}}, {"dynamic_skipping": {}}, {"expert_pruning": {"keep": 4}})
    compressor.compress(recipe(*passes, model=with_super_expert, weights=weights), output=tmp_path / "out")
    file = tmp_path / "out" / "compressor" / name
    result = compressor.apply(file, str(with_super_expert), tmp_path / "applied")
    for written in ("model.safetensors", "config.json"):
        assert (tmp_path / "applied" / written).read_bytes() == (tmp_path / "out" / written).read_bytes()
    before = json.loads(file.read_text())["passes"]
    ids = [done.get("original_ids") for done in before]
    assert [done.get("original_ids") for done in result.record["passes"]] == ids
    assert ids[0] is None
    assert ids[1] == ids[2] is not None


def test_ids_behind_a_padded_pass(recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Experts that are switched off are still there, and counted by the next pass."""
    model = tiny_folder("deepseek_v3")
    passes = ({"expert_pruning": {"keep": {1: 6, 2: 4}, "padded": True}}, {"expert_pruning": {"keep": 4}})
    record = compressor.compress(recipe(*passes, model=model), output=tmp_path / "out").record
    one, two = record["passes"]
    for path in PATHS[1:]:
        assert len(two["original_ids"][path]) == 6
        assert set(one["decision"]["layers"][path]["kept"]) <= set(two["original_ids"][path])
        assert max(two["decision"]["layers"][path]["kept"]) < 6


def test_a_later_pass_behind_one_that_drops_the_last_experts() -> None:
    """Ids that stay the same numbers are fewer all the same."""
    first = {"decision": {"layers": {PATHS[0]: {"kept": [0, 1, 2, 3]}}}, "method": "m"}
    second = {
        "decision": {"layers": {PATHS[0]: {"kept": [0, 1]}}},
        "method": "m",
        "original_ids": {PATHS[0]: [0, 1, 2, 3]},
    }
    record = {"model": {"reference": "x"}, "layers": [{"path": PATHS[0], "num_experts": 8}], "passes": [first, second]}
    assert [shown_layers(done, record)[PATHS[0]]["dropped"] for done in (first, second)] == [
        [4, 5, 6, 7],
        [2, 3],
    ]


def test_a_run_that_is_cut_off_leaves_a_page_that_says_so(
    recipe: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(passes, "edit", stopped)
    with pytest.raises(KeyboardInterrupt):
        compressor.compress(recipe({"expert_pruning": {"keep": 6}}), output=tmp_path / "out")
    [page] = tmp_path.rglob("report.html")
    for said in ("This run was not finished", f"{tmp_path / 'out'} was not written", "18 of 24 experts stay"):
        assert said in html.unescape(page.read_text())


# applying and deciding


def test_apply_writes_a_record_a_page_and_a_card(recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    model = str(tiny_folder("mixtral"))
    compressor.compress(recipe({"expert_pruning": {"keep": 6}}), output=tmp_path / "out")
    figures = tmp_path / "out" / "compressor" / "statistics.safetensors"
    decided = compressor.decide(figures, output=tmp_path / "decided", keep={0: 5, 1: 6, 2: 6}, criterion="reap")
    assert json.loads((tmp_path / "decided" / "decision.json").read_text()) == decided
    assert "expert_pruning" in (tmp_path / "decided" / "report.html").read_text()
    (tmp_path / "file").touch()
    for place in ("file", "file/below", "x" * 300):
        with pytest.raises(compressor.DiskError, match=r"it cannot be written there: .*\. Choose another output"):
            compressor.decide(figures, output=tmp_path / place, keep=5, criterion="reap")
    with pytest.raises(RecipeError, match=r"decision\.json exists\. Choose another output, or say --overwrite"):
        compressor.decide(figures, output=tmp_path / "decided", keep=5, criterion="reap")
    result = compressor.apply(decided, model, tmp_path / "applied")
    assert (result.folder, result.model) == (tmp_path / "applied", None)
    folder = tmp_path / "applied" / "compressor"
    record = json.loads((folder / "record.json").read_text())
    assert record == json.loads(json.dumps(result.record))
    whole = json.loads((tmp_path / "out" / "compressor" / "record.json").read_text())
    assert record["model"] == whole["model"]
    assert record["layers"] == whole["layers"]
    assert record["decided_on"] == decided["model"]
    assert unexplained(record) == []
    assert record["passes"][0]["decision"] == decided["passes"][0]["decision"]
    assert "evaluation" not in record
    assert "recipe" not in record
    assert set(record["uneven"].values()) == {5, 6}
    card = (tmp_path / "applied" / "README.md").read_text()
    assert "Its layers have different numbers of experts" in card
    assert "## Recipe" not in card
    assert f"| `{PATHS[0]}` | 5 |" in card
    drawn = (folder / "report.html").read_text()
    assert "<h2>expert_pruning</h2>" in drawn
    assert "<h2>Recipe</h2>" not in drawn
    loaded, _ = compressor.load(tmp_path / "applied")
    assert loaded.num_parameters() < random_model("mixtral").num_parameters()
    # what was applied can be applied again
    compressor.apply(folder / "record.json", model, tmp_path / "again")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("again", "applied")]
    assert weights[0] == weights[1]


# chance


class NoOptions(Options):
    pass


class KeepSix(Method[NoOptions]):
    """Keep the first six experts of every layer, and say no more than that."""

    name = "keep_six"
    version = "1"
    api = 2
    options_type: ClassVar[type[Options]] = NoOptions

    def check(self, layers: Any) -> Plan:
        return Plan([fewer_experts(layer, 6, "") for layer in layers])

    def statistic(self, layer: MoELayer) -> Statistic | None:
        return None

    def decide(self, layers: Any, statistics: Any) -> Any:
        return {"layers": {layer.path: {"kept": list(range(6))} for layer in layers}}

    def edit(self, layer: LayerWeights, decision: Decision) -> None:
        layer.keep(decision["layers"][layer.path]["kept"])


def masked(moe: MoEModel, decision: Decision) -> Any:
    kept = {path: layer["kept"] for path, layer in decision["layers"].items()}
    return moe.masked(kept, top_k=decision.get("top_k"))


class KeepFirst(KeepSix):
    """The same, previewed, and by chance others."""

    name = "keep_first"

    def preview(self, moe: MoEModel, decision: Decision) -> Any:
        return masked(moe, decision)

    def control(self, decision: Decision, layers: Any, seed: int) -> Any:
        return kept_at_random(decision, layers, seed)


class Merge(KeepFirst):
    """The same, and what goes is added to what stays."""

    name = "merge"

    def edit(self, layer: LayerWeights, decision: Decision) -> None:
        layer.experts[0]["experts.down_proj"] += layer.experts[7]["experts.down_proj"]
        super().edit(layer, decision)

    def preview(self, moe: MoEModel, decision: Decision) -> Any:
        return None


class MergePreviewed(Merge):
    """The same, previewed."""

    name = "merge_previewed"

    @contextmanager
    def preview(self, moe: MoEModel, decision: Decision) -> Any:
        downs = [layer.mlp.experts.down_proj.data for layer in moe.model.model.layers]
        before = [one.clone() for one in downs]
        for one in downs:
            one[0] += one[7]
        with masked(moe, decision):
            yield
        for one, old in zip(downs, before, strict=True):
            one.copy_(old)


class Silence(KeepSix):
    """Let the first expert of each layer answer nothing: no expert is dropped, and chance has others to silence."""

    name = "silence"

    def check(self, layers: Any) -> Plan:
        return Plan(layers, changes_values=True)

    def decide(self, layers: Any, statistics: Any) -> Any:
        return {"layers": {layer.path: {"silent": 0} for layer in layers}}

    def edit(self, layer: LayerWeights, decision: Decision) -> None:
        layer.experts[decision["layers"][layer.path]["silent"]]["experts.down_proj"] *= 0

    @contextmanager
    def preview(self, moe: MoEModel, decision: Decision) -> Any:
        experts = {path: moe.model.get_submodule(path).experts.down_proj.data for path in decision["layers"]}
        before = {path: one.clone() for path, one in experts.items()}
        for path, one in experts.items():
            one[decision["layers"][path]["silent"]] = 0
        yield
        for path, one in experts.items():
            one.copy_(before[path])

    def control(self, decision: Decision, layers: Any, seed: int) -> Any:
        return {"layers": {layer.path: {"silent": seed + 1} for layer in layers}}


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(without: Any, **others: Any) -> Any:
        own = {one.name: one for one in (KeepSix, KeepFirst, Merge, MergePreviewed, Silence)}
        plugins = load_plugins(without, **others)
        return dataclasses.replace(plugins, methods={**plugins.methods, **own})

    monkeypatch.setattr(pipeline, "load_plugins", load)


def evaluation(text: Path, **others: Any) -> dict[str, Any]:
    return {"random": 2, "perplexity": [{"tokens": str(text), "name": "text"}], **others}


def sequences_of(text: Path) -> Sequences:
    ids = [torch.tensor(json.loads(line)["input_ids"]) for line in text.read_text().splitlines()]
    return Sequences("text", ids, "")


def measured(record: dict[str, Any], when: str = "after") -> float:
    return record["evaluation"][when]["perplexity"]["text"]["perplexity"]


def divergence(model: Any, text: Path) -> float:
    """From the original, by all tokens but the last of each sequence."""
    [batch] = make_batches(sequences_of(text).ids, 8)
    answers = [
        forward.logits(one, batch).view(8, 24, -1)[:, :-1].flatten(0, 1) for one in (random_model("mixtral"), model)
    ]
    return kl_divergences(*answers).mean().item()


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("keep_six", "keep_six draws nothing at random"),
        ("merge", "merge has no preview, under which random decisions could be measured"),
    ],
)
def test_a_method_that_has_no_control_says_so(
    recipe: Callable[..., dict[str, Any]], text: Path, tmp_path: Path, method: str, says: str
) -> None:
    output = tmp_path / "out"
    record = compressor.compress(recipe({method: {}}, evaluate=evaluation(text)), output=output).record
    assert record["passes"][0]["random"] == {"problem": says}
    drawn = (output / "compressor" / "report.html").read_text()
    for shown in (printed(record), (output / "README.md").read_text(), drawn):
        assert f"no random experts to compare with: {says}" in shown
        assert "against random experts" not in shown
        assert "0–5" in shown


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize("method", [MergePreviewed, Silence])
def test_random_decisions_are_measured_as_their_method_previews_them(
    recipe: Callable[..., dict[str, Any]], text: Path, method: type[KeepSix]
) -> None:
    """No loss on calibration text, which would be that of masked experts."""
    record = compressor.compress(recipe({method.name: {}}, evaluate=evaluation(text))).record
    random = record["passes"][0]["random"]
    assert random.keys() == {"seeds", "perplexity", "kl"}
    made, moe = method(NoOptions()), MoEModel(random_model("mixtral"))
    for seed, found in enumerate(random["perplexity"]["text"]["random"]):
        with made.preview(moe, Decision.of(made.control(made.decide(moe.layers, {}), moe.layers, seed))):
            assert found == pytest.approx(perplexity(moe.model, sequences_of(text)).perplexity, rel=1e-6)
            kl = divergence(moe.model, text)
        assert random["kl"]["text"]["random"][seed] == pytest.approx(kl, rel=1e-4)
    assert random["perplexity"]["text"]["ours"] == measured(record)
    assert random["kl"]["text"]["ours"] == record["evaluation"]["fidelity"]["text"]["kl"]


@pytest.mark.usefixtures("plugins")
def test_random_experts_stand_beside_the_model_that_was_made(
    recipe: Callable[..., dict[str, Any]], text: Path, tmp_path: Path
) -> None:
    """Of each pass on what the one before it has left, whatever comes behind it; the same number in both tables."""
    passes = ({"keep_first": {}}, {"expert_pruning": {"keep": 4, "top_k": 1}}, {"expert_pruning": {"keep": {0: 3}}})
    wanted = evaluation(text)
    record = compressor.compress(recipe(*passes, evaluate=wanted)).record
    first, second, third = (done["random"] for done in record["passes"])
    assert third["perplexity"]["text"]["ours"] == measured(record)
    alone = compressor.compress(recipe(passes[0], evaluate=wanted))
    assert first == alone.record["passes"][0]["random"]
    assert first["perplexity"]["text"]["ours"] == measured(alone.record)
    assert first["kl"]["text"]["ours"] == alone.record["evaluation"]["fidelity"]["text"]["kl"]
    both = compressor.compress(recipe(*passes[:2], evaluate=wanted))
    assert second == both.record["passes"][1]["random"]
    assert second["perplexity"]["text"]["ours"] == measured(both.record)
    moe = MoEModel(alone.model)
    for seed in (0, 1):
        chosen = Decision({"layers": {path: {"kept": range(4)} for path in PATHS}, "top_k": 1})
        with masked(moe, kept_at_random(chosen, moe.layers, seed)):
            by_hand, kl = perplexity(moe.model, sequences_of(text)).perplexity, divergence(moe.model, text)
        assert second["perplexity"]["text"]["random"][seed] == pytest.approx(by_hand, rel=1e-6)
        assert second["kl"]["text"]["random"][seed] == pytest.approx(
            kl, rel=1e-4
        )  # from the original, not the first pass


def test_random_experts_of_a_pass_with_skipping_behind_it(
    recipe: Callable[..., dict[str, Any]], text: Path, tmp_path: Path
) -> None:
    passes = ({"expert_pruning": {"keep": 6}}, {"dynamic_skipping": {"mean_experts": 1.5, "precision": 9}})
    wanted = evaluation(text)
    record = compressor.compress(recipe(*passes, evaluate=wanted)).record
    alone = compressor.compress(recipe(passes[0], evaluate=wanted)).record
    pruned, skipped = record["passes"]
    assert pruned["random"] == alone["passes"][0]["random"]
    assert pruned["random"]["perplexity"]["text"]["ours"] != measured(record)
    assert skipped["random"] == {"problem": "dynamic_skipping draws nothing at random"}
    streamed = compressor.compress(recipe(*passes, evaluate=wanted, weights="disk"), output=tmp_path / "disk").record
    found, expected = (one["passes"][0]["random"]["perplexity"]["text"] for one in (streamed, record))
    assert found["ours"] == pytest.approx(expected["ours"], rel=1e-6)
    assert found["random"] == pytest.approx(expected["random"], rel=1e-6)


# once


def test_no_logits_are_computed_twice(
    recipe: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Untouched, with all experts kept, previewed, edited; the next pass and the saved checkpoint take the last."""
    calls: list[Any] = []
    logits = forward.logits
    monkeypatch.setattr(forward, "logits", lambda model, batch: calls.append(model) or logits(model, batch))
    passes = ({"expert_pruning": {"keep": 6}}, {"expert_pruning": {"keep": 4}})
    compressor.compress(recipe(*passes), output=tmp_path / "out")
    assert len(calls) == 4 + 3 + 1
    assert calls[-1] is not calls[0]


# completed


def test_resuming_what_is_complete_is_done_at_once(
    recipe: Callable[..., dict[str, Any]],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = recipe({"expert_pruning": {"keep": 6}}, output=str(tmp_path / "out"))
    record = compressor.compress(settings).record
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "InMemory", None)  # no weights are read
        for changes in ({}, {"memory": "64GB"}):
            again = compressor.compress({**settings, **changes}, resume=True, progress=Progress("lines"))
            assert again.record["passes"][0]["decision"] == record["passes"][0]["decision"]
            assert again.folder == tmp_path / "out"
            assert "out: a run of this recipe has written it already; nothing is left to do" in capsys.readouterr().err
    with pytest.raises(compressor.CheckpointError, match="out exists already"):
        compressor.compress(settings)  # not asked to resume
    with pytest.raises(compressor.CheckpointError, match="out exists already"):
        compressor.compress(settings, overrides=["passes.0.expert_pruning.keep=5"], resume=True)
    weights = tmp_path / "out/model.safetensors"
    weights.write_bytes(before[weights][:-100])
    with pytest.raises(compressor.CheckpointError, match="out exists already"):
        compressor.compress(settings, resume=True, progress=Progress("lines"))
    assert "what a run of this recipe has written is damaged: " in capsys.readouterr().err
    weights.write_bytes(before[weights])
    other = write_checkpoint(random_model("mixtral", seed=1), tmp_path / "other")
    with pytest.raises(compressor.CheckpointError, match="out exists already"):
        compressor.compress({**settings, "model": str(other)}, resume=True)
    write_token_file(text, token_ids(8, 24, seed=1).tolist())
    with pytest.raises(compressor.CheckpointError, match="out exists already"):
        compressor.compress(settings, resume=True)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert not list(tmp_path.glob(".*"))
