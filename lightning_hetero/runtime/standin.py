"""Takes the place of a module's `forward`: hooks of user code on the module see its calls as ever.

Copies and pickles of a module come without a stand-in.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import nn

_FORWARD = "forward"


# What makes a function of a function, for those who read its code, as torch.export does.
_OF_FUNCTIONS = ("__closure__", "__code__", "__defaults__", "__func__", "__globals__", "__kwdefaults__", "__self__")


class InPlace:
    """Marks what this package puts into the `__dict__` of a module, in the place of something or of nothing."""

    _before: Any = None  # what was there


class StandIn(InPlace):
    """Base of what is called in the place of a module's `forward`. To those who look at it, it is that forward.

    Args:
        module: The module.

    Attributes:
        module: The module.
        plain: The forward that it had.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._before: Any = module.__dict__.get(_FORWARD)
        self.plain: Callable[..., Any] = module.forward
        functools.update_wrapper(self, self.plain, updated=())  # its signature, which user code may ask for

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What torch calls."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name in _OF_FUNCTIONS:
            return getattr(self.plain, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def install(self) -> None:
        """Take the place of the module's forward."""
        self.module.__dict__[_FORWARD] = self

    def remove(self) -> None:
        """Give it back."""
        if self.module.__dict__.get(_FORWARD) is self:
            if self._before is None:
                del self.module.__dict__[_FORWARD]
            else:
                self.module.__dict__[_FORWARD] = self._before

    def __reduce__(self) -> Any:
        # A copy gets the forward that the module had, even one that user code had put on this very module.
        return (_own_forward, (self.module,)) if self._before is None else (_itself, (self._before,))


def _itself(forward: Any) -> Any:
    return forward


def _own_forward(module: nn.Module) -> Any:
    return types.MethodType(type(module).forward, module)
