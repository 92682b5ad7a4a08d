"""What outputs say to others: kept ids, ik_llama.cpp's line, statistics as a data set; and a choice for a sibling."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from tiny_models import small_mixtral, tiny_folder, token_ids, write_checkpoint, write_token_file

import compressor
from compressor import CheckpointError, RecipeError
from compressor.cli import _exit_status
from compressor.observe.statistics_file import load_statistics
from compressor.run.export import kept_ids, publish_statistics, ser

Json = dict[str, Any]
TWO_PASSES = [
    {"expert_pruning": {"keep": 6, "criterion": "reap"}},
    {"expert_pruning": {"keep": 4, "criterion": "reap"}},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and what two passes leave of it. Never write into it."""
    folder = tmp_path_factory.mktemp("made")
    write_checkpoint(small_mixtral(), folder / "model")
    write_token_file(folder / "text.jsonl", token_ids(24, 24).tolist())
    compressor.compress(recipe(folder, TWO_PASSES), output=folder / "pruned")
    return folder


@pytest.fixture(scope="module")
def skips(made: Path) -> Path:
    """The same model, which skips by the median of each layer. Never write into it."""
    compressor.compress(recipe(made, [{"dynamic_skipping": {"precision": 1.0}}]), output=made / "skips")
    return made / "skips"


def recipe(folder: Path, passes: list[Json], model: str = "model") -> Json:
    text = {"tokens": str(folder / "text.jsonl")}
    return {"model": str(folder / model), "calibration": {"data": [text]}, "passes": passes}


def record_of(folder: Path) -> Json:
    return dict(json.loads((folder / "compressor" / "record.json").read_text()))


def changed(folder: Path, made: Path, change: Any) -> Path:
    """A copy of an output whose record is changed in place."""
    copy = Path(shutil.copytree(made, folder / "copy"))
    record = record_of(copy)
    change(record)
    (copy / "compressor" / "record.json").write_text(json.dumps(record))
    return copy


# --- kept ids


def test_ids_are_the_originals_through_several_passes(made: Path, tmp_path: Path) -> None:
    found = kept_ids(made / "pruned")
    first, second = record_of(made / "pruned")["passes"]
    for number in "01":
        path = f"model.layers.{number}.mlp"
        after = first["decision"]["layers"][path]["kept"]
        assert found[number] == [after[one] for one in second["decision"]["layers"][path]["kept"]]
    (tmp_path / "ids.json").write_text(json.dumps(found))
    again = compressor.compress(
        {"model": str(made / "model"), "passes": [{"kept_experts": {"file": str(tmp_path / "ids.json")}}]},
        output=tmp_path / "again",
    )
    assert again.folder is not None
    one, other = ((folder / "model.safetensors").read_bytes() for folder in (made / "pruned", again.folder))
    assert one == other


