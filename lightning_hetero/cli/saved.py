"""A plan as a file, and beside it what the step has to do: enough to simulate it, without the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_hetero.devices import Inventory
from lightning_hetero.errors import HeteroError, PlanFileError, ProfileError
from lightning_hetero.graph.model import Compound, ModelGraph, Unit
from lightning_hetero.plan import Plan, check_plan
from lightning_hetero.profile.workload import Workload

if TYPE_CHECKING:
    from lightning_hetero.cli.planner import Planned

FORMAT = "lightning_hetero.costs"
VERSION = 1


def costs_path(plan_path: str | Path) -> Path:
    """`plan.costs.json` for `plan.json`."""
    path = Path(plan_path)
    return path.with_name(f"{path.stem}.costs.json")


def save_planned(planned: Planned, path: str | Path) -> None:
    """Write the plan, and its costs beside it.

    Raises:
        PlanFileError: A file cannot be written.
    """
    costs = {
        "format": FORMAT,
        "version": VERSION,
        "graph": asdict(planned.graph),
        "inventory": planned.inventory.to_dict(),
        "workload": planned.workload.to_dict(),
    }
    try:
        Path(path).write_text(planned.plans[0].to_json(), encoding="utf-8")
        costs_path(path).write_text(json.dumps(costs, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise PlanFileError(f"the plan cannot be written to {str(path)!r}: {error}; choose another save=...") from error


def load_planned(path: str | Path) -> Planned:
    """Read what `save_planned` wrote.

    Raises:
        PlanFileError: The plan cannot be read, or has no costs beside it.
        ProfileError: The costs are damaged, or of another model.
        PlacementError: The plan does not place each unit of the model on one of its devices.
    """
    from lightning_hetero.cli.planner import Planned
    from lightning_hetero.strategy.planning import read_plan

    plan: Plan = read_plan(Path(path))
    file = costs_path(path)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise PlanFileError(
            f"{str(path)!r} has no costs beside it ({file.name}: {error.strerror}), so nothing can be predicted. Make "
            f"them with `lightning-hetero plan MODEL... placement.plan={path} save=with_costs.json`"
        ) from error
    try:
        data = json.loads(content)
    except ValueError as error:  # also of bytes that are no text
        raise ProfileError(f"{str(file)!r} is not valid JSON ({error}); make the plan again") from error
    if not isinstance(data, Mapping) or data.get("format") != FORMAT or data.get("version") != VERSION:
        raise ProfileError(f"{str(file)!r} holds no costs that this version reads; make the plan again")
    try:
        graph = _graph(data["graph"])
        inventory, workload = Inventory.from_dict(data["inventory"]), Workload.from_dict(data["workload"])
    except (HeteroError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ProfileError(
            f"{str(file)!r} is damaged ({type(error).__name__}: {error}); make the plan again"
        ) from error
    if graph.fingerprint != plan.model:
        raise ProfileError(f"{str(file)!r} is of another model than {str(path)!r}; make the plan again")
    check_plan(plan, graph)
    return Planned(plans=(plan,), graph=graph, inventory=inventory, workload=workload)


def _graph(data: Mapping[str, Any]) -> ModelGraph:
    units = tuple(Unit(**{**unit, "aliases": tuple(unit["aliases"])}) for unit in data["units"])
    compounds = tuple(Compound(**compound) for compound in data.get("compounds", ()))
    return ModelGraph(**{**data, "units": units, "whole": tuple(map(tuple, data["whole"])), "compounds": compounds})
