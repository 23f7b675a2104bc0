"""Target "aoti": machine code from AOTInductor, which LibTorch and Python load. Needs a C++ compiler to export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch.export.passes import move_to_device_pass

from lightning_hetero.errors import TargetError
from lightning_hetero.export.quiet import without_chatter
from lightning_hetero.export.targets.target import Run, Saved, StageProgram, reason
from lightning_hetero.export.targets.torch_program import OnTorch, check_torch_device, run_on, torch_devices


class _Aoti(OnTorch):
    def available(self) -> tuple[str, ...]:
        return tuple(device for device in torch_devices() if device.partition(":")[0] in ("cpu", "cuda", "xpu"))

    def save(self, stage: StageProgram, folder: Path, device: str) -> Saved:
        place = check_torch_device(device, self.family)  # what is compiled is compiled for this device
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
        place = check_torch_device(device, self.family)
        index = -1 if place.index is None else place.index
        with without_chatter():
            try:
                program = torch._inductor.aoti_load_package(str(file), device_index=index)
            except RuntimeError as error:
                raise TargetError(
                    f"target 'aoti:{device}' does not take {file.name}: {reason(error)}. It was compiled for one type "
                    "of device and one kind of processor; export again on this machine."
                ) from error
        return run_on(place, program)


TARGET = _Aoti("aoti")
