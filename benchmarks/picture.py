"""Draw the verdict and the figures that a run prints at its end, as the README shows them.

python benchmarks/picture.py runs/quickstart/compressor/record.json docs/quickstart.svg
"""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from compressor.report.figures import summary_tables
from compressor.report.verdict import verdict

source, picture = map(Path, sys.argv[1:])
record = json.loads(source.read_text(encoding="utf-8"))
console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True)
console.print(Text(verdict(record), style="bold"))
for table in summary_tables(record):
    table.show(console)
drawn = console.export_svg(title="compressor run recipes/quickstart.yaml")
no_network = re.sub(r"@font-face \{.*?\}\n", "", drawn, flags=re.DOTALL)
picture.write_text(no_network, encoding="utf-8")
