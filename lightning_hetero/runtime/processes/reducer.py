"""Sums of gradients over the processes of a run, while the backward still runs.

Gradients are copied into buckets (`buckets.py`) as they come, and a full bucket is summed by all ranks in the
background, as DistributedDataParallel does. Here nothing is promised beforehand about which parameters get a gradient,
or how often: the local gradients stay untouched until the end of the step, so a bucket that went out too early is
found out (by the gradient's identity and version) and summed again. The last bucket goes out at the end only: it
carries, for every other bucket, whether some rank wants it again, and whether some rank cannot go on at all.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_hetero.errors import HeteroError, ProcessError, UnsupportedError, UsageError
from lightning_hetero.runtime.processes.buckets import Bucket, Slot, compose
from lightning_hetero.runtime.processes.sums import Sums, difference

_KINDS: dict[str, type[HeteroError]] = {"unsupported": UnsupportedError, "usage": UsageError, "failed": ProcessError}


class GradientReducer:
    """Replaces the gradients of each rank by their sum over all ranks.

    All ranks make it, and call `finish`, at the same places. `finish` adds up what is in `.grad`: a gradient that is a
    sum already must be cleared before the next backward, on all ranks but one at least, or it is counted several times.

    Attributes:
        resent: How many buckets were summed a second time, since the beginning, because they went out too early.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        group: dist.ProcessGroup | None = None,
        *,
        names: Iterable[str] = (),
        bucket_bytes: int = 25 * 2**20,
        device: torch.device | None = None,
        between_devices: dist.ProcessGroup | None = None,
    ) -> None:
        """Make the buckets; nothing is exchanged yet.

        Args:
            parameters: In the order of the model, the same on all ranks; devices may differ from rank to rank.
            group: A gloo group of torch, or None for its default group.
            names: Of the parameters, for messages.
            bucket_bytes: A bucket is full when it holds that much.
            device: The accelerator on which all parameters of this rank are, if the buckets are to be there.
            between_devices: With `device`, on all ranks: a group that sums what is on accelerators. What ranks tell
                each other besides goes through `group`, which notices soon when one of them is gone.

        Raises:
            UsageError: torch.distributed is not open, or a lazy parameter has no shape yet.
        """
        if group is None and not dist.is_initialized():
            raise UsageError("there is no process group to sum gradients in. Open torch.distributed before.")
        unique = list({id(p): p for p in parameters}.values())
        given = [*names]
        if given and len(given) != len(unique):
            raise UsageError(f"{len(given)} names for {len(unique)} different parameters. Give one name for each.")
        slots = [Slot(p, given[i] if given else f"parameter {i}") for i, p in enumerate(unique)]
        # What cannot have a gradient (quantised integers) takes no part.
        self._slots = [slot for slot in slots if slot.parameter.is_floating_point() or slot.parameter.is_complex()]
        groups = compose([slot.parameter for slot in self._slots], bucket_bytes)
        device = None if between_devices is None else device
        if device is not None and groups:
            groups.append([])  # the words of the last bucket go through host memory
        self._buckets: list[Bucket] = []
        for number, indices in enumerate(groups):
            spare = len(groups) if number == len(groups) - 1 else 0  # one word per other bucket, one for problems
            members = [self._slots[index] for index in indices]
            dtype = members[0].parameter.dtype if members else torch.float32
            self._buckets.append(Bucket(members, dtype, spare, device if members else None))
        self._sums = Sums(group, between_devices)
        self._verified = False
        self._closed = False
        self._problem: HeteroError | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._next = 0  # the bucket that goes out next
        self._watching = False
        self._copying = 0  # hooks that copy a gradient just now
        self._changed = threading.Condition()
        self.resent = 0

    def exchange(self, parameters: Iterable[nn.Parameter]) -> None:
        """Go on with other objects for the same parameters, between two steps; the other ranks need not know.

        Args:
            parameters: As many as before, in the same order.
        """
        fresh = [p for p in {id(p): p for p in parameters}.values() if p.is_floating_point() or p.is_complex()]
        for slot, parameter in zip(self._slots, fresh, strict=True):
            slot.parameter = parameter

    # The step

    def begin(self) -> None:
        """Call it before the last backward of an optimizer step: from now on buckets go out while it runs.

        Called again before `finish`, it changes nothing: what went out cannot be taken back.
        """
        self._check_open()
        if self._watching:
            return
        with self._changed:
            self._watching = True
        me = weakref.ref(self)
        for number, bucket in enumerate(self._buckets):
            bucket.missing = len(bucket.slots)
            early = self._verified and not bucket.empty
            if early:
                bucket.allocate()
            for index, slot in enumerate(bucket.slots):
                # Hooks live as long as the step, so that they run after those of users and no parameter keeps one.
                if slot.parameter.requires_grad:
                    slot.watched = True
                    hook = partial(_on_accumulated, me, number, index)
                    self._handles.append(slot.parameter.register_post_accumulate_grad_hook(hook))
                if early and (slot.usual == 0 or not slot.watched):
                    self._pack_early(bucket, slot)

    @torch.no_grad()
    def finish(self) -> None:
        """Call it after the last backward: `.grad` holds the sum over all ranks afterwards, where any rank had one.

        Sums are written into the tensor that is `.grad`; None becomes a new tensor if another rank had a gradient.

        Raises:
            UnsupportedError: Some rank has a sparse gradient. Raised on all ranks, as is the next one.
            UsageError: Some rank has other parameters than the others, or than it had before.
            ProcessError: Another process does not answer; the reducer is of no use any more.
        """
        self._check_open()
        try:
            self._stop_watching()
            if self._sums.lost is not None:
                raise self._sums.lost
            if self._buckets:
                self._verify()
                self._sum()
        finally:
            for slot in self._slots:
                slot.end()
            self._sums.forget()
            self._next, self._problem = 0, None

    def close(self) -> None:
        """Remove all hooks and buffers. Safe to call twice, and when others are gone."""
        self._stop_watching()
        self._closed = True
        self._sums.forget()
        for bucket in self._buckets:
            bucket.free()
        self._buckets, self._slots = [], []

    # While the backward runs

    def _accumulated(self, number: int, index: int) -> None:
        """A gradient was accumulated; called from any thread."""
        with self._changed:
            if not self._watching:
                return
            bucket = self._buckets[number]
            slot = bucket.slots[index]
            slot.count += 1
            if not self._verified or bucket.empty or slot.count != slot.usual:
                return
            self._copying += 1
        # Copied here, in the thread and the stream that made it, and without the lock: a copy may wait for its device.
        try:
            self._pack_early(bucket, slot)
        finally:
            with self._changed:
                self._copying -= 1
                self._send_full()
                self._changed.notify_all()

    def _pack_early(self, bucket: Bucket, slot: Slot) -> None:
        try:
            slot.pack()
        except Exception:  # `finish` tries again, and tells the other ranks if it fails there, too
            return
        with self._changed:
            bucket.missing -= 1

    def _send_full(self) -> None:
        """Send the next buckets, as far as they are complete. The lock is held."""
        while self._next < len(self._buckets) - 1:
            bucket = self._buckets[self._next]
            if bucket.missing and not bucket.empty:
                return
            if not bucket.empty:
                try:
                    self._start(self._next, bucket.allocate())
                except ProcessError:  # not through the user's backward: `finish` raises it
                    return
            self._next += 1

    def _start(self, number: int, flat: Tensor) -> None:
        for slot in self._buckets[number].slots:
            slot.arrive()
        self._sums.start(number, flat)

    def _stop_watching(self) -> None:
        with self._changed:
            self._watching = False
            self._changed.wait_for(lambda: not self._copying)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # At the end of the step

    def _sum(self) -> None:
        """Sum what has not been summed, and what has to be summed again."""
        for slot in self._slots:
            self._noting(slot, slot.check)
        *others, last = range(len(self._buckets))
        again = []
        for number in others:
            bucket = self._buckets[number]
            if number in self._sums.started:
                again.append(not all(slot.is_packed for slot in bucket.slots))
            elif bucket.empty:
                again.append(any(slot.parameter.grad is not None for slot in bucket.slots))
            else:
                self._start(number, self._pack(bucket))
                again.append(False)
        flat = self._pack(self._buckets[last])
        self._buckets[last].spare.copy_(torch.tensor([*again, self._problem is not None]))
        self._start(last, flat)
        self._sums.wait()
        *repeat, problem = (flag > 0 for flag in self._buckets[last].spare.tolist())
        if problem:
            self._raise_together()
        for number in others:
            if repeat[number]:
                self.resent += not self._buckets[number].empty
                self._start(number, self._pack(self._buckets[number], again=True))
        self._sums.wait()
        if any(repeat) and any(self._sums.gather(self._problem is not None)):
            self._raise_together()
        for number, bucket in enumerate(self._buckets):
            bucket.empty = number not in self._sums.started or not bucket.unpack()
            if bucket.empty and number != last:
                bucket.free()

    def _pack(self, bucket: Bucket, again: bool = False) -> Tensor:
        flat = bucket.allocate()
        for slot in bucket.slots:
            if again or not slot.is_packed:  # after a sum, the buffer holds that sum
                self._noting(slot, slot.pack)
        return flat

    def _noting(self, slot: Slot, action: Callable[[], None]) -> None:
        """Do something that may fail on this rank alone: the others have to hear of it before it is raised."""
        try:
            action()
        except HeteroError as error:
            self._problem = self._problem or error
        except Exception as error:
            if self._problem is None:
                self._problem = ProcessError(f"the gradient of {slot.name} cannot be sent: {error}")
                self._problem.__cause__ = error

    # With the others

    def _verify(self) -> None:
        """Make sure, once, that the buckets are the same everywhere, and learn which ones nobody trains."""
        if self._verified:
            return
        signature = [slot.signature() for slot in self._slots]
        digest = hashlib.sha256(repr((signature, [len(b.slots) for b in self._buckets])).encode()).hexdigest()
        trained = [any(slot.parameter.requires_grad for slot in bucket.slots) for bucket in self._buckets]
        told = self._sums.gather((digest, trained))
        if any(other != told[0][0] for other, _ in told):
            everyone = self._sums.gather(signature)
            raise UsageError(difference(everyone))
        for number, bucket in enumerate(self._buckets):
            bucket.empty = not any(theirs[number] for _, theirs in told)
        self._verified = True

    def _raise_together(self) -> None:
        """Raise, on all ranks, what is wrong on the first of those where something is wrong."""
        kinds = {kind: name for name, kind in _KINDS.items()}
        mine = None if self._problem is None else (kinds[type(self._problem)], str(self._problem))
        told = self._sums.gather(mine)
        rank, (kind, text) = next((rank, said) for rank, said in enumerate(told) if said is not None)
        raise _KINDS[kind](f"in process {rank}, {text}") from self._problem

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this reducer is closed. Make a new one for the next run.")


def _on_accumulated(reducer: weakref.ref[GradientReducer], number: int, index: int, _: Tensor) -> None:
    """The hook. It holds neither the reducer nor the parameter, so that there is no cycle."""
    alive = reducer()
    if alive is not None:
        alive._accumulated(number, index)
