"""The accelerators that torch can reach, one device module (`torch.cuda`, `torch.xpu`, ...) after another."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from lightning_hetero.devices.dtypes import float_dtypes
from lightning_hetero.devices.memory import accelerator_memory
from lightning_hetero.devices.spec import DeviceSpec

log = logging.getLogger(__name__)

_OTHER = "a PrivateUse1 backend"
# Cards before the graphics units that share silicon or memory with a CPU.
_PREFERENCE = ("cuda", "hpu", "npu", "mtia", _OTHER, "xpu", "mps")
_PROCESSOR_COUNTS = ("multi_processor_count", "max_compute_units", "gpu_eu_count")


def torch_device_modules() -> dict[str, Any]:
    """Torch's device modules by kind, in order of preference; kinds that torch does not offer are left out.

    `torch.accelerator` is no help: it speaks of one kind per process.
    """
    import torch

    # torch_npu and others rename the PrivateUse1 backend, so its name may be one that we know.
    private = torch._C._get_privateuse1_backend_name()
    kinds = dict.fromkeys(private if kind is _OTHER else kind for kind in _PREFERENCE)
    modules = {kind: getattr(torch, kind, None) for kind in kinds}
    return {kind: module for kind, module in modules.items() if module is not None}


def accelerators(modules: Mapping[str, Any]) -> tuple[DeviceSpec, ...]:
    """Every working device of these modules, best first.

    Best is, until somebody measures: the order of kinds above, then more multiprocessors, then more
    memory, then torch's own order. A backend or device that fails to answer is left out with a warning.
    """
    kinds = sorted(modules, key=lambda kind: _PREFERENCE.index(kind if kind in _PREFERENCE else _OTHER))
    return tuple(device for kind in kinds for device in _devices_of(kind, modules[kind]))


def reaches_peer(module: Any, source: DeviceSpec, target: DeviceSpec) -> bool:
    """Whether two devices of one module copy to each other directly."""
    try:
        return bool(module.can_device_access_peer(_index(source), _index(target)))
    except Exception:  # most backends do not have the question
        return False


def _devices_of(kind: str, module: Any) -> list[DeviceSpec]:
    try:
        count = int(module.device_count()) if module.is_available() else 0
    except Exception as error:  # a broken driver must not stop a run on the other devices
        log.warning("device backend %r is broken and left out: %s: %s", kind, type(error).__name__, error)
        return []
    ranked = sorted(_working(kind, module, count), key=lambda entry: entry[0])
    return [device for _, device in ranked]


def _working(kind: str, module: Any, count: int) -> Iterator[tuple[tuple[int, int, int], DeviceSpec]]:
    """The devices that answer, each with its sort key."""
    for index in range(count):
        try:
            device, processors = _describe(kind, module, index)
        except Exception as error:  # one sick card among healthy ones
            log.warning("device '%s:%d' is broken and left out: %s: %s", kind, index, type(error).__name__, error)
            continue
        yield (-processors, -(device.total_memory_bytes or 0), index), device


def _describe(kind: str, module: Any, index: int) -> tuple[DeviceSpec, int]:
    ask = getattr(module, "get_device_properties", None)
    properties = ask(index) if ask else None
    memory = accelerator_memory(module, kind, index)
    name = f"{kind}:{index}"
    device = DeviceSpec(
        name=name,
        kind=kind,
        memory_bytes=memory.usable_bytes,
        torch_device=name,
        total_memory_bytes=memory.total_bytes,
        label=_label(kind, str(getattr(properties, "name", ""))),
        dtypes=float_dtypes(kind, module, index),
    )
    counts = (getattr(properties, field, None) for field in _PROCESSOR_COUNTS)
    return device, next((count for count in counts if isinstance(count, int)), 0)


def _label(kind: str, product: str) -> str:
    if kind == "cuda":
        import torch

        if torch.version.hip:
            return f"{product} (ROCm {torch.version.hip})".strip()
    return product or ("Apple GPU" if kind == "mps" else "")


def _index(device: DeviceSpec) -> int:
    return int(device.name.rpartition(":")[2])
