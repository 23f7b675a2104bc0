"""What an installed lightning_hetero adds to `import torch` and to `import lightning.pytorch`, in milliseconds.

    python benchmarks/import_time.py
    python benchmarks/import_time.py --quick

torch calls the package's entry point at the end of `import torch`, in every program of the environment. So torch is
imported by fresh Pythons that find all installed packages, and by others that find all but this one.
"""

from __future__ import annotations

import compileall
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path
from statistics import median

from report import is_quick, report

import lightning_hetero

PACKAGE = "lightning_hetero"
SWITCHES = ("TORCH_DEVICE_BACKEND_AUTOLOAD", "LIGHTNING_HETERO_AUTOREGISTER")
ImportTimes = dict[str, int]

TIMED = """
import {before}
import time
start_s = time.process_time()
{timed}
print((time.process_time() - start_s) * 1e3)
"""


def installed_packages(folder: Path, *, with_ours: bool) -> Path:
    """Fill `folder` with links to everything in site-packages but this package, and with a copy of that or not."""
    folder.mkdir()
    for site in map(Path, sys.path):
        if site.name in ("site-packages", "dist-packages") and site.is_dir():
            for entry in site.iterdir():
                if PACKAGE not in entry.name and not (folder / entry.name).exists():
                    (folder / entry.name).symlink_to(entry)
    if with_ours:
        # Not from site-packages: an editable installation has only its metadata there.
        source = Path(lightning_hetero.__file__).parent
        shutil.copytree(source, folder / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
        compileall.compile_dir(folder / PACKAGE, quiet=1)  # as an installer does
        metadata = folder / f"{PACKAGE}-{lightning_hetero.__version__}.dist-info"
        metadata.mkdir()
        for name in ("METADATA", "entry_points.txt"):
            (metadata / name).write_text(distribution(PACKAGE).read_text(name) or "")
    return folder


def run(code: str, packages: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh Python that finds the standard library and what is in `packages`."""
    inherited = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    return subprocess.run(
        [sys.executable, "-S", *options, "-c", code],
        env={**inherited, "PYTHONPATH": str(packages), **environment},
        cwd=packages.parent,
        capture_output=True,
        text=True,
        check=True,
    )


def import_times_us(packages: Path) -> ImportTimes:
    """Microseconds that each module of `import torch` took, without those that it imported in turn."""
    times: ImportTimes = defaultdict(int)
    for line in run("import torch", packages, "-X", "importtime").stderr.splitlines():
        row = re.fullmatch(r"import time: +(\d+) \| +\d+ \| +(\S+)", line)
        if row:
            times[row[2]] += int(row[1])
    return times


def shortest_us(runs: Iterable[ImportTimes]) -> ImportTimes:
    """The shortest time that each module took in any run."""
    shortest: ImportTimes = {}
    for times in runs:
        for name, own_us in times.items():
            shortest[name] = min(own_us, shortest.get(name, own_us))
    return shortest


def importtime_ms(without: Iterable[ImportTimes], with_ours: Iterable[ImportTimes]) -> float:
    """What torch's own code takes longer, and what the modules take that only our entry point imports.

    The other thousand modules are the same; together they differ by more from run to run. Python does not report
    packages that are imported on the way to a module, such as `lightning_hetero` itself: they are in torch's own time.
    """
    before_us, after_us = shortest_us(without), shortest_us(with_ours)
    new_us = sum(own_us for name, own_us in after_us.items() if name not in before_us)
    return (new_us + after_us["torch"] - before_us["torch"]) / 1e3


def cpu_ms(before: str, timed: str, packages: Path, **environment: str) -> float:
    """Milliseconds of CPU time of a statement in a fresh Python that has imported `before`."""
    return float(run(TIMED.format(before=before, timed=timed), packages, **environment).stdout)


def figures(folder: Path, pairs: int, *, quick: bool) -> dict[str, float]:
    """All figures, from `pairs` of Pythons with and without this package that take turns.

    A `quick` run times the entry points in every other pair only.
    """
    absent = installed_packages(folder / "without", with_ours=False)
    present = installed_packages(folder / "with", with_ours=True)
    imports: dict[Path, list[ImportTimes]] = {absent: [], present: []}
    entry_points_ms: dict[Path, list[float]] = {absent: [], present: []}
    after_torch_ms, registration_ms = [], []
    no_entry_points = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    for pair in range(pairs):
        for packages in (absent, present) if pair % 2 else (present, absent):
            imports[packages].append(import_times_us(packages))
            if pair % 2 or not quick:
                call = "torch._import_device_backends()"  # the end of `import torch`, which was left out
                entry_points_ms[packages].append(cpu_ms("torch", call, packages, **no_entry_points))
        if pair % 2:
            after_torch_ms.append(cpu_ms("torch", f"import {PACKAGE}", present, **no_entry_points))
            call = f"from {PACKAGE}._autoload import register; register('lightning.pytorch')"
            registration_ms.append(cpu_ms("lightning.pytorch", call, present, LIGHTNING_HETERO_AUTOREGISTER="0"))
    return {
        "added_to_torch_ms": median(entry_points_ms[present]) - median(entry_points_ms[absent]),
        "importtime_ms": importtime_ms(imports[absent], imports[present]),
        "importtime_noise_ms": abs(importtime_ms(imports[absent][0::2], imports[absent][1::2])),
        "after_torch_ms": median(after_torch_ms),
        "added_to_lightning_ms": median(registration_ms),
    }


def main() -> None:
    quick = is_quick(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        report(figures(Path(folder), 2 if quick else 12, quick=quick))


if __name__ == "__main__":
    main()
