"""Small changes to a pipeline that make its simulated step shorter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lightning_hetero.placement.solve.chain_problem import ChainPlan, ChainProblem, ChainStage
from lightning_hetero.placement.solve.proof import never

# Devices in pipeline order with the layer at which each stage stops.
Split = list[tuple[str, int]]


@dataclass(slots=True)
class Effort:
    """What a search may still spend; counted, not timed, so that the same problem gets the same answer everywhere.

    Attributes:
        events: Passes through a stage that may be simulated.
        nodes: Begun plans that may be looked at.
    """

    events: int = 300_000
    nodes: int = 3_000

    @property
    def spent(self) -> bool:
        """Whether nothing is left."""
        return self.events <= 0 or self.nodes <= 0

    def part(self, share: float) -> Effort:
        """Take a share of the events out of this effort."""
        events = int(self.events * share)
        self.events -= events
        return Effort(events=events, nodes=self.nodes)

    def pay(self, problem: ChainProblem, plan: ChainPlan) -> None:
        """Account for one simulation."""
        self.events -= 2 * problem.micro_batches * len(plan)


def improve_step(
    problem: ChainProblem,
    candidates: list[ChainPlan],
    effort: Effort,
    out_of_time: Callable[[], bool] = never,
) -> tuple[ChainPlan, float]:
    """Take the best candidate and change it, one change at a time, as long as its simulated step gets shorter.

    Returns:
        The plan and its step time in seconds.
    """
    best_plan, best = candidates[0], problem.step_time_s(candidates[0])
    for plan in dict.fromkeys(candidates[1:]):
        effort.pay(problem, plan)
        if effort.spent:
            break
        best_plan, best = min((best_plan, best), (plan, problem.step_time_s(plan)), key=lambda pair: pair[1])
    better = True
    while better and not effort.spent:
        better = False
        for plan in _neighbours(problem, best_plan):
            if effort.spent or out_of_time():
                break
            effort.pay(problem, plan)
            if not problem.fits(plan):
                continue
            value = problem.step_time_s(plan)
            if value < best:
                best_plan, best, better = plan, value, True
                break
    return best_plan, best


def _neighbours(problem: ChainProblem, plan: ChainPlan) -> Iterator[ChainPlan]:
    split = [(stage.device, stage.stop) for stage in plan]
    idle = [device.name for device in problem.devices if device.name not in {stage.device for stage in plan}]
    for changed in (*_cuts(split), *_swaps(split), *_others(split, idle), *_fewer(split), *_more(split, idle)):
        yield _stages(changed)


def _stages(split: Split) -> ChainPlan:
    firsts = [0, *(stop for _, stop in split)]
    return tuple(ChainStage(device=d, first=i, stop=j) for (d, j), i in zip(split, firsts, strict=False))


def _cuts(split: Split) -> Iterator[Split]:
    """Move one border."""
    for spot, (device, stop) in enumerate(split[:-1]):
        low = split[spot - 1][1] if spot else 0
        for moved in (stop - 1, stop + 1, stop - 2, stop + 2):
            if low < moved < split[spot + 1][1]:
                yield [*split[:spot], (device, moved), *split[spot + 1 :]]


def _swaps(split: Split) -> Iterator[Split]:
    """Let two devices change places."""
    for one in range(len(split)):
        for other in range(one + 1, len(split)):
            devices = [device for device, _ in split]
            devices[one], devices[other] = devices[other], devices[one]
            if devices != [device for device, _ in split]:
                yield [(device, stop) for device, (_, stop) in zip(devices, split, strict=True)]


def _others(split: Split, idle: list[str]) -> Iterator[Split]:
    """Let an idle device take over a stage."""
    for spot, (_, stop) in enumerate(split):
        for device in idle:
            yield [*split[:spot], (device, stop), *split[spot + 1 :]]


def _fewer(split: Split) -> Iterator[Split]:
    """Give a stage to one of its neighbours."""
    for spot in range(len(split) - 1):
        (one, _), (other, stop) = split[spot : spot + 2]
        for device in (one, other):
            yield [*split[:spot], (device, stop), *split[spot + 2 :]]


def _more(split: Split, idle: list[str]) -> Iterator[Split]:
    """Put an idle device to work before or behind a stage, with half of its layers."""
    low = 0
    for spot, (device, stop) in enumerate(split):
        middle = (low + stop) // 2
        for new in idle if low < middle else ():
            yield [*split[:spot], (new, middle), (device, stop), *split[spot + 1 :]]
            yield [*split[:spot], (device, middle), (new, stop), *split[spot + 1 :]]
        low = stop
