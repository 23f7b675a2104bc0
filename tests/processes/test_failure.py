"""What happens to one process reaches all of them, within seconds and in words."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import launch
import pytest

PROGRAM = str(Path(__file__).with_name("failing.py"))
CASES = [
    ("kill", 0),
    ("kill", 1),
    ("error", 1),
    ("term", 0),
    ("term", 1),
    ("lengths", 1),
    ("model", 1),
    ("shares", 0),
    ("raw", 0),
    ("steps", 1),
    ("validation", 0),
    ("metric", 0),
]
Runs = dict[tuple[str, int], tuple[Path, list[launch.Ended]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All cases, some side by side: most of their time goes into imports."""
    found: Runs = {}
    for first in range(0, len(CASES), 4):
        started = {}
        for what, rank in CASES[first : first + 4]:
            folder = tmp_path_factory.mktemp(what)
            started[what, rank] = folder, launch.start([PROGRAM, what, str(rank), "4", str(folder)], 2)
        found |= {case: (folder, launch.wait(processes)) for case, (folder, processes) in started.items()}
    return found


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_named_by_the_other(runs: Runs, rank: int) -> None:
    _, ended = runs["kill", rank]
    assert ended[rank].code == -signal.SIGKILL
    left = ended[1 - rank]
    assert left.code == 1
    assert "ProcessError" in left.text
    # Process 0 holds the store by which the others find out.
    assert re.search("Process 1 is gone" if rank else "cannot be reached any more|Process 0 is gone", left.text)


def test_an_error_in_one_process_is_the_cause_in_the_other(runs: Runs) -> None:
    _, ended = runs["error", 1]
    assert [process.code for process in ended] == [1, 1]
    assert "ValueError: the dog ate this row" in ended[1].text
    assert "Process 1 failed with ValueError: the dog ate this row" in ended[0].text


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one_process_ends_both_after_the_same_step(runs: Runs, rank: int) -> None:
    folder, ended = runs["term", rank]
    assert [process.code for process in ended] == [0, 0], ended  # as Lightning ends a single process
    assert not any("ProcessError" in process.text or "is done" in process.text for process in ended)
    steps = [(folder / f"steps-{number}").read_text().count("\n") for number in (0, 1)]
    assert steps[0] == steps[1] <= 6


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (("lengths", 1), r"53.*31"),
        (("model", 1), "the processes of the run differ in their model"),
        (("shares", 0), "the processes of the run differ in their shares"),
    ],
)
def test_processes_that_would_not_do_the_same_are_refused(runs: Runs, case: tuple[str, int], words: str) -> None:
    folder, ended = runs[case]
    assert [process.code for process in ended] == [1, 1]
    for process in ended:
        assert re.search(words, process.text), process.text
    assert not (folder / "steps-0").exists()


def test_a_backward_that_knows_nothing_of_the_others_is_refused(runs: Runs) -> None:
    _, ended = runs["raw", 0]
    assert [process.code for process in ended] == [1, 1]
    assert all("Write self.manual_backward(loss) instead" in process.text for process in ended)


def test_different_numbers_of_batches_are_found_out(runs: Runs) -> None:
    _, ended = runs["steps", 1]
    assert [process.code for process in ended] == [1, 1]
    for process in ended:
        assert re.search(
            "they are out of step|they had different numbers of batches|failed with ProcessError", process.text
        )


@pytest.mark.parametrize("what", ["validation", "metric"])
def test_a_pass_in_which_a_process_has_no_row_ends_with_advice(runs: Runs, what: str) -> None:
    _, ended = runs[what, 0]
    assert [process.code for process in ended] == [1, 1]
    for process in ended:
        assert "had no row of data loader" in process.text
