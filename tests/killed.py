"""Kills runs at random moments, goes on with each until it ends, and compares what all of them have written.

    python killed.py RECIPE.json FOLDER NUMBER_OF_KILLS SEED

Runs are children forked from a process that has done one itself, so that a moment is a moment of the run. Half of
the moments are drawn from the whole run, half from what follows a file of the journal: how long a model takes to load
on a busy machine then does not decide how many runs had work to lose. Prints the numbers of kills, of kills that left
work behind, and of runs; exits with 1 and says why if two outputs differ.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from compressor.run.pipeline import compress

SAME = ("model.safetensors", "config.json", "compressor/statistics.safetensors", "compressor/decision.json")


def start(recipe: dict[str, object], output: Path, *, resume: bool) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            compress(recipe, output=output, resume=resume)
            status = 0
        finally:
            os._exit(status)
    return child


def written(journal: Path) -> int:
    """Number of files of the journal, which the run adds to and removes meanwhile."""
    return sum(len(files) for _, _, files in os.walk(journal))


def wait(child: int, journal: Path, seconds: float, generator: random.Random) -> int:
    """Until a random moment of the run: its status if it has ended by then, or -1."""
    end = time.monotonic() + generator.uniform(0, seconds)
    more = generator.choice((0, generator.randint(1, 4)))
    files = written(journal) + more
    while time.monotonic() < end or more:
        gone, status = os.waitpid(child, os.WNOHANG)
        if gone:
            return status
        if more and written(journal) >= files:
            more, end = 0, time.monotonic() + generator.uniform(0, 0.02)
        time.sleep(0.001)
    return -1


def main() -> None:
    recipe, folder, wanted, seed = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), *map(int, sys.argv[3:])
    torch.set_num_threads(1)
    generator = random.Random(seed)
    compress(recipe, output=folder / "whole")  # here, so that all that is imported on the way is there in every child
    began = time.monotonic()
    assert os.waitpid(start(recipe, folder / "timed", resume=False), 0)[1] == 0
    seconds = time.monotonic() - began
    expected = {name: (folder / "whole" / name).read_bytes() for name in SAME}
    kills = kept = runs = 0
    while kills < wanted:
        output, ended, patience = folder / f"run-{runs}", False, seconds
        while not ended:
            partial = folder / f".run-{runs}.partial"
            child = start(recipe, output, resume=partial.exists())
            status = wait(child, partial / "journal", patience, generator)
            patience *= 1.1  # on a busy machine a run may take longer than the first, and must come to its end
            if status >= 0:
                assert status == 0, f"run {runs} ended with status {status}"
                ended = True
            else:
                os.kill(child, signal.SIGKILL)
                status = os.waitpid(child, 0)[1]
                kills += os.WIFSIGNALED(status)
                kept += written(partial / "journal") > 1  # more than what it says of the run
                assert not output.exists() or sorted(path.name for path in output.glob("lock*")) == []
                ended = output.exists() and not any(partial.glob("*"))  # killed after its end
        for name, content in expected.items():
            assert (output / name).read_bytes() == content, f"{name} of run {runs} is another"
        assert not any(any(left.iterdir()) for left in folder.glob(".run-*")), "something is left"
        runs += 1
    print(kills, kept, runs)


if __name__ == "__main__":
    main()
