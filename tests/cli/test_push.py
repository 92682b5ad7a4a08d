"""An output is uploaded by huggingface_hub's own client to a stand-in for the hub, or refused in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, constants
from push_stand_in import Repository, Stand, hub_to_push_to
from transformers import AutoModelForCausalLM

import compressor
from compressor.machine import network

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own call
Cli = Callable[..., Any]
WriteRecipe = Callable[..., Path]
PASS = {"expert_pruning": {"keep": 6, "criterion": "aimer"}}
OTHERS = {
    "README.md",
    "compressor/decision.json",
    "compressor/recipe.yaml",
    "compressor/report.html",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, mixtral: Path) -> Path:
    """The output of a run, whose recipe names everything by absolute paths; its original's card names a licence."""
    folder = tmp_path_factory.mktemp("private-place")
    shutil.copytree(mixtral, folder / "base")
    (folder / "base" / "README.md").write_text("---\nlicense: other\nlicense_name: ours\nlanguage: [en]\n---\n# Base\n")
    recipe = {"model": str(folder / "base"), "passes": [PASS], "output": str(folder / "out")}
    compressor.compress(recipe)
    return folder / "out"


@pytest.fixture
def output(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stand]:
    with hub_to_push_to() as stand:
        monkeypatch.setattr(constants, "ENDPOINT", stand.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        yield stand


def refused(answer: Any, says: str) -> None:
    assert answer.status == 2
    assert [line for line in answer.err.splitlines() if line.startswith("error: ")] == [f"error: {says}"]
    assert "Traceback" not in answer.err
    assert "hf_secret" not in answer.err + answer.out


def test_what_makes_a_model_of_it_comes_last(hub: Stand, cli: Cli, output: Path, tmp_path: Path) -> None:
    (output / ".DS_Store").write_text("hidden")
    (output / ".eval_results").mkdir()
    (output / ".eval_results" / "moe-compressor.yaml").write_text("[]\n")
    answer = cli("push", output, "me/smaller")
    assert (answer.status, answer.out) == (0, f"Pushed to {hub.address}/me/smaller.\n")
    assert "uploading " in answer.err
    found = hub.repositories["me/smaller"]
    assert not found.private
    assert [set(commit["added"]) for commit in found.commits] == [
        {"compressor/record.json"},
        {"model.safetensors"},
        OTHERS | {".eval_results/moe-compressor.yaml"},
    ]
    for name, content in found.files.items():
        if name not in OTHERS | {".gitattributes", "compressor/record.json"} or name.startswith(("config", "tok")):
            assert content == (output / name).read_bytes(), name
    for name, content in found.files.items():
        (tmp_path / "down" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "down" / name).write_bytes(content)
    AutoModelForCausalLM.from_pretrained(tmp_path / "down")
    compressor.load(tmp_path / "down")


def test_no_path_of_this_machine_and_no_token_is_uploaded(hub: Stand, output: Path) -> None:
    assert any(b"private-place" in path.read_bytes() for path in (output / "compressor").iterdir())
    compressor.push(output, "lab/smaller", private=True)
    found = hub.repositories["lab/smaller"]
    assert found.private
    for name, content in found.files.items():
        assert b"private-place" not in content, name
        assert b"hf_secret" not in content, name
    card = ModelCard(found.files["README.md"].decode())
    assert (card.data.license, card.data.license_name, card.data.language) == ("other", "ours", ["en"])
    assert 'compressor.load("lab/smaller")' in card.text
    record = json.loads(found.files["compressor/record.json"])
    assert (record["model"]["reference"], record["recipe"]["model"], record["output"]) == ("base", "base", "out")
    assert yaml.safe_load(found.files["compressor/recipe.yaml"])["output"] == "out"


@pytest.mark.parametrize(("fails", "status"), [("/lfs/", 400), ("/preupload/", 400), ("/commit/main", None)])
def test_an_interrupted_push_goes_on(hub: Stand, cli: Cli, output: Path, fails: str, status: int | None) -> None:
    hub.fails, hub.status = fails, status
    answer = cli("push", output, "me/smaller")
    assert answer.status == 2
    assert answer.err.splitlines()[-1].startswith("error: me/smaller: ")
    assert answer.err.endswith(f" All is in {output}: `compressor push {output} me/smaller` goes on.\n")
    assert "config.json" not in hub.repositories["me/smaller"].files
    stored = len(hub.stored)
    assert cli("push", output, "me/smaller").status == 0
    assert {"config.json", "model.safetensors"} < hub.repositories["me/smaller"].files.keys()
    assert len(hub.stored) == 1 >= stored


def test_what_is_there_is_not_uploaded_again(hub: Stand, output: Path) -> None:
    for _ in range(2):
        compressor.push(output, "me/smaller")
    assert len(hub.repositories["me/smaller"].commits) == 3
    assert sum(one.startswith("PUT /lfs/") for one in hub.asked) == 1


def test_what_is_another_ones_is_replaced_only_if_told_so(hub: Stand, cli: Cli, output: Path) -> None:
    other = {"config.json": b"{}", "model-00001-of-00009.safetensors": b"1", "compressor/record.json": b"{}"}
    hub.repositories["me/taken"] = Repository(files={".gitattributes": b"", **other})
    refused(
        cli("push", output, "me/taken"),
        "me/taken: it holds 3 files of something else; name another one, or replace them: "
        f"`compressor push {output} me/taken --overwrite`.",
    )
    assert hub.repositories["me/taken"].commits == []
    assert cli("push", output, "me/taken", "--overwrite").status == 0
    found = hub.repositories["me/taken"]
    assert found.commits[0]["deleted"] == ["config.json", "model-00001-of-00009.safetensors"]
    assert found.files.keys() == OTHERS | {".gitattributes", "compressor/record.json", "model.safetensors"}


# --- refusals


def test_without_rights(hub: Stand, cli: Cli, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    then = f" All is in {output}: `compressor push {output}"
    refused(cli("push", output, "stranger/x"), "stranger/x: me may write as me, lab only.")
    refused(cli("push", output, "guests/x"), "guests/x: me may write as me, lab only.")
    hub.repositories["other/x"] = Repository(may_write=False)
    refused(cli("push", output, "other/x"), f"other/x: the token may not write there.{then} other/x` goes on.")
    hub.repositories["me/open"] = Repository()
    refused(
        cli("push", output, "me/open", "--private"),
        "me/open: it is there already, and public; make it private there, or name another one.",
    )
    hub.role = "read"
    refused(cli("push", output, "me/x"), "me/x: the token of me may only read; take one that may write.")
    hub.token = "another"
    refused(cli("push", output, "me/x"), f"me/x: the token is not valid.{then} me/x` goes on.")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(output / "none"))
    answer = cli("push", output, "me/x")
    assert answer.err.startswith("error: me/x: Token is required ")
    assert "`hf auth login`" in answer.err
    assert not any(one.startswith("POST") for one in hub.asked)
    assert "me/x" not in hub.repositories


def test_without_a_network(hub: Stand, cli: Cli, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    then = f" All is in {output}: `compressor push {output} me/x` goes on."
    refused(cli("push", output, "me/x"), f"me/x: nothing can be pushed: HF_HUB_OFFLINE is set.{then}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(network, "_asked", lambda endpoint, seconds: f"{endpoint}: it is down")
    refused(cli("push", output, "me/x"), f"me/x: nothing can be pushed: {hub.address}: it is down.{then}")
    refused(
        cli("push", output, "me/x", "--private", "--overwrite"),
        f"me/x: nothing can be pushed: {hub.address}: it is down. All is in {output}: `compressor push {output} me/x "
        "--private --overwrite` goes on.",
    )
    assert hub.asked == []


def test_what_is_no_whole_output(hub: Stand, cli: Cli, output: Path, mixtral: Path) -> None:
    refused(cli("push", output, "smaller"), "smaller: expected a repository on the hub, owner/name.")
    refused(
        cli("push", mixtral, "me/x"),
        f"{mixtral}: it has no compressor/record.json, as what `run` and `apply` write has.",
    )
    (output / "model.safetensors").write_bytes((output / "model.safetensors").read_bytes()[:-5])
    answer = cli("push", output, "me/x")
    assert (answer.status, hub.asked) == (2, [])
    assert answer.err.startswith(f"error: {output}/model.safetensors: ")
    record = output / "compressor" / "record.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "files_only": "command"}))
    refused(cli("push", output, "me/x"), f"{output}: what command has left was never loaded, and is not pushed.")
    record.write_text("{}")
    refused(
        cli("push", output, "me/x"),
        f"{output}: it has no compressor/record.json, as what `run` and `apply` write has.",
    )


# --- by a recipe


def test_a_run_pushes_only_if_told_so(hub: Stand, cli: Cli, recipe: WriteRecipe, tmp_path: Path) -> None:
    file = recipe(passes=[PASS], push={"repo": "me/smaller", "private": True})
    answer = cli("run", file)
    assert answer.status == 0
    how = f"`compressor push {tmp_path / 'out'} me/smaller --private`"
    assert f"not pushed to me/smaller, which takes --push (`push=True`); {how} does it now\n" in answer.err
    assert "the output is pushed to me/smaller only with --push" in cli("check", file, "--overwrite").out
    assert hub.asked == []
    answer = cli("run", file, "--push", "--resume")
    assert answer.status == 0
    assert f"pushed to {hub.address}/me/smaller\n" in answer.err
    assert hub.repositories["me/smaller"].private


def test_check_asks_and_makes_nothing_and_a_run_makes_it_before_the_hours(
    hub: Stand, cli: Cli, recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe(passes=[PASS], push="me/smaller")
    assert "the output will be pushed to me/smaller" in cli("check", file, "--push").out
    assert hub.repositories == {}

    def stopped(*_: object, **__: object) -> None:
        raise compressor.CalibrationError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr("compressor.run.pipeline._run", stopped)
        cli("run", file, "--push")
    assert hub.repositories["me/smaller"].commits == []
    assert cli("run", file, "--push").status == 0
    assert "config.json" in hub.repositories["me/smaller"].files


def test_what_cannot_be_pushed_is_refused_at_its_place_before_the_run(
    hub: Stand, cli: Cli, recipe: WriteRecipe
) -> None:
    hub.repositories["me/taken"] = Repository(files={"config.json": b"{}"})
    for command in ("check", "run"):
        file = recipe(passes=[PASS], push="stranger/x")
        refused(cli(command, file, "--push"), f"{file}:11:7 push: stranger/x: me may write as me, lab only.")
        refused(
            cli(command, recipe(passes=[PASS], push="me/taken"), "--push"),
            f"{file}:11:7 push: me/taken: it holds 1 file already; name another one, or run without --push, and then "
            "`compressor push --overwrite`",
        )
        refused(
            cli(command, recipe(passes=[PASS]), "--push"),
            f"{file}:1:1: --push (`push=True`) has nowhere to push to; give `push: owner/name`",
        )
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("smaller", "push: found 'smaller', expected a repository on the hub, owner/name"),
        ({"repo": "a/b/c"}, "push.repo: found 'a/b/c', expected a repository on the hub, owner/name"),
        ({"private": True}, "push.repo: missing, expected repository on the hub: owner/name"),
        ({"repo": "a/b", "token": "x"}, "push.token: unknown key"),
        (7, "push: "),
    ],
)
def test_a_wrong_push_in_a_recipe(cli: Cli, recipe: WriteRecipe, given: Any, says: str) -> None:
    answer = cli("check", recipe(push=given))
    assert answer.status == 2
    assert says in answer.err
    assert answer.err.count("error") == 1
