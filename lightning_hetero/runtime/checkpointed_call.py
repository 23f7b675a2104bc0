"""One call of a module with activation checkpointing: its run in the forward, and all later ones in backwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from lightning_hetero.errors import UnsupportedError
from lightning_hetero.runtime import frames
from lightning_hetero.runtime.engine.faults import annotated
from lightning_hetero.runtime.engine.state import ThreadState
from lightning_hetero.runtime.engine.streams import Generator, held
from lightning_hetero.runtime.frozen import Frozen
from lightning_hetero.runtime.module_state import ModuleState
from lightning_hetero.runtime.transfer import map_tensors, version_of

if TYPE_CHECKING:
    from lightning_hetero.runtime.activation_checkpointing import Checkpointed

_STOPPED: Any = getattr(torch.utils.checkpoint, "_StopRecomputationError", ())  # how torch ends a run early


class CheckpointedCall:
    """What `torch.utils.checkpoint` calls: first in the forward, then in every backward.

    Args:
        owner: The module's stand-in.
        args: Inputs.
        kwargs: Inputs by name.

    Raises:
        UnsupportedError: The module does something that cannot be done again.
    """

    def __init__(self, owner: Checkpointed, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._owner = owner
        self._given: tuple[tuple[Any, ...], dict[str, Any]] | None = (args, kwargs)
        self._copies = owner.changes_inputs is not False
        self._frozen = Frozen((args, kwargs))
        self._keep(args, kwargs)
        self._state = ThreadState((), saves=False)
        self._modules = ModuleState(owner.parts)
        self._parameters: list[tuple[int, int]] = []
        # Workers hold the generator of what draws, in the backward too; others share those of all devices.
        self._in_lane = frames.are_random_numbers_arranged()
        self._drawn: list[tuple[Generator, Tensor]] = []

    def __call__(self, marker: Tensor) -> Any:
        """What torch calls, first in the forward."""
        given, self._given = self._given, None
        if given is not None:
            return self._first(*given)
        try:
            with self._repeating(), self._modules.again():
                return self._state.run(self._again)
        except _STOPPED:
            raise
        except BaseException as error:
            annotated(error, f"forward of {self._owner.name}, run again for the backward (activation checkpointing)")
            raise

    def _first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        owner = self._owner
        if self._in_lane and owner.draws_elsewhere:
            raise UnsupportedError(
                f"{owner.name} is on {owner.device_name} and draws random numbers on the CPU, which cannot be repeated "
                f"while other micro-batches draw there. Leave its device, {owner.device_name}, out of "
                "activation_checkpointing."
            )
        mine = [held()] if self._in_lane else owner.generators
        before = [(generator, generator.get()) for generator in mine if generator is not None]
        output = owner.plain(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # user code's modes need not see this
            self._drawn = [(each, state) for each, state in before if not torch.equal(each.get(), state)]
        owner.draws_elsewhere |= any(each is not owner.generators[-1] for each, _ in self._drawn)
        self._parameters = _versions(owner.parameters())
        self._check_modules()
        self._check_inputs(args, kwargs)
        return output

    def _again(self) -> Any:
        if any(version_of(tensor) != version for tensor, version in self._kept):
            raise RuntimeError(_changed(self._owner.name, "an input"))
        if _versions(self._owner.parameters()) != self._parameters:
            raise RuntimeError(_changed(self._owner.name, "a parameter"))
        lost = self._modules.lost()
        if lost is not None:
            raise RuntimeError(_changed(self._owner.name, lost.what))
        args, kwargs = self._inputs
        if self._copies:  # this run may change them, and there may be another one
            copy_of = {id(kept): kept.clone() for kept, _ in self._kept}
            args, kwargs = map_tensors(self._inputs, lambda kept: copy_of[id(kept)], self._owner.device)
        return self._owner.plain(*args, **kwargs)

    # Inputs

    def _keep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the inputs without their graph, which would make a circle if the module changed them in place."""
        self._given_versions: list[tuple[Tensor, int]] = []
        self._kept: list[tuple[Tensor, int]] = []
        kept_of: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            if id(tensor) not in kept_of:  # one tensor passed twice arrives as one tensor
                kept = tensor.detach().clone() if self._copies else tensor.detach()
                kept_of[id(tensor)] = kept.requires_grad_() if tensor.requires_grad else kept
                self._kept.append((kept, version_of(kept)))
                self._given_versions.append((tensor, version_of(tensor)))
            return kept_of[id(tensor)]

        self._inputs = self._frozen.of(map_tensors((args, kwargs), keep, self._owner.device))

    def _check_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find out whether the module has changed its inputs: only then copies are needed."""
        owner = self._owner
        changes = any(version_of(tensor) != version for tensor, version in self._given_versions)
        self._given_versions = []
        if changes and not self._copies:
            owner.changes_inputs = True
            raise UnsupportedError(
                f"{owner.name} changes its input in place, which it did not do in its first call, so its forward "
                f"cannot be run again. Leave its device, {owner.device_name}, out of activation_checkpointing."
            )
        if owner.changes_inputs is None:
            owner.changes_inputs = self._copies = changes
            if not changes:
                self._keep(args, kwargs)
                self._given_versions = []

    # Modules and random numbers

    def _check_modules(self) -> None:
        """Refuse modules whose second run would begin with other buffers than the first one."""
        lost = self._modules.lost()
        if lost is not None:
            raise UnsupportedError(
                f"{self._owner.name} cannot be checkpointed: the forward of {lost.owner} in it changes {lost.what} in "
                f"place ({', '.join(lost.names)}), so a second run would compute something else. Leave its device, "
                f"{self._owner.device_name}, out of activation_checkpointing."
            )

    @contextmanager
    def _repeating(self) -> Iterator[None]:
        """Within the block, random numbers are those of the first run; after it they go on from where they were."""
        with ExitStack() as stack:
            for generator, state in self._drawn:
                # Modules of several devices may run again at the same time; all of them may use the CPU's generator.
                # Nobody may wait for another one, though: what holds it may need the thread of that device.
                is_shared = generator is self._owner.generators[0] and not self._in_lane
                stack.enter_context(_repeating(generator, state, generator.lock if is_shared else nullcontext()))
            yield


@contextmanager
def _repeating(generator: Generator, state: Tensor, lock: AbstractContextManager[Any]) -> Iterator[None]:
    """Within the block the generator goes on from `state`, and after it from where it was."""
    with lock:
        now = generator.get()
        generator.set(state)
        try:
            yield
        finally:
            generator.set(now)


def _versions(parameters: Iterable[Tensor]) -> list[tuple[int, int]]:
    return [(id(parameter), parameter._version) for parameter in parameters]


def _changed(name: str, what: str) -> str:
    return (
        f"{what} of {name} was changed after the call, but the backward has to run its forward again (activation "
        "checkpointing). Call backward before that, or leave its device out of activation_checkpointing."
    )
