"""Target "torch": an exported program, moved to any device of torch when it is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass
from torch.fx.graph import CodeGen

from lightning_hetero.errors import TargetError
from lightning_hetero.export.targets.target import Run, Saved, StageProgram


def torch_devices() -> tuple[str, ...]:
    """Devices of torch on this machine."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return ("cpu",)
    return ("cpu", *(f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())))


def check_torch_device(device: str, target: str) -> torch.device:
    """Raise unless torch has the device here.

    Raises:
        TargetError: It has not.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise TargetError(f"target '{target}:{device}': torch knows no device of this name ({error})") from error
    name = kind if kind == "cpu" else device if ":" in device else f"{kind}:0"
    if name not in torch_devices():
        raise TargetError(
            f"target '{target}:{device}': this machine has no such device. It has {', '.join(torch_devices())}; "
            f"choose one with overrides={{stage: '{target}:{torch_devices()[0]}'}}."
        )
    return torch.device(name)


class OnTorch:
    """What families have in common that run on devices of torch.

    Args:
        family: Its name.
    """

    packages: Mapping[str, str] = {}
    default_device = "cpu"
    runs = True

    def __init__(self, family: str) -> None:
        self.family = family

    def available(self) -> tuple[str, ...]:
        """Devices of torch on this machine."""
        return torch_devices()

    def check(self, device: str) -> None:
        """Raise a TargetError unless torch has the device here."""
        check_torch_device(device, self.family)


def run_on(place: torch.device, program: Callable[..., Any]) -> Run:
    """Call a program with its inputs on a device."""

    def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.inference_mode():
            outputs: Sequence[Tensor] = program(*(tensor.to(place) for tensor in inputs))
        return outputs

    return run


class _TorchProgram(OnTorch):
    def save(self, stage: StageProgram, folder: Path, device: str) -> Saved:
        path = folder / f"{stage.name}.pt2"
        torch.export.save(stage.exported, path)
        return Saved((path,))

    def load(self, file: Path, device: str, affinity: Mapping[str, str]) -> Run:
        place = check_torch_device(device, self.family)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")  # torch's own reading, before 2.13
            program = torch.export.load(file)
        if place.type != "cpu":
            program = move_to_device_pass(program, place)
        module = program.module(check_guards=False)  # they would compare the example's rows with those of a batch
        # A stage takes and gives plain tensors. To nest them as torch.export does, and to check their sizes again,
        # takes longer than small stages themselves.
        module.graph.set_codegen(CodeGen())
        module.recompile()
        return run_on(place, module.forward)


TARGET = _TorchProgram("torch")
