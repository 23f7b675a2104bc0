"""The package as its users have it: built once, then installed in each of the three ways into a bare environment."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

WAYS = ("wheel", "editable", "checkout")


@dataclass(frozen=True)
class Distributions:
    """What `python -m build` made: the source archive, and the wheel made from that archive."""

    sdist: Path
    wheel: Path


@dataclass(frozen=True)
class Installation:
    """An environment with our package in it, installed in one of `WAYS`, and the running one's other packages."""

    way: str
    python: Path
    pythonpath: str

    def run(self, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run its Python, which knows nothing of the current directory or of this test run."""
        return subprocess.run(
            [str(self.python), *arguments],
            env={**_clean_environment(), "PYTHONPATH": self.pythonpath, **environment},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


@pytest.fixture(scope="session")
def distributions(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """Builds without isolation, so that no network is needed: hatchling comes with the extra `dev`."""
    folder = tmp_path_factory.mktemp("dist")
    _check_call("-m", "build", "--no-isolation", "--outdir", str(folder), str(pytestconfig.rootpath))
    (sdist,) = folder.glob("*.tar.gz")
    (wheel,) = folder.glob("*.whl")
    return Distributions(sdist, wheel)


@pytest.fixture(scope="session")
def other_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with links to all packages of the running environment, except any installation of our own."""
    folder = tmp_path_factory.mktemp("packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "lightning_hetero" not in entry.name:
            (folder / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())
    return folder


@pytest.fixture(scope="session", params=WAYS)
def installation(
    request: pytest.FixtureRequest,
    distributions: Distributions,
    other_packages: Path,
    pytestconfig: pytest.Config,
    tmp_path_factory: pytest.TempPathFactory,
) -> Installation:
    """Our package in a virtual environment of its own."""
    way: str = request.param
    folder = tmp_path_factory.mktemp(way)
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    scripts = Path(sysconfig.get_path("scripts", "venv", vars={"base": str(folder)}))
    python = scripts / Path(sys.executable).name
    packages = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(folder)}))
    (packages / "other_packages.pth").write_text(f"{other_packages}\n")

    root = str(pytestconfig.rootpath)
    install = ("-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index", "--ignore-installed")
    if way == "wheel":
        _check_call(*install, str(distributions.wheel))
    elif way == "editable":
        _check_call(*install, "--no-build-isolation", "--editable", root)
    return Installation(way, python, pythonpath=root if way == "checkout" else "")


def _clean_environment() -> dict[str, str]:
    ours = {"PYTHONPATH", "LIGHTNING_HETERO_AUTOREGISTER", "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    return {name: value for name, value in os.environ.items() if name not in ours}


def _check_call(*arguments: str) -> None:
    run = subprocess.run(
        [sys.executable, *arguments], env=_clean_environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, f"{' '.join(arguments)} failed:\n{run.stdout}{run.stderr}"
