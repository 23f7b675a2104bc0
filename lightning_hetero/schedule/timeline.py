"""The timeline: actions with times, whether the simulator predicts them or the recorder measured them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from lightning_hetero.errors import ScheduleError

FORMAT = "lightning_hetero.timeline"
VERSION = 1
TOLERANCE_S = 1e-6
"""Spans that overlap by less do not: clocks and sums of floats are no finer than that."""
TRANSFER = "transfer"
"""The op of spans that move tensors. They run beside the work of their device and do not count as such."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One thing that one device does for some time.

    Attributes:
        device: Name of the device.
        op: An `Op`, `TRANSFER`, or any other word, such as "optimizer".
        start_s: When it begins, in seconds from any fixed moment.
        duration_s: How long it takes, at least 0.
        stage: Index of the stage, if it belongs to one.
        micro_batch: Index of the micro-batch, if it belongs to one.
    """

    device: str
    op: str
    start_s: float
    duration_s: float
    stage: int | None = None
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.start_s) and math.isfinite(self.duration_s) and self.duration_s >= 0):
            raise ScheduleError(
                f"{self} on {self.device!r}: times must be finite and none negative, "
                f"got start_s={self.start_s} and duration_s={self.duration_s}"
            )

    @property
    def end_s(self) -> float:
        """When it is over."""
        return self.start_s + self.duration_s

    def __str__(self) -> str:
        stage, micro_batch = ("" if index is None else index for index in (self.stage, self.micro_batch))
        return f"{stage}{self.op}{micro_batch}"


@dataclass(frozen=True, slots=True)
class Timeline:
    """What every device does when. Equal contents are equal timelines, in whatever order they are given.

    Attributes:
        spans: In order of time. On one device only transfers overlap with anything.
        devices: Names of all devices that could have worked, also of idle ones; those of the spans are added.
    """

    spans: tuple[Span, ...] = ()
    devices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        spans = sorted(self.spans, key=lambda span: (span.start_s, span.end_s, span.device, str(span)))
        object.__setattr__(self, "spans", tuple(spans))
        object.__setattr__(self, "devices", tuple(dict.fromkeys([*self.devices, *(span.device for span in spans)])))
        for device in self.devices:
            _check_one_at_a_time(self.work_of(device))

    @property
    def start_s(self) -> float:
        """When the first span begins; 0 without spans."""
        return min((span.start_s for span in self.spans), default=0.0)

    @property
    def end_s(self) -> float:
        """When the last span is over; 0 without spans."""
        return max((span.end_s for span in self.spans), default=0.0)

    @property
    def makespan_s(self) -> float:
        """Seconds from the first beginning to the last end."""
        return self.end_s - self.start_s

    def work_of(self, device: str) -> tuple[Span, ...]:
        """What a device does besides transfers, one after the other."""
        return tuple(span for span in self.spans if span.device == device and span.op != TRANSFER)

    @property
    def busy_s(self) -> dict[str, float]:
        """Seconds that each device works; transfers do not count."""
        return {device: math.fsum(span.duration_s for span in self.work_of(device)) for device in self.devices}

    @property
    def utilisation(self) -> dict[str, float]:
        """Share of the makespan that each device works, 0 to 1."""
        whole_s = self.makespan_s
        return {device: busy_s / whole_s if whole_s else 0.0 for device, busy_s in self.busy_s.items()}

    @property
    def bubble_share(self) -> float:
        """Share of all devices' time that is idle, 0 to 1; 0 where no time passes."""
        shares = self.utilisation.values()
        return max(0.0, 1 - math.fsum(shares) / len(shares)) if self.makespan_s else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The timeline as plain JSON types."""
        return {"format": FORMAT, "version": VERSION, "devices": [*self.devices], "spans": [*map(asdict, self.spans)]}

    def to_json(self) -> str:
        """The timeline as text that `from_json` reads back, bit for bit."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def from_dict(cls, data: object) -> Timeline:
        """Read what `to_dict` wrote.

        Raises:
            ScheduleError: It is no timeline, newer than this package, or damaged.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise ScheduleError(f"not a timeline of this package: the field 'format' must be {FORMAT!r}")
        if data.get("version") != VERSION:
            raise ScheduleError(
                f"the timeline has version {data.get('version')!r}, this package reads {VERSION}; "
                "record it again, or use the version of lightning-hetero that wrote it"
            )
        try:
            return cls(tuple(map(_read_span, data["spans"])), tuple(map(_read_text, data["devices"])))
        except (KeyError, TypeError) as error:
            raise ScheduleError(f"the timeline is damaged: {type(error).__name__}: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> Timeline:
        """Read what `to_json` wrote.

        Raises:
            ScheduleError: The text is no JSON, no timeline, newer than this package, or damaged.
        """
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise ScheduleError(f"the timeline is not valid JSON ({error}); it was cut short or edited") from error


def _check_one_at_a_time(spans: Sequence[Span]) -> None:
    for before, span in pairwise(sorted(spans, key=lambda span: span.start_s)):
        if span.start_s < before.end_s - TOLERANCE_S:
            raise ScheduleError(
                f"{span.device!r} cannot do {span} from {span.start_s:g} s and {before} until {before.end_s:g} s: a "
                f"device does one thing at a time; give spans that run beside its work the op {TRANSFER!r}"
            )


def _read_span(data: Mapping[str, Any]) -> Span:
    span = Span(**data)
    _read_text(span.device)
    _read_text(span.op)
    for index in (span.stage, span.micro_batch):
        if index is not None and type(index) is not int:
            raise TypeError(f"expected a whole number or null, got {index!r}")
    return span


def _read_text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, got {value!r}")
    return value
