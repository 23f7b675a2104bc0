"""The documentation as a site: pip install '.[docs]' && sphinx-build -W docs site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

project = "lightning_hetero"
root_doc = "README"  # as a folder's page is called where these files are read without a site
extensions = ["myst_parser"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = "lightning_hetero"
exclude_patterns = ["images/*"]

FIRST = ["quickstart", "concepts", "devices", "placement", "micro_batches", "processes", "lightning", "hydra"]
PAGES = [*FIRST, *sorted({path.stem for path in Path(__file__).parent.glob("*.md")} - {*FIRST, root_doc})]


def add_contents(app: Any, name: str, source: list[str]) -> None:
    """The pages as a tree, which plain Markdown has no words for."""
    if name == root_doc:
        rows = "\n".join(PAGES)
        source[0] += f"\n```{{toctree}}\n:hidden:\n\n{rows}\n```\n"


def setup(app: Any) -> None:
    """What Sphinx calls."""
    app.connect("source-read", add_contents)
