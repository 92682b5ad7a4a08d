"""Choices compared by what the model's answers lose: the best is taken, all stand in the record, from disk too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import random_model, tiny_folder, token_ids, write_checkpoint, write_token_file

import compressor
from compressor import RecipeError
from compressor.data.sequences import TokenBatch
from compressor.machine.progress import Progress
from compressor.observe import forward
from compressor.observe.divergence import kl_divergences
from compressor.observe.statistic import Gathered
from compressor.recipe.schema import load_recipe
from compressor.selection.layer_plan import measured_amount, measured_ways, rivals
from compressor.testing.tiny import tiny_model
from compressor_expert_pruning import ExpertPruning, ExpertPruningOptions
from compressor_expert_pruning.criteria import CRITERIA

BY_NAME = {criterion.name: criterion for criterion in CRITERIA}


def options(**given: Any) -> ExpertPruningOptions:
    return ExpertPruningOptions(**given)


def test_what_is_compared() -> None:
    assert list(rivals(options(keep={"mean": 6}), BY_NAME, ["one", "two"], several=True)) == [
        "each layer's best",
        "search, measured counts",
        "weighted_ean, measured counts",
        "reap, measured counts",
        "search, even counts",
        "weighted_ean, even counts",
    ]
    assert list(rivals(options(keep={"mean": 6}), BY_NAME, ["one", "two"], several=False)) == [
        "search, measured counts",
        "weighted_ean, measured counts",
        "reap, measured counts",
        "search, worst domain, measured counts",
        "search, even counts",
        "weighted_ean, even counts",
    ]
    assert list(rivals(options(keep=6, choose="measured", criterion="ean"), BY_NAME, ["one"], several=False)) == [
        "ean",
        "weighted_ean",
        "reap",
    ]
    for given in ({"keep": 6}, {"keep": {"mean": 6}, "share": "measured"}, {"keep": {"mean": 6}, "choose": "given"}):
        assert len(rivals(options(**given), BY_NAME, ["one", "two"], several=False)) == 1
        assert ExpertPruning(options(**given), BY_NAME).alternatives([], Gathered({})) == {}
    for given in ({}, {"replace": "measured"}):  # of two kinds six together
        both = options(keep={"mean": 6}, **given).kinds
        assert [name for kind in both for name in rivals(kind, BY_NAME, ["one"], several=True)] == [
            "each layer's best",
            "search, measured counts",
            "search, even counts",
            "each layer's best, constants",
            "search, measured counts, constants",
            "search, even counts, constants",
        ]


@pytest.mark.parametrize(
    ("given", "replacement"),
    [
        ({}, "measured"),
        ({"choose": "measured", "protect": {"1": [0]}, "blend": "worst"}, "measured"),
        ({"replace": "none"}, "none"),
        ({"choose": "given"}, "none"),
        ({"share": "measured"}, "none"),
        ({"criterion": "ean"}, "none"),
        ({"padded": True}, "none"),
        ({"multiple_of": 2}, "none"),
        ({"top_k": 1}, "none"),
        ({"ranks": 4}, "none"),
        ({"keep": 6}, "none"),
        ({"keep": 6, "choose": "measured"}, "none"),
    ],
)
def test_constants_are_among_the_choices_of_a_bare_mean(given: dict[str, Any], replacement: str) -> None:
    assert options(**{"keep": {"mean": 6}, **given}).replacement == replacement


@pytest.mark.parametrize(("num_layers", "tokens", "counts"), [(4, 3840, 8), (8, 3840, 7), (32, 2560, 3), (48, 1536, 3)])
def test_two_kinds_cost_no_more_than_one(num_layers: int, tokens: int, counts: int) -> None:
    """C counts of each kind in L layers are C·(L + 1) forwards: at most 128 × 2048 tokens."""
    for kind in options(keep={"fraction": 0.5}).kinds:
        assert measured_amount(kind, num_layers) == (tokens, counts)
        ways = measured_ways(kind, BY_NAME, num_layers, counts)
        assert 2 * len(ways) * counts * (num_layers + 1) / 2 * tokens <= 128 * 2048


def test_how_many_ways_are_measured() -> None:
    """As many as cost no more than a run over 128 × 2048 tokens: 7 sets of 4 layers on 3840 tokens are 67,200."""

    def ways(num_layers: int, num_counts: int, **given: Any) -> list[str | None]:
        wanted = options(keep={"fraction": 0.5}, **given)
        return [one.criterion for one in measured_ways(wanted, BY_NAME, num_layers, num_counts)]

    assert ways(4, 7) == [None, "weighted_ean", "reap"]
    assert ways(8, 7) == [None, "weighted_ean"]
    assert ways(32, 4) == [None]
    assert ways(4, 7, choose="given") == ways(4, 7, share="measured") == [None]
    assert ways(4, 7, criterion="ean") == ["ean"]


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    model = write_checkpoint(random_model("mixtral", num_hidden_layers=2), tmp_path / "model")
    texts = [write_token_file(tmp_path / f"{n}.jsonl", token_ids(6, 24, seed=n).tolist()) for n in (1, 2)]
    return {
        "model": str(model),
        "calibration": {"batch_size": 3, "data": [{"tokens": str(one), "name": one.stem} for one in texts]},
        "passes": [{"expert_pruning": {"keep": {"mean": 5}, "replace": "none", "measured_counts": 2}}],
    }


def test_the_best_is_taken_from_memory_and_from_disk(recipe: dict[str, Any], tmp_path: Path) -> None:
    result = compressor.compress(recipe, output=tmp_path / "memory")
    decision = result.record["passes"][0]["decision"]
    chosen = decision["chosen"]
    costs = {name: one["cost"] for name, one in chosen["alternatives"].items()}
    assert len(costs) == 6
    assert costs[chosen["name"]] == min(costs.values())
    assert chosen["tokens"] == 2 * 6 * 24  # all there is
    compressor.compress(recipe, output=tmp_path / "disk", overrides=["weights=disk"])
    name = "compressor/decision.json"
    assert (tmp_path / "disk" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()
    # what was taken loses as much as whole forwards under its mask say
    loaded = compressor.MoEModel(compressor.load(recipe["model"])[0].eval())
    kept = {path: layer["kept"] for path, layer in decision["layers"].items()}
    for seed, domain in ((1, "1"), (2, "2")):
        ids = token_ids(6, 24, seed=seed)
        batch = TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool))
        plain = forward.logits(loaded.model, batch)
        with loaded.masked(kept):
            kl = kl_divergences(plain, forward.logits(loaded.model, batch))
        assert chosen["alternatives"][chosen["name"]]["kl"][domain] == pytest.approx(float(kl.mean()), rel=1e-3)


def test_blend_weighs_what_is_lost() -> None:
    lost = {"one": 0.2, "two": 0.6}
    for blend, cost in (("mean", 0.4), ("pooled", 0.4), ("worst", 0.6), ({"one": 3, "two": 1}, 0.3)):
        assert ExpertPruning(options(keep=6, blend=blend)).cost(lost) == pytest.approx(cost)


def test_progressive_is_not_compared() -> None:
    with pytest.raises(ValueError, match="say `choose: given`"):
        options(keep=6, progressive=True, choose="measured")


def test_options_are_written_as_they_are_read(tmp_path: Path) -> None:
    text, keep = {"data": [{"demo": "mix"}]}, {"fraction": 0.5, "min": 3}
    recipe = {"model": "demo", "calibration": text, "passes": [{"expert_pruning": {"keep": keep}}]}
    loaded = load_recipe(recipe, methods={"expert_pruning": ExpertPruning})
    (tmp_path / "again.yaml").write_text(loaded.to_yaml())
    again = load_recipe(tmp_path / "again.yaml", methods={"expert_pruning": ExpertPruning})
    assert again.passes[0].method.options == loaded.passes[0].method.options
    assert loaded.to_mapping()["passes"][0]["expert_pruning"]["keep"] == {"fraction": 0.5, "min": 3}


def test_little_text_is_said(recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    compressor.compress(recipe, progress=Progress("lines"))
    assert "expert_pruning: what the answers lose is measured on 288 tokens, so it is" in capsys.readouterr().err
    recipe["passes"] = [{"expert_pruning": {"keep": 6}}]
    compressor.compress(recipe, progress=Progress("lines"))
    assert "what the answers lose" not in capsys.readouterr().err


def test_without_the_model_nothing_is_compared(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["passes"] = [{"expert_pruning": {"keep": {"mean": 5}, "measured_counts": 2, "choose": "given"}}]
    files = []
    for number, one in enumerate(recipe["calibration"]["data"]):
        text = {**recipe["calibration"], "data": [one]}
        compressor.compress({**recipe, "calibration": text}, output=tmp_path / f"{number}")
        files.append(tmp_path / f"{number}" / "compressor" / "statistics.safetensors")
    with pytest.raises(RecipeError, match="chosen by what the model's answers lose: run a recipe for it"):
        compressor.decide(files[0], keep=5, choose="measured")
    with pytest.raises(
        RecipeError, match=r"Of several files measured\.candidates, .*measured\.kl.* cannot be added up"
    ):
        compressor.decide(files, keep={"mean": 5})
    decided = compressor.decide(files[0], keep={"mean": 5})["passes"][0]["decision"]
    assert sum(len(layer["kept"]) for layer in decided["layers"].values()) == 5 * len(decided["layers"])


# Constants among the choices, where nobody asked for them ----------------------------------------------------


BARE: dict[str, Any] = {"expert_pruning": {"keep": {"mean": 5}, "measured_counts": 2, "measured_tokens": 256}}


def test_constants_are_measured_without_being_asked_for(recipe: dict[str, Any], tmp_path: Path) -> None:
    both = {**recipe, "passes": [BARE]}
    memory = compressor.compress(both, output=tmp_path / "memory", overrides=["weights=memory"])
    compressor.compress(both, output=tmp_path / "disk", overrides=["weights=disk"])
    for file in ("compressor/decision.json", "compressor/decision.safetensors", "model.safetensors"):
        first, second = (tmp_path / place / file for place in ("memory", "disk"))
        assert first.exists() == second.exists()
        assert not first.exists() or first.read_bytes() == second.read_bytes()
    done = memory.record["passes"][0]
    assert done["options"]["replace"] is None
    costs = {name: one["cost"] for name, one in done["decision"]["chosen"]["alternatives"].items()}
    assert [name.endswith("constants") for name in costs] == [False] * 3 + [True] * 3 or [
        name.endswith("constants") for name in costs
    ] == [True] * 3 + [False] * 3
    name = done["decision"]["chosen"]["name"]
    assert costs[name] == min(costs.values())
    assert done["decision"].get("replace", "none") == ("constants" if name.endswith("constants") else "none")
    figures = tmp_path / "disk" / "compressor" / "statistics.safetensors"
    kinds = [compressor.decide(figures, keep={"mean": 5}, replace=kind) for kind in ("none", "constants")]
    least = min((one["passes"][0]["decision"] for one in kinds), key=lambda one: float(one["budget"]["summed_kl"]))
    least["budget"]["even"] = kinds[0]["passes"][0]["decision"]["budget"]["even"]
    assert compressor.decide(figures, keep={"mean": 5})["passes"][0]["decision"] == least
    assert done["decision"]["budget"]["even"] == least["budget"]["even"]


@pytest.mark.parametrize(
    ("name", "behind", "why"),
    [
        ("mixtral", [{"output_scale": {}}], "output_scale would edit weights"),
        ("mixtral", [BARE], "which cannot be"),
        ("gpt_oss", [], "its files hold all experts in one tensor"),
    ],
)
def test_what_takes_no_constants_gets_none(recipe: dict[str, Any], name: str, behind: list[Any], why: str) -> None:
    first = {"expert_pruning": {"keep": {"mean": 6}}}
    plan = compressor.check({**recipe, "model": str(tiny_folder(name)), "passes": [first, *behind]})
    [note] = [note for note in plan.plan["notes"] if note.startswith("expert_pruning does without constants: ")]
    assert why in note
    assert plan.loaded is not None
    assert [one.method.options.replace for one in plan.loaded.passes if one.spec.method == "expert_pruning"] == [
        "none" for one in (first, *behind) if "expert_pruning" in one
    ]


def test_what_takes_constants_gets_them(recipe: dict[str, Any]) -> None:
    plan = compressor.check({**recipe, "passes": [BARE, {"dynamic_skipping": {}}]})
    assert any("will answer constants, if the model's answers lose less so" in note for note in plan.plan["notes"])
    assert plan.loaded is not None
    assert plan.loaded.passes[0].method.options.replace is None


def test_where_neither_can_be_it_is_said_without_constants(recipe: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"a mean of 9 is 18 experts in 2 layers, which cannot be"):
        compressor.check({**recipe, "passes": [{"expert_pruning": {"keep": {"mean": 9}}}]})


def test_where_no_constant_can_stand_in_a_block_none_is_measured(recipe: dict[str, Any]) -> None:
    """A norm stands between the experts and what comes out of the block, which only the run sees."""
    run = {**recipe, "model": "live", "passes": [BARE]}
    done = compressor.compress(run, tiny_model("axk1")).record["passes"][0]["decision"]
    assert list(done["chosen"]["alternatives"]) == [
        "each layer's best", "search, measured counts", "search, even counts"
    ]  # fmt: skip
