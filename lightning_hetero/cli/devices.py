"""`lightning-hetero devices`: what a model can be spread over, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Literal

from rich.console import Console
from rich.table import Table

from lightning_hetero.cli import PROGRAM
from lightning_hetero.devices import INVENTORY_HEADER, Inventory, inventory_rows, measured_inventory, resolve_devices
from lightning_hetero.devices.pace_table import (
    DEVICE_PACE_HEADER,
    LINK_PACE_HEADER,
    device_pace_rows,
    link_pace_rows,
)
from lightning_hetero.devices.presets import describes_hardware
from lightning_hetero.errors import HeteroError

_TEXTS = {"device", "kind", "dtypes", "trains", "product", "from", "to", "confidence"}
_NEVER_FOLDED = {"device", "kind", "memory", "speed", "from", "to", "confidence"}
_WIDE = 160  # columns, where there is no terminal whose width would matter


def main(argv: Sequence[str]) -> int:
    """Print the devices of this machine, or those that a request means.

    Returns:
        0, or 1 if the request cannot be met.
    """
    arguments = _parser().parse_args(argv)
    try:
        inventory = _inventory(arguments)
    except HeteroError as error:
        print(f"{PROGRAM} devices: {error}", file=sys.stderr)
        return 1
    _print(inventory, arguments)
    return 0


def _inventory(arguments: argparse.Namespace) -> Inventory:
    inventory = resolve_devices(arguments.devices, must_exist=not describes_hardware(arguments.devices))
    if arguments.measure or arguments.refresh or arguments.profile:
        return measured_inventory(inventory, refresh=arguments.refresh, profile=arguments.profile)
    return inventory


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} devices",
        description="Show the devices that a model can be spread over. The first one that trains is the root: "
        "batches, outputs and metrics live there.",
    )
    parser.add_argument(
        "--devices",
        default="auto",
        metavar="SPEC",
        help="the devices to show, written as for HeteroStrategy(devices=...): 'cuda:0,cpu', "
        "'cpu@speed=1,mem=2GiB', the path of an inventory file; auto (the default) stands for all of them. "
        "'2xrtx4090+1xa100-80gb' and '2x24GiB' show hardware by its data sheet, to plan for",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure how fast devices and links are, which takes some seconds, and keep the numbers for next time",
    )
    parser.add_argument("--refresh", action="store_true", help="measure again what was measured before")
    parser.add_argument("--profile", metavar="FILE", help="a device profile (JSON), believed instead of measuring")
    parser.add_argument("--json", action="store_true", help="print the inventory as JSON, for other programs")
    return parser


def _print(inventory: Inventory, arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps(inventory.to_dict(), indent=2))
        return
    title = f"Devices of {inventory.host}" if inventory.host else None
    _print_table(title, INVENTORY_HEADER, inventory_rows(inventory))
    if any(device.flops_per_s for device in inventory):
        _print_table("How fast they are", DEVICE_PACE_HEADER, device_pace_rows(inventory))
    links = link_pace_rows(inventory)
    if links:
        _print_table("Links", LINK_PACE_HEADER, links)


def _print_table(title: str | None, header: Iterable[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for name in header:
        justify: Literal["left", "right"] = "left" if name in _TEXTS else "right"
        table.add_column(name, justify=justify, no_wrap=name in _NEVER_FOLDED)
    for row in rows:
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else _WIDE)
    with console.capture() as text:  # rich would end the program by itself when nobody reads on
        console.print(table)
    print(text.get(), end="")
