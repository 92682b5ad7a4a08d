"""The method `command`: a program of the user's reads the checkpoint and writes another one. What it leaves is verified
by the core.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from compressor.plugin import Column, Decision, Description, Method, OptionError, Options, Plan
from compressor_command.process import run

if TYPE_CHECKING:
    from compressor.plugin import Gathered, MoELayer

_PLACES = ("{input}", "{output}")


class CommandOptions(Options):
    """Which program, with what, and what is asked of its result."""

    command: tuple[str, ...] = Field(
        min_length=1,
        description="the program and its arguments, a list; `{input}` in them becomes the folder of the checkpoint to "
        "read, `{output}` the empty one to write into. No shell reads it",
    )
    environment: dict[str, str] = Field(
        default={}, description="environment variables for it, beside those of this process, or instead of them"
    )
    timeout: float = Field(default=86_400, gt=0, description="seconds after which it is stopped, with all it has begun")
    verify: Literal["model", "files"] = Field(
        default="model",
        description="model: what it leaves is loaded, compared and measured; files: a format that transformers does "
        "not load (GGUF, MLX), of which nothing is known but that files are there",
    )
    max_kl: float = Field(
        default=0.5,
        gt=0,
        description="how far, in nats a token of calibration text, its answers may be from those of the checkpoint "
        "that went in; refused beyond",
    )
    keeps_zeros: bool = Field(
        default=False,
        description="that the program keeps zeros which passes before have made (rounding to the nearest does, GPTQ "
        "does not); a command behind such a pass is refused without",
    )


class Command(Method[CommandOptions]):
    """Run a program that turns the checkpoint into another one; only with --allow-commands."""

    name = "command"
    version = "1"
    api = 2
    options_type: ClassVar[type[Options]] = CommandOptions

    @property
    def needs_text(self) -> bool:
        """For its answers to be compared on."""
        return self.options.verify == "model"

    @property
    def program(self) -> Sequence[str]:
        """What the user is asked to allow."""
        return self.options.command

    @property
    def max_kl(self) -> float | None:
        """As the options have it."""
        return self.options.max_kl

    @property
    def leaves_model(self) -> bool:
        """Not where only files are asked for."""
        return self.options.verify == "model"

    def check(self, layers: Sequence[MoELayer]) -> Plan:
        """The program must be there, and be told where to read and write."""
        program, *arguments = self.options.command
        for place in _PLACES:
            if not any(place in argument for argument in arguments):
                raise OptionError("command", f"no argument has {place} in it, so {program} would not know that folder")
        if shutil.which(program) is None:
            raise OptionError("command", f"there is no program {program!r} here that can be run")
        if self.options.verify == "files" and "max_kl" in self.options.model_fields_set:
            raise OptionError("max_kl", "would have no effect with `verify: files`, which loads nothing; leave it out")
        if not self.options.keeps_zeros:
            layers = [replace(layer, zeros=None) for layer in layers]
        return Plan(layers, [f"{shlex.join(self.options.command)} is run, with all that this account may do"])

    def decide(self, layers: Sequence[MoELayer], statistics: Gathered) -> Decision:
        """What is run, which no layer tells from another."""
        return Decision({"layers": {layer.path: {} for layer in layers}, "command": list(self.options.command)})

    def describe(self, decision: Decision) -> Description:
        """The command line."""
        said = [f"made by `{shlex.join(decision['command'])}`"]
        if not self.leaves_model:
            said.append("what it left was not loaded here, and nothing of it was measured")
        return Description(list[Column](), said)

    def external(self, source: Path, target: Path, decision: Mapping[str, Any]) -> None:
        """Run the program, and wait for it."""
        folders = {"{input}": str(source), "{output}": str(target)}
        command = []
        for argument in self.options.command:
            for place, folder in folders.items():
                argument = argument.replace(place, folder)  # noqa: PLW2901 (one after the other)
            command.append(argument)
        run(command, self.options.environment, self.options.timeout)
