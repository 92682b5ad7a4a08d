"""Kills runs at random moments, goes on with each until it ends, and compares what all of them have written.

    python killed.py RECIPE.json FOLDER NUMBER_OF_KILLS SEED

Runs are children forked from a process that has imported everything, so that a moment is a moment of the run. Prints
the number of kills; exits with 1 and says why if two outputs differ.
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

import compressor
from compressor.engine import compress

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


def main() -> None:
    recipe, folder, wanted, seed = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), *map(int, sys.argv[3:])
    torch.set_num_threads(1)
    assert compressor.MoEModel  # imported before the first fork
    generator = random.Random(seed)
    began = time.monotonic()
    assert os.waitpid(start(recipe, folder / "whole", resume=False), 0)[1] == 0
    seconds = time.monotonic() - began
    expected = {name: (folder / "whole" / name).read_bytes() for name in SAME}
    kills = kept = runs = 0
    while kills < wanted:
        output, ended, patience = folder / f"run-{runs}", False, seconds
        while not ended:
            child = start(recipe, output, resume=(folder / f".run-{runs}.partial").exists())
            time.sleep(generator.uniform(0, patience))
            patience *= 1.1  # on a busy machine a run may take longer than the first, and must come to its end
            gone, status = os.waitpid(child, os.WNOHANG)
            if gone:
                assert status == 0, f"run {runs} ended with status {status}"
                ended = True
            else:
                os.kill(child, signal.SIGKILL)
                status = os.waitpid(child, 0)[1]
                kills += os.WIFSIGNALED(status)
                kept += any((folder / f".run-{runs}.partial").glob("journal/*/*"))
                assert not output.exists() or sorted(path.name for path in output.glob("lock*")) == []
                ended = output.exists()  # killed after its end
        for name, content in expected.items():
            assert (output / name).read_bytes() == content, f"{name} of run {runs} is another"
        assert not list(folder.glob(".run-*")), "something is left"
        runs += 1
    print(kills, kept, runs)


if __name__ == "__main__":
    main()
