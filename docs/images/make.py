"""Makes the pictures of docs/pictures.md: python docs/images/make.py [FOLDER].

The devices are played by the CPU, so slow that they sleep most of the time, as devices of their own would leave the CPU
alone. Costs are measured, steps are predicted from them, run and recorded. Takes some ten seconds. Without a folder the
pictures of the documentation are made anew.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hetero.devices import Inventory, resolve_devices
from lightning_hetero.errors import HeteroError
from lightning_hetero.graph.find import find_units
from lightning_hetero.placement import ManualPolicy, Problem, make_plan
from lightning_hetero.plan import Execution, Plan, check_memory
from lightning_hetero.profile.measure import measure_model
from lightning_hetero.profile.recording import Recording
from lightning_hetero.report import write_table_chart
from lightning_hetero.report.figures import gantt, gantt_pair, memory_bars, save, utilisation
from lightning_hetero.runtime.modes import activate, deactivate
from lightning_hetero.runtime.placed import Pipelining, PlacedModel
from lightning_hetero.schedule import Timeline
from lightning_hetero.simulate import Costs, predict
from lightning_hetero.strategy.first_steps import CALL_OVERHEAD_S

DEVICES = "cpu@speed=2,mem=48MiB,cpu@speed=1,mem=24MiB,cpu@speed=4"  # the last one is used by no plan
ROWS, LAYERS, STEPS = 64, 8, 9
X, Y = torch.randn(ROWS, 512), torch.randint(10, (ROWS,))


def model() -> nn.Module:
    """Equal layers. Input (rows, 512)."""
    layers = (nn.Sequential(nn.Linear(512, 512), nn.ReLU()) for _ in range(LAYERS - 1))
    return nn.Sequential(*layers, nn.Linear(512, 10))


def loss(module: nn.Module) -> Tensor:
    """Of one batch."""
    return nn.functional.cross_entropy(module(X), Y)


def costs_on(inventory: Inventory) -> Costs:
    """What the model costs, measured."""
    module = model()
    graph = find_units(module)
    loss(module).backward()  # the first call is slower
    with Recording(module, graph) as recording:
        loss(module)
    profile = measure_model(recording, inventory, call_overhead_s=CALL_OVERHEAD_S)
    return Costs(graph=graph, inventory=inventory, profile=profile)


def planned(costs: Costs, on_first: int, micro_batches: int) -> Plan:
    """The first layers on the first device and the others on the second one, with what that will take."""
    first, second = costs.inventory.names[:2]
    device_of = {name: first if spot < on_first else second for spot, name in enumerate(costs.graph.names)}
    problem = Problem(graph=costs.graph, inventory=costs.inventory, optimizer_factor=2.0)
    execution = Execution(micro_batches=micro_batches, schedule="forward" if micro_batches > 1 else "whole")
    plan = replace(make_plan(ManualPolicy(device_of), problem), execution=execution)
    check_memory(plan, costs.graph)
    return replace(plan, forecast=predict(costs, plan.device_of, execution).forecast)


def run(plan: Plan) -> tuple[float, Timeline]:
    """Seconds of a step, the median of some, and the recording of one of them."""
    module = model()
    placed = PlacedModel(module, plan, Pipelining(micro_batches=plan.execution.micro_batches))
    placed.place()
    reconciler = placed.reconciler()
    if reconciler is not None:
        activate(reconciler)
    optimizer = torch.optim.Adam(module.parameters())
    seconds, timelines = [], []
    try:
        for step in range(STEPS):
            begun_s = time.perf_counter()
            if step == STEPS - 1 and plan.execution.micro_batches > 1:
                with placed.recording() as recording:
                    loss(module).backward()
                timelines.append(recording.timeline)
            else:
                optimizer.zero_grad()
                loss(module).backward()
                optimizer.step()
                seconds.append(time.perf_counter() - begun_s)
    finally:
        if reconciler is not None:
            deactivate(reconciler)
        placed.release(torch.device("cpu"))
    return statistics.median(seconds[4:]), (timelines or [Timeline()])[0]


def sweep(costs: Costs) -> list[dict[str, Any]]:
    """Some plans, predicted and measured."""
    rows = []
    for on_first, micro_batches in ((4, 1), (4, 4), (6, 1), (6, 4), (1, 4)):
        row: dict[str, Any] = {"overrides": f"layers={on_first}+{LAYERS - on_first} micro_batches={micro_batches}"}
        try:
            plan = planned(costs, on_first, micro_batches)
            assert plan.forecast is not None
            row |= {"status": "ok", "predicted_step_s": plan.forecast.step_s, "measured_step_s": run(plan)[0]}
        except HeteroError as error:
            row |= {"status": "failed", "reason": str(error)}
        rows.append(row)
    return rows


def main(folder: Path) -> None:
    """Write all of them into a folder."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    costs = costs_on(resolve_devices(DEVICES))
    plan = planned(costs, 5, 4)
    predicted = predict(costs, plan.device_of, plan.execution).timeline
    for theme in ("light", "dark"):
        save(gantt(predicted, name="Predicted", theme=theme), folder / f"gantt_{theme}.png")
    save(gantt_pair(predicted, run(plan)[1]), folder / "gantt_pair.png")
    save(memory_bars(plan), folder / "memory.png")
    save(utilisation(predicted), folder / "utilisation.png")
    write_table_chart(sweep(costs), folder / "sweep.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
