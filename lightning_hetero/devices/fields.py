"""The values of a hand-written record, each read and checked by the key it stands under."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from lightning_hetero.errors import InventoryError
from lightning_hetero.units import parse_bytes


@dataclass(frozen=True, slots=True)
class Key:
    """What a key of a record stands for.

    Attributes:
        field: The field of the dataclass that it fills.
        read: Turns the written value into the field's; raises ValueError without naming the key.
    """

    field: str
    read: Callable[[Any], Any]


def read_record(record: object, keys: Mapping[str, Key], what: str) -> dict[str, Any]:
    """The fields that a record fills.

    Args:
        record: As written, by key.
        keys: All keys that may be written.
        what: Such as "a device", for messages.

    Raises:
        InventoryError: It is no mapping, a key is unknown, two keys fill one field, or a value is wrong.
    """
    if not isinstance(record, Mapping):
        raise InventoryError(f"{what} is written as keys and values, got {record!r}")
    given: dict[str, Any] = {}
    for key, value in record.items():
        if key not in keys:
            near = get_close_matches(str(key).lower(), keys, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise InventoryError(f"unknown key {key!r} of {what}; known are {', '.join(keys)}.{hint}")
        field = keys[key].field
        if field in given:
            raise InventoryError(f"{what} gives {field!r} twice: {dict(record)!r}; leave one of them out")
        try:
            given[field] = keys[key].read(value)
        except ValueError as error:
            raise InventoryError(f"{what}, {key}: {error} (in {dict(record)!r})") from error
    return given


def read_text(value: Any) -> str:
    """A text that is not a number or a list."""
    if isinstance(value, str):
        return value
    raise ValueError(f"must be a text, got {value!r}")


def read_flag(value: Any) -> bool:
    """True or false, not a text that looks like it."""
    if isinstance(value, bool):
        return value
    raise ValueError(f"must be true or false, got {value!r}")


def read_number(value: Any) -> float:
    """A number, also written as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"must be a number, got {value!r}")
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"must be a number, got {value!r}") from None


def read_whole(value: Any) -> int:
    """A whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"must be a whole number, got {value!r}")
    return value


def read_size(value: Any) -> int:
    """A number of bytes from a number or from "16GiB"."""
    if isinstance(value, (int, float, str)):
        return parse_bytes(value)
    raise ValueError(f"must be a size such as '16GiB', got {value!r}")


def read_bandwidth(value: Any) -> float:
    """Bytes per second from a number, "12GB" or "12GB/s"."""
    if isinstance(value, float):
        return value
    return float(read_size(value.strip().removesuffix("/s") if isinstance(value, str) else value))


def read_rates(value: Any) -> tuple[tuple[str, float], ...]:
    """Operations per second by dtype, from a mapping `{float32: 2e13}` or the pairs that `Inventory.to_dict` writes."""
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if isinstance(pairs, str) or not isinstance(pairs, Sequence):
        raise ValueError(f"must be rates by dtype such as {{float32: 2e13}}, got {value!r}")
    if any(isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2 for pair in pairs):
        raise ValueError(f"must be pairs of a dtype and a rate, got {value!r}")
    return tuple((read_text(dtype), read_number(rate)) for dtype, rate in pairs)


def list_of(read: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    """A reader of lists, each entry read by `read`."""

    def read_all(value: Any) -> tuple[Any, ...]:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ValueError(f"must be a list, got {value!r}")
        return tuple(read(entry) for entry in value)

    return read_all


def or_none(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A reader that lets None pass."""
    return lambda value: None if value is None else read(value)
