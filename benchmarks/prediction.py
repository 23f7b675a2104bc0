"""How near predictions come: seconds of a step and peak memory of plans, predicted from a profile and then measured.

    python benchmarks/prediction.py
    python benchmarks/prediction.py --quick

Models (MLP, convnet, transformer) x placements x micro-batches, on devices that the CPU plays ("emulated": two unequal
ones, both so slow that they sleep most of the time, as devices of their own would leave the CPU alone) and on the
emulated accelerator with a model of its link ("accelerator"), whose allocator knows the peak. There are three rounds.
In each, a model is profiled once for all of its plans, which then run, with some steps of warm-up: the machine is not
as fast in every minute, so that what was predicted is held against what was measured soon after. The error of a plan is
the median of the rounds' ratios of the two, less 1; the figure is the mean of the absolute values. Ranks are those of
medians, compared over the plans of each model (Spearman), and the mean is taken. The plans with everything on one
device are one plan, whatever the number of micro-batches: how far their seconds are from their median is the noise of
the machine.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from operator import truediv

import torch
from report import is_quick, report
from torch import Tensor, nn

from lightning_hetero.devices import Inventory, resolve_devices
from lightning_hetero.devices.measured import measured_inventory
from lightning_hetero.graph.find import find_units
from lightning_hetero.placement import ManualPolicy, Problem, make_plan
from lightning_hetero.plan.forecast import Execution, Forecast
from lightning_hetero.profile.measure import measure_model
from lightning_hetero.profile.recording import Recording
from lightning_hetero.runtime.modes import activate, deactivate
from lightning_hetero.runtime.placed import Pipelining, PlacedModel
from lightning_hetero.simulate.costs import Costs
from lightning_hetero.simulate.predict import predict
from lightning_hetero.strategy.first_steps import CALL_OVERHEAD_S
from lightning_hetero.testing import EmulatedAccelerator, install_accelerator

# The third one is used by no plan: others are as slow as they are because it is so fast.
EMULATED = "cpu@speed=2,cpu@speed=1,cpu@speed=4"
MICRO_BATCHES, QUICK_MICRO_BATCHES = (1, 2, 4), (1, 4)
PLACEMENTS, QUICK_PLACEMENTS = 4, 2
WARM_UP, STEPS, QUICK_STEPS = 4, 7, 1
ROUNDS, QUICK_ROUNDS = 3, 1
ROUNDING_BYTES = 1 << 16  # of an allocator: less is no underestimation
ROWS = 64


def mlp() -> nn.Module:
    """Eight equal layers. Input (rows, 512)."""
    layers = (nn.Sequential(nn.Linear(512, 512), nn.ReLU()) for _ in range(7))
    return nn.Sequential(*layers, nn.Linear(512, 10))


def convnet() -> nn.Module:
    """Narrow and large at first, wide and small in the end. Input (rows, 3, 24, 24)."""
    channels = (3, 16, 16, 32, 32, 64)
    blocks = (
        nn.Sequential(nn.Conv2d(a, b, 3, stride=2 if b > a > 3 else 1, padding=1), nn.ReLU())
        for a, b in pairwise(channels)
    )
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(64 * 6 * 6, 10))


class Transformer(nn.Module):
    """Six layers called by a loop. Input (rows, 16) of integers below 64."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 64)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True) for _ in range(6)
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, lambda: torch.randn(ROWS, 512)),
    "convnet": (convnet, lambda: torch.randn(ROWS, 3, 24, 24)),
    "transformer": (Transformer, lambda: torch.randint(64, (ROWS, 16))),
}


def placements(names: Sequence[str], one: str, other: str) -> list[dict[str, str]]:
    """All on one device, cut in the middle, cut late, and the other way round."""
    half, late = len(names) // 2, 3 * len(names) // 4
    return [
        dict.fromkeys(names, one),
        {name: one if spot < half else other for spot, name in enumerate(names)},
        {name: one if spot < late else other for spot, name in enumerate(names)},
        {name: other if spot < half else one for spot, name in enumerate(names)},
    ]


