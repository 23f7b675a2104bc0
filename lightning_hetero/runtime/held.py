"""Whether something else than a model holds its parameters, so that they cannot move without somebody noticing.

A graph that waits for its backward knows parameters as they were: on their device, and as the objects that they were.
Where a move has to exchange the insides of two Python objects, torch refuses that for a parameter that anything else
holds. Both may pass by itself: graphs end with their backward.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from lightning_hetero.runtime.relocate import release_derived

_MOST_TRIES = 32  # one for each step: longer than gradients are summed up over in most runs


class Held:
    """Asks again and again whether parameters may move, until nobody has patience any more.

    Args:
        module: The model.
        devices: Where its parameters are, and where they are to be.
    """

    def __init__(self, module: nn.Module, devices: Iterable[torch.device]) -> None:
        self._module = module
        self._swaps = _differ_in_kind(devices)
        self._tries = 0

    @property
    def is_in_vain(self) -> bool:
        """Whether it was asked often enough."""
        return self._tries >= _MOST_TRIES

    def reason(self) -> str:
        """Why parameters must not move now, in words; "" if they may. Counts as a try."""
        self._tries += 1
        reason = why_held(self._module, swaps=self._swaps)
        if reason and (self._tries == 1 or self.is_in_vain):
            gc.collect()  # a graph in a cycle of references lives on after its end
            reason = why_held(self._module, swaps=self._swaps)
        return reason


def why_held(module: nn.Module, *, swaps: bool) -> str:
    """Why parameters of a model must not move now, in words; "" if they may.

    Args:
        module: The model.
        swaps: Whether a move has to exchange the insides of Python objects.
    """
    for part in module.modules():
        release_derived(part)
    with _without_references_of_rnns(module):
        for part, name, parameter in _parameters(module):
            if _has_graph(parameter):
                return (
                    f"code of yours holds a graph with {name} in it from one step to the next. Detach what it keeps, "
                    "such as losses and outputs"
                )
            if not swaps or isinstance(part, torch.jit.ScriptModule):  # its inside is held in C++, and never swapped
                continue
            if _uses(parameter) > 1 or weakref.getweakrefs(parameter):
                return f"something beside the model holds {name}, such as a weak reference to it"
    return ""


def _parameters(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Each once, with the module that it belongs to and its whole name."""
    seen: set[int] = set()
    for prefix, part in module.named_modules():
        for name, parameter in part._parameters.items():
            if parameter is None or isinstance(parameter, nn.parameter.UninitializedParameter) or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            yield part, f"{prefix}.{name}".lstrip("."), parameter


def _has_graph(parameter: Tensor) -> bool:
    """Whether some graph leads to it. A graph has a node for the leaf, which is made anew where there is none."""
    if not (parameter.is_leaf and parameter.requires_grad):
        return False
    before = _uses(parameter)
    node = get_gradient_edge(parameter).node  # holds the parameter
    there_already = _uses(parameter) == before
    del node
    return there_already


def _uses(parameter: Any) -> int:
    """How often C++ holds it; the Python object counts as one."""
    return int(parameter._use_count())


def _differ_in_kind(devices: Iterable[torch.device]) -> bool:
    samples = [torch.empty(0, device=device) for device in set(devices)]
    return not all(torch._has_compatible_shallow_copy_type(a, b) for a, b in itertools.permutations(samples, 2))


@contextmanager
def _without_references_of_rnns(module: nn.Module) -> Iterator[None]:
    """Within the block, RNNs have no weak references to their weights. They get new ones whenever they are moved."""
    layers = [part for part in module.modules() if isinstance(part, nn.RNNBase)]
    for layer in layers:
        layer._flat_weight_refs = []
    try:
        yield
    finally:
        for layer in layers:
            layer._flat_weight_refs = [None if w is None else weakref.ref(w) for w in layer._flat_weights]
