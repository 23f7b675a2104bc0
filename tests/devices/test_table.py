"""The table of devices for people."""

from __future__ import annotations

from lightning_hetero.devices import INVENTORY_HEADER, DeviceSpec, Inventory, inventory_rows, resolve_devices

GIB = 1024**3


def test_one_row_per_device_under_one_header(machine: Inventory) -> None:
    dla = DeviceSpec(name="dla:0", kind="dla", memory_bytes=GIB, torch_device=None, trainable=False)
    shown = resolve_devices(["cuda:1", "cpu@speed=0.5,mem=2GiB,threads=1", dla], discovered=machine)
    assert INVENTORY_HEADER == ("device", "kind", "memory", "speed", "threads", "dtypes", "trains", "product")
    assert inventory_rows(shown) == [
        ("cuda:1", "cuda", "10.0 GiB of 24.0 GiB", "1", "", "float64 float32", "yes", "a cuda processor"),
        ("emulated:0", "emulated", "2.00 GiB", "0.5", "1", "float64 float32", "yes", "emulated on a cpu processor"),
        ("dla:0", "dla", "1.00 GiB", "1", "", "?", "no", ""),
    ]


def test_an_empty_inventory_has_no_rows() -> None:
    assert inventory_rows(Inventory(devices=())) == []
