"""Copies of single units on any device, and a block in which running them disturbs nobody."""

from __future__ import annotations

import copy
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.optim import optimizer as torch_optimizer

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def copy_of(unit: nn.Module, place: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of a unit whose tensors are what `place` makes of the originals, straight and one by one.

    It has the same modes, no gradients and no hooks. A module from `torch.compile` is copied as it was before, since
    each number of rows would be compiled anew.

    Args:
        unit: The unit. It stays as it is.
        place: Gives a new tensor, such as a copy on another device, for a detached one.
    """
    unit = getattr(unit, "_orig_mod", unit)
    if isinstance(unit, torch.jit.ScriptModule):
        scripted: nn.Module = copy.deepcopy(unit)
        scripted._apply(place)
        return scripted
    memo: dict[int, Any] = {}
    for module in unit.modules():
        for tensor in _tensors_of(module):
            if id(tensor) not in memo:
                new = place(tensor.detach())
                is_parameter = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
        # Hooks of user code may hold anything, and what they do must not be done once more.
        memo.update({id(vars(module)[name]): OrderedDict() for name in _HOOKS if name in vars(module)})
    twin = copy.deepcopy(unit, memo)
    for module in twin.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()
    return twin


@contextmanager
def undisturbed(devices: Iterable[torch.device]) -> Iterator[None]:
    """Put back, afterwards, what running a unit changes in this process.

    That is: random numbers of torch on the CPU and on `devices`, of numpy and of Python, the number of threads, and
    hooks on all modules and optimizers, which rest in the meantime. Warnings are silent: user code has had them.
    """
    accelerators = [device for device in devices if device.type not in ("cpu", "meta")]
    states = [(device, getattr(torch, device.type).get_rng_state(device)) for device in accelerators]
    host, of_python, of_numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    threads = torch.get_num_threads()
    places = (*vars(torch_module).items(), *vars(torch_optimizer).items())
    hooks = [hooks for name, hooks in places if name.startswith("_global_") and _is_dict(hooks)]
    held = [dict(each) for each in hooks]
    for each in hooks:
        each.clear()
    try:
        with warnings.catch_warnings(), torch.inference_mode(False):
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, before in zip(hooks, held, strict=True):
            each.update(before)
        torch.set_num_threads(threads)
        torch.set_rng_state(host)
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        for device, state in states:
            getattr(torch, device.type).set_rng_state(state, device)


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and plain tensors that are attributes of one module."""
    own = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
    yield from (tensor for tensor in own if isinstance(tensor, Tensor))


def _is_dict(obj: object) -> bool:
    return isinstance(obj, dict)
