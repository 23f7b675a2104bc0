"""Makes the plan that the strategy obeys: from a policy, from a file, or from where the user put the model."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from lightning_hetero.devices import Inventory
from lightning_hetero.errors import InfeasiblePlanError, PlacementError, PlanFileError
from lightning_hetero.graph import ModelGraph
from lightning_hetero.graph.find import find_units
from lightning_hetero.placement import Constraints, Placement, PlacementPolicy, Problem, make_plans
from lightning_hetero.plan import Plan, check_plan
from lightning_hetero.plan.forecast import FORWARD, WHOLE
from lightning_hetero.profile import ModelProfile
from lightning_hetero.strategy.optimizers import ADAM_FACTOR
from lightning_hetero.units import format_bytes

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What the user has laid down, and what is left to the plan.

    Attributes:
        micro_batches: How many parts a batch is cut into; None leaves it to the plan.
        schedules: Ways to run that a plan may choose from, see `Problem`.
        rematerialize: Whether forwards run again in the backward; None leaves it to the plan.
        may_checkpoint: Whether a plan may take to activation checkpointing where nothing else fits.
        defers_batch_norm: Whether micro-batches may be normalised by their own mean and variance.
        constraints: Rules for every policy.
        objective: What to minimise, see `Problem`.
        time_limit_s: How long a policy may search.
    """

    micro_batches: int | None = None
    schedules: tuple[str, ...] = (WHOLE, FORWARD)
    rematerialize: bool | None = False
    may_checkpoint: bool = False
    defers_batch_norm: bool = False
    constraints: Constraints = field(default_factory=Constraints)
    objective: str = "step_time"
    time_limit_s: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Planning:
    """What every plan of one run is made from.

    Attributes:
        graph: The model.
        inventory: The devices.
        policy: Who decides.
        training: Whether gradients and optimizer state need room.
        terms: What the user has laid down.
        is_fixed: Whether the placement is decided already, whatever a profile says.
    """

    graph: ModelGraph
    inventory: Inventory
    policy: PlacementPolicy
    training: bool
    terms: Terms
    is_fixed: bool

    @classmethod
    def of(
        cls,
        module: nn.Module,
        inventory: Inventory,
        policy: PlacementPolicy,
        *,
        no_split: str | Sequence[str] = (),
        plan_file: Path | None = None,
        training: bool,
        terms: Terms,
    ) -> Planning:
        """Look at the module. A plan file, or a module that the user spread over devices, takes the policy's place."""
        graph = find_units(module, no_split)
        fixed: PlacementPolicy | None
        if plan_file is not None:
            fixed = FromFilePolicy(read_plan(plan_file), keeps_execution=terms.micro_batches is None)
        else:
            fixed = as_placed(module, graph, inventory)
        return cls(
            graph=graph,
            inventory=inventory,
            policy=fixed or policy,
            training=training,
            terms=terms,
            is_fixed=fixed is not None,
        )

    def on(self, inventory: Inventory) -> Planning:
        """The same with more known about the devices."""
        return replace(self, inventory=inventory)

    def before_optimizers(self) -> Plan:
        """A plan while the optimizers do not exist yet: room for Adam's state if there is, else for none.

        Raises:
            PlacementError: The policy cannot be obeyed.
            InfeasiblePlanError: The model fits even without any optimizer state nowhere.
        """
        if not self.training:
            return self.with_optimizer(0.0)
        try:
            return self.with_optimizer(ADAM_FACTOR)
        except InfeasiblePlanError:
            return self.with_optimizer(0.0)

    def with_optimizer(self, factor: float) -> Plan:
        """A checked plan for optimizers that keep `factor` bytes for each byte of trained parameter.

        Raises:
            PlacementError: The policy cannot be obeyed.
            InfeasiblePlanError: A device has less memory than the plan needs of it.
        """
        return self._plans(factor, None)[0]

    def with_profile(self, factor: float, profile: ModelProfile) -> tuple[Plan, ...]:
        """Checked plans for a model of which it is known what it costs: the policy's choice, and its finalists.

        Args:
            factor: See `with_optimizer`.
            profile: What the model costs.

        Raises:
            PlacementError: The policy cannot be obeyed.
            InfeasiblePlanError: Nothing fits, by the profile.
        """
        return self._plans(factor, profile)

    def foreseen(self, plan: Plan, factor: float, profile: ModelProfile) -> Plan | None:
        """A plan that was made without a profile, with the forecast that the profile leads to.

        Args:
            plan: The plan. It stays as it is where it cannot be predicted.
            factor: See `with_optimizer`.
            profile: What the model costs.

        Returns:
            The plan; None if it does not fit by the profile, activations included.
        """
        terms = replace(self.terms, may_checkpoint=False)  # it runs as it is
        again = replace(self, policy=FromFilePolicy(plan), terms=terms)
        try:
            forecast = again.with_profile(factor, profile)[0].forecast
        except InfeasiblePlanError:
            return None
        except PlacementError:
            return plan
        return replace(plan, forecast=forecast)

    @property
    def is_by_time(self) -> bool:
        """Whether the seconds of a step are what to minimise."""
        return self.terms.objective in ("step_time", "throughput")

    def _plans(self, factor: float, profile: ModelProfile | None) -> tuple[Plan, ...]:
        end_s = time.monotonic() + self.terms.time_limit_s
        problem = Problem(
            graph=self.graph,
            inventory=self.inventory,
            training=self.training,
            optimizer_factor=factor,
            profile=profile,
            micro_batches=self.terms.micro_batches,
            schedules=self.terms.schedules,
            rematerialize=self.terms.rematerialize,
            may_checkpoint=self.terms.may_checkpoint,
            defers_batch_norm=self.terms.defers_batch_norm,
            constraints=self.terms.constraints,
            objective=self.terms.objective,
            time_limit_s=self.terms.time_limit_s,
            out_of_time=lambda: time.monotonic() > end_s,
        )
        plan, *finalists = make_plans(self.policy, problem)
        check_plan(plan, self.graph)
        return plan, *(finalist for finalist in finalists if _is_sound(finalist, self.graph))


