"""Through which network interface the processes of a run reach each other.

Left alone, gloo listens at the address that the name of its host resolves to. On Debian and in containers that is often
a loopback address, at which no other host finds it.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import Store  # type: ignore[attr-defined]

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
LOOPBACK = "lo"
_SIOCGIFADDR = 0x8915  # of Linux: the IPv4 address of an interface


@contextmanager
def listening_on(name: str | None) -> Iterator[None]:
    """Let gloo and NCCL listen on this interface only, unless the user says otherwise; None leaves them the choice."""
    chosen = [variable for variable in VARIABLES if name is not None and variable not in os.environ]
    os.environ.update(dict.fromkeys(chosen, name or ""))
    try:
        yield
    finally:
        for variable in chosen:
            del os.environ[variable]


def loopback() -> str | None:
    """The loopback interface, if it has its usual name."""
    return LOOPBACK if LOOPBACK in {name for _, name in socket.if_nameindex()} else None


def interface_to(host: str, port: int, rank: int, size: int, store: Store | None) -> str | None:
    """The interface with the route to the host at which the processes meet; from that host, to one of the others.

    IPv4 on Linux; None elsewhere, and where no interface is found.

    Args:
        host: Name or address.
        port: There.
        rank: Of this process.
        size: How many processes there are; all of them have to call this.
        store: They all reach it; None if there is none.

    Raises:
        RuntimeError: Not all of them called this before the timeout of the store.
    """
    address = local_address(host, port)
    if store is not None:
        store.set(f"address/{rank}", address)
        if _is_local(address):  # the host itself, whose name may lead to a loopback address there
            others = (store.get(f"address/{other}").decode() for other in range(size))
            other = next((other for other in others if not _is_local(other)), "")
            address = local_address(other, port) if other else ""
    return None if _is_local(address) else _name_of(address)


def local_address(host: str, port: int) -> str:
    """The IPv4 address with which this host talks to another, "" if it cannot. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as talker:
        try:
            talker.connect((host, port))
        except OSError:
            return ""
        address: str = talker.getsockname()[0]
        return address


def _is_local(address: str) -> bool:
    return not address or ipaddress.ip_address(address).is_loopback


def _name_of(address: str) -> str | None:
    if sys.platform != "linux":
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                answer = fcntl.ioctl(asked, _SIOCGIFADDR, request)
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
