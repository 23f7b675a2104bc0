"""Compiles the C++ backend once per machine, and loads it from the user's cache after that.

The cache is keyed by everything that the binary depends on: the sources, torch, and Python's ABI. A build
happens in a folder of its own and is renamed into place when it is whole, under a file lock that the
operating system drops when its holder dies. So neither two processes at once nor a killed one can leave a
half-built backend behind.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

from lightning_hetero.errors import UsageError

CACHE_VARIABLE = "LIGHTNING_HETERO_CACHE_DIR"
MODULE = "lightning_hetero_emulated_accelerator"
SOURCES = Path(__file__).parent / "cpp"
FLAGS = ["-O1", "-g0"]
ADVICE = "take the backend that needs no compiler: install_accelerator('python')."

# Run in a Python of its own: torch loads what it has built, and this process must load the finished file only.
_BUILD = """
import sys
from torch.utils.cpp_extension import load
name, source, folder, *flags = sys.argv[1:]
load(name, [source], extra_cflags=flags, build_directory=folder)
"""


class BuildError(UsageError):
    """The C++ backend can be neither loaded nor built on this machine."""


def cache_folder() -> Path:
    """Where the build for this torch, this Python and these sources is kept.

    It is below $LIGHTNING_HETERO_CACHE_DIR, else $XDG_CACHE_HOME/lightning_hetero, else
    ~/.cache/lightning_hetero.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    user = os.environ.get("XDG_CACHE_HOME")
    root = Path(chosen) if chosen else (Path(user) if user else Path.home() / ".cache") / "lightning_hetero"
    return root.absolute() / "emulated_accelerator" / _key()


def is_built() -> bool:
    """Whether the backend is in the cache, so that loading it needs no compiler."""
    return _binary().exists()


def what_is_missing() -> str | None:
    """What a build needs and this machine lacks, in words for people; None if nothing is missing."""
    if os.name != "posix":
        return "a POSIX system"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(shlex.split(compiler)[0]) is None:
        return f"a C++ compiler (there is no {compiler!r} on the PATH; the variable CXX can name another)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "the headers of Python (Python.h; often in a package named python3-dev)"
    if ninja_folder() is None:
        return "ninja (`pip install ninja`)"
    return None


def ninja_folder() -> Path | None:
    """The folder of the ninja executable: on the PATH, else beside Python or among its scripts."""
    beside_python = os.pathsep.join([str(Path(sys.executable).parent), sysconfig.get_path("scripts")])
    found = shutil.which("ninja") or shutil.which("ninja", path=beside_python)
    return Path(found).absolute().parent if found else None


def load() -> ModuleType:
    """The compiled backend, built first if the cache has none.

    Raises:
        BuildError: It must be built, and the compiler or something else is missing, or the cache cannot be
            written, or it does not compile; or what lies in the cache is damaged.
    """
    binary = _binary()
    if not binary.exists():
        _check_nothing_is_missing()
        try:
            binary.parent.mkdir(parents=True, exist_ok=True)
            with _lock(binary.parent / "lock"):
                if not binary.exists():  # another process may have built it while this one waited
                    _build(binary)
        except OSError as error:
            raise BuildError(
                f"the C++ backend of the emulated accelerator cannot be kept in its cache: {error}. Name another "
                f"folder in the variable {CACHE_VARIABLE}, or {ADVICE}"
            ) from error
    return _import(binary)


def _binary() -> Path:
    return cache_folder() / f"{MODULE}.so"


def _key() -> str:
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    abi = (torch.version.git_version, sysconfig.get_config_var("SOABI"), sysconfig.get_platform(), FLAGS)
    digest.update(repr(abi).encode())
    return f"torch-{torch.__version__}-{sys.implementation.cache_tag}-{digest.hexdigest()[:16]}"


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file gives the lock back


def _check_nothing_is_missing() -> None:
    missing = what_is_missing()
    if missing is not None:
        raise BuildError(
            f"the C++ backend of the emulated accelerator must be compiled, and this machine lacks {missing}. "
            f"Install it, or {ADVICE}"
        )


def _build(binary: Path) -> None:
    for leftover in binary.parent.glob("build-*"):  # of a build that was killed: nobody else holds the lock
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=binary.parent) as folder:
        _compile(Path(folder))
        Path(folder, binary.name).replace(binary)


def _compile(folder: Path) -> None:
    path = os.pathsep.join([*os.environ.get("PATH", "").split(os.pathsep), str(ninja_folder())])
    run = subprocess.run(
        [sys.executable, "-c", _BUILD, MODULE, str(SOURCES / "accelerator.cpp"), str(folder), *FLAGS],
        env={**os.environ, "PATH": path, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if run.returncode != 0:
        raise BuildError(
            f"the C++ backend of the emulated accelerator does not compile with torch {torch.__version__}. Install "
            f"a compiler that works and name it in the variable CXX, or {ADVICE} This is what was said:\n"
            f"{run.stdout[-4000:]}"
        )


def _import(binary: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(MODULE, binary)
    assert spec is not None  # the name ends in .so
    assert spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise BuildError(
            f"the C++ backend of the emulated accelerator does not load: {error}. Delete the folder {binary.parent}, "
            f"and it is built again, or {ADVICE}"
        ) from error
    return module
