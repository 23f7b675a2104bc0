"""Random numbers that are always the same, so that a part of a batch gets those that it has in the whole."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_hetero.runtime.engine.state import saves_otherwise

_FILLED = frozenset({"rand", "rand_like", "randn", "randn_like", "normal"})
_FILLED_IN_PLACE = frozenset({"cauchy_", "exponential_", "log_normal_", "normal_", "uniform_"})
_INTEGERS = frozenset({"randint", "randint_like"})
_ONES = frozenset({"bernoulli_", "geometric_"})
GRADIENT_CALLS = (torch.autograd.backward, torch.autograd.grad, Tensor.backward)
_RECURRENT = frozenset({"gru", "lstm", "rnn_relu", "rnn_tanh"})
DRAWING = (
    _FILLED | _FILLED_IN_PLACE | _INTEGERS | _ONES | {"bernoulli", "multinomial", "poisson", "random_", "randperm"}
)


class Steady(TorchFunctionMode):
    """While active, dropout does nothing, and other random numbers are constants.

    Only for comparisons of a module with itself. What is not known here goes on drawing, so that the comparison fails:
    that is the safe side. Orders (`randperm`) are reversed and not left as they are, which would hide that rows are
    mixed.

    Attributes:
        drew: Whether something would have drawn that activation checkpointing has not run again.
        differentiated: Whether something asked for gradients.
    """

    def __init__(self) -> None:
        super().__init__()
        self.drew = False
        self.differentiated = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, and replace what it drew."""
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        self.drew = self.drew or ((name in DRAWING or "dropout" in name) and not saves_otherwise())
        self.differentiated = self.differentiated or func in GRADIENT_CALLS
        if "dropout" in name:
            x = args[0] if args else kwargs["input"]
            return (x, torch.ones_like(x, dtype=torch.bool)) if name == "native_dropout" else x
        if name == "scaled_dot_product_attention":
            kwargs["dropout_p"] = 0.0
            args = args[:4] + args[5:]
        elif name in _RECURRENT:  # their only float is the share of dropout
            args = tuple(0.0 if isinstance(each, float) else each for each in args)
        elif isinstance(func, FunctionType) and "training" in kwargs and func.__module__ == "torch.nn.functional":
            kwargs["training"] = name in ("batch_norm", "instance_norm") and kwargs["training"]
        return _steady(name, func(*args, **kwargs), args, kwargs)


def _steady(name: str, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if name not in DRAWING or not isinstance(result, Tensor):
        return result
    with torch.no_grad():
        if name in _FILLED or name in _FILLED_IN_PLACE:
            return result.fill_(0.5)
        if name in _ONES:
            return result.fill_(1)
        if name in _INTEGERS:
            given = [each for each in args if type(each) is int]
            return result.fill_(kwargs.get("low", given[0] if len(given) > 1 else 0))
        if name == "random_":
            return result.zero_()
        if name == "randperm":
            return result.copy_(torch.arange(len(result)).flip(0))
        if name == "bernoulli":
            return torch.ones_like(result)
        if name == "poisson":
            return args[0].floor()
        return args[0].topk(result.shape[-1]).indices  # multinomial
