"""Hardware by its data sheet, to plan for."""

from __future__ import annotations

import math

import pytest

from lightning_hetero.devices import Inventory, resolve_devices
from lightning_hetero.devices.cards import Card, cards_inventory, is_cards_request, known_cards
from lightning_hetero.devices.origins import DATA_SHEET
from lightning_hetero.errors import InventoryError

GIB = 1024**3
DTYPES = {"float64", "float32", "tfloat32", "float16", "bfloat16"}
ASKED_FOR = (
    *("a100-40gb", "a100-80gb", "h100-sxm", "h100-pcie", "h200", "l4", "l40s", "v100-16gb", "t4", "a10"),
    *("rtx3090", "rtx4090", "rtx5090", "rtx6000-ada", "mi250x", "mi300x"),
)


@pytest.mark.parametrize("card", known_cards().values(), ids=known_cards())
def test_a_card_has_all_its_numbers_and_says_where_they_come_from(card: Card) -> None:
    rates = dict(card.flops_per_s)
    assert {"float32", "float16"} <= rates.keys() <= DTYPES
    assert all(math.isfinite(rate) and rate > 0 for rate in rates.values())
    # Fewer bits are never slower, and tensor cores are never slower than the others.
    assert rates["float32"] <= rates.get("tfloat32", rates["float16"]) <= rates["float16"]
    assert rates.get("bfloat16", rates["float16"]) == rates["float16"]
    assert card.memory_bytes >= 11 * GIB
    assert card.memory_bytes_per_s is not None
    assert card.host_link_bytes_per_s is not None
    assert card.host_link_bytes_per_s < card.memory_bytes_per_s
    assert card.source.startswith(card.product.partition(" ")[0])
    assert card.checked


def test_the_cards_that_people_have_are_known() -> None:
    assert set(ASKED_FOR) <= known_cards().keys()


def test_cards_become_devices_in_the_order_in_which_they_are_written() -> None:
    inventory = cards_inventory("2xrtx4090+1xa100-80gb")
    assert inventory.names == ("cuda:0", "cuda:1", "cuda:2")
    assert [device.label[-12:] for device in inventory] == ["RTX 4090 24GB"[-12:]] * 2 + ["A100 SXM 80GB"[-12:]]
    assert {(device.kind, device.measured, device.trainable) for device in inventory} == {("cuda", DATA_SHEET, True)}
    first, last = inventory.devices[0], inventory.devices[2]
    assert first.total_memory_bytes == 24 * GIB
    assert first.memory_bytes == 24 * GIB - GIB // 2  # the reserve of a real one
    assert dict(last.flops_per_s)["bfloat16"] == 312e12
    assert last.memory_bytes_per_s == 2.039e12
    assert last.speed == 1
    assert first.speed == pytest.approx(82.6 / 19.5)
    assert inventory.link("cuda:0", "cuda:2").measured == DATA_SHEET
    assert inventory.link("cuda:0", "cuda:2").latency_s is None


def test_devices_may_be_told_by_their_memory_alone() -> None:
    inventory = cards_inventory("2x24GiB+1x12GiB")
    assert [device.total_memory_bytes for device in inventory] == [24 * GIB, 24 * GIB, 12 * GIB]
    assert {(d.kind, d.flops_per_s, d.memory_bytes_per_s, d.speed, d.measured) for d in inventory} == {
        ("cuda", (), None, 1.0, DATA_SHEET)
    }
    assert all(link.bandwidth_bytes_per_s is None for link in inventory.links)


def test_a_card_that_shows_itself_as_two_devices_is_two_devices() -> None:
    first, second = cards_inventory("1xMI250X")
    assert first.total_memory_bytes == second.total_memory_bytes == 64 * GIB
    assert dict(first.flops_per_s)["float16"] == pytest.approx(191.5e12)
    assert first.memory_bytes_per_s == 1.6e12


def test_a_link_is_as_fast_as_its_slower_end() -> None:
    inventory = cards_inventory("1xh100-sxm,1xt4")
    assert inventory.link("cuda:0", "cuda:1").bandwidth_bytes_per_s == 16e9
    assert inventory.link("cuda:1", "cuda:0").bandwidth_bytes_per_s == 16e9


@pytest.mark.parametrize(
    ("text", "card"),
    [
        ("1x RTX 4090", "rtx4090"),
        ("1xNVIDIA GeForce RTX 4090", "rtx4090"),
        ("1XRTX_6000_Ada", "rtx6000-ada"),
        ("1xtesla t4", "t4"),
        ("1xa100", "a100-80gb"),
        ("1xh100", "h100-sxm"),
        ("1xA100 40GB", "a100-40gb"),
    ],
)
def test_people_write_cards_in_different_ways(text: str, card: str) -> None:
    assert cards_inventory(text).root.label == known_cards()[card].product


@pytest.mark.parametrize(
    ("request_", "counts"),
    [
        ("2xrtx4090", True),
        (" 1 x 24GiB", True),
        ("2", False),
        ("cuda:0", False),
        ("xla:0", False),
        ("cpu@speed=1", False),
        (["2xt4"], False),
        (None, False),
    ],
)
def test_what_counts_cards(request_: object, counts: bool) -> None:
    assert is_cards_request(request_) is counts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2xrtx409", "'2xrtx409': there is no data sheet of 'rtx409'. Did you mean 'rtx4090'? Known are a100-40gb, "),
        ("2xrtx4090+cpu", "'2xrtx4090+cpu': 'cpu' does not count devices; write a number and a card or a memory size"),
        ("2xrtx4090+", "'' does not count devices"),
        ("0xt4", "'0xt4' does not count devices"),
        ("2x24", "there is no data sheet of '24'"),
        ("2x0GiB", "there is no data sheet of '0GiB'"),
    ],
)
def test_a_mistake_is_explained(text: str, message: str) -> None:
    with pytest.raises(InventoryError) as caught:
        cards_inventory(text)
    assert message in str(caught.value)


def test_a_request_for_cards_can_be_planned_for_but_not_trained_on(machine: Inventory) -> None:
    assert resolve_devices("2xt4", must_exist=False) == cards_inventory("2xt4")
    limited = resolve_devices("2xt4", memory={"cuda:1": "8GiB"}, must_exist=False)
    assert limited["cuda:1"].memory_bytes == 8 * GIB
    with pytest.raises(
        InventoryError, match=r"'2xt4' describes hardware by its data sheet, which can be planned for but"
    ):
        resolve_devices("2xt4", discovered=machine)


def test_an_inventory_of_cards_is_a_file_like_any_other() -> None:
    inventory = cards_inventory("1xmi300x+1x24GiB")
    assert Inventory.from_dict(inventory.to_dict()) == inventory
    assert resolve_devices(inventory.to_dict(), must_exist=False) == inventory
