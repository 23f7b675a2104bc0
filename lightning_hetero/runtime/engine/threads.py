"""The threads of an engine: a worker for each device and the lanes, from the first call that needs them to the end."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from time import monotonic

import torch

from lightning_hetero.runtime.emulate import Pace
from lightning_hetero.runtime.engine import faults
from lightning_hetero.runtime.engine.lanes import LanePool
from lightning_hetero.runtime.engine.record import Recorder
from lightning_hetero.runtime.engine.worker import Worker
from lightning_hetero.runtime.layout import Layout

log = logging.getLogger(__name__)

_SHORT_S = 400e-6
_LOOK_AGAIN_S = 0.02  # for tasks that wait for one that does not come, see `Turns.expect`
_DRAIN_S = 60.0
_STUCK_S = 2.0  # for threads that did not end in time before


class Threads:
    """Workers and lanes of one placed model.

    Args:
        layout: The blocks of the model, which know their devices.
        paces: Threads of emulated devices, by name.
        recorder: Where workers note what they did.
        lanes: How many lanes there are.
        hang_timeout_s: Seconds after which a call that has not ended is given up.

    Attributes:
        workers: By name of the device, in the order of the layout.
    """

    def __init__(
        self, layout: Layout, paces: Mapping[str, Pace], recorder: Recorder, lanes: int, hang_timeout_s: float
    ) -> None:
        self.workers: dict[str, Worker] = {}
        for device in (device for block in layout.blocks for device in block.devices):
            if device.name not in self.workers:
                torch_device = torch.device(str(device.torch_device))
                host = torch.get_num_threads() if torch_device.type == "cpu" else 1
                threads = paces.get(device.name, Pace()).threads or host
                self.workers[device.name] = Worker(device.name, torch_device, threads, recorder)
        self._lanes = lanes
        self._hang_timeout_s = hang_timeout_s
        self._pool: LanePool | None = None
        self._is_stuck = False

    @property
    def pool(self) -> LanePool:
        """The lanes; started, with the workers, by the first call that needs them."""
        if self._pool is None:
            threads = torch.get_num_threads()
            for worker in self.workers.values():
                worker.start()
            self._pool = LanePool(self._lanes)
            end = weakref.finalize(self, _dismiss, self._pool, tuple(self.workers.values()))
            end.atexit = False
            # A thread that sets its number of threads sets that of every thread to come, ours aside.
            torch.set_num_threads(threads)
        return self._pool

    @property
    def lanes_at_once(self) -> int:
        """How many lanes of a region may be under way at once.

        One for each device, and one that waits for it: more would only wake each other. And one in all where lanes do
        the work themselves and each task is over sooner than a change of threads: they would do nothing but wait for
        Python's interpreter, which every operation of torch lets go of.
        """
        if all(worker.takes_help and 0 < worker.task_s < _SHORT_S for worker in self.workers.values()):
            return 1
        return len(self.workers) + 1

    def much_busier(self, ratio: float) -> Worker | None:
        """The device that has had more than `ratio` times as much to do as any other lately; None if there is none.

        To be asked once for each step.
        """
        first, *others = sorted(self.workers.values(), key=lambda worker: worker.busy_s, reverse=True)
        found = first if others and first.busy_s > ratio * others[0].busy_s else None
        for worker in self.workers.values():
            worker.busy_s /= 2  # so that what was long ago counts less
        return found

    def look_again(self) -> None:
        """Let tasks begin that may do so since a lane has ended or failed."""
        for worker in self.workers.values():
            worker.look_again()

    def wait(self, countdown: faults.Countdown, name: str) -> None:
        """Wait for the lanes of a call of the region `name`.

        Raises:
            HangError: They take longer than `hang_timeout_s`.
        """
        end_s = monotonic() + self._hang_timeout_s
        while not countdown.wait(max(0.0, min(_LOOK_AGAIN_S, end_s - monotonic()))):
            if monotonic() >= end_s:
                self._is_stuck = True
                raise faults.hang(name, self._hang_timeout_s, self._busy())
            self.look_again()

    def drain(self, countdown: faults.Countdown) -> None:
        """Wait for lanes that were told to stop."""
        patience_s = _STUCK_S if self._is_stuck else min(_DRAIN_S, self._hang_timeout_s)
        if not countdown.wait(patience_s):
            self._is_stuck = True
            log.warning("lanes are still running after an interruption: %s", self._busy())

    def close(self) -> None:
        """End the threads. Lanes must have been told to stop."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        patience_s = _STUCK_S if self._is_stuck else _DRAIN_S
        ended = pool.close(patience_s)
        for worker in self.workers.values():
            worker.stop()
        end_s = monotonic() + patience_s
        for worker in self.workers.values():
            worker.join(max(0.0, end_s - monotonic()))
        if not ended or any(worker.is_alive() for worker in self.workers.values()):
            log.warning("a thread of a device is stuck and was left behind: %s", self._busy())

    def _busy(self) -> str:
        busy = [
            f"{worker.device} runs {op} of {unit} for micro-batch {lane}"
            for worker in self.workers.values()
            if (doing := worker.busy_with) is not None
            for op, unit, lane in [doing]
        ]
        return f"{'; '.join(busy) or 'No device is at work'}."


def _dismiss(pool: LanePool, workers: Sequence[Worker]) -> None:
    """End the threads of an engine that is gone without `close`. Whose thread this is nobody knows, so do not wait."""
    pool.dismiss()
    for worker in workers:
        worker.stop()
