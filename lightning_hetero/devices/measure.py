"""Measures devices and the links between them: rates of matrix products and copies, and what it costs to start."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import torch

from lightning_hetero.devices.bench import Bench
from lightning_hetero.devices.numbers import MOST_SPREAD, DeviceNumbers, DeviceProfile, LinkNumbers, confidence
from lightning_hetero.devices.probes import (
    Latency,
    Launch,
    MatrixProduct,
    MemoryCopy,
    Probe,
    Transfer,
    supported,
)
from lightning_hetero.devices.stopwatch import Timing, intra_op_threads
from lightning_hetero.errors import InventoryError

_PASSES = 2
_MORE_PASSES = 2  # for what two passes do not agree on
_DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass(slots=True)
class _Task:
    """Probes of one device or link, by the name of what they tell, and their shortest seconds of each pass."""

    probes: dict[str, Probe]
    threads: int | None = None
    passes: list[dict[str, float]] = field(default_factory=list)

    def run(self) -> None:
        with intra_op_threads(self.threads):
            self.passes.append({name: probe.shortest_s() for name, probe in self.probes.items()})

    @property
    def is_noisy(self) -> bool:
        return any(timing.spread > MOST_SPREAD for timing in self.timings.values())

    @property
    def timings(self) -> dict[str, Timing]:
        return {name: Timing.of_passes(one[name] for one in self.passes) for name in self.probes}


@torch.no_grad()
def measure(benches: Sequence[Bench], links: Sequence[tuple[Bench, Bench]]) -> DeviceProfile:
    """Measure devices, and the links from one to another.

    Everything is measured in two passes, one after the other, each with at least five repetitions. The shortest of
    all counts, and how near another pass came to it tells how far it can be relied on. What the two passes do not
    agree on has up to two more.

    Args:
        benches: Devices of this process.
        links: From, to. Those with an end that torch does not reach here are left out.

    Raises:
        InventoryError: Torch does not reach a device here, or it cannot multiply matrices.
    """
    busy = _machine_is_busy()
    of_devices = [(bench, _device_task(bench)) for bench in benches]
    of_links = [(pair, _link_task(*pair)) for pair in links if all(_why_not(end) is None for end in pair)]
    tasks = [task for _, task in (*of_devices, *of_links)]
    for done in range(_PASSES + _MORE_PASSES):
        for task in tasks:
            if done < _PASSES or task.is_noisy:
                task.run()
    _let_memory_go({bench.device.type for bench in benches})
    return DeviceProfile(
        tuple(_device_numbers(bench, task, busy) for bench, task in of_devices),
        tuple(_link_numbers(pair, task, busy) for pair, task in of_links),
    )


def _device_task(bench: Bench) -> _Task:
    why_not = _why_not(bench)
    if why_not is not None:
        raise _unreachable(bench, why_not)
    share_bytes = bench.share_bytes
    makers = {
        name: partial(MatrixProduct, bench.device, getattr(torch, name), share_bytes)
        for name in bench.dtypes or _DTYPES
        if isinstance(getattr(torch, name, None), torch.dtype)
    }
    with intra_op_threads(bench.threads):
        products = {name: probe for name, make in makers.items() if (probe := supported(make)) is not None}
        if not products:
            raise _unreachable(bench, "it has multiplied no matrices, in any of its dtypes")
        others = {"memory": supported(lambda: MemoryCopy(bench.device, share_bytes))}
        others["launch"] = supported(lambda: Launch(bench.device))
    return _Task({**products, **{name: probe for name, probe in others.items() if probe}}, bench.threads)


def _link_task(source: Bench, target: Bench) -> _Task:
    share_bytes = min(source.share_bytes, target.share_bytes)
    probes: dict[str, Probe] = {
        "latency": Latency(source.device, target.device),
        "bandwidth": Transfer(source.device, target.device, share_bytes, pinned=False),
    }
    if "cpu" in (source.device.type, target.device.type):
        pinned = supported(lambda: Transfer(source.device, target.device, share_bytes, pinned=True))
        probes |= {"pinned": pinned} if pinned else {}
    return _Task(probes)


def _device_numbers(bench: Bench, task: _Task, busy: bool) -> DeviceNumbers:
    timings = task.timings
    copy, launch = task.probes.get("memory"), timings.get("launch")
    return DeviceNumbers(
        device=bench.torch_device,
        threads=bench.threads,
        flops_per_s=tuple(
            (name, probe.operations / timings[name].best_s)
            for name, probe in task.probes.items()
            if isinstance(probe, MatrixProduct)
        ),
        memory_bytes_per_s=copy.moved_bytes / timings["memory"].best_s if isinstance(copy, MemoryCopy) else None,
        launch_s=launch.best_s / Launch.calls if launch else None,
        spreads=_spreads(timings),
        measured=confidence((timing.spread for timing in timings.values()), busy=busy),
    )


def _link_numbers(pair: tuple[Bench, Bench], task: _Task, busy: bool) -> LinkNumbers:
    timings = task.timings
    latency_s = timings["latency"].best_s

    def rate(name: str) -> float | None:
        probe = task.probes.get(name)
        if not isinstance(probe, Transfer):
            return None
        whole_s = timings[name].best_s
        # What it costs to start is told apart, but where it is most of the time, the rest is noise.
        return probe.size / max(whole_s - latency_s, whole_s / 2)

    return LinkNumbers(
        source=pair[0].torch_device,
        target=pair[1].torch_device,
        bandwidth_bytes_per_s=rate("bandwidth") or 0.0,
        latency_s=latency_s,
        pinned_bandwidth_bytes_per_s=rate("pinned"),
        spreads=_spreads(timings),
        measured=confidence((timing.spread for timing in timings.values()), busy=busy),
    )


def _spreads(timings: dict[str, Timing]) -> tuple[tuple[str, float], ...]:
    return tuple((name, timing.spread) for name, timing in timings.items())


def _machine_is_busy() -> bool:
    """Whether other programs have had more work than there are cores, over the last minute."""
    try:
        return os.getloadavg()[0] > (os.cpu_count() or 1)
    except (AttributeError, OSError):  # Windows does not tell
        return False


def _let_memory_go(kinds: set[str]) -> None:
    for kind in kinds - {"cpu"}:
        with suppress(Exception):  # not every backend keeps memory back
            torch.get_device_module(kind).empty_cache()


def _why_not(bench: Bench) -> str | None:
    """What torch says if it cannot make a tensor there."""
    try:
        torch.zeros(1, device=bench.device)
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0]
    return None


def _unreachable(bench: Bench, why: str) -> InventoryError:
    return InventoryError(
        f"device {bench.torch_device!r} cannot be measured: {why}. Leave it out, or write its numbers into the "
        "inventory (flops_per_s, memory_bandwidth, launch_s) or into a device profile"
    )