def is_single(device_of: Mapping[str, str]) -> bool:
    """Whether everything is on one device."""
    return len(set(device_of.values())) == 1


class Bench:
    """One model on some devices: its profile, and what its plans take.

    Args:
        name: Of the model.
        inventory: The devices.
        places: The two that plans use.
    """

    def __init__(self, name: str, inventory: Inventory, places: tuple[str, str]) -> None:
        self.make, make_batch = MODELS[name]
        self.inventory = inventory
        torch.manual_seed(0)
        self.x, self.y = make_batch(), torch.randint(10, (ROWS,))
        module = self.make()
        self.graph = find_units(module)
        self.placements = placements(self.graph.names, *places)
        for _ in range(2):  # the first call is slower
            nn.functional.cross_entropy(module(self.x), self.y).backward()
        with Recording(module, self.graph) as recording:
            recording.ends_in(nn.functional.cross_entropy(module(self.x), self.y))
        profile = measure_model(recording, inventory, call_overhead_s=CALL_OVERHEAD_S)
        self.costs = Costs(graph=self.graph, inventory=inventory, profile=profile, accumulates=False)

    def loss(self, module: nn.Module) -> Tensor:
        """Of one batch, which lies on the root."""
        root = str(self.inventory.root.torch_device)
        return nn.functional.cross_entropy(module(self.x.to(root)), self.y.to(root))

    def forecast(self, device_of: Mapping[str, str], micro_batches: int) -> Forecast:
        """What a plan will take."""
        execution = Execution(micro_batches=micro_batches, schedule="forward" if micro_batches > 1 else "whole")
        return predict(self.costs, device_of, execution).forecast

    def measured(
        self, device_of: Mapping[str, str], micro_batches: int, steps: int, accelerator: EmulatedAccelerator | None
    ) -> tuple[list[float], list[int]]:
        """Seconds of each step, and the peak of each device of the accelerator above what lay there before."""
        gc.collect()
        module = self.make()
        problem = Problem(graph=find_units(module), inventory=self.inventory)
        before = _used(accelerator)
        placed = PlacedModel(
            module, make_plan(ManualPolicy(dict(device_of)), problem), Pipelining(micro_batches=micro_batches)
        )
        placed.place()
        reconciler = placed.reconciler()
        if reconciler is not None:
            activate(reconciler)
        optimizer = torch.optim.Adam(module.parameters())
        found = []
        try:
            for _ in range(min(WARM_UP, 2 * steps) + steps):
                begun_s = time.perf_counter()
                loss = self.loss(module)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(time.perf_counter() - begun_s)
            peaks = [_peak(accelerator, index) - used for index, used in enumerate(before)]
        finally:
            if reconciler is not None:
                deactivate(reconciler)
            placed.release(torch.device("cpu"))
        return found[-steps:], peaks


def _used(accelerator: EmulatedAccelerator | None) -> list[int]:
    """Bytes in use on each device of the accelerator, from where peaks count from now on."""
    if accelerator is None:
        return []
    module = torch.get_device_module(accelerator.name)
    for index in range(accelerator.device_count):
        module.reset_peak_memory_stats(index)
    return [accelerator.stats(index).used_bytes for index in range(accelerator.device_count)]


def _peak(accelerator: EmulatedAccelerator | None, index: int) -> int:
    assert accelerator is not None
    return accelerator.stats(index).peak_bytes


def rank_correlation(found: Sequence[float], expected: Sequence[float]) -> float:
    """Spearman's; equal values share the mean of their ranks."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [
            sum(other < value for other in values) + sum(other == value for other in values) / 2 for value in values
        ]

    return statistics.correlation(ranks(found), ranks(expected))


def compare(
    where: str, inventory: Inventory, places: tuple[str, str], accelerator: EmulatedAccelerator | None, quick: bool
) -> dict[str, float]:
    """All plans on some devices."""
    errors, ranks, noises, memory, too_bright = [], [], [], [], 0
    for name in list(MODELS)[: 1 if quick else None]:
        forecasts: dict[tuple[int, int], list[Forecast]] = {}
        seconds: dict[tuple[int, int], list[float]] = {}
        peaks: dict[tuple[int, int], list[int]] = {}
        placed: list[dict[str, str]] = []
        for _ in range(QUICK_ROUNDS if quick else ROUNDS):
            bench = Bench(name, inventory, places)
            placed = bench.placements[: QUICK_PLACEMENTS if quick else PLACEMENTS]
            for at, device_of in enumerate(placed):
                for micro_batches in QUICK_MICRO_BATCHES if quick else MICRO_BATCHES:
                    steps = QUICK_STEPS if quick else STEPS
                    taken_s, found = bench.measured(device_of, micro_batches, steps, accelerator)
                    plan = at, micro_batches
                    forecasts.setdefault(plan, []).append(bench.forecast(device_of, micro_batches))
                    seconds.setdefault(plan, []).append(statistics.median(taken_s))
                    peaks[plan] = list(map(max, found, peaks.get(plan, found)))
        pairs = []
        for (at, micro_batches), taken_s in seconds.items():
            forecast = forecasts[at, micro_batches][-1]
            expected_s = [each.step_s for each in forecasts[at, micro_batches]]
            expected, measured = statistics.median(expected_s), statistics.median(taken_s)
            pairs.append((expected, measured))
            # Of one round each: the machine is not as fast in every minute.
            errors.append(abs(statistics.median(map(truediv, expected_s, taken_s)) - 1))
            print(
                f"{where:<12}{name:<12}{at} M={micro_batches}  predicted {expected * 1e3:7.1f} ms, measured "
                f"{measured * 1e3:7.1f} ms  {forecast.bottleneck}"
            )
            by_name = {device.device: device.memory_bytes for device in forecast.devices}
            for index, peak in enumerate(peaks[at, micro_batches]):
                bytes_expected = by_name.get(f"dev:{index}", 0)
                if peak and bytes_expected:
                    memory.append(bytes_expected / peak - 1)
                    too_bright += bytes_expected < peak - ROUNDING_BYTES
                    print(
                        f"{'':<12}dev:{index} predicted {bytes_expected / 2**20:7.2f} MiB, measured {peak / 2**20:7.2f}"
                    )
        same = [statistics.median(taken_s) for (at, _), taken_s in seconds.items() if is_single(placed[at])]
        noises += [abs(measured_s / statistics.median(same) - 1) for measured_s in same]
        ranks.append(rank_correlation([a for a, _ in pairs], [b for _, b in pairs]))
    figures = {
        f"{where}_step_error": statistics.mean(errors),
        f"{where}_rank": statistics.mean(ranks),
        f"{where}_noise": max(noises),
    }
    if memory:
        figures["memory_error"] = statistics.mean(map(abs, memory))
        figures["memory_worst"] = max(memory, key=abs)
        figures["memory_too_bright"] = float(too_bright)
    return figures


def main() -> None:
    quick = is_quick(__doc__)
    torch.set_num_threads(1)
    inventory = resolve_devices(EMULATED)
    figures = compare("emulated", inventory, (inventory.names[0], inventory.names[1]), None, quick)
    accelerator = install_accelerator()
    accelerator.configure(0, slowdown=4, bandwidth_bytes_per_s=2e9, latency_s=1e-4)
    accelerator.configure(1, slowdown=8, bandwidth_bytes_per_s=1e9, latency_s=1e-4)
    there = measured_inventory(resolve_devices("dev:0,dev:1"), cache=False)
    figures |= compare("accelerator", there, ("dev:0", "dev:1"), accelerator, quick)
    report(figures)


if __name__ == "__main__":
    main()
