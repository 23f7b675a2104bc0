"""The processes of a run: how they find each other, and what they say together.

What they say goes through host memory and gloo, which joins processes whose devices have nothing in common, and notices
soon when one of them is gone. Gradients may go from device to device where all devices are of one type.
"""

from __future__ import annotations

import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from lightning_hetero.errors import ProcessError, UsageError
from lightning_hetero.runtime.processes.interface import interface_to, listening_on, loopback

log = logging.getLogger(__name__)

LEAVING_S = 5.0
"""How long a process that failed waits for its connections to close."""
NAMING_S = 2.0
"""How long those that are left wait for each other to find out who is gone."""
PROBE_BYTES = 2**20
"""Size of the sum by which the link between processes is measured."""
Answer = TypeVar("Answer")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_stores: dict[tuple[str, int, str], Store] = {}  # open as long as this process: peers may be late at its end
_opened: dict[tuple[str, int, str], int] = {}  # how often, by store


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where the processes of a run meet, and which one this is.

    Attributes:
        rank: Of this process, from 0.
        size: How many processes there are.
        host: Name or address of the host at which they meet.
        port: There.
        one_host: Whether all of them run on one host, so that nothing has to be reachable from outside.
        agent: Whether a launcher (torchrun) listens at that port; else process 0 does.
        attempt: How often the launcher started them anew.
    """

    rank: int
    size: int
    host: str
    port: int
    one_host: bool = False
    agent: bool = False
    attempt: str = "0"


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """What sums over the processes cost.

    Attributes:
        latency_s: Of the smallest one.
        bytes_per_s: Over the slowest link.
    """

    latency_s: float
    bytes_per_s: float

    def seconds(self, size_bytes: float, processes: int) -> float:
        """Of a sum over a ring: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters", 2009."""
        return self.latency_s + 2 * (processes - 1) / processes * size_bytes / self.bytes_per_s


