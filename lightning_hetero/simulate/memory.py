"""What devices keep for backwards over time, read from a timeline, whether predicted or measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_hetero.errors import ScheduleError
from lightning_hetero.schedule import Span, Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryCurve:
    """What one device keeps, as steps: entry i holds from `times_s[i]` until the next time.

    Attributes:
        times_s: When something changes, on the clock of the timeline, shape (n,).
        micro_batches: How many different micro-batches the device keeps something of, shape (n,).
        kept_bytes: How many bytes that is, shape (n,).
    """

    times_s: tuple[float, ...] = ()
    micro_batches: tuple[int, ...] = ()
    kept_bytes: tuple[int, ...] = ()

    @property
    def peak_micro_batches(self) -> int:
        """The most micro-batches at a time; 0 if there are none."""
        return max(self.micro_batches, default=0)

    @property
    def peak_bytes(self) -> int:
        """The most bytes at a time; 0 if there are none."""
        return max(self.kept_bytes, default=0)


def memory_curves(timeline: Timeline, kept_bytes: Sequence[int]) -> dict[str, MemoryCurve]:
    """What every device keeps, besides parameters and what belongs to them.

    A stage keeps a micro-batch from the start of the first thing that it does with it to the end of the last.

    Args:
        timeline: Of one step: a micro-batch has one forward on each stage.
        kept_bytes: What each stage keeps of one micro-batch, shape (stages,).

    Raises:
        ScheduleError: The timeline has stages without a number of bytes.
    """
    stages = 1 + max((span.stage for span in timeline.spans if span.stage is not None), default=-1)
    if stages > len(kept_bytes):
        raise ScheduleError(f"kept_bytes has {len(kept_bytes)} numbers for {stages} stages; give one for each")
    return {device: _curve(timeline.work_of(device), kept_bytes) for device in timeline.devices}


def peak_alive(timeline: Timeline) -> int:
    """The most micro-batches at a time that are anywhere between their first action and their last."""
    spans = [span for span in timeline.spans if span.micro_batch is not None]
    begins = sorted({span.micro_batch: span.start_s for span in reversed(spans)}.values())
    ends_s: dict[int | None, float] = {}
    for span in spans:
        ends_s[span.micro_batch] = max(span.end_s, ends_s.get(span.micro_batch, span.end_s))
    return max((n - sum(end_s <= begin for end_s in ends_s.values()) for n, begin in enumerate(begins, 1)), default=0)


def _curve(work: Sequence[Span], kept_bytes: Sequence[int]) -> MemoryCurve:
    steps: list[tuple[float, int, int]] = []
    held: set[tuple[int, int]] = set()
    last = {(span.stage, span.micro_batch): span for span in work}
    # In order of work and not of time: a measured span may begin some clock ticks before the end of the one before.
    for span in work:
        if span.stage is None or span.micro_batch is None:
            continue
        key = (span.stage, span.micro_batch)
        changes = [(span.start_s, held.add)] if key not in held else []
        changes += [(span.end_s, held.remove)] if last[key] is span else []
        for time_s, change in changes:
            change(key)
            steps.append((time_s, len({m for _, m in held}), sum(kept_bytes[stage] for stage, _ in held)))
    times_s, micro_batches, bytes_ = zip(*steps, strict=True) if steps else ((), (), ())
    return MemoryCurve(times_s=times_s, micro_batches=micro_batches, kept_bytes=bytes_)
