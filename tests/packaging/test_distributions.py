"""What is inside the files that would be uploaded."""

from __future__ import annotations

import tarfile
import zipfile
from email import message_from_string
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import lightning_hetero

if TYPE_CHECKING:
    from typing import Protocol

    class Distributions(Protocol):
        sdist: Path
        wheel: Path


DIST_INFO = f"lightning_hetero-{lightning_hetero.__version__}.dist-info"


def read(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name).decode()


def test_the_wheel_holds_the_code_the_configurations_the_plugin_and_the_licence(distributions: Distributions) -> None:
    names = set(zipfile.ZipFile(distributions.wheel).namelist())

    assert {
        "lightning_hetero/__init__.py",
        "lightning_hetero/_autoload.py",
        "lightning_hetero/py.typed",
        "lightning_hetero/conf/placement/auto.yaml",
        "hydra_plugins/lightning_hetero_searchpath/__init__.py",
        "hydra_plugins/lightning_hetero_searchpath/conf/hetero/auto.yaml",
        f"{DIST_INFO}/entry_points.txt",
        f"{DIST_INFO}/licenses/LICENSE",
    } <= names


def test_the_wheel_holds_every_configuration_of_the_repository(
    distributions: Distributions, pytestconfig: pytest.Config
) -> None:
    conf = pytestconfig.rootpath / "conf"
    ours = {f"lightning_hetero/conf/{path.relative_to(conf).as_posix()}" for path in conf.rglob("*.yaml")}

    assert ours
    assert ours <= set(zipfile.ZipFile(distributions.wheel).namelist())


def test_the_wheel_leaves_the_namespace_of_hydra_plugins_to_all_and_brings_no_tests(
    distributions: Distributions,
) -> None:
    names = zipfile.ZipFile(distributions.wheel).namelist()

    assert "hydra_plugins/__init__.py" not in names
    assert {name.partition("/")[0] for name in names} == {"lightning_hetero", "hydra_plugins", DIST_INFO}


def test_the_entry_points_name_the_hook_and_the_command(distributions: Distributions) -> None:
    text = read(distributions.wheel, f"{DIST_INFO}/entry_points.txt")

    assert "[torch.backends]\nlightning_hetero = lightning_hetero._autoload:autoload" in text
    assert "[console_scripts]\nlightning-hetero = lightning_hetero.cli:main" in text


def test_the_metadata_state_licence_version_and_readme(distributions: Distributions) -> None:
    metadata = message_from_string(read(distributions.wheel, f"{DIST_INFO}/METADATA"))

    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Version"] == lightning_hetero.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert str(metadata.get_payload()).strip()


def test_the_licence_is_the_whole_apache_licence(distributions: Distributions) -> None:
    text = read(distributions.wheel, f"{DIST_INFO}/licenses/LICENSE")

    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_source_archive_can_be_tested_by_who_unpacks_it(distributions: Distributions) -> None:
    with tarfile.open(distributions.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}

    assert {
        "pyproject.toml",
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "constraints.txt",
        "conf/placement/auto.yaml",
        "tests/conftest.py",
        ".ci/run",
    } <= names
