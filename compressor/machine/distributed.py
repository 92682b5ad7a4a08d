"""Several processes at work on one run: who they are, and how they tell each other what they have found.

    torchrun --nproc-per-node 2 -m compressor run recipe.yaml

    with Processes.joined() as processes:          alone, unless torchrun has started several
        own = processes.own(len(batches))          the batches of this process: rank, rank + size, …
        total = processes.sum(figures)             the same on all of them, added in the order of their ranks

`Processes` itself is a process alone, for which all of this does nothing, so no other module asks whether there are
several. Every exchange is one step that all processes take together. What they exchange are figures on the CPU, float64
at the end, so gloo carries them whatever device the model is on, and nothing is pickled.

When a process fails, the first to do so says so in the store, shows its error and ends. The others' next exchange with
it is cut off; they find there that it has been told, and end quietly. One that is killed says nothing: then the first
to notice does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import reduce
from typing import TYPE_CHECKING, Any

from compressor.errors import ProcessError

if TYPE_CHECKING:
    from torch import Tensor

_LONGEST_WAIT = timedelta(days=7)
"""How long others may be at work: whoever ends is noticed at once, so this only has to be longer than any step."""
_HEADER_BYTES = 512
_PIECE_BYTES = 2**28
_SECONDS_UNTIL_TOLD = 1.0
_FAILED = "compressor/failed"
_TERMINATED = 143


class Processes:
    """One process alone. Of several, `rank` is this one's number among all `size`, `local_rank` on its machine."""

    rank = 0
    size = 1
    local_rank = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank {self.rank} of {self.size})"

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def own(self, count: int) -> range:
        """Which of `count` things are this process's: turn by turn, so that domains and lengths are spread evenly."""
        return range(self.rank, count, self.size)

    # exchanges: all processes together, in the same order

    def exchange(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks; JSON. Raises ProcessError where another one has failed."""
        return [value]

    def gather(self, figures: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
        """Every process's tensors, on the CPU, in the order of ranks; shapes may differ."""
        return [figures]

    def sum(self, tensor: Tensor) -> Tensor:
        """Σ over the processes of tensors of one shape, on the CPU; added in the order of ranks, so alike on all."""
        return reduce(lambda one, other: one + other, self._of_all(tensor))

    def largest(self, tensor: Tensor) -> Tensor:
        """The largest over the processes, number by number, of tensors of one shape on the CPU."""
        return reduce(lambda one, other: one.maximum(other), self._of_all(tensor))

    def _of_all(self, tensor: Tensor) -> list[Tensor]:
        return [figures["tensor"] for figures in self.gather({"tensor": tensor})]

    def any(self, flag: bool) -> bool:
        """Whether it is so in one of them."""
        return any(self.exchange(bool(flag)))

    def all(self, flag: bool) -> bool:
        """Whether it is so in all of them."""
        return all(self.exchange(bool(flag)))

    def in_order(self, values: Sequence[Any]) -> list[Any]:
        """The values, JSON, that the processes have found for each of their `own` things → those of all things."""
        by_rank = self.exchange(list(values))
        whole: list[Any] = [None] * sum(map(len, by_rank))
        for rank, found in enumerate(by_rank):
            whole[rank :: self.size] = found
        return whole

    def wait(self) -> None:
        """Go on when all have come here."""
        self.exchange(None)

    def tell(self, error: Exception) -> None:
        """Let the others, who are on their way to an exchange, fail there with a ProcessError: for an error that does
        not end the run. Does nothing where all know of it; raises the error where another process has ended.
        """

    @staticmethod
    @contextmanager
    def joined() -> Iterator[Processes]:
        """The processes of torchrun, or one alone. An error that leaves the context ends all; SIGTERM: SystemExit."""
        wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if not all(name in os.environ for name in wanted) or int(os.environ["WORLD_SIZE"]) == 1:
            yield Processes()
            return
        with ends_when_told(), _connected() as processes:
            yield processes


class SeveralProcesses(Processes):
    """Several, of whom `_all` carries bytes; what is exchanged is checked to be the same step on all of them."""

    def __init__(self, rank: int, size: int, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._number = 0

    def _all(self, payload: bytes, largest: int) -> list[bytes]:
        """Every process's bytes, none longer than `largest`, in the order of ranks; of others they may be padded."""
        raise NotImplementedError

    def exchange(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks; JSON. Raises ProcessError where another one has failed."""
        return [json.loads(found) for found in self._step("exchange", json.dumps(value).encode())]

    def gather(self, figures: Mapping[str, Tensor]) -> list[Mapping[str, Tensor]]:
        """Every process's tensors, on the CPU, in the order of ranks; shapes may differ."""
        from safetensors.torch import load, save

        whole = {name: tensor.cpu().contiguous().clone() for name, tensor in figures.items()}
        return [load(found) for found in self._step("gather", save(whole))]

    def tell(self, error: Exception) -> None:
        """Take part in the step that the others come to, as one that has failed."""
        if isinstance(error, ProcessError):
            if error.ended:
                raise error
            return
        with suppress(ProcessError):
            self._step("", str(error).encode(), failed=True)

    def _step(self, name: str, payload: bytes, *, failed: bool = False) -> list[bytes]:
        """One exchange: headers first, which say whether all are at the same step and none has failed."""
        self._number += 1
        header = json.dumps({"step": name, "number": self._number, "bytes": len(payload), "failed": failed})
        headers = [json.loads(one) for one in self._all(header.encode().ljust(_HEADER_BYTES), _HEADER_BYTES)]
        self._number = max(one["number"] for one in headers)
        found = self._all(payload, max(one["bytes"] for one in headers))
        found = [one[: header["bytes"]] for one, header in zip(found, headers, strict=True)]
        for rank, one in enumerate(headers):
            if one["failed"]:
                raise ProcessError(f"process {rank} of {self.size}: {found[rank].decode()}")
        steps = {(one["step"], one["number"]) for one in headers}
        if len(steps) > 1:
            raise RuntimeError(f"the processes are out of step: {', '.join(map(str, sorted(steps)))}")
        return found


class _Joined(SeveralProcesses):
    """Processes that are connected by torch.distributed, in a group of their own."""

    def __init__(self, rank: int, size: int, local_rank: int, store: Any, group: Any) -> None:
        super().__init__(rank, size, local_rank)
        self._store, self._group = store, group

    def _all(self, payload: bytes, largest: int) -> list[bytes]:
        import torch
        from torch import distributed

        pieces: list[list[bytes]] = []
        try:
            for start in range(0, largest, _PIECE_BYTES):
                length = min(_PIECE_BYTES, largest - start)
                piece = bytearray(payload[start : start + length].ljust(length, b"\0"))
                own = torch.frombuffer(piece, dtype=torch.uint8)
                found = [torch.empty_like(own) for _ in range(self.size)]
                distributed.all_gather(found, own, group=self._group)
                pieces.append([one.numpy().tobytes() for one in found])
        except RuntimeError as error:
            raise self._cut_off() from error
        return [b"".join(parts) for parts in zip(*pieces, strict=True)] if pieces else [b""] * self.size

    def _cut_off(self) -> ProcessError:
        """Why another process is not there any more."""
        until = time.monotonic() + _SECONDS_UNTIL_TOLD
        while time.monotonic() < until:
            failed = self._failed()
            if failed is not None:
                return ProcessError(failed, ended=True, told=True)
            time.sleep(0.05)
        return ProcessError(
            "another process of this run has ended without a word: killed, or out of memory.", ended=True
        )

    def _failed(self) -> str | None:
        """What the first process to fail has said, None if none has."""
        with suppress(RuntimeError):
            if self._store.check([_FAILED]):
                return str(self._store.get(_FAILED).decode())
        return None

    def is_first_to_fail(self, error: BaseException) -> bool:
        """Say in the store that this process fails, unless another one has; without a store everybody is the first."""
        text = f"process {self.rank} of {self.size} failed: {error}"
        try:
            return bool(self._store.compare_set(_FAILED, "", text).decode() == text)
        except RuntimeError:
            return True


@contextmanager
def _connected() -> Iterator[_Joined]:
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    is_ours = not distributed.is_initialized()
    if is_ours:
        store, rank, size = next(iter(rendezvous("env://", timeout=timedelta(minutes=10))))
        own = PrefixStore("compressor", store)
        distributed.init_process_group("gloo", store=own, rank=rank, world_size=size, timeout=_LONGEST_WAIT)
        group = None
    else:  # the caller's own program runs on several processes
        store = distributed.distributed_c10d._get_default_store()
        rank, size = distributed.get_rank(), distributed.get_world_size()
        group = distributed.new_group(backend="gloo", timeout=_LONGEST_WAIT)
    processes = _Joined(rank, size, int(os.environ.get("LOCAL_RANK", "0")), store, group)
    try:
        yield processes
    except SystemExit:
        raise
    except BaseException as error:
        told = isinstance(error, ProcessError) and error.told
        if not told and not processes.is_first_to_fail(error):
            raise ProcessError(str(processes._failed()), ended=True, told=True) from error
        raise
    finally:
        distributed.destroy_process_group(group)  # cuts off those who wait


@contextmanager
def ends_when_told() -> Iterator[None]:
    """Within the context SIGTERM, by which torchrun ends the others, lets `with` and `finally` do their work."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> None:
        if sys.exc_info()[0] is None:  # otherwise it is leaving, and what it tidies up is not to be cut short
            raise SystemExit(_TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
