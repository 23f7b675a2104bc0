"""Lets Lightning's DeviceStatsMonitor see all devices of a run, not the root alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from lightning_hetero.plan import Plan
from lightning_hetero.strategy._compat import wants_no_cpu_stats

Stats = dict[str, Any]


class StatsOfAllDevices:
    """While it is open, the accelerator of a Trainer tells about all devices of the plan.

    The figures of the root stay under the names that they have on one device. If there are several devices, those of
    each come a second time, or for the first, as `cuda:1/allocated_bytes.all.current`.

    Args:
        accelerator: Whose figures callbacks ask for.
        callbacks: Of the Trainer; `DeviceStatsMonitor(cpu_stats=False)` wants none of the CPU.
        plan: Gives the plan that is in effect.
        cpu_stats: Gives figures of the CPU.
    """

    def __init__(
        self,
        accelerator: Any,
        callbacks: Iterable[Any],
        plan: Callable[[], Plan | None],
        cpu_stats: Callable[[], Stats],
    ) -> None:
        self._accelerator = accelerator
        skipped = {"cpu"} if any(map(wants_no_cpu_stats, callbacks)) else set[str]()
        own = partial(type(accelerator).get_device_stats, accelerator)
        accelerator.get_device_stats = partial(_of_all, own, cpu_stats, plan, skipped)

    def close(self) -> None:
        """Leave the accelerator as it was."""
        vars(self._accelerator).pop("get_device_stats", None)


def memory_stats(device: torch.device) -> Stats:
    """Bytes that torch holds on an accelerator, under torch's own names; empty for the CPU."""
    module: Any = None if device.type == "cpu" else torch.get_device_module(device)
    if hasattr(module, "memory_stats"):
        return dict(module.memory_stats(device))
    named = {"allocated_bytes.all.current": "memory_allocated", "allocated_bytes.all.peak": "max_memory_allocated"}
    return {name: getattr(module, function)(device) for name, function in named.items() if hasattr(module, function)}


def _of_all(
    ask: Callable[[Any], Stats],
    cpu_stats: Callable[[], Stats],
    plan: Callable[[], Plan | None],
    skipped: set[str],
    asked: torch.device,
) -> Stats:
    # Accelerators know nothing of the CPU. Where it is the root, Lightning asks whoever serves the root.
    of_root = partial(ask, asked) if torch.device(asked).type != "cpu" else cpu_stats
    stats = {} if of_root is cpu_stats and "cpu" in skipped else dict(of_root())
    current = plan()
    places = () if current is None else current.torch_devices
    if len(places) < 2:
        return stats
    named: Stats = {}
    for place in map(torch.device, places):
        if place == torch.device(asked):
            figures = stats
        elif place.type in skipped:
            continue
        else:
            figures = cpu_stats() if place.type == "cpu" else memory_stats(place)
        named |= {f"{place}/{name}": value for name, value in figures.items()}
    return stats | named