class Group:
    """The processes of a run, as an `Exchange` of plain data and of tensors. Open it with `Group.open`.

    Attributes:
        gradients: A group of torch for sums of gradients.
        statistics: Another one for what modules exchange inside of forward and backward.
        control: And one for what they agree on before each step.
        waited_s: Seconds that this process has spent in exchanges, waiting for others included.
    """

    def __init__(self, address: Address, timeout_s: float, store: Store | None) -> None:
        self._address = address
        self._timeout = timedelta(seconds=timeout_s)
        self._store = store
        self._excepthook: Any = None
        self._interface: str | None = None
        self._subgroups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self._device_groups: list[Any] = []
        self.waited_s = 0.0
        self.gradients: dist.ProcessGroup | None = None
        self.statistics: dist.ProcessGroup | None = None
        self.control: dist.ProcessGroup | None = None

    @classmethod
    def open(cls, address: Address, timeout_s: float) -> Group:
        """Wait for all processes, and connect them; all of them have to call this.

        A group of torch that is open already is used as it is, and left open.

        Args:
            address: Where they meet.
            timeout_s: Seconds to wait for the others, then and in every exchange.

        Raises:
            ProcessError: Not all of them came.
        """
        foreign = dist.is_initialized()
        store = None if foreign else _meeting(address, timeout_s)
        group = cls(address, timeout_s, store)
        with group.answered("while the processes of the run were connecting"), group._listening():
            if store is not None:
                group._excepthook = sys.excepthook  # torch replaces it, each time anew
                dist.init_process_group(
                    "gloo", store=store, rank=address.rank, world_size=address.size, timeout=group._timeout
                )
            elif (dist.get_rank(), dist.get_world_size()) != (address.rank, address.size):
                raise UsageError(
                    f"torch.distributed is open with {dist.get_world_size()} processes, this one being number "
                    f"{dist.get_rank()}, but the launcher says {address.size} and {address.rank}. Leave "
                    "torch.distributed.init_process_group to the strategy."
                )
            group.gradients = dist.new_group(backend="gloo", timeout=group._timeout)
            group.statistics = dist.new_group(backend="gloo", timeout=group._timeout)
            group.control = dist.new_group(backend="gloo", timeout=group._timeout)
        return group

    @property
    def rank(self) -> int:
        """Of this process, from 0."""
        return self._address.rank

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self._address.size

    @property
    def one_host(self) -> bool:
        """Whether all of them run on one host."""
        return self._address.one_host

    def close(self) -> None:
        """Disconnect. Safe to call when others are gone."""
        if self._store is not None and dist.is_initialized():
            dist.destroy_process_group()
            if self._excepthook is not None:
                sys.excepthook = self._excepthook
        self.gradients = self.statistics = self.control = None
        self._subgroups.clear()
        self._device_groups.clear()

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Let gloo, which opens connections inside, be reached by the other processes, and by nobody else if it can."""
        if self._interface is None:
            here = self._address
            self._interface = (
                loopback() if here.one_host else interface_to(here.host, here.port, here.rank, here.size, self._store)
            )
        with listening_on(self._interface):
            yield

    def subgroup(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        """A group of torch of some of the processes, this one among them; the others need not call this."""
        if ranks not in self._subgroups:
            with self._listening(), self.answered("while some of the processes were connecting"):
                self._subgroups[ranks] = dist.new_group(
                    list(ranks), backend="gloo", timeout=self._timeout, use_local_synchronization=True
                )
        return self._subgroups[ranks]

    def between_devices(self, device: torch.device | None) -> dist.ProcessGroup | None:
        """A group of torch that sums what is on accelerators, without host memory; all ranks have to call this.

        Args:
            device: The only one with parameters in this process; None if there are several.

        Returns:
            None unless all ranks have an accelerator of one type, for which torch has a backend (NCCL for CUDA), and
            a first sum comes out right everywhere.
        """
        mine = backend_between(device)
        if any(not other or other != mine for other in self.gather(mine)):
            return None
        assert device is not None
        group, failure = None, ""
        try:
            with self._listening():  # NCCL opens connections at the first sum only
                group = dist.new_group(backend=mine, timeout=self._timeout)
                self._device_groups.append(group)  # before it is of use: what hangs in it has to be aborted, too
                probe = torch.ones(2, device=device)
                dist.all_reduce(probe, group=group)
                if probe.tolist() != [self.size] * 2:
                    failure = f"a sum of {self.size} ones was {probe.tolist()}"
        except Exception as error:  # drivers and networks have many ways to fail
            failure = f"{type(error).__name__}: {error}".splitlines()[0]
        with self.answered("when gradients were to go from device to device (HETERO_GRADIENTS=host avoids that)"):
            failures = self.gather(failure)
        if any(failures):
            rank, said = next((rank, said) for rank, said in enumerate(failures) if said)
            log.warning(
                "gradients go through host memory, since %s does not work between the devices (process %d: %s)",
                mine, rank, said,
            )  # fmt: skip
            return None
        return group

    # Exchanges

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """The value of one rank, on all of them."""
        values = [value]
        with self.answered("in a broadcast"):
            dist.broadcast_object_list(values, source)
        return values[0]

    def gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """The values of all ranks, in their order, on all of them."""
        values: list[Any] = [None] * dist.get_world_size(group)
        with self.answered("in an exchange of values"):
            dist.all_gather_object(values, value, group=group)
        return values

    def barrier(self) -> None:
        """Wait for all."""
        with self.answered("at a barrier"):
            dist.barrier()

    def reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> Tensor:
        """The sum (or other operation of torch) over all ranks, on the tensor's device. The tensor stays as it is."""
        host = tensor.detach().to("cpu", copy=True).contiguous()
        with self.answered("in a reduction"):
            dist.all_reduce(host, op=op, group=group)
        return host.to(tensor.device)

    def measure(self) -> LinkSpeed:
        """How fast sums go over all processes; takes some milliseconds, on a slow network some tenths of a second."""
        words = torch.zeros(PROBE_BYTES // 4)
        self.barrier()
        latency_s = min(self._seconds(torch.zeros(1)) for _ in range(5))
        seconds = min(self._seconds(words) for _ in range(2))
        over_link = 2 * (self.size - 1) / self.size * PROBE_BYTES  # of a ring all-reduce, each way
        slowest: list[tuple[float, float]] = self.gather((latency_s, over_link / max(seconds - latency_s, 1e-9)))
        return LinkSpeed(max(latency for latency, _ in slowest), min(rate for _, rate in slowest))

    def _seconds(self, tensor: Tensor) -> float:
        begun_s = time.perf_counter()
        self.reduce(tensor)
        return time.perf_counter() - begun_s

    def broadcast_tensors(self, tensors: Sequence[Tensor], source: int = 0) -> None:
        """Overwrite tensors, of the same shapes on all ranks, by those of one rank."""
        with torch.no_grad(), self.answered("while the model was handed out"):
            for tensor in tensors:
                host = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format).reshape(-1)
                # gloo knows few types of numbers, and bytes are bytes.
                dist.broadcast(host.view(torch.uint8), source)
                _write(tensor, host.view(tensor.shape))

    # Failure

    def fail(self, error: BaseException) -> None:
        """Tell the others why this process leaves, and leave, so that none of them waits."""
        if self._store is not None:
            words = f"{type(error).__name__}: {error}".removesuffix(": ").splitlines()[0][:500]
            store, key = self._store, f"cause/{self.rank}"
            _in_time(lambda: store.set(key, words), NAMING_S)
        for group in self._device_groups:  # sums that nobody will ever complete would hold up the device
            with suppress(Exception):
                dist.distributed_c10d._abort_process_group(group)
        # gloo cannot cancel a sum: it may hold this up until its timeout, and the error is not to wait for that.
        leaving = threading.Thread(target=self.close, name="leave-processes", daemon=True)
        leaving.start()
        leaving.join(LEAVING_S)

    @contextmanager
    def answered(self, when: str) -> Iterator[None]:
        """Turn what torch raises when others do not answer into an error that names them, and count the wait."""
        begun_s = time.perf_counter()
        try:
            yield
        except ProcessError as error:
            raise ProcessError(f"{error} {self._who()}") from error
        except (RuntimeError, ConnectionError, TimeoutError) as error:
            if isinstance(error, UsageError):
                raise
            raise ProcessError(
                f"process {self.rank} of {self.size} got no answer {when}. {self._who()} The error of torch: "
                f"{str(error).splitlines()[0]}"
            ) from error
        finally:
            self.waited_s += time.perf_counter() - begun_s

    def _who(self) -> str:
        """Who is gone, and why, as far as the others say."""
        if self._store is None:
            return "Look at the messages of the other processes."
        told = _in_time(self._roll_call, NAMING_S * self.size)
        if told is None:  # its server is gone, or the link to it
            return f"The process at {self._address.host}:{self._address.port} cannot be reached any more."
        causes, gone = told
        if causes:
            said = "; ".join(f"process {rank} failed with {cause}" for rank, cause in causes.items())
            return f"{said[0].upper()}{said[1:]}."
        if not gone:
            return "All processes are there, so they are out of step, or the connection between them broke."
        names = ", ".join(map(str, gone))
        return f"Process {names} is gone, or busy with something else." if len(gone) == 1 else f"Gone: {names}."

    def _roll_call(self) -> tuple[dict[int, str], list[int]]:
        """Why others failed, as far as they say; else, which of them do not answer."""
        assert self._store is not None
        self._store.set(f"here/{self.rank}", "yes")
        others = [rank for rank in range(self.size) if rank != self.rank]
        causes = {rank: cause for rank in others if (cause := self._said(f"cause/{rank}"))}
        return causes, [] if causes else [rank for rank in others if not self._is_here(rank)]

    def _said(self, key: str) -> str:
        assert self._store is not None
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _is_here(self, rank: int) -> bool:
        assert self._store is not None
        try:
            self._store.wait([f"here/{rank}"], timedelta(seconds=NAMING_S))
        except RuntimeError:
            return False
        return True


