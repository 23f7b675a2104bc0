"""How long it takes to know how fast three devices are: the CPU and two devices of the emulated accelerator.

python benchmarks/measure_devices.py
python benchmarks/measure_devices.py --quick
"""

from __future__ import annotations

import os
import tempfile
import time
from itertools import pairwise
from statistics import median

import torch
from report import is_quick, report

from lightning_hetero.devices import Inventory, measured_inventory, resolve_devices
from lightning_hetero.devices.origins import MEASURED
from lightning_hetero.testing import install_accelerator


def seconds(inventory: Inventory, *, refresh: bool) -> tuple[float, Inventory]:
    """Wall time of one call, and what it returned."""
    begun_s = time.perf_counter()
    measured = measured_inventory(inventory, refresh=refresh)
    return time.perf_counter() - begun_s, measured


def main() -> None:
    quick = is_quick(__doc__)
    accelerator = install_accelerator()
    inventory = resolve_devices([*accelerator.devices, "cpu"])
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))  # the first product of a process sets libraries up
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        runs = [seconds(inventory, refresh=True) for _ in range(1 if quick else 10)]
        again_s, _ = seconds(inventory, refresh=False)
    rates = [dict(measured["cpu"].flops_per_s)["float32"] for _, measured in runs]
    marks = [numbers.measured for _, measured in runs for numbers in (*measured, *measured.links)]
    report(
        {
            "three_devices_s": median(run_s for run_s, _ in runs),
            "three_devices_longest_s": max(run_s for run_s, _ in runs),
            "again_s": again_s,
            "float32_ratio": max((max(a, b) / min(a, b) for a, b in pairwise(rates)), default=1.0),
            "confident_share": marks.count(MEASURED) / len(marks),
        }
    )


if __name__ == "__main__":
    main()
