"""How much of the speed of two unequal devices comes together when they share the rows of a batch.

    python benchmarks/shares.py
    python benchmarks/shares.py --quick

The model stands on both devices (replicas); one works three times as fast as the other. Work is a sleep in proportion
to the rows, so that only sharing and engine count. Speeds are rows per second: of the fast device alone, of both with
shares 3:1, and of both with equal shares, as data parallelism on equal devices would have it.
"""

from __future__ import annotations

import statistics
import threading

import torch
from report import is_quick, report
from sleeping import ROWS, Stage, timed
from torch import Tensor, nn

from lightning_hetero.devices import resolve_devices
from lightning_hetero.graph.find import find_units
from lightning_hetero.placement import ManualPolicy, Problem, make_plan
from lightning_hetero.runtime.placed import Pipelining, PlacedModel

FAST_S, SLOWER = 0.06, 3  # forward of a batch on the fast device; how many times as long the other one takes
REPETITIONS, QUICK_REPETITIONS = 9, 3


class UnequalStage(Stage):
    """A stage that sleeps for as long as the device needs on which it runs."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        slow = threading.current_thread().name.endswith("emulated:1")
        stage = Stage(FAST_S * (SLOWER if slow else 1))
        stage.weight = self.weight
        return stage(x)  # type: ignore[no-any-return]


def seconds(shares: dict[str, float], repetitions: int) -> float:
    """Median time of a forward and backward with some shares."""
    model = nn.Sequential(UnequalStage(FAST_S))
    inventory = resolve_devices("cpu@speed=1,cpu@speed=1")  # the stages sleep, the devices need not
    problem = Problem(graph=find_units(model), inventory=inventory)
    plan = make_plan(ManualPolicy({"": shares}), problem)
    execution = plan.execution
    pipelining = Pipelining(micro_batches=execution.micro_batches, weights=execution.weights)
    placed = PlacedModel(model, plan, pipelining)
    placed.place()
    batch = torch.randn(ROWS, 4)
    try:
        model(batch).mean().backward()  # finds out what may be cut
        return statistics.median(timed(lambda: model(batch).mean().backward()) for _ in range(repetitions))
    finally:
        placed.release(torch.device("cpu"))


def main() -> None:
    repetitions = QUICK_REPETITIONS if is_quick(__doc__) else REPETITIONS
    torch.set_num_threads(1)
    alone_s = seconds({"emulated:0": 1}, repetitions)
    by_speed_s = seconds({"emulated:0": SLOWER, "emulated:1": 1}, repetitions)
    equal_s = seconds({"emulated:0": 1, "emulated:1": 1}, repetitions)
    sum_of_speeds = 1 + 1 / SLOWER  # in speeds of the fast device
    report(
        {
            "share_of_sum": alone_s / by_speed_s / sum_of_speeds,
            "over_fast_alone": alone_s / by_speed_s,
            "over_equal_shares": equal_s / by_speed_s,
        }
    )


if __name__ == "__main__":
    main()
