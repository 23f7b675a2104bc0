"""Units are timed in the company of others, and what cannot be done so falls back to what was timed alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_hetero.devices.host_memory import keep_host_memory
from lightning_hetero.graph.find import find_units
from lightning_hetero.profile.benches import Bench
from lightning_hetero.profile.job import Job
from lightning_hetero.profile.recording import Recording
from lightning_hetero.profile.replay import replay

ROWS = 8
CPU = Bench()


class Notes(nn.Linear):
    """Writes down who was called, with how many rows."""

    calls: list[int] = []  # noqa: RUF012 (copies of the unit must write to the same list)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(x.shape[0])
        return super().forward(x)


class Tired(Notes):
    """Fails once others have been called in between."""

    def forward(self, x: Tensor) -> Tensor:
        if len(self.calls) > 100:
            raise RuntimeError("too often")
        return super().forward(x)


def measured(model: nn.Module) -> tuple[dict[str, Job], list[tuple[str, nn.Module]]]:
    """The jobs of a model, measured alone, and its units by their sorts."""
    with Recording(model, find_units(model)) as recording:
        model(torch.randn(ROWS, 4))
    jobs = {
        sort: Job(recording.module.get_submodule(sample.unit), sample, ROWS, True)
        for sort, sample in recording.samples.items()
    }
    for job in jobs.values():
        job.measure(CPU, (1, ROWS))
    return jobs, [(sort, model.get_submodule(name)) for name, sort in recording.sort_of.items()]


def never() -> bool:
    return False


def seconds(jobs: dict[str, Job]) -> list[dict[int, float]]:
    return [dict(job.forward[CPU]) for job in jobs.values()]


def test_every_number_of_rows_is_timed_for_every_sort() -> None:
    jobs, units = measured(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))))
    replay(jobs, units, [CPU], (1, 2, 4, ROWS), never)
    for job in jobs.values():
        assert set(job.forward[CPU]) == set(job.backward[CPU]) == {1, 2, 4, ROWS}
        for rows in (1, 2, 4, ROWS):
            usual_forward_s, usual_backward_s = job.usual[CPU, rows]
            assert 0 < usual_forward_s <= job.forward[CPU][rows]
            assert 0 < usual_backward_s <= job.backward[CPU][rows]


def test_micro_batches_go_forward_together() -> None:
    model = nn.Sequential(Notes(4, 4), nn.Linear(4, 4))
    jobs, units = measured(model)
    Notes.calls.clear()
    replay(jobs, units, [CPU], (2, ROWS), never)
    assert Notes.calls[:3] == [ROWS] * 3  # the whole batch, three times in a row
    assert Notes.calls[3 : 3 + 12] == [2] * 12  # four micro-batches, likewise


@pytest.mark.parametrize("stop", [lambda: True, never])
def test_without_time_or_with_an_error_the_seconds_of_units_alone_stay(stop: Callable[[], bool]) -> None:
    jobs, units = measured(nn.Sequential(nn.Linear(4, 4), Tired(4, 4)))
    before = seconds(jobs)
    Notes.calls.extend([0] * 200)
    replay(jobs, units, [CPU], (1, ROWS), stop)
    assert seconds(jobs) == before
    Notes.calls.clear()


def test_parameters_and_gradients_of_the_model_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    jobs, units = measured(model)
    replay(jobs, units, [CPU], (1, ROWS), never)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_host_memory_is_kept_or_cannot_be_and_says_the_same_again() -> None:
    assert keep_host_memory() in (True, False)
    assert keep_host_memory() is keep_host_memory()
