"""What several processes on this machine need to find each other, as torchrun would tell them."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A port of the loopback interface that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """The variables of one of `size` processes, which meet at `port`; no launcher watches over them."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "benchmark",
        "OMP_NUM_THREADS": "1",
    }
