"""The links between all pairs of devices, as far as they are known without measuring."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import permutations

from lightning_hetero.devices.spec import DeviceSpec, Link


def _no_peer_access(source: DeviceSpec, target: DeviceSpec) -> bool:
    return False


def links_between(
    devices: Sequence[DeviceSpec],
    *,
    known: Iterable[Link] = (),
    peer_access: Callable[[DeviceSpec, DeviceSpec], bool] = _no_peer_access,
) -> tuple[Link, ...]:
    """One link for each ordered pair of trainable devices.

    A copy that starts or ends in host memory is always direct.

    Args:
        devices: In any order.
        known: Links to keep as they are, for example measured ones.
        peer_access: Tells whether one accelerator reaches the memory of another.
    """
    by_pair = {(link.source, link.target): link for link in known}

    def link(source: DeviceSpec, target: DeviceSpec) -> Link:
        if (source.name, target.name) in by_pair:
            return by_pair[source.name, target.name]
        direct = "cpu" in (source.torch_device, target.torch_device) or peer_access(source, target)
        return Link(source=source.name, target=target.name, peer_access=direct)

    return tuple(link(*pair) for pair in permutations([d for d in devices if d.trainable], 2))
