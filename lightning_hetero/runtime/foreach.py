"""Carries out torch's operations on lists, `torch._foreach_...`, whose members are on different devices each time.

They work where the members of one position are on one device, whichever it is. Where those of a later list are
elsewhere, such as a moving average of weights that have moved, they are brought to the member of the first list.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_hetero.runtime.transfer import to_device


def rest_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    """What is left to do of an operation on lists that has failed; None if the devices are not why, or it may be lost.

    An operation in place has written to the members before the one at which it failed: torch takes one after the other
    where devices differ.
    """
    rows = _rows(args, kwargs)
    if not any(len({tensor.device for tensor in _tensors(row)}) > 1 for row in rows):
        return None
    if not func.__name__.partition(".")[0].endswith("_"):  # that of an overload follows
        return partial(_new, func, rows)
    if any(tensor.is_inference() or (torch.is_grad_enabled() and tensor.requires_grad) for tensor in _tensors(rows)):
        return None  # refused as a whole, before anything was written
    first = next((number for number, row in enumerate(rows) if not _works(func, row)), None)
    return None if first is None else partial(_in_place, func, args[0], rows[first:])


Row = tuple[tuple[Any, ...], dict[str, Any]]


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Row]:
    """The arguments of each position, as lists of one member; nothing if they cannot be told apart."""
    lists = [value for value in (*args, *kwargs.values()) if isinstance(value, (list, tuple))]
    whole = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() > 0]
    if not args or not isinstance(args[0], (list, tuple)) or whole or len(set(map(len, lists))) > 1:
        return []

    def at(value: Any, number: int) -> Any:
        return [value[number]] if isinstance(value, (list, tuple)) else value

    return [
        (tuple(at(value, number) for value in args), {key: at(value, number) for key, value in kwargs.items()})
        for number in range(len(args[0]))
    ]


def _works(func: Any, row: Row) -> bool:
    """Whether torch carries out one position as it is; tried on a copy of what it writes."""
    (written, *others), kwargs = row
    try:
        with torch.no_grad():
            func([written[0].clone()], *others, **kwargs)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True


def _in_place(func: Any, written: Any, rows: list[Row]) -> Any:
    results = [func(*args, **kwargs) for args, kwargs in map(_beside_the_first, rows)]
    return None if results[0] is None else written


def _new(func: Any, rows: list[Row]) -> Any:
    results = [func(*args, **kwargs) for args, kwargs in map(_beside_the_first, rows)]
    return type(results[0])(new for result in results for new in result)


def _beside_the_first(row: Row) -> Row:
    args, kwargs = row
    device = args[0][0].device

    def beside(value: Any) -> Any:
        if isinstance(value, list):
            return [beside(value[0])]
        return to_device(value, device) if isinstance(value, Tensor) else value

    return tuple(map(beside, args)), {key: beside(value) for key, value in kwargs.items()}


def _tensors(obj: Any) -> list[Tensor]:
    if isinstance(obj, Tensor):
        return [obj]
    items = obj.values() if isinstance(obj, dict) else obj if isinstance(obj, (list, tuple)) else ()
    return [tensor for item in items for tensor in _tensors(item)]
