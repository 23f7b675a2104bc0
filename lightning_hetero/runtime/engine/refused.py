"""Methods that mean a whole batch, such as `self.log`, must not be called for a part of one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from lightning_hetero.runtime.engine.cut import CannotCutError
from lightning_hetero.runtime.engine.handed_on import Place, own_places, places_below, replaced

# A look through all modules is too much for every call: by the first module that is given, the root or a region.
_HANDED_ON: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, ...], list[Place]]] = weakref.WeakKeyDictionary()


@contextmanager
def methods_refused(modules: Iterable[nn.Module], names: Sequence[str]) -> Iterator[list[str]]:
    """Within the block, the modules' methods of these names refuse the cut instead of doing their work.

    So do such methods that were handed on to a module below them before the first time that this is asked for.

    Yields:
        The names of those that were called: user code may have caught what they raised.
    """
    called: list[str] = []

    def refuse(name: str) -> Callable[..., None]:
        def refused(*args: object, **kwargs: object) -> None:
            called.append(name)
            raise CannotCutError(f"its forward calls self.{name}, which has to happen once for a batch")

        return refused

    modules = list(modules)
    handed_on = {(each.owner, each.key): each for module in modules for each in _handed_on(module, names)}
    with replaced([*own_places(modules, names), *handed_on.values()], refuse):
        yield called


def _handed_on(module: nn.Module, names: Sequence[str]) -> list[Place]:
    known = _HANDED_ON.setdefault(module, {})
    key = tuple(names)
    if key not in known:
        known[key] = places_below(module, names)
    return known[key]
