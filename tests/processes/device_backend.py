"""A backend of torch.distributed for the emulated accelerator, as NCCL is for CUDA: it sums tensors of the devices.

Like NCCL it takes tensors of its devices only, and knows nothing of host memory.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

NAME = "devccl"
sums: list[int] = []
"""Elements of each tensor that was summed in this process."""


class _Done(dist._Work):  # type: ignore[name-defined, misc]
    """A sum that is complete."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self._future: Any = torch.futures.Future()
        self._future.set_result(tensors)

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def get_future(self) -> Any:
        return self._future


class DeviceGroup(dist.ProcessGroup):
    """Sums by way of a gloo group of its own, whose tensors nobody else sees."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta, broken: bool) -> None:
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._broken = broken

    def allreduce(self, tensors: list[Tensor], options: Any = None) -> Any:
        assert all(tensor.device.type == "dev" for tensor in tensors)
        if self._broken:
            raise RuntimeError("no path between the devices")
        for tensor in tensors:
            host = tensor.to("cpu")
            self._gloo.allreduce([host]).wait()
            tensor.copy_(host)
            sums.append(tensor.numel())
        return _Done(tensors)

    def getBackendName(self) -> str:  # noqa: N802  (torch's name)
        return NAME


def register(*, broken: bool = False) -> None:
    """Make it known to torch, in this process.

    Args:
        broken: Whether its sums fail.
    """

    def make(store: Any, rank: int, size: int, timeout: timedelta) -> DeviceGroup:
        return DeviceGroup(store, rank, size, timeout, broken)

    dist.Backend.register_backend(NAME, make, devices=["dev"])
