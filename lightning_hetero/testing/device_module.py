"""The module `torch.dev`: what torch, Lightning and user code expect of `torch.cuda` and its like."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType, TracebackType

import torch
from torch.utils import backend_registration

from lightning_hetero.errors import UsageError
from lightning_hetero.testing.backend import Backend

Device = torch.device | str | int | None


@dataclass(frozen=True)
class DeviceProperties:
    """What `get_device_properties` returns.

    Attributes:
        name: Product name.
        total_memory: In bytes.
    """

    name: str
    total_memory: int


class DeviceModule(ModuleType):
    """`torch.dev`. A device may be an index, a `torch.device`, a string, or None for the current one."""

    def __init__(self, name: str, backend: Backend) -> None:
        super().__init__(f"torch.{name}", self.__doc__)
        self._name = name
        self._backend = backend
        self.device = _context_manager_of(self)
        self._initialized = True  # asked by torch.utils.checkpoint, which else would not keep random states

    # ------------------------------------------------------------------------------------- devices

    def is_available(self) -> bool:
        """Whether a device can be used: always, once installed."""
        return True

    def is_initialized(self) -> bool:
        """Whether the devices are ready: always, once installed."""
        return True

    def init(self) -> None:
        """Do nothing: the devices are ready."""

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        """How many devices there are."""
        return self._backend.device_count()

    def current_device(self) -> int:
        """The index of this thread's current device."""
        return self._backend.current_device()

    def set_device(self, device: Device) -> None:
        """Make `device` this thread's current one."""
        self._backend.set_device(self._index(device))

    def synchronize(self, device: Device = None) -> None:
        """Return at once: every kernel ends before its call returns."""
        self._index(device)

    def get_device_name(self, device: Device = None) -> str:
        """The product name of a device."""
        return f"Emulated device {self._index(device)}"

    def get_device_properties(self, device: Device = None) -> DeviceProperties:
        """Name and memory of a device."""
        total_bytes = self._backend.total_bytes(self._index(device))
        return DeviceProperties(name=self.get_device_name(device), total_memory=total_bytes)

    # -------------------------------------------------------------------------------------- memory

    def memory_allocated(self, device: Device = None) -> int:
        """Bytes in use."""
        return int(self._backend.stats(self._index(device))["used_bytes"])

    def max_memory_allocated(self, device: Device = None) -> int:
        """Most bytes in use at once since the last reset of the peak."""
        return int(self._backend.stats(self._index(device))["peak_bytes"])

    def memory_reserved(self, device: Device = None) -> int:
        """Bytes in use: nothing is cached."""
        return self.memory_allocated(device)

    def max_memory_reserved(self, device: Device = None) -> int:
        """Most bytes in use at once: nothing is cached."""
        return self.max_memory_allocated(device)

    def reset_peak_memory_stats(self, device: Device = None) -> None:
        """Let the peak start from what is in use."""
        self._backend.reset_peak(self._index(device))

    def mem_get_info(self, device: Device = None) -> tuple[int, int]:
        """Free and total bytes."""
        total_bytes = self._backend.total_bytes(self._index(device))
        return max(0, total_bytes - self.memory_allocated(device)), total_bytes

    def empty_cache(self) -> None:
        """Do nothing: nothing is cached."""

    # ------------------------------------------------------------------------------ random numbers

    def manual_seed(self, seed: int) -> None:
        """Seed the current device."""
        self._backend.generator(self.current_device()).manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        """Seed all devices; `torch.manual_seed` calls this."""
        for index in range(self.device_count()):
            self._backend.generator(index).manual_seed(seed)

    def initial_seed(self) -> int:
        """The seed of the current device."""
        return self._backend.generator(self.current_device()).initial_seed()

    def get_rng_state(self, device: Device = None) -> torch.Tensor:
        """The state of a device's generator, a uint8 tensor on the CPU."""
        return self._backend.generator(self._index(device)).get_state()

    def set_rng_state(self, new_state: torch.Tensor, device: Device = None) -> None:
        """Put back what `get_rng_state` returned."""
        self._backend.generator(self._index(device)).set_state(new_state)

    def get_rng_state_all(self) -> list[torch.Tensor]:
        """The states of all devices, in order."""
        return [self.get_rng_state(index) for index in range(self.device_count())]

    def set_rng_state_all(self, new_states: Iterable[torch.Tensor]) -> None:
        """Put back what `get_rng_state_all` returned."""
        for index, state in enumerate(new_states):
            self.set_rng_state(state, index)

    # ------------------------------------------------------------------------------------ the rest

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """The dtypes that `torch.autocast("dev")` may use."""
        return [torch.bfloat16, torch.float16]

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        """Whether tensors may be bfloat16."""
        return True

    def _index(self, device: Device) -> int:
        if isinstance(device, int):
            index: int | None = device
        elif device is None:
            index = None
        else:
            device = torch.device(device)
            if device.type != self._name:
                raise ValueError(f"expected a device of type {self._name!r}, got {str(device)!r}")
            index = device.index
        if index is None:
            return self.current_device()
        if not 0 <= index < self.device_count():
            raise RuntimeError(f"invalid device ordinal {index}: there are {self.device_count()} emulated devices")
        return index


def _context_manager_of(module: DeviceModule) -> type:
    class device:  # noqa: N801  (torch's name for it)
        """Makes a device current within a `with` block; -1 changes nothing."""

        def __init__(self, device: Device) -> None:
            self._wanted = None if device == -1 else module._index(device)

        def __enter__(self) -> None:
            self._before = module.current_device()
            if self._wanted is not None:
                module.set_device(self._wanted)

        def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
        ) -> None:
            module.set_device(self._before)

    return device


def check_device_type_is_free(name: str) -> None:
    """Make sure that torch's one place for a foreign device type is not taken.

    Raises:
        UsageError: It is taken.
    """
    taken_by = torch._C._get_privateuse1_backend_name()
    if taken_by not in ("privateuseone", name) or hasattr(torch, name):
        raise UsageError(
            f"torch knows one extra device type per process, and that of this process is {taken_by!r} already. "
            f"Install the emulated accelerator {name!r} in a process that does not import the other one."
        )


def register(name: str, module: DeviceModule) -> None:
    """Give torch's extra device type its name, its module, and `tensor.dev()`, `module.dev()` and the like."""
    backend_registration.rename_privateuse1_backend(name)
    torch._register_device_module(name, module)
    backend_registration.generate_methods_for_privateuse1_backend(for_storage=True)