def _is_sound(plan: Plan, graph: ModelGraph) -> bool:
    try:
        check_plan(plan, graph)
    except InfeasiblePlanError:
        return False
    return True


@dataclass(frozen=True)
class FromFilePolicy:
    """Repeats the placement of a plan that was saved.

    Attributes:
        saved: The plan.
        keeps_execution: Whether batches run as the plan says, and not as the user does.
    """

    saved: Plan
    keeps_execution: bool = True

    @property
    def name(self) -> str:
        """The policy that made the saved plan."""
        return self.saved.policy

    def place(self, problem: Problem) -> Placement:
        """Check that the plan is one for this model and these devices."""
        device_of = self.saved.device_of
        strange = sorted(set(device_of) ^ set(problem.graph.names))
        if strange:
            raise PlacementError(
                f"the plan was made for another model: {strange[0]!r} is a unit of one of the two only "
                f"({len(strange)} such units). Make the plan again, or leave out plan=."
            )
        if self.saved.model != problem.graph.fingerprint:
            self._check_sizes(problem.graph)
        absent = sorted({device.name for device in self.saved.used} - set(problem.inventory.names))
        if absent:
            raise PlacementError(
                f"the plan uses {', '.join(absent)}, which this run does not have: "
                f"{', '.join(problem.inventory.names)}. Ask for these devices, or make a plan for the ones here."
            )
        execution = self.saved.execution if self.keeps_execution else None
        return Placement(
            device_of=device_of,
            shares_of=self.saved.shares_of,
            checkpointed=self.saved.checkpointed,
            notes=("The placement was read from a plan file.", *self._too_small(problem)),
            execution=execution,
        )

    def _check_sizes(self, graph: ModelGraph) -> None:
        """Refuse a model with the same names of units and other parameters; another dtype is none."""
        for stage in self.saved.stages:
            here = sum(graph[name].parameters for name in stage.units)
            if here != stage.parameters:
                raise PlacementError(
                    f"the plan was made for another model: its stage with {stage.units[0]!r} has {stage.parameters} "
                    f"parameters there and {here} here. Make the plan again, or leave out plan=."
                )

    def _too_small(self, problem: Problem) -> Iterator[str]:
        """What was predicted when the plan was made, and is more than devices of this machine may give."""
        if self.saved.forecast is None or problem.profile is not None:
            return
        for device in self.saved.forecast.devices:
            if device.device not in problem.inventory:
                continue
            limit_bytes = problem.inventory[device.device].memory_bytes
            if limit_bytes < device.memory_bytes:
                note = (
                    f"When the plan was made, it was predicted to need {format_bytes(device.memory_bytes)} on "
                    f"{device.device}, which has {format_bytes(limit_bytes)} here. Make the plan again if it "
                    "does not fit."
                )
                log.warning("%s", note)
                yield note


@dataclass(frozen=True)
class AsPlacedPolicy:
    """Leaves a model where its owner put it."""

    device_of: dict[str, str]
    name: str = "as_placed"

    def place(self, problem: Problem) -> Placement:
        """Answer with what was found."""
        return Placement(
            device_of=self.device_of, notes=("The model was spread over devices before the run; it is left there.",)
        )


def as_placed(module: nn.Module, graph: ModelGraph, inventory: Inventory) -> AsPlacedPolicy | None:
    """The policy for a module whose parameters lie on more than one device of torch already; else None.

    Raises:
        PlacementError: A part lies on a device that is not in the inventory.
    """
    found: dict[str, str] = {}
    for unit in graph.units:
        parameters = list(module.get_submodule(unit.name).parameters())
        if parameters:
            found[unit.name] = str(parameters[0].device)
    if len(set(found.values())) < 2 or "meta" in found.values():
        return None
    names = {device.torch_device: device.name for device in inventory.trainable}
    for unit_name, place in found.items():
        if place not in names:
            raise PlacementError(
                f"{unit_name!r} was moved to {place} before the run, which is not among its devices: "
                f"{', '.join(inventory.names)}. Add it to devices=, or leave the model on the CPU."
            )
    device_of = {unit: names[place] for unit, place in found.items()}
    for group in graph.groups:
        placed = next((device_of[unit.name] for unit in group if unit.name in device_of), inventory.root.name)
        device_of.update({unit.name: placed for unit in group if unit.name not in device_of})
    return AsPlacedPolicy(device_of)


def read_plan(path: Path) -> Plan:
    """Read a plan file.

    Raises:
        PlanFileError: The file cannot be read, or holds no plan.
    """
    try:
        return Plan.from_json(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise PlanFileError(
            f"the plan file {str(path)!r} cannot be read: {error}. Write one with "
            "`lightning-hetero plan ... save=FILE`, or leave it out to have a plan made"
        ) from error
    except PlanFileError as error:
        raise PlanFileError(f"{path}: {error}") from error
