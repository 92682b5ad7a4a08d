"""A program, with all that it begins, until it ends or has had its time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO

from compressor.plugin import ProgramError

_SAID = 2000
"""Characters of what it said last that are shown."""
_GRACE = 5.0
"""Seconds in which a program that is stopped may put away what it has."""


def run(command: Sequence[str], environment: Mapping[str, str], timeout: float) -> None:
    """Run it without a shell, in a group of its own, of which nothing is left afterwards. Raises ProgramError, with the
    end of its standard error, where it fails, is killed, or takes more than `timeout` seconds.
    """
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                command,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                start_new_session=True,
            )
        except OSError as error:
            raise ProgramError(f"{command[0]} cannot be run: {error.strerror}.") from error
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            _signal(process, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
            raise ProgramError(
                f"{command[0]} was stopped: it took more than {timeout:g} seconds (`timeout`).{_end_of(said)}"
            ) from error
        finally:
            _signal(process, signal.SIGKILL)  # what it began and left behind would go on writing
            process.wait()
        if status:
            how = f"ended with status {status}" if status > 0 else f"was ended by {signal.Signals(-status).name}"
            raise ProgramError(f"{command[0]} {how}.{_end_of(said)}")


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """To the whole group, if some of it is left."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _end_of(said: IO[bytes]) -> str:
    """Without colours, and of a line that was written over and over (a progress bar) what stood there last."""
    size = said.seek(0, os.SEEK_END)
    said.seek(max(0, size - _SAID))
    text = re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", said.read().decode(errors="replace"))
    text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")).strip()
    return f" It said last:\n{text}" if text else " It said nothing."
