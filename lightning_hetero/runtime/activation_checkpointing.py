"""Activation checkpointing of placed modules: the forward keeps inputs only, the backward runs their code again.

After Chen et al., "Training deep nets with sublinear memory cost", 2016. The graph is that of
`torch.utils.checkpoint(use_reentrant=False)`. What torch leaves to the caller is done here, for code that runs in
whatever thread has the device:

* random numbers: those of the module's own device are repeated too, and in lanes nobody touches a generator from which
  another micro-batch draws;
* buffers: running statistics of normalisations are not updated a second time;
* surroundings: the code runs with the modes and attributes of modules, what is inside of these, and the globals of its
  first run, and with its function modes and autocast;
* inputs that the module itself changes in place are copied before.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from lightning_hetero.devices.spec import DeviceSpec
from lightning_hetero.runtime import frames
from lightning_hetero.runtime.checkpointed_call import CheckpointedCall
from lightning_hetero.runtime.engine.state import saves_otherwise, stays_in_its_thread
from lightning_hetero.runtime.engine.streams import Generator
from lightning_hetero.runtime.layers import layers_of
from lightning_hetero.runtime.layout import Block
from lightning_hetero.runtime.standin import StandIn

log = logging.getLogger(__name__)

_CPU = torch.device("cpu")


def checkpoint_blocks(
    root: nn.Module, blocks: Iterable[Block], generators: Mapping[torch.device, Generator]
) -> list[Checkpointed]:
    """Let blocks, or their layers if they have some, keep their inputs only. `remove` of what is returned undoes it.

    What TorchScript has compiled keeps its activations: it optimises code between one run and the next.

    Args:
        root: The module that has the blocks.
        blocks: The blocks.
        generators: The default generators of the devices of the blocks and of the CPU.
    """
    found = []
    for block in blocks:
        if any(isinstance(part, torch.jit.ScriptModule) for part in block.module.modules()):
            log.warning("%s keeps its activations: TorchScript does not run the same code twice.", block.name)
            continue
        for name, module in layers_of(root, block.name).items():
            checkpointed = Checkpointed(name, module, block.device, generators)
            checkpointed.install()
            found.append(checkpointed)
    return found


class Checkpointed(StandIn):
    """Stands in for the `forward` of a module, all of it on one device.

    Hooks on the module itself run once, those on modules inside of it a second time in the backward. Where nothing is
    recorded, where hooks of user code decide what autograd saves (activation checkpointing from outside), and inside of
    torch.func, the module runs as it is.

    Args:
        name: Name of the module, for messages.
        module: The module.
        device: Its device.
        generators: The default generators of its device and of the CPU.
    """

    def __init__(
        self, name: str, module: nn.Module, device: DeviceSpec, generators: Mapping[torch.device, Generator]
    ) -> None:
        super().__init__(module)
        self.name = name
        self.device = torch.device(str(device.torch_device))
        self.device_name = device.name
        self.parts = tuple(module.modules())
        self.generators = [generators[device] for device in dict.fromkeys((_CPU, self.device))]
        self.changes_inputs: bool | None = None  # unknown before the first call
        self.draws_elsewhere = False  # with the generator of the host, while it is on another device
        self._marker = torch.empty(0, device=self.device)  # tells torch whose autocast it has to repeat

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What torch calls as the module's forward."""
        if not self._applies():
            return self.plain(*args, **kwargs)
        call = CheckpointedCall(self, args, kwargs)
        # RReLU saves its noise before it fills it, and a second run that ends early ends there.
        early = not any(isinstance(part, nn.RReLU) for part in self.parts)
        with nullcontext() if early else torch.utils.checkpoint.set_checkpoint_early_stop(False):
            return torch.utils.checkpoint.checkpoint(call, self._marker, use_reentrant=False, preserve_rng_state=False)

    def parameters(self) -> list[Tensor]:
        """Those that are there now."""
        return [p for part in self.parts for p in part._parameters.values() if p is not None]

    def _applies(self) -> bool:
        return (
            stays_in_its_thread() is None
            and torch.is_grad_enabled()
            and not torch.is_inference_mode_enabled()
            and not frames.are_activations_kept()
            and not saves_otherwise()
            and all(isinstance(parameter, nn.Parameter) for parameter in self.parameters())
        )
