"""Any other program as a pass: it turns the checkpoint into another one."""

from __future__ import annotations

from compressor.plugin import hookimpl
from compressor_command.method import Command, CommandOptions

__all__ = ["Command", "CommandOptions"]


@hookimpl
def compressor_methods() -> list[type[Command]]:
    """The one method of this plugin."""
    return [Command]
