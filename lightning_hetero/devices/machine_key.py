"""What the pace of a machine's devices depends on, as the key of its cached numbers."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from lightning_hetero.devices.host import cpu_label
from lightning_hetero.devices.spec import DeviceSpec


def machine_key(devices: Iterable[DeviceSpec]) -> dict[str, Any]:
    """Versions, host, CPU, torch's number of threads, and each device with its driver, as plain JSON types."""
    return {
        "torch": torch.__version__,
        "host": platform.node(),
        "cpu": cpu_label(),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "devices": [[device.torch_device, device.label, _driver(device)] for device in devices],
    }


def _driver(device: DeviceSpec) -> str:
    if device.kind == "cuda":
        try:
            first_line = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").partition("\n")[0]
        except OSError:
            first_line = ""
        return f"{first_line} CUDA {torch.version.cuda} ROCm {torch.version.hip}"
    try:
        properties = torch.get_device_module(device.kind).get_device_properties(device.torch_device)
    except Exception:  # the CPU has none, and each backend fails in its own way
        return ""
    return str(getattr(properties, "driver_version", ""))
