"""Tasks through a server: the figures of the model itself, and no figure of a server that does not answer all of it."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai_stand_in import NAME, StandIn, continued
from tiny_models import small_mixtral, word_tokenizer
from tokenizers.pre_tokenizers import Whitespace

from compressor.data.lm_eval_tasks import LoadedTasks, load_tasks
from compressor.data.server import Server
from compressor.errors import EvaluationError, ProgramError
from compressor.evaluation.lm_eval import TaskResult, run_tasks
from compressor.evaluation.served import is_ready
from compressor.evaluation.served import run_tasks as run_served
from compressor.evaluation.serving import serving

pytest.importorskip("tenacity", reason="lm-eval asks servers with it: pip install 'moe-compressor[server]'")

WORDS = ["</s>", "a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "is", "not", "after", "before"]
TEMPLATE = "{% for one in messages %}{{ one.content }} is {% endfor %}"
POSITIONS = 64
DOCUMENTS = [
    {"q": f"{WORDS[1 + n]} is", "choices": ["a b", "c", "d e f"], "right": n % 3, "text": f"a {WORDS[1 + n]} is not b"}
    for n in range(5)
]


@pytest.fixture(scope="module")
def model() -> Any:
    return small_mixtral(vocab_size=32, max_position_embeddings=POSITIONS, initializer_range=0.5).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer(WORDS, unknown="</s>")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., LoadedTasks]:
    """Tasks of every kind over the same documents."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "documents.jsonl").write_text("".join(json.dumps(one) + "\n" for one in DOCUMENTS))
    data = {"data_files": {"test": str(folder / "documents.jsonl")}, "cache_dir": str(folder / "cache")}
    shared = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test", "doc_to_text": "{{q}}"}
    kinds: dict[str, dict[str, Any]] = {
        "choose": {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "right"},
        "continue": {
            "output_type": "loglikelihood",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
        },
        "roll": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"},
        "write": {
            "output_type": "generate_until",
            "doc_to_target": "{{text}}",
            "generation_kwargs": {"until": ["before"], "max_gen_toks": 6},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        },
    }
    local = {f"demo_{name}": {**shared, "task": f"demo_{name}", **kind} for name, kind in kinds.items()}

    def load(*names: str) -> LoadedTasks:
        return load_tasks([f"demo_{name}" for name in names], local_tasks=lambda: local)

    return load


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What is scored of tasks that have a model write."""
    found: list[list[str]] = []
    from lm_eval.api.task import ConfigurableTask

    score = ConfigurableTask.process_results

    def noting(self: Any, doc: Any, results: Any) -> Any:
        found.append(results)
        return score(self, doc, results)

    monkeypatch.setattr(ConfigurableTask, "process_results", noting)
    return found


def flat(results: Sequence[Any]) -> list[float]:
    """Numbers as they are, texts by their letters."""
    found: list[float] = []
    for one in results:
        found += flat(one) if isinstance(one, list | tuple) else map(ord, one) if isinstance(one, str) else [float(one)]
    return found


def close(found: dict[str, TaskResult], expected: dict[str, TaskResult]) -> None:
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        values = {metric: figure.value for metric, figure in found[name].metrics.items()}
        assert values == pytest.approx({metric: figure.value for metric, figure in one.metrics.items()}, rel=1e-4)
        assert (found[name].correct, found[name].fingerprint) == (one.correct, one.fingerprint)


@pytest.mark.parametrize("concurrent", [1, 3])
def test_figures_are_those_of_the_model_itself(
    model: Any, tokenizer: Any, tasks: Any, written: list[Any], concurrent: int
) -> None:
    asked, steps = tasks("choose", "continue", "roll", "write"), list[tuple[int, int]]()
    with StandIn({NAME: (model, tokenizer)}, about={"max_model_len": 48}).running() as stand_in:
        how = {"batch_size": 2, "progress": lambda *step: steps.append(step)}
        server = Server(url=stand_in.url, concurrent=concurrent)
        found, about = run_served(server, tokenizer, asked, POSITIONS, **how)
    through, written[:] = list(written), []
    close(found, run_tasks(model, tokenizer, asked, batch_size=2))
    assert all(flat(one) == pytest.approx(flat(other), rel=1e-4) for one, other in zip(through, written, strict=True))
    assert len({str(one) for one in written}) > 10
    assert about == {"url": stand_in.url, "model": NAME, "engine": "stand-in", "max_model_len": 48, "version": "7.1"}
    assert steps[-1] == (5 * 6, 5 * 6)


def test_a_chat_is_asked_in_the_models_template(
    model: Any, tokenizer: Any, tasks: Any, written: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    monkeypatch.setenv("OPENAI_API_KEY", "open sesame")
    with StandIn({NAME: (model, tokenizer)}, key="open sesame").running() as stand_in:
        server = Server(url=stand_in.url, model=NAME, chat=True)
        found, _ = run_served(server, tokenizer, tasks("write"), POSITIONS, batch_size=4)
        assert set(stand_in.keys) == {"Bearer open sesame"}
    assert found["demo_write"].documents == 5
    prompts = [tokenizer.encode(f"{one['q']} is ") for one in DOCUMENTS]
    assert [one[0] for one in written] == [continued(model, tokenizer, ids, 6, ["before"]) for ids in prompts]


FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("wrong name", {}, r"the server has served; expected other\. Name one that it has \(`model`\)\."),
    ("key", {"key": "x"}, r"the server answered 401, which asks for another key in OPENAI_API_KEY: .*no such key"),
    ("no json", {"no_json": True}, r"what the server answers is no JSON \("),
    (
        "counts",
        {"counts_more": 1},
        r"the server counts \d+ tokens \(usage\.prompt_tokens\) where the folder's tokenizer",
    ),
    ("no usage", {"no_usage": True}, r"the server counts None tokens"),
    ("no logprobs", {"no_logprobs": True}, r"the server gave 0 log-probabilities, expected \d+: of all tokens of a"),
    ("no echo", {"no_echo": True}, r"the server gave 1 log-probabilities, expected \d+: of all tokens of a prompt and"),
    ("no likeliest", {"tops": None}, r"the server gave 0 log-probabilities, expected \d+: of all tokens of a"),
    ("a number", {"whole": {"data": 5}}, r"the server has no model; expected one\."),
    ("a list", {"whole": [1]}, r"the server has no model; expected one\."),
    ("no text", {"whole_after": 2}, r"the server gave 0 answers to 2 prompts\."),
    ("too few", {"choices": 0}, r"the server gave 0 answers to 2 prompts\."),
    ("dies", {"dies_after": 2}, r"no server answers there, or it has ended \("),
    ("slow", {"slow_after": 2, "seconds": 1.5}, r"the server gave no answer within 1 seconds \(`timeout`\)\."),
]


@pytest.mark.parametrize(("name", "faults", "says"), FAULTS, ids=[name for name, *_ in FAULTS])
def test_what_is_wrong_with_a_server_is_said(
    model: Any, tokenizer: Any, tasks: Any, monkeypatch: pytest.MonkeyPatch, name: str, faults: Any, says: str
) -> None:
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    with StandIn({NAME: (model, tokenizer)}, **faults).running() as stand_in:
        server = Server(url=stand_in.url, model="other" if name == "wrong name" else None, timeout=1)
        with pytest.raises(EvaluationError, match=f"^{re.escape(stand_in.url)}: {says}"):
            run_served(server, tokenizer, tasks("choose"), POSITIONS, batch_size=2)
    with pytest.raises(EvaluationError, match=r"no server answers there, or it has ended"):
        run_served(server, tokenizer, tasks("choose"), POSITIONS)


def test_another_tokenizer_is_found_out(model: Any, tokenizer: Any, tasks: Any) -> None:
    other = word_tokenizer(WORDS, unknown="</s>")
    other.backend_tokenizer.pre_tokenizer = Whitespace()
    with (
        StandIn({NAME: (model, other)}).running() as stand_in,
        pytest.raises(EvaluationError, match=r"the server counts 25 tokens .* where the folder's tokenizer has 16:"),
    ):
        run_served(Server(url=stand_in.url), tokenizer, tasks("write"), POSITIONS)


def test_two_models_are_told_apart_by_name(model: Any, tokenizer: Any, tasks: Any) -> None:
    with StandIn({NAME: (model, tokenizer), "b": (model, tokenizer)}).running() as stand_in:
        with pytest.raises(EvaluationError, match=r"the server has served, b; expected one\. Name one that it has"):
            run_served(Server(url=stand_in.url), tokenizer, tasks("write"), POSITIONS)
        assert run_served(Server(url=stand_in.url, model="b"), tokenizer, tasks("write"), POSITIONS)[1]["model"] == "b"


# --- the program that serves


def alive(file: Path) -> bool:
    """Whether the process whose id is in a file is there."""
    try:
        return bool(psutil.Process(int(file.read_text())).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Files of which each is there where the program is to count as ready."""
    files: list[Path] = []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ready = "compressor.evaluation.serving.is_ready"
    monkeypatch.setattr(ready, lambda url: bool(files) and all(one.exists() and one.read_text() for one in files))
    return files


