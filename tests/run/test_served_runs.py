"""Runs whose tasks a server answers: before and after by the same door, and nothing lost where it does not answer."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai_stand_in
import pytest
from openai_stand_in import StandIn
from tiny_models import small_mixtral, token_ids, word_tokenizer, write_checkpoint, write_token_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import compressor
from compressor.errors import EvaluationError, ProgramError, RecipeError
from compressor.machine.progress import Progress

pytest.importorskip("tenacity", reason="lm-eval asks servers with it: pip install 'moe-compressor[server]'")

WORDS = ["</s>", "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "is", "not", "after", "before"]
SCRIPT = 'rm -f "$0/told"; test ! -f "$0/breaks" || { echo "no room for $1" >&2; exit 9; }; \
echo "$1 $2" >> "$0/log"; echo "$1 $2" > "$0/new"; mv "$0/new" "$0/told"; exec sleep 100'
"""Says which model is to be served where, in a file that `follower` waits for."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of eight experts, and a tokenizer. Never write into it."""
    folder = tmp_path_factory.mktemp("small") / "model"
    model = small_mixtral(num_hidden_layers=1, vocab_size=32, max_position_embeddings=64, initializer_range=0.5)
    write_checkpoint(model, folder)
    word_tokenizer(WORDS, unknown="</s>").save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    return folder


def loaded(folder: Path | str) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def serve(told: Path, ends: threading.Event) -> None:
    """Whatever folder the file names, where it says, until it names another."""
    served = ""
    with ExitStack() as running:
        while not ends.wait(0.01):
            wanted = told.read_text() if told.exists() else served
            if wanted != served:
                running.close()
                folder, port = wanted.split()
                running.enter_context(StandIn({folder: loaded(folder)}, int(port)).running())
                served = wanted


@pytest.fixture
def follower(tmp_path: Path) -> Iterator[Path]:
    """A folder where a program says what to serve."""
    (tmp_path / "served").mkdir()
    ends = threading.Event()
    thread = threading.Thread(target=serve, args=(tmp_path / "served" / "told", ends))
    thread.start()
    yield tmp_path / "served"
    ends.set()
    thread.join()


