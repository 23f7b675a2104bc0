"""The nouns of a profile: curves of seconds, lines of bytes, what each unit costs, what flows between units.

Numbers and names only, so that a profile is a file that can be mailed.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from lightning_hetero.errors import ProfileError

OWN_CODE = ""  # stands for the model's code outside of units, which runs on the root device


@dataclass(frozen=True, slots=True)
class Line:
    """Bytes that grow with the rows of a batch.

    Attributes:
        fixed: What does not depend on rows.
        per_row: What each row adds.
    """

    fixed: float = 0.0
    per_row: float = 0.0

    def __call__(self, rows: float) -> float:
        """The value for a number of rows."""
        return self.fixed + self.per_row * rows

    def __add__(self, other: Line) -> Line:
        return Line(self.fixed + other.fixed, self.per_row + other.per_row)

    def scaled(self, factor: float) -> Line:
        """The line of something `factor` times as large."""
        return Line(self.fixed * factor, self.per_row * factor)


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds as a function of rows, measured at some numbers of rows.

    Between two points the value lies on a straight line. Above the last point it goes on along the last line, below
    the first along the first one, but never under 0. One point alone grows with the rows.

    Attributes:
        points: Rows and seconds, with rising rows.

    Raises:
        ProfileError: There is no point, rows do not rise or are below 1, or seconds are negative or not finite.
    """

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        rows = [row for row, _ in self.points]
        if not rows or rows[0] < 1 or any(a >= b for a, b in pairwise(rows)):
            raise ProfileError(f"a curve needs points with rising rows, at least 1; got rows {rows}")
        if any(not (math.isfinite(seconds) and seconds >= 0) for _, seconds in self.points):
            raise ProfileError(f"a curve needs finite seconds, at least 0; got {[s for _, s in self.points]}")

    def __call__(self, rows: float) -> float:
        """Seconds for a number of rows."""
        if rows <= 0:
            return 0.0
        if len(self.points) == 1:
            (at, seconds) = self.points[0]
            return seconds * rows / at
        after = min(max(bisect_left(self.points, (rows, -1.0)), 1), len(self.points) - 1)
        (low, low_s), (high, high_s) = self.points[after - 1], self.points[after]
        return max(0.0, low_s + (high_s - low_s) * (rows - low) / (high - low))

    def scaled(self, factor: float) -> Curve:
        """The curve of a device that takes `factor` times as long."""
        return Curve(tuple((rows, seconds * factor) for rows, seconds in self.points))


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitCost:
    """What one unit costs in one step: all of its calls together.

    Attributes:
        name: Name of the unit; "" stands for the model's own code on the root.
        calls: How often it is called.
        forward_s: Seconds of its forward on each device that was measured, by device name.
        backward_s: Seconds of its backward likewise; empty for a model that is not trained.
        saved_bytes: What autograd keeps of a call for its backward, parameters and inputs left out.
        saved_output_bytes: The part of it that is what the unit returns; of own code, what units keep anyway.
        saved_input_bytes: What autograd keeps of its inputs; None: all of them.
        temporary_bytes: What a forward needs beyond that while it runs, at its worst moment.
        backward_bytes: What a backward needs, gradients of parameters included.
        inference_bytes: What a forward needs beyond its inputs where nothing is kept; None: `temporary_bytes`.
    """

    name: str
    calls: int = 1
    forward_s: Mapping[str, Curve] = field(default_factory=dict)
    backward_s: Mapping[str, Curve] = field(default_factory=dict)
    saved_bytes: Line = Line()
    saved_output_bytes: Line = Line()
    saved_input_bytes: Line | None = None
    temporary_bytes: Line = Line()
    backward_bytes: Line = Line()
    inference_bytes: Line | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """Tensors that one unit makes and another one takes.

    Attributes:
        source: Name of the unit that makes them; "" for the model's own code, or the batch.
        target: Name of the unit that takes them; "" for the model's own code, such as the loss.
        size_bytes: How much.
        chained: Whether they pass from one to the other inside of an `nn.Sequential`, straight from device to device.
            All else passes through the root device. To own code: whether an `nn.Sequential` called the unit, so that
            they go home when that has ended.
        has_gradient: Whether as much comes back in the backward.
        taken_before_by: The unit that took the same tensors first, if it was not this call; None if nobody did.
    """

    source: str
    target: str
    size_bytes: Line
    chained: bool = False
    has_gradient: bool = True
    taken_before_by: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Entering:
    """A tensor that a module with units is called with: what activation checkpointing keeps of it.

    Attributes:
        module: Name of the module.
        tensor: Number of the tensor; several modules may be called with it.
        source: Name of the unit that made it; "" for the model's own code, or the batch.
        taken_before_by: The unit that took it first, if that was before; None if nobody did.
        taken_inside: Whether a unit inside of the module takes it as it is, so that there is a flow.
        size_bytes: Its size.
    """

    module: str
    tensor: int
    source: str
    taken_before_by: str | None
    taken_inside: bool
    size_bytes: Line


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Tensors that the model's own code keeps for its backward.

    Attributes:
        source: The unit that made them; "" for own code.
        taken_by: The units that take them, which may keep them too.
        size_bytes: Their size.
    """

    source: str
    taken_by: tuple[str, ...]
    size_bytes: Line


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnCode:
    """The model's own code between two calls of units, as far as memory goes.

    Attributes:
        around: The module whose code it is; "" for the model itself and what is around it. It runs where all units
            of this module are, or else on the root.
        after: The unit that was called last before; "" for none.
        kept: What it keeps.
        moment_bytes: What its backward needs for a moment.
    """

    around: str
    after: str
    kept: tuple[Kept, ...] = ()
    moment_bytes: Line = Line()


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A gradient that waits for others to be added to it: of a tensor that goes past units, as in a residual block.

    Attributes:
        around: The module in whose code that is, see `OwnCode`.
        source: The unit that made the tensor; "" for own code.
        first: The first unit, in the order of calls, during whose backward it waits.
        last: The last one; the backward comes to it first.
        size_bytes: Its size.
    """

    around: str
    source: str
    first: str
    last: str
    size_bytes: Line


