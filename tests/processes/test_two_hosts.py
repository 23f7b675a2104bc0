"""Two hosts, as network namespaces with a cable of 100 Mbit/s between them. Needs root on Linux, with iproute2."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hosts
import launch
import pytest
import torch

pytestmark = pytest.mark.root

RATE_MBIT_PER_S = 100
ADDRESSES = ["10.77.0.1", "10.77.0.2"]
STEPS = 30


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def names_file(folder: Path, own: int) -> Path:
    """What /etc/hosts says on Debian: the host's own name is a loopback address, other hosts have theirs."""
    file = folder / f"hosts-{own}"
    lines = [f"{'127.0.1.1' if host == own else address} host{host}" for host, address in enumerate(ADDRESSES)]
    file.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
    return file


class Hosts:
    """Two of them, each with one process at most.

    Attributes:
        names: Of the network namespaces.
    """

    def __init__(self, names: list[str], folder: Path) -> None:
        self.names = names
        self.folder = folder
        self._processes: list[subprocess.Popen[str]] = []

    def connect(self) -> None:
        """Plug in the cable."""
        one, two = self.names
        ip("link", "add", "name", hosts.LINK, "netns", one, "type", "veth", "peer", "name", hosts.LINK, "netns", two)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", hosts.LINK)
            for device in ("lo", hosts.LINK):
                ip("-n", name, "link", "set", "dev", device, "up")
            shape = ["rate", f"{RATE_MBIT_PER_S}mbit", "burst", "32kbit", "latency", "400ms"]
            command = ["tc", "-n", name, "qdisc", "add", "dev", hosts.LINK, "root", "tbf", *shape]
            subprocess.run(command, check=True, capture_output=True)

    def disconnect(self) -> None:
        """Pull it out of the second host."""
        ip("-n", self.names[1], "link", "set", "dev", hosts.LINK, "down")

    def start(self, steps: int, meeting: str) -> list[subprocess.Popen[str]]:
        """Start the training, one process on each host, as `torchrun --nnodes=2 --nproc-per-node=1` does."""
        assert not {"GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME"} & os.environ.keys()
        for rank, name in enumerate(self.names):
            # `ip netns exec` gives the command mounts of its own, so the names are seen by it alone.
            named = f'mount --bind {names_file(self.folder, rank)} /etc/hosts && hostname host{rank} && exec "$@"'
            python = [sys.executable, hosts.__file__, str(steps), str(self.folder)]
            launcher = {**launch.environment(rank, 2, 29500), "GROUP_RANK": str(rank), "MASTER_ADDR": meeting}
            self._processes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", named, "sh", *python],
                    env={**os.environ, **launcher, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
            )
        return self._processes

    def steps(self, rank: int) -> int:
        """How many a process has done."""
        file = self.folder / f"steps-{rank}"
        return file.read_text().count("\n") if file.exists() else 0

    def remove(self) -> None:
        """Both, with the cable and the processes."""
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[Hosts]:
    """Connected to each other, and to nothing else."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("network namespaces need root on Linux")
    if missing := [tool for tool in ("ip", "tc", "unshare") if shutil.which(tool) is None]:
        pytest.skip(f"{' and '.join(missing)} not installed")
    two = Hosts([f"hetero-{os.getpid()}-{number}" for number in (0, 1)], tmp_path)
    try:
        made = subprocess.run(["ip", "netns", "add", two.names[0]], check=False, capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"network namespaces are not permitted here: {made.stderr.strip()}")
        ip("netns", "add", two.names[1])
        two.connect()
        yield two
    finally:
        two.remove()


def test_two_hosts_give_the_parameters_of_one_and_know_their_link(two_hosts: Hosts, tmp_path: Path) -> None:
    for ended in launch.wait(two_hosts.start(STEPS, meeting=ADDRESSES[0])):
        assert ended.code == 0, ended.text
    alone = hosts.train(STEPS)
    gradient_bytes = sum(value.nbytes for value in alone["state"].values())
    for rank in (0, 1):
        result: dict[str, Any] = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for key, value in alone["state"].items():
            torch.testing.assert_close(result["state"][key], value, rtol=0, atol=1e-12, msg=key)
        note = next(note for note in result["notes"] if note.startswith("One of 2 processes"))
        rate = re.search(r"over the slowest link, which does ([\d.]+) MB/s", note)
        assert rate is not None, note
        assert 5 < float(rate[1]) < 13, note  # the kernel lets 12.5 MB/s through
        # A sum over a ring of two: each sends half of the gradients, and then half of the sums.
        first, *_, last = result["sent_bytes"]
        assert (last - first) / (STEPS - 1) == pytest.approx(gradient_bytes, rel=0.2)


@pytest.mark.slow  # it waits for timeouts
def test_a_cut_cable_ends_both_processes(two_hosts: Hosts) -> None:
    processes = two_hosts.start(100_000, meeting="host0")  # a name, which on that host itself is a loopback address
    while min(two_hosts.steps(rank) for rank in (0, 1)) < 3:
        assert all(process.poll() is None for process in processes), launch.wait(processes)
        time.sleep(0.05)
    two_hosts.disconnect()
    for ended in launch.wait(processes, timeout_s=60):
        assert ended.code == 1, ended.text
        assert re.search(r"ProcessError: process \d of 2 got no answer", ended.text), ended.text
