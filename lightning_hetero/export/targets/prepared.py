"""Targets that are prepared here and run elsewhere: accelerators that need tools and hardware of their vendors.

What each one takes is in `prepared.json`, with sources. The stage is checked against it and written for the vendor's
tool, with a note of how to go on. Nothing of this was ever run on the hardware.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lightning_hetero.devices.spec import DeviceSpec
from lightning_hetero.errors import TargetError
from lightning_hetero.export.operators import asked_by
from lightning_hetero.export.targets.target import Run, Saved, StageProgram, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one family of hardware takes.

    Attributes:
        title: What it is, for messages and documentation.
        artifact: The family of targets that writes the file.
        default_device: What the family without a device stands for.
        precisions: The dtypes that it computes with.
        dynamic_batch: Whether the batch may stay open.
        operators: Vendor's name of a layer to the operations of torch that become it; None if nobody published a list.
        tool: What takes the file.
        arguments: For the tool; {file} and {device} stand for these.
        fallback: Name of the device for operations that it lacks, in a target such as "dla:0,GPU".
        fallback_arguments: More of them, if operations that it lacks may run elsewhere.
        remarks: Sizes and versions.
        sources: Where all this comes from.
    """

    title: str
    artifact: str
    default_device: str
    precisions: tuple[str, ...]
    dynamic_batch: bool
    operators: Mapping[str, tuple[str, ...]] | None
    tool: str
    arguments: tuple[str, ...]
    fallback: str
    fallback_arguments: tuple[str, ...]
    remarks: tuple[str, ...]
    sources: tuple[str, ...]

    def lacking(self, operators: Iterable[str]) -> list[str]:
        """Those of some operations of torch that it has no layer for, as far as the vendor says what it has."""
        if self.operators is None:
            return []
        known = {name for names in self.operators.values() for name in names}
        return sorted({*operators} - known)


@cache
def limits() -> Mapping[str, Limits]:
    """The limits of all prepared families, by name."""
    data: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return {name: Limits(**{key: _frozen(value) for key, value in record.items()}) for name, record in data.items()}


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: tuple(names) for key, names in value.items()}
    return tuple(value) if isinstance(value, list) else value


def deployment_device(target: str, memory_bytes: int, speed: float = 1.0) -> DeviceSpec:
    """A prepared target as a device of an inventory: known, and never trained on.

    Args:
        target: "dla:0" and the like; it becomes the name.
        memory_bytes: What a stage there may take.
        speed: How fast it is beside the others.

    Raises:
        TargetError: There is no such family.
    """
    family = target.partition(":")[0]
    if family not in limits():
        raise TargetError(f"no target to be prepared is called {target!r}; there are {', '.join(limits())}")
    return DeviceSpec(
        name=target,
        kind=family,
        torch_device=None,
        memory_bytes=memory_bytes,
        speed=speed,
        trainable=False,
        dtypes=limits()[family].precisions,
    )


class Prepared:
    """A family of which only the files are made.

    Args:
        family: Its name.
        writer: The family that writes the file.
    """

    runs = False

    def __init__(self, family: str, writer: Target) -> None:
        self.family, self.limits, self._writer = family, limits()[family], writer
        self.packages: Mapping[str, str] = writer.packages
        self.default_device = self.limits.default_device

    def available(self) -> tuple[str, ...]:
        """None: nothing here runs it."""
        return ()

    def check(self, device: str) -> None:
        """Always raises."""
        raise TargetError(
            f"target '{self.family}:{device}' is prepared, not run, by this package ({self.limits.title}). Take the "
            f"file to {self.limits.tool}; to try it here, override it with a target of the family "
            f"{self.limits.artifact!r}."
        )

    def save(self, stage: StageProgram, folder: Path, device: str) -> Saved:
        """Check the stage, and write it with a note for the vendor's tool.

        Raises:
            TargetError: The hardware lacks an operation, or takes no open batch.
        """
        first, _, elsewhere = device.partition(",")
        self._check_batch(stage)
        if not elsewhere:
            self._check_operators(stage, first)
        saved = self._writer.save(stage, folder, self._writer.default_device)
        arguments = self.limits.arguments + (self.limits.fallback_arguments if elsewhere else ())
        note = {
            "target": f"{self.family}:{device}",
            "hardware": self.limits.title,
            "state": "prepared, never run on the hardware",
            "tool": self.limits.tool,
            "arguments": [word.format(file=saved.files[0].name, device=first) for word in arguments],
            "precisions": list(self.limits.precisions),
            "remarks": list(self.limits.remarks),
            "sources": list(self.limits.sources),
        }
        path = folder / f"{stage.name}.{self.family}.json"
        path.write_text(json.dumps(note, indent=2) + "\n", encoding="utf-8")
        return Saved((*saved.files, path), saved.affinity)

    def load(self, file: Path, device: str, affinity: Mapping[str, str]) -> Run:
        """Always raises."""
        self.check(device)
        raise NotImplementedError  # for type checkers, which do not know that `check` raises

    def _check_batch(self, stage: StageProgram) -> None:
        if not self.limits.dynamic_batch and any(None in shape for shape in stage.shapes):
            raise TargetError(
                f"{stage.name}: {self.limits.title} takes no open batch. Export with dynamic_batch=False and an "
                f"example of the size that will run. Source: {self.limits.sources[0]}"
            )

    def _check_operators(self, stage: StageProgram, device: str) -> None:
        missing = self.limits.lacking(asked_by(stage.graph.graph.nodes).operators)
        if missing:
            raise TargetError(
                f"{stage.name}: {self.limits.title} has no {', '.join(missing)}. Put the units that use it on another "
                f"device, or let it run elsewhere with the target '{self.family}:{device},{self.limits.fallback}'. "
                f"It has: {'; '.join(self.limits.operators or ())}. Source: {self.limits.sources[0]}"
            )
