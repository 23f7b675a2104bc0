"""What this thread is in the middle of: the placed modules whose `forward` is running, innermost last, and for whom."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_hetero.runtime.containers import Copied


class Seeded(NamedTuple):
    """States of the generators of the CPU and a device: before the latter was seeded from the former, and then."""

    cpu_before: Tensor
    device_before: Tensor
    cpu_then: Tensor
    device_then: Tensor


@dataclass(slots=True)
class Frame:
    """One running `forward` of a placed module.

    Attributes:
        owner: `id` of the module.
        device: Where its code computes.
        chain: Whether its code only hands one child's output to the next child.
        moved: (given, copy on `device`, version of the copy) for every input that had to move.
        copied: The containers among its inputs that were copied for that.
        seeded: How random numbers were, if those of the device were made to follow from those of the CPU.
    """

    owner: int
    device: torch.device
    chain: bool = False
    moved: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)
    copied: list[Copied] = field(default_factory=list)
    seeded: Seeded | None = None


class _Here(threading.local):
    at_work = False  # for a device: whether it runs one of its tasks, or is there for nothing else
    arranged = False
    keeps_activations = False
    micro_batch = 0
    part_of_batch = (
        1.0  # of its rows, that the user's step has which runs in this thread: a micro-batch has less than all
    )

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.thread: Any = threading.current_thread()


HERE = _Here()
"""What this thread is in the middle of, for those who ask for each task of a device; others have the functions."""


def push(frame: Frame) -> None:
    """Enter a module."""
    HERE.frames.append(frame)


def pop(owner: int) -> Frame | None:
    """Leave the module `owner`; None if it was never entered.

    Frames above it belong to calls that ended without leaving, through an exception in somebody's hook.
    """
    frames = HERE.frames
    for depth in range(len(frames) - 1, -1, -1):
        if frames[depth].owner == owner:
            frame = frames[depth]
            del frames[depth:]
            return frame
    return None


def top() -> Frame | None:
    """The innermost running module, or None in user code outside of any."""
    return HERE.frames[-1] if HERE.frames else None


def depth() -> int:
    """How many modules this thread is in."""
    return len(HERE.frames)


def cut_to(depth: int) -> None:
    """Leave modules until `depth` are left."""
    del HERE.frames[depth:]


class Balanced:
    """Context that leaves, at its end, every module that was entered in it.

    Hooks after a module do not run for exceptions such as KeyboardInterrupt, so a module may be left without a word.
    A class, because every step enters it twice: `contextlib.contextmanager` takes several times as long.
    """

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before = depth()

    def __exit__(self, *failure: object) -> None:
        cut_to(self._before)


def balanced() -> Balanced:
    """A new context of that sort."""
    return Balanced()


class RandomNumbersArranged:
    """Context in which somebody else sees to it that random numbers are repeated where they have to be.

    A class for the reason of `Balanced`.
    """

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before, HERE.arranged = HERE.arranged, True

    def __exit__(self, *failure: object) -> None:
        HERE.arranged = self._before


def random_numbers_arranged() -> RandomNumbersArranged:
    """A new context of that sort."""
    return RandomNumbersArranged()


def are_random_numbers_arranged() -> bool:
    """Whether this thread is within `random_numbers_arranged`, or works for a device, where lanes see to it."""
    return HERE.arranged or HERE.at_work


@contextmanager
def activations_kept() -> Iterator[None]:
    """Within the block, nothing is left out of what autograd keeps: a few rows are tried out, and no step runs."""
    before, HERE.keeps_activations = HERE.keeps_activations, True
    try:
        yield
    finally:
        HERE.keeps_activations = before


def are_activations_kept() -> bool:
    """Whether this thread is within `activations_kept`."""
    return HERE.keeps_activations


def micro_batch() -> int:
    """The micro-batch that this thread works for."""
    return HERE.micro_batch
