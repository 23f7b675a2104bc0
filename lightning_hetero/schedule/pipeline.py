"""What a schedule is asked about: stages in a chain on their devices, and the micro-batches that pass through."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from lightning_hetero.errors import ScheduleError
from lightning_hetero.schedule.action import Action, Op

_OPS: tuple[tuple[Op, ...], ...] = (("F", "B"), ("F", "I", "W"), ("F",), ("B",), ("I", "W"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """A chain of stages, the device of each, and what they do with every micro-batch.

    It knows no seconds and no bytes: order does not need them, so stages may be as unequal as they like.

    Attributes:
        device_of: Index of the device of each stage, shape (stages,). A device may own several stages.
        micro_batches: Number of micro-batches in a step.
        ops: What a stage does with each of them, in this order. The last op lets go of what the forward kept, so
            with `("F",)` nothing is held and no schedule holds a micro-batch back. `("F",)` is inference, or
            the first half of a step whose loss looks at the whole batch; `("B",)` is its second half.
    """

    device_of: tuple[int, ...]
    micro_batches: int
    ops: tuple[Op, ...] = ("F", "B")

    def __post_init__(self) -> None:
        if not self.device_of or min(self.device_of) < 0:
            raise ScheduleError(f"device_of must name a device, from 0, for at least one stage; got {self.device_of}")
        if self.micro_batches < 1:
            raise ScheduleError(f"a step has at least 1 micro-batch, got {self.micro_batches}")
        if self.ops not in _OPS:
            raise ScheduleError(f"ops must be one of {', '.join(map(str, _OPS))}; got {self.ops}")

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.device_of)

    @property
    def devices(self) -> tuple[int, ...]:
        """The devices that own a stage, in the order in which a micro-batch first meets them."""
        return _devices(self.device_of)

    def __contains__(self, action: object) -> bool:
        return (
            isinstance(action, Action)
            and 0 <= action.stage < self.stages
            and 0 <= action.micro_batch < self.micro_batches
            and action.op in self.ops
        )

    def actions(self) -> Iterator[Action]:
        """Everything that has to be done, each action once."""
        for stage in range(self.stages):
            for micro_batch in range(self.micro_batches):
                yield from (Action(stage, op, micro_batch) for op in self.ops)

    def starts(self) -> Iterator[Action]:
        """The actions that need no other: those of the first stage, or of the last one if there are no forwards."""
        first = 0 if "F" in self.ops else self.stages - 1
        return (Action(first, self.ops[0], micro_batch) for micro_batch in range(self.micro_batches))

    def needs(self, action: Action) -> tuple[Action, ...]:
        """The actions that must be done before this one can begin.

        A forward needs that of the stage before. A backward (or its input half) needs the forward of its own
        stage and the backward of the stage after. A weight gradient needs the input gradient of its own stage.
        Ops that the pipeline does not have are needed by none.
        """
        stage, op, micro_batch = action.stage, action.op, action.micro_batch
        if op == "W":
            return (Action(stage, "I", micro_batch),)
        own = () if op == "F" else (Action(stage, "F", micro_batch),)
        neighbour = stage - 1 if op == "F" else stage + 1
        needs = (*own, Action(neighbour, op, micro_batch)) if 0 <= neighbour < self.stages else own
        return tuple(need for need in needs if need.op in self.ops)

    def unlocks(self, action: Action) -> tuple[Action, ...]:
        """The actions that can begin once this one is done: those that get their last input from it.

        Of all that an action needs, the neighbour's is done last: a stage has long done its own forward when
        the gradient comes back from the stages behind it.
        """
        stage, op, micro_batch = action.stage, action.op, action.micro_batch
        later: list[tuple[int, Op]] = []
        if op == "F" and stage < self.stages - 1:
            later = [(stage + 1, "F")]
        elif op == "F":
            later = [(stage, turn) for turn in self.ops[1:2]]  # none without backwards
        elif op in ("B", "I") and stage:
            later = [(stage - 1, op)]
        if op == "I":
            later.append((stage, "W"))
        return tuple(Action(at, what, micro_batch) for at, what in later)


@lru_cache(maxsize=256)
def _devices(device_of: tuple[int, ...]) -> tuple[int, ...]:
    """Remembered, because rules ask for it at every action."""
    return tuple(dict.fromkeys(device_of))
