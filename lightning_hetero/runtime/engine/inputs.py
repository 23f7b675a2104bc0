"""What a unit is called with: cut off from the lane's graph, and brought to the unit's device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_hetero.runtime.containers import are_unchanged, contents
from lightning_hetero.runtime.copies import Arriving, send
from lightning_hetero.runtime.engine.fresh import Fresh
from lightning_hetero.runtime.engine.tree import Tree
from lightning_hetero.runtime.transfer import version_of, versions_of


class Inputs:
    """The arguments of one call of a unit.

    Copies that go up to an accelerator are under way when this is made, and are there for the thread that calls
    `arrive`. Those that come down to the CPU are there already, so that no worker waits for a device. Plain copies are
    made in `arrive`.

    Args:
        given: What the lane passes.
        device: Where the unit wants its inputs; None leaves them where they are.
        records: Whether autograd records the call.
        fresh: What the lane got last, if no user code was in between.

    Attributes:
        traced: The lane's tensors that need a gradient.
        leaves: What stands for them in the unit's graph.
        homes: Where the gradients of `leaves` have to go; None if they stay where they are.
        given_of: The lane's tensor, by `id` of what the unit gets for it.
    """

    def __init__(self, given: Tree, device: torch.device | None, *, records: bool, fresh: Fresh | None = None) -> None:
        self._given = given
        self._records = records
        self._versions = versions_of(given.tensors)
        self._copies: Sequence[tuple[Tensor, Tensor, int]] = ()
        self._containers: list[Any] = []
        self.traced: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self.given_of: dict[int, Tensor] = {}
        self.homes: list[torch.device] | None = None
        self._away: Sequence[Tensor] = ()
        self._arriving: Arriving | None = None
        if device is not None and (away := [tensor for tensor in given.tensors if tensor.device != device]):
            self._away = away
            plain = [tensor.detach() for tensor in away]
            with _counted():
                self._arriving = send(plain, [device] * len(plain), None if fresh is None else fresh.ready(away))
        if self._arriving is None or (device == torch.device("cpu") and self._arriving.is_under_way):
            self._build()

    def arrive(self) -> Any:
        """The arguments, for the calling thread to use."""
        if self._arriving is not None:
            self._build()
        built = self._built
        del self._built
        return built

    def changed(self) -> str | None:
        """What the unit has done to its inputs that it must not, in words; None if nothing.

        A tensor of inference mode that was copied may be written to: it gets the new values.
        """
        if self._versions != versions_of(self._given.tensors):
            return "changes its input in place"
        for given, copy, version in self._copies:
            if version_of(copy) != version:
                if not given.is_inference():
                    return "changes its input in place"
                given.copy_(copy)
        if self._containers and not are_unchanged(self._containers):
            return "writes into a container that it is given"
        return None

    def _build(self) -> None:
        copy_of = None if self._arriving is None else self._arrived(self._arriving)
        used: list[Tensor] = []
        for tensor in self._given.tensors:
            new = tensor if copy_of is None else copy_of.get(id(tensor), tensor)
            if self._records and tensor.requires_grad:
                new = (tensor.detach() if new is tensor else new).requires_grad_()
                self.traced.append(tensor)
                self.leaves.append(new)
            self.given_of[id(new)] = tensor
            used.append(new)
        if copy_of is not None:
            self.homes = [tensor.device for tensor in self.traced]
        self._built = self._given.build(used)
        if self._given.has_containers:
            self._containers = contents(self._built)

    def _arrived(self, arriving: Arriving) -> dict[int, Tensor]:
        """The copies, by `id` of what they are copies of."""
        with _counted():
            copies = arriving.take()
        self._arriving = None
        arrived = [(given, copy) for given, copy in zip(self._away, copies, strict=True) if copy is not None]
        self._copies = [(given, copy, version_of(copy)) for given, copy in arrived]
        return {id(given): copy for given, copy in arrived}


@contextmanager
def _counted() -> Iterator[None]:
    """Within the block, new tensors count how often they are changed: those of inference mode do not."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield
