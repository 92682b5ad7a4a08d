"""A run's output folder, which appears under its name only when it is whole, and what waits beside it meanwhile."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from compressor.checkpoint.atomic_files import force_to_disk, put_in_place
from compressor.checkpoint.resume_state import Journal
from compressor.errors import (
    CalibrationError,
    CheckpointError,
    DiskError,
    PluginError,
    RecipeError,
    UnsupportedModelError,
    VerificationError,
)
from compressor.wording import human_bytes

_FINAL = RecipeError | PluginError | UnsupportedModelError | CalibrationError | VerificationError
"""Errors that the same recipe meets again."""


def kept_for(target: Path, what: Literal["journal", "stages", "answers", "waiting"]) -> Path:
    """Where a run on this output keeps what it has done, the checkpoints between its passes, what the original answers
    to measured text, and the hidden states that are not in memory.
    """
    return target.parent / f".{target.name}.partial" / what


def refuse_output_over_input(output: Path, reference: str) -> None:
    """Raise RecipeError where the output would be the model's own folder, hold it, or be in it."""
    source = Path(reference).expanduser()
    if not reference or not source.is_dir():
        return
    inside, outside = output.resolve(), source.resolve()
    if inside.is_relative_to(outside) or outside.is_relative_to(inside):
        raise RecipeError(f"output {output} is the model's own folder, holds it, or is in it. Choose another one.")


