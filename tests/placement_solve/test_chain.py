"""What the chain solver does beyond small problems, and what it says."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from random import Random

import pytest

from lightning_hetero.errors import InfeasiblePlanError, PlacementError
from lightning_hetero.placement.solve import (
    ChainDevice,
    ChainLink,
    ChainProblem,
    ChainStage,
    Effort,
    chain,
    least_bottleneck_in_order,
    search_orders,
    solve_chain,
)


def made(
    layers: int = 8,
    devices: int = 3,
    *,
    kinds: int = 2,
    seed: int = 0,
    memory_bytes: float = 1000,
    micro_batches: int = 4,
) -> ChainProblem:
    random = Random(seed)
    names = [f"kind{index}" for index in range(kinds)]
    work = [random.uniform(1, 3) for _ in range(layers)]
    chosen = tuple(
        ChainDevice(name=f"device{index}", kind=names[index % kinds], memory_bytes=memory_bytes)
        for index in range(devices)
    )
    link = ChainLink(latency_s=0.1, bytes_per_s=50)
    return ChainProblem(
        forward_s={name: [seconds * (1 + index) for seconds in work] for index, name in enumerate(names)},
        backward_s={name: [2 * seconds * (1 + index) for seconds in work] for index, name in enumerate(names)},
        state_bytes=[random.randint(5, 15) for _ in range(layers)],
        activation_bytes=[random.randint(1, 5) for _ in range(layers)],
        output_bytes=[random.randint(1, 5) for _ in range(layers)],
        devices=chosen,
        links={(a.name, b.name): link for a in chosen for b in chosen if a != b},
        micro_batches=micro_batches,
    )


def test_a_slow_device_stays_idle() -> None:
    problem = made(layers=4, devices=2)
    slow = replace(problem, forward_s={**problem.forward_s, "kind1": [1000.0] * 4})

    assert [stage.device for stage in solve_chain(slow).plan] == ["device0"]


def test_early_stages_keep_more_micro_batches() -> None:
    problem = replace(made(layers=4, devices=2, kinds=1), activation_bytes=[10] * 4, state_bytes=[0] * 4)
    plan = (ChainStage(device="device0", first=0, stop=2), ChainStage(device="device1", first=2, stop=4))

    assert problem.memory_bytes(plan) == [40, 20]
    assert replace(problem, schedule="gpipe").memory_bytes(plan) == [80, 80]
    # With room for 30, the first of two stages may keep one layer of two micro-batches, the second all the others.
    tight = replace(problem, devices=tuple(replace(device, memory_bytes=30) for device in problem.devices))
    assert [(stage.first, stage.stop) for stage in solve_chain(tight).plan] == [(0, 1), (1, 4)]


def test_layers_of_a_trusted_device_go_nowhere_else() -> None:
    problem = made(layers=6, devices=3)
    others = frozenset(range(2, 6))
    trusting = replace(
        problem, devices=(problem.devices[0], *(replace(device, allowed=others) for device in problem.devices[1:]))
    )

    plan = solve_chain(trusting).plan

    assert plan[0].device == "device0"
    assert plan[0].stop >= 2


@pytest.mark.parametrize("seed", range(10))
def test_a_given_order_is_cut_at_the_best_places(seed: int) -> None:
    problem = made(layers=9, devices=4, seed=seed, memory_bytes=70)
    order = Random(seed).sample([device.name for device in problem.devices], 3)
    plans = [
        tuple(ChainStage(device=d, first=a, stop=b) for d, a, b in zip(order, (0, *cuts), (*cuts, 9), strict=True))
        for cuts in combinations(range(1, 9), 2)
    ]
    loads = [problem.max_load_s(plan) for plan in plans if problem.fits(plan)]

    answer = least_bottleneck_in_order(problem, order)

    assert (answer is None) == (not loads)
    if answer is not None:
        assert answer.proof.value == pytest.approx(min(loads))
        assert answer.proof.value == pytest.approx(problem.max_load_s(answer.plan))
        assert [stage.device for stage in answer.plan] == order
        assert problem.fits(answer.plan)


@pytest.mark.parametrize("order", [[], ["device0", "device0"], ["device9"]])
def test_an_order_of_other_devices_is_refused(order: list[str]) -> None:
    with pytest.raises(
        PlacementError, match="an order must name some of the devices device0, device1, device2, each once"
    ):
        least_bottleneck_in_order(made(), order)


@pytest.mark.parametrize("objective", ["max_load", "step_formula", "step_time"])
@pytest.mark.parametrize("seed", range(5))
def test_too_many_kinds_of_devices_give_a_plan_with_a_gap(
    monkeypatch: pytest.MonkeyPatch, seed: int, objective: chain.ChainObjective
) -> None:
    problem = made(layers=12, devices=5, kinds=5, seed=seed, memory_bytes=90)
    exact = solve_chain(problem, objective)
    monkeypatch.setattr(chain, "LARGEST_TABLE", 0)
    monkeypatch.setattr(chain, "SMALL_TABLE", 100)

    answer = solve_chain(problem, objective)

    price = {"max_load": problem.max_load_s, "step_formula": problem.step_formula_s, "step_time": problem.step_time_s}
    assert problem.fits(answer.plan)
    assert answer.proof.value == pytest.approx(price[objective](answer.plan))
    assert answer.proof.lower_bound <= exact.proof.value * (1 + 1e-9)
    assert exact.proof.value * (1 - 1e-9) <= answer.proof.value <= exact.proof.value * 1.1


def test_many_different_devices_are_planned_for() -> None:
    problem = made(layers=30, devices=40, kinds=40, memory_bytes=200)

    answer = solve_chain(problem, effort=Effort(events=20_000))

    assert problem.fits(answer.plan)
    assert answer.proof.method == "search over device orders"
    assert 0 < answer.proof.gap < 1


def test_search_over_orders_obeys_its_seed() -> None:
    problem = made(layers=20, devices=12, kinds=4, memory_bytes=100)

    assert search_orders(problem, seed=1) == search_orders(problem, seed=1)


def test_out_of_time_gives_a_plan_at_once() -> None:
    problem = made(layers=12, devices=4, memory_bytes=90)

    hasty = solve_chain(problem, out_of_time=lambda: True)
    best = solve_chain(problem)

    assert problem.fits(hasty.plan)
    assert hasty.proof.value == pytest.approx(problem.step_time_s(hasty.plan))
    assert hasty.proof.lower_bound <= best.proof.value <= hasty.proof.value


def test_a_chain_that_does_not_fit_says_what_it_needs() -> None:
    with pytest.raises(InfeasiblePlanError) as error:
        solve_chain(replace(made(layers=4, devices=2, kinds=1, memory_bytes=4), state_bytes=[10] * 4))

    assert str(error.value).startswith("no split of the 4 layers fits: one micro-batch alone needs ")
    assert "the 2 devices have 8 B, and no stage may be split over two devices" in str(error.value)
    assert str(error.value).endswith(
        "Add memory or devices, use smaller micro-batches, or loosen pins and allowed layers."
    )


def test_a_layer_without_a_device_is_named() -> None:
    problem = made(layers=3, devices=1)
    nowhere = replace(problem, devices=(replace(problem.devices[0], allowed=frozenset({0, 1})),))

    with pytest.raises(InfeasiblePlanError, match="no device may hold layer 2: pins and allowed layers exclude all"):
        solve_chain(nowhere)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"devices": ()}, "it has 8 layers, 0 devices and 4 micro-batches"),
        ({"micro_batches": 0}, "it has 8 layers, 3 devices and 0 micro-batches"),
        ({"devices": made().devices * 2}, "need names of their own"),
        ({"pins": {0: "elsewhere"}}, "a layer is pinned to 'elsewhere', which is not among the devices device0, "),
    ],
)
def test_nonsense_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        replace(made(), **change)  # type: ignore[arg-type]
