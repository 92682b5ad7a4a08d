"""Runs of passes that change weights: the recipe, what is compared, and a run that is interrupted and goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_folder

import compressor


def recipe(tokens: Path, *passes: dict[str, Any], model: Path | None = None, **others: Any) -> dict[str, Any]:
    data = [{"tokens": str(tokens), "samples": 24}]
    model = model or tiny_folder("mixtral")
    return {"model": str(model), "calibration": {"batch_size": 8, "data": data}, "passes": list(passes), **others}


def files(folder: Path) -> dict[str, bytes]:
    names = ("model.safetensors", "config.json", "compressor/decision.json", "compressor/decision.safetensors")
    return {name: (folder / name).read_bytes() for name in names}


def stopped_and_whole(
    recipe: dict[str, Any],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    kept_by: tuple[type, str],
    is_last: Callable[[str], bool],
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The files of a run that is interrupted and goes on, and of one that is not. `kept_by` is the class and method by
    which a run keeps what is done; it is interrupted when the method has been called with a name that `is_last`.
    """
    compressor.compress(recipe, output=folder / "whole")
    owner, method = kept_by
    keep = getattr(owner, method)

    def stop(self: Any, name: str, value: Any) -> None:
        keep(self, name, value)
        if is_last(name):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, stop)
        with pytest.raises(KeyboardInterrupt):
            compressor.compress(recipe, output=folder / "out")
    compressor.compress(recipe, output=folder / "out", resume=True)
    return files(folder / "out"), files(folder / "whole")
