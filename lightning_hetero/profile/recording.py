"""Watches one real call of a model: which units are called, in which order, with what."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_hetero.errors import ProfileError
from lightning_hetero.graph.model import ModelGraph
from lightning_hetero.profile.clock import synchronize
from lightning_hetero.profile.costs import Entering, Flow
from lightning_hetero.profile.coupled import coupled_modules
from lightning_hetero.profile.flows import TensorSpec, Tracker
from lightning_hetero.profile.own_code import OwnCodeTracker
from lightning_hetero.profile.sample import Sample, autocast_dtype, sort_of_call, sort_of_module
from lightning_hetero.profile.structure import all_visible, has_values, tensors_in


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of one unit.

    Attributes:
        unit: Its name.
        inputs: The tensors among its arguments, each one once.
        outputs: The tensors in what it returned.
        seconds: How long its forward took, the first time and with all that hooks of user code did.
    """

    unit: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    seconds: float


class Recording:
    """Notes what a model does while user code runs it once on a real batch.

    It is entered around that code::

        with Recording(module, graph) as recording:
            loss = module.training_step(batch, 0)

    The block should hold the forward and the loss, not the backward, and call the model once. Results stay what they
    are without it: nothing is drawn from random numbers, no parameter, buffer, gradient or mode changes, and the hooks
    are gone when the block ends, also by an exception. Of every unit the inputs of its first call are copied to host
    memory, those of equal units once; the batch itself is not kept.

    The hooks close one door: `nn.TransformerEncoderLayer` leaves its fused kernel for inference aside while there
    are hooks, as it does on a placed model.

    Args:
        module: The model whose units `graph` lists.
        graph: What `find_units(module)` found.
        rows: Rows of the batch; None takes the most frequent dim 0 of the tensors that are passed to units.

    Attributes:
        calls: The calls of units, in order; a unit that another unit calls belongs to that one.
        samples: One call of each sort of unit and input, by the sort's key.
        handed: Likewise, of sorts of which the sample has to do with the batch, a call on what other units made.
        sort_of: The sort of each unit that was called.
        followers: Names of the parameter-free modules that come after a unit in an `nn.Sequential`, by name of the
            unit: they run where it runs, and what they take and keep is counted as its own.
        coupled: Names of modules that make the rows of a batch depend on each other.
        own_code: What the model's own code keeps.
        own_code_s: Seconds outside of units, those of the recording itself taken off. They are those of a first call.
        device: Where the parameters of the model were; "cpu" if it has none.
        shapes_only: Whether tensors had no values (meta and fake tensors).
    """

    def __init__(self, module: nn.Module, graph: ModelGraph, *, rows: int | None = None) -> None:
        if rows is not None and rows < 1:
            raise ProfileError(f"rows must be at least 1, got {rows}")
        self.module = module
        self.graph = graph
        self.calls: tuple[Call, ...] = ()
        self.samples: dict[str, Sample] = {}
        self.handed: dict[str, Sample] = {}
        self.sort_of: dict[str, str] = {}
        self.followers: dict[str, tuple[str, ...]] = {}
        self.own_code = OwnCodeTracker(module)
        self.coupled = coupled_modules(module)
        self.own_code_s = 0.0
        self.shapes_only = False
        tensor = next(module.parameters(), None)
        self.device = torch.device("cpu") if tensor is None else tensor.device
        self._rows = rows
        self._calls: list[Call] = []
        self._open: list[_Open] = []
        self._tracker = Tracker()
        self._handles: list[RemovableHandle] = []
        self._plain: list[list[Any]] = []
        self._of_batch: set[str] = set()  # the sorts of which the sample may have to do with the batch
        self._names = {id(inner): name for name, inner in module.named_modules()}
        self._now_s = self._since_s = 0.0
        self._trouble: Exception | None = None
        self._state = "new"

    def __enter__(self) -> Recording:
        if self._state != "new":
            raise ProfileError("a Recording records once; make a new one for another call of the model")
        self._state = "running"
        units = {id(self.module.get_submodule(name)): name for name in self.graph.names}
        try:
            self._hook_below(self.module, units, set())
        except BaseException:
            self._remove()
            raise
        synchronize(self.device)
        self._resume()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()
        self._pause()
        self.own_code.forget()
        if kind is not None:
            self._state = "failed"
            return
        self.calls = tuple(self._calls)
        self._state = "done"

    def ends_in(self, outputs: Any) -> None:
        """Say, at the end of the block, what user code made, such as the loss of a training step.

        Its graph tells what own code keeps after the last unit; without it that is estimated from what units return.

        Args:
            outputs: A tensor or any structure of tensors. It stays as it is, and is not kept.
        """
        if self._state == "running":
            self._note(lambda: self.own_code.end(tensors_in(outputs)))

    @property
    def rows(self) -> int:
        """Rows of the batch.

        Raises:
            ProfileError: Nothing was recorded.
        """
        self._check()
        if self._rows is None:
            specs = [spec for call in self.calls for spec in call.inputs if spec.shape]
            counts = Counter(spec.shape[0] for spec in specs if spec.shape[0] > 0)
            self._rows = counts.most_common(1)[0][0] if counts else 1
        return self._rows

    @property
    def flows(self) -> tuple[Flow, ...]:
        """What passes between units.

        Raises:
            ProfileError: Nothing was recorded.
        """
        return self._tracker.flows(self.rows)

    @property
    def sees_batch(self) -> tuple[str, ...]:
        """Units that were given the batch or what the model's own code made of it, also through other units."""
        return self._tracker.sees_batch

    @property
    def out_of_sight(self) -> tuple[str, ...]:
        """Units that were called with objects that nobody can look into."""
        return self._tracker.out_of_sight

    def is_of_batch(self, sort: str) -> bool:
        """Whether the sample of a sort may have to do with the batch."""
        return sort in self._of_batch

    @property
    def entering(self) -> tuple[Entering, ...]:
        """What modules with units are called with.

        Raises:
            ProfileError: Nothing was recorded.
        """
        return self._tracker.entering(self.rows)

    def _check(self) -> None:
        name = type(self.module).__name__
        if self._state != "done":
            why = "the code inside raised an error" if self._state == "failed" else "its block has not ended"
            raise ProfileError(f"this recording of {name} is not complete: {why}. Record a call that ends normally.")
        if self._trouble is not None:
            raise ProfileError(
                f"this recording of {name} is not complete: {type(self._trouble).__name__}: {self._trouble}"
            ) from self._trouble
        if not self.calls:
            raise ProfileError(
                f"no unit of {name} was called while it was recorded; call the model inside of "
                "`with Recording(module, graph):`, and pass the graph of that module"
            )

    # ------------------------------------------------------------------------------------ hooks

    def _hook_below(self, module: nn.Module, units: dict[int, str], seen: set[int]) -> bool:
        """Put hooks on units, the modules above them, and parameter-free links of chains; whether a unit is there."""
        if id(module) in units:
            if id(module) not in seen:
                seen.add(id(module))
                name = units[id(module)]
                followers = (self.module.get_submodule(other) for other in self.followers.get(name, ()))
                sort = "|".join(map(sort_of_module, (module, *followers)))
                self._hook(module, partial(self._enter_unit, name, sort), self._leave_unit)
            return True
        if id(module) in seen:
            return any(id(inner) in units for inner in module.modules())
        seen.add(id(module))
        chain = _is_chain(module)
        if chain:
            self._find_followers(module, units)
        found = [(child, self._hook_below(child, units, seen)) for child in module.children()]
        if not any(has_units for _, has_units in found):
            return False
        self._hook(module, partial(self._enter_module, chain, self._names[id(module)]), self._leave_module)
        for child, has_units in found if chain else ():
            if not has_units:
                self._hook(child, self._enter_plain, self._leave_plain)
        return True

    def _find_followers(self, chain: nn.Module, units: dict[int, str]) -> None:
        unit: str | None = None
        for child in chain.children():
            if id(child) in units:
                unit = units[id(child)]
            elif unit is not None and not any(id(inner) in units for inner in child.modules()):
                self.followers[unit] = (*self.followers.get(unit, ()), self._names[id(child)])
            else:
                unit = None

    def _hook(self, module: nn.Module, before: Any, after: Any) -> None:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._note(before, args, kwargs)

        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._note(after, output)

        # Outermost: inputs as the caller passes them, outputs as the caller gets them, and None after an error. By the
        # class, since ScriptModule would try to compile the hook.
        self._handles += (
            nn.Module.register_forward_pre_hook(module, enter, prepend=True, with_kwargs=True),
            nn.Module.register_forward_hook(module, leave, with_kwargs=True, always_call=True),
        )

    def _note(self, what: Callable[..., None], *args: Any) -> None:
        """Note something. If that fails (inputs that cannot be copied, say), the user's call goes on all the same."""
        if self._trouble is not None:
            return
        try:
            self._pause()
            what(*args)
            self._resume()
        except Exception as error:
            self._trouble = error

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _pause(self) -> None:
        """Own code stops, or a call of a unit ends."""
        synchronize(self.device)
        self._now_s = time.perf_counter()
        if not self._open and not any(self._plain):
            self.own_code_s += self._now_s - self._since_s

    def _resume(self) -> None:
        """Own code goes on, unless a unit has been entered."""
        self._since_s = time.perf_counter()

    def _enter_module(self, chain: bool, name: str, args: Any, kwargs: Any) -> None:
        self._tracker.enter_module(name, all_visible((args, kwargs)), chain=chain)
        self.own_code.modules.append(name)

    def _leave_module(self, output: Any) -> None:
        outputs = tensors_in(output)
        self.own_code.leave_module(outputs)
        self._tracker.leave_module(outputs)

    def _enter_plain(self, args: Any, kwargs: Any) -> None:
        # The sources are asked for now: an activation that works in place changes them.
        call = (args, kwargs)
        self._plain.append(self._tracker.sources(tensors_in(call), is_visible=all_visible(call) is not None))

    def _leave_plain(self, output: Any) -> None:
        sources, outputs = self._plain.pop(), tensors_in(output)
        self._tracker.carry(sources, outputs)
        if sources:
            self.own_code.make(sources[0].source, outputs)

    def _enter_unit(self, name: str, sort: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs, is_visible = tensors_in((args, kwargs)), all_visible((args, kwargs)) is not None
        if self._open:  # a unit that calls another one
            self._tracker.take_inside(name, inputs, is_visible=is_visible)
            self._open.append(_Open(name, (), self._now_s))
            return
        sees_batch = self._tracker.take(name, inputs, is_visible=is_visible)
        self.own_code.take(name, inputs)
        self.shapes_only |= not all(map(has_values, inputs))
        if name not in self.sort_of:
            autocast = autocast_dtype(self.device)
            key = self.sort_of[name] = sort_of_call(sort, args, kwargs, autocast)
            if key not in self.samples:
                self.samples[key] = Sample.of(name, args, kwargs, autocast)
                self._of_batch |= {key} if sees_batch else set()
            elif key in self._of_batch and not sees_batch and key not in self.handed:
                self.handed[key] = Sample.of(name, args, kwargs, autocast)
        specs = tuple(map(TensorSpec.of, inputs))
        self._open.append(_Open(name, specs, time.perf_counter()))

    def _leave_unit(self, output: Any) -> None:
        call = self._open.pop()
        if self._open:
            return
        outputs = tensors_in(output)
        self._tracker.make(call.unit, outputs)
        self.own_code.make(call.unit, outputs)
        specs = tuple(map(TensorSpec.of, outputs))
        self._calls.append(Call(unit=call.unit, inputs=call.inputs, outputs=specs, seconds=self._now_s - call.begun_s))
        sample = self.samples[self.sort_of[call.unit]]
        if sample.unit == call.unit and not sample.outputs:
            self.samples[self.sort_of[call.unit]] = replace(sample, outputs=specs)


@dataclass(frozen=True, slots=True)
class _Open:
    """A call that has not ended."""

    unit: str
    inputs: tuple[TensorSpec, ...]
    begun_s: float


def _is_chain(module: nn.Module) -> bool:
    """Whether the module's `forward` is that of nn.Sequential: each child's output is the next one's input."""
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and "forward" not in module.__dict__
    )
