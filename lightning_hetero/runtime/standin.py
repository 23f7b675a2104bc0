"""Takes the place of a module's `forward`: hooks of user code on the module see its calls as ever.

Copies and pickles of a module come without a stand-in.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import nn

_FORWARD = "forward"


class StandIn:
    """Base of what is called in the place of a module's `forward`.

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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What torch calls."""
        raise NotImplementedError

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
