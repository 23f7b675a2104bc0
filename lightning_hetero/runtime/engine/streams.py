"""Random numbers that depend on seed, micro-batch and call, and not on which thread was faster.

Torch has one default generator per device, and modules such as Dropout draw from it. Within a pipelined call every
piece of work that draws gets the generator for itself, set to a state of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

_MASK = (1 << 63) - 1


class Generators:
    """The default generators of some devices, one piece of work at a time.

    Args:
        devices: The devices; without an index, the type's only one.
    """

    def __init__(self, devices: list[torch.device]) -> None:
        self.of = {device: Generator(device) for device in dict.fromkeys(devices)}
        self._lock = threading.Lock()
        self._users = 0
        self._kept: dict[torch.device, Tensor] = {}

    def begin(self) -> None:
        """Lanes are about to draw: keep what user code will go on with."""
        with self._lock:
            if self._users == 0:
                self._kept = self.states()
            self._users += 1

    def end(self) -> None:
        """They are done. States are put back by the last: others may be in the middle of their numbers."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self.restore(self._kept)

    @contextmanager
    def alone(self, device: torch.device) -> Iterator[None]:
        """Within the block, nobody else draws on a device, nor on the CPU."""
        mine = [generator for each, generator in self.of.items() if each.type == "cpu" or each == device]
        with ExitStack() as stack:
            for generator in mine:
                stack.enter_context(Stream(generator, None).running())
            yield

    def states(self) -> dict[torch.device, Tensor]:
        """The state of every generator."""
        return {device: generator.get() for device, generator in self.of.items()}

    def restore(self, states: dict[torch.device, Tensor]) -> None:
        """Put states back."""
        for device, state in states.items():
            self.of[device].set(state)

    def drawn_since(self, states: dict[torch.device, Tensor]) -> set[torch.device]:
        """The devices on which anything was drawn since `states` was made."""
        with torch._C.DisableTorchFunction():  # a trial watches what user code compares, not this
            return {device for device, state in states.items() if not torch.equal(self.of[device].get(), state)}


class Generator:
    """The default generator of one device, and the lock of those who draw from it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = None if device.type == "cpu" else getattr(torch, device.type)
        self._which = () if device.type == "mps" else (device,)  # there is one MPS device, and its functions say so
        self.lock = threading.Lock()

    def get(self) -> Tensor:
        """Its state."""
        if self._module is None:
            return torch.get_rng_state()
        state: Tensor = self._module.get_rng_state(*self._which)
        return state

    def set(self, state: Tensor) -> None:
        """Set its state."""
        if self._module is None:
            torch.set_rng_state(state)
        else:
            self._module.set_rng_state(state, *self._which)

    def seed(self, seed: int) -> None:
        """Start it anew."""
        if self._module is None:
            torch.default_generator.manual_seed(seed)
        elif self._which:
            with self._module.device(self._device):
                self._module.manual_seed(seed)
        else:
            self._module.manual_seed(seed)


class Stream:
    """A sequence of random numbers of one lane's own code, which stops while the lane waits for a worker.

    Args:
        generator: Where the numbers come from.
        seed: Where the sequence begins; None leaves the generator as it is.
    """

    def __init__(self, generator: Generator, seed: int | None) -> None:
        self._generator = generator
        self._seed = seed
        self._state: Tensor | None = None

    def resume(self) -> None:
        """Take the generator."""
        self._generator.lock.acquire()
        _HELD.generator = self._generator
        if self._state is not None:
            self._generator.set(self._state)
        elif self._seed is not None:
            self._generator.seed(self._seed)

    def pause(self) -> None:
        """Give the generator to others."""
        self._state = self._generator.get()
        _HELD.generator = None
        self._generator.lock.release()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hold the generator."""
        self.resume()
        try:
            yield
        finally:
            self.pause()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let others draw in between."""
        self.pause()
        try:
            yield
        finally:
            self.resume()


class _Held(threading.local):
    generator: Generator | None = None


_HELD = _Held()


def held() -> Generator | None:
    """The generator that a stream of this thread holds."""
    return _HELD.generator


def derive(*numbers: int) -> int:
    """A seed from numbers: equal numbers give equal seeds, neighbours unrelated ones (SplitMix64)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & _MASK
