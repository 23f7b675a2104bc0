"""The floating-point dtypes that each kind of device computes with."""

from __future__ import annotations

from typing import Any

_FLOATS = ("float64", "float32", "float16", "bfloat16")

# From the vendors' documentation of their torch backends. What is not listed here is asked, or unknown.
_BY_KIND = {
    "cpu": _FLOATS,
    "mps": ("float32", "float16", "bfloat16"),
    "hpu": ("float32", "bfloat16"),
    "npu": ("float32", "float16", "bfloat16"),
    "mtia": ("float32", "float16", "bfloat16"),
}


def float_dtypes(kind: str, module: Any = None, index: int = 0) -> tuple[str, ...]:
    """Names of the floating-point dtypes that a device computes with, in hardware.

    Args:
        kind: Sort of processor, "cuda".
        module: Torch's device module of that kind, asked where products of one kind differ.
        index: Which of its devices.

    Returns:
        Such as `("float64", "float32")`; empty if unknown.
    """
    if kind in _BY_KIND:
        return _BY_KIND[kind]
    try:
        if kind == "cuda":
            return _cuda(module, index)
        if kind == "xpu":
            has_float64 = bool(module.get_device_properties(index).has_fp64)
            return _FLOATS if has_float64 else _FLOATS[1:]
        return _from_accelerator_api(kind, module, index)
    except Exception:  # a backend that does not say
        return ()


def _cuda(module: Any, index: int) -> tuple[str, ...]:
    import torch

    if torch.version.hip:
        return _FLOATS
    capability = tuple(module.get_device_capability(index))
    since = {"float64": (1, 3), "float32": (1, 0), "float16": (5, 3), "bfloat16": (8, 0)}
    return tuple(name for name in _FLOATS if capability >= since[name])


def _from_accelerator_api(kind: str, module: Any, index: int) -> tuple[str, ...]:
    import torch

    if getattr(torch, kind, None) is not module:
        return ()
    capability = torch.accelerator.get_device_capability(torch.device(kind, index))  # not in older torch
    names = {str(dtype).removeprefix("torch.") for dtype in capability["supported_dtypes"]}
    return tuple(name for name in _FLOATS if name in names)
