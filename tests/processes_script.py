"""What test_processes.py starts with torchrun. `recipes FOLDER` runs every recipe there, all in one start; other words
break one process of an ordinary `compressor run` while it observes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

from compressor import CalibrationError, Processes, RoutedTokens, compress
from compressor.cli import main
from compressor.selection.sums import ExpertSums

torch.set_num_threads(1)


def fail() -> None:
    raise CalibrationError("this text cannot be used")


def fail_by_our_fault() -> None:
    raise KeyError("a bug")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def recipes(folder: Path) -> None:
    with Processes.joined() as processes:
        for recipe in sorted(folder.glob("*.yaml")):
            result = compress(recipe, output=folder / f"{recipe.stem}-several", processes=processes)
            assert result.folder is not None
            assert result.folder.exists()  # in all processes, as soon as it returns
            records = processes.exchange([one["decision"] for one in result.record["passes"]])
            assert records[0] == records[1]
            assert result.record["processes"] == processes.size


if __name__ == "__main__":
    word, rest = sys.argv[1], sys.argv[2:]
    if word == "recipes":
        recipes(Path(rest[0]))
    else:
        kind, _, when = word.partition("_" if word != "has_bug" else "?")
        breaking = {"fails": fail, "has_bug": fail_by_our_fault, "dies": die}[kind]
        first, end_batch = ".0." if when != "late" else ".1.", ExpertSums.end_batch

        def update(self: ExpertSums, tokens: RoutedTokens) -> None:
            if first not in tokens.layer.path:
                end_batch(self, tokens)
                return
            if os.environ["RANK"] == "1":
                breaking()
            time.sleep(60 if when == "busy" else 0)

        ExpertSums.end_batch = update  # type: ignore[assignment, method-assign]
        main(["run", *rest])
