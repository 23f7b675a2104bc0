"""Lets `torch.jit.script` compile placed modules while a run goes on, as `to_torchscript` in a hook does.

torch reads the source of `forward`, and of all hooks. Those that this package has put there are none of the model, so
it gets a twin without them, through `__prepare_scriptable__`, which torch asks of every module.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hetero.runtime.hooks import HOOKS, remove_hooks
from lightning_hetero.runtime.standin import InPlace

_NAME = "__prepare_scriptable__"


class Scriptable(InPlace):
    """Stands in for a placed module's `__prepare_scriptable__`.

    A copy of the module carries a copy of this. Keeps no module alive.

    Args:
        module: The module.
        root: Where tensors of what is compiled go: to user code, all of the model is there.
    """

    def __init__(self, module: nn.Module, root: torch.device) -> None:
        self._of = weakref.ref(module)
        self._root = root
        self._before = module.__dict__.get(_NAME)

    def __call__(self) -> nn.Module:
        """What torch compiles in the place of the module."""
        module = self._of()
        assert module is not None, "called through the module"
        twin = _twin(module, self._root, {})
        prepare = getattr(twin, _NAME, None)  # of user code
        return twin if prepare is None else prepare()

    def remove(self) -> None:
        """Give the place back."""
        module = self._of()
        if module is None or module.__dict__.get(_NAME) is not self:
            return
        if self._before is None:
            del module.__dict__[_NAME]
        else:
            module.__dict__[_NAME] = self._before

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self._of(), "root": self._root, "before": self._before}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Belong to the module's copy, which copy and pickle make before what it holds."""
        self._of, self._root, self._before = weakref.ref(state["module"]), state["root"], state["before"]


def make_scriptable(modules: Iterable[nn.Module], root: torch.device) -> None:
    """Let torch compile modules, all of which are placed or have placed ones below them."""
    for module in modules:
        if not isinstance(module, torch.jit.ScriptModule):
            module.__dict__[_NAME] = Scriptable(module, root)


def end_scriptable(module: nn.Module) -> None:
    """Undo `make_scriptable` for one module."""
    scriptable = module.__dict__.get(_NAME)
    if isinstance(scriptable, Scriptable):
        scriptable.remove()


def _twin(module: nn.Module, root: torch.device, known: dict[int, Any]) -> nn.Module:
    """The module with all that is the user's and nothing else. It shares its tensors where they are on the root."""
    if id(module) in known:
        return known[id(module)]  # type: ignore[no-any-return]
    if isinstance(module, torch.jit.ScriptModule):
        away = any(tensor.device != root for tensor in (*module.parameters(), *module.buffers()))
        known[id(module)] = script = copy.deepcopy(module).to(root) if away else module
        return script
    twin: nn.Module = object.__new__(type(module))
    known[id(module)] = twin
    own = twin.__dict__
    for name, value in module.__dict__.items():
        if not isinstance(value, InPlace):
            own[name] = value
        elif value._before is not None:
            own[name] = value._before
    for name in HOOKS:
        if name in own:
            own[name] = own[name].copy()
    remove_hooks(twin)
    own["_parameters"] = {name: _on(root, tensor, known) for name, tensor in module._parameters.items()}
    own["_buffers"] = {name: _on(root, tensor, known) for name, tensor in module._buffers.items()}
    own["_modules"] = {
        name: None if child is None else _twin(child, root, known) for name, child in module._modules.items()
    }
    if isinstance(twin, nn.RNNBase):  # it keeps a list of its weights
        twin._init_flat_weights()
    return twin


def _on(root: torch.device, tensor: Tensor | None, known: dict[int, Any]) -> Tensor | None:
    if tensor is None or tensor.device == root:
        return tensor
    if id(tensor) not in known:
        there = tensor.detach().to(root)
        known[id(tensor)] = nn.Parameter(there, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there
    return known[id(tensor)]  # type: ignore[no-any-return]
