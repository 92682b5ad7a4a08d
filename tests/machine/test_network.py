"""A hub that refuses, one that stays silent, one that answers: nobody waits for what cannot be reached."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import get_session

from compressor import CalibrationError, CheckpointError, EvaluationError
from compressor.checkpoint.find import find_checkpoint
from compressor.data.lm_eval_tasks import load_tasks
from compressor.data.sources import DatasetSource
from compressor.machine import network

Serve = Callable[[bytes | None], str]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Makes this machine the hub: connections are accepted and answered with these bytes; None: no answer ever."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(network, "SECONDS", 0.2)
    opened: list[socket.socket] = []

    def listen(answer: bytes | None) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        opened.append(server)

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:  # closed
                    return
                opened.append(connection)
                if answer is not None:
                    connection.recv(4096)
                    connection.sendall(answer)
                    connection.close()

        threading.Thread(target=accept, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        return endpoint

    yield listen
    for one in opened:
        one.close()


@pytest.fixture
def silent(serve: Serve) -> str:
    """A hub that takes every request and answers none."""
    return serve(None)


@pytest.fixture
def refusing(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub whose machine refuses connections."""
    with socket.create_server(("127.0.0.1", 0)) as closed_at_once:
        port = closed_at_once.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    return f"http://127.0.0.1:{port}"


def test_silence_ends(silent: str) -> None:
    started = time.monotonic()
    with network.not_waited_for() as problem:
        assert problem == f"{silent} does not answer within 0.2 s"
        assert constants.is_offline_mode()
        assert datasets.config.HF_HUB_OFFLINE
        with pytest.raises(OfflineModeIsEnabled):
            get_session().get(f"{silent}/api/models")
    assert not constants.is_offline_mode()
    assert not datasets.config.HF_HUB_OFFLINE
    assert time.monotonic() - started < 5  # and not for ever


def test_refusal_is_told(refusing: str) -> None:
    with network.not_waited_for() as problem:
        assert problem is not None
        assert problem.startswith(f"{refusing}: ConnectError: ")


@pytest.mark.parametrize("status", [b"200 OK", b"404 Not Found", b"503 Busy"])
def test_any_answer_counts(serve: Serve, status: bytes) -> None:
    serve(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")
    with network.not_waited_for() as problem:
        assert problem is None
        assert not constants.is_offline_mode()


def test_it_is_asked_once(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(network, "_asked", lambda *question: asked.append(question) or "no")
    for _ in range(2):
        with network.not_waited_for() as problem, network.not_waited_for():
            assert problem == "no"
    assert len(asked) == 1
    monkeypatch.setattr(time, "monotonic", lambda: network._answers[silent][0] + 61)
    with network.not_waited_for():
        pass
    assert len(asked) == 2


def test_whoever_wants_no_hub_asks_none(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with network.not_waited_for() as problem:
        assert problem == "HF_HUB_OFFLINE is set"
    assert constants.is_offline_mode()
    assert silent not in network._answers


# What asks the hub ------------------------------------------------------------------------------------------


def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that tries again waits in between: that fails here."""

    def sleep(seconds: float) -> None:
        raise AssertionError(f"somebody sleeps for {seconds} s")

    monkeypatch.setattr(time, "sleep", sleep)


def test_datasets(refusing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    no_waiting(monkeypatch)
    with pytest.raises(CalibrationError) as error:
        list(DatasetSource(dataset="owner/name").documents(seed=0, split="train"))
    assert f"dataset 'owner/name' cannot be opened: the hub cannot be reached ({refusing}: " in str(error.value)


def test_models(silent: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_waiting(monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError) as error:
        find_checkpoint("owner/name", weights=False)
    assert f"and the hub cannot be reached ({silent} does not answer within 0.2 s). " in str(error.value)


def test_tasks(silent: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_waiting(monkeypatch)
    (tmp_path / "far.yaml").write_text(
        "task: far\ndataset_path: owner/name\noutput_type: multiple_choice\ntest_split: test\n"
        "doc_to_text: q\ndoc_to_target: a\ndoc_to_choice: [x, y]\n"
    )
    with pytest.raises(EvaluationError) as error:
        load_tasks(["far"], task_path=tmp_path)
    assert f"come from the hub, which cannot be reached ({silent} does not " in str(error.value)


def test_local_data_need_no_hub(silent: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "hello"}\n')
    [text] = DatasetSource(dataset=str(tmp_path)).documents(seed=0, split="train")
    assert text.pieces == ["hello"]
    assert silent not in network._answers
