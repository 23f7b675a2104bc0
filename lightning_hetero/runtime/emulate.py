"""Makes the CPU play devices of unequal speed: what runs on a slow one is followed by a sleep in proportion.

Speeds are relative, so the fastest emulated device runs at the CPU's own pace. Forward and backward are both
stretched: a call ends when it would have ended on a device that takes so many times what the CPU usually takes. The
backward of a block is taken to begin when the gradient of one of its outputs is known, and to last until that of
another block begins or the whole backward ends.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hetero.devices.host_memory import keep_host_memory
from lightning_hetero.devices.spec import DeviceSpec
from lightning_hetero.runtime.hooks import Hook
from lightning_hetero.runtime.transfer import map_tensors

_REMEMBERED = 48  # times of each kind of work
_ENOUGH = 4  # of them tell what is usual
_MOST_KINDS = 4096
_MOST_LATE_S = 2e-3
_SORTS: weakref.WeakKeyDictionary[nn.Module, Hashable] = weakref.WeakKeyDictionary()


class Usual:
    """What each kind of work usually takes this CPU: the lower quartile of the last times.

    Real devices are steady. A CPU is not: its caches are cold after a sleep, and its cores and its memory are shared
    with others. An emulated device that multiplied each single time would multiply its luck.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds: OrderedDict[Hashable, deque[float]] = OrderedDict()

    def __reduce__(self) -> Any:
        return Usual, ()  # a copy of a placed module learns it anew

    def __call__(self, kind: Hashable, seconds: float) -> float:
        """Take note of what it took this time, and say what it usually takes; at first, that is what it took."""
        with self._lock:
            known = self._seconds.get(kind)
            if known is None:
                known = self._seconds[kind] = deque(maxlen=_REMEMBERED)
                if len(self._seconds) > _MOST_KINDS:
                    self._seconds.popitem(last=False)
            known.append(seconds)
            return seconds if len(known) < _ENOUGH else sorted(known)[len(known) // 4]


@dataclass(frozen=True, slots=True)
class Pace:
    """How an emulated device works.

    Attributes:
        stretch: Seconds of sleep for each second of work.
        threads: Intra-op threads; None leaves torch's setting alone.
        usual: What work usually takes.
    """

    stretch: float = 0.0
    threads: int | None = None
    usual: Usual = field(default_factory=Usual, compare=False, repr=False)


HOST = Pace()


def paces(devices: Iterable[DeviceSpec]) -> dict[str, Pace]:
    """The pace of each emulated device, by name, relative to the fastest of them; memory is kept if there is one."""
    emulated = [device for device in devices if device.emulated]
    if emulated:
        keep_host_memory()
    fastest = max((device.speed for device in emulated), default=1.0)
    return {device.name: Pace(fastest / device.speed - 1.0, device.threads) for device in emulated}


@dataclass(slots=True)
class _Work:
    """What a thread does for a device in one go.

    Attributes:
        pace: That of the device.
        kind: What is usual depends on it; None makes nothing usual.
        cpu_s: How long it has computed.
        wall_s: How long that took, with what others got of the processor.
    """

    pace: Pace = HOST
    kind: Hashable = None
    cpu_s: float = 0.0
    wall_s: float = 0.0


class Meter(threading.local):
    """Measures how long a thread works at each pace, and sleeps what a slower device would need on top.

    Attributes:
        debt_s: What it has to sleep when it is told to `pay`; None if it sleeps at once.
    """

    def __init__(self) -> None:
        self._work = _Work()
        self._outer: list[_Work] = []
        self._cpu_s = self._wall_s = 0.0
        self._host_threads = 0
        self.debt_s: float | None = None
        self._late_s = 0.0

    def defer(self) -> None:
        """This thread sleeps when it is told to `pay`, not after every module: each sleep lasts a little too long."""
        self.debt_s = 0.0

    def pay(self) -> None:
        """Sleep what has come together since the last time."""
        if debt_s := self.debt_s:
            self.debt_s = 0.0
            self._sleep(debt_s)
            self._start_clock()

    def enter(self, pace: Pace, kind: Hashable = None) -> None:
        """Work for a device begins, in the middle of other work."""
        self._stop_clock()
        self._outer.append(self._work)
        self._go_on_with(_Work(pace, kind))

    def leave(self) -> None:
        """Work for a device ends; what it interrupted goes on."""
        self._end()
        self._go_on_with(self._outer.pop() if self._outer else _Work())

    def begin_backward(self, pace: Pace, kind: Hashable = None) -> None:
        """The running backward reaches a block."""
        self._end()
        self._go_on_with(_Work(pace, kind))
        torch.autograd.Variable._execution_engine.queue_callback(self.rest)

    @property
    def kind(self) -> Hashable:
        """What kind of work this thread does."""
        return self._work.kind

    def rest(self) -> None:
        """No device works any more."""
        self._end()
        self._outer.clear()
        self._go_on_with(_Work())

    def _stop_clock(self) -> None:
        self._work.cpu_s += time.thread_time() - self._cpu_s
        self._work.wall_s += time.perf_counter() - self._wall_s

    def _start_clock(self) -> None:
        self._cpu_s, self._wall_s = time.thread_time(), time.perf_counter()

    def _go_on_with(self, work: _Work) -> None:
        if work.pace.threads != self._work.pace.threads:
            if self._work.pace.threads is None:
                self._host_threads = torch.get_num_threads()
            torch.set_num_threads(work.pace.threads or self._host_threads)
        self._work = work
        self._start_clock()

    def _end(self) -> None:
        """The work is done on the CPU; on the device, it takes as many times longer as that is slower."""
        self._stop_clock()
        work = self._work
        if not work.pace.stretch or work.cpu_s <= 0:
            return
        usual_s = work.cpu_s if work.kind is None else work.pace.usual(work.kind, work.cpu_s)
        # What the CPU took longer than usual, or had to wait for a core, is not waited for once more.
        owed_s = usual_s * (1.0 + work.pace.stretch) - max(work.cpu_s, work.wall_s)
        if self.debt_s is not None:
            self.debt_s += owed_s
        else:
            self._sleep(owed_s)

    def _sleep(self, seconds: float) -> None:
        """Sleep; what it gets too long makes the next one shorter."""
        seconds -= self._late_s
        self._late_s = 0.0
        if seconds <= 0:
            self._late_s = min(-seconds, _MOST_LATE_S)
            return
        begun_s = time.perf_counter()
        time.sleep(seconds)
        self._late_s = min(max(time.perf_counter() - begun_s - seconds, 0.0), _MOST_LATE_S)


METER = Meter()


@dataclass(frozen=True)
class EnterEmulated(Hook):
    """Forward pre-hook of a block on an emulated device."""

    pace: Pace

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Start the device's clock."""
        is_traced = torch._C._get_tracing_state() is not None  # which writes down every look at a shape
        METER.enter(self.pace, kind_of(module, args) if self.pace.stretch and not is_traced else None)


@dataclass(frozen=True)
class LeaveEmulated(Hook):
    """Forward hook of a block on an emulated device, called after an exception too (then `output` is None)."""

    pace: Pace

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Stop the clock, and see to it that the block's backward starts it again."""
        kind = METER.kind
        METER.leave()
        if torch.is_grad_enabled():
            backward = None if kind is None else (kind, "backward")
            map_tensors(output, partial(self._watch, backward), torch.device("cpu"))

    def _watch(self, kind: Hashable, tensor: Tensor) -> Tensor:
        # A hook, not a node of our own: user code may go on to change the output in place.
        if tensor.requires_grad and not tensor.is_leaf:
            tensor.register_hook(lambda _: METER.begin_backward(self.pace, kind))
        return tensor


def kind_of(module: nn.Module, args: Any) -> Hashable:
    """Equal for calls that compute the same with other values."""
    sort = _SORTS.get(module)
    if sort is None:
        sort = _SORTS[module] = (type(module), tuple(tuple(p.shape) for p in module.parameters()))
    tensors = [arg for arg in args if isinstance(arg, Tensor) and not arg.is_nested]  # a nested one has no shape
    inputs = [(tuple(arg.shape), arg.dtype, arg.requires_grad) for arg in tensors]
    return sort, tuple(inputs), module.training, torch.is_grad_enabled()
