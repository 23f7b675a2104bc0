"""What a family of targets has to do, and how one is found by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

from torch import Tensor, fx
from torch.export import ExportedProgram

from lightning_hetero.errors import TargetError
from lightning_hetero.placement.names import did_you_mean

__all__ = ["Run", "Saved", "StageProgram", "Target", "family_names", "find_target", "opens", "reason"]

Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Runs a stage: its inputs in order to its outputs in order. May return tensors on any device."""


@dataclass(frozen=True)
class StageProgram:
    """A stage on its way to a file.

    Attributes:
        name: "stage0".
        exported: The program, with the batch open.
        graph: The same as a graph module.
        inputs: Names of its inputs, in order.
        outputs: Names of its outputs, in order.
        shapes: Sizes of its inputs; None where a size follows the batch.
        units: The units of the model that it has operations of.
        parts: For targets that spread a stage over devices: the stage in pieces, each with its device. Its inputs are
            "input0", "input1", ... there, in order.
        part_outputs: What the parts call the outputs of the stage.
    """

    name: str
    exported: ExportedProgram
    graph: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: tuple[tuple[int | None, ...], ...]
    units: tuple[str, ...] = ()
    parts: tuple[tuple[str, StageProgram], ...] = ()
    part_outputs: tuple[str, ...] = ()

    @property
    def part_inputs(self) -> tuple[str, ...]:
        """What the parts call the inputs of the stage."""
        return tuple(f"input{index}" for index in range(len(self.inputs)))


@dataclass(frozen=True)
class Saved:
    """What a target wrote.

    Attributes:
        files: Paths; the one to open comes first.
        affinity: Device of each operation, [operation, device], if the target has it from the user.
    """

    files: tuple[Path, ...]
    affinity: tuple[tuple[str, str], ...] = ()


class Target(Protocol):
    """A family of targets.

    Attributes:
        packages: Names of the packages to import, beside torch, with how pip calls them.
        default_device: What "family" without a device stands for.
        runs: Whether this package runs what it writes, or only prepares it for tools that others have.
    """

    packages: Mapping[str, str]
    default_device: str
    runs: bool

    def available(self) -> tuple[str, ...]:
        """The devices that this machine has for it; asked only if the packages are there."""

    def check(self, device: str) -> None:
        """Raise a TargetError unless the device is one on which this machine can run."""

    def save(self, stage: StageProgram, folder: Path, device: str) -> Saved:
        """Write the stage into the folder, under names that begin with its own.

        Raises:
            TargetError: The target cannot take the stage.
        """

    def load(self, file: Path, device: str, affinity: Mapping[str, str]) -> Run:
        """Open a stage.

        Raises:
            TargetError: The device is not there, or does not take the stage.
        """


_FAMILIES = {
    "torch": "torch_program",
    "torchscript": "torchscript",
    "aoti": "aoti",
    "onnx": "onnx",
    "openvino": "openvino",
    "executorch": "executorch",
}


_PREPARED = ("dla", "vitis", "fpga", "qnn", "intel-npu")  # the keys of prepared.json


def family_names() -> tuple[str, ...]:
    """All families, whether or not this machine has their packages."""
    return (*_FAMILIES, *_PREPARED)


def find_target(name: str) -> tuple[Target, str]:
    """Look up a target such as "onnx:CPUExecutionProvider".

    Returns:
        The family, and the device.

    Raises:
        TargetError: There is no such family, or its packages are missing here.
    """
    family, _, device = name.partition(":")
    if family not in family_names():
        raise TargetError(
            f"unknown target {name!r}.{did_you_mean(family, family_names())} Targets are written family:device; "
            f"available here: {', '.join(available_targets())}."
        )
    target = _family(family)
    missing = _missing(target)
    if missing:
        raise TargetError(
            f"target {name!r} needs {' and '.join(missing)}: pip install {' '.join(missing)}. "
            f"Available here: {', '.join(available_targets())}."
        )
    return target, device or target.default_device


def available_targets() -> list[str]:
    """The targets that this machine can run, as they are written."""
    found = []
    for family in _FAMILIES:
        target = _family(family)
        if target.runs and not _missing(target):
            found += [f"{family}:{device}" for device in target.available()]
    return found


def reason(error: BaseException) -> str:
    """The first line of the error that is at the bottom of others, without a full stop."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0].strip().removesuffix(".") if lines else type(error).__name__


def _family(family: str) -> Target:
    if family in _PREPARED:
        prepared = import_module(f"{__package__}.prepared")
        made: Target = prepared.Prepared(family, _family(prepared.limits()[family].artifact))
        return made
    target: Target = import_module(f"{__package__}.{_FAMILIES[family]}").TARGET
    return target


def opens(written: str, wanted: str) -> bool:
    """Whether what was written for one target is a file that another one opens."""
    families = {written.partition(":")[0]}
    if families & {*_PREPARED}:
        families.add(import_module(f"{__package__}.prepared").limits()[families.copy().pop()].artifact)
    return wanted.partition(":")[0] in families


def _missing(target: Target) -> list[str]:
    return [pip_name for module, pip_name in target.packages.items() if find_spec(module) is None]
