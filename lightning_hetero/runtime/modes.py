"""Keeps a torch function mode active over calls that do not nest, from a host's setup to its teardown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from lightning_hetero.runtime import joining


def activate(mode: TorchFunctionMode) -> None:
    """Make `mode` the innermost mode of this thread."""
    _push_mode(mode)
    joining.begin(mode)


def deactivate(mode: TorchFunctionMode) -> bool:
    """Take `mode` out of this thread's modes, wherever it stands; others keep their order.

    Returns:
        Whether it was there.
    """
    if not any(active is mode for active in _get_current_function_mode_stack()):
        return False
    above: list[TorchFunctionMode] = []
    while (popped := _pop_mode()) is not mode:
        above.append(popped)
    for other in reversed(above):
        _push_mode(other)
    joining.end(mode)
    return True


@contextmanager
def suspended(kind: type[TorchFunctionMode]) -> Iterator[None]:
    """Within the block, modes of one class do not act in this thread."""
    modes = _get_current_function_mode_stack()
    if not any(isinstance(mode, kind) for mode in modes):
        yield
        return
    for _ in modes:
        _pop_mode()
    for mode in modes:
        if not isinstance(mode, kind):
            _push_mode(mode)
    try:
        yield
    finally:
        for mode in modes:
            if not isinstance(mode, kind):
                _pop_mode()
        for mode in modes:
            _push_mode(mode)