@pytest.fixture
def recipe(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """A recipe of tasks that choose and write, of a model on disk."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = [{"q": f"{WORDS[1 + n]} is", "choices": ["a b", "c", "d e"], "right": n % 3} for n in range(5)]
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tasks / "rows.jsonl")}}}
    shared |= {"test_split": "test", "doc_to_text": "{{q}}"}
    choose = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "right"}
    write = {
        "output_type": "generate_until",
        "doc_to_target": "b",
        "generation_kwargs": {"until": ["c"], "max_gen_toks": 4},
    }
    write |= {"metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}
    for name, one in {"choose": choose, "write": write}.items():
        (tasks / f"{name}.yaml").write_text(json.dumps({"task": name, **shared, **one}))
    tokens = str(write_token_file(tmp_path / "tokens.jsonl", (token_ids(4, 24) % 15).tolist()))

    def asked(server: dict[str, Any] | None, *names: str, **more: Any) -> dict[str, Any]:
        evaluation = {"tasks": list(names or ("choose", "write")), "task_path": str(tasks), "batch_size": 2, **more}
        return {
            "model": str(small),
            "weights": "disk",
            "calibration": {"data": [{"tokens": tokens}]},
            "passes": [{"expert_pruning": {"keep": 4}}],
            "evaluate": evaluation | ({"server": server} if server is not None else {}),
            "output": str(tmp_path / "out"),
        }

    return asked


def figures(record: dict[str, Any], when: str) -> dict[str, Any]:
    return {name: (one["metrics"], one["correct"]) for name, one in record["evaluation"][when]["tasks"].items()}


class Saying(Progress):
    def __init__(self) -> None:
        super().__init__("lines")
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize("weights", ["disk", pytest.param("memory", marks=pytest.mark.nightly)])
def test_before_and_after_by_one_door(recipe: Any, follower: Path, tmp_path: Path, weights: str) -> None:
    """A server that does not come up for the result loses nothing; the record is that of a run which asks by itself."""
    server = {"command": ["sh", "-c", SCRIPT, str(follower), "{model}", "{port}"], "starts_within": 60}
    asked = recipe(server, perplexity=recipe(None)["calibration"]["data"]) | {"weights": weights}
    breaks = Breaking(follower)
    with pytest.raises(
        ProgramError, match=r"recipe evaluate\.server: sh ended with status 9\. .*\nno room for .*output"
    ) as error:
        compressor.compress(asked, allow_commands=True, progress=breaks)
    assert "--resume goes on with it" in error.value.__notes__[0]
    (follower / "breaks").unlink()
    assert [line.split()[0] for line in (follower / "log").read_text().splitlines()] == [asked["model"]]
    record = compressor.compress(asked, allow_commands=True, resume=True).record
    served = [line.split()[0] for line in (follower / "log").read_text().splitlines()]
    assert served == [asked["model"], str(tmp_path / ".out.partial" / "output")]
    found = record["evaluation"]
    for when in ("before", "after"):
        assert found[when]["server"] == {"command": server["command"], "engine": "stand-in", "version": "7.1"}
    assert "Tasks, after: answered by stand-in." in (tmp_path / "out" / "README.md").read_text()
    assert found["paired"].keys() == {"choose", "write"}
    alone = recipe(None) | {"weights": "memory", "output": str(tmp_path / "alone")}
    expected = compressor.compress(alone).record
    for when in ("before", "after"):
        assert figures(record, when) == figures(expected, when)
    assert found["paired"] == expected["evaluation"]["paired"]
    assert (tmp_path / "out" / "config.json").exists()


class Breaking(Saying):
    """The server breaks once the passes have begun."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def say(self, text: str) -> None:
        super().say(text)
        if text.startswith("before: perplexity"):
            (self.folder / "breaks").touch()


def test_a_model_and_its_original_on_servers_that_run(recipe: Any, small: Path, tmp_path: Path) -> None:
    """Each has its own, one of which has others too."""
    smaller, progress = tmp_path / "smaller", Saying()
    compressor.compress(recipe(None) | {"evaluate": None, "output": str(smaller)})
    big = loaded(small)
    with StandIn({"small": loaded(smaller), "b": big}).running() as both, StandIn({"big": big}).running() as first:
        server = {"url": both.url, "model": "small", "original_url": first.url}
        found = compressor.evaluate(recipe(server), str(smaller), against=str(small), progress=progress)["evaluation"]
        with pytest.raises(EvaluationError, match=r"evaluate\.server: .* the server has big; expected small\."):
            compressor.evaluate(recipe(server | {"url": first.url}), str(smaller))
        with pytest.raises(RecipeError, match=r"evaluate\.server: the server at `url` cannot have the smaller model"):
            compressor.check(recipe(server))
    says = f"about 20 requests for tasks will go to {both.url}, which answers and has small; their tokens are those"
    assert says in "".join(progress.said)
    urls = {"before": (first.url, "big"), "after": (both.url, "small")}
    assert {when: (found[when]["server"]["url"], found[when]["server"]["model"]) for when in urls} == urls
    for when, folder in {"before": small, "after": smaller}.items():
        alone = compressor.evaluate(recipe(None, "choose") | {"weights": "memory"}, str(folder))
        assert figures(alone, "after")["choose"] == figures({"evaluation": found}, when)["choose"]


@pytest.mark.parametrize(
    ("server", "says"),
    [
        ({}, "found neither, expected the `url` of a server that runs or the `command` that starts one"),
        ({"url": "127.0.0.1:8000"}, r"found '127.0.0.1:8000', expected an address such as http://127"),
        (
            {"url": "http://me:secret@host/v1"},
            r"found 'host/v1', expected an address .* a key goes into the environment",
        ),
        *(
            ({"url": f"http://{one}/v1"}, rf"found 'http://{one}/v1', expected an address such as")
            for one in ("localhost:x", "localhost:99999", "a:b:1")
        ),
        *(
            ({"command": ["env", *one, "vllm", "{model}{port}"]}, r"a key in `command` would stand in the record")
            for one in (["VLLM_API_KEY=secret"], ["vllm", "--hf-token", "secret"])
        ),
        (
            {"command": ["vllm", "serve", "{port}"]},
            r"no argument of command has \{model\} in it, so vllm would not know",
        ),
        (
            {"command": ["vllm", "serve", "{model}"]},
            r"no argument of command has \{port\} in it, so vllm would not know",
        ),
        ({"command": ["sh", "{model}", "{port}"], "original_model": "a"}, r"`original_…` would have no effect beside"),
        (
            {"command": ["sh", "{model}{port}", "--api-key=x"]},
            r"a key in `command` would stand in the record; give it in",
        ),
        ({"command": ["no-such", "{model}{port}"]}, r"there is no program 'no-such' here that can be run"),
        (
            {"command": ["sh", "{model}{port}"], "chat": True},
            r"`chat` asks tasks that have the model write, and choose",
        ),
        (
            {"command": ["sh", "{model}{port}"], "chat": True, "x": 1},
            r"server\.x: unknown key\. Known keys: url, model",
        ),
    ],
)
def test_what_cannot_be_is_said_before(recipe: Any, server: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says) as error:
        compressor.check(recipe(server), allow_commands=True)
    assert "secret" not in str(error.value)


def test_what_is_checked_besides(recipe: Any, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = {"command": ["sh", "{model}", "{port}"]}
    asked = recipe(server)
    says = r"evaluate\.server\.command: would run `sh '\{model\}' '\{port\}'`, which may do all that this account may"
    for way in (compressor.check, compressor.compress, lambda one: compressor.evaluate(one, str(small))):
        with pytest.raises(RecipeError, match=says):
            way(asked)
    with pytest.raises(RecipeError, match=r"evaluate\.server: only `run` and `evaluate` ask a server; leave it out"):
        compressor.compare([small], recipe=asked, against=str(small))
    plan = compressor.check(asked, allow_commands=True).plan
    assert plan["notes"][-1] == (
        "about 20 requests for tasks will go to a server that sh starts on each model's folder; their tokens are those "
        "of the model's own tokenizer"
    )
    with pytest.raises(RecipeError, match=r"`chat` needs a template, and the model's tokenizer has none"):
        compressor.check(recipe(server | {"chat": True}, "write"), allow_commands=True)
    with pytest.raises(RecipeError, match=r"a server reads folders: give the model as one, and an `output`"):
        compressor.check(asked | {"output": None, "weights": "memory"}, allow_commands=True)
    with pytest.raises(RecipeError, match=r"each_pass measures models that no server can load, of one pass each"):
        compressor.check(recipe(server, each_pass=True), allow_commands=True)
    with pytest.raises(
        EvaluationError, match=r"ask this one of a server that holds it: `evaluate: \{server: \.\.\.\}`"
    ):
        compressor.check(recipe(None))
    monkeypatch.setattr("compressor.run.readiness.find_spec", lambda name: None)
    with pytest.raises(
        RecipeError, match=r'the package tenacity is missing \(`pip install "moe-compressor\[server\]"`\)'
    ):
        compressor.check(asked, allow_commands=True)


def test_tasks_that_run_code_want_consent_twice(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tasks" / "write.yaml"
    consent = recipe(None, "write", confirm_run_unsafe_code=True) | {"weights": "memory", "output": None}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"unsafe_code": True}))
    says = r"task 'write' runs code that the model writes, with all that this account may do: that takes"
    for asked, environment in ((recipe(None, "write"), "1"), (consent, "0")):
        monkeypatch.setenv("HF_ALLOW_CODE_EVAL", environment)
        with pytest.raises(EvaluationError, match=says):
            compressor.check(asked)
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    assert compressor.compress(consent).record["evaluation"]["after"]["tasks"]["write"]["documents"] == 5


@pytest.mark.nightly
def test_a_program_that_serves(recipe: Any, small: Path, tmp_path: Path) -> None:
    """A process of its own, with its own model."""
    command = [sys.executable, openai_stand_in.__file__, "{model}", "{port}"]
    asked = recipe({"command": command}, "write")
    found = compressor.evaluate(asked, str(small), allow_commands=True)["evaluation"]["after"]
    expected = compressor.evaluate(
        asked | {"weights": "memory", "evaluate": recipe(None, "write")["evaluate"]}, str(small)
    )
    assert {**found["tasks"]} == expected["evaluation"]["after"]["tasks"]
    assert found["server"]["command"] == command
