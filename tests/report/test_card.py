"""The model card as the hub reads it: metadata and results by huggingface_hub's own classes; no path of a machine."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResultEntry, ModelCard, parse_eval_result_entries
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from compressor.checkpoint.find import Checkpoint
from compressor.report.card import carried_over, eval_results, model_card
from compressor.run.record import origin_json
from compressor.wording import is_hub_id, without_paths

PRUNED = {"method": "expert_pruning", "decision": {"layers": {"model.layers.0.mlp": {"kept": [0, 2]}}}}
LICENCE = {"license": "other", "license_name": "tongyi", "license_link": "LICENSE", "language": ["en", "zh"]}


def record(**changes: Any) -> dict[str, Any]:
    return {"model": {"reference": "owner/moe"}, "passes": [PRUNED], "output": "runs/smaller", **changes}


def read(text: str) -> dict[str, Any]:
    """The metadata as huggingface_hub reads and writes it."""
    data = ModelCard(text).data
    assert yaml.safe_load(data.to_yaml()) == data.to_dict()
    return dict(data.to_dict())


def test_metadata_of_a_pruned_model() -> None:
    assert read(model_card(record(origin={"hub": "owner/moe", **LICENCE}))) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "owner/moe",
        **LICENCE,
        "tags": ["moe", "moe-compressor", "pruning", "expert-pruning"],
    }


def test_what_transformers_alone_does_not_load_is_not_offered_for_it() -> None:
    for key in ("uneven", "constants"):
        assert "library_name" not in read(model_card(record(**{key: {"0": [1]}})))


def test_a_quantised_one_says_so_and_one_that_is_not_pruned_does_not_say_it_is() -> None:
    quantised = {"method": "quantization", "decision": {"layers": {"model.layers.0.mlp": {"bits": 4}}}}
    found = read(model_card(record(passes=[quantised], origin={"hub": "a/b", "stored": "compressed-tensors"})))
    assert (found["base_model"], found["base_model_relation"]) == ("a/b", "quantized")
    assert found["tags"] == ["moe", "moe-compressor", "quantization"]
    assert "base_model_relation" not in read(model_card(record(origin={"stored": "fp8"})))


def test_a_folder_that_looks_like_a_hub_name_is_no_base_model() -> None:
    assert "base_model" not in read(model_card(record(origin={})))
    assert read(model_card(record()))["base_model"] == "owner/moe"


def card_of(folder: Path, text: str) -> Path:
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder / "README.md"


def test_what_the_originals_card_says_is_carried_over(tmp_path: Path) -> None:
    text = f"---\n{yaml.safe_dump(LICENCE | {'tags': ['x'], 'base_model': 'c/d'})}---\n# Model\n"
    assert carried_over(card_of(tmp_path, text)) == LICENCE


@pytest.mark.parametrize(
    "text", ["# no metadata", "---\n- a list\n---\n", "---\na: [\n---\n", "---\nlicense: {a: 1}\n---\n", ""]
)
def test_a_card_that_says_nothing_readable_carries_nothing(tmp_path: Path, text: str) -> None:
    assert carried_over(card_of(tmp_path, text)) == {}
    assert carried_over(tmp_path / "none.md") == {}


def test_where_an_original_is_from(tmp_path: Path) -> None:
    cached = tmp_path / "models--owner--moe-8x7b" / "snapshots" / "0123abcd"
    cached.mkdir(parents=True)
    card_of(cached, "---\nlicense: apache-2.0\n---\n")
    output = tmp_path / "output"
    output.mkdir()
    expected = {"origin": {"hub": "owner/moe-8x7b", "license": "apache-2.0"}}
    assert origin_json(Checkpoint("owner/moe-8x7b", cached, is_of_hub=True), output) == expected
    assert origin_json(Checkpoint(str(cached), cached), output) == expected
    (output / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    assert origin_json(Checkpoint("models/mine", output), output) == {"origin": {"stored": "fp8"}}
    assert origin_json(None, output) == {}


def test_what_transformers_does_not_read_is_no_ordinary_checkpoint() -> None:
    """As NVFP4, whose experts `apply` copies as they are."""
    rule = {"answer": "no", "says": "NVFP4 experts are read by vLLM and SGLang only", "source": "", "date": ""}
    serving = [{"engine": "transformers", "answer": "no", "rules": [rule], "nearest": []}]
    text = model_card(record(serving=serving))
    assert "Neither `compressor.load` nor transformers reads it: NVFP4 experts are read by vLLM and SGLang" in text
    assert "ordinary" not in text
    assert "compressor.load(" in model_card(record(serving=serving, uneven={"0": 2, "1": 3}))


# --- results


def task(value: float, dataset: str = "owner/exam", config: str = "hard", metric: str = "acc", **others: Any) -> Any:
    error = {"standard_error": None, "higher_is_better": True}
    given = {"documents": 200, "num_fewshot": 5, "correct": {}, "dataset": dataset, "dataset_config": config, **others}
    return {"metrics": {metric: {"value": value, **error}, "f1": {"value": 0.1, **error}}, **given}


def test_results_are_read_back_by_the_hubs_library() -> None:
    strict = "exact_match,strict"
    before = {"exam": task(0.75), "sums": task(0.5, metric=strict), "local": task(0.5)}
    after = {
        "exam": task(0.7125),
        "sums": task(0.4, config="", metric=strict, correct={strict: "01"}),
        "chrf": task(31.5, "owner/mt", metric="chrf"),
        "local": task(0.5, dataset=""),
    }
    text = eval_results(record(date="2026-11-29", evaluation={"before": {"tasks": before}, "after": {"tasks": after}}))
    said = "5-shot, 200 documents; the original:"
    assert parse_eval_result_entries(yaml.safe_load(text)) == [
        EvalResultEntry("owner/exam", "hard", 71.25, date="2026-11-29", notes=f"lm-eval exam, acc in %, {said} 75.0"),
        EvalResultEntry(
            "owner/exam", "default", 40.0, date="2026-11-29", notes=f"lm-eval sums, {strict} in %, {said} 50.0"
        ),
        EvalResultEntry("owner/mt", "hard", 31.5, date="2026-11-29", notes=f"lm-eval chrf, chrf, {said} –"),
    ]


def test_without_a_task_of_the_hub_there_are_no_results() -> None:
    assert eval_results(record()) == ""
    assert eval_results(record(evaluation={"before": {}, "after": {"tasks": {"local": task(0.5, dataset="")}}})) == ""


# --- paths


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("/home/me/models/mine", "mine"),
        ("/home/me/My Models/a b", "a b"),
        ("~/models/mine", "mine"),
        ("C:\\Users\\me\\mine", "mine"),
        ("python /home/me/tool.py --out=/data/me/x -v", "python tool.py --out=x -v"),
        ("see '/home/me/x.txt'.", "see 'x.txt'."),
        ("file:///home/me/runs", "file://runs"),
        ("host:/data/me/x http://host:80/a/b", "host:x http://host:80/a/b"),
        ("owner/moe", "owner/moe"),
        ("runs/smaller", "runs/smaller"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("and/or, 5 / 3, a<b></b>, w/o", "and/or, 5 / 3, a<b></b>, w/o"),
        ({"/data/me/a": [1, None, "/data/me/b"]}, {"a": [1, None, "b"]}),
    ],
)
def test_paths_are_cut_to_their_last_names(said: Any, kept: Any) -> None:
    assert without_paths(said) == kept


def test_no_path_of_the_machine_is_in_a_card() -> None:
    program = {"command": {"run": "python /home/me/secret/step.py {input}"}}
    recipe = {"model": "/home/me/base", "passes": [program], "output": "/home/me/out"}
    text = model_card(record(model={"reference": "/home/me/base"}, recipe=recipe, output="/home/me/out"))
    assert "/home" not in text
    assert "secret" not in text
    assert 'compressor.load("out")' in text
    assert "# out\n" in text


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("a/b", True), ("a-1/b.c_d", True), ("a", False), ("a/b/c", False), ("./a", False), ("/a", False), ("ä/b", False)],
)
def test_names_on_the_hub(name: str, is_one: bool) -> None:
    assert is_hub_id(name) == is_one


@pytest.mark.parametrize(
    "name", ["a/b--c", "a/b..c", "a/b.git", "a/b-", "a/.b", "_a/b_", "a" * 97 + "/b", "a/b\n", "a/b.gits"]
)
def test_names_are_those_that_the_hubs_client_takes(name: str) -> None:
    with pytest.raises(HFValidationError) if not is_hub_id(name) else nullcontext():
        validate_repo_id(name)
