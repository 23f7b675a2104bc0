"""Compiles the parts of a placed model in place: each block, the largest module on one device, becomes one piece.

Only `forward` is compiled. Hooks, moves between devices and the cutting into micro-batches stay outside, so that no
name in the model changes and nothing has to be compiled again when the plan does.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lightning_hetero.runtime.layout import Block
from lightning_hetero.runtime.modes import suspended
from lightning_hetero.runtime.reconcile import DeviceReconciler
from lightning_hetero.runtime.standin import StandIn

log = logging.getLogger(__name__)


def compile_blocks(blocks: Iterable[Block], options: Mapping[str, Any]) -> list[Compiled]:
    """Compile blocks; `remove` of what is returned undoes it. One log line says which cannot be.

    Args:
        blocks: The blocks.
        options: Arguments of `torch.compile`.
    """
    found = []
    for block in blocks:
        reason = _why_not(block, str(options.get("backend", "inductor")))
        if reason is not None:
            log.warning("%s is not compiled: %s.", block.name, reason)
            continue
        compiled = Compiled(block.module, options)
        compiled.install()
        found.append(compiled)
    return found


class Compiled(StandIn):
    """Stands in for the `forward` of a module, all of it on one device.

    Args:
        module: The module.
        options: Arguments of `torch.compile`.
    """

    def __init__(self, module: nn.Module, options: Mapping[str, Any]) -> None:
        super().__init__(module)
        self._compiled = torch.compile(self.plain, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What torch calls as the module's forward."""
        with suspended(DeviceReconciler):  # torch.compile would trace through it at every operation
            return self._compiled(*args, **kwargs)


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile traces calls that the module's own code makes."""
    in_place = getattr(module, "_compiled_call_impl", None)
    by_its_host = getattr(module, "_compiler_ctx", None)  # Lightning compiles the steps of a LightningModule
    return hasattr(module, "_orig_mod") or in_place is not None or by_its_host is not None


@functools.cache
def keep_out_of_graphs() -> None:
    """Let torch.compile pass over the code of this package that runs between the parts of a model.

    It would compile each function of it for each part, which takes longer than the parts themselves, and gains nothing:
    a graph ends in any case where tensors change devices.
    """
    add = getattr(torch._dynamo.trace_rules, "add", None)
    if add is not None:
        add("lightning_hetero.runtime")


def _why_not(block: Block, backend: str) -> str | None:
    """Why a block stays as it is; None if it can be compiled."""
    if any(isinstance(part, torch.jit.ScriptModule) for part in block.module.modules()):
        return "TorchScript has compiled it already"
    if is_compiled(block.module):
        return "it is compiled already"
    if block.shares:
        return "it has replicas, which run it with parameters of several devices"
    kind = str(block.device.torch_device).partition(":")[0]
    if backend == "inductor" and not _inductor_knows(kind):
        return f"torch's compiler inductor does not know {kind!r} devices; compile={{'backend': ...}} takes another one"
    return None


def _inductor_knows(device_type: str) -> bool:
    from torch._inductor.codegen.common import get_scheduling_for_device, init_backend_registration

    init_backend_registration()
    return get_scheduling_for_device(device_type) is not None
