"""Keeps the batch from devices that may not have it, whatever user code does after the plan was made.

A plan is made for what one step of training has shown. Code that hands the batch to another module later on, in
validation or from some epoch on, is not in it. So what goes to a device that is not trusted is looked at once more,
before it leaves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_hetero.errors import PlacementError
from lightning_hetero.runtime.hooks import Hook
from lightning_hetero.runtime.transfer import version_of

_MOST_OBJECTS = 10_000  # to look into for one call: an argument may lead to half of the program
_WITHOUT = (nn.Module, type, str, bytes, int, float, complex, ModuleType, FunctionType, MethodType, type(None))


class Confinement:
    """Knows the tensors of batches, and raises when one of them, or a view of one, is about to leave.

    Args:
        trusted: Names of the devices that may have them.

    Attributes:
        seen_by: Names of units, and of modules around some, that were called with them in `noting`.
    """

    def __init__(self, trusted: Collection[str]) -> None:
        self.trusted = tuple(trusted)
        self.seen_by: set[str] = set()
        # By address, which is not used again as long as the reference is kept; with how often it was changed by then.
        self._memory: dict[int, tuple[StorageWeakRef, int]] = {}
        self._is_noting = False

    def watch(self, batch: Any) -> None:
        """Let the tensors of a batch be kept where they are, as long as they live and are what they are now."""
        known = {address: memory for address, memory in self._memory.items() if not memory[0].expired()}
        for tensor in _tensors_in(batch):
            storage = _storage_of(tensor)
            if storage is not None:
                before, version = known.get(storage._cdata, (None, 0))
                known[storage._cdata] = before or StorageWeakRef(storage), max(version, version_of(tensor))
        self._memory = known

    def holds(self, args: Any) -> bool:
        """Whether arguments have a tensor of a batch, or a view of one, in them.

        What was changed in place since is what somebody made of it.
        """
        return any(map(self._is_of_batch, _tensors_in(args)))

    def _is_of_batch(self, tensor: Tensor) -> bool:
        storage = _storage_of(tensor)
        known = None if storage is None else self._memory.get(storage._cdata)
        return known is not None and version_of(tensor) <= known[1]

    def check(self, unit: str, device: str, args: Any) -> None:
        """See to it that a unit may be called with some arguments.

        Args:
            unit: Name of the unit.
            device: Name of its device.
            args: What it is about to be called with.

        Raises:
            PlacementError: It is on a device that is not trusted, and would get a part of the batch.
        """
        is_trusted = device in self.trusted
        if (is_trusted and not self._is_noting) or not self.holds(args):
            return
        if is_trusted:
            self.seen_by.add(unit)
            return
        raise PlacementError(
            f"{unit!r} on {device!r} was about to be called with a part of the batch, which only trusted devices "
            f"({', '.join(self.trusted)}) may have. It was not in the steps for which the plan was made, so the plan "
            f"does not know of it. Nothing was copied. Pin the module: constraints={{'pins': {{{unit!r}: "
            f"{self.trusted[0]!r}}}, ...}}."
        )

    @contextmanager
    def noting(self, module: nn.Module, units: Iterable[str]) -> Iterator[None]:
        """Within the block, note which units are called with the batch.

        Args:
            module: The model.
            units: Names of its units.
        """
        hooks = [(name, module.get_submodule(name)) for name in units]
        handles = [
            # By the class: ScriptModule forbids the call, since it would not compile the hook.
            nn.Module.register_forward_pre_hook(unit, _Note(self, name), prepend=True, with_kwargs=True)
            for name, unit in hooks
        ]
        self._is_noting = True
        try:
            yield
        finally:
            self._is_noting = False
            for handle in handles:
                handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a run."""
        return {"trusted": self.trusted, "seen_by": set(), "_memory": {}, "_is_noting": False}


@dataclass(frozen=True, eq=False)
class _Note:
    confinement: Confinement
    unit: str

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.confinement.holds((args, kwargs)):
            self.confinement.seen_by.add(self.unit)


@dataclass(frozen=True, eq=False)
class Declare(Hook):
    """Ahead of all that a call of a module does: what it is called with may be on its device."""

    confinement: Confinement
    name: str
    device: str

    def __call__(self, module: nn.Module, *args: Any) -> None:
        """Forward pre-hook."""
        self.confinement.check(self.name, self.device, args)


def _tensors_in(obj: Any) -> Iterator[Tensor]:
    """The tensors of any structure, in attributes of objects too, as far as Python shows it."""
    todo: list[Any] = [obj]
    known: set[int] = set()
    while todo and len(known) < _MOST_OBJECTS:
        each = todo.pop()
        if isinstance(each, Tensor):
            yield each
        elif id(each) not in known and not isinstance(each, _WITHOUT) and not hasattr(each, "__next__"):
            known.add(id(each))
            if isinstance(each, Mapping):
                todo += each.values()
            elif isinstance(each, (list, tuple, set, frozenset)):
                todo += each
            slots = [name for kind in type(each).__mro__ for name in getattr(kind, "__slots__", ())]
            todo += [getattr(each, name, None) for name in slots]
            todo += getattr(each, "__dict__", {}).values()


def _storage_of(tensor: Tensor) -> Any:
    """The memory of a tensor; None for those that have none of their own."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse tensors and the like
        return None
