"""How much of a device's memory a plan may use: the total, minus what others use, minus a small reserve."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from lightning_hetero.units import format_bytes

log = logging.getLogger(__name__)

_GIB = 1024**3
UNKNOWN_MEMORY_BYTES = _GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The memory of one device.

    Attributes:
        total_bytes: What the device has, or None if nothing tells.
        usable_bytes: What a plan may use, at least 1.
    """

    total_bytes: int | None
    usable_bytes: int


def usable_memory(*, total_bytes: int, free_bytes: int, own_bytes: int, reserve_bytes: int) -> Memory:
    """Total minus what others use minus a reserve.

    What this process holds already counts as usable: a plan counts the model itself, wherever it lies now.

    Args:
        total_bytes: What the device has.
        free_bytes: What nobody uses.
        own_bytes: What this process holds, and would use again.
        reserve_bytes: What stays free, for the driver, workspaces and fragmentation. Never more than a
            twentieth of the total, so that small devices keep most of what they have.
    """
    reserve_bytes = min(reserve_bytes, total_bytes // 20)
    usable_bytes = min(free_bytes + own_bytes, total_bytes) - reserve_bytes
    return Memory(total_bytes=total_bytes, usable_bytes=max(1, usable_bytes))


def accelerator_memory(module: Any, kind: str, index: int) -> Memory:
    """The memory of device `index` of torch's device module `module`, reserve: 512 MiB.

    Asking CUDA what is free creates its context on that device; nothing else here allocates.

    Args:
        module: `torch.cuda`, `torch.xpu`, ... or an object with the same functions.
        kind: Its name, "cuda".
        index: Which of its devices.
    """
    for ask in (_from_module, _from_accelerator_api, _from_mps, _from_properties):
        try:
            free_bytes, total_bytes = ask(module, kind, index)
        except Exception as error:  # each backend offers another subset, and fails in its own way
            log.debug("%s:%d does not answer %s: %r", kind, index, ask.__name__, error)
            continue
        if total_bytes > 0:
            own_bytes = _reserved_by_this_process(module, index)
            return usable_memory(
                total_bytes=total_bytes, free_bytes=free_bytes, own_bytes=own_bytes, reserve_bytes=_GIB // 2
            )
    log.warning(
        "device %s:%d does not tell its memory; %s is assumed. Say what it has: memory={'%s:%d': '16GiB'}",
        *(kind, index, format_bytes(UNKNOWN_MEMORY_BYTES), kind, index),
    )
    return Memory(total_bytes=None, usable_bytes=UNKNOWN_MEMORY_BYTES)


def _from_module(module: Any, kind: str, index: int) -> tuple[int, int]:
    free_bytes, total_bytes = module.mem_get_info(index)
    return int(free_bytes), int(total_bytes)


def _from_accelerator_api(module: Any, kind: str, index: int) -> tuple[int, int]:
    import torch

    # torch.accelerator speaks of one kind per process, and another kind's numbers would pass for ours.
    current = torch.accelerator.current_accelerator()
    if current is None or current.type != kind or getattr(torch, kind, None) is not module:
        raise LookupError(f"torch.accelerator speaks of {current}")
    free_bytes, total_bytes = torch.accelerator.get_memory_info(index)  # not in older releases of torch
    return int(free_bytes), int(total_bytes)


def _from_mps(module: Any, kind: str, index: int) -> tuple[int, int]:
    # Apple's memory belongs to CPU and GPU together; this is the share that Metal recommends for itself.
    total_bytes = int(module.recommended_max_memory())
    return total_bytes, total_bytes


def _from_properties(module: Any, kind: str, index: int) -> tuple[int, int]:
    total_bytes = int(module.get_device_properties(index).total_memory)
    return total_bytes, total_bytes


def _reserved_by_this_process(module: Any, index: int) -> int:
    try:
        return int(module.memory_reserved(index))
    except Exception:  # a backend without a caching allocator
        return 0
