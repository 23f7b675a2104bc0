"""What Python has read from tensors in a trial, so that its verdict is used only while there is the same in them.

Code may decide by the content of a buffer, a parameter or an input that all rows share (`if self.initialized:`). It
decides the same for every part of a batch, but another verdict may be right for another content.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_hetero.runtime.engine.contents import equal

MOST_READINGS = 8  # of one kind of call; with more it is taken for content that keeps changing
_MOST_NUMBERS = 1 << 20  # in what is compared before every call
_REGISTRIES = ("_buffers", "_parameters", "__dict__")


class _Member(NamedTuple):
    """A tensor of a module, and what was in it."""

    module: nn.Module
    registry: str
    key: str
    content: Tensor


class Readings:
    """The tensors that code has read, or that what it has read was made of, and what was in them.

    Args:
        modules: The modules whose tensors may be among them.
        constants: Those that belong to modules.
        inputs: Those that are inputs, by their place.

    Raises:
        ValueError: There is one that cannot be found again, or too much to compare.
    """

    def __init__(
        self, modules: Sequence[nn.Module], constants: Sequence[Tensor], inputs: Sequence[tuple[int, Tensor]]
    ) -> None:
        tensors = [*constants, *(tensor for _, tensor in inputs)]
        if sum(tensor.numel() for tensor in tensors) > _MOST_NUMBERS:
            raise ValueError("too much to compare")
        if any(tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized for tensor in tensors):
            raise ValueError("a tensor that is not compared")
        self._members = [_found(modules, tensor) for tensor in constants]
        self._inputs = [(place, tensor.detach().clone()) for place, tensor in inputs]

    def hold(self, inputs: Sequence[Tensor]) -> bool:
        """Whether there is the same in all of them now.

        Args:
            inputs: The tensors among the inputs.
        """
        return all(_is_same(_present(member), member.content) for member in self._members) and all(
            _is_same(inputs[place], content) for place, content in self._inputs
        )


def _found(modules: Sequence[nn.Module], tensor: Tensor) -> _Member:
    for module in modules:
        for registry in _REGISTRIES:
            for key, value in getattr(module, registry).items():
                if value is tensor:
                    return _Member(module, registry, key, tensor.detach().clone())
    raise ValueError("a tensor that no module has by name")


def _present(member: _Member) -> Tensor | None:
    value = getattr(member.module, member.registry).get(member.key)
    return value if isinstance(value, Tensor) else None


def _is_same(now: Tensor | None, before: Tensor) -> bool:
    if now is None or (now.shape, now.dtype, now.device) != (before.shape, before.dtype, before.device):
        return False
    now = now.detach()
    return torch.equal(now, before) or (before.is_floating_point() and equal(now, before))