def program(script: str, seconds: float = 30) -> Server:
    return Server(command=("sh", "-c", script, "{model}", "{port}"), starts_within=seconds)


@pytest.mark.parametrize("leaves", [None, EvaluationError("other"), KeyboardInterrupt(), SystemExit(143)])
def test_nothing_of_a_server_is_left(answering: list[Path], tmp_path: Path, leaves: BaseException | None) -> None:
    """Also where the process is told to end."""
    said, child = list[str](), tmp_path / "child"
    answering.append(child)

    def leave() -> None:
        with serving(program(f"sleep 60 & echo $! > {child}; wait"), tmp_path, said.append) as server:
            assert server.url
            assert alive(child)
            if isinstance(leaves, SystemExit):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            if leaves is not None:
                raise leaves

    with nullcontext() if leaves is None else pytest.raises(type(leaves), match=str(leaves) or None):
        leave()
    end = time.monotonic() + 10  # a signal may take its time
    while alive(child):
        assert time.monotonic() < end
        time.sleep(0.02)
    log = Path(said[0].rpartition(" ")[2])
    assert said[0].startswith("starting `sh -c ")
    assert log.exists() == (leaves is not None)


@pytest.mark.parametrize(
    ("script", "seconds", "says"),
    [
        ("echo no GPU >&2; exit 3", 30, r"ended with status 3\. In .*\.log it said last:\nno GPU"),
        ("kill -9 $$", 30, r"ended with status -9\. In .*\.log it said last:\nnothing"),
        ("echo loading; sleep 60", 0.3, r"did not answer within 0\.3 seconds \(`starts_within`\)\. In .*:\nloading"),
    ],
)
def test_a_server_that_does_not_come_up(
    answering: list[Path], tmp_path: Path, script: str, seconds: float, says: str
) -> None:
    said: list[str] = []
    with pytest.raises(ProgramError, match=f"^sh {says}$"), serving(program(script, seconds), tmp_path, said.append):
        raise AssertionError


