"""The documentation as pages: `sphinx-build -W -c docs . build/site` from the root, with `[docs]` installed.

Its source is the repository itself: the Markdown files stay where they belong, and read on GitHub as they do here.
"""

project = "moe-compressor"
author = "the authors of moe-compressor"
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/**.md",
    "plugins/*/README.md",
    "benchmarks/*.md",
]
myst_heading_anchors = 4
html_theme = "furo"
html_title = "moe-compressor"
html_copy_source = False