class OutputFolder:
    """A folder that appears under its name only when it is whole. Work goes into `hidden` beside it, which one run at a
    time may write to, the output into its `path`; `finish` moves that to `target`. Leaving without that removes it,
    unless the run's `journal` holds work for `resume`, which no error removes. An existing target is refused unless
    `overwrite`, and then replaced at the very end.
    """

    def __init__(self, target: Path, *, overwrite: bool = False, resume: bool = False) -> None:
        """Raises RecipeError for what cannot be asked for together."""
        if resume and overwrite:
            raise RecipeError("--resume goes on with an interrupted run, --overwrite starts anew: give one of them.")
        self.target = target
        self.overwrite = overwrite
        self.resume = resume
        self.hidden = kept_for(target, "journal").parent
        self.path = self.hidden / "output"
        self.journal = Journal(kept_for(target, "journal"))
        self._lock_file = self.hidden / "lock"
        self._lock = FileLock(self._lock_file)
        """The system lets go of it when the process ends, however it does."""
        self._old = self.hidden / "old"
        self._may_replace = self.hidden / "may-replace"
        """There where the run was told to replace an existing target."""
        self._made: Sequence[Path] = ()
        """Folders around the target that were not there."""
        self._whole = self.hidden / "whole"
        """There when the output is: only names are to be changed then, and the rest to be removed."""

    def __enter__(self) -> OutputFolder:
        try:
            self.complete()
            self._refuse_existing()
            self._made = [parent for parent in self.hidden.parents if not parent.exists()]
            self.hidden.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self._take_over()
            (self.path / "compressor").mkdir(parents=True)
            if self.overwrite:
                self._may_replace.touch()
        except OSError as error:
            self._lock.release()
            raise self._unwritable(error) from error
        return self

    def check(self) -> None:
        """Raise what entering the context would, as far as that can be told without writing anything."""
        try:
            if self._whole.exists() and self.resume:
                return  # it only lacks its name
            self._refuse_existing()
            self._refuse_unwritable()
            if self._lock_file.exists():
                self._take_lock()
                self._lock.release()
        except OSError as error:
            raise self._unwritable(error) from error
        self._refuse_work_of_others()

    def _refuse_unwritable(self) -> None:
        """Raise OSError where folders around the hidden one cannot be made, or written to."""
        there, missing = self._around()
        for part in missing:
            with suppress(FileNotFoundError):
                (there / part).lstat()
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))  # a link that leads nowhere
        if not os.access(there, os.W_OK | os.X_OK):
            is_read_only = hasattr(os, "statvfs") and os.statvfs(there).f_flag & os.ST_RDONLY
            number = errno.EROFS if is_read_only else errno.EACCES
            raise OSError(number, os.strerror(number))

    def _around(self) -> tuple[Path, tuple[str, ...]]:
        """The nearest folder around the hidden one, itself included, that is there, and the names that are missing."""
        parents = [self.hidden, *self.hidden.parents]
        there = next(parent for parent in parents if parent.exists())
        return there, self.hidden.relative_to(there).parts

    def _take_lock(self) -> None:
        """Raises CheckpointError where another run holds it."""
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise CheckpointError(f"{self.target}: another run is writing this output; wait for it.") from error

    def _unwritable(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self.target}: the output cannot be written there: {error.strerror}.")

    def complete(self) -> bool:
        """Give the output of a run before its name, if that was stopped when it was whole. Returns whether it was."""
        with suppress(OSError):
            self.hidden.rmdir()  # the very last that a run does; no other leaves it empty
        if not os.path.exists(self._whole):
            return False
        try:
            self._take_lock()
            self._put_in_place()
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            self._lock.release()
        return True

    def _refuse_existing(self) -> None:
        exists = self.target.exists() or self._whole.exists()
        goes_on_to_replace = self.resume and self.journal.has_work and self._may_replace.exists()
        if exists and not (self.overwrite or goes_on_to_replace):
            raise CheckpointError(
                f"{self.target} exists already. Choose another output, or pass --overwrite to replace it."
            )
        if self.target.is_symlink():
            raise CheckpointError(f"{self.target} is a link. Give the folder that it should lead to as the output.")
        if exists and not (self.target / "compressor").is_dir():
            raise CheckpointError(
                f"{self.target} was not written by compressor, so --overwrite does not replace it. Remove it yourself."
            )

    def _take_over(self) -> None:
        """What a run before has left: gone on from, or removed where nothing is lost or nothing else is wanted."""
        try:
            self._refuse_work_of_others()
        except CheckpointError:
            self._lock.release()
            raise
        self.resume = self.resume and self.journal.has_work
        folders = (self.journal.folder, kept_for(self.target, "stages"), kept_for(self.target, "answers"))
        gone_on_from = (*folders, self._may_replace)
        for path in self.hidden.iterdir():
            if path == self._lock_file or (self.resume and path in gone_on_from):
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _refuse_work_of_others(self) -> None:
        if self.journal.has_work and not (self.resume or self.overwrite):
            raise CheckpointError(
                f"{self.target}: an interrupted run's work is in {self.hidden}: --resume goes on, --overwrite drops it."
            )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._lock.is_locked and self.hidden.exists() and not self.keeps_after(error):
            shutil.rmtree(self.hidden, ignore_errors=True)
            for parent in self._made:
                with suppress(OSError):  # where something else is in it by now
                    parent.rmdir()
        self._lock.release()

    def keeps_after(self, error: BaseException | None) -> bool:
        """Whether what was done is left to resume from: the error may be of this command alone."""
        if error is None:
            return False
        is_final = isinstance(error, _FINAL) or (
            isinstance(error, CheckpointError) and not isinstance(error, DiskError)
        )
        return self._whole.exists() or (self.journal.has_work and (self.resume or not is_final))

    def require_space(self, num_bytes: int, *, who: str = "the smaller model") -> None:
        """Raise CheckpointError if the file system has less free."""
        there, _ = self._around()
        free = shutil.disk_usage(there).free
        if free < num_bytes:
            raise CheckpointError(
                f"{self.target}: {who} needs {human_bytes(num_bytes)} of disk, {human_bytes(free)} are free."
            )

    def take(self, checkpoint: Path) -> None:
        """Move a checkpoint's files into it. Its config goes first: without it the rest counts as gone."""
        for path in sorted(checkpoint.iterdir(), key=lambda path: path.name != "config.json"):
            path.rename(self.path / path.name)

    def finish(self) -> None:
        """Give the folder its name. Stopped anywhere in here, the journal is whole or `complete` does the rest."""
        mask = os.umask(0)
        os.umask(mask)
        for path in self.path.rglob("*"):
            if not path.is_file():
                continue
            # safetensors writes files that only their owner can read; a hard link is the source's file as well
            if path.stat().st_nlink == 1:
                path.chmod(0o666 & ~mask)
            force_to_disk(path)
        note = self._whole.with_name("whole.partial")
        note.touch()
        put_in_place(note, self._whole)
        self._put_in_place()

    def _put_in_place(self) -> None:
        """Give the whole output its name, and remove all else; what of this was done already is not done again."""
        if self.path.exists():
            if self.target.exists():
                if not self._may_replace.exists():
                    raise CheckpointError(
                        f"{self.target} did not exist when the run began; the output is in {self.path}: remove one."
                    )
                self.target.rename(self._old)
            self.path.rename(self.target)
        others = [path for path in self.hidden.iterdir() if path not in (self._lock_file, self._whole)]
        for path in others:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        self._lock_file.unlink(missing_ok=True)
        self._lock.release()
        if not any(path.exists() for path in others):
            self._whole.unlink(missing_ok=True)
        with suppress(OSError):
            self.hidden.rmdir()


@contextmanager
def disk_errors_named(target: Path) -> Iterator[None]:
    """Turn the system's errors about writing into a CheckpointError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _errno_in(str(error))
        if number not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG):
            raise
        raise DiskError(f"{target}: writing failed: {os.strerror(number)}. Nothing is left under that name.") from error


def _errno_in(message: str) -> int | None:
    """Safetensors wraps the system's errors, and only its text tells which: `… (os error 28)`."""
    found = re.search(r"\(os error (\d+)\)", message)
    return int(found[1]) if found else None
