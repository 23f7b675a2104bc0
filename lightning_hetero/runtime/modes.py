"""Keeps a torch function mode active over calls that do not nest: from a host's setup to its teardown."""

from __future__ import annotations

from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode


def activate(mode: TorchFunctionMode) -> None:
    """Make `mode` the innermost mode of this thread."""
    _push_mode(mode)


def deactivate(mode: TorchFunctionMode) -> None:
    """Take `mode` out of this thread's modes, wherever it stands; others keep their order."""
    if not any(active is mode for active in _get_current_function_mode_stack()):
        return
    above: list[TorchFunctionMode] = []
    while (popped := _pop_mode()) is not mode:
        above.append(popped)
    for other in reversed(above):
        _push_mode(other)
