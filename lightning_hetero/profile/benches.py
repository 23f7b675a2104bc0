"""Where to measure: the real processors behind the devices of an inventory, and what the rest follow from."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from lightning_hetero.devices.spec import DeviceSpec, Inventory
from lightning_hetero.profile.clock import medians, timed, works_by_itself
from lightning_hetero.profile.costs import Curve
from lightning_hetero.profile.estimate import ADAM_ACCESSES, flops_per_s

_MATMUL = 512
_REST_S = 0.005  # what a CPU that plays devices sleeps between two kinds of work
_WITHOUT_WAITING = 8  # steps of an optimizer in a row
_FEW_ELEMENTS, _MANY_ELEMENTS = 2**10, 2**23  # between which an optimizer is timed


@dataclass(frozen=True, slots=True)
class Bench:
    """A processor of this machine to measure on.

    Attributes:
        torch_device: Its name in torch.
        threads: Intra-op threads; None leaves torch's setting alone.
        rest: Seconds that it does nothing for each second of work, as a CPU does that plays slower devices.
        steady: Whether what counts is what work usually takes, as on devices that are played, or else the median.
    """

    torch_device: str = "cpu"
    threads: int | None = None
    rest: float = 0.0
    steady: bool = False

    @contextmanager
    def use(self) -> Iterator[None]:
        """Set the bench's number of threads for a block."""
        if self.threads is None:
            yield
            return
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    @property
    def device(self) -> torch.device:
        """As torch's type."""
        return torch.device(self.torch_device)


@dataclass(frozen=True, slots=True)
class Basis:
    """How the seconds of a device follow from those of a bench.

    Attributes:
        bench: What is measured.
        factor: Seconds of the device for each second of the bench.
        launch_s: What each call takes longer.
        estimated: Whether the device itself is not here.
        optimizer_s_per_byte: Of a step of Adam, if the device's memory tells; None scales the bench's.
    """

    bench: Bench
    factor: float = 1.0
    launch_s: float = 0.0
    estimated: bool = False
    optimizer_s_per_byte: float | None = None

    def curve(self, measured: Curve, calls: int) -> Curve:
        """Seconds of `calls` calls on the device, from those on the bench."""
        return Curve(tuple((rows, seconds * self.factor + self.launch_s * calls) for rows, seconds in measured.points))


def bases(inventory: Inventory, *, training: bool, dtype: str = "float32") -> dict[str, Basis]:
    """The basis of each device of an inventory, by name; with `training`, of those that can train.

    A real device is its own. The CPU stands for the devices that it plays, at the pace of the fastest of them (the
    runtime stretches their work in the same way), and for those that are not here: their seconds are scaled by
    `flops_per_s` where the inventory has it for the device, and else by relative speeds.

    Args:
        inventory: The devices.
        training: Whether to leave out what torch cannot train on.
        dtype: Of the model's parameters, for the data sheets.
    """
    devices = inventory.trainable if training else tuple(inventory)
    emulated = [device.speed for device in devices if device.emulated]
    fastest = max(emulated, default=1.0)
    rest = sum(fastest / speed - 1.0 for speed in emulated) / max(len(emulated), 1)
    found: dict[str, Basis] = {}
    for device in devices:
        if device.emulated:
            factor = fastest / device.speed
            found[device.name] = Basis(Bench("cpu", device.threads, rest, steady=factor > 1), factor)
        elif device.torch_device is not None and is_here(device.torch_device):
            found[device.name] = Basis(Bench(device.torch_device))
        else:
            found[device.name] = _away(device, inventory, dtype)
    return found


def _away(device: DeviceSpec, inventory: Inventory, dtype: str) -> Basis:
    host = next((other for other in inventory if other.torch_device == "cpu" and not other.emulated), None)
    flops = flops_per_s(device, dtype)
    if flops is None:
        factor = (host.speed if host is not None else 1.0) / device.speed
    else:
        factor = ((flops_per_s(host, dtype) if host is not None else None) or host_flops_per_s()) / flops
    adam_s = None if device.memory_bytes_per_s is None else ADAM_ACCESSES / device.memory_bytes_per_s
    return Basis(Bench(), factor, device.launch_s or 0.0, estimated=True, optimizer_s_per_byte=adam_s)


def is_here(torch_device: str) -> bool:
    """Whether this process can run on a device."""
    device = torch.device(torch_device)
    if device.type == "cpu":
        return True
    module = getattr(torch, device.type, None)
    try:
        return bool(module is not None and module.is_available() and (device.index or 0) < module.device_count())
    except Exception:  # a broken driver
        return False


def host_flops_per_s() -> float:
    """What the CPU of this machine reaches in a float32 matrix product."""
    cpu = torch.device("cpu")
    matrix = torch.ones(_MATMUL, _MATMUL, dtype=torch.float32, device=cpu)
    (seconds,) = medians(lambda: (timed(cpu, lambda: matrix @ matrix)[0],))
    return 2 * _MATMUL**3 / seconds


def optimizer_s_per_byte(bench: Bench, sizes: Sequence[int]) -> tuple[float, float]:
    """Seconds for each byte of float32 parameters: of a step of Adam, as torch picks it, and of a sum of gradients.

    The sum is that of the gradients of a micro-batch and those of others. The two take turns, so that neither finds
    in the cache what it left there, as in a step.

    Args:
        bench: Where.
        sizes: Elements of each parameter of the model: many small ones take longer than few large ones.
    """
    try:
        return _optimizer_s_per_byte(bench, sizes)
    except torch.OutOfMemoryError:
        return _optimizer_s_per_byte(bench, [_FEW_ELEMENTS])


def _optimizer_s_per_byte(bench: Bench, sizes: Sequence[int]) -> tuple[float, float]:
    weights = _weights(bench.device, sizes)
    parts = [torch.ones_like(weight) for weight in weights]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.Adam(weights)

    def add() -> None:
        with torch.no_grad():
            for weight, part in zip(weights, parts, strict=True):
                assert weight.grad is not None
                weight.grad.add_(part)

    # To wait for a device may take longer than its work, and in a step nobody waits for it.
    times = _WITHOUT_WAITING if works_by_itself(bench.device) else 1

    def both() -> tuple[float, ...]:
        found = []
        for work in (optimizer.step, add):
            if bench.rest:
                time.sleep(_REST_S)
            found.append(timed(bench.device, lambda w=work: [w() for _ in range(times)])[0] / times)  # type: ignore[misc]
        return tuple(found)

    step_s, sum_s = medians(both)
    size_bytes = max(1, sum(weight.numel() * weight.element_size() for weight in weights))
    return step_s / size_bytes, sum_s / size_bytes


def _weights(device: torch.device, sizes: Sequence[int]) -> list[nn.Parameter]:
    """Parameters of such sizes, as many as have room; the least one in any case."""
    least = min(sizes, default=_FEW_ELEMENTS)
    room, kept = _MANY_ELEMENTS, []
    for size in sizes:
        if size <= room:
            kept.append(size)
            room -= size
    return [
        nn.Parameter(torch.ones(size, dtype=torch.float32, device=device))
        for size in kept or [min(least, _MANY_ELEMENTS)]
    ]
