"""Sizes as people write and read them: "24GiB" to bytes and back."""

from __future__ import annotations

import re
from decimal import Decimal

_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4, "P": 5}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGTP])(i?)B?|B)?\s*", re.IGNORECASE)


def parse_bytes(size: int | float | str) -> int:
    """Read a size: `25769803776`, `"24GiB"` (1024³), `"24GB"` (1000³), `"512 MiB"`, `"1.5G"` (1000³).

    Args:
        size: A number of bytes, or a text with a unit. Upper and lower case are the same.

    Returns:
        Bytes, at least 0.

    Raises:
        ValueError: The text is not a size, or the size is negative.

    Example:
        >>> parse_bytes("24GiB"), parse_bytes("1.5 MB"), parse_bytes(7)
        (25769803776, 1500000, 7)
    """
    if isinstance(size, bool):
        raise ValueError(f"{size!r} is not a size; write bytes or a text such as '24GiB'")
    if isinstance(size, (int, float)):
        if size != size or size < 0 or size == float("inf"):
            raise ValueError(f"a size must be a finite number of bytes >= 0, got {size!r}")
        return int(size)
    match = _SIZE.fullmatch(size)
    if match is None:
        raise ValueError(f"{size!r} is not a size; write bytes or a text such as '24GiB', '500MB' or '1.5G'")
    number, prefix, binary = match.groups()
    base = 1024 if binary else 1000
    return int(Decimal(number) * base ** _POWERS[prefix.upper()]) if prefix else int(Decimal(number))


def format_bytes(size_bytes: int) -> str:
    """Write a size for people, in binary units with three significant digits.

    Example:
        >>> format_bytes(25769803776), format_bytes(1500), format_bytes(0)
        ('24.0 GiB', '1.46 KiB', '0 B')
    """
    if abs(size_bytes) < 1024:
        return f"{size_bytes} B"
    value = float(size_bytes)
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        value /= 1024
        if abs(value) < 999.5 or unit == "PiB":
            break
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"
