"""What devices did and when: noted by their workers while somebody wants to know, read as a timeline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lightning_hetero.schedule import Span, Timeline


class Record(NamedTuple):
    """One task as it ran: seconds of `time.perf_counter`."""

    device: str
    unit: str
    op: str
    micro_batch: int
    start_s: float
    end_s: float


class Recorder:
    """Where the workers of a model note their tasks.

    Attributes:
        records: The notes so far, in the order in which tasks ended; None while nobody wants any.
    """

    __slots__ = ("records",)

    def __init__(self) -> None:
        self.records: list[Record] | None = None


class Recording:
    """What the workers of a placed model did within `PlacedModel.recording`.

    Args:
        devices: Names of all devices that could have worked.
        stage_of: Index of the stage of each unit, by name.
    """

    def __init__(self, devices: Iterable[str], stage_of: Mapping[str, int]) -> None:
        self.records: list[Record] = []
        self._devices = tuple(devices)
        self._stage_of = stage_of

    @property
    def timeline(self) -> Timeline:
        """The tasks so far, in seconds since the first of them began.

        A span is one task: what a worker ran in one piece. A stage whose units are called one by one has several
        spans for a micro-batch, so that what a device waits between them counts as idle. Moving the inputs to the
        device is part of the task that needs them.
        """
        records = tuple(self.records)  # workers may still be adding to it
        first_s = min((record.start_s for record in records), default=0.0)
        spans = (
            Span(
                device=record.device,
                op=record.op,
                start_s=record.start_s - first_s,
                duration_s=record.end_s - record.start_s,
                stage=self._stage_of[record.unit],
                micro_batch=record.micro_batch,
            )
            for record in records
        )
        return Timeline(tuple(spans), self._devices)
