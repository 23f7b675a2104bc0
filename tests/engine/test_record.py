"""What devices did is recorded as a timeline, and shown by torch's profiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.profilers import PyTorchProfiler
from torch import Tensor, nn
from torch._C._profiler import _ExperimentalConfig

from lightning_hetero import HeteroStrategy
from lightning_hetero.errors import UsageError
from lightning_hetero.runtime.engine.stepper import Stepper
from lightning_hetero.runtime.placed import PlacedModel
from lightning_hetero.schedule import Action, GPipe, OneFOneB, Schedule, Timeline, bounds, chrome_trace, draw
from lightning_hetero.schedule.check import check_program
from lightning_hetero.schedule.pipeline import Pipeline
from lightning_hetero.testing.cut_models import Between
from lightning_hetero.testing.lightning_module import Classifier, data

MICRO_BATCHES = 4
EMULATED = "cpu@speed=1,cpu@speed=1,cpu@speed=1"

MakePair = Callable[..., Any]


class Stages(nn.Module):
    """Three layers, a device each, and a training step. Input (rows, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).pow(2).mean()  # type: ignore[no-any-return]


def names_of(devices: str) -> list[str]:
    return [f"emulated:{index}" for index in range(3)] if devices == EMULATED else devices.split(",")


def where(devices: str) -> dict[str, str]:
    return {f"net.{index}": name for index, name in enumerate(names_of(devices))}


def action(span: Any) -> Action:
    return Action(span.stage, span.op, span.micro_batch)


def check(timeline: Timeline, pipeline: Pipeline, most_alive: int) -> None:
    """Every stage did everything once, nothing before what it needs, and in an order that cannot deadlock."""
    spans = {action(span): span for span in timeline.spans}
    assert Counter(map(action, timeline.spans)) == Counter(pipeline.actions())
    for each, span in spans.items():
        for need in pipeline.needs(each):
            assert spans[need].end_s <= span.start_s, f"{each} began before {need} had ended"
    programs = {
        index: [action(span) for span in timeline.work_of(device)] for index, device in enumerate(timeline.devices)
    }
    check_program(programs, pipeline, in_flight=(most_alive,) * pipeline.stages)


def test_forward_and_backward_of_a_region(pair: MakePair, devices: str) -> None:
    both = pair(Stages(), where(devices))
    batch = torch.randn(8, 8)
    both.step(lambda model: model.training_step(batch, 0))  # tries whether it may be cut
    with both.placed.recording() as recording:
        both.step(lambda model: model.training_step(batch, 0))

    timeline = recording.timeline
    assert timeline.devices == tuple(where(devices).values())
    check(timeline, both.engine.pipeline(MICRO_BATCHES), most_alive=MICRO_BATCHES)
    for device in timeline.devices:
        ops = [span.op for span in timeline.work_of(device)]
        assert ops == ["F"] * MICRO_BATCHES + ["B"] * MICRO_BATCHES
    assert timeline.start_s == 0.0
    assert all(span.duration_s > 0 for span in timeline.spans)


@pytest.mark.parametrize("schedule", [OneFOneB(), GPipe()])
def test_a_whole_step_obeys_its_schedule(pair: MakePair, devices: str, schedule: Schedule) -> None:
    both = pair(Stages(), where(devices), micro_batches=8)
    stepper = Stepper(both.engine, both.model, "training_step", schedule, (), ())
    batch = torch.randn(16, 8)
    try:
        assert stepper.run((batch, 0), 1.0) is not None  # the rehearsal, in this thread
        with both.placed.recording() as recording:
            assert stepper.run((batch, 0), 1.0) is not None
    finally:
        stepper.close()

    pipeline = both.engine.pipeline(8)
    check(recording.timeline, pipeline, most_alive=bounds(schedule, pipeline)[0])


def test_units_of_one_stage_that_are_called_one_by_one_have_a_span_each(pair: MakePair, devices: str) -> None:
    first, second, _ = names_of(devices)
    model = Between(lambda model, x: model.c(torch.tanh(x)), c=nn.Linear(8, 8))
    both = pair(model, {"a": first, "b": second, "c": second})
    batch = torch.randn(8, 8)
    both.step(lambda model: model(batch).sum())
    with both.placed.recording() as recording:
        both.step(lambda model: model(batch).sum())

    counted = Counter(map(action, recording.timeline.spans))
    assert counted == Counter(
        Action(stage, op, micro_batch)
        for stage in (0, 1, 1)
        for op in ("F", "B")
        for micro_batch in range(MICRO_BATCHES)
    )


