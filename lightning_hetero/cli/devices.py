"""`lightning-hetero devices`: what a model can be spread over, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Literal

from rich.console import Console
from rich.table import Table

from lightning_hetero.cli import PROGRAM
from lightning_hetero.devices import INVENTORY_HEADER, Inventory, inventory_rows, resolve_devices
from lightning_hetero.errors import HeteroError

_RIGHT_ALIGNED = {"memory", "speed", "threads"}
_NEVER_FOLDED = {"device", "kind", "memory", "speed"}
_WIDE = 160  # columns, where there is no terminal whose width would matter


def main(argv: Sequence[str]) -> int:
    """Print the devices of this machine, or those that a request means.

    Returns:
        0, or 1 if the request cannot be met.
    """
    arguments = _parser().parse_args(argv)
    try:
        inventory = resolve_devices(arguments.devices)
    except HeteroError as error:
        print(f"{PROGRAM} devices: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(inventory.to_dict(), indent=2))
    else:
        _print_table(inventory)
    return 0


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
        "'cpu@speed=1,mem=2GiB', the path of an inventory file; auto (the default) stands for all of them",
    )
    parser.add_argument("--json", action="store_true", help="print the inventory as JSON, for other programs")
    return parser


def _print_table(inventory: Inventory) -> None:
    table = Table(title=f"Devices of {inventory.host}" if inventory.host else None, title_justify="left")
    for name in INVENTORY_HEADER:
        justify: Literal["left", "right"] = "right" if name in _RIGHT_ALIGNED else "left"
        table.add_column(name, justify=justify, no_wrap=name in _NEVER_FOLDED)
    for row in inventory_rows(inventory):
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else _WIDE).print(table)
