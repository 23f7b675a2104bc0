"""Interchangeable devices: the classes and link groups that keep the dynamic programme small."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lightning_hetero.placement.solve.chain_problem import FREE, ChainProblem
from lightning_hetero.placement.solve.pipeline import in_flight

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Windows:
    """All runs of `length` layers on one class of devices, by their first layer (0 to n - length).

    Attributes:
        length: Layers in each run.
        forward_s: Forward of one micro-batch.
        backward_s: Backward of one micro-batch.
        update_s: The optimizer.
        state_bytes: What stays in memory, without `fixed_bytes`.
        activation_bytes: What each micro-batch in flight adds.
        allowed: Whether every layer of the run may stand there.
    """

    length: int
    forward_s: Floats
    backward_s: Floats
    update_s: Floats
    state_bytes: Floats
    activation_bytes: Floats
    allowed: Flags

    @cached_property
    def compute_s(self) -> Floats:
        """Forward and backward of one micro-batch."""
        both: Floats = self.forward_s + self.backward_s
        return both


class DeviceClasses:
    """The devices of a problem, sorted into classes.

    Two devices are in one link group if swapping them changes no transfer time. Two devices are in one class if
    they are in one link group and agree in kind, memory and allowed layers.

    Attributes:
        members: Indices of the devices of each class.
        group_of: Link group of each class.
        groups: Number of link groups.
    """

    def __init__(self, problem: ChainProblem, *, merge: bool = True) -> None:
        """Sort the devices; without `merge` every device is a class and a group of its own."""
        self.problem = problem
        self.layers = problem.layers
        spots = range(len(problem.devices))
        groups = _link_groups(problem) if merge else [[spot] for spot in spots]
        self.groups = len(groups)
        self.group_members = groups
        group_of_device = {spot: index for index, group in enumerate(groups) for spot in group}
        allowed = [
            np.array([problem.may_hold(device, layer) for layer in range(self.layers)]) for device in problem.devices
        ]
        found: dict[object, list[int]] = {}
        for spot, device in enumerate(problem.devices):
            same = (group_of_device[spot], device.kind, device.memory_bytes, allowed[spot].tobytes())
            found.setdefault(same if merge else spot, []).append(spot)
        self.members = list(found.values())
        self.group_of = [group_of_device[members[0]] for members in self.members]
        self._allowed = [allowed[members[0]] for members in self.members]

    @cached_property
    def send_s(self) -> Floats:
        """Seconds [sending group, receiving group, cut]; the cut before layer j carries the output of layer j - 1.

        Nothing crosses the cuts 0 and n.
        """
        sizes = np.zeros(self.layers + 1)
        sizes[1:-1] = self.problem.output_bytes[:-1]
        send = np.zeros((self.groups, self.groups, self.layers + 1))
        for one, senders in enumerate(self.group_members):
            for other, receivers in enumerate(self.group_members):
                if one == other and len(senders) == 1:
                    continue  # a device sends nothing to itself
                names = self.problem.devices[senders[0]].name, self.problem.devices[receivers[-1]].name
                link = self.problem.links.get(names, FREE)
                send[one, other] = np.where(sizes > 0, link.latency_s + sizes / link.bytes_per_s, 0.0)
        return send

    def memory_bytes(self, member: int) -> float:
        """Memory of the devices of a class."""
        return self.problem.devices[self.members[member][0]].memory_bytes

    def fits(self, member: int, windows: Windows, stages_behind: int) -> Flags:
        """Which of the runs fit and are allowed on a device of the class, so far from the end of the pipeline."""
        held = in_flight(stages_behind, self.problem.micro_batches, self.problem.schedule)
        need = windows.state_bytes + windows.activation_bytes * held + self.problem.fixed_bytes
        flags: Flags = windows.allowed & (need <= self.memory_bytes(member))
        return flags

    def windows(self, member: int, cap_s: float) -> list[Windows]:
        """The runs of 1, 2, 3, ... layers, as long as some run computes within the cap and fits.

        Sums are built layer by layer, in the order in which a plain `sum` adds, so that they agree with it to the
        last digit.
        """
        problem, n = self.problem, self.layers
        kind = problem.devices[self.members[member][0]].kind
        rows = [problem.forward_s[kind], problem.backward_s[kind], problem.update_s.get(kind, [0.0] * n)]
        rows += [problem.state_bytes, problem.activation_bytes]
        single = np.array(rows, dtype=np.float64)
        allowed = self._allowed[member]
        total, ok = single, allowed
        found = []
        for length in range(1, n + 1):
            if length > 1:
                total = total[:, :-1] + single[:, length - 1 :]
                ok = ok[:-1] & allowed[length - 1 :]
            forward, backward, update, state, activation = total
            windows = Windows(length, forward, backward, update, state, activation, ok)
            if not (self.fits(member, windows, 0) & (windows.compute_s <= cap_s)).any():
                break  # no longer run can be better
            found.append(windows)
        return found


def _link_groups(problem: ChainProblem) -> list[list[int]]:
    """Devices that can be swapped without changing any transfer time."""
    names = [device.name for device in problem.devices]
    kinds: dict[tuple[float, float], int] = {}
    table = np.zeros((len(names), len(names)), dtype=np.int64)
    for row, sender in enumerate(names):
        for column, receiver in enumerate(names):
            if row != column:
                link = problem.links.get((sender, receiver), FREE)
                table[row, column] = kinds.setdefault((link.latency_s, link.bytes_per_s), len(kinds))
    groups: list[list[int]] = []
    for spot in range(len(names)):
        home = next((group for group in groups if _swappable(table, group[0], spot)), None)
        if home is None:
            groups.append([spot])
        else:
            home.append(spot)
    return groups


def _swappable(table: NDArray[np.int64], one: int, other: int) -> bool:
    rest = np.ones(len(table), dtype=bool)
    rest[[one, other]] = False
    return bool(
        table[one, other] == table[other, one]
        and (table[one, rest] == table[other, rest]).all()
        and (table[rest, one] == table[rest, other]).all()
    )
