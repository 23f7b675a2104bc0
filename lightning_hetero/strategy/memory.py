"""Gives every backend's out-of-memory error a text that Lightning's batch-size finder understands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def readable_out_of_memory() -> Iterator[None]:
    """Re-raise out-of-memory errors that Lightning would not recognise.

    Lightning looks for "CUDA" and "out of memory" in the text, or for the words of the CPU's allocator. Errors of
    other backends are raised again, as the same class, with a text that has both.

    Raises:
        torch.OutOfMemoryError: A device of another kind is out of memory.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        text = str(error)
        if "CUDA" in text or "can't allocate memory" in text:
            raise
        raise torch.OutOfMemoryError(f"{text} (not CUDA, but out of memory all the same)") from error
