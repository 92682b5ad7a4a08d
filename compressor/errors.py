"""Everything that can go wrong and that the user can mend.

    CompressorError                 the root: catch this one to catch them all
    ├── RecipeError                 the recipe or a command-line option asks for something that cannot be
    ├── PluginError                 a plugin is broken, unknown, or clashes with another
    ├── UnsupportedModelError       the model's architecture or routing is not one we can handle
    ├── CalibrationError            the calibration data cannot be used
    ├── CheckpointError             a checkpoint is missing, damaged, or cannot be written
    │   └── DiskError               a file could not be written or read for reasons that lie outside of it
    ├── EvaluationError             a task or text cannot be evaluated
    ├── VerificationError           our own checks found that the smaller model is not what was decided
    ├── ProgramError                a program that a recipe has run failed, or took too long
    └── ProcessError                another process of the same run has failed, or ended

The command line prints these without a traceback and exits with status 2. Any other exception is a bug of ours:
it is shown with its traceback and exits with status 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_LONGEST_WORD, _LONGEST_LINE = 500, 2000


def shortened(text: str, most: int) -> str:
    """A text of at most so many characters: of a longer one the middle is left out."""
    return text if len(text) <= most else f"{text[: most - most // 3 - 1]}…{text[len(text) - most // 3 :]}"


class CompressorError(Exception):
    """Something the user can mend: where, what was found (shortened if unreadable) and what would be right."""

    def __str__(self) -> str:
        return "\n".join(
            shortened(" ".join(shortened(word, _LONGEST_WORD) for word in line.split(" ")), _LONGEST_LINE)
            for line in super().__str__().split("\n")
        )


class RecipeError(CompressorError):
    """The recipe, or a command-line option, asks for something that cannot be."""


class PluginError(CompressorError):
    """A plugin cannot be imported, is unknown, or clashes with another one."""


class UnsupportedModelError(CompressorError):
    """The model's architecture or routing cannot be handled; the message names what was not understood."""


class CalibrationError(CompressorError):
    """The calibration data is missing, empty, too short, or not what it is said to be."""


class CheckpointError(CompressorError):
    """A checkpoint is missing, damaged, not finite, or cannot be written."""


class DiskError(CheckpointError):
    """A file could not be written or read: no space, no permission, changed meanwhile. What was done is kept."""


class EvaluationError(CompressorError):
    """A task or a text cannot be evaluated."""


class VerificationError(CompressorError):
    """The edited or saved model does not compute what was decided; nothing is put under the output's name."""


class ProgramError(CompressorError):
    """A program that a recipe has run failed, or took too long. What was done before is kept."""


class ProcessError(CompressorError):
    """Another process of the run has failed or, with `ended`, is gone; `told`: it has told the user itself."""

    def __init__(self, message: str, *, ended: bool = False, told: bool = False) -> None:
        super().__init__(message)
        self.ended, self.told = ended, told


@contextmanager
def writing(file: Path, advice: str = "") -> Iterator[None]:
    """The system's refusal to write within the context is a DiskError that names the file."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"{file}: it cannot be written there: {error.strerror}.{advice}") from error


def answered(who: str, answer: Any, kind: Any, expected: str) -> Any:
    """What a plugin has answered. Raises PluginError where that is of no such `kind` (as isinstance has it)."""
    if not isinstance(answer, kind):
        raise PluginError(f"{who} answers {shortened(repr(answer), 120)}, expected {expected}.")
    return answer
