"""Starts a program in several processes, as a launcher does."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Ended:
    """What became of a process: exit code and all that it printed."""

    code: int
    text: str


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


def start(
    command: Sequence[str], size: int, more: Sequence[Mapping[str, str]] = (), cwd: Path | None = None
) -> list[subprocess.Popen[str]]:
    """Start a Python program in `size` processes, each with some environment variables of its own."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **environment(rank, size, port), **(more[rank] if more else {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=cwd,
            start_new_session=True,
        )
        for rank in range(size)
    ]


def wait(processes: Sequence[subprocess.Popen[str]], timeout_s: float = TIMEOUT_S) -> list[Ended]:
    """Wait for all of them; those that do not end are killed, with code -9."""
    ended = []
    for process in processes:
        try:
            text, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text, _ = process.communicate()
        ended.append(Ended(process.returncode, text))
    return ended


def run(
    command: Sequence[str], size: int, more: Sequence[Mapping[str, str]] = (), cwd: Path | None = None
) -> list[Ended]:
    """Start and wait."""
    return wait(start(command, size, more, cwd))
