"""The timeline for a trace viewer: JSON that ui.perfetto.dev and chrome://tracing open."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_hetero.schedule.timeline import TRANSFER, Span, Timeline

_Event = dict[str, Any]


def chrome_trace(timelines: Mapping[str, Timeline]) -> str:
    """Write timelines in Chrome's trace event format, one below the other, each from its own start.

    Args:
        timelines: By title, for example `{"predicted": ..., "measured": ...}`. A timeline becomes a process; a
            device becomes a thread for its work, and as many more as its transfers need not to overlap.

    Returns:
        JSON text; times in it are microseconds, as the format wants.
    """
    events = [event for pid, item in enumerate(timelines.items()) for event in _process(pid, *item)]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _process(pid: int, title: str, timeline: Timeline) -> Iterator[_Event]:
    yield _name("process_name", title, pid, 0)
    tid, start_s = 0, timeline.start_s
    for device in timeline.devices:
        for name, lane in ((device, timeline.work_of(device)), *_transfer_lanes(timeline, device)):
            yield _name("thread_name", name, pid, tid)
            yield from (_complete(span, pid, tid, start_s) for span in lane)
            tid += 1


def _transfer_lanes(timeline: Timeline, device: str) -> Iterator[tuple[str, list[Span]]]:
    """The transfers of a device, dealt out to the first lane that is free."""
    lanes: list[list[Span]] = []
    for span in timeline.spans:
        if span.device == device and span.op == TRANSFER:
            free = next((lane for lane in lanes if lane[-1].end_s <= span.start_s), None)
            if free is None:
                lanes.append(free := [])
            free.append(span)
    return ((f"{device} {TRANSFER}", lane) for lane in lanes)


def _name(kind: str, name: str, pid: int, tid: int) -> _Event:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


def _complete(span: Span, pid: int, tid: int, start_s: float) -> _Event:
    return {
        "ph": "X",
        "name": str(span),
        "cat": span.op,
        "pid": pid,
        "tid": tid,
        "ts": (span.start_s - start_s) * 1e6,
        "dur": span.duration_s * 1e6,
        "args": {"stage": span.stage, "micro_batch": span.micro_batch},
    }
