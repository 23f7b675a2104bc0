"""Where the numbers of devices and links come from, and what numbers can be."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning_hetero.errors import InventoryError

MEASURED = "measured"
LOW_CONFIDENCE = "low confidence"
DATA_SHEET = "data sheet"
ORIGINS = ("", MEASURED, LOW_CONFIDENCE, DATA_SHEET)
"""Empty: there are no numbers, or the user gave them."""


def check_origin(what: str, measured: str) -> None:
    """Refuse an origin that does not exist.

    Args:
        what: Whose it is, for the message.
        measured: The origin.

    Raises:
        InventoryError: It is none of `ORIGINS`.
    """
    if measured not in ORIGINS:
        raise InventoryError(f"{what}: measured must be one of {', '.join(map(repr, ORIGINS))}, got {measured!r}")


def check_numbers(what: str, numbers: Mapping[str, float | None], measured: str) -> None:
    """Refuse rates and seconds that cannot be.

    Args:
        what: Whose they are, for the message.
        numbers: By name; None is unknown.
        measured: Where they come from.

    Raises:
        InventoryError: One is not above 0 or not finite, or `measured` is none of `ORIGINS`.
    """
    for name, number in numbers.items():
        if number is not None and not 0 < number < math.inf:
            raise InventoryError(f"{what}: {name} must be a finite number > 0, got {number}")
    check_origin(what, measured)
