"""The graph solvers against trying every placement, on random small problems."""

from __future__ import annotations

from collections.abc import Callable
from graphlib import CycleError, TopologicalSorter
from itertools import product
from random import Random

import pytest

from lightning_hetero.errors import InfeasiblePlanError
from lightning_hetero.placement.solve import (
    GraphAnswer,
    GraphDevice,
    GraphPlan,
    GraphProblem,
    latency_s,
    solve_graph,
    solve_latency,
)

BATCHES, PROBLEMS_IN_BATCH = 10, 10


def random_problem(random: Random) -> GraphProblem:
    """Up to 6 nodes on up to 3 devices, one of them perhaps the host; tight memory, groups, pins, backward nodes."""
    nodes = random.randint(1, 6)
    number: Callable[[], float] = random.choice([lambda: random.randint(0, 5), lambda: random.uniform(0.01, 5.0)])
    devices = [
        GraphDevice(
            name=f"device{index}",
            kind=random.choice(["fast", "slow"]),
            memory_bytes=random.choice([random.randint(5, 25), 1000]),
            allowed=None if random.random() < 0.8 else frozenset(v for v in range(nodes) if random.random() < 0.8),
        )
        for index in range(random.randint(1, 2))
    ]
    if random.random() < 0.5:
        devices.append(GraphDevice(name="host", kind="host"))
    seconds = {kind: [number() for _ in range(nodes)] for kind in ("fast", "slow", "host")}
    if random.random() < 0.3:
        seconds["fast"][random.randrange(nodes)] = float("inf")
    forward = nodes if random.random() < 0.7 else random.randint(1, nodes)
    return GraphProblem(
        seconds=seconds,
        transfer_s={kind: [number() / 3 for _ in range(nodes)] for kind in ("fast", "slow")},
        size_bytes=[random.randint(0, 10) for _ in range(nodes)],
        edges=[(a, b) for b in range(nodes) for a in range(b) if random.random() < 0.4],
        devices=tuple(devices),
        together=[random.sample(range(nodes), 2)] if nodes > 1 and random.random() < 0.4 else [],
        backward=frozenset(range(forward, nodes)),
        pins={random.randrange(nodes): random.choice(devices).name} if random.random() < 0.2 else {},
    )


def fitting_plans(problem: GraphProblem) -> list[GraphPlan]:
    devices = {device.name: device for device in problem.devices}

    def fits(plan: GraphPlan) -> bool:
        for node, name in enumerate(plan):
            device = devices[name]
            if device.allowed is not None and node not in device.allowed:
                return False
            if problem.seconds[device.kind][node] == float("inf") or problem.pins.get(node, name) != name:
                return False
        held = {name: sum(problem.size_bytes[v] for v, home in enumerate(plan) if home == name) for name in devices}
        together = all(len({plan[node] for node in group}) == 1 for group in problem.together)
        return together and all(held[name] <= device.memory_bytes for name, device in devices.items())

    return [plan for plan in product(devices, repeat=len(problem.size_bytes)) if fits(plan)]


def loads_s(problem: GraphProblem, plan: GraphPlan) -> dict[str, float]:
    loads = {}
    for device in problem.devices:
        mine = {v for v, home in enumerate(plan) if home == device.name}
        sent = {a for a, b in problem.edges if a in mine and b not in mine}
        taken = {a for a, b in problem.edges if a not in mine and b in mine}
        transfer = problem.transfer_s.get(device.kind, [0.0] * len(plan))
        loads[device.name] = sum(problem.seconds[device.kind][v] for v in mine)
        loads[device.name] += sum(transfer[v] for v in sent | taken)
    return loads


def max_load_s(problem: GraphProblem, plan: GraphPlan) -> float:
    return max(loads_s(problem, plan).values())


def goes_in_one_go(problem: GraphProblem, plan: GraphPlan) -> bool:
    """Whether no device has to wait for another one in the middle of its forward nodes."""
    waits: dict[str, set[str]] = {}
    for a, b in problem.edges:
        if plan[a] != plan[b] and not {a, b} & problem.backward:
            waits.setdefault(plan[b], set()).add(plan[a])
    try:
        TopologicalSorter(waits).prepare()
    except CycleError:
        return False
    return True


def one_call_latency_s(problem: GraphProblem, plan: GraphPlan) -> float:
    """Calls of accelerators and single nodes of the host, each as soon as all it waits for has ended."""
    block = {v: f"node {v}" if home == "host" else home for v, home in enumerate(plan)}
    waits: dict[str, set[str]] = {name: set() for name in block.values()}
    for a, b in problem.edges:
        if block[a] != block[b]:
            waits[block[b]].add(block[a])
    loads = loads_s(problem, plan)
    loads.update({f"node {v}": problem.seconds["host"][v] for v in block})
    ends: dict[str, float] = {}
    try:
        for name in TopologicalSorter(waits).static_order():
            ends[name] = max((ends[other] for other in waits[name]), default=0.0) + loads[name]
    except CycleError:
        return float("inf")
    return max(ends.values())


def check(
    problem: GraphProblem,
    plans: list[GraphPlan],
    price: Callable[[GraphProblem, GraphPlan], float],
    solve: Callable[[GraphProblem], GraphAnswer],
) -> None:
    if not plans:
        with pytest.raises(InfeasiblePlanError):
            solve(problem)
        return
    answer = solve(problem)
    least = min(price(problem, plan) for plan in plans)
    assert answer.plan in plans
    assert price(problem, answer.plan) == pytest.approx(least, rel=1e-9, abs=1e-12)
    assert answer.proof.value == pytest.approx(least, rel=1e-9, abs=1e-12)
    assert answer.proof.lower_bound <= least * (1 + 1e-9)


def problems(batch: int) -> list[GraphProblem]:
    return [random_problem(Random(batch * PROBLEMS_IN_BATCH + number)) for number in range(PROBLEMS_IN_BATCH)]


@pytest.mark.parametrize("batch", range(BATCHES))
def test_free_placement_equals_brute_force(batch: int) -> None:
    for problem in problems(batch):
        check(problem, fitting_plans(problem), max_load_s, solve_graph)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_contiguous_placement_equals_brute_force(batch: int) -> None:
    for problem in problems(batch):
        plans = [plan for plan in fitting_plans(problem) if goes_in_one_go(problem, plan)]
        check(problem, plans, max_load_s, lambda p: solve_graph(p, contiguous=True))


@pytest.mark.parametrize("batch", range(BATCHES))
def test_latency_equals_brute_force(batch: int) -> None:
    for problem in problems(batch):
        plans = [plan for plan in fitting_plans(problem) if one_call_latency_s(problem, plan) < float("inf")]
        check(problem, plans, one_call_latency_s, solve_latency)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_prices_are_those_of_the_definition(batch: int) -> None:
    for problem in problems(batch):
        for plan in fitting_plans(problem)[:20]:
            assert problem.loads_s(plan) == pytest.approx(loads_s(problem, plan))
            assert latency_s(problem, plan) == pytest.approx(one_call_latency_s(problem, plan))
            assert problem.fits(plan)
