"""Settings for all tests: one thread, no network, and nothing left behind."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

_MODULES = tempfile.TemporaryDirectory(prefix="hf-modules-")
os.environ["HF_MODULES_CACHE"] = _MODULES.name  # before transformers is imported: code that comes with models goes here
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny models run fastest so, and to the bit alike from run to run."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _tiny_models_removed() -> Iterator[None]:
    yield
    from tiny_models import remove_session_folder

    remove_session_folder()


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """Calibration sequences of unequal length."""
    from tiny_models import token_ids, write_token_file

    rows = [token_ids(length, seed=length).tolist() for length in (40, 33, 48, 21, 48, 40)]
    return write_token_file(tmp_path / "tokens.jsonl", rows)
