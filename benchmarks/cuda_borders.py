"""What copies at the borders between the CPU and a CUDA device cost, on streams of their own against plain ones.

    python benchmarks/cuda_borders.py
    python benchmarks/cuda_borders.py --quick

Copies: microseconds, by size, up to the device and down from it. `idle`: until the value is there, with nothing else to
do for the device. `busy`: the device has work, launched after the tensor was made; for as long the thread that copies
is held up. A plain copy waits for all of that work, which is about 10 ms.

Pipelines: two stages of a wide perceptron that take about the same time, one on the CPU and one on the device, in four
micro-batches, in either order; written as an nn.Sequential, whose parts hand tensors straight on, and with a forward
of its own. `plain_ratio` is the time of a step with plain copies over that with copies on streams of their own;
`sum_ratio` is the time of the two stages one after the other over that of a step (2 is perfect, 1.6 is what four
micro-batches allow if nothing else takes time); `alone_ratio` is the time of the whole model on the device alone over
that of a step. A CPU that has half of the work makes a model slower than a device that could hold it: this is about
borders, not about what to place where.

Without a CUDA device it says so, and has no figures.
"""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from time import perf_counter

import torch
from report import is_quick, report
from torch import Tensor, nn

from lightning_hetero.devices import resolve_devices
from lightning_hetero.graph.find import find_units
from lightning_hetero.placement import ManualPolicy, Problem, make_plan
from lightning_hetero.runtime.copies import mark, plain_copies, send
from lightning_hetero.runtime.placed import Pipelining, PlacedModel

DEVICE, CPU = torch.device("cuda:0"), torch.device("cpu")
SIZES = {"4k": 4 << 10, "64k": 64 << 10, "256k": 256 << 10, "1m": 1 << 20, "16m": 16 << 20, "64m": 64 << 20}
QUICK_SIZES = ("4k", "256k", "16m")
BUSY_CYCLES = 20_000_000
REPETITIONS, QUICK_REPETITIONS = 15, 5
WIDTH, ROWS, CPU_LAYERS, MOST_LAYERS, MICRO_BATCHES = 2048, 1024, 2, 200, 4


class Stages(nn.Module):
    """Two stages, called by a forward of user code."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        """One stage after the other."""
        hidden = self.first(x)
        return self.second(hidden)  # type: ignore[no-any-return]


class Chain(nn.Sequential):
    """Two stages, called by torch."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.add_module("first", first)
        self.add_module("second", second)


def finish(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def copy_us(tensor: Tensor, target: torch.device, *, plain: bool, busy: bool) -> float:
    """Time of one copy."""
    made_at = mark(tensor.device)
    finish(DEVICE)
    if busy:
        torch.cuda._sleep(BUSY_CYCLES)
    start_s = perf_counter()
    arriving = None
    if plain:
        tensor.to(target)
    else:
        arriving = send([tensor], [target], made_at)
        if target == CPU:
            arriving.take()
    if not busy:
        finish(DEVICE)
    seconds = perf_counter() - start_s
    if arriving is not None and target != CPU:
        arriving.take()
    finish(DEVICE)
    return seconds * 1e6


def copies(sizes: tuple[str, ...], repetitions: int) -> dict[str, float]:
    """Times of copies of all sizes."""
    figures = {}
    for size in sizes:
        host = torch.randn(SIZES[size] // 4)
        for way, tensor, target in (("up", host, DEVICE), ("down", host.to(DEVICE), CPU)):
            for state in ("idle", "busy"):
                times: dict[str, list[float]] = {"plain": [], "own": []}
                for _ in range(repetitions + 2):
                    for kind, found in times.items():
                        found.append(copy_us(tensor, target, plain=kind == "plain", busy=state == "busy"))
                for kind, found in times.items():
                    figures[f"{way}_{size}_{state}_{kind}_us"] = statistics.median(found[2:])
        print(f"copies of {size} done", flush=True)
    return figures


def step_s(model: nn.Module, batch: Tensor) -> float:
    """Time of a forward and backward."""
    finish(DEVICE)
    start_s = perf_counter()
    model(batch).square().mean().backward()
    finish(DEVICE)
    return perf_counter() - start_s


def layers(count: int) -> nn.Sequential:
    """A stage, made on the device, which is quicker at drawing its weights."""
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH, device=DEVICE), nn.ReLU()) for _ in range(count)))


