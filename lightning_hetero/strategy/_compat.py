"""The one place for names that Lightning does not promise to keep, looked up in the namespace of the host.

`lightning.pytorch` and `pytorch_lightning` are two copies of one library that do not know each other. What is taken
from the host has to come from the very copy whose Trainer runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

NAMESPACES = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}


@dataclass(frozen=True, slots=True)
class Host:
    """One copy of Lightning.

    Attributes:
        namespace: "lightning.pytorch" or "pytorch_lightning".
        update_properties: Sets `self.device` of a LightningModule without moving it.
        empty_init: Context manager that skips the filling of new parameters.
        mixed_precision: Its class of that name.
        rank_zero_only: Lets a function run in process 0 only; its `rank` says which process this is.
        extract_batch_size: Finds out how many rows a batch has.
    """

    namespace: str
    update_properties: Callable[..., None]
    empty_init: Callable[..., Any]
    mixed_precision: type[Any]
    rank_zero_only: Any
    extract_batch_size: Callable[[Any], int]


def host(namespace: str) -> Host:
    """Look the names up.

    Args:
        namespace: "lightning.pytorch" or "pytorch_lightning".
    """
    fabric = NAMESPACES[namespace]
    return Host(
        namespace=namespace,
        update_properties=importlib.import_module(f"{fabric}.utilities.device_dtype_mixin")._update_properties,
        empty_init=importlib.import_module(f"{fabric}.utilities.init")._EmptyInit,
        mixed_precision=importlib.import_module(f"{namespace}.plugins").MixedPrecision,
        rank_zero_only=importlib.import_module(f"{namespace}.utilities.rank_zero").rank_zero_only,
        extract_batch_size=importlib.import_module(f"{namespace}.utilities.data").extract_batch_size,
    )
