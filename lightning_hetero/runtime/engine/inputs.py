"""What a unit is called with: cut off from the lane's graph, and brought to the unit's device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_hetero.runtime.containers import are_unchanged, contents
from lightning_hetero.runtime.copies import Arriving, send
from lightning_hetero.runtime.engine.fresh import Fresh
from lightning_hetero.runtime.engine.tree import Tree
from lightning_hetero.runtime.transfer import version_of


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
        used: What stands for each of `given.tensors`.
    """

    def __init__(self, given: Tree, device: torch.device | None, *, records: bool, fresh: Fresh | None = None) -> None:
        self._given = given
        self._records = records
        try:
            self._versions = [tensor._version for tensor in given.tensors]
        except RuntimeError:  # some are of inference mode
            self._versions = [version_of(tensor) for tensor in given.tensors]
        self._copies: list[tuple[Tensor, Tensor, int]] = []
        self._containers: list[Any] = []
        self.traced: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self.used: list[Tensor] = given.tensors
        self._away: list[Tensor] = []
        self._arriving: Arriving | None = None
        self._built: Any = None
        if device is not None:
            self._away = [tensor for tensor in given.tensors if tensor.device != device]
        if self._away and device is not None:
            plain = [tensor.detach() for tensor in self._away]
            with _counted():
                self._arriving = send(plain, [device] * len(plain), None if fresh is None else fresh.ready(self._away))
        if self._arriving is None or (device == torch.device("cpu") and self._arriving.is_under_way):
            self._build()

    @property
    def given_of(self) -> dict[int, Tensor]:
        """The lane's tensor, by `id` of what the unit got for it."""
        return {id(new): old for old, new in zip(self._given.tensors, self.used, strict=True)}

    @property
    def homes(self) -> list[torch.device] | None:
        """Where the gradients of `leaves` have to go; None if they stay where they are."""
        return [tensor.device for tensor in self.traced] if self._copies else None

    def arrive(self) -> Any:
        """The arguments, for the calling thread to use."""
        if self._arriving is not None:
            self._build()
        built, self._built = self._built, None
        return built

    def changed(self) -> str | None:
        """What the unit has done to its inputs that it must not, in words; None if nothing.

        A tensor of inference mode that was copied may be written to: it gets the new values.
        """
        for tensor, version in zip(self._given.tensors, self._versions, strict=True):
            try:
                now = tensor._version
            except RuntimeError:
                now = 0
            if now != version:
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
        new_of: dict[int, Tensor] = {}
        if self._arriving is not None:
            with _counted():
                copies = self._arriving.take()
            for given, copy in zip(self._away, copies, strict=True):
                assert copy is not None
                new_of[id(given)] = copy
                self._copies.append((given, copy, version_of(copy)))
            self._arriving = None
        used: list[Tensor] = []
        for tensor in self._given.tensors:
            new = new_of.get(id(tensor))
            if self._records and tensor.requires_grad:
                new = (tensor.detach() if new is None else new).requires_grad_()
                self.traced.append(tensor)
                self.leaves.append(new)
            used.append(tensor if new is None else new)
        self.used = used
        self._built = self._given.build(used)
        self._containers = contents(self._built) if self._given.has_containers else []


@contextmanager
def _counted() -> Iterator[None]:
    """Within the block, new tensors count how often they are changed: those of inference mode do not."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield
