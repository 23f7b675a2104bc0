"""Flat buffers in which gradients travel, and the place of each parameter in them.

The composition depends on the order, the dtypes and the sizes of the parameters, never on devices or gradients, so that
it is the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_hetero.errors import UnsupportedError, UsageError
from lightning_hetero.runtime.copies import Mark, mark, wait_for

_WIRE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.float16: torch.float16,
    torch.bfloat16: torch.bfloat16,
    torch.complex128: torch.float64,
    torch.complex64: torch.float32,
    torch.complex32: torch.float16,
}


def wire_dtype(dtype: torch.dtype) -> torch.dtype:
    """The real dtype in which gradients of a floating dtype travel: float32 where gloo does not know their own."""
    return _WIRE.get(dtype, torch.float32)


def compose(parameters: Sequence[Tensor], bucket_bytes: int) -> list[list[int]]:
    """Which parameters travel together: in reverse order, those of one dtype, until a bucket is full.

    The order in which DistributedDataParallel sends (Li et al., "PyTorch Distributed: Experiences on Accelerating
    Data Parallel Training", VLDB 2020): the last layers have their gradients first.

    Returns:
        Positions in `parameters`, by bucket. Buckets stand in the order in which a backward completes them.
    """
    done: list[list[int]] = []
    opened: dict[torch.dtype, list[int]] = {}
    held_bytes: dict[torch.dtype, int] = {}
    for index in reversed(range(len(parameters))):
        dtype = parameters[index].dtype
        opened.setdefault(dtype, []).append(index)
        held_bytes[dtype] = held_bytes.get(dtype, 0) + parameters[index].numel() * dtype.itemsize
        if held_bytes[dtype] >= bucket_bytes:
            done.append(opened.pop(dtype))
            del held_bytes[dtype]
    return sorted([*done, *opened.values()], key=lambda indices: -indices[-1])


class Slot:
    """A parameter, its place in a bucket, and what is known of its gradient in this step.

    Attributes:
        parameter: Held strongly: a weak reference would forbid `torch.utils.swap_tensors`, which relocation needs.
        name: For messages.
        usual: How often a backward accumulates its gradient, at most; None if no step has told yet.
        count: How often this one did.
        watched: Whether this step counts.

    Raises:
        UsageError: The parameter is lazy, and has no shape yet.
    """

    def __init__(self, parameter: nn.Parameter, name: str) -> None:
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise UsageError(f"{name} has no shape yet. Run one batch through the lazy module first.")
        self.parameter = parameter
        self.name = name
        self.usual: int | None = None
        self.count = 0
        self.watched = False
        self._dtype, self._shape = parameter.dtype, parameter.shape
        self._seen: tuple[Tensor | None, int, int] | None = None
        self._values: Tensor | None = None
        self._flag: Tensor | None = None
        self._packed_at: Mark | None = None

    @property
    def words(self) -> int:
        """Numbers of the wire dtype that the gradient takes."""
        return self._shape.numel() * (2 if self._dtype.is_complex else 1)

    def signature(self) -> tuple[str, tuple[int, ...], str]:
        """What has to be the same on all ranks."""
        return self.name, tuple(self._shape), str(self._dtype)

    def check(self) -> None:
        """Look whether the gradient can travel.

        Raises:
            UnsupportedError: It is sparse.
            UsageError: The parameter has another dtype or shape than it had when the buckets were made.
        """
        grad = self.parameter.grad
        if grad is not None and grad.layout != torch.strided:
            raise UnsupportedError(
                f"the gradient of {self.name} is sparse, and sums over processes are made of dense gradients only. "
                "Make it dense: nn.Embedding(..., sparse=False), or train in one process."
            )
        now = self.parameter.dtype, self.parameter.shape
        if now != (self._dtype, self._shape):
            raise UsageError(
                f"{self.name} was {self._dtype} of shape {tuple(self._shape)} when the buffers for its gradient were "
                f"made, and is {now[0]} of shape {tuple(now[1])} now. Convert the model before training begins."
            )

    def lend(self, values: Tensor | None, flag: Tensor | None) -> None:
        """Take (or give back) the parts of a buffer that belong to this parameter."""
        self._values, self._flag, self._seen = values, flag, None
        if values is not None:
            values = torch.view_as_complex(values.view(*self._shape, 2)) if self._dtype.is_complex else values
            self._values = values.view(self._shape)

    def pack(self) -> None:
        """Copy the gradient into the buffer; zeros, and the flag of absence, if there is none."""
        assert self._values is not None
        assert self._flag is not None
        grad = self.parameter.grad
        # Seen before it is copied: what is accumulated meanwhile shows.
        seen = (grad, 0 if grad is None else grad._version, self.count)
        if grad is None:
            self._values.zero_()
            self._flag.zero_()
        else:
            self.check()
            self._values.copy_(grad.detach() if grad.requires_grad else grad)  # it does with create_graph
            self._flag.fill_(1)
        self._packed_at = mark(self._values.device)
        self._seen = seen

    def arrive(self) -> None:
        """Let what this thread launches on the buffer's device wait for what `pack` has launched in another one."""
        if self._packed_at is not None:
            wait_for(self._packed_at)
            self._packed_at = None

    @property
    def is_packed(self) -> bool:
        """Whether what was packed is the gradient as it is now."""
        if self._seen is None:
            return False
        grad, version, count = self._seen
        now = self.parameter.grad
        return now is grad and count == self.count and (now is None or now._version == version)

    def unpack(self) -> None:
        """Copy the sum from the buffer into `.grad`, which is made if there is none. Grad mode must be off."""
        assert self._values is not None
        if self.parameter.grad is None:
            self.parameter.grad = torch.empty_like(self.parameter, requires_grad=False).copy_(self._values)
        else:
            self.parameter.grad.copy_(self._values)

    def end(self) -> None:
        """Forget this step, except for the number of accumulations."""
        if self.watched:
            self.usual = max(self.usual or 0, self.count)
        self.count, self.watched, self._seen = 0, False, None


class Bucket:
    """A flat buffer: gradients, one presence flag for each, and spare words at the end.

    Sums of flags need no exactness: they grow from zero and never come back to it, in any dtype.

    Args:
        slots: The parameters in it.
        dtype: Theirs.
        spare: How many spare words.
        device: Where the buffer is: host memory, or that of an accelerator.

    Attributes:
        slots: The parameters in it.
        missing: How many of them still have to be packed before it can go out.
        empty: Nobody had a gradient in it in the last step. All ranks know this, so it stays at home until one has.
        flat: The buffer, or None while it is not needed.
    """

    def __init__(
        self, slots: Sequence[Slot], dtype: torch.dtype, spare: int = 0, device: torch.device | None = None
    ) -> None:
        self.slots = tuple(slots)
        self.missing = len(self.slots)
        self.empty = False
        self.flat: Tensor | None = None
        self._dtype = wire_dtype(dtype)
        self._spare = spare
        self._device = device or torch.device("cpu")

    def allocate(self) -> Tensor:
        """The buffer, made if there is none."""
        if self.flat is None:
            sizes = [slot.words for slot in self.slots]
            begin = sum(sizes)
            total = begin + len(sizes) + self._spare
            self.flat = torch.zeros(total, dtype=self._dtype, device=self._device)
            offset = 0
            for index, (slot, size) in enumerate(zip(self.slots, sizes, strict=True)):
                slot.lend(self.flat[offset : offset + size], self.flat[begin + index])
                offset += size
        return self.flat

    def free(self) -> None:
        """Give the memory back."""
        for slot in self.slots:
            slot.lend(None, None)
        self.flat = None

    @property
    def spare(self) -> Tensor:
        """The words at the end."""
        flat = self.allocate()
        return flat[flat.numel() - self._spare :]

    def unpack(self) -> bool:
        """Copy the sums into `.grad` where any rank had a gradient; False if none had any."""
        flat = self.allocate()
        end = flat.numel() - self._spare
        present = [flag > 0 for flag in flat[end - len(self.slots) : end].tolist()]
        for slot, there in zip(self.slots, present, strict=True):
            if there:
                slot.unpack()
        return any(present)
