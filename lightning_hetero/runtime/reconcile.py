"""Lets code between the placed modules mix tensors of several devices, as it could on one device.

User code reads parameters directly: `F.linear(x, self.embedding.weight)`, an L2 penalty over `self.parameters()`,
a moving average of one network's weights in another's, `torch.equal` over two layers. On one device that works; over
several, torch raises. While this mode is active, an operation that failed and has inputs on several devices is
carried out once more with all of them on one. Autograd sees the copies, so gradients come out as on one device.

Nothing is done before torch has refused: operations that take several devices (copies, CPU scalars) and all that stay
on one device are not touched. What an operation writes to does not move. Where that is on several devices, or torch may
have written a part of it before it refused, the error stands.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FunctionType, MethodWrapperType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode

from lightning_hetero.runtime import assignments, foreach, frames
from lightning_hetero.runtime.transfer import to_device, version_of

# These write to an input that is neither `self` nor `out`, and not all of them say so; a copy would take the change
# and be lost.
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
# Written in Python, but without random numbers or effects: they may be called a second time.
_REPEATABLE_METHODS = frozenset(
    {
        *("norm", "stft", "istft", "__rsub__", "__rdiv__", "__rpow__", "__rfloordiv__", "__rmod__", "__rmatmul__"),
        "__contains__",
    }
)
_SET_DATA: Any = Tensor.data.__set__  # type: ignore[attr-defined]


class DeviceReconciler(TorchFunctionMode):
    """A mode of torch, active from the placing of a model to its release.

    Args:
        root: Device on which operations of user code are carried out if nothing else decides.
    """

    def __init__(self, root: torch.device) -> None:
        super().__init__()
        self._root = root
        self._has_mixed = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`; where torch refuses a mixture of devices, call it with all inputs on one."""
        kwargs = kwargs or {}
        if isinstance(func, FunctionType):
            if func.__module__ == "torch.nn.functional":
                if func.__name__ not in _WRITE_ELSEWHERE:
                    # A second call would repeat the part before the failure, random numbers included. So its inputs
                    # come together before the first call.
                    args, kwargs, _ = self._together(func, args, kwargs)
                return func(*args, **kwargs)
            if not _is_repeatable(func):
                return self._run(func, args, kwargs)
        elif isinstance(func, MethodWrapperType) and func == _SET_DATA:
            return func(args[0], assignments.beside(args[0], args[1], sys._getframe(1)))
        try:
            return func(*args, **kwargs)
        except (RuntimeError, TypeError, NotImplementedError):
            rest = self._rest_of(func, args, kwargs)
            if rest is None:
                raise
        return rest()

    def _run(self, func: FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function of torch that is written in Python, and may not be called a second time."""
        if not self._has_mixed or func not in (Tensor.backward, torch.autograd.backward):
            return func(*args, **kwargs)
        names = {"gradient": "grad_tensors"}  # of Tensor.backward's arguments
        with self:  # what mixed devices in the forward may run again (checkpoint), in any thread of autograd
            return _backward()(*args, **{names.get(key, key): value for key, value in kwargs.items()})

    def _rest_of(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
        """What is left to do of an operation that torch has refused; None if devices are not why, or it cannot be."""
        name = _name(func)
        if name in ("numpy", "__array__") and self._root.type == "cpu" and args[0].device.type != "cpu":
            return functools.partial(func, args[0].cpu(), *args[1:], **kwargs)
        if name.startswith("_foreach"):
            return foreach.rest_of(func, args, kwargs)
        if _loses_what_it_writes(func, args, kwargs):
            return None
        new_args, new_kwargs, moved = self._together(func, args, kwargs)
        return functools.partial(_repeat, func, new_args, new_kwargs, moved) if moved else None

    def _together(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], list[tuple[Tensor, Tensor]]]:
        """The arguments with all tensors on one device, and the pairs (given, copy) that moved."""
        tensors = list(_tensors((args, kwargs.values())))
        if len({tensor.device for tensor in tensors}) < 2:
            return args, kwargs, []
        self._has_mixed = True
        carrier = _Carrier(self._target(tensors, _written(func, args, kwargs)))
        new_kwargs = {key: carrier.carry(value) for key, value in kwargs.items()}
        return tuple(map(carrier.carry, args)), new_kwargs, carrier.moved

    def _target(self, tensors: Iterable[Tensor], written: Sequence[Tensor]) -> torch.device:
        """Where the operation is carried out: where it writes, else where its weights are, else here."""
        if written:
            return written[0].device
        weights = {tensor.device for tensor in tensors if isinstance(tensor, nn.Parameter)}
        if len(weights) == 1:
            return weights.pop()
        frame = frames.top()
        return self._root if frame is None else frame.device


class _Carrier:
    """Brings tensors to one device. Not a function that calls itself: that is a circle, and what moved would stay."""

    def __init__(self, target: torch.device) -> None:
        self._target = target
        self.moved: list[tuple[Tensor, Tensor]] = []

    def carry(self, obj: Any) -> Any:
        """The object with its tensors on the target device; lists and tuples are looked into."""
        if isinstance(obj, Tensor):
            if obj.device == self._target:
                return obj
            copy = to_device(obj, self._target)
            self.moved.append((obj, copy))
            return copy
        if type(obj) in (list, tuple):
            return type(obj)(self.carry(item) for item in obj)
        return obj


def _repeat(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], moved: list[tuple[Tensor, Tensor]]) -> Any:
    versions = [version_of(copy) for _, copy in moved]
    result = func(*args, **kwargs)
    for (given, copy), version in zip(moved, versions, strict=True):
        if version_of(copy) != version:
            given.copy_(copy)
    return result


def _backward() -> FunctionType:
    """torch.autograd.backward without its first lines, which would hand it over to the modes once more."""
    plain = torch.autograd.backward
    names = {**plain.__globals__, "has_torch_function": lambda _: False}
    return FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)


def _name(func: Any) -> str:
    name: str = getattr(func, "__name__", "")
    return name.partition(".")[0]  # that of an overload follows


def _is_repeatable(func: FunctionType) -> bool:
    """Whether a function in Python, which combines operations of torch, may be called again after it has failed."""
    return func.__module__ == "torch.functional" or (
        func.__module__ == "torch._tensor" and func.__name__ in _REPEATABLE_METHODS
    )


def _loses_what_it_writes(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation has changed, or would change, what a second call with copies does not bring back."""
    name = _name(func)
    if name in _WRITE_ELSEWHERE or name in ("__set__", "set_"):
        return True
    # What writes to lists may have written to some members before it failed, and raises no versions of copies.
    if not isinstance(func, FunctionType) and any(is_list for *_, is_list in _places_written(func)):
        return True
    return len({tensor.device for tensor in _written(func, args, kwargs)}) > 1


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that the operation is known to change: they must not move."""
    name = _name(func)
    written: list[Any] = [kwargs.get("out")]
    if (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_OPERATORS:
        written += args[:1]
    if not isinstance(func, FunctionType):
        for place, argument, _ in _places_written(func):
            written += args[place : place + 1]
            written.append(kwargs.get(argument))
    return list(_tensors(written))


@functools.cache
def _places_written(func: Any) -> tuple[tuple[int, str, bool], ...]:
    """Position, name and whether it is a list, of each argument that an operator's schema says is changed."""
    name = _name(func)
    operator = func if isinstance(func, (OpOverload, OpOverloadPacket)) else getattr(torch.ops.aten, name, None)
    if isinstance(operator, OpOverloadPacket):
        overloads = [getattr(operator, overload) for overload in operator.overloads()]
    else:
        overloads = [operator] if isinstance(operator, OpOverload) else []
    return tuple(
        (place, argument.name, "List" in str(argument.type))
        for overload in overloads
        for place, argument in enumerate(overload._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write and not argument.kwarg_only
        if str(argument.type) in ("Tensor", "Optional[Tensor]")
        or (name.endswith("_") and "Tensor" in str(argument.type))
    )


def _tensors(obj: Any) -> Iterator[Tensor]:
    if isinstance(obj, Tensor):
        yield obj
    elif isinstance(obj, (list, tuple)) or type(obj) is type({}.values()):
        for item in obj:
            yield from _tensors(item)
