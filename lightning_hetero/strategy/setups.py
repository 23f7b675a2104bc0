"""What a model carries as long as it is set up by Fabric, and what ends by itself when the last such model is gone."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_hetero.plan import Plan
from lightning_hetero.runtime.borders import EnterSplit, LeaveSplit
from lightning_hetero.runtime.hooks import add_hooks
from lightning_hetero.runtime.modes import activate, deactivate
from lightning_hetero.runtime.placed import PlacedModel
from lightning_hetero.runtime.reconcile import DeviceReconciler
from lightning_hetero.runtime.relocate import Replaced
from lightning_hetero.strategy.optimizers import exchange_parameters, keep_state_beside_parameters
from lightning_hetero.strategy.planning import Planning

_KEY = "_lightning_hetero_setup"
_ALL: weakref.WeakSet[Setup] = weakref.WeakSet()


class Setup:
    """A placed model. The model holds it, nobody else does: with the model it goes.

    Args:
        module: The model.
        planning: Makes plans for it.
        placed: The model, not placed yet.

    Attributes:
        replaced: Pairs of old and new Parameter where torch did not let one keep its identity.
        bridge: Lets user code mix tensors of several devices.
    """

    def __init__(self, module: nn.Module, planning: Planning, placed: PlacedModel) -> None:
        self.module = module
        self.planning = planning
        self.placed = placed
        self.replaced: Replaced = []
        self.bridge: Bridge | None = None
        module.__dict__[_KEY] = self
        _ALL.add(self)

    @property
    def plan(self) -> Plan:
        """What it is placed by."""
        return self.placed.plan

    def place(self) -> None:
        """Put the plan into effect."""
        self.placed.place()
        self.replaced += self.placed.replaced
        root = next((split for split in self.placed.layout.splits if split.module is self.module), None)
        if self.placed.spans_devices and root is not None and not root.chain:
            # A Trainer's module is its own caller; this one is called by user code, which is on the root.
            add_hooks(self.module, EnterSplit(self.placed.root, chain=False), LeaveSplit(self.placed.root))

    @property
    def needs_bridge(self) -> bool:
        """Whether user code may come to see tensors of several devices."""
        return self.placed.reconciler() is not None

    def end(self, device: torch.device | None = None) -> Replaced:
        """Take back what was done to the model, and gather it on a device if one is given.

        Returns:
            Pairs of old and new Parameter, as in `replaced`.
        """
        self.bridge = None
        _ALL.discard(self)
        if self.module.__dict__.get(_KEY) is self:
            del self.module.__dict__[_KEY]
        return [*self.replaced, *self.placed.release(device)]

    def exchange(self, replaced: Replaced, optimizers: Iterable[Optimizer]) -> None:
        """Let optimizers follow the parameters."""
        optimizers = list(optimizers)
        for pair in replaced:  # one after the other, as a new Parameter may have been replaced again
            exchange_parameters(optimizers, [pair])
        keep_state_beside_parameters(optimizers)

    def __reduce__(self) -> Any:
        return _nothing, ()  # a copy of the model is not set up


def setup_of(module: nn.Module) -> Setup | None:
    """What a model carries; None if it is not set up."""
    setup = module.__dict__.get(_KEY)
    return setup if isinstance(setup, Setup) and setup.module is module else None


def is_part_of_one(module: nn.Module) -> bool:
    """Whether a module has parts in common with a model that is set up."""
    parts = set(map(id, module.modules()))
    return any(id(part) in parts for setup in _ALL for part in setup.module.modules())


class Bridge:
    """Lets user code mix tensors of several devices, from the first model that needs it to the end of the last.

    Args:
        root: Where operations of user code are carried out if nothing else decides.
    """

    def __init__(self, root: torch.device) -> None:
        Bridge.clear()
        mode = DeviceReconciler(root)
        activate(mode)
        weakref.finalize(self, _end, mode, threading.get_ident()).atexit = False

    @staticmethod
    def clear() -> None:
        """Take off modes of bridges that ended while another thread ran, or in the middle of an operation."""
        for entry in list(_ENDED):
            mode, thread = entry
            if thread == threading.get_ident() and deactivate(mode):
                _ENDED.remove(entry)


_ENDED: list[tuple[DeviceReconciler, int]] = []  # and the threads in which they are active


def _end(mode: DeviceReconciler, thread: int) -> None:
    """Python's garbage collector runs this, at any time and in any thread."""
    _ENDED.append((mode, thread))
    Bridge.clear()


def _nothing() -> None:
    return None
