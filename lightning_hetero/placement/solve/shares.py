"""Exact uneven data-parallel shares from measured times of a batch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_hetero.errors import InfeasiblePlanError, PlacementError
from lightning_hetero.placement.solve.proof import Proof


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareDevice:
    """A device that may take a part of the batch.

    Attributes:
        name: Its name, unique in the problem.
        seconds: Time of a step by rows: {1: 0.02, 8: 0.05}. Leave out what does not fit in its memory. It runs any
            number of rows that is a sum of these, one after another.
        most_rows: How many rows it may get in all; None: any number.
    """

    name: str
    seconds: Mapping[int, float]
    most_rows: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one device gets.

    Attributes:
        device: Its name.
        micro_batches: Rows of each of its micro-batches, largest first; empty for a device that stays idle.
        seconds: Time of all of them.
    """

    device: str
    micro_batches: tuple[int, ...]
    seconds: float

    @property
    def rows(self) -> int:
        """Rows in all."""
        return sum(self.micro_batches)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharesAnswer:
    """A share for every device, in their order, and the proof; its value is the time of the slowest in seconds."""

    shares: tuple[Share, ...]
    proof: Proof


def solve_shares(devices: Sequence[ShareDevice], rows: int) -> SharesAnswer:
    """Cut a batch into shares such that the slowest device is done as early as possible.

    Exact: the step time is one of finitely many times of a device, so bisection over them finds it. Whether shares
    within a time limit can add up to the batch is a subset-sum question, answered with the bits of one integer.
    Devices with the lowest time per row are filled first, so that slow ones stay idle where they do not help.

    Args:
        devices: Any number, of any speeds.
        rows: Rows of the batch.

    Raises:
        PlacementError: No device, no row, or a table that makes no sense.
        InfeasiblePlanError: The rows are no sum of what the devices can run.

    Example:
        >>> fast, slow = ShareDevice(name="fast", seconds={1: 1.0, 4: 2.0}), ShareDevice(name="slow", seconds={1: 1.5})
        >>> answer = solve_shares([slow, fast], rows=9)
        >>> [(share.device, share.micro_batches) for share in answer.shares], answer.proof.value
        ([('slow', (1,)), ('fast', (4, 4))], 4.0)
    """
    _check(devices, rows)
    tables = {device.name: _fastest(device, rows) for device in devices}
    by_speed = sorted(devices, key=_seconds_per_row)
    times = sorted({time for table in tables.values() for time in table if time < float("inf")})
    possible = [tables[device.name] for device in by_speed]
    spot = bisect_left(times, True, key=lambda limit: _reachable(possible, rows, limit)[-1] >> rows & 1 == 1)
    if spot == len(times):
        raise InfeasiblePlanError(_infeasible(devices, rows))
    reached = _reachable(possible, rows, times[spot])
    left, chosen = rows, {}
    for index in range(len(by_speed) - 1, -1, -1):
        table = possible[index]
        # The slowest device comes first here and takes the least that the others leave to it.
        share = next(b for b in range(left + 1) if table[b] <= times[spot] and reached[index] >> (left - b) & 1)
        chosen[by_speed[index].name] = share
        left -= share
    shares = tuple(
        Share(
            device=device.name,
            micro_batches=_micro_batches(device.seconds, tables[device.name], chosen[device.name]),
            seconds=tables[device.name][chosen[device.name]],
        )
        for device in devices
    )
    slowest = max(share.seconds for share in shares)
    return SharesAnswer(
        shares=shares, proof=Proof(value=slowest, lower_bound=slowest, method="bisection over all times of a device")
    )


def _seconds_per_row(device: ShareDevice) -> float:
    return min((time / size for size, time in device.seconds.items()), default=float("inf"))


def _fastest(device: ShareDevice, rows: int) -> list[float]:
    """Least time of 0 to `rows` rows, run as any sum of the sizes in the table."""
    best = [0.0] + [float("inf")] * rows
    for total in range(1, 1 + min(rows, rows if device.most_rows is None else device.most_rows)):
        best[total] = min(
            (best[total - size] + time for size, time in device.seconds.items() if size <= total), default=best[total]
        )
    return best


def _micro_batches(seconds: Mapping[int, float], best: list[float], rows: int) -> tuple[int, ...]:
    """The sizes whose times add up to the least time of `rows` rows."""
    sizes = []
    while rows:
        size = next(s for s, time in seconds.items() if s <= rows and best[rows - s] + time == best[rows])
        sizes.append(size)
        rows -= size
    return tuple(sorted(sizes, reverse=True))


def _reachable(tables: Sequence[list[float]], rows: int, limit: float) -> list[int]:
    """For the first 0, 1, 2, ... devices, the sums of shares within the limit; bit b stands for b rows."""
    mask, reached = (1 << (rows + 1)) - 1, [1]
    for table in tables:
        sums = 0
        for share, time in enumerate(table):
            if time <= limit:
                sums |= reached[-1] << share
        reached.append(sums & mask)
    return reached


def _check(devices: Sequence[ShareDevice], rows: int) -> None:
    if not devices or rows < 1:
        raise PlacementError(
            f"shares need at least one device and one row; there are {len(devices)} devices and {rows} rows"
        )
    names = [device.name for device in devices]
    if len(set(names)) < len(names):
        raise PlacementError(f"the devices that share a batch need names of their own, got {names}")
    for device in devices:
        wrong = [(size, time) for size, time in device.seconds.items() if size < 1 or not 0 <= time < float("inf")]
        if wrong:
            size, time = wrong[0]
            raise PlacementError(
                f"{device.name}: {size} rows in {time} s is no measurement; give rows of 1 or more and finite seconds"
            )


def _infeasible(devices: Sequence[ShareDevice], rows: int) -> str:
    sizes = "; ".join(f"{d.name}: {', '.join(map(str, sorted(d.seconds))) or 'none'}" for d in devices)
    return (
        f"{rows} rows are no sum of the sizes that the devices can run ({sizes}). "
        "Measure one row on some device, or change the batch."
    )
