"""Models to record, and what must be as before when somebody looked at them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_hetero.devices import Inventory, resolve_devices
from lightning_hetero.graph.find import find_units
from lightning_hetero.profile.recording import Recording


@pytest.fixture(scope="session")
def cpus() -> Inventory:
    """Two emulated devices of speeds 2 and 1."""
    return resolve_devices("cpu@speed=2,cpu@speed=1")


Record = Callable[..., Recording]


@pytest.fixture
def record() -> Record:
    """Records a call: `record(model, *args, rows=None)`."""

    def call(model: nn.Module, *args: Any, rows: int | None = None, no_split: str = "", **kwargs: Any) -> Recording:
        graph = find_units(model, (no_split,) if no_split else ())
        with Recording(model, graph, rows=rows) as recording:
            model(*args, **kwargs)
        return recording

    return call


Look = Callable[[nn.Module], dict[str, Any]]


@pytest.fixture
def look() -> Look:
    """Says of a model all that must be as before: `look(model)`, with the random numbers of the process."""
    return lambda model: {**all_of(model), "random": random_states()}


def random_states() -> list[Any]:
    """The states of all random numbers, as values that compare."""
    numpy_state = np.random.get_state()
    return [torch.get_rng_state().tolist(), random.getstate(), numpy_state[1].tolist(), *numpy_state[2:]]


def all_of(model: nn.Module) -> dict[str, Any]:
    """All that a look at a model must leave alone: tensors with identity and value, gradients, modes and hooks."""
    tensors = {name: (id(t), t.detach().clone()) for name, t in (*model.named_parameters(), *model.named_buffers())}
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    more = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
    return {
        "identity": {name: key for name, (key, _) in tensors.items()},
        "values": {name: value.tolist() for name, (_, value) in tensors.items()},
        "gradients": {n: None if p.grad is None else p.grad.tolist() for n, p in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: [list(vars(m)[h]) for h in hooks + more] for name, m in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
    }
