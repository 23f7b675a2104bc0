"""Copies of the model that callbacks keep: each is whole on one device, whatever the plan says."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lightning_hetero.graph.find import tensor_bytes
from lightning_hetero.plan import Plan
from lightning_hetero.strategy._compat import averaged_copy
from lightning_hetero.units import format_bytes

log = logging.getLogger(__name__)


def warn_of_copies(callbacks: Iterable[Any], plan: Plan) -> None:
    """Say which copy is too large for what the plan leaves of its device, and what to do about it.

    Lightning makes it before there is a plan, on the root device unless told otherwise.
    """
    root = torch.device(str(plan.root.torch_device))
    for callback in callbacks:
        found = averaged_copy(callback, root)
        if found is None:
            continue
        copy, place = found[0], torch.device(found[1])
        for device in plan.devices:
            if torch.device(str(device.torch_device)) not in (place, torch.device(place.type, place.index or 0)):
                continue
            left = device.memory_bytes - plan.need_of(device.name).total_bytes
            if _bytes_of(copy) > left:
                log.warning(
                    "%s keeps a copy of the whole model, %s, on %s, where the plan leaves %s of %s. %s",
                    type(callback).__name__,
                    format_bytes(_bytes_of(copy)),
                    device.name,
                    format_bytes(max(0, left)),
                    format_bytes(device.memory_bytes),
                    "Give it a device with more memory, such as device='cpu'."
                    if place.type != "cpu"
                    else "Leave the callback out, or give the device more memory.",
                )
            break


def _bytes_of(model: nn.Module) -> int:
    return sum(map(tensor_bytes, (*model.parameters(), *model.buffers())))
