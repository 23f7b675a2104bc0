"""Methods that mean a whole batch, such as `self.log`, must not be called for a part of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from lightning_hetero.runtime.engine.cut import CannotCutError


@contextmanager
def methods_refused(modules: Iterable[nn.Module], names: Sequence[str]) -> Iterator[list[str]]:
    """Within the block, the modules' methods of these names refuse the cut instead of doing their work.

    Yields:
        The names of those that were called: user code may have caught what they raised.
    """
    called: list[str] = []

    def refuse(name: str) -> Callable[..., None]:
        def refused(*args: object, **kwargs: object) -> None:
            called.append(name)
            raise CannotCutError(f"its forward calls self.{name}, which has to happen once for a batch")

        return refused

    shadowed = [
        (module.__dict__, name)
        for module in {id(module): module for module in modules}.values()
        for name in names
        if hasattr(type(module), name) and name not in module.__dict__
    ]
    for attributes, name in shadowed:
        attributes[name] = refuse(name)
    try:
        yield called
    finally:
        for attributes, name in shadowed:
            del attributes[name]
