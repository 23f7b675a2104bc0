"""The page docs/compatibility.md says what the tests say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def table() -> ModuleType:
    """The programme that writes the page."""
    import sys

    spec = importlib.util.spec_from_file_location("conformance_table", Path(__file__).with_name("table.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    del sys.modules[spec.name]
    return module


def one(table: ModuleType, folder: Path, *lines: str) -> str:
    (folder / "test_it.py").write_text("\n".join(lines) + "\ndef test_it(): ...\n")
    return str(table.page(table.marks(folder)))


def test_the_page_is_what_the_marks_say(table: ModuleType) -> None:
    written = table.PAGE.read_text(encoding="utf-8")
    assert written == table.page(table.marks()), "run `python tests/conformance/table.py`"


def test_every_conformance_test_has_a_row(table: ModuleType) -> None:
    assert [name for name in table.unmarked() if not name.startswith("test_table.py")] == []


def test_a_mark_becomes_a_row(table: ModuleType, tmp_path: Path) -> None:
    text = one(
        table,
        tmp_path,
        "@pytest.mark.feature('optimizers: LBFGS', 'refused', note='Use one device.')",
        "@pytest.mark.parametrize('x', [pytest.param(1, marks=pytest.mark.feature('loops: fit'))])",
    )
    assert "| LBFGS | refused | Use one device | [it](" in text
    assert "| fit | works |  | [it](" in text
    assert text.index("## Loops") < text.index("## Optimizers")


def test_a_test_without_a_mark_is_found(table: ModuleType, tmp_path: Path) -> None:
    one(table, tmp_path, "@pytest.mark.slow")
    assert table.unmarked(tmp_path) == ["test_it.py::test_it"]
    one(table, tmp_path, "feature = pytest.mark.feature('loops: fit')", "@feature")
    assert table.unmarked(tmp_path) == []


@pytest.mark.parametrize(
    ("mark", "says"),
    [
        ("name", "arguments of a feature mark are literals"),
        ("'LBFGS'", "'LBFGS' is not 'group: feature'"),
        ("'cooking: eggs'", "'cooking: eggs' is not 'group: feature'"),
        ("'loops: fit', status='fine'", "'fine' is none of"),
    ],
)
def test_a_mark_that_cannot_become_a_row(mark: str, says: str, table: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(table.TableError, match=says):
        one(table, tmp_path, f"@pytest.mark.feature({mark})")


def test_tests_that_contradict_each_other(table: ModuleType, tmp_path: Path) -> None:
    lines = "@pytest.mark.feature('loops: fit')", "@pytest.mark.feature('loops: fit', 'refused')"
    with pytest.raises(table.TableError, match="'loops: fit' is refused and works"):
        one(table, tmp_path, *lines)