def backend_between(device: torch.device | None) -> str:
    """Name of torch's backend for sums between devices of that type; empty if there is none, as for the CPU."""
    if device is None or device.type == "cpu":
        return ""
    name = str(dist.Backend.default_device_backend_map.get(device.type, ""))
    if name == "nccl" and not dist.is_nccl_available():
        return ""
    return "" if name == "gloo" else name


def _meeting(address: Address, timeout_s: float) -> Store:
    """The store through which the processes find each other, with a name space of its own for each time it is opened.

    Where all run on one host, it listens there only: whoever reaches the port of a store can write into it.
    """
    key = (address.host, address.port, address.attempt)
    if key not in _stores:
        serves = address.rank == 0 and not address.agent
        arguments: dict[str, Any] = {}
        if serves and address.one_host and address.host in _LOOPBACK:
            listener = socket.create_server(("127.0.0.1", address.port))
            arguments["master_listen_fd"] = listener.detach()
        try:
            _stores[key] = TCPStore(
                address.host,
                address.port,
                address.size,
                is_master=serves,
                timeout=timedelta(seconds=timeout_s),
                wait_for_workers=False,
                **arguments,
            )
        except (RuntimeError, OSError) as error:
            raise ProcessError(
                f"process {address.rank} of {address.size} cannot reach the others at {address.host}:{address.port}: "
                f"{str(error).splitlines()[0]}. Check that the launcher's address is right, the port is free and no "
                "firewall is between."
            ) from error
    _opened[key] = _opened.get(key, 0) + 1
    return PrefixStore(f"hetero/{address.attempt}/{_opened[key]}", _stores[key])


def _write(tensor: Tensor, values: Tensor) -> None:
    """Overwrite a tensor. Each number of an expanded one stands in one place of memory, and is written there once.

    A tensor that is expanded in one process may not be so in another: a copy to an accelerator is not.
    """
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor, values = tensor.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    tensor.copy_(values)


def _in_time(ask: Callable[[], Answer], limit_s: float) -> Answer | None:
    """The answer of a store, or None if it fails or takes too long: over a broken link its calls never return."""
    answers: list[Answer] = []

    def run() -> None:
        with suppress(Exception):
            answers.append(ask())

    asking = threading.Thread(target=run, name="ask-processes", daemon=True)
    asking.start()
    asking.join(limit_s)
    return answers[0] if answers else None


def is_one_host(environment: Mapping[str, str], size: int) -> bool:
    """Whether the launcher says that all processes run on this host."""
    local = environment.get("LOCAL_WORLD_SIZE", "")
    return local.isdigit() and int(local) == size
