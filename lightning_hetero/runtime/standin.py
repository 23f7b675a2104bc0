"""Takes the place of a module's `forward`: hooks of user code on the module see its calls as ever.

Copies and pickles of a module come without a stand-in.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

_FORWARD = "forward"
_STATE = "__getstate__"  # which `copy.copy` and all other copies ask an object for


# What makes a function of a function, for those who read its code, as torch.export does.
_OF_FUNCTIONS = ("__closure__", "__code__", "__defaults__", "__func__", "__globals__", "__kwdefaults__", "__self__")


class InPlace:
    """Marks what this package puts into the `__dict__` of a module, in the place of something or of nothing."""

    _before: Any = None  # what was there
    stays_behind = False  # whether it is for one module, and not for copies of that


class OwnState(InPlace):
    """Stands in for a module's `__getstate__`: shallow copies come without what is for this very module, too."""

    stays_behind = True

    def __init__(self, module: nn.Module) -> None:
        self._of = weakref.ref(module)
        self._before = module.__dict__.get(_STATE)

    def __call__(self) -> Any:
        """What copies get."""
        module = self._of()
        assert module is not None, "called through the module"
        plain = getattr(type(module), _STATE, None)
        if self._before is not None:
            state = self._before()
        elif plain is not None:
            state = plain(module)
        else:  # before Python 3.11
            state = module.__dict__
        return _without(state) if type(state) is dict else state


def _without(state: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, value in state.items():
        if not (isinstance(value, InPlace) and value.stays_behind):
            found[name] = value
        elif value._before is not None:
            found[name] = value._before
    return found


def hide_from_copies(module: nn.Module) -> None:
    """Let shallow copies of a module come without what is for this very module."""
    if not isinstance(module.__dict__.get(_STATE), OwnState):
        module.__dict__[_STATE] = OwnState(module)


def show_again(module: nn.Module) -> None:
    """Undo `hide_from_copies`, unless there is something left that is for this very module."""
    own = module.__dict__.get(_STATE)
    if isinstance(own, OwnState) and not any(_is_for_one(each) for each in module.__dict__.values() if each is not own):
        if own._before is None:
            del module.__dict__[_STATE]
        else:
            module.__dict__[_STATE] = own._before


def without_own_state(members: dict[str, Any]) -> None:
    """Take it out of the members of something that was made of those of another module."""
    if isinstance(members.get(_STATE), OwnState):
        members.pop(_STATE)


def _is_for_one(value: Any) -> bool:
    return isinstance(value, InPlace) and value.stays_behind


class StandIn(InPlace):
    """Base of what is called in the place of a module's `forward`. To those who look at it, it is that forward.

    Args:
        module: The module.

    Attributes:
        module: The module.
        plain: The forward that it had.
    """

    stays_behind = True

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
        hide_from_copies(self.module)

    def remove(self) -> None:
        """Give it back."""
        if self.module.__dict__.get(_FORWARD) is self:
            if self._before is None:
                del self.module.__dict__[_FORWARD]
            else:
                self.module.__dict__[_FORWARD] = self._before
        show_again(self.module)

    def __reduce__(self) -> Any:
        # A copy gets the forward that the module had, even one that user code had put on this very module.
        return (_own_forward, (self.module,)) if self._before is None else (_itself, (self._before,))


def _itself(forward: Any) -> Any:
    return forward


def _own_forward(module: nn.Module) -> Any:
    return types.MethodType(type(module).forward, module)
