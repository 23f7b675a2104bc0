"""What each placement policy decides, and why."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from lightning_hetero.devices import DeviceSpec, Inventory
from lightning_hetero.errors import InventoryError, PlacementError
from lightning_hetero.graph.find import find_units
from lightning_hetero.placement import (
    ManualPolicy,
    Placement,
    PlacementPolicy,
    Problem,
    SinglePolicy,
    get_policy,
    make_plan,
    policy_names,
)
from lightning_hetero.plan import Plan
from lightning_hetero.testing.inventories import inventory_of


def chain(layers: int, width: int = 10) -> nn.Module:
    """`layers` equal layers; each needs 440 bytes of parameters, 1760 in training with Adam."""
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def decide(policy: PlacementPolicy | str, model: nn.Module, inventory: Inventory, **options: Any) -> Plan:
    policy = get_policy(policy) if isinstance(policy, str) else policy
    return make_plan(policy, Problem(graph=find_units(model), inventory=inventory, **options))


def counts(plan: Plan) -> list[tuple[str, int]]:
    return [(stage.device, len(stage.units)) for stage in plan.stages]


def test_even_gives_every_device_as_many_units() -> None:
    assert counts(decide("even", chain(7), inventory_of("a", "b", "c"))) == [("a", 3), ("b", 2), ("c", 2)]
    assert counts(decide("even", chain(2), inventory_of("a", "b", "c"))) == [("a", 1), ("b", 1)]


def test_single_takes_the_first_device_that_holds_the_model() -> None:
    small_first = inventory_of("a", "b", "c", a="1KB", b="100KB", c="100KB")
    assert counts(decide("single", chain(3), small_first)) == [("b", 3)]
    assert counts(decide(SinglePolicy("c"), chain(3), small_first)) == [("c", 3)]
    with pytest.raises(InventoryError, match=r"unknown device 'z'; the inventory has: a, b, c"):
        decide(SinglePolicy("z"), chain(3), small_first)


def test_memory_first_fills_devices_in_order_under_their_limits() -> None:
    inventory = inventory_of("a", "b", "c", a=3 * 1760, b=1760, c=99 * 1760)
    assert counts(decide("memory_first", chain(6), inventory)) == [("a", 3), ("b", 1), ("c", 2)]


def test_memory_first_counts_what_the_optimizer_keeps() -> None:
    inventory = inventory_of("a", "b", a=3 * 1760, b="1MB")
    assert counts(decide("memory_first", chain(6), inventory, optimizer_factor=0.0)) == [("a", 6)]


def test_memory_first_fills_gaps_when_the_order_leaves_no_room() -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(30, 30), nn.Linear(10, 10))
    inventory = inventory_of("a", "b", a=2 * 1760, b=15_000)
    plan = decide("memory_first", model, inventory)
    assert [stage.device for stage in plan.stages] == ["a", "b", "a"]
    assert "Some units fill gaps on earlier devices, since they do not fit in order." in plan.notes


def test_auto_says_why_devices_stay_idle_or_are_used() -> None:
    plan = decide("auto", chain(3), inventory_of("a", "b"))
    assert plan.notes == (
        "The model fits on a, so it stays there.",
        "b stays idle: stages run one after the other, so using more devices would only add transfers.",
    )
    spread = decide("auto", chain(3), inventory_of("a", "b", a=2 * 1760, b=2 * 1760))
    assert counts(spread) == [("a", 2), ("b", 1)]
    assert spread.notes[0] == "The model fits on no single device, so it is spread by memory."


MODEL = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "head": nn.Linear(2, 2)})
PLACES = inventory_of("cuda:0", "cuda:1", "cpu")


@pytest.mark.parametrize(
    ("device_map", "expected"),
    [
        ({"body": "cuda:1", "head": "cpu"}, ["cuda:1", "cuda:1", "cpu"]),
        ({"": "cpu"}, ["cpu", "cpu", "cpu"]),
        ({"*": "cpu", "head": "cuda:0"}, ["cpu", "cpu", "cuda:0"]),
        ({"body": "cpu", "body.1": "cuda:1", "": "cuda:0"}, ["cpu", "cuda:1", "cuda:0"]),
        ({"body": 1, "head": 0}, ["cuda:1", "cuda:1", "cuda:0"]),
        ({"head": "cpu", "": "auto"}, ["cuda:0", "cuda:0", "cpu"]),
        ({"body": "auto", "head": "cpu"}, ["cuda:0", "cuda:0", "cpu"]),
    ],
)
def test_manual_obeys_a_device_map(device_map: dict[str, str | int], expected: list[str]) -> None:
    assert list(decide(ManualPolicy(device_map), MODEL, PLACES).device_of.values()) == expected


def test_auto_in_a_device_map_keeps_to_the_room_that_is_left() -> None:
    inventory = inventory_of("a", "b", a=2 * 1760, b="1MB")
    plan = decide(ManualPolicy({"0": "a", "1": "a", "": "auto"}), chain(4), inventory)
    assert counts(plan) == [("a", 2), ("b", 2)]


def test_a_tied_unit_follows_the_one_that_is_named() -> None:
    model = nn.ModuleDict({"embed": nn.Linear(3, 3), "body": nn.Linear(3, 3), "head": nn.Linear(3, 3)})
    model["head"].weight = model["embed"].weight
    plan = decide(ManualPolicy({"head": "cpu", "": "cuda:0"}), model, PLACES)
    assert plan.device_of == {"embed": "cpu", "body": "cuda:0", "head": "cpu"}
    with pytest.raises(PlacementError, match=r"'embed' on 'cuda:1' and 'head' on 'cpu' share a parameter"):
        decide(ManualPolicy({"embed": "cuda:1", "head": "cpu", "": "cuda:0"}), model, PLACES)


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({}, r"needs a device map, for example .* Units of this model: 'body.0', 'body.1', 'head'"),
        ({"body": "cpu"}, r"leaves out 'head'. Add them, or a default for the rest: \"\": \"auto\""),
        ({"haed": "cpu", "": "cpu"}, r"no unit is named 'haed' .* Did you mean 'head'\?"),
        ({"": "cuda:7"}, r"entry '': unknown device 'cuda:7'. Devices here: cuda:0, cuda:1, cpu"),
        ({"": "cuda"}, r"'cuda' could be any of cuda:0, cuda:1; write which one"),
        ({"": "disk"}, r"'disk' offload is for inference only"),
        ({"": 5}, r"unknown device 'cuda:5'"),
    ],
)
def test_a_wrong_device_map_is_explained(device_map: dict[str, str | int], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        decide(ManualPolicy(device_map), MODEL, PLACES)


def test_a_number_needs_an_accelerator() -> None:
    with pytest.raises(PlacementError, match=r"0 means accelerator number 0, and there is none"):
        decide(ManualPolicy({"": 0}), MODEL, inventory_of("cpu"))


def test_a_name_inside_a_unit_says_what_to_place_instead() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    with pytest.raises(
        PlacementError, match=r"'attention.out_proj' lies inside 'attention', which stays whole because"
    ):
        decide(ManualPolicy({"attention.out_proj": "cpu", "": "cpu"}), model, PLACES)


def test_devices_that_cannot_train_are_left_alone() -> None:
    dla = DeviceSpec(name="dla:0", kind="dla", memory_bytes=1 << 40, torch_device=None, trainable=False)
    inventory = Inventory(devices=(dla, *inventory_of("a", "b").devices))
    for name in ("auto", "single", "even", "memory_first"):
        assert "dla:0" not in decide(name, chain(4), inventory).device_of.values()


def test_an_unknown_policy_lists_those_that_exist() -> None:
    assert {"auto", "even", "manual", "memory_first", "single"} <= set(policy_names())
    message = r"unknown placement policy 'evn'. Did you mean 'even'\? Known are .*auto, dag, even, "
    with pytest.raises(PlacementError, match=message):
        get_policy("evn")


def test_a_policy_that_forgets_a_unit_is_named() -> None:
    class Forgetful:
        name = "forgetful"

        def place(self, problem: Problem) -> Placement:
            return Placement(device_of={"0": "a"})

    with pytest.raises(PlacementError, match=r"policy 'forgetful' gave no device to '1' and 1 more units"):
        decide(Forgetful(), chain(3), inventory_of("a"))
