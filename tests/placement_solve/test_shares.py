"""Uneven shares of a batch, against trying all of them."""

from __future__ import annotations

from itertools import product
from random import Random

import pytest

from lightning_hetero.errors import InfeasiblePlanError, PlacementError
from lightning_hetero.placement.solve import ShareDevice, solve_shares

BATCHES, PROBLEMS_IN_BATCH = 10, 50


def random_devices(random: Random) -> list[ShareDevice]:
    whole = random.random() < 0.5
    devices = []
    for index in range(random.randint(1, 4)):
        sizes = [size for size in (1, 2, 3, 4, 6) if random.random() < 0.5]
        times = {size: float(random.randint(0, 9)) if whole else random.uniform(0.1, 9) for size in sizes}
        devices.append(ShareDevice(name=f"device{index}", seconds=times))
    return devices


def seconds(device: ShareDevice, rows: int) -> float:
    """Least time over all sums of the tabulated sizes, by trying each first size."""
    if rows == 0:
        return 0.0
    rest = [(rows - size, time) for size, time in device.seconds.items() if size <= rows]
    return min((time + seconds(device, left) for left, time in rest), default=float("inf"))


@pytest.mark.parametrize("batch", range(BATCHES))
def test_shares_equal_brute_force(batch: int) -> None:
    feasible = 0
    for number in range(PROBLEMS_IN_BATCH):
        random = Random(batch * PROBLEMS_IN_BATCH + number)
        devices, rows = random_devices(random), random.randint(1, 9)
        tables = [[seconds(device, count) for count in range(rows + 1)] for device in devices]
        ways = product(range(rows + 1), repeat=len(devices))
        least = min(
            max(table[share] for table, share in zip(tables, way, strict=True)) for way in ways if sum(way) == rows
        )
        if least == float("inf"):
            with pytest.raises(InfeasiblePlanError):
                solve_shares(devices, rows)
            continue
        feasible += 1

        answer = solve_shares(devices, rows)

        assert answer.proof.value == pytest.approx(least, rel=1e-12)
        assert answer.proof.optimal
        assert sum(share.rows for share in answer.shares) == rows
        assert [share.device for share in answer.shares] == [device.name for device in devices]
        for share, device in zip(answer.shares, devices, strict=True):
            assert share.seconds == pytest.approx(sum(device.seconds[size] for size in share.micro_batches))
            assert share.seconds == pytest.approx(seconds(device, share.rows))
    assert feasible > PROBLEMS_IN_BATCH / 2


def test_a_device_that_does_not_help_stays_idle() -> None:
    fast = ShareDevice(name="fast", seconds={8: 1.0})
    slow = ShareDevice(name="slow", seconds={1: 0.5, 8: 4.0})

    answer = solve_shares([slow, fast], rows=8)

    assert [share.micro_batches for share in answer.shares] == [(), (8,)]


def test_many_rows_and_devices() -> None:
    devices = [ShareDevice(name=f"device{i}", seconds={1: 1.0 + i % 3, 16: 8.0 + i % 3}) for i in range(32)]

    def most_rows(seconds: float) -> float:
        """As many batches of 16 as there is time for, and single rows in the rest."""
        return sum(seconds // d.seconds[16] * 16 + seconds % d.seconds[16] // d.seconds[1] for d in devices)

    answer = solve_shares(devices, rows=4096)

    assert sum(share.rows for share in answer.shares) == 4096
    assert most_rows(answer.proof.value - 1) < 4096 <= most_rows(answer.proof.value)


@pytest.mark.parametrize(
    ("devices", "rows", "message"),
    [
        ([], 4, "shares need at least one device and one row; there are 0 devices and 4 rows"),
        ([ShareDevice(name="a", seconds={1: 1.0})], 0, "there are 1 devices and 0 rows"),
        ([ShareDevice(name="a", seconds={1: 1.0})] * 2, 4, "need names of their own, got ['a', 'a']"),
        ([ShareDevice(name="a", seconds={0: 1.0})], 4, "a: 0 rows in 1.0 s is no measurement"),
        ([ShareDevice(name="a", seconds={1: float("nan")})], 4, "a: 1 rows in nan s is no measurement"),
    ],
)
def test_nonsense_is_refused(devices: list[ShareDevice], rows: int, message: str) -> None:
    with pytest.raises(PlacementError) as error:
        solve_shares(devices, rows)

    assert message in str(error.value)


def test_rows_that_no_sum_reaches_are_refused() -> None:
    devices = [ShareDevice(name="a", seconds={4: 1.0, 2: 1.0}), ShareDevice(name="b", seconds={})]

    with pytest.raises(InfeasiblePlanError) as error:
        solve_shares(devices, rows=7)

    assert str(error.value) == (
        "7 rows are no sum of the sizes that the devices can run (a: 2, 4; b: none). "
        "Measure one row on some device, or change the batch."
    )


def test_a_device_gets_no_more_rows_than_it_may() -> None:
    fast = ShareDevice(name="fast", seconds={1: 1.0, 2: 2.0}, most_rows=3)
    slow = ShareDevice(name="slow", seconds={1: 5.0})
    assert [share.rows for share in solve_shares([fast, slow], rows=5).shares] == [3, 2]
    with pytest.raises(InfeasiblePlanError, match="5 rows are no sum"):
        solve_shares([fast], rows=5)
