"""The policy `exact`: the best placement of a chain, with a proof of how good it is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import product
from math import log2, prod

from lightning_hetero.errors import InfeasiblePlanError
from lightning_hetero.placement.as_chain import as_chain, chain_schedule, homes_of
from lightning_hetero.placement.found import Found, best_of, place_by
from lightning_hetero.placement.improve import exchanged, improve
from lightning_hetero.placement.judge import Judge, Priced
from lightning_hetero.placement.memory_first import fill
from lightning_hetero.placement.policy import Placement, register_policy
from lightning_hetero.placement.problem import Problem
from lightning_hetero.placement.refuse import in_words
from lightning_hetero.placement.solve import Effort, solve_chain
from lightning_hetero.placement.solve.chain import ChainObjective
from lightning_hetero.plan.forecast import WHOLE, Execution

SIMULATED_ONE_BY_ONE = 2_000
EVENTS, NODES = 20_000, 300
TRIES, STARTS, WAYS = 200, 3, 2
LIKELY = 8  # micro-batches that are often best; numbers near it are solved first, in case time runs out


@register_policy("exact")
@dataclass(frozen=True)
class ExactPolicy:
    """Units in the order of their calls, any order of devices, idle devices allowed; the lowest predicted step.

    Small problems are simulated placement by placement. Larger ones are solved as a chain, exactly, for every way
    to run a batch and three objectives (slowest stage, closed formula, simulated pipeline). Since a chain is not all
    of the model (see `as_chain`), the best answers are then changed piece by piece as long as the prediction gets
    better.

    Args:
        one_by_one: How many placements, times the ways to run them, may be simulated one by one; 0 always solves.
        tries: How many changed placements may be simulated for each of the best answers.
    """

    one_by_one: int = SIMULATED_ONE_BY_ONE
    tries: int = TRIES
    name: str = "exact"

    def place(self, problem: Problem) -> Placement:
        """Solve."""
        search = partial(find, one_by_one=self.one_by_one, tries=self.tries)
        return place_by(search, problem, self.name, "The exact solver chose the borders, the devices and their order.")


def find(judge: Judge, *, one_by_one: int = SIMULATED_ONE_BY_ONE, tries: int = TRIES) -> Found:
    """The best placement, and what is known about it."""
    count = prod(len(piece.devices) for piece in judge.pieces) * len(judge.executions)
    if count <= one_by_one:
        found = _enumerated(judge, count)
        if found is not None:
            return found
    solved = _solved(judge)
    if not solved:
        filled = judge.best_execution(fill(judge.problem, judge.pieces)[0])
        solved = dict.fromkeys((filled, *judge.singles().values()), "")
    best_first = sorted(solved, key=lambda priced: priced.key)
    of_each_way = {priced.execution: priced for priced in reversed(best_first)}
    starts = sorted(of_each_way.values(), key=lambda priced: priced.key)
    # The chain knows less of memory than the simulator: what does not fit perhaps does on other devices.
    overfull = [start for start in starts if not start.fits and (not starts[0].fits or start.value < starts[0].value)]
    if overfull:
        tried = (
            judge.price(homes, start.execution)
            for start in overfull
            for homes in exchanged(start.homes, judge.names)
            if judge.may_stand(homes) and not judge.time_is_up()
        )
        starts = sorted((*starts, *tried), key=lambda priced: priced.key)
    starts = starts[:STARTS]
    ends = {improve(judge, start, tries=tries): start for start in starts}
    best = best_of((*ends, *judge.singles().values()))
    return Found(best=best, proof=_proof(best, ends, solved))


def _enumerated(judge: Judge, count: int) -> Found | None:
    """All placements; None if time runs out before their end."""
    best: Priced | None = None
    for homes in product(*(piece.devices for piece in judge.pieces)):
        if judge.time_is_up():
            return None
        found = judge.best_execution(homes)
        best = found if best is None or found.key < best.key else best
    assert best is not None  # every piece has a device
    return Found(best=best, proof=f"{best.value:.6g}, proved optimal for the simulator (all {count} plans simulated)")


def _solved(judge: Judge) -> dict[Priced, str]:
    """Plans of the chain solver, each with its proof.

    The closed formula is minimised for every way to run. What takes longer to solve is solved for those ways that look
    best by then.
    """
    by_way: dict[tuple[Execution, ...], dict[Priced, str]] = {}
    for ways in sorted(_alike(judge.executions), key=lambda ways: abs(log2(ways[0].micro_batches / LIKELY))):
        if judge.time_is_up():
            break
        by_way[ways] = _answers(judge, ways, ("max_load",) if judge.problem.is_stream else ("step_formula",))
    found = {priced: proof for answers in by_way.values() for priced, proof in answers.items()}
    hopeful = [ways for ways, answers in by_way.items() if answers and ways[0].schedule != WHOLE]
    for ways in sorted(hopeful, key=lambda ways: best_of(by_way[ways]).key)[:WAYS]:
        if not judge.time_is_up():
            found = _answers(judge, ways, ("step_time", "max_load")) | found
    return found


def _alike(executions: tuple[Execution, ...]) -> list[tuple[Execution, ...]]:
    """Ways to run that are one chain to the solver: as many micro-batches, and as many of them in flight."""
    groups: dict[tuple[int, str, bool], list[Execution]] = {}
    for execution in sorted(executions, key=lambda execution: execution.micro_batches):
        key = (execution.micro_batches, chain_schedule(execution), execution.rematerialize)
        groups.setdefault(key, []).append(execution)
    return [tuple(group) for group in groups.values()]


def _answers(judge: Judge, ways: tuple[Execution, ...], objectives: tuple[ChainObjective, ...]) -> dict[Priced, str]:
    """What the chain solver finds for some objectives, each run in the best of the ways; nothing if nothing fits."""
    chain = as_chain(judge, ways[0])
    found: dict[Priced, str] = {}
    for objective in objectives:
        try:
            answer = solve_chain(
                chain, objective, effort=Effort(events=EVENTS, nodes=NODES), out_of_time=judge.time_is_up
            )
        except InfeasiblePlanError:
            break  # so it is for the other objectives
        homes = homes_of(answer.plan)
        priced = best_of(judge.price(homes, execution) for execution in ways)
        words = objective.replace("_", " ")
        found.setdefault(priced, f"{words} of the chain ({in_words(ways[0])}): {answer.proof}")
    return found


def _proof(best: Priced, ends: dict[Priced, Priced], solved: dict[Priced, str]) -> str:
    if best in ends and ends[best] in solved and solved[ends[best]]:
        changed = "" if ends[best] == best else "; then changed piece by piece, as long as the prediction got better"
        return solved[ends[best]] + changed
    return "best single device; the chain solver found nothing better" if len(best.devices) == 1 else "heuristic"