def test_rematerialization_runs_forwards_twice(pair: MakePair, devices: str) -> None:
    both = pair(Stages(), where(devices), rematerialize=True)
    batch = torch.randn(8, 8)
    both.step(lambda model: model.training_step(batch, 0))
    with both.placed.recording() as recording:
        both.step(lambda model: model.training_step(batch, 0))

    counted = Counter((span.stage, span.op) for span in recording.timeline.spans)
    assert counted == {(stage, op): MICRO_BATCHES * (2 if op == "F" else 1) for stage in range(3) for op in "FB"}


def test_drawings_and_traces_are_made_from_it(pair: MakePair, devices: str) -> None:
    both = pair(Stages(), where(devices))
    both.step(lambda model: model.training_step(torch.randn(8, 8), 0))
    with both.placed.recording() as recording:
        both.step(lambda model: model.training_step(torch.randn(8, 8), 0))

    timeline = recording.timeline
    rows = draw(timeline).splitlines()
    assert [row.split()[0] for row in rows[:-1]] == list(timeline.devices)
    assert '"name": "2B3"' in chrome_trace({"measured": timeline})
    assert Timeline.from_json(timeline.to_json()) == timeline


def test_nothing_is_kept_outside_of_a_recording(pair: MakePair, devices: str) -> None:
    both = pair(Stages(), where(devices))
    batch = torch.randn(8, 8)
    with both.placed.recording() as before:
        pass
    both.step(lambda model: model.training_step(batch, 0))
    assert both.calls == 1
    with both.placed.recording() as first:
        both.step(lambda model: model.training_step(batch, 0))
    both.step(lambda model: model.training_step(batch, 0))
    with both.placed.recording() as second:
        both.step(lambda model: model.training_step(batch, 0))

    assert before.timeline.spans == ()
    assert len(first.timeline.spans) == len(second.timeline.spans) == 3 * 2 * MICRO_BATCHES
    assert max(record.end_s for record in first.records) < min(record.start_s for record in second.records)


def test_a_recording_ends_with_an_exception(pair: MakePair, devices: str) -> None:
    both = pair(Stages(), where(devices))
    with pytest.raises(KeyError), both.placed.recording():
        raise KeyError
    with both.placed.recording() as recording:
        both.step(lambda model: model.training_step(torch.randn(8, 8), 0))
    assert len(recording.timeline.spans) == 3 * 2 * MICRO_BATCHES


def test_two_recordings_at_once_are_refused(pair: MakePair, devices: str) -> None:
    both = pair(Stages(), where(devices))
    with (
        both.placed.recording(),
        pytest.raises(UsageError, match="is being recorded already; end that recording before another begins"),
        both.placed.recording(),
    ):
        pass


def test_connected_mode_has_no_timeline(pair: MakePair, devices: str) -> None:
    placed: PlacedModel = pair(Stages(), where(devices), micro_batches=1).placed
    with (
        pytest.raises(UsageError, match=r"connected mode, .* Place it on several devices, with micro_batches of at"),
        placed.recording(),
    ):
        pass


@contextmanager
def profiled_threads() -> Iterator[torch.profiler.profile]:
    """A profiler that sees all threads. By default torch's profiler sees the thread that started it only."""
    every = _ExperimentalConfig(profile_all_threads=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, experimental_config=every) as profiler:
        yield profiler


def test_a_profiler_shows_the_tasks_of_workers_by_name(pair: MakePair, devices: str) -> None:
    both = pair(Stages(), where(devices))
    batch = torch.randn(8, 8)
    both.step(lambda model: model.training_step(batch, 0))
    with profiled_threads() as profiler:
        both.step(lambda model: model.training_step(batch, 0))
    both.step(lambda model: model.training_step(batch, 0))

    events = {event.name: event for event in profiler.events() or () if event.name.startswith("hetero/")}
    assert sorted(events) == sorted(
        f"hetero/stage{index}/{op}{micro_batch}"
        for index in range(3)
        for op in "FB"
        for micro_batch in range(MICRO_BATCHES)
    )
    threads = [events[f"hetero/stage{index}/F0"].thread for index in range(3)]
    assert all(a != b for a, b in pairwise(sorted(threads)))
    assert "aten::linear" in {child.name for child in events["hetero/stage1/F2"].cpu_children}


def test_lightnings_profiler_shows_them_too(tmp_path: Path) -> None:
    profiler = PyTorchProfiler(
        tmp_path,
        "profile",
        export_to_chrome=False,
        row_limit=-1,
    )
    strategy = HeteroStrategy(devices=EMULATED, placement="even", micro_batches=MICRO_BATCHES, verbose=False)
    trainer = pl.Trainer(
        strategy=strategy,
        profiler=profiler,
        max_steps=6,
        max_epochs=10,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), data())

    (report,) = tmp_path.glob("*.txt")
    text = report.read_text(encoding="utf-8")
    assert "/F0" in text
    assert f"/B{MICRO_BATCHES - 1}" in text
