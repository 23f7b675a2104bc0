"""A thread at work for a device: code of units then runs where it is, and calls of units do not leave it."""

from __future__ import annotations

from typing import Any

from lightning_hetero.runtime.frames import HERE


def begin_work(name: str) -> tuple[Any, str]:
    """Let this thread work for a device, under its name, which profilers and debuggers show.

    Its random numbers are arranged then, see `frames.random_numbers_arranged`. No context manager, and the name past
    its property, which from Python 3.14 on tells the system too: every task does this.

    Args:
        name: Name of the thread meanwhile.

    Returns:
        What `end_work` needs. One task begins none within itself.
    """
    HERE.at_work = True
    thread = HERE.thread
    before = thread._name
    thread._name = name
    return thread, before


def end_work(begun: tuple[Any, str]) -> None:
    """Let the thread be what it was."""
    HERE.at_work = False
    thread, name = begun
    thread._name = name
