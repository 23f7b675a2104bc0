"""Measures one sort of unit: on one bench after the other, at one number of rows after the other."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from lightning_hetero.profile.alone import Alone, Carriers, carrier_choices
from lightning_hetero.profile.benches import Bench
from lightning_hetero.profile.costs import Curve
from lightning_hetero.profile.sample import Sample
from lightning_hetero.profile.sizes import Lines, counts_memory, lines_through, sizes


@dataclass
class Job:
    """What is known of one sort of unit so far.

    Attributes:
        unit: One unit of this sort.
        sample: A call of it.
        seen_rows: Rows of the batch in that call.
        training: Whether to run the backward too.
        forward: Seconds of the forward by bench and rows.
        backward: Seconds of the backward likewise.
        followers: Modules without parameters that come after it.
        sizes: Bytes of a call; None until known.
        errors: What went wrong, by bench.
        instead: What is measured in the place of `unit` and `sample` on benches where these must not be; None: nothing.
        usual: What forward and backward usually take, by bench and rows, where it is known apart from the median.
    """

    unit: nn.Module
    sample: Sample
    seen_rows: int
    training: bool
    forward: dict[Bench, dict[int, float]] = field(default_factory=dict)
    backward: dict[Bench, dict[int, float]] = field(default_factory=dict)
    followers: Sequence[nn.Module] = ()
    sizes: Lines | None = None
    errors: dict[Bench, str] = field(default_factory=dict)
    instead: Mapping[Bench, tuple[nn.Module, Sample] | None] = field(default_factory=dict)
    usual: dict[tuple[Bench, int], tuple[float, float]] = field(default_factory=dict)
    _carriers: Carriers | None = None
    _constant: bool = False  # no input depends on the rows

    def measure(self, bench: Bench, counts: tuple[int, ...]) -> None:
        """Measure at these numbers of rows. An error is noted, not raised: the device may be too small for the unit."""
        if not self.may_be_on(bench):
            return
        if bench in self.errors and not self.forward.get(bench):
            return
        try:
            with bench.use():
                self._measure(bench, counts)
        except Exception as error:  # user code may raise anything, and each backend lacks something else
            self.errors[bench] = first_line(error)

    def curves(self, bench: Bench) -> tuple[Curve, Curve] | None:
        """Seconds of forward and backward of one call; None if it was not measured."""
        measured = replace(bench, steady=False)
        forward = self.forward.get(measured)
        if not forward:
            return None
        backward = self.backward[measured]
        if bench.steady:
            pairs = {rows: self.usual.get((measured, rows), (forward[rows], backward[rows])) for rows in forward}
            forward, backward = ({rows: pair[at] for rows, pair in pairs.items()} for at in (0, 1))
        return rising(forward), rising(backward)

    @property
    def carriers(self) -> Carriers:
        """Which tensors of a call hold the batch's rows; none of them before something was measured."""
        return self._carriers or frozenset()

    def may_be_on(self, bench: Bench) -> bool:
        """Whether a unit of this sort may be measured there."""
        return self._on(bench) is not None

    def on(self, bench: Bench, unit: nn.Module) -> Alone:
        """A copy of a unit of this sort on a bench, where one may be."""
        _, sample = self._on(bench) or (self.unit, self.sample)
        return Alone(
            unit,
            sample,
            seen_rows=self.seen_rows,
            device=bench.device,
            training=self.training,
            followers=self.followers,
        )

    def scales_on(self, bench: Bench) -> bool:
        """Whether it was measured there with several numbers of rows."""
        return bool(self._carriers) and len(self.forward.get(bench, ())) > 1 and bench not in self.errors

    def set(self, bench: Bench, rows: int, forward_s: Sequence[float], backward_s: Sequence[float]) -> None:
        """Put what was found several times in the place of what is known."""
        self.forward[bench][rows], self.backward[bench][rows] = map(statistics.median, (forward_s, backward_s))
        usual = (sorted(seconds)[len(seconds) // 4] for seconds in (forward_s, backward_s))
        self.usual[bench, rows] = (next(usual), next(usual))

    def size_bytes(self, rows: int) -> float:
        """Bytes of its parameters, their gradients, and what autograd keeps of a call."""
        saved = self.sizes.saved(rows) if self.sizes is not None else 0.0
        return saved + 2 * sum(p.numel() * p.element_size() for p in self.unit.parameters())

    def _on(self, bench: Bench) -> tuple[nn.Module, Sample] | None:
        return self.instead.get(bench, (self.unit, self.sample))

    def _measure(self, bench: Bench, counts: tuple[int, ...]) -> None:
        unit, _ = self._on(bench) or (self.unit, self.sample)
        alone = self.on(bench, unit)
        if self._carriers is None:
            self._carriers = self._find_carriers(alone)
        forward, backward = self.forward.setdefault(bench, {}), self.backward.setdefault(bench, {})
        if not self._carriers:
            counts = (self.seen_rows,)
        failed: Exception | None = None
        for rows in sorted(set(counts) - set(forward)):
            try:
                forward[rows], backward[rows] = alone.seconds(alone.inputs(rows, self._carriers))
            except torch.OutOfMemoryError as error:
                failed = error
                break  # more rows will not fit either
            except Exception as error:  # such as BatchNorm's, which cannot train on one row
                failed = error
        if forward:
            self._size(alone, tuple(forward))
        if failed is not None and len(forward) < 2:
            raise failed
        self.errors.pop(bench, None)
        if self._constant:  # a second point makes the curve flat
            for seconds in (forward, backward):
                seconds[self.seen_rows + 1] = seconds[self.seen_rows]

    def _size(self, alone: Alone, counts: tuple[int, ...]) -> None:
        if self.sizes is not None and (self.sizes.counted or not counts_memory(alone.device)):
            return
        carriers = self._carriers or frozenset()
        with suppress(Exception):  # the next bench is asked, in the end the outputs' sizes stand in
            found = {rows: sizes(alone, alone.inputs(rows, carriers)) for rows in {min(counts), max(counts)}}
            self.sizes = lines_through(found, constant=self._constant)

    def _find_carriers(self, alone: Alone) -> Carriers:
        """The tensors that hold the batch's rows: with two rows in them, as many come out. None of them if unclear."""
        choices = list(carrier_choices(self.sample, self.seen_rows))
        trial = 2 if self.seen_rows > 2 else self.seen_rows + 1  # one row is too little for BatchNorm
        self._constant = not choices
        for choice in choices:
            try:
                if alone.scales(trial, choice):
                    return choice
            except torch.OutOfMemoryError:
                raise
            except Exception:  # whatever user code says to sizes that make no sense
                continue
        return frozenset()


def rising(seconds: Mapping[int, float]) -> Curve:
    """The curve through some seconds by rows. Fewer rows never take longer: where they did, it was another program."""
    points: list[tuple[int, float]] = []
    least_s = math.inf
    for rows, found_s in sorted(seconds.items(), reverse=True):
        least_s = min(least_s, found_s)
        points.append((rows, least_s))
    return Curve(tuple(reversed(points)))


def first_line(error: Exception) -> str:
    """What an error says, short enough for a note."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
