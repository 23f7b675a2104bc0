"""How good the plans of the placement solvers are, and how long planning takes.

    python benchmarks/planner.py
    python benchmarks/planner.py --quick
    python benchmarks/planner.py INSTANCE.json ... --best best_known.json --plans FOLDER

With files, it solves public instances (see `placement_instances.py` for their formats). With --best, it prints how far
each value is above the best one known; that file maps the end of a path to {"best": {objective: {"value": number}},
"best_contiguous": likewise}. With --plans, it writes each plan as a file for other programs to price. Without files,
it makes problems of growing size and measures the CPU time of planning.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import get_args

from placement_instances import (
    Graph,
    Json,
    SharesProblem,
    chain_placement,
    graph_placement,
    made_chain,
    made_graph,
    read,
    shares_placement,
)
from report import report

from lightning_hetero.placement.solve import (
    ChainProblem,
    Effort,
    GraphAnswer,
    Proof,
    ShareDevice,
    least_bottleneck_in_order,
    solve_chain,
    solve_graph,
    solve_latency,
    solve_shares,
)
from lightning_hetero.placement.solve.chain import ChainObjective

# Rounds and effort that no search uses up before its time is out.
ENDLESS = 60
LONG = Effort(events=10**9, nodes=10**7)

OutOfTime = Callable[[], bool]


@dataclass(frozen=True)
class Solved:
    """One plan for one instance: what it costs, how far that may be from the optimum, and the plan as a file has it."""

    value: float
    proof: Proof
    placement: Json


def clock(seconds: float) -> OutOfTime:
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() > end


def solvers(problem: Graph | ChainProblem | SharesProblem, seconds: float) -> dict[str, Callable[[], Solved]]:
    """For every objective of an instance, what solves it within so many seconds."""
    if isinstance(problem, SharesProblem):
        return {"step_time": lambda: solved_shares(problem)}
    if isinstance(problem, ChainProblem):
        return {name: partial(solved_chain, problem, name, seconds) for name in get_args(ChainObjective)}
    found = {
        "max_load_contiguous": partial(
            solved_graph, problem, partial(solve_graph, problem.throughput, contiguous=True)
        ),
        "max_load": partial(solved_graph, problem, partial(solve_graph, problem.throughput)),
        "latency": partial(solved_graph, problem, partial(solve_latency, problem.latency)),
    }
    if problem.latency.backward:
        del found["latency"]
    return {name: partial(job, seconds) for name, job in found.items()}


def solved_shares(problem: SharesProblem) -> Solved:
    answer = solve_shares(problem.devices, problem.rows)
    return Solved(answer.proof.value + problem.sync_s, answer.proof, shares_placement(answer))


def solved_chain(problem: ChainProblem, objective: ChainObjective, seconds: float) -> Solved:
    answer = solve_chain(problem, objective, effort=replace(LONG), out_of_time=clock(seconds))
    return Solved(answer.proof.value, answer.proof, chain_placement(answer.plan))


def solved_graph(graph: Graph, solver: Callable[..., GraphAnswer], seconds: float) -> Solved:
    answer = solver(rounds=ENDLESS, out_of_time=clock(seconds))
    return Solved(answer.proof.value, answer.proof, graph_placement(graph, answer.plan))


def best_known(best: Json, path: Path) -> dict[str, float]:
    """The best known value by objective; empty if the file of best values does not have the instance."""
    entry: Json = next((entry for key, entry in best.items() if path.resolve().as_posix().endswith(key)), {})
    known = {name: float(found["value"]) for name, found in entry.get("best", {}).items()}
    contiguous = {
        f"{name}_contiguous": float(found["value"]) for name, found in entry.get("best_contiguous", {}).items()
    }
    return known | contiguous


def solve_files(paths: list[Path], best: Json, seconds: float, plans: Path | None) -> dict[str, float]:
    """Solve instances, print a line for each plan, and return the figures.

    Of an instance with best known values, only these objectives are solved.
    """
    figures: dict[str, float] = {}
    print(f"{'instance':<40} {'objective':<20} {'value':>12} {'gap':>10} {'seconds':>8}  proof")
    for path in paths:
        name = f"{path.resolve().parent.name}/{path.name.partition('.')[0]}"
        known = best_known(best, path)
        for objective, solver in solvers(read(path), seconds).items():
            if known and objective not in known:
                continue
            since_s = time.perf_counter()
            solved = solver()
            took_s = time.perf_counter() - since_s
            figure = f"{name}.{objective}"
            figures |= {f"{figure}.value": solved.value, f"{figure}.seconds": took_s}
            gap = ""
            if objective in known:
                figures[f"{figure}.gap_percent"] = 100 * (solved.value / known[objective] - 1)
                gap = f"{figures[f'{figure}.gap_percent']:.4f} %"
            sure = "optimal" if solved.proof.optimal else f"at most {100 * solved.proof.gap:.1f} % above the optimum"
            print(f"{name:<40} {objective:<20} {solved.value:12.6f} {gap:>10} {took_s:8.2f}  {sure}", flush=True)
            if plans is not None:
                plans.mkdir(parents=True, exist_ok=True)
                (plans / f"{figure.replace('/', '.')}.json").write_text(json.dumps(solved.placement), encoding="utf-8")
    return figures


def chain(layers: int, *counts: int) -> Callable[[], object]:
    problem = made_chain(layers, counts)
    return lambda: solve_chain(problem)


def fixed_order(layers: int, *counts: int) -> Callable[[], object]:
    problem = made_chain(layers, counts)
    order = [device.name for device in problem.devices]
    return lambda: least_bottleneck_in_order(problem, order)


def graph(operators: int, *counts: int) -> Callable[[], object]:
    problem = made_graph(operators, counts)
    return lambda: solve_graph(problem, rounds=1)


def shares(rows: int, devices: int) -> Callable[[], object]:
    table = [{1: 1.0 + index % 3, 4: 3.0 + index % 3, 16: 10.0 + index % 5} for index in range(devices)]
    problem = [ShareDevice(name=f"device{index}", seconds=seconds) for index, seconds in enumerate(table)]
    return lambda: solve_shares(problem, rows)


# What has an aim, by figure; the aims are in README.md.
AIMED: dict[str, Callable[[], Callable[[], object]]] = {
    "chain_50x64_s": lambda: chain(50, 32, 32),
    "fixed_order_1000x64_s": lambda: fixed_order(1000, 32, 32),
    "graph_10000x32_s": lambda: graph(10_000, 32),
}
# How planning time grows: a name and the problem.
GROWTH: list[tuple[str, Callable[[], Callable[[], object]]]] = [
    *[(f"chain, {n} layers, 8 + 8 devices", lambda n=n: chain(n, 8, 8)) for n in (25, 50, 100, 200)],
    *[(f"chain, 50 layers, {k} + {k} devices", lambda k=k: chain(50, k, k)) for k in (2, 4, 8, 16, 32)],
    *[(f"chain, 50 layers, {k} kinds of 4 devices", lambda k=k: chain(50, *[4] * k)) for k in (1, 2, 3, 4)],
    *[(f"chain, 50 layers, {k} different devices", lambda k=k: chain(50, *[1] * k)) for k in (2, 4, 6, 8)],
    *[(f"fixed order, {n} layers, 64 devices", lambda n=n: fixed_order(n, 32, 32)) for n in (100, 300, 1000, 3000)],
    *[(f"graph, {n} operators, 32 devices", lambda n=n: graph(n, 32)) for n in (100, 1000, 3000, 10_000)],
    *[(f"graph, {n} operators, 16 + 16 devices", lambda n=n: graph(n, 16, 16)) for n in (1000, 3000)],
    *[(f"shares, {n} rows, 32 devices", lambda n=n: shares(n, 32)) for n in (100, 1000, 10_000)],
]


def cpu_s(job: Callable[[], object]) -> float:
    since_s = time.process_time()
    job()
    return time.process_time() - since_s


def planning_times(*, quick: bool) -> dict[str, float]:
    """CPU seconds of planning: the least of some repetitions, and how far the longest is above it."""
    figures: dict[str, float] = {}
    noise = 1.0
    for name, make in AIMED.items():
        job = make()
        times_s = [cpu_s(job) for _ in range(1 if quick else 5)]
        figures[name] = min(times_s)
        noise = max(noise, max(times_s) / min(times_s))
    for name, make in [] if quick else GROWTH:
        print(f"{name:<48} {cpu_s(make()):9.3f} s")
    return {**figures, "noise_ratio": noise}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="instances to solve")
    parser.add_argument("--best", type=Path, help="best known values")
    parser.add_argument("--plans", type=Path, help="folder for the plans")
    parser.add_argument("--seconds", type=float, default=20.0, help="time limit for each objective of an instance")
    parser.add_argument(
        "--quick", action="store_true", help="little time or few repetitions: does it run, not how well"
    )
    options = parser.parse_args()
    best = json.loads(options.best.read_text(encoding="utf-8"))["instances"] if options.best else {}
    if options.files:
        seconds = min(options.seconds, 1.0) if options.quick else options.seconds
        try:
            report(solve_files(options.files, best, seconds, options.plans))
        except (OSError, ValueError) as error:
            parser.error(str(error))
    else:
        report(planning_times(quick=options.quick))


if __name__ == "__main__":
    main()
