"""What training in several processes costs: with more processes, and with processes of unequal speed.

    python benchmarks/scale.py
    python benchmarks/scale.py --quick

Real processes, as torchrun starts them, each with a Trainer of its own. Work is a sleep in proportion to the rows, so
that eight processes find room on few cores: what counts are the exchanges, and what each process does besides its work.
The configurations take turns. Then a formula, which is not measured, says what more hosts would cost.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from statistics import median

from launched import free_port
from report import is_quick, report
from scaling_worker import Answer, Training, take_part

from lightning_hetero.simulate.costs import Path as Link

SIZES = (1, 2, 4, 8)
ROWS = 16  # of each process
STEP_S = 0.15  # that these take
SLOWER = 3.0
LAPS, STEPS = 5, 6
QUICK_LAPS, QUICK_STEPS = 1, 2
PATIENCE_S = 120.0
HOSTS = (2, 4, 8, 16, 32, 64, 128, 256)
LATENCY_S = 50e-6
LINKS = {"1 Gbit/s": Link(LATENCY_S, 8 / 1e9), "10 Gbit/s": Link(LATENCY_S, 8 / 10e9)}


@dataclass(frozen=True)
class Configuration:
    """Processes that train together.

    Attributes:
        slower: How many times as long each of them needs for a row.
        shares: How much of a batch each of them gets.
        rows: Of a batch.
    """

    slower: tuple[float, ...]
    shares: tuple[float, ...]
    rows: int


CONFIGURATIONS = {
    **{f"even_{size}": Configuration((1.0,) * size, (1.0,) * size, ROWS * size) for size in SIZES},
    "again_1": Configuration((1.0,), (1.0,), ROWS),
    "fast_alone": Configuration((1.0,), (1.0,), 2 * ROWS),
    "slow_alone": Configuration((SLOWER,), (1.0,), 2 * ROWS),
    "by_speed": Configuration((SLOWER, 1.0), (1.0, SLOWER), 2 * ROWS),
    "same_shares": Configuration((SLOWER, 1.0), (1.0, 1.0), 2 * ROWS),
}


def train(configuration: Configuration, steps: int) -> Answer:
    """What process 0 of a training says.

    The processes are new ones, forked from a server that has the imports behind it.

    Raises:
        RuntimeError: A process has ended, or answers no more.
    """
    size = len(configuration.slower)
    training = Training(
        size=size,
        port=free_port(),
        shares=list(configuration.shares),
        slower=list(configuration.slower),
        rows=configuration.rows,
        row_s=STEP_S / ROWS,
        steps=steps,
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning.pytorch", "lightning_hetero.strategy.lightning_pytorch"])
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    processes = [
        context.Process(target=take_part, args=(training, rank, theirs), daemon=True)
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process, (_, theirs) in zip(processes, pipes, strict=True):
        process.start()
        theirs.close()  # so that a process which dies is noticed
    try:
        first, *_ = [_answer(ours) for ours, _ in pipes]
        return first
    finally:
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


def _answer(pipe: Connection) -> Answer:
    if not pipe.poll(PATIENCE_S):
        raise RuntimeError("a process does not answer")
    try:
        answer: Answer = pipe.recv()
    except EOFError:
        raise RuntimeError("a process has ended, see its traceback above") from None
    return answer


def ring_s(hosts: int, size_bytes: int, link: Link) -> float:
    """Seconds of a sum over hosts in a ring: each sends 2 (n - 1) messages of the n-th part.

    P. Patarasuk and X. Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009.

    Args:
        hosts: How many there are.
        size_bytes: What is summed.
        link: From each host to the next.
    """
    return 2 * (hosts - 1) * (link.latency_s + size_bytes / hosts * link.s_per_byte)


def table(size_bytes: int, compute_s: float) -> Iterable[str]:
    """What more hosts would cost by the formula, in lines for people."""
    yield f"By formula, NOT measured: {compute_s:.3g} s of work, then a ring all-reduce of {size_bytes} bytes, which"
    yield f"nothing hides; {LATENCY_S * 1e6:.0f} us latency; each host has as many rows, however many there are."
    yield f"{'hosts':>5}" + "".join(f"{f'{name}: step s':>20}{'efficiency':>12}" for name in LINKS)
    for hosts in HOSTS:
        steps_s = [compute_s + ring_s(hosts, size_bytes, link) for link in LINKS.values()]
        yield f"{hosts:>5}" + "".join(f"{step_s:20.4f}{compute_s / step_s:12.3f}" for step_s in steps_s)


def main() -> None:
    quick = is_quick(__doc__)
    laps, steps = (QUICK_LAPS, QUICK_STEPS) if quick else (LAPS, STEPS)
    taken_s: dict[str, list[float]] = {name: [] for name in CONFIGURATIONS}
    size_bytes = 0
    for lap in range(laps):
        for name in list(CONFIGURATIONS)[:: 1 if lap % 2 == 0 else -1]:
            answer = train(CONFIGURATIONS[name], steps)
            taken_s[name].append(median(answer.step_s))
            size_bytes = answer.gradient_bytes
    step_s = {name: median(values) for name, values in taken_s.items()}
    for name, values in taken_s.items():
        print(f"{name:<12}", *(f"{value * 1e3:8.1f}" for value in values), " ms a step, lap by lap")
    print(*table(size_bytes, STEP_S), sep="\n")
    one_s = step_s["even_1"]
    several = SIZES[1:]
    sum_of_speeds = 1 / step_s["fast_alone"] + 1 / step_s["slow_alone"]  # in batches a second
    report(
        {
            **{f"scale_{size}": step_s[f"even_{size}"] / one_s for size in several},
            **{f"exchange_ms_{size}": (step_s[f"even_{size}"] - one_s) * 1e3 for size in several},
            "noise_ratio": step_s["again_1"] / one_s,
            "uneven_share": 1 / step_s["by_speed"] / sum_of_speeds,
            "uneven_to_even": step_s["same_shares"] / step_s["by_speed"],
        }
    )


if __name__ == "__main__":
    main()
