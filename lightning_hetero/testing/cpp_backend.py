"""Installs the C++ backend of the emulated accelerator."""

from __future__ import annotations

import atexit
from typing import cast

from lightning_hetero.testing import cpp_build, recurrent
from lightning_hetero.testing.backend import NAME, Backend
from lightning_hetero.testing.device_module import DeviceModule, check_device_type_is_free, register


def install(count: int) -> Backend:
    """Register `count` devices with torch, building the backend if this machine has not done so yet.

    Args:
        count: Number of devices, 1 to 64.

    Raises:
        UsageError: Another device type is registered.
        BuildError: The backend cannot be built here.
    """
    check_device_type_is_free(NAME)
    extension = cpp_build.load()
    register(NAME, DeviceModule(NAME, cast(Backend, extension)))
    extension.initialize(count)
    atexit.register(extension.let_go_of_graphs)
    recurrent.register()
    return cast(Backend, extension)
