"""The states of all random number generators that a run draws from, as data that any checkpoint can hold."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from lightning_hetero.runtime.engine.streams import Generators

_MERSENNE_TWISTER = "MT19937"


def random_state(devices: Iterable[torch.device]) -> dict[str, Any]:
    """The states of Python, NumPy, and torch's default generators. Nothing is drawn.

    Args:
        devices: Those whose generators count; the CPU's does in any case.

    Returns:
        Tensors on the CPU, numbers and strings only, so that `torch.load(weights_only=True)` reads them.
    """
    version, numbers, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": {"version": version, "words": torch.tensor(numbers), "gauss": gauss},
        "torch": {str(device): states for device, states in _generators(devices).states().items()},
    }
    numpy: Any = np.random.get_state(legacy=False)
    if numpy["bit_generator"] == _MERSENNE_TWISTER:  # another one was put there by user code, which has to save it
        words = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
        state["numpy"] = {**numpy, "state": {"words": words, "position": numpy["state"]["pos"]}}
    return state


def restore_random_state(state: dict[str, Any], devices: Iterable[torch.device]) -> None:
    """Put states back, as far as they are of generators that are here.

    Args:
        state: From `random_state`, on this or another machine.
        devices: Those that the run uses.
    """
    python, numpy = state["python"], state.get("numpy")
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    if numpy is not None:
        words = numpy["state"]["words"].numpy().astype(np.uint32)
        np.random.set_state({**numpy, "state": {"key": words, "pos": numpy["state"]["position"]}})
    generators = _generators(devices)
    saved = {device: state["torch"].get(str(device)) for device in generators.of}
    generators.restore({device: numbers for device, numbers in saved.items() if numbers is not None})


def _generators(devices: Iterable[torch.device]) -> Generators:
    return Generators([torch.device("cpu"), *(device for device in devices if device.type != "cpu")])
