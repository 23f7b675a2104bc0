"""The C++ backend is compiled once per machine, however many processes want it and whatever happens to them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from lightning_hetero.testing import cpp_build

# The real machinery on a source that compiles in seconds; every other test of this folder needs the real source.
SOURCE = """
#include <pybind11/pybind11.h>
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) { m.def("answer", [] { return 42; }); }
"""
LOAD = """
import sys
from pathlib import Path
from lightning_hetero.testing import cpp_build
cpp_build.SOURCES = Path(sys.argv[1])
print(cpp_build.load().answer())
"""
OUTPUT = "42\n"


@dataclass
class Machine:
    """A machine with an empty cache, and a compiler that keeps a record of what it is asked to do."""

    folder: Path
    root: Path

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": str(self.root),
            "CXX": str(self.folder / "compiler"),
            cpp_build.CACHE_VARIABLE: str(self.folder / "cache"),
        }

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", LOAD, str(self.folder / "cpp")],
            env=self.environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def compilations(self) -> int:
        return sum(" -c " in line for line in (self.folder / "record").read_text().splitlines())

    def files(self) -> set[str]:
        (folder,) = (self.folder / "cache" / "emulated_accelerator").iterdir()
        return {path.name for path in folder.iterdir()}


@pytest.fixture
def machine(compiler: str, tmp_path: Path, pytestconfig: pytest.Config) -> Machine:
    recording = tmp_path / "compiler"
    recording.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/record\nexec {compiler} "$@"\n')
    recording.chmod(0o755)
    (tmp_path / "record").touch()
    (tmp_path / "cpp").mkdir()
    (tmp_path / "cpp" / "accelerator.cpp").write_text(SOURCE)
    return Machine(tmp_path, pytestconfig.rootpath)


@pytest.mark.slow
def test_two_processes_at_once_share_one_build_after_a_third_was_killed_in_its_own(machine: Machine) -> None:
    killed = machine.start()
    while not machine.compilations():
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert machine.compilations() == 1
    assert any(name.startswith("build-") for name in machine.files())  # what it left behind

    both = [machine.start() for _ in range(2)]
    assert [(process.communicate(), process.returncode) for process in both] == [((OUTPUT, ""), 0)] * 2
    assert machine.compilations() == 2
    assert machine.files() == {f"{cpp_build.MODULE}.so", "lock"}

    # From now on, no compiler is asked, nor missed.
    (machine.folder / "compiler").unlink()
    later = machine.start()
    assert (later.communicate(), later.returncode) == ((OUTPUT, ""), 0)
    assert machine.compilations() == 2


def test_the_cache_is_where_the_user_wants_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(cpp_build.CACHE_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    build = cpp_build.cache_folder().name
    assert cpp_build.cache_folder() == tmp_path / "home/.cache/lightning_hetero/emulated_accelerator" / build
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cpp_build.cache_folder() == tmp_path / "xdg/lightning_hetero/emulated_accelerator" / build
    monkeypatch.setenv(cpp_build.CACHE_VARIABLE, str(tmp_path / "chosen"))
    assert cpp_build.cache_folder() == tmp_path / "chosen/emulated_accelerator" / build
    assert not cpp_build.is_built()


def test_a_change_of_a_source_or_a_flag_or_torch_is_another_build(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    builds = {cpp_build.cache_folder()}
    sources = shutil.copytree(cpp_build.SOURCES, tmp_path / "cpp")
    (sources / "notes.txt").write_text("not a source")
    monkeypatch.setattr(cpp_build, "SOURCES", sources)
    builds.add(cpp_build.cache_folder())
    assert len(builds) == 1
    with (sources / "device.h").open("a") as file:
        file.write("// changed\n")
    builds.add(cpp_build.cache_folder())
    monkeypatch.setattr(cpp_build, "FLAGS", ["-O3"])
    builds.add(cpp_build.cache_folder())
    monkeypatch.setattr("torch.version.git_version", "another commit")
    builds.add(cpp_build.cache_folder())
    assert len(builds) == 4


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folders = {"include": tmp_path / "include", "scripts": tmp_path / "scripts"}
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folders[name]))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for folder in ("bin", "include", "scripts"):
        (tmp_path / folder).mkdir()

    monkeypatch.setenv("CXX", "ccache g++")
    assert cpp_build.what_is_missing() == (
        "a C++ compiler (there is no 'ccache g++' on the PATH; the variable CXX can name another)"
    )
    (tmp_path / "bin" / "ccache").touch(mode=0o755)
    assert cpp_build.what_is_missing() == "the headers of Python (Python.h; often in a package named python3-dev)"
    (tmp_path / "include" / "Python.h").touch()
    assert cpp_build.what_is_missing() == "ninja (`pip install ninja`)"
    (tmp_path / "scripts" / "ninja").touch(mode=0o755)
    assert cpp_build.what_is_missing() is None


def test_ninja_is_found_on_the_path_or_beside_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder in ("on_path", "scripts"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "ninja").touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing" / "python"))
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path / "scripts"))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert cpp_build.ninja_folder() == tmp_path / "scripts"
    monkeypatch.setenv("PATH", str(tmp_path / "on_path"))
    assert cpp_build.ninja_folder() == tmp_path / "on_path"


def test_a_damaged_build_says_what_to_delete(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(cpp_build.CACHE_VARIABLE, str(tmp_path))
    binary = cpp_build.cache_folder() / f"{cpp_build.MODULE}.so"
    binary.parent.mkdir(parents=True)
    binary.write_bytes(b"\x7fELF, and no more")
    with pytest.raises(cpp_build.BuildError) as caught:
        cpp_build.load()
    assert "emulated accelerator does not load: " in str(caught.value)
    assert f"Delete the folder {binary.parent}, and it is built again" in str(caught.value)


@pytest.mark.usefixtures("compiler")
def test_a_cache_that_cannot_be_written_says_how_to_choose_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(cpp_build.CACHE_VARIABLE, str(tmp_path / "file"))
    message = (
        r"cannot be kept in its cache: .*Not a directory.*Name another folder in the variable LIGHTNING_HETERO_CACHE"
    )
    with pytest.raises(cpp_build.BuildError, match=message):
        cpp_build.load()
