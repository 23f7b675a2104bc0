"""Turns host tensors into device tensors and back, without a copy and without a compiler.

A DLPack capsule says where a tensor's memory lies. Written into its device field, `kDLExtDev` makes torch
import host memory as an ordinary tensor of its extra device type, and `kDLCPU` makes the way back.
"""

from __future__ import annotations

import ctypes
import weakref

import torch
from torch import Tensor

from lightning_hetero.testing.python_device import PythonDevices

_CPU, _EXTRA_DEVICE = 1, 12  # DLDeviceType


class _Managed(ctypes.Structure):
    """The beginning of DLManagedTensor."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
    ]


_address_of = ctypes.pythonapi.PyCapsule_GetPointer
_address_of.restype, _address_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


def _retag(tensor: Tensor, device_type: int, index: int) -> Tensor:
    # torch starts an autograd thread for one device only, so backward passes must stay on the thread that asks
    # for them. That is a setting of each thread, and no thread gets at a device tensor without coming by here.
    torch._C._set_multithreading_enabled(False)
    capsule = torch._C._to_dlpack(tensor.detach() if tensor.requires_grad else tensor)
    managed = ctypes.cast(_address_of(capsule, b"dltensor"), ctypes.POINTER(_Managed)).contents
    managed.device_type, managed.device_index = device_type, index
    retagged: Tensor = torch._C._from_dlpack(capsule)
    return retagged


def to_host(tensor: Tensor) -> Tensor:
    """A host tensor on the memory of a device tensor."""
    if tensor.untyped_storage().nbytes() == 0:  # no memory to share: an out= tensor that will grow
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    if tensor.is_conj():  # DLPack knows of memory only, not of lazy conjugation
        return to_host(tensor.conj()).conj()
    if tensor.is_neg():
        return to_host(tensor._neg_view())._neg_view()
    return _retag(tensor, _CPU, 0)


class _Charge:
    """Lives as long as the memory that it stands for."""


def to_device(devices: PythonDevices, index: int, tensor: Tensor) -> Tensor:
    """A device tensor on the memory of a fresh host tensor, charged to the device until it is freed.

    Raises:
        torch.OutOfMemoryError: The device has not enough memory.
        TypeError: The device does not support the dtype.
    """
    devices.check_dtype(index, tensor.dtype)
    size_bytes = tensor.untyped_storage().nbytes()
    devices.charge(index, size_bytes)
    charge = _Charge()
    weakref.finalize(charge, devices.discharge, index, size_bytes).atexit = False
    tensor._emulated_charge = charge  # type: ignore[attr-defined]  # the capsule keeps the tensor, and so this
    return _retag(tensor, _EXTRA_DEVICE, index)
