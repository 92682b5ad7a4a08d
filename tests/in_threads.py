"""Several processes as threads of this one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from compressor import Processes
from compressor.machine.distributed import SeveralProcesses


class Threads(SeveralProcesses):
    """Processes that are threads of this one."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, slots: list[bytes]) -> None:
        super().__init__(rank, size)
        self.barrier, self.slots = barrier, slots

    def _all(self, payload: bytes, largest: int) -> list[bytes]:
        self.slots[self.rank] = payload.ljust(largest, b"\0")
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found


def together(size: int, work: Callable[[Processes], Any]) -> list[Any]:
    """What the work gives in each of so many processes, or the error that it ends with."""
    barrier, slots = threading.Barrier(size, timeout=60), [b""] * size

    def one(rank: int) -> Any:
        try:
            return work(Threads(rank, size, barrier, slots))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))
