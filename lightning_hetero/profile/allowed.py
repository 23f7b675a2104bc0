"""What may be measured where: data that must not be on a device is not copied there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from lightning_hetero.profile.benches import Basis, Bench
from lightning_hetero.profile.recording import Recording
from lightning_hetero.profile.sample import Sample

MayRun = Callable[[str, str], bool]
"""Whether what a unit holds and is given may be on a device, by the names of both."""


class Allowed:
    """Which units of a recorded model may be on which bench, with which calls.

    Args:
        recording: The model.
        basis_of: How each device follows from a bench.
        may_run: What may be on which device; None: everything.
    """

    def __init__(self, recording: Recording, basis_of: Mapping[str, Basis], may_run: MayRun | None) -> None:
        self._recording = recording
        self._may_run = may_run or (lambda unit, device: True)
        self._devices: dict[Bench, list[str]] = {}
        for name, basis in basis_of.items():
            devices = self._devices.setdefault(replace(basis.bench, steady=False), [])
            if not basis.estimated:  # the host, which has the batch in any case, stands for devices that are elsewhere
                devices.append(name)
        self.benches = tuple(bench for bench in self._devices if any(self._on(n, bench) for n in recording.sort_of))

    def units(self, bench: Bench) -> list[tuple[str, nn.Module]]:
        """The units that may be on a bench with their sorts, in the order of their first calls."""
        return [
            (sort, self._recording.module.get_submodule(name))
            for name, sort in self._recording.sort_of.items()
            if self._on(name, bench)
        ]

    def instead(self, sort: str) -> dict[Bench, tuple[nn.Module, Sample] | None]:
        """What to measure of a sort on benches on which its sample must not be, see `Job`."""
        sample = self._recording.samples[sort]
        return {bench: self._other(sort, sample, bench) for bench in self._devices if not self._on(sample.unit, bench)}

    def _other(self, sort: str, sample: Sample, bench: Bench) -> tuple[nn.Module, Sample] | None:
        # What other units send on may go wherever a unit may go that takes such things.
        handed = self._recording.handed.get(sort)
        unit = next((unit for other, unit in self.units(bench) if other == sort), None)
        if handed is None and not self._recording.is_of_batch(sort):
            handed = sample
        return None if unit is None or handed is None else (unit, replace(handed, outputs=sample.outputs))

    def _on(self, unit: str, bench: Bench) -> bool:
        devices = self._devices[bench]
        return not devices or any(self._may_run(unit, device) for device in devices)
