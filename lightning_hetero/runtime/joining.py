"""Lets `parameters_to_vector` and `vector_to_parameters` of torch take parameters of several devices.

They refuse them by a check of their own. Without it, the vector is joined as user code joins tensors, and each
parameter gets its part back where it is; see `reconcile` and `assignments`.
"""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor
from torch.nn.utils import convert_parameters
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

_CHECK: Any = getattr(convert_parameters, "_check_param_device", None)
_MODES: list[TorchFunctionMode] = []
_LOCK = threading.RLock()  # a mode may end in the garbage collector, while another begins


def begin(mode: TorchFunctionMode) -> None:
    """Leave the check out wherever `mode` is active."""
    with _LOCK:
        _MODES.append(mode)
        _put(_check)


def end(mode: TorchFunctionMode) -> None:
    """Take back what `begin` did."""
    with _LOCK:
        if mode in _MODES:
            _MODES.remove(mode)
        if not _MODES:
            _put(_CHECK)


def _put(check: Any) -> None:
    if _CHECK is not None:
        vars(convert_parameters)["_check_param_device"] = check


def _check(parameter: Tensor, device_of_first: int | None) -> Any:
    # The functions may have been imported by name, so it is not they that are replaced.
    joins = any(mode in _MODES for mode in _get_current_function_mode_stack())
    return _CHECK(parameter, None if joins else device_of_first)
