"""Starts a program in several processes, as a launcher does.

They are forked off a process that has imported torch and Lightning, which is what most of their time would go into. The
tests under torchrun (`benchmarks/elastic.py`) and over network namespaces begin with an interpreter of their own.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

TIMEOUT_S = 120.0
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["lightning.pytorch", "lightning_hetero.strategy.lightning_pytorch"])


class Process(Protocol):
    """What is asked of a process: a part of `subprocess.Popen`."""

    @property
    def pid(self) -> int:
        """Its number, which is that of its group too."""

    @property
    def returncode(self) -> int | None:
        """Exit code; None as long as it runs."""

    def communicate(self, *, timeout: float | None = None) -> tuple[str, str | None]:
        """Wait for its end; what it printed."""


@dataclass(frozen=True)
class Ended:
    """What became of a process: exit code and all that it printed."""

    code: int
    text: str


class Forked:
    """A program that runs in a forked process.

    Args:
        command: The program and its arguments.
        environment: Variables that it has besides those of this process.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        handle, name = tempfile.mkstemp()
        os.close(handle)
        self._printed = Path(name)
        variables = {**os.environ, **environment}
        self._process = _FORKS.Process(target=_run_program, args=([*command], variables, name))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def communicate(self, *, timeout: float | None = None) -> tuple[str, str | None]:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("forked process", timeout or 0.0)
        text = self._printed.read_text(errors="replace")
        self._printed.unlink()
        return text, None


def _run_program(command: list[str], environment: dict[str, str], output: str) -> None:
    """Do what `python COMMAND` does in a new session."""
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    code: int | str | None = 0
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun sets, without its agent's store."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        "OMP_NUM_THREADS": "1",
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def start(command: Sequence[str], size: int) -> list[Forked]:
    """Start a Python program in `size` processes."""
    port = free_port()
    return [Forked(command, environment(rank, size, port)) for rank in range(size)]


def wait(processes: Sequence[Process], timeout_s: float = TIMEOUT_S) -> list[Ended]:
    """Wait for all of them; those that do not end are killed, with code -9."""
    ended = []
    for process in processes:
        try:
            text, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text, _ = process.communicate()
        assert process.returncode is not None
        ended.append(Ended(process.returncode, text))
    return ended


def run(command: Sequence[str], size: int) -> list[Ended]:
    """Start and wait."""
    return wait(start(command, size))
