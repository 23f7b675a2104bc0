"""Where `conf_dir` looks, and what it says when there is nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lightning_hetero import _conf
from lightning_hetero.errors import UsageError


def place_package(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Pretend that the package lies in `folder`."""
    package = folder / "lightning_hetero"
    package.mkdir()
    monkeypatch.setattr(_conf, "__file__", str(package / "_conf.py"))
    return package


def fill(conf: Path) -> Path:
    (conf / "placement").mkdir(parents=True)
    (conf / "placement" / "auto.yaml").touch()
    return conf


def test_the_packages_own_folder_comes_before_the_one_beside_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = place_package(monkeypatch, tmp_path)
    beside, inside = fill(tmp_path / "conf"), fill(package / "conf")

    assert _conf.conf_dir() == inside
    shutil.rmtree(inside)
    assert _conf.conf_dir() == beside


def test_somebody_elses_conf_beside_the_package_is_not_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place_package(monkeypatch, tmp_path)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "__init__.py").touch()

    with pytest.raises(UsageError) as caught:
        _conf.conf_dir()
    assert str(caught.value) == (
        "the configurations of lightning_hetero are missing: there is no placement/auto.yaml under "
        f"{tmp_path / 'lightning_hetero' / 'conf'} or {tmp_path / 'conf'}. The installation is incomplete; run "
        "`pip install --force-reinstall --no-deps lightning-hetero`, or check out the whole repository."
    )
