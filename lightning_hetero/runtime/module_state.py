"""What a module's forward depends on besides inputs and parameters, as it was at some moment, for another run of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_hetero.runtime.engine.surroundings import Surroundings
from lightning_hetero.runtime.transfer import version_of


class Lost(NamedTuple):
    """Something that can no longer be as it was.

    Attributes:
        owner: The class of the module that has it.
        what: What it is.
        names: Its names, or those of several of which it is one.
    """

    owner: str
    what: str
    names: Sequence[str]


class ModuleState:
    """Buffers and attributes of some modules as they are now, and what is inside of them.

    Args:
        parts: The modules, without those below them.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self._surroundings = Surroundings(parts)
        # Running statistics do not count: what a normalisation computes in training does not depend on them.
        self._normalised = [part for part in parts if isinstance(part, _NormBase) and part.training]
        normalised = set(self._normalised)
        self._buffers = [
            (part, dict(part._buffers), _version(part._buffers))
            for part in parts
            if part._buffers and part not in normalised
        ]

    def lost(self) -> Lost | None:
        """What was changed in place since then, so that it can no longer be as it was; None if nothing was."""
        for part, buffers, version in self._buffers:
            if _version(buffers) != version:
                return Lost(type(part).__name__, "a buffer", list(buffers))
        found = self._surroundings.lost
        return None if found is None else Lost(found[0], "a tensor", [found[1]])

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within the block, all of it is as it was then. What happens to running statistics is forgotten."""
        with self._surroundings.in_effect():
            for part in self._normalised:
                part._buffers.update(_copies(part._buffers))
            yield


def _copies(buffers: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()}


def _version(buffers: Mapping[str, Tensor | None]) -> int:
    return sum(version_of(buffer) for buffer in buffers.values() if buffer is not None)
