"""Writes docs/compatibility.md from the `feature` marks of the tests: `python tests/conformance/table.py`.

The marks are read from the source of the tests, without importing them, so their arguments have to be literals.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "compatibility.md"

# The groups of features, in the order of the page.
GROUPS = (
    "loops",
    "modules",
    "data",
    "precision",
    "optimizers",
    "callbacks",
    "tuner",
    "profilers",
    "loggers",
    "compile",
    "checkpoints",
    "processes",
    "Fabric",
    "programs",
    "asked for",
    "guards",
    "devices",
)
STATUSES = ("works", "refused", "not verified")

# What no test of this project has seen. A row goes away when a test with its mark comes.
UNSEEN = (
    ("devices: Apple's GPUs (MPS)", "no such machine ran the tests"),
    ("devices: Intel's GPUs (XPU) and NPUs", "no such machine ran the tests"),
    ("devices: TPUs", "no such machine ran the tests"),
    ("devices: Windows and macOS", "the tests ran on Linux"),
    ("precision: transformer-engine, bitsandbytes on several CUDA devices", "needs such devices and their packages"),
)

HEAD = """\
# What works, feature by feature

Every row with a link has tests, which decide what it says. Most of them train twice: by plain Lightning on one device,
and by `HeteroStrategy` over three, under a policy that puts every layer on another device than the one before. Numbers
are compared in float64, within 1e-12.

- **works**: as in plain Lightning.
- **refused**: an error before training says why, and what to do instead.
- **not verified**: nothing that this project was tested on has what it needs.

`python tests/conformance/table.py` writes this page from the marks of the tests; a test keeps the two equal.
"""


class TableError(Exception):
    """A mark that cannot become a row."""


@dataclass(frozen=True)
class Mark:
    """One `pytest.mark.feature(...)`.

    Attributes:
        name: "group: feature".
        status: One of `STATUSES`.
        note: For the page.
        where: The test file, relative to the repository.
    """

    name: str
    status: str
    note: str
    where: str

    @property
    def group(self) -> str:
        """What stands before the colon."""
        return self.name.partition(": ")[0]

    @property
    def feature(self) -> str:
        """What stands after the colon."""
        return self.name.partition(": ")[2]


def marks(folder: Path = ROOT / "tests") -> list[Mark]:
    """The marks of all tests below a folder.

    Raises:
        TableError: A mark has arguments that are no literals, or an unknown group or status.
    """
    return [
        _mark(call, path)
        for path in sorted(folder.rglob("test_*.py"))
        for call in _calls(ast.parse(path.read_text(encoding="utf-8")))
    ]


def unmarked(folder: Path = ROOT / "tests" / "conformance") -> list[str]:
    """The tests of a folder without a mark: on the function, on a case, or in a variable that a decorator names."""
    return [
        f"{path.name}::{name}"
        for path in sorted(folder.rglob("test_*.py"))
        for name in _unmarked(ast.parse(path.read_text(encoding="utf-8")))
    ]


def _unmarked(module: ast.Module) -> Iterator[str]:
    assigned = [node for node in module.body if isinstance(node, ast.Assign) and any(_calls(node.value))]
    variables = {ast.unparse(target) for node in assigned for target in node.targets}
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            decorators = [part for decorator in node.decorator_list for part in ast.walk(decorator)]
            names = {part.id for part in decorators if isinstance(part, ast.Name)}
            if not names & variables and not any(map(_is_feature, decorators)):
                yield node.name


def page(found: Iterable[Mark]) -> str:
    """The page.

    Raises:
        TableError: Two marks of one name differ in status, or a row of `UNSEEN` has a test.
    """
    rows: dict[str, list[Mark]] = {}
    for mark in [*found, *(Mark(name, "not verified", note, "") for name, note in UNSEEN)]:
        rows.setdefault(mark.name, []).append(mark)
    return "\n".join([HEAD, *_tables(rows)])


def _tables(rows: dict[str, list[Mark]]) -> Iterator[str]:
    for group in GROUPS:
        lines = [_row(same) for same in rows.values() if same[0].group == group]
        if lines:
            yield f"## {group[0].upper()}{group[1:]}\n\n| feature | status | note | tests |\n|---|---|---|---|"
            yield "\n".join(sorted(lines, key=str.casefold)) + "\n"


def _row(same: list[Mark]) -> str:
    if len({mark.status for mark in same}) > 1:
        raise TableError(f"{same[0].name!r} is {' and '.join(sorted({mark.status for mark in same}))}")
    notes = "; ".join(dict.fromkeys(mark.note.rstrip(".") for mark in same if mark.note))
    files = dict.fromkeys(mark.where for mark in same if mark.where)
    links = ", ".join(f"[{Path(where).stem.removeprefix('test_')}](../{where})" for where in files)
    return f"| {same[0].feature} | {same[0].status} | {notes} | {links} |"


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _is_feature(node):
            yield node


def _is_feature(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.feature"


def _mark(call: ast.Call, path: Path) -> Mark:
    where = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.as_posix()
    try:
        values = [ast.literal_eval(argument) for argument in call.args]
        named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except ValueError as error:
        raise TableError(f"{where}:{call.lineno}: arguments of a feature mark are literals") from error
    arguments = {"status": "works", "note": "", **dict(zip(("name", "status", "note"), values, strict=False)), **named}
    mark = Mark(where=where, **arguments)
    if mark.group not in GROUPS or not mark.feature:
        raise TableError(f"{where}:{call.lineno}: {mark.name!r} is not 'group: feature' with one of {GROUPS}")
    if mark.status not in STATUSES:
        raise TableError(f"{where}:{call.lineno}: {mark.status!r} is none of {STATUSES}")
    return mark


if __name__ == "__main__":
    PAGE.write_text(page(marks()), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)} written")
