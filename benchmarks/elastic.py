"""What becomes of a training in two processes when one of them is killed, or is asked to end.

    python benchmarks/elastic.py
    python benchmarks/elastic.py --quick
    python benchmarks/elastic.py --runs 6

SIGKILL under torchrun, which starts all processes anew: they go on from the last checkpoint. SIGTERM without torchrun,
so that nobody ends the other process but the run itself. Rank, step and moment within the step are drawn with a seed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

from elastic_training import FORWARD_S, PROCESSES, STEPS
from launched import environment, free_port
from report import report

PROGRAM = Path(__file__).with_name("elastic_training.py")
RUNS = 20
SIDE_BY_SIDE = 2
RESTARTS = 3
PATIENCE_S = 120.0
SEED = 7
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Step:
    """A step that ended.

    Attributes:
        attempt: How often the launcher had started the processes anew.
        number: How many steps the training had made by then.
        ended_s: Time of the clock.
    """

    attempt: int
    number: int
    ended_s: float


@dataclass(frozen=True)
class Killed:
    """What became of a run under torchrun.

    Attributes:
        recovered: Whether all steps were made in the end, and torchrun was content.
        by_torchrun: Whether torchrun itself failed, and not the training.
        lost_steps: Steps that had to be made again; None if there was no step after the signal.
        resume_s: From the signal to the end of the first step after it; None if there was none.
        restarts: How often torchrun started the processes anew.
    """

    recovered: bool
    by_torchrun: bool
    lost_steps: int | None
    resume_s: float | None
    restarts: int


@dataclass(frozen=True)
class Asked:
    """What became of a run in which one process was asked to end.

    Attributes:
        hangs: Whether a process had to be killed.
        is_right: Whether all ended early, after the same step, with the exit code 0.
        exit_s: From the signal to the end of the last process.
    """

    hangs: bool
    is_right: bool
    exit_s: float


def drawn(number: int) -> list[str]:
    """Rank, step and delay of a run, as arguments of the program."""
    drawing = random.Random(f"{SEED} {number}")
    rank, step = drawing.randrange(PROCESSES), drawing.randrange(1, STEPS - 8)
    delay_s = drawing.uniform(0, 3 * FORWARD_S / PROCESSES)  # about a step
    return [str(rank), str(step), f"{delay_s:.4f}"]


def steps_of(folder: Path) -> list[list[Step]]:
    """The steps that each process made."""
    files = [folder / f"steps-{rank}" for rank in range(PROCESSES)]
    lines = [file.read_text().splitlines() if file.exists() else [] for file in files]
    return [[Step(int(a), int(n), float(s)) for a, n, s in map(str.split, each)] for each in lines]


def kill(folder: Path, number: int) -> Killed:
    """Run with torchrun; one process is killed."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    logs = ["--redirects=3", f"--log-dir={folder / 'logs'}", f"--max-restarts={RESTARTS}"]
    process = subprocess.Popen(
        [*torchrun, *logs, str(PROGRAM), str(folder), "SIGKILL", *drawn(number)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes
        try:
            said, _ = process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
    return judged(process.returncode, said, folder)


def judged(code: int, said: str, folder: Path) -> Killed:
    """What became of a run.

    Args:
        code: Exit code of torchrun.
        said: What torchrun printed, without what its processes did.
        folder: Of the run.
    """
    mark = folder / "signalled"
    signalled_s = float(mark.read_text()) if mark.exists() else float("inf")
    steps = [step for each in steps_of(folder) for step in each]
    before = [step for step in steps if step.attempt == 0]
    after = [step for step in steps if step.attempt > 0]
    done = all(any(step.number == STEPS for step in each) for each in steps_of(folder))
    recovered = code == 0 and done and mark.exists()
    if not recovered:
        print(f"--- {folder.name}: exit code {code}\n{said}", file=sys.stderr)
        for log in sorted(folder.glob("logs/**/stderr.log")):
            print(f"--- {log.relative_to(folder)}\n{log.read_text()[-4000:]}", file=sys.stderr)
    last_made = max((step.number for step in before), default=0)
    return Killed(
        recovered=recovered,
        by_torchrun=not recovered and "Traceback" in said and "ChildFailedError" not in said,
        lost_steps=last_made - min(step.number for step in after) + 1 if after else None,
        resume_s=min(step.ended_s for step in after) - signalled_s if after else None,
        restarts=max((step.attempt for step in steps), default=0),
    )


def ask(folder: Path, number: int) -> Asked:
    """Run without torchrun; one process gets SIGTERM."""
    port = free_port()
    outputs = [(folder / f"output-{rank}").open("w") for rank in range(PROCESSES)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(folder), "SIGTERM", *drawn(number)],
            env={**os.environ, **environment(rank, PROCESSES, port)},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        for rank, output in enumerate(outputs)
    ]
    hangs = False
    until_s = time.monotonic() + PATIENCE_S
    for process in processes:
        try:
            process.wait(max(until_s - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            hangs = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    ended_s = time.time()
    for output in outputs:
        output.close()
    mark = folder / "signalled"
    made = [max((step.number for step in each), default=0) for each in steps_of(folder)]
    codes = [process.returncode for process in processes]
    is_right = mark.exists() and not any(codes) and len(set(made)) == 1 and made[0] < STEPS
    if not is_right:
        print(f"--- {folder.name}: exit codes {codes}, steps {made}", file=sys.stderr)
        for rank in range(PROCESSES):
            print(f"--- process {rank}\n{(folder / f'output-{rank}').read_text()[-4000:]}", file=sys.stderr)
    return Asked(hangs, is_right, ended_s - float(mark.read_text()) if mark.exists() else PATIENCE_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one run of each, under 40 s: does it run, not how well")
    parser.add_argument("--runs", type=int, default=RUNS, help="of each")
    arguments = parser.parse_args()
    runs = 1 if arguments.quick else arguments.runs
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        killing = [pool.submit(run_one, kill, Path(folder, f"kill-{number}"), number) for number in range(runs)]
        asking = [pool.submit(run_one, ask, Path(folder, f"term-{number}"), number) for number in range(runs)]
        killed = [run.result() for run in killing]
        asked = [run.result() for run in asking]
    resumed_s = [run.resume_s for run in killed if run.resume_s is not None] or [PATIENCE_S]
    report(
        {
            "recovered": sum(run.recovered for run in killed) / runs,
            "torchrun_failures": float(sum(run.by_torchrun for run in killed)),
            "restarts_most": float(max(run.restarts for run in killed)),
            "lost_steps_most": float(max(STEPS if run.lost_steps is None else run.lost_steps for run in killed)),
            "resume_s_median": median(resumed_s),
            "resume_s_most": max(resumed_s),
            "sigterm_hangs": float(sum(run.hangs for run in asked)),
            "sigterm_wrong_ends": float(sum(not run.is_right for run in asked)),
            "sigterm_exit_s_most": max(run.exit_s for run in asked),
        }
    )


def run_one(run: Callable[[Path, int], Outcome], folder: Path, number: int) -> Outcome:
    """Make a run in a folder of its own, and say what became of it."""
    folder.mkdir()
    outcome = run(folder, number)
    rank, step, delay_s = drawn(number)
    print(f"{folder.name}: process {rank}, {delay_s} s after step {step} began: {outcome}", flush=True)
    return outcome


if __name__ == "__main__":
    main()
