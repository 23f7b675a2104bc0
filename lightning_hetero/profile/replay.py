"""Runs the units of a model one after the other, as a step does, and times each of them.

A unit that is repeated alone finds its weights in the cache, and its memory where it has just given it back. In a step
other units run in between, activations pile up until their backward, micro-batches take turns, and the threads of
devices are not that of user code. On a CPU that doubles the seconds of small units, so it is repeated here.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hetero.profile.alone import Alone, Inputs
from lightning_hetero.profile.benches import Bench
from lightning_hetero.profile.clock import Clock
from lightning_hetero.profile.job import Job
from lightning_hetero.profile.structure import tensors_in

_ROUNDS = 4
_FEWEST = 2  # of them, where they take long
_IN_A_ROW = 3  # of each round, the first of which does not count: memory is laid out by it
_ENOUGH_S = 1.5
_MOST_AT_ONCE = 4  # micro-batches: as many as are in flight with three devices
_MOST_OF_A_SORT = 4
_WINDOW_BYTES = 256 << 20
_LONGEST_REST_S = 0.01  # after which a processor has forgotten all that it can forget

_Span = tuple[Any, Any] | None
"""Two moments of a clock; None where nothing was done."""


@dataclass(slots=True)
class _Part:
    """A unit in a window, with what was found.

    Attributes:
        job: Its sort.
        alone: A copy of it on the bench.
        inputs: Arguments of a call by rows.
    """

    job: Job
    alone: Alone
    inputs: dict[int, Inputs] = field(default_factory=dict)


class Replay:
    """Some units that follow each other, on a bench.

    Args:
        bench: Where.
        parts: The units and their sorts, in the order of their calls.

    Attributes:
        found: Seconds of forward and backward by sort and rows, one pair for each call.
    """

    def __init__(self, bench: Bench, parts: Sequence[tuple[Job, nn.Module]]) -> None:
        self.bench = bench
        self._parts = [_Part(job, job.on(bench, unit)) for job, unit in parts]
        self._gradients: list[list[Tensor | None]] = []
        self.found: defaultdict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)

    def run(self, rows: int, times: int, *, counts: bool) -> None:
        """Forward of `times` micro-batches of so many rows, then their backwards.

        Raises:
            Exception: Whatever units raise.
        """
        clock = Clock(self.bench.device)
        kept: list[list[tuple[_Part, _Span, list[Tensor]]]] = []
        spans: list[tuple[_Part, _Span, _Span]] = []
        for _ in range(times):
            kept.append([])
            for part in self._parts:
                if rows not in part.inputs:
                    part.inputs[rows] = part.alone.inputs(rows, part.job.carriers)
                fresh = part.alone.fresh(part.inputs[rows])
                begun = clock.now()
                output = part.alone.forward(fresh)
                forward: _Span = (begun, clock.now())
                roots = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
                kept[-1].append((part, forward, roots if part.alone.training else []))
                del fresh, output, roots
                self._rest(clock, forward)
        self._gradients.clear()  # those of the step before, where user code lets go of them
        for spot, calls in enumerate(kept):
            while calls:
                part, forward, roots = calls.pop()
                backward = self._backward(clock, roots)
                del roots
                found = [parameter.grad for parameter in part.alone.twin.parameters()]
                if not spot:  # others are added to them, which is no part of the backward
                    self._gradients.append(found)
                del found
                part.alone.twin.zero_grad(set_to_none=True)
                self._rest(clock, backward)
                spans.append((part, forward, backward))
        for part, *both in spans if counts else ():
            forward_s, backward_s = (0.0 if span is None else clock.between(*span) for span in both)
            self.found[id(part.job), rows].append((forward_s, backward_s))

    def _backward(self, clock: Clock, roots: list[Tensor]) -> _Span:
        if not roots:
            return None
        gradients = [torch.ones_like(tensor) for tensor in roots]
        begun = clock.now()
        torch.autograd.backward(roots, gradients)
        return begun, clock.now()

    def _rest(self, clock: Clock, span: _Span) -> None:
        if self.bench.rest and span is not None:
            time.sleep(min(clock.between(*span) * self.bench.rest, _LONGEST_REST_S))


def replay(
    jobs: Mapping[str, Job],
    units: Sequence[tuple[str, nn.Module]],
    benches: Sequence[Bench],
    counts: Sequence[int],
    stop: Callable[[], bool],
) -> None:
    """Replace what was measured with units alone by what is measured in the company of others.

    Args:
        jobs: What was measured, by sort.
        units: The units with their sorts, in the order of their first calls.
        benches: Where to measure.
        counts: The numbers of rows, rising. The last is that of a whole batch, the others are those of micro-batches.
        stop: Whether time is over.
    """
    for bench in benches:
        for window in _windows(jobs, units, bench, counts[-1]):
            with bench.use():
                _replay(bench, window, counts, stop)


def _replay(
    bench: Bench, window: Sequence[tuple[Job, nn.Module]], counts: Sequence[int], stop: Callable[[], bool]
) -> None:
    jobs = {id(job): job for job, _ in window}
    begun_s = time.monotonic()
    try:
        one = Replay(bench, window)
        with ThreadPoolExecutor(1, "hetero-profile", partial(torch.set_num_threads, torch.get_num_threads())) as worker:
            for turn in range(_ROUNDS):
                if turn >= _FEWEST and time.monotonic() - begun_s > _ENOUGH_S:
                    break
                for rows in reversed(counts):
                    times = max(1, min(counts[-1] // rows, _MOST_AT_ONCE))
                    for again in range(_IN_A_ROW):
                        if stop():
                            return
                        work = partial(one.run, rows, times, counts=again > 0)
                        # Micro-batches are worked on by the threads of devices, whose memory is laid out otherwise.
                        work() if times == 1 else worker.submit(work).result()
    except Exception:  # too little memory for several units, or user code that wants to be called alone
        return
    for (key, rows), found in one.found.items():
        forward, backward = zip(*found, strict=True)
        jobs[key].set(bench, rows, forward, backward)


def _windows(
    jobs: Mapping[str, Job], units: Sequence[tuple[str, nn.Module]], bench: Bench, rows: int
) -> list[list[tuple[Job, nn.Module]]]:
    """The units that were measured on a bench, in pieces that fit into some memory."""
    windows: list[list[tuple[Job, nn.Module]]] = []
    seen: defaultdict[str, int] = defaultdict(int)
    room = 0.0
    for sort, unit in units:
        job = jobs[sort]
        seen[sort] += 1
        if seen[sort] > _MOST_OF_A_SORT or not job.scales_on(bench):
            continue
        size = job.size_bytes(rows)
        if size > room or not windows:
            windows.append([])
            room = _WINDOW_BYTES
        windows[-1].append((job, unit))
        room -= size
    return windows
