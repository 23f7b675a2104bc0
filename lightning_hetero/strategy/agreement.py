"""What the processes of a run have to agree on before they begin."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from lightning_hetero.errors import UsageError
from lightning_hetero.runtime.processes.exchange import Exchange


def check_devices(exchange: Exchange, devices: Iterable[torch.device]) -> None:
    """Refuse two processes on one device: each would count on all of its memory.

    Raises:
        UsageError: On every process, if there are such.
    """
    own = sorted(str(device) for device in devices if device.type != "cpu")
    everyone: list[tuple[str, list[str]]] = exchange.gather((socket.gethostname(), own))
    seen: dict[tuple[str, str], int] = {}
    for rank, (host, names) in enumerate(everyone):
        for name in names:
            other = seen.setdefault((host, name), rank)
            if other != rank:
                raise UsageError(
                    f"processes {other} and {rank} would both use {name} of {host}. Give each process devices of its "
                    "own, for example by HETERO_DEVICES, or start fewer processes on that machine."
                )


def check_agreement(exchange: Exchange, facts: Mapping[str, object]) -> None:
    """Refuse processes that would not do the same.

    Args:
        exchange: Of all processes.
        facts: What has to be equal, by a name for messages.

    Raises:
        UsageError: On every process, if they differ in something.
    """
    everyone: list[dict[str, object]] = exchange.gather(dict(facts))
    for name in facts:
        said = [other.get(name) for other in everyone]
        if any(value != said[0] for value in said):
            listing = "; ".join(f"process {rank}: {value}" for rank, value in enumerate(said))
            raise UsageError(
                f"the processes of the run differ in their {name}, so they cannot train one model ({listing}). Start "
                "all of them with the same program, arguments and packages."
            )


def model_facts(model: nn.Module) -> dict[str, object]:
    """What has to be equal in the models of all processes."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {
        "model": [len(named), sum(tensor.numel() for _, tensor in named)],
        "parameters and buffers": hash_of(f"{name} {tuple(t.shape)} {t.dtype}" for name, t in named),
    }


def hash_of(lines: Iterable[str]) -> str:
    """A short fingerprint."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