def stage_s(count: int, device: torch.device, repetitions: int) -> float:
    """Time of a stage alone, in the same micro-batches."""
    stage = layers(count).to(device)
    parts = torch.randn(ROWS, WIDTH, device=device).requires_grad_().chunk(MICRO_BATCHES)

    def work() -> float:
        finish(device)
        start_s = perf_counter()
        for part in parts:
            stage(part.detach().requires_grad_()).square().mean().backward()
        finish(device)
        return perf_counter() - start_s

    return statistics.median([work() for _ in range(repetitions + 1)][1:])


def pipeline(
    make: Callable[[nn.Module, nn.Module], nn.Module], stages: dict[str, int], repetitions: int
) -> tuple[float, float, float]:
    """Seconds of a step with plain copies, with others, and on the device alone. `stages`: layers by device."""
    names = list(stages)
    model = make(*(layers(count) for count in stages.values()))
    alone = copy.deepcopy(model)
    inventory = resolve_devices(f"{DEVICE},cpu")
    plan = make_plan(
        ManualPolicy({"first": names[0], "second": names[1]}), Problem(graph=find_units(model), inventory=inventory)
    )
    placed = PlacedModel(model, plan, Pipelining(micro_batches=MICRO_BATCHES))
    placed.place()
    batch = torch.randn(ROWS, WIDTH, device=DEVICE)
    times: dict[str, list[float]] = {"plain": [], "own": [], "alone": []}
    try:
        step_s(model, batch)  # finds out what may be cut
        assert placed.engine is not None
        assert placed.engine.cut_calls == 1, placed.engine.reasons
        for _ in range(repetitions + 2):
            for kind, found in times.items():
                with plain_copies() if kind == "plain" else nullcontext():
                    found.append(step_s(alone if kind == "alone" else model, batch))
    finally:
        placed.release(CPU)
    plain_s, own_s, alone_s = (statistics.median(found[2:]) for found in times.values())
    return plain_s, own_s, alone_s


def pipelines(repetitions: int) -> dict[str, float]:
    """Figures of all pipelines."""
    cpu_s = stage_s(CPU_LAYERS, CPU, repetitions)
    count = max(1, min(MOST_LAYERS, round(8 * cpu_s / stage_s(8, DEVICE, repetitions))))
    device_s = stage_s(count, DEVICE, repetitions)
    print(f"{CPU_LAYERS} layers on the CPU: {cpu_s:.4f} s; {count} on {DEVICE}: {device_s:.4f} s", flush=True)
    figures = {"stages_ratio": device_s / cpu_s}
    for make in (Chain, Stages):
        for order in ((str(DEVICE), "cpu"), ("cpu", str(DEVICE))):
            stages = {name: CPU_LAYERS if name == "cpu" else count for name in order}
            plain_s, own_s, alone_s = pipeline(make, stages, repetitions)
            name = f"{make.__name__.lower()}_{'cpu_first' if order[0] == 'cpu' else 'cpu_last'}"
            figures[f"{name}_plain_ratio"] = plain_s / own_s
            figures[f"{name}_sum_ratio"] = (cpu_s + device_s) / own_s
            figures[f"{name}_alone_ratio"] = alone_s / own_s
            print(f"{name}: {plain_s:.4f} s plain, {own_s:.4f} s, {alone_s:.4f} s alone", flush=True)
    return figures


def main() -> None:
    quick = is_quick(__doc__)
    if not torch.cuda.is_available():
        print("skipped: torch sees no CUDA device")
        print(json.dumps({"figures": {}}))
        return
    repetitions = QUICK_REPETITIONS if quick else REPETITIONS
    figures = copies(QUICK_SIZES if quick else tuple(SIZES), repetitions)
    report({**figures, **pipelines(repetitions)})


if __name__ == "__main__":
    main()
