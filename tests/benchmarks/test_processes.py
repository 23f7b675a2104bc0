"""What the benchmarks of several processes say about a run, and the formula for more hosts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import elastic
import scale

from lightning_hetero.simulate.costs import Path as Link


def written(folder: Path, *processes: list[tuple[int, int, float]]) -> Path:
    """The notes of a run whose signal came at second 100."""
    (folder / "signalled").write_text("100.0")
    for rank, steps in enumerate(processes):
        (folder / f"steps-{rank}").write_text("".join(f"{a} {n} {s}\n" for a, n, s in steps))
    return folder


def test_steps_after_the_last_checkpoint_are_lost(tmp_path: Path) -> None:
    first = [(0, number, 90.0 + number) for number in range(1, 9)]
    second = [(1, number, 110.0 + number) for number in range(6, elastic.STEPS + 1)]

    run = elastic.judged(0, "", written(tmp_path, first + second, first[:-1] + second))

    assert run == elastic.Killed(recovered=True, by_torchrun=False, lost_steps=3, resume_s=16.0, restarts=1)


def test_a_run_that_stops_short_has_not_recovered(tmp_path: Path) -> None:
    steps = [(0, 1, 99.0), (1, 1, 120.0)]

    run = elastic.judged(0, "", written(tmp_path, steps, steps))

    assert not run.recovered
    assert not run.by_torchrun


@pytest.mark.parametrize(
    ("said", "by_torchrun"),
    [
        ("Traceback (most recent call last):\ntorch.distributed.DistNetworkError: the port is taken", True),
        ("Traceback (most recent call last):\ntorch.distributed.elastic.ChildFailedError: program.py FAILED", False),
    ],
)
def test_failures_of_torchrun_itself_count_apart(tmp_path: Path, said: str, by_torchrun: bool) -> None:
    run = elastic.judged(1, said, written(tmp_path, [(0, 1, 99.0)], [(0, 1, 99.0)]))

    assert not run.recovered
    assert run.by_torchrun is by_torchrun
    assert run.lost_steps is None
    assert run.resume_s is None


def test_signals_are_the_same_each_time_and_come_while_there_are_steps_to_make() -> None:
    draws = [elastic.drawn(number) for number in range(elastic.RUNS)]

    assert draws == [elastic.drawn(number) for number in range(elastic.RUNS)]
    assert {rank for rank, _, _ in draws} == {"0", "1"}
    assert len({step for _, step, _ in draws}) > elastic.RUNS / 2
    assert all(0 < int(step) < elastic.STEPS for _, step, _ in draws)


def test_a_ring_sends_almost_twice_what_is_summed_and_waits_for_each_message() -> None:
    # 2 (n - 1) / n * bytes / bandwidth + 2 (n - 1) * latency
    assert scale.ring_s(1, 1000, Link(1.0, 1.0)) == 0
    assert scale.ring_s(2, 1000, Link(0.0, 0.001)) == pytest.approx(1.0)
    assert scale.ring_s(4, 1000, Link(0.5, 0.001)) == pytest.approx(1.5 + 3.0)


def test_the_formula_says_that_it_is_not_measured() -> None:
    lines = list(scale.table(1_000_000, 0.1))

    assert "NOT measured" in lines[0]
    assert [int(line.split()[0]) for line in lines[3:]] == [2, 4, 8, 16, 32, 64, 128, 256]
