"""What needs no model does not wait for torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from compressor.cli import _exit_status
statuses = [_exit_status(command.split()) for command in sys.argv[1:]]
heavy = [name for name in ("torch", "transformers", "lm_eval", "datasets", "huggingface_hub") if name in sys.modules]
print(statuses, heavy)
"""


def test_methods_wrong_usage_and_mistakes_in_recipes_import_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: demo\npasses: [{expert_pruning: {keep: no}}]\n")
    commands = ["--help", "--version", "methods", "nothing", "run r.yaml", "check r.yaml --memory 1XB", "run none.yaml"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *commands], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 2, 2, 2, 2] []", done.stderr
