"""The package works with every Lightning that its requirements let in, and says so where nobody has tried."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from lightning_hetero.strategy._compat import TESTED, fabric_host, host

if TYPE_CHECKING:
    from collections.abc import Callable

BELOW = "2.3.3"  # the last release that the requirements do not let in
NO_INDEX = 3  # what `.ci/versions` exits with if pip finds no release of Lightning at all
HOSTS: dict[str, Callable[[str], Any]] = {
    "lightning.pytorch": host,
    "pytorch_lightning": host,
    "lightning.fabric": fabric_host,
    "lightning_fabric": fabric_host,
}


@pytest.fixture(scope="module")
def tried(pytestconfig: pytest.Config) -> subprocess.CompletedProcess[str]:
    """The script with the oldest release that was tested, and one below the floor; they share what takes long."""
    script = pytestconfig.rootpath / "tests" / "versions" / "matrix.py"
    versions = (TESTED[0], BELOW)  # `.ci/versions` tries all that were tested
    run = subprocess.run(
        [sys.executable, str(script), *versions], capture_output=True, text=True, timeout=560, check=False
    )
    if run.returncode == NO_INDEX:
        pytest.skip(
            f"pip reaches no index that has Lightning, so `.ci/versions {' '.join(versions)}` cannot install it"
        )
    return run


def rows(table: str) -> list[list[str]]:
    """The cells of a table's rows, without its head."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_oldest_lightning_imports_registers_fits_and_resumes(tried: subprocess.CompletedProcess[str]) -> None:
    assert rows(tried.stdout)[:2] == [
        [TESTED[0], "lightning.pytorch", *["ok"] * 6],
        [TESTED[0], "pytorch_lightning", *["ok"] * 6],
    ], tried.stdout + tried.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_pip_refuses_a_lightning_below_the_floor_and_the_script_says_so(
    tried: subprocess.CompletedProcess[str],
) -> None:
    assert rows(tried.stdout)[2:] == [
        [BELOW, "lightning.pytorch", *["-"] * 6],
        [BELOW, "pytorch_lightning", *["-"] * 6],
    ]
    assert re.search(r"lightning.hetero.*depends on.*lightning|ResolutionImpossible", tried.stdout), tried.stdout
    assert tried.returncode == 1


@pytest.mark.parametrize(("last", "code"), [({"fabric": "ok"}, 0), ({"fabric": "FAILED"}, 1), ({}, 1)], ids=str)
def test_the_script_ends_with_zero_if_every_step_of_every_release_is_ok(
    last: dict[str, str], code: int, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("matrix", pytestconfig.rootpath / "tests" / "versions" / "matrix.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "matrix", script)  # where dataclasses look for what annotations mean
    spec.loader.exec_module(script)
    results = {**dict.fromkeys(script.STEPS[:-1], "ok"), **last}

    def tried(lightning: str, *_: object) -> list[Any]:
        return [script.Row(lightning, name, results, "") for name in script.NAMESPACES]

    for name in ("built", "lent"):
        monkeypatch.setattr(script, name, lambda folder: folder)
    monkeypatch.setattr(script, "rows", tried)
    monkeypatch.setattr(script, "torch_version", lambda: "as it is")

    assert script.main([TESTED[0], TESTED[-1]]) == code


def test_the_check_fails_where_another_lightning_is_installed_than_it_was_told(pytestconfig: pytest.Config) -> None:
    check = pytestconfig.rootpath / "tests" / "versions" / "check.py"
    run = subprocess.run(
        [sys.executable, str(check), "lightning.pytorch", "1.2.3"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ,
    )

    assert run.returncode == 1
    assert run.stdout.startswith("import: FAILED\n")
    assert run.stdout.endswith(", not 1.2.3\n")


def test_the_requirement_lets_in_what_was_tested_and_neither_older_nor_compromised_releases(
    pytestconfig: pytest.Config,
) -> None:
    project = (pytestconfig.rootpath / "pyproject.toml").read_text(encoding="utf-8")
    (requirement,) = re.findall(r'^    "(lightning[<>=!].*)",', project, flags=re.MULTILINE)
    allowed = Requirement(requirement).specifier

    assert sorted(TESTED, key=Version) == list(TESTED)
    assert all(version in allowed for version in TESTED)
    assert [v for v in ("2.3.3", "2.6.2", "2.6.3") if v in allowed] == []
    assert "99.0" in allowed  # a ceiling would strand users


def test_the_page_has_a_row_for_each_tested_release(pytestconfig: pytest.Config) -> None:
    page = (pytestconfig.rootpath / "docs" / "versions.md").read_text(encoding="utf-8")
    good = {row[0] for row in rows(page) if row[2:] == ["ok"] * 6}

    assert good == {*TESTED}


@pytest.mark.parametrize("namespace", HOSTS)
def test_a_newer_minor_version_than_any_tested_one_is_warned_of(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module(namespace), "__version__", "2.99.1")

    with pytest.warns(UserWarning, match="is newer than") as caught:
        HOSTS[namespace](namespace).warn_if_untested()

    assert [str(warning.message) for warning in caught] == [
        f"{namespace} 2.99.1 is newer than {TESTED[-1]}, the newest Lightning that lightning_hetero was tested with. "
        f"It may well work. If it does not, go back: pip install '{namespace.split('.')[0].replace('_', '-')}<2.7'"
    ]


@pytest.mark.parametrize("version", [TESTED[0], "2.5.99", TESTED[-1], "2.6.99", "2.6.99.dev0"])
def test_a_newer_patch_is_not_warned_of(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("lightning.pytorch"), "__version__", version)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        host("lightning.pytorch").warn_if_untested()


def test_it_is_the_strategy_that_warns_and_not_the_import(monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning.fabric
    import lightning.pytorch

    from lightning_hetero import HeteroStrategy
    from lightning_hetero.strategy.lightning_fabric import FabricStrategy

    for package in (lightning.pytorch, lightning.fabric):
        monkeypatch.setattr(package, "__version__", "3.0.0")

    with pytest.warns(UserWarning, match=r"lightning\.pytorch 3\.0\.0 is newer than"):
        HeteroStrategy()
    with pytest.warns(UserWarning, match=r"lightning\.fabric 3\.0\.0 is newer than"):
        FabricStrategy()


def test_private_names_of_lightning_are_in_one_module(pytestconfig: pytest.Config) -> None:
    """Other modules of the face use the private names of `self`, and those of torch, only."""
    torchs = {"_metadata", "_cdata", "_forward_pre_hooks", "_version"}
    folder = pytestconfig.rootpath / "lightning_hetero" / "strategy"
    found = [
        f"{path.name}:{node.lineno}: {ast.unparse(node)}"
        for path in sorted(folder.rglob("*.py"))
        if path.name != "_compat.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and re.fullmatch(r"_[a-z]\w*", node.attr)
        and node.attr not in torchs
        and ast.unparse(node.value) not in ("self", "cls", "super()")
    ]

    assert found == [], "give it a function in _compat.py"
