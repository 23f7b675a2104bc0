"""Copies of states for checkpoints: on the CPU, so that a checkpoint opens anywhere and names no device."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def on_cpu(state: Any) -> Any:
    """The same nested dicts, lists and tuples with every tensor on the CPU.

    Tensors that are there already are taken as they are. Tensors that share memory (tied weights) still do, so a
    checkpoint stores them once.
    """
    return _visit(state, {})


# A function of the module: one inside of `on_cpu` that calls itself would be a circle of references, and every copy
# would stay in memory until Python's garbage collector comes by.
def _visit(value: Any, copies: dict[tuple[Any, ...], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return value if value.device.type == "cpu" else _copy(value, copies)
    if type(value) in (list, tuple):
        return type(value)(_visit(item, copies) for item in value)
    if isinstance(value, dict):
        new = {key: _visit(item, copies) for key, item in value.items()}
        if all(new[key] is item for key, item in value.items()):
            return value
        result = value.copy()  # an OrderedDict keeps its class and metadata
        result.update(new)
        if hasattr(value, "_metadata"):  # of Module.state_dict, for versioned loading
            vars(result)["_metadata"] = value._metadata
        return result
    return value


def _copy(tensor: Tensor, copies: dict[tuple[Any, ...], Tensor]) -> Tensor:
    storage = tensor.untyped_storage()
    key = (storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
    if key not in copies:
        copies[key] = tensor.detach().cpu()
    return copies[key]
