"""What one thread must hand to another for an operation to mean the same there."""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch.nn.utils import parametrize

from lightning_hetero.runtime import frames
from lightning_hetero.runtime.frames import HERE, Frame

Result = TypeVar("Result")

_autograd = torch._C._autograd


class ThreadState:
    """The calling thread's modes: gradients, inference, autocast, function modes, context variables, module frame.

    The cache of autocast is not carried: it is shared by all threads, so a weight that one micro-batch had cast
    would tie the graphs of all of them together.

    Args:
        device_types: Device types whose autocast is looked at.
        saves: Whether hooks that decide what autograd saves are handed over too.
    """

    __slots__ = ("_autocast", "_context", "_frame", "_functions", "_grad", "_inference", "_saved")

    def __init__(self, device_types: Sequence[str], *, saves: bool = True) -> None:
        self._grad = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind)) for kind in device_types if torch.is_autocast_enabled(kind)
        ]
        self._functions = [
            torch._C._get_function_stack_at(depth) for depth in range(torch._C._len_torch_function_stack())
        ]
        self._saved = _autograd._top_saved_tensors_default_hooks(False) if saves else None
        self._context = contextvars.copy_context()
        frame = frames.top()
        self._frame = None if frame is None else _without_tensors(frame)

    @property
    def records(self) -> bool:
        """Whether autograd records what is done."""
        return self._grad and not self._inference

    @property
    def saves_otherwise(self) -> bool:
        """Whether hooks decide what autograd saves, as in activation checkpointing."""
        return self._saved is not None

    @property
    def autocast_dtypes(self) -> list[torch.dtype]:
        """The dtypes that autocast computes in; empty if it is off."""
        return [dtype for _, dtype in self._autocast]

    def run(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Call `function` in this thread as if it were the one that was captured."""
        if self._inference:
            with torch.inference_mode():
                return self._run(function, args, kwargs)
        return self._run(function, args, kwargs)

    def _run(self, function: Callable[..., Result], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Result:
        grad = torch.is_grad_enabled()
        depth = frames.depth()
        torch._C._set_grad_enabled(self._grad)
        for kind, dtype in self._autocast:
            torch.set_autocast_enabled(kind, True)
            torch.set_autocast_dtype(kind, dtype)
        if self._autocast:
            torch.set_autocast_cache_enabled(False)
        functions = self._missing_functions()
        for mode in functions:
            torch._C._push_on_torch_function_stack(mode)
        if self._saved is not None:
            _autograd._push_saved_tensors_default_hooks(*self._saved)
        if self._frame is not None:
            frames.push(self._frame)
        try:
            return self._context.copy().run(function, *args, **kwargs)
        finally:
            frames.cut_to(depth)
            if self._saved is not None:
                _autograd._pop_saved_tensors_default_hooks()
            for _ in functions:
                torch._C._pop_torch_function_stack()
            for kind, _ in self._autocast:
                torch.set_autocast_enabled(kind, False)
            if self._autocast:
                torch.set_autocast_cache_enabled(True)
            torch._C._set_grad_enabled(grad)

    def _missing_functions(self) -> list[Any]:
        """The function modes that are not active in this thread already."""
        active = torch._C._len_torch_function_stack()
        if not active:
            return self._functions
        known = {id(torch._C._get_function_stack_at(depth)) for depth in range(active)}
        return [mode for mode in self._functions if id(mode) not in known]


def is_plain() -> bool:
    """Whether this thread is in none of the modes and frames that `ThreadState` hands over, context variables aside."""
    return not (
        HERE.frames
        or torch._C._len_torch_function_stack()
        or torch._C._is_any_autocast_enabled()
        or torch.is_inference_mode_enabled()
        or _autograd._top_saved_tensors_default_hooks(False) is not None
    )


def in_this_context(function: Callable[[], Result]) -> Callable[[], Result]:
    """The function, with the context variables of this thread wherever it is called."""
    return functools.partial(contextvars.copy_context().run, function)


def _without_tensors(frame: Frame) -> Frame:
    return Frame(frame.owner, frame.device, frame.chain)


def saves_otherwise() -> bool:
    """Whether hooks decide now what autograd saves, as in activation checkpointing."""
    return _autograd._top_saved_tensors_default_hooks(False) is not None


def has_global_hooks() -> bool:
    """Whether user code has put hooks on all modules at once, which would see parts of a batch."""
    module = torch.nn.modules.module
    return any(
        (
            module._global_forward_hooks,
            module._global_forward_pre_hooks,
            module._global_backward_hooks,
            module._global_backward_pre_hooks,
        )
    )


def are_operations_counted() -> bool:
    """Whether torch's FLOP counter looks at what runs now, as Lightning's model summary has it do for one forward."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return any(type(mode).__module__ == "torch.utils.flop_counter" for mode in modes)


def stays_in_its_thread() -> str | None:
    """Why what runs now cannot go on in another thread; None if it can.

    These modes live in the thread and cannot be handed over: a call that hopped out of `torch.func.grad` would
    return a plain tensor and lose its gradient without an error.
    """
    if torch.compiler.is_dynamo_compiling():  # in this thread; `is_compiling` is true in all while one compiles
        return "it is being compiled"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "it runs inside a transform of torch.func"
    if torch._C._len_torch_dispatch_stack():
        return "a TorchDispatchMode is active"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if torch._C._get_tracing_state() is not None:
        return "it is being traced"
    return None


class ProcessModes(NamedTuple):
    """What all threads have in common: code that changes it for a while changes it for those that run beside it."""

    forward_level: int
    caches: int
    dtype: torch.dtype

    @classmethod
    def now(cls) -> ProcessModes:
        """Those of this moment."""
        return cls(torch.autograd.forward_ad._current_level, parametrize._cache_enabled, torch.get_default_dtype())

    def change(self) -> str | None:
        """What is different now, in words that follow "it"; None if nothing is."""
        now = ProcessModes.now()
        if now == self:
            return None
        if now.forward_level != self.forward_level:
            return "differentiates in forward mode"
        if now.caches != self.caches:
            return "keeps parametrizations cached"
        return "sets the default dtype of torch"


def keeps_graph() -> bool:
    """Whether the backward that runs now was called with `retain_graph=True`."""
    keep: Any = _autograd._get_current_graph_task_keep_graph()
    return bool(keep)
