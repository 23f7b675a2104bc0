"""Target "aoti": machine code from AOTInductor, which LibTorch and Python load. Needs a C++ compiler to export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

from lightning_hetero.errors import TargetError
from lightning_hetero.export.quiet import without_chatter
from lightning_hetero.export.targets.target import Run, Saved, StageProgram, reason
from lightning_hetero.export.targets.torch_program import check_torch_device, torch_devices


class _Aoti:
    packages: Mapping[str, str] = {}
    default_device = "cpu"
    runs = True

    def available(self) -> tuple[str, ...]:
        return tuple(device for device in torch_devices() if device.partition(":")[0] in ("cpu", "cuda", "xpu"))

    def check(self, device: str) -> None:
        check_torch_device(device, "aoti")

    def save(self, stage: StageProgram, folder: Path, device: str) -> Saved:
        place = check_torch_device(device, "aoti")  # what is compiled is compiled for this device
        path = folder / f"{stage.name}.pt2"
        try:
            with without_chatter():
                program = stage.exported if place.type == "cpu" else move_to_device_pass(stage.exported, place)
                torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        except Exception as error:  # the compiler raises whatever it meets
            raise TargetError(
                f"{stage.name}: AOTInductor cannot compile it: {reason(error)}. "
                "It needs a C++ compiler (g++ or clang++); or use another target for this stage."
            ) from error
        return Saved((path,))

    def load(self, file: Path, device: str, affinity: Mapping[str, str]) -> Run:
        place = check_torch_device(device, "aoti")
        with without_chatter():
            try:
                program = torch._inductor.aoti_load_package(str(file), device_index=place.index or -1)
            except RuntimeError as error:
                raise TargetError(
                    f"target 'aoti:{device}' does not take {file.name}: {reason(error)}. It was compiled for one type "
                    "of device and one kind of processor; export again on this machine."
                ) from error

        def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
            with torch.inference_mode():
                outputs: Sequence[Tensor] = program(*(tensor.to(place) for tensor in inputs))
            return outputs

        return run


TARGET = _Aoti()
