"""How calls of user code get to the engine: a unit for each placed module, and a stand-in for the forward of regions.

Units take the place of `module._compiled_call_impl`, where torch looks before it calls a module: hooks of user code and
of the borders run on the worker, with the module. Regions take the place of `module.forward`: hooks of user code on the
region see the whole batch, once. Copies and pickles of a module come without either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from operator import is_
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_hetero.runtime.engine import at_once
from lightning_hetero.runtime.engine.cut import call_unit
from lightning_hetero.runtime.engine.key import Keys
from lightning_hetero.runtime.engine.lanes import calling_lane, current_lane
from lightning_hetero.runtime.engine.names import named_in_forward
from lightning_hetero.runtime.engine.replicas import Seat
from lightning_hetero.runtime.engine.verdict import Verdict
from lightning_hetero.runtime.engine.worker import Worker
from lightning_hetero.runtime.frames import HERE
from lightning_hetero.runtime.standin import InPlace, StandIn, hide_from_copies, show_again

if TYPE_CHECKING:
    from lightning_hetero.runtime.engine.engine import Engine

_CALL = "_compiled_call_impl"


class _Unit:
    """What a worker runs in one piece.

    Attributes:
        name: For messages and records.
        number: Its place among the units.
        worker: The thread of its device.
        stage: Index of the stage that it belongs to.
        draws: Whether it draws random numbers, as far as a trial has seen.
        keeps_state: Whether its forward changes buffers in evaluation too, as far as a trial has seen.
        runs_again: Whether its backward runs some of it again, by code of its own, as far as a trial has seen.
    """

    keeps_state = False
    runs_again = False

    def __init__(self, engine: Engine, name: str, worker: Worker, stage: int) -> None:
        self.engine = engine
        self.name = name
        self.number = engine.next_number()
        self.worker = worker
        self.stage = stage
        self.draws = False
        self.replicas: tuple[ReplicaUnit, ...] = ()
        self.shares: tuple[float, ...] = ()

    def replicate(self, shares: Sequence[float], seats: Sequence[tuple[Worker, Seat]]) -> None:
        """Let other devices take part of the micro-batches.

        Args:
            shares: How much each device gets, its own first.
            seats: The other devices.
        """
        self.shares = tuple(shares)
        self.replicas = tuple(ReplicaUnit(self, worker, seat) for worker, seat in seats)

    def homes(self, leaves: list[Tensor]) -> list[Tensor]:
        """The parameters that leaves of the unit's graph stand for."""
        return leaves

    def called(self, *args: Any, **kwargs: Any) -> Any:
        """The call of user code that is in no lane."""
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The ordinary call, in this thread."""
        raise NotImplementedError

    @property
    def has_state(self) -> bool:
        """Whether its forward may change buffers, so that the order of micro-batches matters."""
        parts = (part for each in self.parts for part in each.modules())
        return any(part._buffers and (part.training or self.keeps_state) for part in parts)

    @property
    def stateful(self) -> Sequence[nn.Module]:
        """The modules in it whose buffers its forward may change."""
        found = (part for each in self.parts for part in each.modules())
        return [part for part in found if part._buffers and (part.training or self.keeps_state)]

    @cached_property
    def has_large_weights(self) -> bool:
        """Whether it is on the CPU with weights that are large, as far as is known when it is first used."""
        if self.worker.torch_device.type != "cpu":
            return False
        return any(weight.numel() >= at_once.LARGE for part in self.parts for weight in part.parameters())

    @property
    def parts(self) -> Sequence[nn.Module]:
        """The modules that it runs."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The call, where it belongs: by the worker if it comes from a lane, else here."""
        if HERE.at_work:
            return self.run(*args, **kwargs)
        lane = current_lane()
        if lane is not None:
            return call_unit(lane, self, args, kwargs)
        trial = self.engine.trial
        if trial is None:
            return self.called(*args, **kwargs)
        with trial.unit(self, (args, kwargs)):
            return self.run(*args, **kwargs)


