"""How a batch is split into micro-batches."""

from __future__ import annotations


def split_rows(rows: int, parts: int) -> list[int]:
    """Sizes of micro-batches: as equal as can be, the larger ones first; fewer than `parts` if there are fewer rows.

    Example:
        >>> split_rows(10, 4)
        [3, 3, 2, 2]
    """
    parts = max(1, min(parts, rows))
    return [rows // parts + (index < rows % parts) for index in range(parts)]
