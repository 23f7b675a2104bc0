"""Target "executorch": a program for ExecuTorch, which runs on phones and microcontrollers, and here from Python.

Devices are "xnnpack", where XNNPACK runs what it can, and "portable", plain kernels that every board has.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_hetero.errors import TargetError
from lightning_hetero.export.quiet import without_chatter
from lightning_hetero.export.targets.target import Run, Saved, StageProgram, reason

_XNNPACK, _PORTABLE = "xnnpack", "portable"


class _ExecuTorch:
    packages: Mapping[str, str] = {"executorch": "executorch"}
    default_device = _XNNPACK
    runs = True

    def available(self) -> tuple[str, ...]:
        has_xnnpack = "XnnpackBackend" in _runtime().backend_registry.registered_backend_names
        return (_XNNPACK, _PORTABLE) if has_xnnpack else (_PORTABLE,)

    def check(self, device: str) -> None:
        if device not in self.available():
            raise TargetError(
                f"target 'executorch:{device}': this ExecuTorch has no such backend. It has "
                f"{', '.join(self.available())}; choose one of these."
            )

    def save(self, stage: StageProgram, folder: Path, device: str) -> Saved:
        self.check(device)
        if any(None in shape for shape in stage.shapes):
            raise TargetError(
                f"{stage.name}: ExecuTorch plans the memory of a program for one size, so it takes no open batch. "
                "Export with dynamic_batch=False and an example of the size that will run."
            )
        path = folder / f"{stage.name}.pte"
        try:
            with without_chatter():
                path.write_bytes(_lowered(stage, device))
        except Exception as error:  # its passes raise whatever they meet
            raise TargetError(
                f"{stage.name}: ExecuTorch cannot lower it: {reason(error)}. Use another target for this stage."
            ) from error
        return Saved((path,))

    def load(self, file: Path, device: str, affinity: Mapping[str, str]) -> Run:
        try:
            program = _runtime().load_program(file)
            method = program.load_method("forward")
        except RuntimeError as error:
            raise TargetError(
                f"target 'executorch:{device}' does not take {file.name}: {reason(error)}. Export again with the "
                "ExecuTorch that is to run it."
            ) from error
        one_call = threading.Lock()

        def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
            here = [tensor.detach().cpu().contiguous() for tensor in inputs]
            with one_call, torch.inference_mode():  # results lie in memory that the next call writes
                return [result.clone() for result in method.execute(here)]

        return run


def _runtime() -> Any:
    with without_chatter():  # its imports warn of what its own packages do
        from executorch.runtime import Runtime

        return Runtime.get()


def _lowered(stage: StageProgram, device: str) -> bytes:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    partitioners = [XnnpackPartitioner()] if device == _XNNPACK else []
    program = to_edge_transform_and_lower(stage.exported, partitioner=partitioners).to_executorch()
    return bytes(program.buffer)


TARGET = _ExecuTorch()
