"""The documentation builds as a site without a warning, and quotes messages that exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", "tree", str(DOCS), "site"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)

    assert built.returncode == 0, built.stderr
    pages = {path.stem for path in (tmp_path / "site").glob("*.html")}
    assert pages >= {path.stem for path in DOCS.glob("*.md")}


def texts_of_the_package() -> list[str]:
    """Every text in the code, with {} for what is filled in."""
    found = []
    for path in (ROOT / "lightning_hetero").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_messages_that_troubleshooting_explains_exist() -> None:
    lines = (DOCS / "troubleshooting.md").read_text().splitlines()
    quoted = [text for line in lines if line.startswith("### ") for text in re.findall("`([^`]+)`", line)]
    texts = texts_of_the_package()

    assert len(quoted) > 10
    assert [text for text in quoted if not any(text in each for each in texts)] == []


@pytest.mark.parametrize("page", sorted([*DOCS.glob("*.md"), ROOT / "README.md"]), ids=lambda path: path.stem)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())

    assert [link for link in links if not (page.parent / link).exists()] == []
