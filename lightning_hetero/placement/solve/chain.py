"""Solves chains of layers on unequal devices: smallest bottleneck, lowest step formula, lowest simulated step."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

from lightning_hetero.errors import InfeasiblePlanError
from lightning_hetero.placement.solve.chain_bottleneck import ChainAnswer, least_bottleneck, least_formula, load_bound
from lightning_hetero.placement.solve.chain_classes import DeviceClasses
from lightning_hetero.placement.solve.chain_local import Effort, improve_step
from lightning_hetero.placement.solve.chain_order import search_orders
from lightning_hetero.placement.solve.chain_problem import ChainProblem
from lightning_hetero.placement.solve.chain_search import least_step
from lightning_hetero.placement.solve.proof import Proof, never
from lightning_hetero.units import format_bytes

ChainObjective = Literal["max_load", "step_formula", "step_time"]

# Numbers in the table of the exact programme: beyond 160 MB, device orders are searched and some devices left out.
LARGEST_TABLE, SMALL_TABLE = 20_000_000, 300_000


def solve_chain(
    problem: ChainProblem,
    objective: ChainObjective = "step_time",
    *,
    effort: Effort | None = None,
    out_of_time: Callable[[], bool] = never,
) -> ChainAnswer:
    """The best plan for a chain of layers, with a proof.

    "max_load" and "step_formula" are solved exactly. "step_time" is solved by going through plans in order of a lower
    bound; its proof says how far that got. With too many different devices for the exact programme, all three come
    from a search over device orders, and the proof gives the gap.

    Args:
        problem: Layers, devices, links and constraints.
        objective: What to minimise.
        effort: How much "step_time" may simulate.
        out_of_time: Asked now and then; once it says True, the best plan so far is returned.

    Raises:
        InfeasiblePlanError: No split of the chain fits on the devices.

    Example:
        >>> from lightning_hetero.placement.solve import ChainDevice, ChainProblem
        >>> two = tuple(ChainDevice(name=n, kind=n, memory_bytes=100) for n in ("fast", "slow"))
        >>> seconds = {"fast": [1.0] * 6, "slow": [2.0] * 6}
        >>> problem = ChainProblem(forward_s=seconds, backward_s=seconds, state_bytes=[10] * 6, devices=two,
        ...                        activation_bytes=[1] * 6, output_bytes=[1] * 6, micro_batches=4)
        >>> answer = solve_chain(problem, "max_load")
        >>> [(stage.device, stage.stop - stage.first) for stage in answer.plan], str(answer.proof)
        ([('fast', 4), ('slow', 2)], '8, proved optimal (exact dynamic programme)')
    """
    effort = effort or Effort()
    classes = DeviceClasses(problem)
    if table_size(classes) > LARGEST_TABLE:
        return _search(problem, objective, effort, out_of_time)
    return _exact(classes, objective, effort, out_of_time)


def _exact(
    classes: DeviceClasses, objective: ChainObjective, effort: Effort, out_of_time: Callable[[], bool]
) -> ChainAnswer:
    least = least_bottleneck(classes)
    if least is None:
        raise _infeasible(classes.problem)
    if objective == "max_load":
        return least
    if out_of_time():
        return _priced(classes.problem, least, objective)
    answer, plans = least_formula(classes, least, out_of_time)
    if objective == "step_formula":
        return answer
    return least_step(classes, [answer.plan, *plans], effort, out_of_time)


def table_size(classes: DeviceClasses) -> int:
    """Numbers in the table of the exact programme."""
    size = classes.groups**2 * (classes.layers + 1)
    for members in classes.members:
        size *= len(members) + 1
    return size


def _search(
    problem: ChainProblem, objective: ChainObjective, effort: Effort, out_of_time: Callable[[], bool]
) -> ChainAnswer:
    """The best of a search over device orders and of exact plans without the slowest, or the smallest, devices."""
    found = search_orders(problem, formula=objective != "max_load", out_of_time=out_of_time)
    answers = [] if found is None else [found]
    for fewer in _with_fewer_devices(problem):
        try:
            answers.append(_exact(DeviceClasses(fewer), objective, effort.part(0.3), out_of_time))
        except InfeasiblePlanError:
            continue  # the devices left out are needed
    if not answers:
        raise _infeasible(problem)
    if objective == "step_time":
        plan, _ = improve_step(problem, [answer.plan for answer in answers], effort, out_of_time)
        return _priced(problem, replace(answers[0], plan=plan), objective)
    priced = [_priced(problem, answer, objective) for answer in answers]
    return min(priced, key=lambda answer: answer.proof.value)


def _with_fewer_devices(problem: ChainProblem) -> Iterator[ChainProblem]:
    """The same problem with the fastest devices, and with the roomiest, as many as make a small table."""
    fewest_s = {kind: sum(problem.forward_s[kind]) + sum(problem.backward_s[kind]) for kind in problem.forward_s}
    pinned = set(problem.pins.values())
    orders = [
        sorted(problem.devices, key=lambda device: (device.name not in pinned, fewest_s[device.kind])),
        sorted(problem.devices, key=lambda device: (device.name not in pinned, -device.memory_bytes)),
    ]
    for order in orders:
        parts = [replace(problem, devices=tuple(order[:count])) for count in range(max(1, len(pinned)), len(order))]
        number = bisect_right(parts, SMALL_TABLE, key=lambda part: table_size(DeviceClasses(part)))
        if number:
            yield parts[number - 1]


def _priced(problem: ChainProblem, answer: ChainAnswer, objective: ChainObjective) -> ChainAnswer:
    """The plan of an answer under another objective, or with more devices around."""
    price = {"max_load": problem.max_load_s, "step_formula": problem.step_formula_s, "step_time": problem.step_time_s}
    value, bound = price[objective](answer.plan), load_bound(problem)
    # Every micro-batch passes the slowest stage. What that sends does not count: a simulated stage need not wait.
    bound = min(value, bound if objective == "max_load" else bound * problem.micro_batches)
    return replace(answer, proof=Proof(value=value, lower_bound=bound, method="search over device orders"))


def _infeasible(problem: ChainProblem) -> InfeasiblePlanError:
    need = sum(problem.state_bytes) + sum(problem.activation_bytes)
    room = sum(max(0.0, device.memory_bytes - problem.fixed_bytes) for device in problem.devices)
    homeless = [i for i in range(problem.layers) if not any(problem.may_hold(d, i) for d in problem.devices)]
    if homeless:
        why = f"no device may hold layer {homeless[0]}: pins and allowed layers exclude all of them"
        way = "allow it on some device"
    else:
        why = (
            f"one micro-batch alone needs {format_bytes(int(need))} and the {len(problem.devices)} devices have "
            f"{format_bytes(int(room))}, and no stage may be split over two devices"
        )
        way = "add memory or devices, use smaller micro-batches, or loosen pins and allowed layers"
    return InfeasiblePlanError(f"no split of the {problem.layers} layers fits: {why}. {way[0].upper()}{way[1:]}.")
