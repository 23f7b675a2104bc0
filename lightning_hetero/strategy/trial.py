"""Plans take turns of a few real training steps, and the fastest stays.

Nothing here looks at a clock: whoever runs the steps says what they took. Other programs on the machine mostly make a
step longer, so a plan counts as fast as its faster steps; and as they come and go, plans take turns (A B A B) instead
of being timed one after the other. Results do not depend on the plan, so no step of a trial is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lightning_hetero.plan import Plan
from lightning_hetero.plan.explain import format_seconds
from lightning_hetero.plan.forecast import WHOLE

MOST_STEPS = 30
TIMED = 2  # steps of a turn
WARM_WHOLE, WARM_CUT = 2, 4  # steps of a turn before that; cutting a batch is tried out in the first ones
FAR = 1.5  # times the time of another plan: then one turn is enough
TIE = 0.02  # part of the time by which plans have to differ; below, the simpler one stays
ENOUGH = 3  # turns of a plan


@dataclass(eq=False)
class Entry:
    """A plan of a trial.

    Attributes:
        plan: The plan.
        seconds: Of its timed steps.
        turns: How often it had its turn.
    """

    plan: Plan
    seconds: list[float] = field(default_factory=list)
    turns: int = 0

    @property
    def typical_s(self) -> float:
        """The faster of two steps, the second fastest of four; infinity before the first."""
        return sorted(self.seconds)[len(self.seconds) // 4] if self.seconds else float("inf")

    @property
    def middle_s(self) -> float:
        """The median of the steps, or the longer one of two; infinity before the first."""
        return sorted(self.seconds)[len(self.seconds) // 2] if self.seconds else float("inf")

    def beats(self, other: Entry) -> bool:
        """Whether it is surely faster: by far, or after two turns each by more than steps of a plan differ."""
        if not (self.seconds and other.seconds):
            return False
        far = other.typical_s > FAR * self.middle_s
        clear = other.typical_s > max(self.middle_s, (1 + TIE) * self.typical_s)
        return far or (clear and min(self.turns, other.turns) >= 2)


class Trial:
    """Who runs now, and who stays in the end.

    Args:
        first: The plan that runs now.
        first_s: What steps of it took, if any were timed; they count as its first turn.
        rivals: Other plans, the most promising first. One that is the same as the first one in effect takes its place.
        most_steps: How many steps it may take in all. The first rival has a turn in any case.
        first_may_stay: Whether the first plan takes part. If not, it stays only where no rival can run.
    """

    def __init__(
        self,
        first: Plan,
        first_s: Sequence[float],
        rivals: Iterable[Plan],
        most_steps: float = MOST_STEPS,
        *,
        first_may_stay: bool = True,
    ) -> None:
        self._first = Entry(first, [*first_s] if first_may_stay else [], turns=1 if first_s else 0)
        self._first_races = first_may_stay
        self._entries = [self._first]
        for plan in rivals:
            twin = next((entry for entry in self._entries if in_effect(entry.plan) == in_effect(plan)), None)
            if twin is None:
                self._entries.append(Entry(plan))
            elif twin is self._first:  # the newer one knows more
                twin.plan = plan
                self._first_races = True
        self._most_steps = most_steps
        self._steps = 0
        self._of_turn = 0
        self._now: Entry | None = self._first
        self._next_turn()

    @property
    def plan(self) -> Plan:
        """The plan that runs now; in the end, the one that stays."""
        return self.winner.plan if self._now is None else self._now.plan

    @property
    def is_over(self) -> bool:
        """Whether the plan that stays is known."""
        return self._now is None

    @property
    def winner(self) -> Entry:
        """The fastest so far; of those that are as fast as it, the one with fewest devices and micro-batches."""
        tried = [entry for entry in self._entries if entry.seconds] or self._entries
        fastest_s = min(entry.typical_s for entry in tried)
        as_fast = [entry for entry in tried if entry.typical_s <= (1 + TIE) * fastest_s]
        return min(as_fast, key=lambda entry: (len(entry.plan.used), entry.plan.execution.micro_batches))

    def took(self, seconds: float) -> None:
        """A step of the plan that runs now is over."""
        entry = self._now
        assert entry is not None
        self._steps += 1
        self._of_turn += 1
        if self._of_turn > warm_steps(entry.plan):
            entry.seconds.append(seconds)
        if self._of_turn == warm_steps(entry.plan) + TIMED:
            entry.turns += 1
            self._next_turn()

    def drop(self) -> None:
        """The plan that runs now cannot run. The first one can."""
        assert self._now is not None
        self._entries.remove(self._now)
        self._next_turn()

    def verdict(self) -> str:
        """What was tried and what stays, in words; "" if nothing was compared."""
        tried = [entry for entry in self._entries if entry.seconds]
        if len(tried) < 2:
            return ""
        stays = self.winner
        times = ", ".join(f"{name_of(entry.plan)} {format_seconds(entry.typical_s)}" for entry in tried)
        words = f"Tried with real steps: {times}; {name_of(stays.plan)} stays."
        for device in sorted({d.name for entry in tried for d in entry.plan.used} - {d.name for d in stays.plan.used}):
            using = min(entry.typical_s for entry in tried if device in {d.name for d in entry.plan.used})
            change = using / stays.typical_s - 1
            cost = f"would cost +{100 * change:.0f} %" if change >= TIE / 2 else "would save nothing that counts"
            words += f" {device} stays idle: using it {cost}."
        return words

    def _next_turn(self) -> None:
        self._of_turn = 0
        entries = self._entries if self._first_races else self._entries[1:]
        racing = [entry for entry in entries if not any(other.beats(entry) for other in entries)]
        new = [entry for entry in racing if not entry.seconds and entry is not self._first]
        if not new and (len(racing) < 2 or min(entry.turns for entry in racing) >= ENOUGH):
            self._now = None
            return
        following = new[0] if new else min(racing, key=lambda entry: (entry.turns, entry is self._now))
        costs = warm_steps(following.plan) + TIMED
        allowed = self._steps == 0 or self._steps + costs <= self._most_steps
        self._now = following if allowed else None


def warm_steps(plan: Plan) -> int:
    """Steps of a plan that tell nothing about the ones to come."""
    return WARM_WHOLE if plan.execution.schedule == WHOLE else WARM_CUT


def in_effect(plan: Plan) -> tuple[object, ...]:
    """What of a plan shows in the placed model."""
    return plan.device_of, plan.shares_of, plan.execution, plan.checkpointed


def name_of(plan: Plan) -> str:
    """What is particular about a plan, in few words: its devices, and the way a batch is cut."""
    devices = "+".join(device.name for device in plan.used)
    stages = f" in {len(plan.stages)} stages" if len(plan.stages) > len(plan.used) else ""
    stages += " with replicas" if plan.shares_of else ""
    stages += " with activation checkpointing" if plan.checkpointed else ""
    if plan.execution.schedule == WHOLE:
        return f"{devices}{stages}"
    return f"{devices}{stages} ({plan.execution.micro_batches} micro-batches, {plan.execution.schedule})"
