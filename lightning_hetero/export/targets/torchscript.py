"""Target "torchscript": a TorchScript program for LibTorch and for those who have tools for it.

torch deprecates TorchScript in favour of torch.export. It is kept here for deployments that exist already.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import fx

from lightning_hetero.errors import TargetError
from lightning_hetero.export.quiet import without_chatter
from lightning_hetero.export.targets.target import Run, Saved, StageProgram, reason
from lightning_hetero.export.targets.torch_program import OnTorch, check_torch_device, run_on


class _TorchScript(OnTorch):
    def save(self, stage: StageProgram, folder: Path, device: str) -> Saved:
        warnings.warn(
            "target 'torchscript': torch deprecates TorchScript, and may drop it. "
            "For new deployments take 'torch' (Python) or 'aoti' (C++).",
            FutureWarning,
            stacklevel=2,
        )
        path = folder / f"{stage.name}.pt"
        try:
            with without_chatter():
                torch.jit.script(_scriptable(stage.graph)).save(str(path))
        except Exception as error:  # the compiler of TorchScript raises several classes
            raise TargetError(
                f"{stage.name}: torch.jit.script cannot compile it: {reason(error)}. Use another target for this stage."
            ) from error
        return Saved((path,))

    def load(self, file: Path, device: str, affinity: Mapping[str, str]) -> Run:
        place = check_torch_device(device, self.family)
        with without_chatter():
            program = torch.jit.load(str(file), map_location=place).eval()
        return run_on(place, program)


def _scriptable(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph in words that TorchScript knows: it chooses the overload of an operation by itself."""
    twin = copy.deepcopy(graph)
    for node in twin.graph.nodes:
        if node.target is torch.ops.aten.sym_size.int:
            node.op, node.target = "call_method", "size"
        elif isinstance(node.target, torch._ops.OpOverload):
            node.target = node.target.overloadpacket
    twin.recompile()
    return twin


TARGET = _TorchScript("torchscript")
