"""What test_processes.py starts, with torchrun or as a server that forks groups of processes as torchrun starts them.

    recipes FOLDER          runs every recipe there
    fails[_busy|_late] …    break one process of an ordinary `compressor run …` while it observes; so do has_bug and
                            dies_busy; told_late tells all to end, as a scheduler does that wants the machine
    run …                   an ordinary `compressor run …`
    serve                   reads JSON lists of such words from its input, one a line, has two processes do each and
                            writes what became of them as JSON: "statuses" by rank, "out", "err"

A served group is a real one: own processes, gloo, a store outside of them. Only the interpreter is not started anew.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

from compressor import CalibrationError, Processes, compress
from compressor.cli import main
from compressor.plugin import RoutedTokens
from compressor.plugins import load_plugins
from compressor.selection.activation_sums import ExpertSums

SIZE = 2
SECONDS_TO_LEAVE = 30.0
WARM = (
    "compressor.run.pipeline",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
)
"""What runs import on their way; lm-eval, which takes seconds, only nightly ones."""

torch.set_num_threads(1)


def fail() -> None:
    raise CalibrationError("this text cannot be used")


def fail_by_our_fault() -> None:
    raise KeyError("a bug")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def be_told() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def recipes(folder: Path) -> None:
    with Processes.joined() as processes:
        for recipe in sorted(folder.glob("*.yaml")):
            result = compress(recipe, output=folder / f"{recipe.stem}-several", processes=processes)
            assert result.folder is not None
            assert result.folder.exists()  # in all processes, as soon as it returns
            records = processes.exchange([one["decision"] for one in result.record["passes"]])
            assert records[0] == records[1]
            assert result.record["processes"] == processes.size


def broken_run(word: str, arguments: list[str]) -> None:
    kind, _, when = word.partition("_" if word != "has_bug" else "?")
    breaking = {"fails": fail, "has_bug": fail_by_our_fault, "dies": die, "told": be_told}[kind]
    first, end_batch = ".0." if when != "late" else ".1.", ExpertSums.end_batch

    def update(self: ExpertSums, tokens: RoutedTokens) -> None:
        if first not in tokens.layer.path:
            end_batch(self, tokens)
            return
        if os.environ["RANK"] == "1" or kind == "told":
            breaking()
        time.sleep(600 if when == "busy" else 0)

    ExpertSums.end_batch = update  # type: ignore[assignment, method-assign]
    main(["run", *arguments])


def do(word: str, *rest: str) -> None:
    if word == "recipes":
        recipes(Path(rest[0]))
    elif word == "run":
        main(["run", *rest])
    else:
        broken_run(word, list(rest))


# The server --------------------------------------------------------------------------------------------------


def start(rank: int, port: int, words: list[str], folder: Path) -> int:
    """Fork one process of a group; its output goes to files in the folder. Returns its id."""
    child = os.fork()
    if child:
        return child
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(SIZE)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT), number)
    status = 0
    try:
        do(*words)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        status = 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def watch(children: list[int]) -> list[int]:
    """Statuses by rank. When the first has failed the others are told to end, as torchrun does."""
    statuses: dict[int, int] = {}
    until = float("inf")
    while len(statuses) < len(children):
        for child in set(children) - statuses.keys():
            gone, status = os.waitpid(child, os.WNOHANG)
            if gone:
                statuses[child] = os.waitstatus_to_exitcode(status)
        left = set(children) - statuses.keys()
        if until == float("inf") and any(statuses.values()):
            until = time.monotonic() + SECONDS_TO_LEAVE
            for child in left:
                os.kill(child, signal.SIGTERM)
        if time.monotonic() > until:
            for child in left:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [statuses[child] for child in children]


def group(words: list[str]) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        children = [start(rank, port, words, Path(name)) for rank in range(SIZE)]
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        statuses = watch(children)
        del store
        said = {
            key: "".join((Path(name) / f"{key}-{rank}").read_text() for rank in range(SIZE)) for key in ("out", "err")
        }
    return {"statuses": statuses, **said}


def serve() -> None:
    for name in WARM:  # here, not in every child
        import_module(name)
    load_plugins()
    for line in sys.stdin:
        print(json.dumps(group(json.loads(line))), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve()
    else:
        do(*sys.argv[1:])
