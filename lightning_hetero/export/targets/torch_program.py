"""Target "torch": an exported program, moved to any device of torch when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

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


class _TorchProgram:
    packages: Mapping[str, str] = {}
    default_device = "cpu"
    runs = True

    def available(self) -> tuple[str, ...]:
        return torch_devices()

    def check(self, device: str) -> None:
        check_torch_device(device, "torch")

    def save(self, stage: StageProgram, folder: Path, device: str) -> Saved:
        path = folder / f"{stage.name}.pt2"
        torch.export.save(stage.exported, path)
        return Saved((path,))

    def load(self, file: Path, device: str, affinity: Mapping[str, str]) -> Run:
        place = check_torch_device(device, "torch")
        program = torch.export.load(file)
        if place.type != "cpu":
            program = move_to_device_pass(program, place)
        module = program.module(check_guards=False)  # they would compare the example's rows with those of a batch

        def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
            with torch.inference_mode():
                outputs: Sequence[Tensor] = module(*(tensor.to(place) for tensor in inputs))
            return outputs

        return run


TARGET = _TorchProgram()
