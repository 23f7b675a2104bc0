"""The devices of the Python backend: limits, counters and what it costs to use them."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field, fields

# Bound here, because a test may replace the ones in the module `time`.
from time import perf_counter, sleep
from typing import Any

import torch

from lightning_hetero.testing.backend import NAME, DeviceStats

__all__ = ["PythonDevices", "perf_counter"]


def _no_stats() -> dict[str, Any]:
    return {field.name: 0 for field in fields(DeviceStats)}


@dataclass
class _State:
    """One device. See `EmulatedAccelerator.configure` and `DeviceStats` for the meaning of the fields."""

    cap_bytes: int = -1
    slowdown: float = 1.0
    launch_s: float = 0.0
    bandwidth_bytes_per_s: float = 0.0
    latency_s: float = 0.0
    missing_dtypes: frozenset[torch.dtype] = frozenset()
    counters: dict[str, Any] = field(default_factory=_no_stats)
    generator: torch.Generator = field(default_factory=torch.Generator)


class PythonDevices:
    """All devices of the Python backend, and the `accelerator.Backend` that speaks for them."""

    def __init__(self, count: int) -> None:
        self._states = [_State() for _ in range(count)]
        self._lock = threading.RLock()  # memory may be given back while it is held, by garbage collection
        self._current = threading.local()

    def _state(self, index: int) -> _State:
        if not 0 <= index < len(self._states):
            raise RuntimeError(f"invalid device ordinal {index}: there are {len(self._states)} emulated devices")
        return self._states[index]

    # ------------------------------------------------------------------------- for the face and `torch.dev`

    def device_count(self) -> int:
        """How many devices there are."""
        return len(self._states)

    def current_device(self) -> int:
        """The device that this thread uses where none is named."""
        return getattr(self._current, "index", 0)

    def set_device(self, index: int, /) -> None:
        """Change the current device of this thread."""
        self._current.index = index

    def configure(
        self,
        index: int,
        cap_bytes: int,
        slowdown: float,
        launch_s: float,
        bandwidth_bytes_per_s: float,
        latency_s: float,
        missing_dtypes: list[torch.dtype],
        /,
    ) -> None:
        """Replace all limits; a cap of -1 bytes and a bandwidth of 0 stand for "no limit"."""
        state = self._state(index)
        with self._lock:
            state.cap_bytes, state.slowdown, state.launch_s = cap_bytes, slowdown, launch_s
            state.bandwidth_bytes_per_s, state.latency_s = bandwidth_bytes_per_s, latency_s
            state.missing_dtypes = frozenset(missing_dtypes)

    def stats(self, index: int, /) -> dict[str, Any]:
        """The fields of `DeviceStats`."""
        with self._lock:
            return dict(self._state(index).counters)

    def reset_counters(self, index: int, /) -> None:
        """Set the counters to zero; the peak starts from the memory in use."""
        with self._lock:
            counters = self._state(index).counters
            used_bytes = counters["used_bytes"]
            counters.update(_no_stats(), used_bytes=used_bytes, peak_bytes=used_bytes)

    def reset_peak(self, index: int, /) -> None:
        """Let the peak start from the memory in use."""
        with self._lock:
            counters = self._state(index).counters
            counters["peak_bytes"] = counters["used_bytes"]

    def total_bytes(self, index: int, /) -> int:
        """The cap, or else the memory of the host."""
        cap_bytes = self._state(index).cap_bytes
        return cap_bytes if cap_bytes >= 0 else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def generator(self, index: int, /) -> torch.Generator:
        """The source of the device's random numbers: a generator of the host."""
        return self._state(index).generator

    # ------------------------------------------------------------------------------------- for the kernels

    def charge(self, index: int, size_bytes: int) -> None:
        """Take memory from a device.

        Raises:
            torch.OutOfMemoryError: It is not there.
        """
        with self._lock:
            state = self._state(index)
            used_bytes = state.counters["used_bytes"]
            if 0 <= state.cap_bytes < used_bytes + size_bytes:
                state.counters["ooms"] += 1
                raise torch.OutOfMemoryError(
                    f"{NAME}:{index} is out of memory. Tried to allocate {size_bytes} bytes, but {used_bytes} of "
                    f"its {state.cap_bytes} bytes are in use."
                )
            state.counters["used_bytes"] += size_bytes
            state.counters["peak_bytes"] = max(state.counters["peak_bytes"], used_bytes + size_bytes)
            state.counters["allocations"] += size_bytes > 0

    def discharge(self, index: int, size_bytes: int) -> None:
        """Give memory back."""
        with self._lock:
            self._state(index).counters["used_bytes"] -= size_bytes

    def check_dtype(self, index: int, dtype: torch.dtype) -> None:
        """Refuse a dtype that the device lacks, with a TypeError as on MPS."""
        if dtype in self._state(index).missing_dtypes:
            raise TypeError(
                f"{NAME}:{index} does not support {dtype}. Use another dtype, or place this tensor on another device."
            )

    def finish_kernel(self, index: int, host_s: float) -> None:
        """Account for a kernel that took `host_s`, and wait for as long as the device is slower."""
        state = self._state(index)
        with self._lock:
            state.counters["ops"] += 1
            wait_s = host_s * (state.slowdown - 1) + state.launch_s
            state.counters["waited_s"] += wait_s
        if wait_s > 0:
            sleep(wait_s)

    def cross_link(self, counter: str, index: int, size_bytes: int) -> None:
        """Count a transfer at one of its ends and wait for as long as the link needs."""
        state = self._state(index)
        with self._lock:
            if counter:
                state.counters[counter] += size_bytes
            rate = state.bandwidth_bytes_per_s
            wait_s = state.latency_s + (size_bytes / rate if rate else 0.0)
            state.counters["waited_s"] += wait_s
        if wait_s > 0:
            sleep(wait_s)
