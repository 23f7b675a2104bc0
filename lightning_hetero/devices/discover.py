"""Discovery: everything on this machine that torch can train on."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path

from lightning_hetero.devices.accelerators import accelerators, reaches_peer, torch_device_modules
from lightning_hetero.devices.host import cpu_device, numa_nodes
from lightning_hetero.devices.links import links_between
from lightning_hetero.devices.spec import DeviceSpec, Inventory


def discover(*, modules: Mapping[str, object] | None = None, root: Path = Path("/")) -> Inventory:
    """The trainable devices of this machine: accelerators, best first, then the CPU.

    The memory of a device is its total, minus what other processes use, minus a reserve (512 MiB of an
    accelerator, 1 GiB of the host, at most a twentieth of the total). The host's total is its physical
    memory or the limit of this process's control group, whichever is less. CPU and GPU of a machine
    with unified memory are listed with the same memory twice.

    Backends that fail are left out with a warning in the log. Asking CUDA for free memory makes one
    context on each visible GPU; nothing is allocated. Links are listed for all pairs, not measured.

    Args:
        modules: Device modules by kind, `{"cuda": torch.cuda}`; None asks torch for all it has, and an
            empty mapping asks no accelerator at all.
        root: Where `/proc` and `/sys` are looked up.

    Returns:
        At least the CPU.
    """
    found = torch_device_modules() if modules is None else modules
    devices = (*accelerators(found), cpu_device(root))

    def peer_access(source: DeviceSpec, target: DeviceSpec) -> bool:
        return source.kind == target.kind and reaches_peer(found[source.kind], source, target)

    return Inventory(
        devices=devices,
        links=links_between(devices, peer_access=peer_access),
        host=platform.node(),
        numa_nodes=numa_nodes(root),
    )
