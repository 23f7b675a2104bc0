"""The timeline for a trace viewer: JSON that ui.perfetto.dev and chrome://tracing open."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_hetero.schedule.timeline import TRANSFER, Span, Timeline

_Event = dict[str, Any]

# Perfetto rounds times to whole nanoseconds and drops what then overlaps. An eighth of a microsecond is 125 of them,
# and floating point holds eighths exactly: what ended as the next one began still does.
_TICKS_PER_US = 8


def chrome_trace(timelines: Mapping[str, Timeline]) -> str:
    """Write timelines in Chrome's trace event format, one below the other, each from its own start.

    Args:
        timelines: By title, for example `{"predicted": ..., "measured": ...}`. A timeline becomes a process; a
            device becomes a thread for its work, and as many more as its transfers need not to overlap.

    Returns:
        JSON text; times in it are microseconds, as the format wants.
    """
    # Each number once: viewers take 0, and what is repeated, for the same.
    # A thread with the number of its process is shown as its main one.
    threads = itertools.count(1 + len(timelines))
    events = [event for pid, item in enumerate(timelines.items(), 1) for event in _process(pid, threads, *item)]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _process(pid: int, threads: Iterator[int], title: str, timeline: Timeline) -> Iterator[_Event]:
    start_s = timeline.start_s
    yield _said("process_name", {"name": title}, pid, 0)
    yield _said("process_sort_index", {"sort_index": pid}, pid, 0)
    for device in timeline.devices:
        for name, lane in ((device, timeline.work_of(device)), *_transfer_lanes(timeline, device)):
            tid = next(threads)
            yield _said("thread_name", {"name": name}, pid, tid)
            yield _said("thread_sort_index", {"sort_index": tid}, pid, tid)
            yield from (_complete(span, pid, tid, start_s) for span in lane)


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


def _said(kind: str, about: dict[str, Any], pid: int, tid: int) -> _Event:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": about}


def _complete(span: Span, pid: int, tid: int, start_s: float) -> _Event:
    begins, ends = _ticks(span.start_s - start_s), _ticks(span.end_s - start_s)
    return {
        "ph": "X",
        "name": str(span),
        "cat": span.op,
        "pid": pid,
        "tid": tid,
        "ts": begins / _TICKS_PER_US,
        "dur": (ends - begins) / _TICKS_PER_US,
        "args": {"stage": span.stage, "micro_batch": span.micro_batch},
    }


def _ticks(seconds: float) -> int:
    return round(seconds * 1e6 * _TICKS_PER_US)
