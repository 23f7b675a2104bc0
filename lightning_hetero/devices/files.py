"""Inventory files: YAML or JSON, written by people or by `save_inventory`."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path

import yaml

from lightning_hetero.devices.spec import Inventory
from lightning_hetero.errors import InventoryError

SUFFIXES = (".yaml", ".yml", ".json")


def read_inventory_file(path: str | PathLike[str]) -> object:
    """The plain data in an inventory file; what it means is for `resolve_devices` to say.

    Raises:
        InventoryError: The file is missing, unreadable, or neither YAML nor JSON.
    """
    file = Path(path).expanduser()
    if file.suffix.lower() not in SUFFIXES:
        raise InventoryError(f"{str(path)!r} is no inventory file; its name must end in {', '.join(SUFFIXES)}")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InventoryError(
            f"the inventory file {str(file)!r} cannot be read: {error}; give the path of an existing file"
        ) from error
    try:
        return json.loads(text) if file.suffix.lower() == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise InventoryError(f"the inventory file {str(file)!r} is damaged: {error}") from error


def save_inventory(inventory: Inventory, path: str | PathLike[str]) -> None:
    """Write an inventory that `resolve_devices(path)` reads back.

    Raises:
        InventoryError: The name does not end in .yaml, .yml or .json.
    """
    file = Path(path).expanduser()
    if file.suffix.lower() not in SUFFIXES:
        raise InventoryError(f"{str(path)!r} is no inventory file; its name must end in {', '.join(SUFFIXES)}")
    data = inventory.to_dict()
    json_file = file.suffix.lower() == ".json"
    text = json.dumps(data, indent=2) + "\n" if json_file else yaml.safe_dump(data, sort_keys=False)
    file.write_text(text, encoding="utf-8")