@dataclass(frozen=True, kw_only=True)
class ModelProfile:
    """What a model costs.

    Attributes:
        model: Fingerprint of the model graph.
        rows: Rows of the batch that was seen.
        units: In the order of their first call. Units that were not called are missing.
        own_code: The model's code outside of units, and the loss, on the root device.
        flows: What passes between units.
        sees_batch: Names of units that were given the batch, or what the model's own code made of it, also where
            `flows` do not tell: other units may hand it on, and units may call each other.
        out_of_sight: Names of units that were called with objects that nobody can look into.
        entering: What modules with units are called with; not of those that are called with what nobody knows.
        code: The model's own code between units; what comes after them, such as the loss, is `own_code`.
        waiting: Gradients that wait while backwards of units run.
        coupled: Names of modules that make rows depend on each other, such as batch normalisation. "forward" does not
            cut a batch that goes through them.
        optimizer_s_per_byte: Seconds of an optimizer step for each byte of trained parameter, by device name.
        gradient_sum_s_per_byte: Seconds of adding the gradients of a micro-batch to those of others, likewise.
        call_overhead_s: What the runtime adds to each call of a stage by a micro-batch, forward and backward.
        estimated: Whether seconds of some device come from data sheets and sizes, and not from a clock.
        notes: What could not be measured and was estimated instead, one sentence each.
    """

    model: str
    rows: int
    units: tuple[UnitCost, ...]
    own_code: UnitCost = UnitCost(name=OWN_CODE)
    flows: tuple[Flow, ...] = ()
    sees_batch: tuple[str, ...] = ()
    out_of_sight: tuple[str, ...] = ()
    entering: tuple[Entering, ...] = ()
    code: tuple[OwnCode, ...] = ()
    waiting: tuple[Waiting, ...] = ()
    coupled: tuple[str, ...] = ()
    optimizer_s_per_byte: Mapping[str, float] = field(default_factory=dict)
    gradient_sum_s_per_byte: Mapping[str, float] = field(default_factory=dict)
    call_overhead_s: float = 0.0
    estimated: bool = False
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> UnitCost:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    @property
    def devices(self) -> tuple[str, ...]:
        """Names of the devices on which every unit was measured."""
        named = [set(unit.forward_s) for unit in self.units]
        return tuple(sorted(set.intersection(*named))) if named else ()

    @cached_property
    def _by_name(self) -> dict[str, UnitCost]:
        return {OWN_CODE: self.own_code, **{unit.name: unit for unit in self.units}}

    def to_dict(self) -> dict[str, Any]:
        """The profile as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelProfile:
        """Read what `to_dict` wrote, also after it went through JSON.

        Raises:
            ProfileError: A field is missing, unknown or of a wrong value.
        """
        try:
            return cls(
                **{
                    **data,
                    "units": tuple(map(_unit, data["units"])),
                    "own_code": _unit(data["own_code"]),
                    "flows": tuple(map(_flow, data["flows"])),
                    "sees_batch": tuple(map(str, data.get("sees_batch", ()))),
                    "out_of_sight": tuple(map(str, data.get("out_of_sight", ()))),
                    "entering": tuple(
                        Entering(**{**e, "size_bytes": Line(**e["size_bytes"])}) for e in data.get("entering", ())
                    ),
                    "code": tuple(map(_code, data["code"])),
                    "waiting": tuple(Waiting(**{**w, "size_bytes": Line(**w["size_bytes"])}) for w in data["waiting"]),
                    "coupled": tuple(map(str, data["coupled"])),
                    "notes": tuple(map(str, data["notes"])),
                }
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProfileError(f"not a profile of this package: {type(error).__name__}: {error}") from error


def _unit(data: Mapping[str, Any]) -> UnitCost:
    return UnitCost(
        **{
            **data,
            "forward_s": _curves(data["forward_s"]),
            "backward_s": _curves(data["backward_s"]),
            "saved_bytes": Line(**data["saved_bytes"]),
            "saved_output_bytes": Line(**data["saved_output_bytes"]),
            "saved_input_bytes": None if data["saved_input_bytes"] is None else Line(**data["saved_input_bytes"]),
            "temporary_bytes": Line(**data["temporary_bytes"]),
            "backward_bytes": Line(**data["backward_bytes"]),
            "inference_bytes": None if data["inference_bytes"] is None else Line(**data["inference_bytes"]),
        }
    )


def _flow(data: Mapping[str, Any]) -> Flow:
    return Flow(**{**data, "size_bytes": Line(**data["size_bytes"])})


def _code(data: Mapping[str, Any]) -> OwnCode:
    kept = (
        Kept(**{**k, "taken_by": tuple(k["taken_by"]), "size_bytes": Line(**k["size_bytes"])}) for k in data["kept"]
    )
    return OwnCode(**{**data, "kept": tuple(kept), "moment_bytes": Line(**data["moment_bytes"])})


def _curves(data: Mapping[str, Any]) -> dict[str, Curve]:
    return {
        name: Curve(tuple((int(rows), float(seconds)) for rows, seconds in curve["points"]))
        for name, curve in data.items()
    }
