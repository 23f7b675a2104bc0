"""The face of the emulated accelerator, whichever backend is behind it."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from lightning_hetero.devices.host_memory import keep_host_memory
from lightning_hetero.errors import UsageError
from lightning_hetero.testing.backend import NAME, Backend, DeviceStats

if TYPE_CHECKING:
    import torch

COUNT_VARIABLE = "LIGHTNING_HETERO_EMULATED_DEVICES"

Kind = Literal["cpp", "python"]


class EmulatedAccelerator:
    """Several devices of torch's type `dev`, which live in host memory and compute with the host's kernels.

    Their numbers are those of the CPU, bit for bit. Made by `install_accelerator`, never directly.

    Attributes:
        name: The device type, as in `torch.device("dev:0")`.
        kind: "cpp" or "python", the backend behind it.
        device_count: How many devices there are.
        devices: Their names: `("dev:0", "dev:1")`.
    """

    def __init__(self, kind: Kind, backend: Backend) -> None:
        self.name = NAME
        self.kind: Kind = kind
        self.device_count = backend.device_count()
        self.devices = tuple(f"{NAME}:{index}" for index in range(self.device_count))
        self._backend = backend

    def __repr__(self) -> str:
        return f"EmulatedAccelerator({', '.join(self.devices)}; kind={self.kind!r})"

    def configure(
        self,
        index: int,
        *,
        cap_bytes: int | None = None,
        slowdown: float = 1.0,
        launch_s: float = 0.0,
        bandwidth_bytes_per_s: float | None = None,
        latency_s: float = 0.0,
        missing_dtypes: Iterable[torch.dtype] = (),
    ) -> None:
        """Set all limits of one device; what is not named goes back to its default.

        The waiting is real sleep, which a busy machine prolongs: never assert how long something took.

        Args:
            index: Which device.
            cap_bytes: Memory of the device; None for that of the host. Memory in use stays, even above it.
            slowdown: A kernel takes this many times as long as on the host, >= 1.
            launch_s: Seconds added to every kernel.
            bandwidth_bytes_per_s: Of the link to the host; None for that of host memory.
            latency_s: Seconds added to every transfer.
            missing_dtypes: What the device cannot hold, such as `torch.float64`: a TypeError as on MPS.

        Raises:
            IndexError: There is no such device.
            ValueError: A limit is out of its range.
        """
        self._check_index(index)
        _check_range("cap_bytes", cap_bytes, at_least=0)
        _check_range("slowdown", slowdown, at_least=1)
        _check_range("launch_s", launch_s, at_least=0)
        _check_range("latency_s", latency_s, at_least=0)
        if bandwidth_bytes_per_s is not None and not 0 < bandwidth_bytes_per_s < math.inf:
            raise ValueError(f"bandwidth_bytes_per_s must be a finite number > 0, got {bandwidth_bytes_per_s}")
        self._backend.configure(
            index,
            -1 if cap_bytes is None else cap_bytes,
            slowdown,
            launch_s,
            bandwidth_bytes_per_s or 0.0,
            latency_s,
            list(missing_dtypes),
        )

    def stats(self, index: int) -> DeviceStats:
        """The counters of one device.

        Raises:
            IndexError: There is no such device.
        """
        self._check_index(index)
        return DeviceStats(**self._backend.stats(index))

    def reset(self, index: int | None = None) -> None:
        """Set limits to their defaults and counters to zero, of one device or (None) of all.

        Memory in use stays in use: `used_bytes` is not touched, and `peak_bytes` starts from it.

        Raises:
            IndexError: There is no such device.
        """
        for each in range(self.device_count) if index is None else (index,):
            self.configure(each)
            self._backend.reset_counters(each)

    def _check_index(self, index: int) -> None:
        if not 0 <= index < self.device_count:
            raise IndexError(f"there is no device {index}; the emulated devices are {', '.join(self.devices)}")


def _check_range(name: str, value: float | None, *, at_least: float) -> None:
    if value is not None and not at_least <= value < math.inf:
        raise ValueError(f"{name} must be a finite number >= {at_least}, got {value}")


_installed: EmulatedAccelerator | None = None


def install_accelerator(kind: Literal["auto", "cpp", "python"] = "auto") -> EmulatedAccelerator:
    """Add the emulated accelerator to this process, for as long as it lives.

    From then on the process keeps the host memory that it frees, as the allocators of accelerators do.

    The environment variable LIGHTNING_HETERO_EMULATED_DEVICES says how many devices there are (2 if it is
    unset). It is read at the first call; later calls return the same object. Not
    for a process that uses CUDA too: torch's autograd serves one type of accelerator.

    Args:
        kind: "cpp" compiles a backend at the first use on a machine (about a minute) and then loads it from
            the user's cache, see `cpp_build`. "python" needs no compiler, is slower and knows less, see
            `python_backend`. "auto" is "cpp" where that is possible and else "python": without a word where
            there is no compiler, with a RuntimeWarning where there is one and it fails.

    Raises:
        UsageError: The other kind, or another package's device type, is already installed; or the process uses
            CUDA; or the machine cannot build "cpp"; or its torch cannot do "python".
        ValueError: `kind` or the number of devices makes no sense.
    """
    global _installed
    if kind not in ("auto", "cpp", "python"):
        raise ValueError(f"kind must be 'auto', 'cpp' or 'python', got {kind!r}")
    if _installed is None:
        _installed = _install(kind, _device_count())
        keep_host_memory()
    elif kind not in ("auto", _installed.kind):
        raise UsageError(
            f"the emulated accelerator of this process is of kind {_installed.kind!r} already, and torch knows "
            f"one extra device type per process. Ask for kind={kind!r} in a new process."
        )
    return _installed


def _device_count() -> int:
    text = os.environ.get(COUNT_VARIABLE, "2")
    if not (text.isdecimal() and 1 <= int(text) <= 64):
        raise ValueError(f"{COUNT_VARIABLE} must be a number of devices from 1 to 64, got {text!r}")
    return int(text)


def _install(kind: Literal["auto", "cpp", "python"], count: int) -> EmulatedAccelerator:
    # Imported here, so that a test module which names the accelerator for its type only does not import torch.
    import torch

    from lightning_hetero.testing import cpp_backend, cpp_build, python_backend

    if torch.cuda.is_initialized():
        raise UsageError(
            "the emulated accelerator cannot join a process that uses CUDA already: torch's autograd serves one type "
            "of accelerator. Start the program with CUDA_VISIBLE_DEVICES= (empty), or leave CUDA alone in it."
        )
    if kind == "cpp" or (kind == "auto" and (cpp_build.is_built() or cpp_build.what_is_missing() is None)):
        try:
            return EmulatedAccelerator("cpp", cpp_backend.install(count))
        except cpp_build.BuildError as error:
            if kind == "cpp":
                raise
            warnings.warn(f"The Python backend of the emulated accelerator is used: {error}", RuntimeWarning, 3)
    return EmulatedAccelerator("python", python_backend.install(count))
