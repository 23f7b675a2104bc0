"""Calls of methods such as `self.log`, noted for each micro-batch instead of made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_hetero.runtime.engine.cut import CannotCutError
from lightning_hetero.runtime.engine.handed_on import Place, own_places, places_below, replaced
from lightning_hetero.runtime.engine.lanes import calling_lane


@dataclass(frozen=True, slots=True)
class Noted:
    """One call of a recorded method, such as `log`."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def recorder(name: str, notes: list[Noted]) -> Callable[..., None]:
    """What stands in the place of a method and notes its calls."""

    def record(*args: Any, **kwargs: Any) -> None:
        notes.append(Noted(name, tuple(map(_detached, args)), {key: _detached(v) for key, v in kwargs.items()}))

    return record


def _detached(value: Any) -> Any:
    """What a tensor is at this moment: user code may go on with it in place, as in `loss += penalty`."""
    return value.detach().clone() if isinstance(value, Tensor) else value


class Elsewhere:
    """Notes calls of a module's methods that do not come by its twins: of methods that were handed on, say.

    The module does not say for which micro-batch that is; the thread of a lane does, and of those that run one after
    the other it is the one that runs.

    Args:
        module: The module.
        names: Names of the methods.

    Attributes:
        index: The micro-batch that runs, if they run one after the other.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        self._module = module
        self._names = names
        self._places: list[Place] = []
        self.index: int | None = None
        self._asked: Callable[[str], None] | None = None

    def find(self) -> None:
        """Look for what was handed on."""
        self._places = places_below(self._module, self._names)

    @contextmanager
    def noting(self, notes: Sequence[list[Noted]]) -> Iterator[None]:
        """Within the block, calls are noted: in `notes`, of all micro-batches."""
        places = {(each.owner, each.key): each for each in (*own_places([self._module], self._names), *self._places)}

        def make(name: str) -> Callable[..., None]:
            def note(*args: Any, **kwargs: Any) -> None:
                recorder(name, self._notes_of_now(notes, name))(*args, **kwargs)

            return note

        try:
            with replaced(list(places.values()), make):
                yield
        finally:
            self.index = None

    @contextmanager
    def asking(self, asked: Callable[[str], None]) -> Iterator[None]:
        """Within the block, `asked` is told when somebody calls who has no lane."""
        self._asked = asked
        try:
            yield
        finally:
            self._asked = None

    def _notes_of_now(self, notes: Sequence[list[Noted]], name: str) -> list[Noted]:
        lane = calling_lane()
        index = self.index if lane is None else lane.index
        if index is None:
            raise CannotCutError(f"a part of the model calls self.{name}, which was handed on to it")
        if lane is None and self._asked is not None:
            self._asked(name)
        return notes[index]
