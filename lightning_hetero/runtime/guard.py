"""Keeps a placed module where it was placed when user code calls `.to(device)`, `.cuda()` or `.cpu()` on it."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hetero.runtime.hooks import remove_hooks
from lightning_hetero.runtime.scripting import end_scriptable
from lightning_hetero.runtime.standin import InPlace


class StayPlaced(InPlace):
    """Stands in for a placed module's `_apply`, through which every conversion of a module goes.

    Conversions of dtype take effect, moves do not. A copy of the module (copy.deepcopy, pickle) carries a copy of
    this object; the first conversion of the copy frees it: it loses guard and border hooks, and then moves as it
    is told, like any other module.

    Keeps no module alive: a strong reference would make a circle, and what a copy for measuring holds on a device
    would wait for the garbage collector.
    """

    def __init__(self, module: nn.Module, root: torch.device) -> None:
        self._of = weakref.ref(module)
        self._owner = id(module)
        self._root = root

    @property
    def _module(self) -> nn.Module:
        module = self._of()
        assert module is not None, "called through the module"
        return module

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self._module, "owner": self._owner, "root": self._root}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Belong to the module's copy, which copy and pickle make before what it holds."""
        self._of, self._owner, self._root = weakref.ref(state["module"]), state["owner"], state["root"]

    def __call__(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        """What `module._apply(fn)` does now."""
        module = self._module
        if id(module) != self._owner:
            release(module)
            freed: nn.Module = module._apply(fn, *args, **kwargs)
            return freed
        asked: set[torch.device] = set()

        def stay(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            if new.device != tensor.device:
                asked.add(new.device)
                new = new.to(tensor.device)
            return new

        result: nn.Module = type(module)._apply(module, stay, *args, **kwargs)
        if asked:
            if "_device" in module.__dict__:  # Lightning's `self.device`, which its `.to` changed already
                module.__dict__["_device"] = self._root
            warnings.warn(
                f"{type(module).__name__} stays where the plan placed it: a move to "
                f"{', '.join(sorted(map(str, asked)))} was ignored. The strategy moves modules; leave out "
                "`.to(device)`, `.cuda()` and `.cpu()` while it runs, or place modules by hand with placement={...}.",
                stacklevel=4,
            )
        return result


def guard(modules: Iterable[nn.Module], root: torch.device) -> None:
    """Put guards on modules.

    Args:
        modules: Every module that was placed, parents and children alike.
        root: The device that Lightning shows as `self.device`.
    """
    for module in modules:
        module.__dict__["_apply"] = StayPlaced(module, root)


def release(root: nn.Module) -> None:
    """Take guards and hooks off `root` and everything below it."""
    for module in root.modules():
        if isinstance(module.__dict__.get("_apply"), StayPlaced):
            del module.__dict__["_apply"]
        end_scriptable(module)
        remove_hooks(module)
