"""Gives every backend's out-of-memory error advice, and a text that Lightning's batch-size finder understands."""

from __future__ import annotations

from types import TracebackType

import torch

from lightning_hetero.runtime.engine.faults import annotated

ADVICE = (
    "What helps, in the order of effort: a smaller batch; micro_batches=4, rematerialize=True; "
    "activation_checkpointing=True; precision='bf16-mixed'; a lower limit, as memory={'cuda:0': '20GiB'}, "
    "so that the plan puts less on it."
)


class ReadableOutOfMemory:
    """Context in which out-of-memory errors that Lightning would not recognise are raised again.

    Lightning looks for "CUDA" and "out of memory" in the text, or for the words of the CPU's allocator. Errors of
    other backends are raised again, as the same class, with a text that has both. All get a note with advice.

    A class, because every step enters it twice: `contextlib.contextmanager` takes several times as long.
    """

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            text = str(error)
            if "CUDA" not in text and "can't allocate memory" not in text:
                readable = torch.OutOfMemoryError(f"{text} (not CUDA, but out of memory all the same)")
                raise annotated(readable, ADVICE) from error
            annotated(error, ADVICE)


_READABLE = ReadableOutOfMemory()


def readable_out_of_memory() -> ReadableOutOfMemory:
    """The context; it has no state, so one serves all.

    Raises:
        torch.OutOfMemoryError: From the block, when a device of another kind is out of memory.
    """
    return _READABLE
