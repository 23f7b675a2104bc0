"""What a backend of the emulated accelerator does for its face, `EmulatedAccelerator` and `torch.dev`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

NAME = "dev"  # torch's name of the device type


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceStats:
    """What an emulated device has done since its last reset.

    Attributes:
        used_bytes: Memory of the tensors that live on it now.
        peak_bytes: The most that was in use at once. Scratch memory inside a kernel is not seen.
        h2d_bytes: Received from the host.
        d2h_bytes: Sent to the host, `.item()` included.
        d2d_bytes: Sent to other emulated devices.
        ops: Kernels that ran here; views and allocations are none.
        ooms: Allocations that were refused.
        allocations: Allocations of more than 0 bytes.
        waited_s: Seconds of waiting that its limits asked for, in kernels and transfers. Without a `slowdown`
            the host's speed has no part in it, so it can be asserted where measured time cannot.
    """

    used_bytes: int
    peak_bytes: int
    h2d_bytes: int
    d2h_bytes: int
    d2d_bytes: int
    ops: int
    ooms: int
    allocations: int
    waited_s: float


class Backend(Protocol):
    """All that the face asks of a backend. The index of a device is the first argument everywhere."""

    def device_count(self) -> int:
        """How many devices there are."""

    def current_device(self) -> int:
        """The device that this thread uses where none is named."""

    def set_device(self, index: int, /) -> None:
        """Change the current device of this thread."""

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

    def stats(self, index: int, /) -> dict[str, Any]:
        """The fields of `DeviceStats`."""

    def reset_counters(self, index: int, /) -> None:
        """Set the counters to zero; the peak starts from the memory in use."""

    def reset_peak(self, index: int, /) -> None:
        """Let the peak start from the memory in use."""

    def total_bytes(self, index: int, /) -> int:
        """The cap, or else the memory of the host."""

    def generator(self, index: int, /) -> torch.Generator:
        """The source of the device's random numbers."""
