"""The lines between the folders of the package, which no import may cross in the wrong direction."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

# A name never imports one to its right.
LAYERS = (
    "errors",
    "units",
    "devices",
    "graph",
    "profile",
    "schedule",
    "plan",
    "simulate",
    "placement",
    "runtime",
    "report",
    "export",
    "parallel",
    "strategy",
    "config",
    "cli",
)
# Pure arithmetic: no torch, no host, no clock, no files. Dicts and text go in and out.
PURE = ("schedule", "plan", "simulate", "placement", "graph/model.py")
IMPURE_PACKAGES = {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "hydra", "omegaconf", "time"}
FILE_CALLS = {"open", "read_text", "write_text", "read_bytes", "write_bytes"}
# Those that know Lightning or Hydra. The demonstrations are Lightning projects as a user would write them, and the
# helpers for tests have such a project to offer.
HOSTS = {"lightning", "pytorch_lightning", "lightning_fabric", "hydra", "omegaconf"}
KNOW_HOSTS = {"strategy", "config", "cli", "demos", "testing"}
# The runtime obeys a plan and never makes one.
RUNTIME_NEVER_ASKS = {"profile", "simulate", "placement"}
# Beside the layers: the face and its two helpers may name any layer; testing and demos are nobody's foundation.
BESIDE = {"__init__", "__main__", "_autoload", "_conf", "testing", "demos"}
NAMES_THAT_SAY_NOTHING = {"util", "utils", "utilities"}


def broken_rules(package: Path) -> Iterator[str]:
    """Say, one line each, what in the folder `package` breaks a rule."""
    for path in sorted(package.rglob("*.py")):
        where = path.relative_to(package)
        home = where.with_suffix("").parts[0]
        if home not in LAYERS and home not in BESIDE:
            yield f"{where}: {home} is no layer; give it a place in LAYERS"
        if NAMES_THAT_SAY_NOTHING & set(where.with_suffix("").parts):
            yield f"{where}: a name such as utils says nothing; name it for what it does"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, name in imported_names(tree, package.name, where):
            for complaint in broken_by_import(where, home, name, package.name):
                yield f"{where}:{line}: {complaint}"
        if is_pure(where):
            yield from (f"{where}:{line}: pure, but calls {call}" for line, call in file_calls(tree))


def broken_by_import(where: Path, home: str, name: str, package: str) -> Iterator[str]:
    root, _, rest = name.partition(".")
    target = rest.partition(".")[0]
    if is_pure(where) and root in IMPURE_PACKAGES:
        yield f"pure, but imports {root}"
    if root in HOSTS and home not in KNOW_HOSTS:
        yield f"{home} must not know {root}; only {', '.join(sorted(KNOW_HOSTS))} do"
    if root != package:
        return
    if home == "demos" and target != "demos":
        yield "demos are projects that never heard of us, and import nothing of ours"
    if target in {"testing", "demos"} and target != home:
        yield f"nobody imports {target}"
    if {home, target} <= {*LAYERS} and LAYERS.index(target) > LAYERS.index(home):
        yield f"{home} must not import {target}, which stands above it"
    if home == "runtime" and target in RUNTIME_NEVER_ASKS:
        yield f"runtime obeys a plan and never makes one, so it must not import {target}"


def is_pure(where: Path) -> bool:
    return where.parts[0] in PURE or where.with_suffix("").parts[0] in PURE or where.as_posix() in PURE


def imported_names(tree: ast.AST, package: str, where: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports, inside functions and under TYPE_CHECKING too."""
    folders = (package, *where.parts[:-1])
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folders[: len(folders) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and called(node) in {"import_module", "__import__"}:
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value


def file_calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and called(node) in FILE_CALLS:
            yield node.lineno, f"{called(node)}()"


def called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")


def test_the_package_keeps_its_own_rules(pytestconfig: pytest.Config) -> None:
    assert list(broken_rules(pytestconfig.rootpath / "lightning_hetero")) == []


@pytest.mark.parametrize(
    ("file", "code", "complaint"),
    [
        ("plan/x.py", "import lightning_hetero.runtime", ":1: plan must not import runtime, which stands above it"),
        ("plan/x.py", "from lightning_hetero import cli", ":1: plan must not import cli, which stands above it"),
        ("plan/x.py", "from ..placement import even", ":1: plan must not import placement, which stands above it"),
        ("units.py", "from .devices.spec import Link", ":1: units must not import devices, which stands above it"),
        (
            "devices/x.py",
            "def f():\n    from lightning_hetero.strategy import y",
            ":2: devices must not import strategy, which stands above it",
        ),
        (
            "graph/x.py",
            "import_module('lightning_hetero.plan')",
            ":1: graph must not import plan, which stands above it",
        ),
        ("schedule/x.py", "import torch.nn", ":1: pure, but imports torch"),
        ("placement/x.py", "from time import perf_counter", ":1: pure, but imports time"),
        ("graph/model.py", "import torch", ":1: pure, but imports torch"),
        ("simulate/x.py", "x = open('file')", ":1: pure, but calls open()"),
        ("plan/x.py", "Path('file').read_text()", ":1: pure, but calls read_text()"),
        (
            "runtime/x.py",
            "import lightning.pytorch",
            ":1: runtime must not know lightning; only cli, config, demos, strategy, testing do",
        ),
        (
            "export/x.py",
            "from hydra import compose",
            ":1: export must not know hydra; only cli, config, demos, strategy, testing do",
        ),
        (
            "runtime/x.py",
            "from lightning_hetero.simulate import simulate",
            ":1: runtime obeys a plan and never makes one, so it must not import simulate",
        ),
        ("cli.py", "from lightning_hetero.testing import x", ":1: nobody imports testing"),
        ("strategy/x.py", "from lightning_hetero.demos import x", ":1: nobody imports demos"),
        (
            "demos/x.py",
            "import lightning_hetero.units",
            ":1: demos are projects that never heard of us, and import nothing of ours",
        ),
        ("runtime/utils.py", "", ": a name such as utils says nothing; name it for what it does"),
        ("helpers/x.py", "", ": helpers is no layer; give it a place in LAYERS"),
    ],
)
def test_a_broken_rule_is_named_with_its_place(tmp_path: Path, file: str, code: str, complaint: str) -> None:
    path = tmp_path / "lightning_hetero" / file
    path.parent.mkdir(parents=True)
    path.write_text(code)

    assert list(broken_rules(tmp_path / "lightning_hetero")) == [file + complaint]


def test_imports_along_the_arrow_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "lightning_hetero" / "strategy" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text("import time, torch, lightning.pytorch\nfrom lightning_hetero.plan import Plan\nopen('file')\n")

    assert list(broken_rules(tmp_path / "lightning_hetero")) == []