class ModuleUnit(_Unit, InPlace):
    """A placed module."""

    stays_behind = True
    parts: Sequence[nn.Module] = ()

    def __init__(self, engine: Engine, name: str, worker: Worker, stage: int, module: nn.Module) -> None:
        super().__init__(engine, name, worker, stage)
        self.module = module
        self.parts = (module,)
        self.region: Region | None = None  # its own, if it has replicas
        self._before: Callable[..., Any] | None = module._compiled_call_impl

    def called(self, *args: Any, **kwargs: Any) -> Any:
        """The call of user code that is in no lane; cut into micro-batches if there are replicas."""
        if self.region is None or self.engine.is_inline:
            return self.run(*args, **kwargs)
        return self.engine.call_region(self.region, args, kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The ordinary call, in this thread."""
        if self._before is not None:
            return self._before(*args, **kwargs)
        return self.module._call_impl(*args, **kwargs)

    def install(self) -> None:
        """Take the place of the module's call."""
        self.module.__dict__[_CALL] = self
        hide_from_copies(self.module)

    def remove(self) -> None:
        """Give it back."""
        if self.module.__dict__.get(_CALL) is self:
            if self._before is None:
                del self.module.__dict__[_CALL]
            else:
                self.module.__dict__[_CALL] = self._before
        show_again(self.module)

    def __reduce__(self) -> Any:
        return _nothing, ()


class ReplicaUnit(_Unit):
    """A unit on another device than that of its parameters.

    Args:
        unit: The unit on its own device.
        worker: The thread of the other one.
        seat: What runs there.
    """

    def __init__(self, unit: _Unit, worker: Worker, seat: Seat) -> None:
        super().__init__(unit.engine, unit.name, worker, unit.stage)
        self._unit = unit
        self.seat = seat

    @property
    def draws(self) -> bool:
        """Whether it draws random numbers, as far as a trial has seen."""
        return self._unit.draws

    @draws.setter
    def draws(self, draws: bool) -> None:
        """Said of the unit itself."""

    @property
    def runs_again(self) -> bool:  # type: ignore[override]
        """Whether its backward runs some of it again, by code of its own, as far as a trial has seen."""
        return self._unit.runs_again

    def homes(self, leaves: list[Tensor]) -> list[Tensor]:
        """The parameters that leaves of the unit's graph stand for."""
        return list(map(self.seat.home, leaves))

    @property
    def parts(self) -> Sequence[nn.Module]:
        """The modules that it runs."""
        return self.seat.twins

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The ordinary call, of the twins."""
        first, *rest = self.seat.twins
        x = first(*args, **kwargs)
        for twin in rest:
            x = twin(x)
        return x


class ChainUnit(_Unit):
    """Several modules of an nn.Sequential that follow each other on one device: one task instead of many."""

    parts: Sequence[nn.Module] = ()

    def __init__(self, engine: Engine, name: str, worker: Worker, stage: int, modules: Sequence[nn.Module]) -> None:
        super().__init__(engine, name, worker, stage)
        self.parts = self.modules = tuple(modules)

    def run(self, x: Any) -> Any:
        """One module after the other."""
        for module in self.modules:
            x = module(x)
        return x


class Region(StandIn):
    """Stands in for the `forward` of a module whose units lie on several devices.

    Args:
        engine: The engine.
        name: Name of the module.
        module: The module.

    Attributes:
        keys: Makes the keys of `verdicts`.
        verdicts: What trials have found, by all that they may depend on.
        tries: How often a trial found what need not last, by the same.
        calls: How many calls there were.
        trials: How many trials.
    """

    def __init__(self, engine: Engine, name: str, module: nn.Module) -> None:
        super().__init__(module)
        self.engine = engine
        self.name = name or type(module).__name__
        self.keys = Keys()
        self.verdicts: dict[Any, Verdict] = {}
        self.tries: Counter[Any] = Counter()
        self.calls = 0
        self.trials = 0
        self.own_code_draws = False
        self._names: frozenset[str] | None = None
        self.chain: tuple[ChainUnit | nn.Module, ...] | None = None

    @property
    def names(self) -> frozenset[str]:
        """All names in the code of its modules."""
        if self._names is None:
            self._names = named_in_forward({type(part) for part in self.module.modules()})
        return self._names

    def whole(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        return self.plain(*args, **kwargs)

    def in_lane(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, with runs of modules on one device as one call."""
        lane = calling_lane()
        given = None if lane is None else lane.take_given()
        if self.chain is None or len(args) != 1 or kwargs or not self._chain_holds():
            return self.plain(*args, **kwargs)
        if lane is not None:
            lane.fresh = given
        (x,) = args
        for link in self.chain:
            if lane is None:
                x = link(x)
                continue
            lane.passes_on = isinstance(link, ChainUnit)
            x = link(x)
            lane.passes_on = False
            if not isinstance(link, ChainUnit):
                lane.fresh = None  # any module may do to a tensor what nobody sees
        return x

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What user code calls."""
        if calling_lane() is not None or self.engine.trial is not None or self.engine.is_inline:
            return self.in_lane(*args, **kwargs)
        return self.engine.call_region(self, args, kwargs)

    def refuse(self, reason: str) -> None:
        """Run whole from now on, whatever trials have said."""
        self.verdicts = dict.fromkeys(self.verdicts, Verdict(None, reason))

    def _chain_holds(self) -> bool:
        """Whether the Sequential still has the children that it had when it was placed."""
        assert self.chain is not None
        expected = [
            module for link in self.chain for module in (link.modules if isinstance(link, ChainUnit) else (link,))
        ]
        found = list(self.module._modules.values())
        return len(found) == len(expected) and all(map(is_, found, expected))


class BlockRegion(Region):
    """The region of a module with replicas: user code calls it, and its micro-batches go to several devices.

    Args:
        unit: The module as a unit.
    """

    def __init__(self, unit: ModuleUnit) -> None:
        super().__init__(unit.engine, unit.name, unit.module)
        self._unit = unit
        unit.region = self

    def whole(self, *args: Any, **kwargs: Any) -> Any:
        """All of it on the device of its parameters."""
        return self._unit.run(*args, **kwargs)

    def in_lane(self, *args: Any, **kwargs: Any) -> Any:
        """The call of the unit."""
        lane = calling_lane()
        if lane is None:
            return self._unit(*args, **kwargs)
        lane.fresh, lane.passes_on = lane.take_given(), True
        try:
            return self._unit(*args, **kwargs)
        finally:
            lane.passes_on = False

    def install(self) -> None:
        """The unit has taken the place of the module's call already."""

    def remove(self) -> None:
        """The unit gives it back."""
        self._unit.region = None


def _nothing() -> None:
    return None
