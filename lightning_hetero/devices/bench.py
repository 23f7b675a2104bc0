"""A place where something is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_SHARE = 8  # of the memory that a device has, the part that a probe may use


@dataclass(frozen=True, slots=True)
class Bench:
    """Where something is measured.

    Attributes:
        torch_device: Torch's name for it.
        threads: Intra-op threads; None leaves torch's setting alone.
        memory_bytes: What it has.
        dtypes: Names of the dtypes to try; empty tries the usual ones.
    """

    torch_device: str
    threads: int | None
    memory_bytes: int
    dtypes: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        """As torch's type."""
        import torch

        return torch.device(self.torch_device)

    @property
    def share_bytes(self) -> int:
        """What a probe may use."""
        return self.memory_bytes // _SHARE
