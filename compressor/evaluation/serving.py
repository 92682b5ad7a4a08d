"""A program of the user's that serves a model, as long as it is needed, and nothing of it afterwards."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from urllib.parse import urlsplit

from compressor.data.server import Server
from compressor.errors import CompressorError, ProgramError
from compressor.evaluation.served import is_ready
from compressor.machine.distributed import ends_when_told

_GRACE = 10.0
"""Seconds in which a server that is stopped may put away what it has."""


@contextmanager
def serving(server: Server, folder: Path, say: Callable[[str], None]) -> Iterator[Server]:
    """Within the context the server's command runs on a model's folder, in a group of its own, and answers where the
    server that is yielded says. Raises ProgramError with the end of its output where it does not, or ends.
    """
    url = server.url or f"http://127.0.0.1:{_free_port()}/v1"
    port = str(urlsplit(url).port or 80)
    command = [one.replace("{port}", port).replace("{model}", str(folder)) for one in server.command]
    if is_ready(url):
        raise ProgramError(f"{url}: a server answers there already. Stop it, or give another `url`.")
    with NamedTemporaryFile(prefix="compressor-server-", suffix=".log", delete=False) as log, ends_when_told():
        say(f"starting `{shlex.join(command)}`, whose output goes to {log.name}")
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            Path(log.name).unlink()
            raise ProgramError(f"{command[0]} cannot be run: {error.strerror}.") from error
        try:
            end = time.monotonic() + server.starts_within
            while not is_ready(url):
                if process.poll() is not None or time.monotonic() > end:
                    raise ProgramError("no answer")
                time.sleep(0.1)
            yield server.model_copy(update={"url": url})
        except CompressorError as error:
            status = process.poll()
            if status is None and not isinstance(error, ProgramError):
                raise
            late = f"did not answer within {server.starts_within:g} seconds (`starts_within`)"
            how = late if status is None else f"ended with status {status}"
            said = Path(log.name).read_text(encoding="utf-8", errors="replace").strip()[-2000:] or "nothing"
            raise ProgramError(f"{command[0]} {how}. In {log.name} it said last:\n{said}") from error
        finally:
            _stop(process)
    Path(log.name).unlink()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """With all that it has begun."""
    try:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
