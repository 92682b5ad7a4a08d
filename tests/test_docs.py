"""The documentation: what it quotes is what is said, every page is found, and it builds without a warning."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from reference_pages import COMMAND, FIGURES, RECORD, reference

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def test_troubleshooting_quotes_real_messages() -> None:
    source = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("compressor", "plugins")
        for path in (ROOT / folder).rglob("*.py")
    )
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [one for bold in re.findall(r"^\*\*(`.*?)\*\*", text, re.M) for one in re.findall(r"`([^`]+)`", bold)]
    assert len(quoted) > 10
    assert [one for one in quoted if one not in source] == []


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = re.findall(r"^([\w./*-]+)$", (DOCS / "index.md").read_text(encoding="utf-8"), re.M)
    pages = {path.stem for path in DOCS.glob("*.md")} - {"index"}
    assert pages - set(listed) == set()
    assert {name for name in listed if "/" not in name} - pages == set()


def test_the_reference_is_that_of_the_sources() -> None:
    assert (DOCS / "reference.md").read_text(encoding="utf-8") == reference(), COMMAND
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "compressor").rglob("*.py"))
    assert [key for keys in RECORD.values() for key in keys if f'"{key}"' not in source] == []
    assert {path.split(".")[1] for path in FIGURES} - {*RECORD["evaluation"]} == set()


@pytest.mark.nightly
def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "-c", "docs", ".", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "docs" / "index.html").exists()


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads((DOCS / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert "cannot keep 9" in capsys.readouterr().out
    assert names["result"]._repr_html_()
    assert names["before"] != names["after"]
    assert list(tmp_path.iterdir()) == []
