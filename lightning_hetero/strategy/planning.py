"""Makes the plan that the strategy obeys: from a policy, from a file, or from where the user put the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lightning_hetero.devices import Inventory
from lightning_hetero.errors import InfeasiblePlanError, PlacementError, PlanFileError
from lightning_hetero.graph import ModelGraph
from lightning_hetero.graph.find import find_units
from lightning_hetero.placement import Placement, PlacementPolicy, Problem, make_plan
from lightning_hetero.plan import Plan, check_plan
from lightning_hetero.strategy.optimizers import ADAM_FACTOR


@dataclass(frozen=True, slots=True, kw_only=True)
class Planning:
    """What every plan of one run is made from.

    Attributes:
        graph: The model.
        inventory: The devices.
        policy: Who decides.
        training: Whether gradients and optimizer state need room.
    """

    graph: ModelGraph
    inventory: Inventory
    policy: PlacementPolicy
    training: bool

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
    ) -> Planning:
        """Look at the module. A plan file, or a module that the user spread over devices, takes the policy's place."""
        graph = find_units(module, no_split)
        if plan_file is not None:
            policy = FromFilePolicy(read_plan(plan_file))
        else:
            policy = as_placed(module, graph, inventory) or policy
        return cls(graph=graph, inventory=inventory, policy=policy, training=training)

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
        problem = Problem(graph=self.graph, inventory=self.inventory, training=self.training, optimizer_factor=factor)
        plan = make_plan(self.policy, problem)
        check_plan(plan, self.graph)
        return plan


@dataclass(frozen=True)
class FromFilePolicy:
    """Repeats the placement of a plan that was saved."""

    saved: Plan

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
        absent = sorted(set(device_of.values()) - set(problem.inventory.names))
        if absent:
            raise PlacementError(
                f"the plan uses {', '.join(absent)}, which this run does not have: "
                f"{', '.join(problem.inventory.names)}. Ask for these devices, or make a plan for the ones here."
            )
        return Placement(device_of=device_of, notes=("The placement was read from a plan file.",))


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
        raise PlanFileError(f"the plan file {str(path)!r} cannot be read: {error}") from error
    except PlanFileError as error:
        raise PlanFileError(f"{path}: {error}") from error