def test_a_server_that_dies_at_work(answering: list[Path], tmp_path: Path) -> None:
    said, child = list[str](), tmp_path / "child"
    answering.append(child)

    def ask() -> None:
        with serving(program(f"echo $$ > {child}; sleep 0.2; echo out of memory; exit 7"), tmp_path, said.append):
            while alive(child):
                time.sleep(0.02)
            raise EvaluationError("no server answers there.")

    says = r"^sh ended with status 7\. In .*\.log it said last:\nout of memory$"
    with pytest.raises(ProgramError, match=says):
        ask()


def test_programs_that_cannot_be_started(answering: list[Path], tmp_path: Path) -> None:
    no_such = Server(command=("/no/such", "{model}{port}"))
    says = r"^/no/such cannot be run: No such file or directory\.$"
    with pytest.raises(ProgramError, match=says), serving(no_such, tmp_path, lambda said: None):
        raise AssertionError
    assert list(tmp_path.glob("compressor-server-*")) == []
    (tmp_path / "there").write_text("ready")
    answering.append(tmp_path / "there")
    says = r"^http://127\.0\.0\.1:\d+/v1: a server answers there already\. Stop it, or give another `url`\.$"
    with pytest.raises(ProgramError, match=says), serving(no_such, tmp_path, lambda said: None):
        raise AssertionError


def test_a_server_is_ready_when_its_model_is(model: Any, tokenizer: Any) -> None:
    for faults, ready in (({}, True), ({"health": 404}, True), ({"health": 503}, False)):
        with StandIn({NAME: (model, tokenizer)}, **faults).running() as stand_in:
            assert is_ready(stand_in.url) == ready
    assert not is_ready(stand_in.url)
