"""Emulated devices: the CPU plays a device of another speed and memory, asked for as "cpu@speed=1,mem=2GiB"."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from lightning_hetero.devices.spec import DeviceSpec
from lightning_hetero.errors import InventoryError
from lightning_hetero.units import parse_bytes

KIND = "emulated"
TORCH_KINDS = ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "npu", "xla")
_PREFIX = "cpu@"
EMULATION_HELP = "write for example 'cpu@speed=1,mem=2GiB,threads=1'"
_NAME = re.compile(r"[A-Za-z_][\w.:-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Emulation:
    """What the user asked of an emulated device.

    Attributes:
        speed: Relative to the other emulated devices; the fastest runs at the CPU's own pace.
        memory_bytes: None gives it all that the CPU may use. Two such devices count the same memory twice.
        threads: Intra-op threads; None leaves torch's setting alone.
        name: None numbers it: "emulated:0", "emulated:1", ...
    """

    speed: float = 1.0
    memory_bytes: int | None = None
    threads: int | None = None
    name: str | None = None

    def device(self, name: str, cpu: DeviceSpec) -> DeviceSpec:
        """The emulated device `name`, played by `cpu`.

        Raises:
            InventoryError: Speed, memory or threads are not above 0.
        """
        return DeviceSpec(
            name=name,
            kind=KIND,
            memory_bytes=cpu.memory_bytes if self.memory_bytes is None else self.memory_bytes,
            torch_device="cpu",
            total_memory_bytes=cpu.total_memory_bytes if self.memory_bytes is None else self.memory_bytes,
            label=f"emulated on {cpu.label}" if cpu.label else "emulated",
            speed=self.speed,
            threads=self.threads,
            dtypes=cpu.dtypes,
            emulated=True,
        )


def parse_emulation(text: str) -> Emulation:
    """Read "cpu@speed=1,mem=2GiB,threads=1,name=small"; every key may be left out, but not all of them.

    Raises:
        InventoryError: The text is not of that form.

    Example:
        >>> parse_emulation("cpu@speed=2,mem=1KiB")
        Emulation(speed=2.0, memory_bytes=1024, threads=None, name=None)
    """
    player, _, rest = text.partition("@")
    if player.strip() != "cpu":
        raise InventoryError(f"{text!r}: only the CPU can play another device; {EMULATION_HELP}")
    options: dict[str, Any] = {}
    for part in rest.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key or not value:
            raise InventoryError(f"{text!r}: {part.strip()!r} is not of the form key=value; {EMULATION_HELP}")
        field, read = _option(key, text)
        if field in options:
            raise InventoryError(f"{text!r}: {key!r} is given twice; leave one of them out")
        try:
            options[field] = read(value)
        except ValueError as error:
            raise InventoryError(f"{text!r}: {key}={value}: {error}; {EMULATION_HELP}") from error
    return Emulation(**options)


def format_emulation(device: DeviceSpec) -> str:
    """The text that asks for `device`, an emulated one, with every key.

    Example:
        >>> cpu = DeviceSpec(name="cpu", kind="cpu", memory_bytes=4096, torch_device="cpu")
        >>> format_emulation(parse_emulation("cpu@speed=2").device("emulated:0", cpu))
        'cpu@speed=2.0,mem=4096,name=emulated:0'
    """
    threads = "" if device.threads is None else f",threads={device.threads}"
    return f"{_PREFIX}speed={device.speed!r},mem={device.memory_bytes}{threads},name={device.name}"


def _option(key: str, text: str) -> tuple[str, Callable[[str], Any]]:
    options: dict[str, tuple[str, Callable[[str], Any]]] = {
        "speed": ("speed", _speed),
        "mem": ("memory_bytes", _memory),
        "memory": ("memory_bytes", _memory),
        "threads": ("threads", _threads),
        "name": ("name", _name),
    }
    if key in options:
        return options[key]
    near = get_close_matches(key.lower(), options, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise InventoryError(f"{text!r}: unknown key {key!r}; known are {', '.join(options)}.{hint}")


def _speed(value: str) -> float:
    try:
        speed = float(value)
    except ValueError:
        speed = 0.0
    if not 0 < speed < float("inf"):
        raise ValueError("a speed is a finite number > 0")
    return speed


def _memory(value: str) -> int:
    size_bytes = parse_bytes(value)
    if size_bytes == 0:
        raise ValueError("a memory is more than 0")
    return size_bytes


def _threads(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise ValueError("threads are a whole number >= 1")
    return int(value)


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("a name starts with a letter and goes on with letters, digits and any of '_.:-'")
    if value.partition(":")[0] in TORCH_KINDS:
        raise ValueError("a name must not be that of a real device")
    return value
