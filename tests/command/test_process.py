"""The program itself: what it is given, how it fails, and that nothing of it is left."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import compressor_command.process
from compressor import ProgramError
from compressor.plugin import Decision, OptionError
from compressor_command import Command, CommandOptions


def sh(script: str, **options: Any) -> Command:
    """What is in the script as $1 and $2 are the two folders."""
    return Command(CommandOptions(command=("sh", "-c", script, "sh", "{input}", "{output}/"), **options))


def run(method: Command, folder: Path) -> Path:
    target = folder / "target"
    target.mkdir()
    method.external(folder / "source", target, Decision({"layers": {}}))
    return target


def has_ended(process: str) -> bool:
    """Killed is not ended yet; one that nobody waits for stays as a zombie."""
    try:
        found = psutil.Process(int(process))
        for _ in range(200):
            if found.status() == psutil.STATUS_ZOMBIE:
                return True
            time.sleep(0.05)
    except psutil.NoSuchProcess:
        return True
    return False


def test_what_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both folders, its variables and ours, nothing to read, and no shell between."""
    monkeypatch.setenv("OURS", "ours")
    monkeypatch.setenv("OTHER", "ours")
    script = 'cat > "$2/in"; printf "%s|" "$0" "$1" "$2" "$OURS" "$OTHER" "$3" > "$2/said"'
    command = ("sh", "-c", script, "sh", "{input}", "{output}", "$(touch {output}/evil); *")
    target = run(Command(CommandOptions(command=command, environment={"OTHER": "its own"})), tmp_path)
    folders = (str(tmp_path / "source"), str(target))
    said = ["sh", *folders, "ours", "its own", f"$(touch {target}/evil); *", ""]
    assert (target / "said").read_text().split("|") == said
    assert (target / "in").read_bytes() == b""
    assert sorted(path.name for path in target.iterdir()) == ["in", "said"]


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo first >&2; echo the reason >&2; exit 3", "sh ended with status 3. It said last:\nfirst\nthe reason"),
        (
            r"printf '\033[31;1mred\033[0m\r\n10 %%\r100 %%\n' >&2; exit 1",
            "sh ended with status 1. It said last:\nred\n100 %",
        ),
        ("echo not an error; exit 1", "sh ended with status 1. It said nothing."),
        ("kill -9 $$", "sh was ended by SIGKILL. It said nothing."),
    ],
)
def test_it_fails(script: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ProgramError) as error:
        run(sh(script), tmp_path)
    assert str(error.value) == says


def test_only_the_end_of_much_is_shown(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match=r"the last line$") as error:
        run(sh("seq 100000 >&2; echo the last line >&2; exit 1"), tmp_path)
    assert len(str(error.value)) < 2200


@pytest.mark.parametrize("stubborn", [False, True])
def test_one_that_hangs_is_stopped(stubborn: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what it has begun, also where it does not care for being asked to end."""
    monkeypatch.setattr(compressor_command.process, "_GRACE", 0.5)
    trap = 'trap "" TERM; ' if stubborn else ""
    script = f'{trap}sleep 600 & echo $! > "$2/child"; echo waiting >&2; wait; sleep 600'
    with pytest.raises(ProgramError) as error:
        run(sh(script, timeout=3), tmp_path)
    says = r"sh was stopped: it took more than 3 seconds \(`timeout`\)\. It said last:\nwaiting(\n.*)?"
    assert re.fullmatch(says, str(error.value))
    assert has_ended((tmp_path / "target" / "child").read_text())


def test_nothing_goes_on_behind_it(tmp_path: Path) -> None:
    target = run(sh('sleep 600 & echo $! > "$2/child"'), tmp_path)
    assert has_ended((target / "child").read_text())


def test_one_that_cannot_be_run(tmp_path: Path) -> None:
    (tmp_path / "no-program").write_text("")
    (tmp_path / "no-program").chmod(0o755)
    with pytest.raises(ProgramError, match="cannot be run: Exec format error"):
        run(Command(CommandOptions(command=(str(tmp_path / "no-program"),))), tmp_path)


@pytest.mark.parametrize(
    ("options", "option", "says"),
    [
        ({"command": ("cp", "{input}")}, "command", "no argument has {output} in it, so cp would not know that folder"),
        ({"command": ("{input}", "{output}")}, "command", "no argument has {input} in it, so {input} would not know"),
        (
            {"command": ("no-such-program", "{input}", "{output}")},
            "command",
            "there is no program 'no-such-program' here that can be run",
        ),
        (
            {"command": ("cp", "{input}", "{output}"), "verify": "files", "max_kl": 1},
            "max_kl",
            "would have no effect with `verify: files`",
        ),
    ],
)
def test_what_check_refuses(options: Any, option: str, says: str) -> None:
    with pytest.raises(OptionError) as error:
        Command(CommandOptions(**options)).check([])
    assert error.value.option == option
    assert says in str(error.value)


def test_what_check_says() -> None:
    command = ("cp", "-r", "{input}", "{output}/a b")
    [note] = Command(CommandOptions(command=command)).check([]).notes
    assert note == "cp -r '{input}' '{output}/a b' is run, with all that this account may do"