def test_what_has_no_ids_to_share(made: Path, skips: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match="all experts stay; kept ids can be exported where passes have removed experts"
    ):
        kept_ids(skips)
    constants = changed(tmp_path, made / "pruned", lambda record: record.update(constants={"0": [1]}))
    with pytest.raises(RecipeError, match="experts answer constants, of which ids say nothing"):
        kept_ids(constants)
    with pytest.raises(CheckpointError, match=r"none: there is no such folder; expected the output of a run"):
        kept_ids(made / "none")
    with pytest.raises(CheckpointError, match=r"it is no output of a run, which has a compressor/record.json"):
        kept_ids(made / "model")
    for text in ('{"model": {"a": 1}, "passes": [{"decision": {}}]}', "[1]", "{}"):
        (constants / "compressor" / "record.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"it is no output of a run, which has .* passes over layers\.$"):
            kept_ids(constants)


# --- ser


def test_one_threshold_in_the_place_of_several(skips: Path) -> None:
    found, decision = ser(skips), record_of(skips)["passes"][0]["decision"]
    one, layers = decision["one_threshold"], list(decision["layers"].values())
    assert found["line"] == f"-ser 1,{one['beta']:.9g}"
    assert one["mean_experts"] == pytest.approx(decision["mean_experts"], abs=0.01)
    assert one["instead_of"] == pytest.approx(sum(layer["relative_loss"] for layer in layers) / 2)
    assert f"and lose {one['relative_loss']:.4g} instead of {one['instead_of']:.4g}" in found["says"]
    assert "take -ser and do nothing with it" in found["says"]
    same = compressor.decide(
        skips / "compressor" / "statistics.safetensors",
        "dynamic_skipping",
        rule="ratio",
        threshold=one["beta"],
    )["passes"][0]["decision"]
    assert "one_threshold" not in same
    assert same["ser"]["line"] == found["line"]
    assert same["ser"]["says"].startswith("As decided, in every layer.")
    losses = [layer["relative_loss"] for layer in same["layers"].values()]
    assert one["relative_loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)


def test_a_fixed_number(made: Path) -> None:
    """-ser K,1 divides by the weights that stay, which is what `normalise_over` as large as `top_k` says."""

    def decided(**options: Any) -> Json:
        record = compressor.compress(recipe(made, [{"dynamic_skipping": options}])).record
        return dict(record["passes"][0]["decision"]["ser"])

    assert decided(top_k=1, normalise_over=1)["line"] == "-ser 1,1"
    assert decided(top_k=1) == {"problem": "what stays is divided by its own sum there; say `normalise_over: 1`"}
    assert decided(keep_mass=0.7) == {"problem": "it skips by tail_mass"}


@pytest.mark.nightly
def test_routers_of_which_other_things_are_compared(tmp_path: Path) -> None:
    """DeepSeek-V3's scores have a bias and groups, gpt-oss is compared by logits."""
    write_token_file(tmp_path / "text.jsonl", token_ids(24, 24).tolist())
    for name in ("deepseek_v3", "gpt_oss"):
        asked = recipe(tmp_path, [{"dynamic_skipping": {"threshold": 0.7}}], str(tiny_folder(name)))
        decision = compressor.compress(asked).record["passes"][0]["decision"]
        assert "ik_llama.cpp compares biased scores, groups or logits" in decision["ser"]["problem"], name


def test_outputs_without_a_line(made: Path, skips: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError,
        match=r"pruned: no decision of a pass says such a line; ik_llama.cpp skips by dynamic_skipping's rule ratio",
    ):
        ser(made / "pruned")

    def by_mass(record: Json) -> None:
        record["passes"][0]["decision"]["ser"] = {"problem": "it skips by tail_mass"}

    old = changed(tmp_path / "old", skips, lambda record: record["passes"][0]["decision"].pop("ser"))
    with pytest.raises(RecipeError, match="no decision of a pass says such a line; ik_llama"):
        ser(old)
    with pytest.raises(RecipeError, match=r"copy: it skips by tail_mass; ik_llama.cpp skips by"):
        ser(changed(tmp_path, skips, by_mass))


def test_commands(made: Path, skips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str | Path) -> str:
        assert _exit_status([str(word) for word in words]) == 0
        return capsys.readouterr().out

    assert json.loads(said("export", made / "pruned", "--format", "kept-ids")) == kept_ids(made / "pruned")
    assert said("export", made / "pruned", "--format", "kept-ids", "--output", tmp_path / "ids.json").startswith(
        "Written"
    )
    assert json.loads((tmp_path / "ids.json").read_text()) == kept_ids(made / "pruned")
    assert said("export", skips, "--format", "ser").splitlines()[0] == ser(skips)["line"]
    assert json.loads(said("export", skips, "--format", "ser", "--json")) == ser(skips)
    assert said("publish-statistics", made / "pruned", tmp_path / "data").startswith("28 rows written to")
    for words, message in (
        (("export", made / "pruned", "--format", "gguf"), "--format gguf: expected kept-ids or ser."),
        (("export", skips, "--format", "ser", "--output", tmp_path), "it cannot be written there: Is a directory."),
        (("publish-statistics", made / "model", tmp_path / "other"), "it is no output of a run"),
    ):
        assert _exit_status([str(word) for word in words]) == 2
        assert message in capsys.readouterr().err


# --- statistics


def test_statistics_as_a_data_set(made: Path, tmp_path: Path) -> None:
    number = publish_statistics(made / "pruned", tmp_path / "data")
    rows = list(datasets.load_dataset(str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))["train"])
    assert number == len(rows) == 2 * (8 + 6)
    passes, _ = load_statistics(made / "pruned" / "compressor" / "statistics.safetensors")
    original = record_of(made / "pruned")["passes"][1]["original_ids"]["model.layers.1.mlp"]
    of_layer = [row for row in rows if (row["pass"], row["layer"]) == (1, 1)]
    assert [row["expert"] for row in of_layer] == original
    figures = passes["1.expert_pruning"]["model.layers.1.mlp"]
    for name in ("tokens", "weight", "weighted_norm", "largest"):
        assert [row[name] for row in of_layer] == figures[f"sums.{name}"][0].tolist(), name
    assert sum(row["choices"] for row in of_layer) == pytest.approx(1)
    for row in of_layer:
        assert row["mean_weight"] == pytest.approx(row["weight"] / row["tokens"])
        assert (row["method"], row["text"], row["held_out"]) == ("expert_pruning", "text", False)


def test_the_card_is_read_and_tells_no_path(made: Path, tmp_path: Path) -> None:
    publish_statistics(made / "pruned", tmp_path / "data")
    assert sorted(file.name for file in (tmp_path / "data").iterdir()) == ["README.md", "statistics.parquet"]
    card = (tmp_path / "data" / "README.md").read_text()
    assert str(made) not in card
    assert str(made).encode() not in (tmp_path / "data" / "statistics.parquet").read_bytes()
    _, front, body = card.split("---\n", 2)
    found = yaml.safe_load(front)
    assert found["pretty_name"] == "Expert statistics of model"
    assert found["configs"] == [{"config_name": "default", "data_files": "statistics.parquet"}]
    assert "license" not in found
    record = record_of(made / "pruned")
    for said in (record["model"]["fingerprint"], "seed 0", f"* text: {24 * 24:,} tokens", record["versions"]["torch"]):
        assert said in body


def test_published_whole_or_not_at_all(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(CheckpointError, match=r"data exists already, and is not replaced; name another folder\.$"):
        publish_statistics(made / "pruned", tmp_path / "data")
    monkeypatch.setattr("compressor.run.export._card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        publish_statistics(made / "pruned", tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    bare = changed(tmp_path, made / "pruned", lambda record: None)
    (bare / "compressor" / "statistics.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read as a statistics file"):
        publish_statistics(bare, tmp_path / "other")


# --- a choice made on a sibling


@pytest.fixture
def sibling(tmp_path: Path) -> str:
    """The same model, a little further trained, say."""
    model = small_mixtral()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) * tensor.std())
    write_checkpoint(model, tmp_path / "sibling")
    return str(tmp_path / "sibling")


def test_record_and_card_say_whose_choice_it_is(made: Path, sibling: str, tmp_path: Path) -> None:
    decision = made / "pruned" / "compressor" / "decision.json"
    with pytest.raises(RecipeError, match="say so with --other-model"):
        compressor.apply(decision, sibling, tmp_path / "transferred")
    given = compressor.apply(decision, sibling, tmp_path / "transferred", other_model=True)
    assert given.record["decided_on"]["reference"] == str(made / "model")
    said = "What it keeps was chosen on `model`, another model of this structure."
    assert said in (tmp_path / "transferred" / "README.md").read_text()
    compressor.apply(decision, str(made / "model"), tmp_path / "same")
    assert "another model" not in (tmp_path / "same" / "README.md").read_text()


@pytest.mark.nightly
def test_a_choice_beside_one_of_the_siblings_own(made: Path, sibling: str, tmp_path: Path) -> None:
    """As docs/exchange.md has it: what a run has measured already is taken from its record, the other is measured."""
    decision = made / "pruned" / "compressor" / "decision.json"
    compressor.apply(decision, sibling, tmp_path / "transferred", other_model=True)
    asked = recipe(made, TWO_PASSES) | {"evaluate": {"fidelity": [{"tokens": str(made / "text.jsonl"), "samples": 8}]}}
    compressor.compress(asked, model_reference=sibling, output=tmp_path / "own")
    outputs = [tmp_path / "transferred", tmp_path / "own"]
    found = compressor.compare(outputs, recipe=asked, against=sibling)
    transferred, own = (one["mean"]["kl"] for one in found["outputs"])
    alone = compressor.evaluate(asked, str(outputs[0]), against=sibling)["evaluation"]["fidelity"]["text"]["kl"]
    assert transferred == pytest.approx(alone)
    assert own == pytest.approx(record_of(outputs[1])["evaluation"]["fidelity"]["text"]["kl"])
    assert min(transferred, own) > 0
