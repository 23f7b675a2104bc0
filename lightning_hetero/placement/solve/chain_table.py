"""The exact dynamic programme: for every suffix of the chain and every bag of devices, the best way to run it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lightning_hetero.placement.solve.chain_classes import DeviceClasses, Floats, Windows
from lightning_hetero.placement.solve.chain_problem import ChainPlan, ChainStage
from lightning_hetero.placement.solve.proof import ROUNDING

Rule = Literal["max", "sum", "way", "fill"]

# A path is a list of (class of devices, first layer, stop), from the first to the last stage.
Path = list[tuple[int, int, int]]


def as_plan(classes: DeviceClasses, path: Path) -> ChainPlan:
    """Give every stage of a path a device of its class."""
    spare = [list(members) for members in classes.members]
    devices = classes.problem.devices
    return tuple(ChainStage(device=devices[spare[c].pop(0)].name, first=i, stop=j) for c, i, j in path)


class SuffixTable:
    """Values of the best suffixes.

    `value[bag, g, p, i]` is the best cost of running the layers from i on with exactly the devices in the bag
    (a number of each class), the first of them from link group g, sent to by a device of link group p. What "cost"
    means depends on the rule:

    * "max": the largest load. The plan with the smallest bottleneck.
    * "sum": the sum of loads, where no load may exceed the cap.
    * "way": the time of one micro-batch to the last stage and back, where the work of no stage may exceed the cap.
    * "fill": the largest, over the stages, of the way to the stage and back, all the work it has to do, what it
      has to wait (`waiting_s`) and its update. No simulated step is faster: it bounds the step time from below.

    The load of a stage includes what it sends to both neighbours. The senders do not matter to the last two rules.
    """

    def __init__(self, classes: DeviceClasses, rule: Rule, cap: float) -> None:
        """Fill the table; answers above the cap are not looked for."""
        self.classes, self.rule, self.cap = classes, rule, cap
        self.micro_batches = classes.problem.micro_batches
        counts = [len(members) for members in classes.members]
        self.strides = np.cumprod([1, *(count + 1 for count in counts)])
        self.bags = int(self.strides[-1])
        codes = np.arange(self.bags)
        self.digits = np.stack([codes // self.strides[c] % (counts[c] + 1) for c in range(len(counts))], axis=1)
        self.by_work = rule in ("way", "fill")
        window_cap = cap / self.micro_batches * (1 + ROUNDING) if self.by_work else cap
        self.windows = [classes.windows(c, window_cap) for c in range(len(counts))]
        self.senders = 1 if self.by_work else classes.groups
        self.value = np.full((self.bags, classes.groups, self.senders, classes.layers + 1), np.inf)
        # The bound of "fill" knows the rest of the pipeline only by the shortest way through it.
        self.way = SuffixTable(classes, "way", cap).value[:, :, 0, :] if rule == "fill" else self.value[:, :, 0, :]
        sizes = self.digits.sum(axis=1)
        for stages in range(1, min(len(classes.problem.devices), classes.layers) + 1):
            for c in range(len(counts)):
                bags = np.flatnonzero((sizes == stages) & (self.digits[:, c] > 0))
                if self.windows[c] and len(bags):
                    self._extend(c, bags, stages)

    def _extend(self, c: int, bags: NDArray[np.int64], stages: int) -> None:
        """Put a stage of class c before all suffixes that use one stage less."""
        group, n = self.classes.group_of[c], self.classes.layers
        rests = bags - self.strides[c]
        after, way = self.value[rests][:, :, self._as_sender(group), :], self.way[rests]
        best = np.full((len(bags), self.senders, n + 1), np.inf)
        for windows in self.windows[c]:
            fits = self.classes.fits(c, windows, stages - 1)
            if not fits.any():
                break
            start, width = windows.length, n - windows.length + 1
            if stages == 1:
                value = self._price(windows, stages, group, None, *np.zeros((2, 1, 1, width)))
                best[:, :, n - start] = np.where(fits[-1], value[0, :, -1], np.inf)
                continue
            for other in range(self.classes.groups):
                rest = after[:, other, None, start:], way[:, other, None, start:]
                value = np.where(fits, self._price(windows, stages, group, other, *rest), np.inf)
                np.minimum(best[:, :, :width], value, out=best[:, :, :width])
        self.value[bags, group] = np.minimum(self.value[bags, group], best)

    def _as_sender(self, group: int) -> int:
        return 0 if self.by_work else group

    def _price(self, windows: Windows, stages: int, group: int, other: int | None, rest: Floats, way: Floats) -> Floats:
        """Cost of stages in `group` before suffixes that start in group `other`.

        Args:
            windows: The stages, all of one length.
            stages: How many there are from here to the end.
            group: Link group of these stages.
            other: Link group of the next stage.
            rest: Cost of the suffixes, [bag, 1, first layer].
            way: Shortest way through the suffixes, likewise.

        Returns:
            Array [bag, sending group, first layer].
        """
        send, start = self.classes.send_s, windows.length
        none = np.zeros(len(windows.compute_s))
        out = none if other is None else send[group, other, start:]
        if not self.by_work:
            # The gradient goes back to the sender: [sending group, first layer].
            load = windows.compute_s + out + send[group, :, : len(none)]
            load = np.where(load <= self.cap, load, np.inf)
            return np.maximum(load, rest) if self.rule == "max" else load + rest
        back = none if other is None else send[other, group, start:]
        onward = windows.compute_s + out + back
        work = windows.compute_s * self.micro_batches + windows.update_s
        if self.rule == "way":
            return np.where(work <= self.cap, onward + rest, np.inf)
        waiting = self.waiting_s(windows.forward_s, windows.backward_s, stages, out + back + way)
        return np.maximum(work + waiting, onward + rest)

    def waiting_s(self, forward_s: Floats, backward_s: Floats, stages: int, rest_s: Floats) -> Floats:
        """What a stage waits at least for the stages behind it.

        GPipe: from its last forward to its first gradient, for the whole way through the rest. 1F1B: for the first
        gradient, while it works on the forwards ahead; and again from its last forward to its last gradient, while
        it works on the backwards that are left. The two are one and the same if all forwards are ahead.

        Args:
            forward_s: Forward of one micro-batch on the stage.
            backward_s: Likewise, backward.
            stages: Number of stages from this one to the end.
            rest_s: The way of one micro-batch from this stage to the end and back.
        """
        if self.classes.problem.schedule == "gpipe":
            return rest_s
        ahead = min(stages, self.micro_batches) - 1
        first, last = np.maximum(rest_s - ahead * forward_s, 0.0), np.maximum(rest_s - ahead * backward_s, 0.0)
        both: Floats = first + last if self.micro_batches > ahead + 1 else np.maximum(first, last)
        return both

    def best(self) -> tuple[float, Path] | None:
        """The best cost of the whole chain and a path that has it; None if nothing is within the cap."""
        whole = self.value[:, :, 0, 0]
        bag, group = np.unravel_index(int(whole.argmin()), whole.shape)
        if not np.isfinite(whole[bag, group]):
            return None
        return float(whole[bag, group]), self._walk(int(bag), int(group))

    def _walk(self, bag: int, group: int) -> Path:
        """Follow the choices that gave the value of the whole chain."""
        path: Path = []
        first, sender = 0, 0
        while first < self.classes.layers:
            target = self.value[bag, group, sender, first]
            c, stop, following = next(
                choice for choice, value in self._choices(bag, group, sender, first) if value == target
            )
            path.append((c, first, stop))
            bag, first, sender = int(bag - self.strides[c]), stop, self._as_sender(group)
            group = following
        return path

    def _choices(self, bag: int, group: int, sender: int, first: int) -> Iterator[tuple[tuple[int, int, int], float]]:
        """All ((class, stop, group of the next stage), cost) that may begin a suffix."""
        n, stages = self.classes.layers, int(self.digits[bag].sum())
        for c, windows_of_c in enumerate(self.windows):
            if self.classes.group_of[c] != group or not self.digits[bag, c]:
                continue
            rests = bag - self.strides[c]
            after, way = self.value[rests][:, self._as_sender(group), :], self.way[rests]
            for windows in windows_of_c[: n - first]:
                stop, width = first + windows.length, n - windows.length + 1
                if not self.classes.fits(c, windows, stages - 1)[first]:
                    continue
                if stages == 1:
                    if stop == n:
                        value = self._price(windows, stages, group, None, *np.zeros((2, 1, 1, width)))
                        yield (c, stop, 0), float(value[0, sender, first])
                    continue
                for other in range(self.classes.groups):
                    rest = after[other, None, None, windows.length :], way[other, None, None, windows.length :]
                    value = self._price(windows, stages, group, other, *rest)
                    yield (c, stop, other), float(value[0, sender, first])
