"""What a module's forward depends on besides inputs and parameters: modes and buffers, as they were at some moment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_hetero.runtime.transfer import version_of


class ModuleState:
    """Modes and buffers of some modules as they are now, for another run of their code.

    Args:
        parts: The modules, without those below them.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self._parts = parts
        self._modes = [_mode(part) for part in parts]
        self._buffers = [(part, dict(part._buffers), _version(part._buffers)) for part in parts if part._buffers]

    def lost(self) -> tuple[nn.Module, list[str]] | None:
        """A module that has changed a buffer in place since then, and its buffers: it can no longer be as it was.

        Running statistics do not count: what a normalisation computes in training does not depend on them.
        """
        for part, buffers, version in self._buffers:
            if not isinstance(part, _NormBase) and _version(buffers) != version:
                return part, list(buffers)
        return None

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within the block, modes and buffers are those of then. What happens to running statistics is forgotten."""
        modes = [_mode(part) for part in self._parts]
        buffers = [(part, dict(part._buffers)) for part, _, _ in self._buffers]
        try:
            _set_modes(self._parts, self._modes)
            for part, before, _ in self._buffers:
                _set_buffers(part, _copies(before) if isinstance(part, _NormBase) and part.training else before)
            yield
        finally:
            _set_modes(self._parts, modes)
            for part, now in buffers:
                _set_buffers(part, now)


def _version(buffers: Mapping[str, Tensor | None]) -> int:
    return sum(version_of(buffer) for buffer in buffers.values() if buffer is not None)


def _mode(part: nn.Module) -> tuple[bool, Any]:
    return part.training, part.__dict__.get("track_running_stats")


def _set_modes(parts: Sequence[nn.Module], modes: Sequence[tuple[bool, Any]]) -> None:
    """By their flags, so that no `train` of user code runs."""
    for part, (training, tracks) in zip(parts, modes, strict=True):
        if _mode(part) != (training, tracks):
            part.__dict__["training"] = training
            if tracks is not None:
                part.__dict__["track_running_stats"] = tracks


def _copies(buffers: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()}


def _set_buffers(part: nn.Module, buffers: Mapping[str, Tensor | None]) -> None:
    part._buffers.clear()
    part._buffers.update(buffers)
