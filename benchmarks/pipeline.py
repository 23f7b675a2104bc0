"""How close micro-batches come to what their schedule allows, on stages that sleep instead of working.

A sleeping stage leaves the processor to the engine, as an accelerator would, so that only schedule and engine count. A
stage sleeps in proportion to the rows, and twice as long in the backward. Speed-up is over a plain loop over the same
micro-batches, without the engine: a sleep lasts a little longer than it is told to, and torch needs some time to
differentiate the stages, with or without a pipeline. The ideal speed-up is that of the simulator for the same stages:
all forwards before the first backward for "forward", one forward and one backward in turn for "step".

Of equal stages all end at the same time, and wake threads on other cores, which takes a virtual machine long. So these
run a second time with all threads on one core (Linux), where only the engine is left.

Two stages also run under torch.distributed.pipelining's 1F1B, in two processes, right after ours.
"""

from __future__ import annotations

import statistics

import torch
from cores import one_core
from report import is_quick, report
from sleeping import ROWS, Stage, timed
from torch import Tensor, nn
from torch_pipelining import STAGES, torch_pipeline

from lightning_hetero.devices import resolve_devices
from lightning_hetero.graph.find import find_units
from lightning_hetero.placement import ManualPolicy, Problem, make_plan
from lightning_hetero.runtime.engine.stepper import Stepper
from lightning_hetero.runtime.placed import Pipelining, PlacedModel
from lightning_hetero.schedule import GPipe, OneFOneB
from lightning_hetero.simulate import StageCost, simulate

CASES = {  # forward, in ms
    "40_40": (40, 40),
    "60_20": (60, 20),
    "20_60": (20, 60),
    "30_30_30": (30, 30, 30),
    "20_60_20": (20, 60, 20),
}
MICRO_BATCHES = (4, 8)
REPETITIONS, QUICK_REPETITIONS = 9, 1


class Model(nn.Module):
    """Stages in a row, and a training step."""

    def __init__(self, stages_s: list[float]) -> None:
        super().__init__()
        self.net = nn.Sequential(*map(Stage, stages_s))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:  # noqa: D102
        return self.net(batch).mean()  # type: ignore[no-any-return]


def seconds(stages_s: list[float], micro_batches: int, mode: str, repetitions: int) -> float:
    """Median time of a forward and backward."""
    model = Model(stages_s)
    names = [f"emulated:{index}" for index in range(len(stages_s))]
    where = {f"net.{index}": name for index, name in enumerate(names)}
    inventory = resolve_devices(",".join(["cpu@speed=1"] * len(names)))
    plan = make_plan(ManualPolicy(where), Problem(graph=find_units(model), inventory=inventory))
    placed = PlacedModel(model, plan, Pipelining(micro_batches=micro_batches))
    placed.place()
    assert placed.engine is not None
    stepper = Stepper(placed.engine, model, "training_step", OneFOneB(), (), ())
    batch = torch.randn(ROWS, 4)

    def step() -> Tensor:
        if mode == "forward":
            return model.training_step(batch, 0)
        result = stepper.run((batch, 0), 1.0)
        assert result is not None
        assert result.loss is not None
        return result.loss

    try:
        step().backward()  # finds out what may be cut
        return statistics.median(timed(lambda: step().backward()) for _ in range(repetitions))
    finally:
        stepper.close()
        placed.release(torch.device("cpu"))


def plain_s(stages_s: list[float], micro_batches: int, repetitions: int) -> float:
    """Median time of the same in a plain loop: one stage and one micro-batch after the other."""
    model = Model(stages_s)
    batch = torch.randn(ROWS, 4)

    def step() -> None:
        for part in batch.chunk(micro_batches):
            (model.training_step(part, 0) / micro_batches).backward()

    step()
    return statistics.median(timed(step) for _ in range(repetitions))


def ideal_s(stages_s: list[float], micro_batches: int, mode: str) -> float:
    """What the simulator says if nothing but the stages takes time."""
    costs = [
        StageCost(device=str(index), forward_s=batch_s / micro_batches, backward_s=2 * batch_s / micro_batches)
        for index, batch_s in enumerate(stages_s)
    ]
    return simulate(costs, GPipe() if mode == "forward" else OneFOneB(), micro_batches).makespan_s


def shares_of_ideal(stages_s: list[float], micro_batches: int, repetitions: int) -> tuple[dict[str, float], float]:
    """The share of the ideal speed-up in each mode, beside "plain", which is the plain loop's time by that of its naps.

    Returns:
        The shares, and the seconds of the faster mode.
    """
    loop_s = plain_s(stages_s, micro_batches, repetitions)
    slept_s = 3 * sum(stages_s)
    ours_s = {mode: seconds(stages_s, micro_batches, mode, repetitions) for mode in ("forward", "step")}
    shares = {"plain": loop_s / slept_s}
    for mode, mode_s in ours_s.items():
        ideal_speedup = slept_s / ideal_s(stages_s, micro_batches, mode)
        shares[mode] = loop_s / mode_s / ideal_speedup
    return shares, min(ours_s.values())


def main() -> None:
    quick = is_quick(__doc__)
    torch.set_num_threads(1)
    repetitions = QUICK_REPETITIONS if quick else REPETITIONS
    figures: dict[str, float] = {}
    with torch_pipeline() as theirs:
        for name, stages_ms in CASES.items():
            stages_s = [stage_ms / 1000 for stage_ms in stages_ms]
            for micro_batches in MICRO_BATCHES:
                point = f"{name}_{micro_batches}"
                shares, best_s = shares_of_ideal(stages_s, micro_batches, repetitions)
                figures |= {f"{what}_{point}": share for what, share in shares.items()}
                if len(stages_s) == STAGES:
                    torch_s = theirs.seconds(stages_s, micro_batches, repetitions)
                    figures[f"torch_ratio_{point}"] = torch_s / best_s
                if len(set(stages_s)) == 1 and micro_batches == max(MICRO_BATCHES):
                    with one_core():
                        shares, _ = shares_of_ideal(stages_s, micro_batches, repetitions)
                    figures |= {f"one_core_{what}_{point}": share for what, share in shares.items()}
    report(figures)


if __name__ == "__main__":
    main()
