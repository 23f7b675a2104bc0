"""Prices placements with the simulator, so that all policies are compared by one measure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lightning_hetero.placement.executions import as_on_one_device, executions, on_one_device
from lightning_hetero.placement.objective import Objective, fullest
from lightning_hetero.placement.pieces import Piece, device_map, pieces_of, share_map
from lightning_hetero.placement.problem import Problem
from lightning_hetero.plan.forecast import Execution, Forecast
from lightning_hetero.plan.plan import Share
from lightning_hetero.profile.costs import ModelProfile
from lightning_hetero.profile.estimate import estimate_profile

Homes = tuple[str, ...]  # the device of every piece
Shares = tuple[tuple[Share, ...], ...]  # the replicas of every piece


@dataclass(frozen=True, slots=True, kw_only=True)
class Priced:
    """A placement and what the simulator says of it.

    Attributes:
        homes: Device of every piece.
        execution: How a batch runs.
        excess: By which part of its limit the fullest device is overfull; 0 if all fit.
        value: What the objective makes of it; the lower the better.
        forecast: The prediction.
        shares: Replicas of every piece, its home first; empty for a piece without, and altogether if there are none.
        checkpointed: Devices whose layers keep their inputs only and run again in the backward.
    """

    homes: Homes
    execution: Execution
    excess: float
    value: float
    forecast: Forecast
    shares: Shares = ()
    checkpointed: frozenset[str] = frozenset()

    @property
    def fits(self) -> bool:
        """Whether no device is overfull."""
        return self.excess == 0

    @property
    def devices(self) -> frozenset[str]:
        """Those that hold a piece."""
        return frozenset(self.homes).union(share.device for of_piece in self.shares for share in of_piece)

    @property
    def key(self) -> tuple[float, float, int]:
        """For sorting: what fits, then the objective, then few devices."""
        return self.excess, self.value, len(self.devices)


class Judge:
    """Prices placements of one problem and remembers the prices.

    Attributes:
        problem: The problem.
        pieces: What may be placed.
        profile: The problem's, or an estimate from sizes where it has none.
        executions: The ways to run a batch over several devices.
        asked: How many placements were simulated.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.pieces: tuple[Piece, ...] = pieces_of(problem)
        self.profile = problem.profile or estimated(problem)
        self.executions = executions(problem, self.profile.rows)
        self._alone = on_one_device(problem, self.executions)
        self.asked = 0
        self._was_stopped = False
        self.objective = Objective(problem, self.profile)
        self.costs = self.objective.costs
        self._known: dict[tuple[Homes, Execution], Priced] = {}
        self._shared: dict[tuple[Homes, Shares, Execution], Priced] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Devices that may be used, in the order of the inventory."""
        return tuple(device.name for device in self.problem.usable)

    def price(self, homes: Iterable[str], execution: Execution) -> Priced:
        """The price of a placement; if it must not run in this way, in the best way that is allowed."""
        homes = tuple(homes)
        if len(set(homes)) == 1:
            execution = as_on_one_device(execution)
        if execution not in self.ways(homes):
            return self.best_execution(homes)
        known = self._known.get((homes, execution))
        if known is None:
            self.asked += 1
            known = self._known[homes, execution] = self._price(homes, execution)
        return known

    def price_shared(self, homes: Iterable[str], shares: Shares, execution: Execution) -> Priced:
        """The price of a placement with replicas, which has to run as "forward"."""
        homes = tuple(homes)
        known = self._shared.get((homes, shares, execution))
        if known is None:
            self.asked += 1
            known = self._shared[homes, shares, execution] = self._price(homes, execution, shares)
        return known

    def price_checkpointed(self, priced: Priced, devices: frozenset[str]) -> Priced:
        """The price of a placement without replicas, with activation checkpointing on some devices."""
        self.asked += 1
        return self._price(priced.homes, priced.execution, checkpointed=devices)

    def best_execution(self, homes: Iterable[str]) -> Priced:
        """The best way to run a placement."""
        homes = tuple(homes)
        return min((self.price(homes, execution) for execution in self.ways(homes)), key=lambda priced: priced.key)

    def ways(self, homes: Homes) -> tuple[Execution, ...]:
        """The ways in which a placement may run."""
        return self._alone if len(set(homes)) == 1 else self.executions

    def singles(self) -> dict[str, Priced]:
        """The whole model on each device that may hold all of it."""
        return {
            name: self.price_alone(name) for name in self.names if all(name in piece.devices for piece in self.pieces)
        }

    def price_alone(self, name: str) -> Priced:
        """Everything on one device, in the best way to run that."""
        return self.best_execution([name] * len(self.pieces))

    def priced(self) -> Iterable[Priced]:
        """Everything that was priced so far."""
        return [*self._known.values(), *self._shared.values()]

    def time_is_up(self) -> bool:
        """Whether to take the best placement so far. Once it said so, the answer has a note of it."""
        if self.problem.time_is_up():
            self._was_stopped = True
        return self._was_stopped

    def stopped_note(self) -> tuple[str, ...]:
        """A sentence, if the search was stopped before its end."""
        if not self._was_stopped:
            return ()
        return (f"The search was stopped after {self.problem.time_limit_s:g} s; there may be better plans.",)

    def may_stand(self, homes: Iterable[str]) -> bool:
        """Whether every piece is on a device that is allowed to it."""
        return all(home in piece.devices for home, piece in zip(homes, self.pieces, strict=True))

    def _price(
        self,
        homes: Homes,
        execution: Execution,
        shares: Shares = (),
        checkpointed: frozenset[str] = frozenset(),
    ) -> Priced:
        shares_of, device_of = share_map(self.pieces, shares), device_map(self.pieces, homes)
        units = [unit for unit, device in device_of.items() if device in checkpointed]
        prediction, value = self.objective(device_of, execution, shares_of, units)
        return Priced(
            homes=homes,
            execution=execution,
            excess=0.0 if prediction.fits else max(fullest(prediction.forecast) - 1.0, 1e-12),
            value=value,
            forecast=prediction.forecast,
            shares=shares,
            checkpointed=checkpointed,
        )


def estimated(problem: Problem) -> ModelProfile:
    """Costs from sizes, where nothing was measured; as many rows as micro-batches are asked for."""
    return estimate_profile(
        problem.graph, problem.inventory, rows=problem.micro_batches or 1, training=problem.training
    )
