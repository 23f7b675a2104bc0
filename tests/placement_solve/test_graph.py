"""What the graph solvers do beyond small problems, and what they say."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest

from lightning_hetero.errors import InfeasiblePlanError, PlacementError
from lightning_hetero.placement.solve import (
    GraphDevice,
    GraphProblem,
    graph_intervals,
    graph_series,
    heft,
    latency_s,
    solve_graph,
    solve_latency,
)
from lightning_hetero.placement.solve.graph_anneal import Placement
from lightning_hetero.placement.solve.graph_atoms import together_atoms
from lightning_hetero.placement.solve.graph_calls import Calls

GPU = GraphDevice(name="gpu", kind="gpu")


def made(nodes: int = 60, devices: int = 4, *, seed: int = 0, host: bool = True, room: float = 2.0) -> GraphProblem:
    """A ladder of branches that part and meet; devices of two kinds, with `room` times the memory that is needed."""
    random = Random(seed)
    edges = {(max(0, node - random.randint(1, 6)), node) for node in range(1, nodes)}
    edges |= {(node - 1, node) for node in range(7, nodes, 7)}
    seconds = [random.uniform(0.5, 3) for _ in range(nodes)]
    transfer = [random.uniform(0.1, 0.5) for _ in range(nodes)]
    memory_bytes = room * nodes / devices
    gpus = tuple(
        GraphDevice(name=f"gpu:{index}", kind="fast" if index % 2 else "slow", memory_bytes=memory_bytes)
        for index in range(devices)
    )
    return GraphProblem(
        seconds={"fast": seconds, "slow": [2 * s for s in seconds], "host": [10 * s for s in seconds]},
        transfer_s={"fast": transfer, "slow": transfer},
        size_bytes=[1.0] * nodes,
        edges=sorted(edges),
        devices=(*gpus, GraphDevice(name="cpu", kind="host")) if host else gpus,
        together=[(0, 1), (5, 9)],
    )


def test_parts_that_need_not_be_contiguous_may_be_smaller() -> None:
    """Of three nodes in a row, the outer two are as long as the one between them."""
    row = GraphProblem(
        seconds={"gpu": [2.0, 4.0, 2.0]},
        transfer_s={"gpu": [0.1] * 3},
        size_bytes=[1.0] * 3,
        edges=[(0, 1), (1, 2)],
        devices=(replace(GPU, name="a"), replace(GPU, name="b")),
    )

    parts, free = solve_graph(row, contiguous=True), solve_graph(row)

    assert parts.proof.value == pytest.approx(6.1)
    assert free.proof.value == pytest.approx(4.2)
    assert free.plan[0] == free.plan[2] != free.plan[1]


def test_moves_of_single_nodes_never_make_it_worse() -> None:
    problem = made()

    parts, free = solve_graph(problem, contiguous=True, rounds=1), solve_graph(problem, rounds=1)

    assert problem.fits(parts.plan)
    assert problem.fits(free.plan)
    assert free.proof.lower_bound == parts.proof.lower_bound <= free.proof.value < parts.proof.value
    assert free.proof.value == pytest.approx(problem.max_load_s(free.plan))


def test_the_same_seed_gives_the_same_plan() -> None:
    problem = made()

    assert solve_graph(problem, rounds=1, seed=3) == solve_graph(problem, rounds=1, seed=3)
    assert solve_latency(problem, rounds=1, seed=3) == solve_latency(problem, rounds=1, seed=3)


def test_out_of_time_gives_a_plan_at_once() -> None:
    problem = made()

    for answer in (solve_graph(problem, out_of_time=lambda: True), solve_latency(problem, out_of_time=lambda: True)):
        assert problem.fits(answer.plan)
        assert answer.proof.gap > 0


def test_tight_memory_is_kept_by_swapping() -> None:
    problem = made(host=False, room=1.05)

    answer = solve_graph(problem, rounds=2)

    assert problem.fits(answer.plan)
    assert max(problem.memory_bytes(answer.plan).values()) <= 15.75


def test_devices_in_a_row_do_as_well_as_bags_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """With too many different devices there is no table of bags."""
    problem = made(devices=3)
    bags = solve_graph(problem, contiguous=True, rounds=1)
    monkeypatch.setattr(graph_intervals, "LARGEST_TABLE", 0)

    row = solve_graph(problem, contiguous=True, rounds=1)

    assert problem.fits(row.plan)
    assert row.proof.value == pytest.approx(bags.proof.value, rel=0.02)


def test_latency_without_a_table_of_bags_is_still_found(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = made(nodes=20, devices=2)
    monkeypatch.setattr(graph_series, "LARGEST_TABLE", 0)

    answer = solve_latency(problem)

    assert problem.fits(answer.plan)
    assert answer.proof.value == pytest.approx(latency_s(problem, answer.plan))
    assert answer.proof.method.startswith("0 orders")


def test_branches_run_side_by_side() -> None:
    """Two long branches between two small nodes, on three devices, one call each."""
    chains = [[1, 2, 3, 4], [5, 6, 7, 8]]
    edges = [edge for branch in chains for edge in zip([0, *branch], [*branch, 9], strict=True)]
    problem = GraphProblem(
        seconds={"gpu": [0.1, *[5.0] * 8, 0.1], "host": [1.0] + [50.0] * 8 + [1.0]},
        transfer_s={"gpu": [0.5] * 10},
        size_bytes=[1.0] * 10,
        edges=edges,
        devices=(replace(GPU, name="a"), replace(GPU, name="b"), GraphDevice(name="cpu", kind="host")),
    )

    answer = solve_latency(problem)

    # The host runs both ends: 1 + (0.5 + 20 + 0.5) + 1.
    assert answer.proof.value == pytest.approx(23)
    assert answer.plan[1:5] == (answer.plan[1],) * 4
    assert answer.plan[1] != answer.plan[5]


def test_accelerators_that_wait_for_each_other_have_no_latency() -> None:
    problem = GraphProblem(
        seconds={"gpu": [1.0] * 3},
        transfer_s={"gpu": [0.0] * 3},
        size_bytes=[1.0] * 3,
        edges=[(0, 1), (1, 2)],
        devices=(replace(GPU, name="a"), replace(GPU, name="b")),
    )

    assert latency_s(problem, ("a", "b", "a")) == float("inf")
    assert latency_s(problem, ("a", "a", "b")) == 3.0


def test_loads_and_latency_follow_each_move() -> None:
    problem, random = made(room=100.0), Random(0)
    atoms = together_atoms(problem)
    calls = Calls(Placement(atoms, [4] * atoms.count))
    for _ in range(500):
        atom, target = random.randrange(atoms.count), random.randrange(len(problem.devices))
        if target != calls.placement.homes[atom]:
            calls.move(atom, target)

    plan = atoms.plan(calls.placement.homes)
    fresh = Calls(Placement(atoms, calls.placement.homes))
    assert calls.placement.loads == pytest.approx(list(problem.loads_s(plan).values()))
    assert calls.latency_s() == pytest.approx(fresh.latency_s())
    room = [
        device.memory_bytes - need
        for device, need in zip(problem.devices, problem.memory_bytes(plan).values(), strict=True)
    ]
    assert calls.placement.room_bytes == pytest.approx(room)


@pytest.mark.parametrize("seed", range(5))
def test_heft_makes_a_schedule_that_can_be_obeyed(seed: int) -> None:
    problem = made(seed=seed, room=1.5)

    answer = heft(problem)

    devices = {device.name: device for device in problem.devices}
    assert problem.fits(answer.plan)
    for node, home in enumerate(answer.plan):
        assert answer.end_s[node] - answer.start_s[node] == pytest.approx(problem.seconds[devices[home].kind][node])
    for maker, user in problem.edges:
        way = 0.0
        for name in {answer.plan[maker], answer.plan[user]} if answer.plan[maker] != answer.plan[user] else ():
            way += problem.transfer_s.get(devices[name].kind, [0.0] * problem.nodes)[maker]
        assert answer.start_s[user] >= answer.end_s[maker] + way - 1e-9
    for name in devices:
        slots = sorted((answer.start_s[v], answer.end_s[v]) for v in range(problem.nodes) if answer.plan[v] == name)
        assert all(end <= start + 1e-9 for (_, end), (start, _) in pairwise(slots))
    assert answer.proof.lower_bound <= answer.proof.value == max(answer.end_s)
    # The fastest device alone would run them all one after the other.
    assert answer.proof.value < sum(problem.seconds["fast"])


def test_heft_refuses_a_circle() -> None:
    with pytest.raises(PlacementError, match="the graph goes round in a circle"):
        heft(replace(made(nodes=10), edges=[(0, 1), (1, 0)], together=[]))


def test_heft_refuses_what_does_not_fit() -> None:
    problem = replace(made(nodes=4, devices=2, host=False), size_bytes=[1.0, 1.0, 1.0, 9.0], together=[])

    with pytest.raises(InfeasiblePlanError, match="node 3 needs 9 B with those it must stay together with, and no"):
        heft(problem)


@pytest.mark.parametrize("solve", [solve_graph, solve_latency])
def test_a_graph_that_does_not_fit_says_what_it_needs(solve: object) -> None:
    assert callable(solve)
    problem = replace(made(nodes=10, devices=2, host=False), size_bytes=[3.0] * 10, together=[])

    with pytest.raises(InfeasiblePlanError) as error:
        solve(problem)

    assert "of the 10 nodes was found that fits: they need 30 B, the 2 devices have 20 B" in str(error.value)
    assert str(error.value).endswith("Add memory or devices, or loosen these constraints.")


def test_a_node_without_a_device_is_named() -> None:
    problem = made(nodes=10, devices=2, host=False)
    nowhere = replace(problem, seconds={kind: [*times[:9], float("inf")] for kind, times in problem.seconds.items()})

    with pytest.raises(InfeasiblePlanError, match="no placement of the 10 nodes exists: no device may hold node 9"):
        solve_graph(nowhere)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"devices": ()}, "a graph to place needs a node and a device; it has 60 nodes and 0 devices"),
        ({"devices": (GPU, GPU)}, "need names of their own"),
        ({"pins": {0: "elsewhere"}}, "a node is pinned to 'elsewhere', which is not among the devices gpu:0, "),
        ({"edges": [(0, 60)]}, "leads out of the graph, whose nodes are 0 to 59"),
    ],
)
def test_nonsense_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        replace(made(), **change)  # type: ignore[arg-type]
