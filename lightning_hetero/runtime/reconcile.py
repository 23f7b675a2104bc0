"""Lets code between the placed modules mix tensors of several devices, as it could on one device.

User code reads parameters directly: `F.linear(x, self.embedding.weight)`, an L2 penalty over `self.parameters()`,
a moving average of one network's weights in another's, `torch.equal` over two layers. On one device that works; over
several, torch raises. While this mode is active, an operation that failed and has inputs on several devices is
carried out once more with all of them on one. Autograd sees the copies, so gradients come out as on one device.

Nothing is done before torch has refused: operations that take several devices (foreach, copies, CPU scalars) and all
that stay on one device are not touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_hetero.runtime import frames
from lightning_hetero.runtime.transfer import to_device, version_of

# These write to an input that is neither `self` nor `out`; a copy would take the change and be lost.
_WRITE_ELSEWHERE = frozenset(
    {
        "batch_norm",
        "instance_norm",
        "native_batch_norm",
        "cudnn_batch_norm",
        "miopen_batch_norm",
        "fused_moving_avg_obs_fake_quant",
        "embedding_renorm_",
    }
)
_OPERATORS = ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul")
_IN_PLACE_OPERATORS = frozenset(f"__i{name}__" for name in _OPERATORS) | {"__setitem__"}


class DeviceReconciler(TorchFunctionMode):
    """A mode of torch, active from the placing of a model to its release.

    Args:
        root: Device on which operations of user code are carried out if nothing else decides.
    """

    def __init__(self, root: torch.device) -> None:
        super().__init__()
        self._root = root

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`; where torch refuses a mixture of devices, call it with all inputs on one."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if isinstance(func, FunctionType):
            if func.__module__ == "torch.nn.functional" and name not in _WRITE_ELSEWHERE:
                # Written in Python: a second call would repeat the part before the failure, random numbers
                # included. So its inputs come together before the first call.
                args, kwargs, _ = self._together(name, args, kwargs)
            return func(*args, **kwargs)
        try:
            return func(*args, **kwargs)
        except (RuntimeError, TypeError, NotImplementedError):
            if name in ("numpy", "__array__") and self._root.type == "cpu" and args[0].device.type != "cpu":
                return func(args[0].cpu(), *args[1:], **kwargs)
            if name in _WRITE_ELSEWHERE or name.startswith("_foreach") or name in ("__set__", "set_"):
                raise
            new_args, new_kwargs, moved = self._together(name, args, kwargs)
            if not moved:
                raise
        versions = [version_of(copy) for _, copy in moved]
        result = func(*new_args, **new_kwargs)
        for (given, copy), version in zip(moved, versions, strict=True):
            if version_of(copy) != version:
                given.copy_(copy)
        return result

    def _together(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], list[tuple[Tensor, Tensor]]]:
        """The arguments with all tensors on one device, and the pairs (given, copy) that moved."""
        tensors = list(_tensors((args, kwargs.values())))
        if len({tensor.device for tensor in tensors}) < 2:
            return args, kwargs, []
        kept = _written(name, args, kwargs)
        target = self._target(tensors, kept)
        carrier = _Carrier(target, kept)
        new_kwargs = {key: carrier.carry(value) for key, value in kwargs.items()}
        return tuple(map(carrier.carry, args)), new_kwargs, carrier.moved

    def _target(self, tensors: Iterable[Tensor], kept: Tensor | None) -> torch.device:
        """Where the operation is carried out: where it writes, else where its weights are, else here."""
        if kept is not None:
            return kept.device
        weights = {tensor.device for tensor in tensors if isinstance(tensor, nn.Parameter)}
        if len(weights) == 1:
            return weights.pop()
        frame = frames.top()
        return self._root if frame is None else frame.device


class _Carrier:
    """Brings tensors to one device. Not a function that calls itself: that is a circle, and what moved would stay."""

    def __init__(self, target: torch.device, kept: Tensor | None) -> None:
        self._target = target
        self._kept = kept
        self.moved: list[tuple[Tensor, Tensor]] = []

    def carry(self, obj: Any) -> Any:
        """The object with its tensors on the target device; lists and tuples are looked into."""
        if isinstance(obj, Tensor):
            if obj.device == self._target or obj is self._kept:
                return obj
            copy = to_device(obj, self._target)
            self.moved.append((obj, copy))
            return copy
        if type(obj) in (list, tuple):
            return type(obj)(self.carry(item) for item in obj)
        return obj


def _written(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The tensor that the operation changes, if any: it must not move."""
    out = kwargs.get("out")
    if isinstance(out, Tensor):
        return out
    in_place = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_OPERATORS
    return args[0] if in_place and args and isinstance(args[0], Tensor) else None


def _tensors(obj: Any) -> Iterator[Tensor]:
    if isinstance(obj, Tensor):
        yield obj
    elif isinstance(obj, (list, tuple)) or type(obj) is type({}.values()):
        for item in obj:
            yield from _tensors(item)
