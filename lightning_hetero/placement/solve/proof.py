"""How good an answer is: its value, what no answer can undercut, and why."""

from __future__ import annotations

from dataclasses import dataclass

# Two sums of the same numbers in another order differ by about this much, relatively.
ROUNDING = 1e-12


def never() -> bool:
    """The `out_of_time` of those who have all the time in the world."""
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What is known about one answer.

    Attributes:
        value: What the answer costs, in the unit of the problem (mostly seconds).
        lower_bound: No answer costs less than this.
        method: How both were found, in words for the reader of the plan.
    """

    value: float
    lower_bound: float
    method: str

    @property
    def gap(self) -> float:
        """By how much the value may be above the optimum, as a part of the value: 0.01 is one percent."""
        if self.value <= 0.0:
            return 0.0
        return max(0.0, 1.0 - self.lower_bound / self.value)

    @property
    def optimal(self) -> bool:
        """Whether nothing better exists, up to rounding."""
        return self.gap <= 10 * ROUNDING

    def __str__(self) -> str:
        if self.optimal:
            return f"{self.value:.6g}, proved optimal ({self.method})"
        return f"{self.value:.6g}, at most {100 * self.gap:.2f} % above the optimum ({self.method})"
