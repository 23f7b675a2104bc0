"""Sees what the code of a region does with tensors that no comparison of its results would show."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_hetero.runtime.engine.cut import CannotCutError
from lightning_hetero.runtime.engine.owned import Owned
from lightning_hetero.runtime.engine.steady import DRAWING, GRADIENT_CALLS

# Functions that turn the content of a tensor into something that Python decides by.
_READS = frozenset(
    {
        "__array__",
        "__bool__",
        "__complex__",
        "__contains__",
        "__dlpack__",
        "__float__",
        "__index__",
        "__int__",
        "allclose",
        "equal",
        "is_nonzero",
        "item",
        "numpy",
        "tolist",
    }
)
# Functions that take numbers of elements, or places, where a tensor with one whole number will do. They read it in C++.
_SIZED = frozenset(
    {
        "arange", "broadcast_to", "chunk", "empty", "expand", "eye", "full", "kthvalue", "linspace", "logspace",
        "narrow", "new_empty", "new_full", "new_ones", "new_zeros", "one_hot", "ones", "pad", "rand", "randint",
        "randn", "randperm", "range", "repeat", "reshape", "roll", "select", "split", "tensor_split", "tile", "topk",
        "tril_indices", "triu_indices", "unflatten", "unfold", "view", "zeros",
    }
)  # fmt: skip
_OF_NUMBERS = frozenset({"arange", "linspace", "logspace", "range"})  # those whose first argument is a number, too
# What lets user code see gradients of parts of a batch.
_GRADIENT_HOOKS = frozenset({"register_hook", "register_post_accumulate_grad_hook", "retain_grad"})
_OPERATORS = ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul")
_IN_PLACE_OPERATORS = frozenset(f"__i{name}__" for name in _OPERATORS) | {"__setitem__"}
# Functions that make whole numbers of others, none of which is a place beyond the end of something.
_IN_RANGE = frozenset({"argmax", "argmin", "argsort", "kthvalue", "max", "median", "min", "mode", "sort", "topk"})
# Functions that end the program on some devices if they are given other numbers than they expect.
_PICKY = frozenset({"bernoulli", "bernoulli_", "binary_cross_entropy", "multinomial", "poisson"})
_SOURCES = "_hetero_sources"  # attribute of a tensor: what its content depends on

# A bit for each of the inputs, in the order of places, and then for each of the constants. None: anything.
Sources = int | None


class Read(NamedTuple):
    """A read of a tensor's content.

    Attributes:
        function: What read it.
        sources: What the content depends on; None if that is not known.
    """

    function: str
    sources: Sources


class Observer(TorchFunctionMode):
    """Follows which inputs the content of tensors depends on, and notes what is read into Python.

    A decision by the content of a mask that all rows share is the same for every part of a batch; one by the content
    of the rows is not.

    Args:
        inputs: Tensors among the inputs, by place.
        constants: Tensors that belong to the modules.
        owned: Is told of writes before they are made.
        at_operation: Called after every operation.

    Attributes:
        reads: All reads.
        is_picky: Whether something was done that may fail for numbers of another size, such as looking up places that
            are made of them.

    Raises:
        CannotCutError: From within an operation that shows user code gradients, which are those of parts in lanes.
    """

    def __init__(
        self, inputs: Sequence[Tensor], constants: Iterable[Tensor], owned: Owned, at_operation: Callable[[], None]
    ) -> None:
        super().__init__()
        self._owned = owned
        self._count = len(inputs)
        self._all: list[Tensor] = [*{id(tensor): tensor for tensor in constants}.values()]
        self._constants = {id(tensor): 1 << (self._count + index) for index, tensor in enumerate(self._all)}
        self._at_operation = at_operation
        self._is_lost = False
        self.reads: list[Read] = []
        self.is_picky = False
        for place, tensor in enumerate(inputs):
            _mark(tensor, 1 << place)

    def inputs_of(self, sources: int) -> set[int]:
        """Places of the inputs among some sources."""
        return {place for place in range(self._count) if sources >> place & 1}

    def constants_of(self, sources: int) -> list[Tensor]:
        """The constants among some sources."""
        return [tensor for index, tensor in enumerate(self._all) if sources >> (self._count + index) & 1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, and note what it did."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        sources = self._of_all(_tensors((args, kwargs)))
        if name in _READS:
            self.reads.append(Read(name, sources))
        elif name in _GRADIENT_HOOKS and not _is_ours(args):
            raise CannotCutError(f"it calls {name} of a tensor, for gradients of a whole batch")
        elif func in GRADIENT_CALLS:
            raise CannotCutError("it computes gradients itself")
        else:
            sizes = list(_sizes(name, args, kwargs))
            if sizes and not _is_in_a_module_of_torch():
                self.reads += [Read(name, self._of_all([each])) for each in sizes]
        for tensor in _targets(name, args, kwargs):
            self._owned.before_write(tensor)
        result = func(*args, **kwargs)
        if name in DRAWING:
            sources = None
        for tensor in _targets(name, args, kwargs):
            self._note_write(tensor, sources)
        for tensor in _tensors(result):
            if id(tensor) not in self._constants:
                _mark(tensor, sources)
        self.is_picky = self.is_picky or name in _PICKY or (name not in _IN_RANGE and _makes_integers(args, result))
        self._at_operation()
        return result

    def _note_write(self, tensor: Tensor, sources: Sources) -> None:
        of_constants = sources is not None and not sources & ((1 << self._count) - 1)
        if of_constants and (id(tensor) in self._constants or tensor.__dict__.get(_SOURCES) == sources):
            return
        self._constants.pop(id(tensor), None)
        _mark(tensor, sources)
        if tensor._is_view():
            self._is_lost = True  # whatever shares its memory has changed too

    def _of_all(self, tensors: Iterable[Tensor]) -> Sources:
        found = 0
        for tensor in tensors:
            known: Sources = self._constants.get(id(tensor))
            if known is None:
                known = tensor.__dict__.get(_SOURCES)
            if known is None or self._is_lost:
                return None
            found |= known
        return found


def _targets(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operation writes to."""
    if (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_OPERATORS:
        yield from _tensors(args[0] if args else kwargs.get("input", kwargs.get("self")))
    if kwargs.get("out") is not None:
        yield from _tensors(kwargs["out"])


def _mark(tensor: Tensor, sources: Sources) -> None:
    tensor.__dict__[_SOURCES] = sources


def _tensors(obj: Any) -> Iterator[Tensor]:
    if isinstance(obj, Tensor):
        yield obj
    elif isinstance(obj, (list, tuple)):
        for item in obj:
            yield from _tensors(item)
    elif isinstance(obj, dict):
        for item in obj.values():
            yield from _tensors(item)


def _makes_integers(args: tuple[Any, ...], result: Any) -> bool:
    """Whether an operation makes whole numbers of real ones."""
    return any(
        not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool)
        for tensor in _tensors(result)
    ) and any(tensor.is_floating_point() for tensor in _tensors(args))


def _sizes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Tensors that an operation takes for whole numbers."""
    if name in ("__getitem__", "__setitem__"):
        index = args[1]
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, slice):
                yield from _tensors((part.start, part.stop, part.step))
    elif name in _SIZED:
        given = [*_tensors(args), *_tensors(kwargs)]
        begin = int(bool(args) and isinstance(args[0], Tensor) and name not in _OF_NUMBERS)
        yield from (each for each in given[begin:] if each.numel() == 1 and not each.is_floating_point())


def _is_in_a_module_of_torch() -> bool:
    """Whether one of torch's own modules asks, which know what they do: a recurrent one counts rows by tensors."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        if not name.startswith("torch.") or name == "torch.nn.modules.module":  # which calls modules of users, too
            return False
        if name.startswith("torch.nn.modules."):
            return True
        frame = frame.f_back  # functions of torch are in between
    return False


def _is_ours(args: tuple[Any, ...]) -> bool:
    """Whether the hook that is registered is one of this package (emulated devices have some)."""
    return any(str(getattr(each, "__module__", "")).startswith("lightning_hetero.runtime.") for each in args[1:])
