"""Moves parameters and buffers to a device so that they stay the same objects.

`Module.to` makes new Parameter objects wherever the two devices do not share a tensor implementation (all
PrivateUse1 backends): tied weights come apart, and optimizers keep training the dead ones
(https://github.com/pytorch/pytorch/issues/116255). Here a parameter keeps its identity in this order of attempts:

1. `parameter.data = ...`, where torch allows it (CPU and CUDA);
2. `torch.utils.swap_tensors`, which exchanges the inside of two Python objects;
3. a new Parameter, put into every module that held the old one. Only then has the caller something to do:
   the pairs of old and new are returned, for its optimizers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_hetero.errors import PlacementError
from lightning_hetero.runtime.transfer import to_device

log = logging.getLogger(__name__)

Replaced = list[tuple[nn.Parameter, nn.Parameter]]


def relocate(modules: Iterable[tuple[nn.Module, torch.device]], root: nn.Module) -> Replaced:
    """Move the tensors that each module owns directly (not those of its children) to the device beside it.

    A tensor shared by several modules is moved once, to the device of the first, and stays shared. The module's
    mode, hooks and gradients stay as they are.

    Args:
        modules: Pairs of module and target device.
        root: The module below which other holders of the same parameter are looked for.

    Returns:
        Pairs of old and new Parameter where identity could not be kept; usually empty.

    Raises:
        PlacementError: A tensor is on the meta device, so there is nothing to move.
    """
    moved: dict[int, Tensor] = {}
    replaced: Replaced = []
    touched: list[nn.Module] = []
    with torch.no_grad(), torch.inference_mode(False):
        for module, device in modules:
            release_derived(module, device)
            if isinstance(module, nn.RNNBase):
                module._flat_weight_refs = []  # weak references, which forbid a swap; `_init_flat_weights` renews them
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and id(parameter) not in moved:
                    new = _move_parameter(module, name, parameter, device)
                    moved[id(parameter)] = new
                    if new is not parameter:
                        replaced.append((parameter, new))
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    if id(buffer) not in moved:
                        moved[id(buffer)] = _on(buffer, device, type(module).__name__, name)
                    _set_buffer(module, name, moved[id(buffer)])
            touched.append(module)
        _rebind(root, {id(old): new for old, new in replaced})
        for module in touched:
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()
    return replaced


def _move_parameter(module: nn.Module, name: str, parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        return parameter  # it takes its device from its first input, when it gets a shape
    if parameter.device == device and (parameter.grad is None or parameter.grad.device == device):
        return parameter
    data = _on(parameter.data, device, type(module).__name__, name)
    grad = None if parameter.grad is None else to_device(parameter.grad, device)
    if torch._has_compatible_shallow_copy_type(parameter.data, data):
        parameter.grad = None  # a gradient on the old device would forbid the assignment
        parameter.data = data
        parameter.grad = grad
        return parameter
    new = nn.Parameter(data, requires_grad=parameter.requires_grad)
    new.grad = grad
    if isinstance(module, torch.jit.ScriptModule):
        return new  # its inside is held in C++, where a swap of Python objects is not seen
    try:
        _swap(parameter, new)
    except RuntimeError as refused:
        log.debug("%s.%s gets a new Parameter object, a swap was refused: %s", type(module).__name__, name, refused)
        new.__dict__.update(parameter.__dict__)
        _give_hooks(new, parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None))
        return new
    return parameter


def _swap(parameter: nn.Parameter, new: nn.Parameter) -> None:
    """Give `parameter` the inside of `new`, but leave it the attributes and hooks that user code put on it."""
    hooks = parameter._backward_hooks
    after_hooks = getattr(parameter, "_post_accumulate_grad_hooks", None)
    new.__dict__.update(parameter.__dict__)
    torch.utils.swap_tensors(parameter, new)
    _give_hooks(parameter, hooks, after_hooks)


def _give_hooks(parameter: nn.Parameter, hooks: Any, after_hooks: Any) -> None:
    """Let hooks stand on a parameter, and their handles take them off it."""
    if hooks:
        parameter._backward_hooks = hooks
    if after_hooks:
        parameter._post_accumulate_grad_hooks = after_hooks


def _set_buffer(module: nn.Module, name: str, buffer: Tensor) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        setattr(module, name, buffer)
    else:
        module._buffers[name] = buffer


def _on(tensor: Tensor, device: torch.device, owner: str, name: str) -> Tensor:
    if tensor.is_meta:
        raise PlacementError(
            f"{owner}.{name} is on the meta device: it has a shape but no values, so it cannot be placed. Give it "
            "values first, for example in the LightningModule's configure_model hook: "
            "module.to_empty(device='cpu'), then initialise or load it."
        )
    return to_device(tensor, device)


def release_derived(module: nn.Module, device: torch.device | None = None) -> None:
    """Detach tensors that a hook of torch recomputes from a parameter (pruning, old weight and spectral norm).

    Their graph holds the parameter, and a parameter that a graph holds cannot be swapped. What user code keeps on a
    module, such as a sum of losses, is left alone.

    Args:
        module: The module that has them as attributes.
        device: Where they go; None leaves them where they are.
    """
    for hook in module._forward_pre_hooks.values():
        name = _recomputed_by(hook)
        value = module.__dict__.get(name)
        if isinstance(value, Tensor) and value.grad_fn is not None:
            module.__dict__[name] = to_device(value.detach(), device or value.device)


def _recomputed_by(hook: object) -> str:
    """Name of the attribute that a hook sets before each forward; "" if it is no such hook of torch."""
    if isinstance(hook, BasePruningMethod):
        return hook._tensor_name
    return hook.name if isinstance(hook, (SpectralNorm, WeightNorm)) else ""


def _rebind(root: nn.Module, new_of: Mapping[int, nn.Parameter]) -> None:
    """Put each new Parameter into every module that held the old one."""
    if not new_of:
        return
    for module in root.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in new_of:
                setattr(module, name, new_of[id(parameter)])
