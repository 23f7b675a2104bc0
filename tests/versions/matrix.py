"""Runs check.py beside this file with one Lightning after the other; `.ci/versions` says how to call it.

Each Lightning is installed by pip as a user would do it, together with a wheel of this package, into a new virtual
environment. What the running Python has installed already, torch above all, is lent to that environment, so that a row
takes seconds; pip replaces there what a Lightning does not accept.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHECK = Path(__file__).with_name("check.py")
NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
STEPS = ("import", "register", "fit", "resume", "evaluate", "fabric")
OURS = ("lightning_hetero", "hydra_plugins")
NO_INDEX = 3


class NoIndexError(Exception):
    """pip knows of no release at all."""


class PipError(Exception):
    """pip refused, or failed; its text says why."""


@dataclass(frozen=True)
class Row:
    """What came of one copy of one Lightning.

    Attributes:
        lightning: Its version.
        namespace: "lightning.pytorch" or "pytorch_lightning".
        results: "ok" or "FAILED" for each step that was reached.
        output: Of check.py, or of pip if that failed.
    """

    lightning: str
    namespace: str
    results: dict[str, str]
    output: str

    @property
    def is_good(self) -> bool:
        """Every step was reached and is ok."""
        return all(self.results.get(step) == "ok" for step in STEPS)

    def __str__(self) -> str:
        cells = [self.lightning, f"`{self.namespace}`", *(self.results.get(step, "-") for step in STEPS)]
        return f"| {' | '.join(cells)} |"


def rows(lightning: str, wheel: Path, packages: Path, folder: Path) -> Iterator[Row]:
    """Install one Lightning, in both of its distributions, and try it.

    Raises:
        NoIndexError: pip finds no release of Lightning at all.
    """
    try:
        python = environment(folder, packages)
        pip("install", str(wheel), f"lightning=={lightning}", f"pytorch-lightning=={lightning}", python=python)
    except PipError as error:
        yield from (Row(lightning, namespace, {}, str(error)) for namespace in NAMESPACES)
        return
    runs = [
        subprocess.Popen(
            [str(python), str(CHECK), namespace, lightning],
            env={**clean(), "OMP_NUM_THREADS": "1"},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for namespace in NAMESPACES
    ]
    for namespace, run in zip(NAMESPACES, runs, strict=True):
        output, _ = run.communicate()
        lines = (line.partition(": ") for line in output.splitlines())
        yield Row(lightning, namespace, {name: result for name, _, result in lines if name in STEPS}, output)


def environment(folder: Path, packages: Path) -> Path:
    """Make a virtual environment that also sees `packages`; return its Python."""
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    base = {"base": str(folder)}
    Path(sysconfig.get_path("purelib", "venv", vars=base), "lent.pth").write_text(f"{packages}\n")
    return Path(sysconfig.get_path("scripts", "venv", vars=base), Path(sys.executable).name)


def lent(folder: Path) -> Path:
    """A folder with links to the running Python's packages, without any installation of our own.

    pip never removes what lies outside of the environment that it installs into.
    """
    folder.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not any(name in entry.name for name in OURS):
            (folder / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())
    return folder


def built(folder: Path) -> Path:
    """Make a wheel of this checkout; without the network where hatchling is installed."""
    pip("wheel", "--no-deps", *["--no-build-isolation"] * bool(find_spec("hatchling")), "-w", str(folder), str(ROOT))
    (wheel,) = folder.glob("*.whl")
    return wheel


def pip(*arguments: str, python: Path | None = None) -> None:
    """Run pip, for another Python if one is given.

    Raises:
        NoIndexError: It finds no release at all of something.
        PipError: It failed otherwise.
    """
    other = () if python is None else ("--python", str(python))
    run = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *other, *arguments],
        env=clean(),
        capture_output=True,
        text=True,
        check=False,
    )
    if "(from versions: none)" in run.stderr:
        raise NoIndexError(run.stderr)
    if run.returncode != 0:
        raise PipError(run.stdout + run.stderr)


def clean() -> dict[str, str]:
    """The environment without what would let a program see more than what is installed, or less."""
    ours = ("PYTHONPATH", "LIGHTNING_HETERO_AUTOREGISTER", "TORCH_DEVICE_BACKEND_AUTOLOAD", "PL_TRAINER_STRATEGY")
    return {name: value for name, value in os.environ.items() if name not in ours}


def tested() -> tuple[str, ...]:
    """The releases that the package itself says it was tested with, oldest first."""
    sys.path.insert(0, str(ROOT))
    from lightning_hetero.strategy._compat import TESTED

    return TESTED


def main(arguments: Sequence[str]) -> int:
    """Try the releases; print a table, and what failed below it."""
    parser = argparse.ArgumentParser(prog=".ci/versions", description="Tries every Lightning that is supported.")
    parser.add_argument("versions", nargs="*", help="releases of Lightning; by default those of `_compat.TESTED`")
    parser.add_argument("--quick", action="store_true", help="the oldest and the newest only")
    chosen = parser.parse_args(arguments)
    versions = chosen.versions or tested()
    if chosen.quick:
        versions = (versions[0], versions[-1])

    print(f"Python {platform.python_version()} on {platform.system()}, torch {torch_version()}\n")
    print(f"| Lightning | namespace | {' | '.join(STEPS)} |\n|{'---|' * (2 + len(STEPS))}", flush=True)
    bad = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            wheel, packages = built(folder / "wheel"), lent(folder / "packages")
            for version in versions:
                for row in rows(version, wheel, packages, folder / version):
                    print(row, flush=True)
                    bad += [] if row.is_good else [row]
        except NoIndexError as error:
            print(f"pip reaches no index that has Lightning:\n{error}", file=sys.stderr)
            return NO_INDEX
    for row in bad:
        print(f"\n== Lightning {row.lightning}, {row.namespace}\n{row.output}")
    return int(bool(bad))


def torch_version() -> str:
    """That of the torch which is lent, if there is one."""
    run = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "from the index"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
