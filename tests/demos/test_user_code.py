"""The demos are ordinary user code: they know Lightning, and nothing of devices or of this package."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import lightning_hetero.demos

FILES = sorted(Path(lightning_hetero.demos.__file__).parent.glob("*.py"))


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return plain | {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_demo_imports_only_other_demos_of_this_package(path: Path) -> None:
    ours = {name for name in imported(path) if name.startswith("lightning_hetero")}
    assert all(name.startswith("lightning_hetero.demos.") for name in ours)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_demo_moves_nothing_and_names_no_device(path: Path) -> None:
    assert re.findall(r"\.to\(|\.cuda\(|\"cuda|\"cpu|torch\.device|HeteroStrategy", path.read_text()) == []
