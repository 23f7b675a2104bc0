"""Every wrong request, and the answer that says what exists and what to write."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_hetero.devices import DeviceSpec, Inventory, resolve_devices
from lightning_hetero.errors import InventoryError

GIB = 1024**3
WHAT_EXISTS = "Available: cuda:0 (78.0 GiB), cuda:1 (10.0 GiB), cpu (60.0 GiB)."
WHICH_NAMES = "Write names from this list such as 'cuda:0,cuda:1', or 'auto' for all of them"
WHICH_FORMS = "Write a number of devices, names such as 'cuda:0,cpu' or ['cuda:0', 'cpu']"


def answer(request: Any, machine: Inventory, **options: Any) -> str:
    with pytest.raises(InventoryError) as caught:
        resolve_devices(request, discovered=machine, **options)
    return str(caught.value)


@pytest.mark.parametrize("request_", ["", "  ", [], (), {}, 0, "0", {"devices": []}, {"devices": None}], ids=repr)
def test_a_request_of_nothing_is_answered_with_what_exists(request_: Any, machine: Inventory) -> None:
    assert answer(request_, machine) == (
        f"no device is asked for. {WHAT_EXISTS} Write 'auto' for all of them, or at least one name."
    )


@pytest.mark.parametrize(
    ("request_", "problem", "advice"),
    [
        ("cuda:7", "device 'cuda:7' is not available", WHICH_NAMES),
        ("cuda:0-3", "device 'cuda:2' of 'cuda:0-3' is not available", WHICH_NAMES),
        ("cuda:1-0", "'cuda:1-0' is an empty range", "Write the smaller index first: 'cuda:0-3'"),
        ("cpu:1", "device 'cpu:1' is not available", WHICH_NAMES),
        (
            "npu:0",
            "device 'npu:0' is not available: torch sees no device of kind 'npu'",
            f"{WHICH_NAMES}, or install the torch build and driver for 'npu'",
        ),
        (
            "tpu",
            "device 'tpu' is not available: torch sees no device of kind 'xla'",
            f"{WHICH_NAMES}, or install the torch build and driver for 'xla'",
        ),
        ("cudaa:0", "unknown device 'cudaa:0'", f"Did you mean 'cuda:0'? {WHICH_NAMES}"),
        ("CPU", "unknown device 'CPU'", f"Did you mean 'cpu'? {WHICH_NAMES}"),
        ("toaster", "unknown device 'toaster'", WHICH_NAMES),
        ("cuda;0", "'cuda;0' does not name a device", WHICH_NAMES),
        ("cuda:x", "'cuda:x' does not name a device", WHICH_NAMES),
        (
            "cuda",
            "'cuda' is ambiguous: there are 2 devices of kind 'cuda'",
            "Write 'cuda:0' for one of them, or 'cuda:*' for all of them",
        ),
        (
            torch.device("cuda"),
            "'cuda' is ambiguous: there are 2 devices of kind 'cuda'",
            "Write 'cuda:0' for one of them, or 'cuda:*' for all of them",
        ),
        (
            "gpu",
            "'gpu' is ambiguous: there are 2 devices of kind 'cuda'",
            "Write 'cuda:0' for one of them, or 'cuda:*' for all of them",
        ),
        ("cuda:0,cuda:0", "device 'cuda:0' is asked for twice", "Name it once"),
        (["cuda:*", "gpu:1"], "device 'cuda:1' is asked for twice", "Name it once"),
        ("cpu@name=a,cpu@name=a", "device 'a' is asked for twice", "Name it once"),
        (4, "4 devices are asked for, but there are 3", "Write at most 3, or emulate more: 'cpu@speed=1,mem=2GiB'"),
        ("9", "9 devices are asked for, but there are 3", "Write at most 3, or emulate more: 'cpu@speed=1,mem=2GiB'"),
        (-2, "-2 is not a number of devices", "Write -1 for all of them"),
        ("-2", "-2 is not a number of devices", "Write -1 for all of them"),
    ],
    ids=repr,
)
def test_a_device_that_cannot_be_had_is_answered_with_what_exists_and_what_to_write(
    request_: Any, problem: str, advice: str, machine: Inventory
) -> None:
    assert answer(request_, machine) == f"{problem}. {WHAT_EXISTS} {advice}."


def test_gpu_on_a_machine_without_any_is_not_available(machine: Inventory) -> None:
    text = answer("gpu", Inventory(devices=(machine["cpu"],)))
    assert text.startswith("device 'gpu' is not available: torch sees no device of kind 'cuda'")


@pytest.mark.parametrize("request_", [[0, 1], "0,1", ["0"], (0,), {0: "1GiB"}, ["cpu", 0]], ids=repr)
def test_bare_indices_are_ambiguous(request_: Any, machine: Inventory) -> None:
    assert answer(request_, machine) == (
        "0 in a list of devices is ambiguous: it could count the cuda devices or all devices. "
        "Write names such as 'cuda:0', or one number alone for that many devices."
    )


@pytest.mark.parametrize("request_", [True, False])
def test_a_truth_value_is_not_a_number_of_devices(request_: bool, machine: Inventory) -> None:
    text = answer(request_, machine)
    assert text.startswith(f"devices={request_} is neither a number of devices nor a name. {WHICH_FORMS}")


@pytest.mark.parametrize("request_", [2.0, b"cpu", object, {"cpu"}], ids=repr)
def test_a_value_of_another_type_is_answered_with_the_forms_that_work(request_: Any, machine: Inventory) -> None:
    assert answer(request_, machine).startswith(f"devices={request_!r} is not a device request. {WHICH_FORMS}")


@pytest.mark.parametrize("part", [None, True, 1.5, ["cpu"]], ids=repr)
def test_a_part_of_another_type_is_answered_with_the_forms_that_work(part: Any, machine: Inventory) -> None:
    assert answer(["cpu", part], machine).startswith(f"{part!r} does not name a device. {WHICH_FORMS}")


def test_an_empty_part_between_commas_is_a_mistake(machine: Inventory) -> None:
    assert answer("cuda:0,,cpu", machine).startswith("a device request has an empty part between commas.")


def test_auto_stands_alone(machine: Inventory) -> None:
    text = answer("auto,cpu", machine)
    assert text == "'auto' means all devices, so it stands alone; leave the other names out"


@pytest.mark.parametrize("form", ["in the request", "beside the request"])
@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            {"cuda:1": "30GiB"},
            "the memory limit of 30.0 GiB for 'cuda:1' is more than the 24.0 GiB that it has; write at most that, "
            "or leave the limit out to use what is free (10.0 GiB)",
        ),
        (
            {"cuda:0": "lots"},
            "the memory limit for 'cuda:0': 'lots' is not a size; write bytes or a text such as '24GiB', '500MB' or "
            "'1.5G'",
        ),
        ({"cuda:0": []}, "the memory limit for 'cuda:0': [] is not a size; write bytes or a text such as '24GiB'"),
        ({"cuda:0": 0}, "the memory limit for 'cuda:0' is 0; leave the device out of the request instead"),
        ({"cuda:0": -1}, "the memory limit for 'cuda:0': a size must be a finite number of bytes >= 0, got -1"),
    ],
    ids=repr,
)
def test_a_limit_that_is_no_size_or_too_large_says_both_numbers(
    form: str, limits: dict[str, Any], message: str, machine: Inventory
) -> None:
    text = answer(limits, machine) if form == "in the request" else answer("auto", machine, memory=limits)
    assert text == message


def test_a_limit_for_a_device_that_is_not_used_lists_those_that_are(machine: Inventory) -> None:
    text = answer("cuda:0,cpu", machine, memory={"cuda:1": "1GiB"})
    assert text.startswith("device 'cuda:1' is not available. Available: cuda:0 (78.0 GiB), cpu (60.0 GiB).")


def test_two_limits_for_one_device_are_a_mistake(machine: Inventory) -> None:
    text = answer("auto", machine, memory={"cuda:*": "1GiB", "cuda:1": "2GiB"})
    assert text == "device 'cuda:1' has two memory limits; leave one of them out"


def test_a_limit_keyed_by_an_index_is_a_mistake(machine: Inventory) -> None:
    text = answer("auto", machine, memory={0: "1GiB"})
    assert text == "a memory limit for 0: write the device's name, such as 'cuda:0'"


def test_the_limit_of_an_emulated_device_belongs_into_its_text(machine: Inventory) -> None:
    text = answer({"cpu@speed=1": "2GiB"}, machine)
    assert text == "'cpu@speed=1' is an emulated device; write its memory into it: 'cpu@speed=1,mem=2GiB'"


def test_an_emulated_device_has_no_more_memory_than_it_was_given(machine: Inventory) -> None:
    text = answer("cpu@mem=2GiB", machine, memory={"emulated:0": "4GiB"})
    assert text.startswith("the memory limit of 4.00 GiB for 'emulated:0' is more than the 2.00 GiB that it has")


def test_an_inventory_of_another_machine_cannot_train_here(machine: Inventory) -> None:
    there = Inventory(devices=(DeviceSpec(name="xpu:0", kind="xpu", memory_bytes=GIB, torch_device="xpu:0"),))
    assert answer(there, machine) == (
        f"device 'xpu:0' is not available. {WHAT_EXISTS} To plan for hardware that is elsewhere, "
        "pass must_exist=False; to train, use the devices listed."
    )
    assert resolve_devices(there, discovered=machine, must_exist=False) == there


def test_a_device_described_with_more_memory_than_it_has_is_refused(machine: Inventory) -> None:
    text = answer([{"name": "cuda:1", "memory": "32GiB"}], machine)
    assert text.startswith("the memory limit of 32.0 GiB for 'cuda:1' is more than the 24.0 GiB that it has")


def test_one_device_under_two_names_is_refused(machine: Inventory) -> None:
    text = answer(["cuda:0", {"name": "mine", "kind": "cuda", "torch_device": "cuda:0"}], machine)
    assert text == "devices 'cuda:0' and 'mine' are both 'cuda:0' to torch; leave one of them out"


def test_devices_of_which_none_can_train_are_refused(machine: Inventory) -> None:
    text = answer([{"name": "dla:0", "kind": "dla", "memory": "1GiB"}], machine)
    assert text == "none of the devices can train: dla:0. Add one that torch can train on, such as 'cpu'."
