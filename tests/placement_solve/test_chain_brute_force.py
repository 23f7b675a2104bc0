"""The chain solver against trying everything, on random small problems."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations, permutations
from random import Random

import pytest

from lightning_hetero.errors import InfeasiblePlanError
from lightning_hetero.placement.solve import (
    ChainDevice,
    ChainLink,
    ChainPlan,
    ChainProblem,
    ChainStage,
    solve_chain,
)

# 50 problems in each of 10 batches: a failure names a batch that takes a second to run again.
BATCHES, PROBLEMS_IN_BATCH = 10, 50


def random_problem(random: Random) -> ChainProblem:
    """Up to 6 layers on up to 4 devices of up to 3 kinds; tight memory, unequal links, pins, untrusted devices."""
    layers, count = random.randint(1, 6), random.randint(1, 4)
    # Whole numbers make ties, fractions make rounding.
    number: Callable[[], float] = random.choice([lambda: random.randint(0, 5), lambda: random.uniform(0.01, 5.0)])
    kinds = [f"kind{index}" for index in range(random.randint(1, 3))]
    devices = tuple(
        ChainDevice(
            name=f"device{index}",
            kind=random.choice(kinds),
            memory_bytes=random.choice([random.randint(5, 60), 1000]),
            allowed=None if random.random() < 0.8 else frozenset(i for i in range(layers) if random.random() < 0.7),
        )
        for index in range(count)
    )
    speeds = [ChainLink(latency_s=number() / 10, bytes_per_s=random.uniform(0.5, 20)) for _ in range(2)]
    names = [device.name for device in devices]
    links = {(a, b): random.choice(speeds) for a in names for b in names if a != b and random.random() < 0.8}
    times = [{kind: [number() for _ in range(layers)] for kind in kinds} for _ in range(3)]
    sizes = [[random.randint(0, 10) for _ in range(layers)] for _ in range(3)]
    return ChainProblem(
        forward_s=times[0],
        backward_s=times[1],
        update_s=times[2] if random.random() < 0.5 else {},
        state_bytes=sizes[0],
        activation_bytes=sizes[1],
        output_bytes=sizes[2],
        devices=devices,
        links=links if random.random() < 0.7 else {},
        micro_batches=random.randint(1, 6),
        schedule=random.choice(["1f1b", "gpipe"]),
        fixed_bytes=random.choice([0, 3]),
        pins={random.randrange(layers): random.choice(names)} if random.random() < 0.2 else {},
    )


def all_plans(problem: ChainProblem) -> Iterator[ChainPlan]:
    """Every way to cut the chain, with every choice and order of devices."""
    names = [device.name for device in problem.devices]
    for count in range(1, min(len(names), problem.layers) + 1):
        for inner in combinations(range(1, problem.layers), count - 1):
            cuts = (0, *inner, problem.layers)
            for order in permutations(names, count):
                yield tuple(
                    ChainStage(device=name, first=first, stop=stop)
                    for name, first, stop in zip(order, cuts, cuts[1:], strict=False)
                )


def fits(problem: ChainProblem, plan: ChainPlan) -> bool:
    devices = {device.name: device for device in problem.devices}
    for index, stage in enumerate(plan):
        device, layers = devices[stage.device], range(stage.first, stage.stop)
        alive = problem.micro_batches
        if problem.schedule == "1f1b":
            alive = min(alive, len(plan) - index)
        need = problem.fixed_bytes + sum(problem.state_bytes[i] + alive * problem.activation_bytes[i] for i in layers)
        if need > device.memory_bytes:
            return False
        if any(device.allowed is not None and i not in device.allowed for i in layers):
            return False
        if any(problem.pins.get(i, stage.device) != stage.device for i in layers):
            return False
    return True


def times(problem: ChainProblem, plan: ChainPlan) -> list[tuple[float, float, float, float, float]]:
    """Forward, backward, sending forward, sending backward and update of every stage."""
    kinds = {device.name: device.kind for device in problem.devices}
    rows = []
    for index, stage in enumerate(plan):
        kind, layers = kinds[stage.device], range(stage.first, stage.stop)
        sends = [0.0, 0.0]
        for spot, (other, layer) in enumerate(((index + 1, stage.stop - 1), (index - 1, stage.first - 1))):
            link = problem.links.get((stage.device, plan[other].device)) if 0 <= other < len(plan) else None
            if link is not None and problem.output_bytes[layer] > 0:
                sends[spot] = link.latency_s + problem.output_bytes[layer] / link.bytes_per_s
        updates = problem.update_s.get(kind, [0.0] * problem.layers)
        rows.append(
            (
                sum(problem.forward_s[kind][i] for i in layers),
                sum(problem.backward_s[kind][i] for i in layers),
                *sends,
                sum(updates[i] for i in layers),
            )
        )
    return rows


def max_load_s(problem: ChainProblem, plan: ChainPlan) -> float:
    return max(sum(row[:4]) for row in times(problem, plan))


def step_formula_s(problem: ChainProblem, plan: ChainPlan) -> float:
    loads = [sum(row[:4]) for row in times(problem, plan)]
    return sum(loads) + (problem.micro_batches - 1) * max(loads)


def step_time_s(problem: ChainProblem, plan: ChainPlan) -> float:
    """The longest path through all that has to wait for each other."""
    rows, micro_batches, last = times(problem, plan), problem.micro_batches, len(plan) - 1
    ends: dict[tuple[str, int, int], float] = {}

    def order(stage: int) -> list[tuple[str, int, int]]:
        ahead = min(micro_batches, last - stage + 1) if problem.schedule == "1f1b" else micro_batches
        work = [("forward", stage, batch) for batch in range(ahead)]
        for batch in range(micro_batches):
            work.append(("backward", stage, batch))
            if batch + ahead < micro_batches:
                work.append(("forward", stage, batch + ahead))
        return work

    before = {
        action: previous
        for stage in range(last + 1)
        for previous, action in zip([None, *order(stage)], order(stage), strict=False)
    }

    def end(action: tuple[str, int, int]) -> float:
        if action not in ends:
            what, stage, batch = action
            previous = before[action]
            ready = end(previous) if previous else 0.0
            ends[action] = max(ready, arrival(what, stage, batch)) + rows[stage][0 if what == "forward" else 1]
        return ends[action]

    arrivals: dict[tuple[str, int, int], float] = {}

    def arrival(what: str, stage: int, batch: int) -> float:
        """When the input or the gradient of a stage is there; a link carries one message at a time."""
        if what == "forward" and stage == 0:
            return 0.0
        if what == "backward" and stage == last:
            return end(("forward", stage, batch))
        if (what, stage, batch) not in arrivals:
            sender = stage - 1 if what == "forward" else stage + 1
            free = arrival(what, stage, batch - 1) if batch else 0.0
            seconds = rows[sender][2 if what == "forward" else 3]
            arrivals[what, stage, batch] = max(free, end((what, sender, batch))) + seconds
        return arrivals[what, stage, batch]

    step = max(end(("backward", stage, micro_batches - 1)) for stage in range(last + 1))
    return step + max(row[4] for row in rows)


OBJECTIVES = {"max_load": max_load_s, "step_formula": step_formula_s, "step_time": step_time_s}


@pytest.mark.parametrize("batch", range(BATCHES))
def test_every_objective_equals_brute_force(batch: int) -> None:
    feasible = 0
    for number in range(PROBLEMS_IN_BATCH):
        problem = random_problem(Random(batch * PROBLEMS_IN_BATCH + number))
        plans = [plan for plan in all_plans(problem) if fits(problem, plan)]
        for objective, price in OBJECTIVES.items():
            if not plans:
                with pytest.raises(InfeasiblePlanError, match="no split of the"):
                    solve_chain(problem, objective)
                continue
            answer = solve_chain(problem, objective)

            assert fits(problem, answer.plan)
            least = min(price(problem, plan) for plan in plans)
            assert price(problem, answer.plan) == pytest.approx(least, rel=1e-9, abs=1e-12)
            assert answer.proof.value == pytest.approx(least, rel=1e-9, abs=1e-12)
            assert answer.proof.optimal
        feasible += bool(plans)
    assert PROBLEMS_IN_BATCH / 3 < feasible < PROBLEMS_IN_BATCH  # both sides are tried
