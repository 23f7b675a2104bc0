"""Makes plans: asks a policy, checks the constraints, and predicts what it will take."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from lightning_hetero.errors import InfeasiblePlanError, PlacementError
from lightning_hetero.placement.constraints import check_constraints
from lightning_hetero.placement.deployed import deployment_notes
from lightning_hetero.placement.executions import executions, on_one_device
from lightning_hetero.placement.objective import Objective
from lightning_hetero.placement.policy import Placement, PlacementPolicy
from lightning_hetero.placement.problem import Problem
from lightning_hetero.placement.refuse import infeasible
from lightning_hetero.placement.replicas import places_of, replicated_execution
from lightning_hetero.plan.build import build_plan
from lightning_hetero.plan.forecast import FORWARD, Execution
from lightning_hetero.plan.plan import Plan
from lightning_hetero.simulate.costs import Costs
from lightning_hetero.simulate.predict import Prediction
from lightning_hetero.simulate.stages import forecast_stages


def make_plan(policy: PlacementPolicy, problem: Problem) -> Plan:
    """Ask the policy and write its answer down as a plan. With a profile, it has a forecast and fits by it.

    Without a profile nothing is predicted, and what the plan needs is left to `check_plan`.

    Raises:
        PlacementError: The policy cannot be obeyed, left a unit without a device, or breaks a constraint.
        InfeasiblePlanError: By the profile, the plan needs more memory than some device has.
    """
    return _plan(policy.place(problem), policy.name, problem)


def make_plans(policy: PlacementPolicy, problem: Problem) -> tuple[Plan, ...]:
    """The plan of `make_plan`, followed by those finalists of the policy that fit.

    Raises:
        PlacementError: As `make_plan`; also for a finalist.
        InfeasiblePlanError: As `make_plan`.
    """
    placement = policy.place(problem)
    plans = [_plan(placement, policy.name, problem)]
    for finalist in placement.finalists:
        with suppress(InfeasiblePlanError):
            plans.append(_plan(finalist, policy.name, problem))
    return tuple(plans)


def _plan(placement: Placement, policy: str, problem: Problem) -> Plan:
    missing = [name for name in problem.graph.names if name not in placement.device_of]
    if missing:
        raise PlacementError(
            f"policy {policy!r} gave no device to {missing[0]!r}"
            + (f" and {len(missing) - 1} more units" if len(missing) > 1 else "")
            + ". A policy has to place every unit of `problem.graph`."
        )
    for device_of in places_of(placement.device_of, placement.shares_of):
        check_constraints(device_of, problem)
    execution, prediction, costs = _predicted(placement, problem)
    if prediction is not None and not prediction.fits:
        raise infeasible(problem, prediction.forecast, execution, policy)
    forecast = prediction.forecast if prediction is not None else None
    plan = build_plan(
        problem.graph,
        problem.inventory,
        placement.device_of,
        policy=policy,
        shares_of=placement.shares_of,
        notes=(*placement.notes, *deployment_notes(problem, forecast)),
        training=problem.training,
        optimizer_factor=problem.optimizer_factor,
        execution=execution,
        forecast=forecast,
        proof=placement.proof,
        alternatives=placement.alternatives,
        objective=problem.objective,
    )
    plan = plan.with_checkpointing(placement.checkpointed)
    if forecast is None or costs is None:
        return plan
    return replace(plan, forecast=replace(forecast, stages=forecast_stages(costs, plan)))


def _predicted(placement: Placement, problem: Problem) -> tuple[Execution, Prediction | None, Costs | None]:
    """How the placement is to run, and what that will take by which costs if there is a profile of all its devices."""
    device_of, shares_of, profile = placement.device_of, placement.shares_of, problem.profile
    choices = _choices(placement, problem)
    names = {name for places in places_of(device_of, shares_of) for name in places.values()}
    if profile is None or not profile.units or not names <= set(profile.devices):
        return choices[0], None, None
    if shares_of and choices[0].schedule != FORWARD:  # not predicted
        return choices[0], None, None
    objective = Objective(problem, profile)
    pairs = [(execution, *objective(device_of, execution, shares_of, placement.checkpointed)) for execution in choices]
    execution, prediction, _ = min(pairs, key=lambda triple: (not triple[1].fits, triple[2]))
    return execution, prediction, objective.costs


def _choices(placement: Placement, problem: Problem) -> list[Execution]:
    if placement.execution is not None:
        return [placement.execution]
    if placement.shares_of:
        return [replicated_execution(problem, placement.shares_of)]
    found = executions(problem, problem.profile.rows if problem.profile is not None else problem.micro_batches or 1)
    return list(on_one_device(problem, found) if len(set(placement.device_of.values())) <= 1 else found)
