"""Trusted devices: what a recording finds out about who sees the batch, and where units may stand for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hetero.devices import resolve_devices
from lightning_hetero.errors import PlacementError
from lightning_hetero.graph.find import find_units
from lightning_hetero.placement import Constraints, Problem, check_constraints
from lightning_hetero.placement.constraints import may_run, rules_for
from lightning_hetero.profile import ModelProfile
from lightning_hetero.profile.count import count_work
from lightning_hetero.profile.measure import measure_model
from lightning_hetero.profile.recording import Recording
from lightning_hetero.profile.workload import Workload

TRUSTED, OTHER = "emulated:0", "emulated:1"
Pair = tuple[Tensor, Tensor]


class Hands(nn.Module):
    """Makes something of the first tensor, and hands the second one on in some way."""

    def __init__(self, on: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.on = on

    def forward(self, pair: Pair) -> Pair:
        return torch.tanh(pair[0] @ self.weight), self.on(pair[1])


class Edges(nn.Module):
    """Layers of a graph network, which get the batch's edges one through the other."""

    def __init__(self, on: Callable[[Tensor], Tensor], *between: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(Hands(on), *between, Hands(on), Hands(on))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layers((x, torch.arange(32.0).reshape(8, 4)))[0]
        return made


class Swap(nn.Module):
    """Code without parameters that makes something of both."""

    def forward(self, pair: Pair) -> Pair:
        return pair[0] + pair[1], pair[1] * 2.0


class Without(nn.Module):
    """Code without parameters that leaves the batch behind."""

    def forward(self, pair: Pair) -> Tensor:
        return pair[0]


class Ended(nn.Module):
    """A graph network whose last layer is given what the others made, and no edges."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Hands(lambda x: x), Without(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layers((x, torch.ones(8, 4)))
        return made


class Three(nn.Module):
    """Three layers, each fed by the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.c(self.b(self.a(x)))
        return made


class Teacher(Three):
    """Its last layer is called in validation only."""

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.b(self.a(x)) if self.training else self.c(x)
        return made


@dataclass(eq=False)
class Graph:
    """A batch, as libraries for graphs have it."""

    x: Tensor


class Batch:
    """An object that nobody can look into."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


class OfObject(nn.Module):
    """Is called with an object."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, batch: Any) -> Tensor:
        return torch.as_tensor(batch.x @ self.weight)


class WithObject(nn.Module):
    """Calls one unit with the batch in an object."""

    def __init__(self, kind: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.of_object = nn.Linear(4, 4), nn.Linear(4, 4), OfObject()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.b(self.a(x)) + self.of_object(self.kind(x))
        return made


class Calls(nn.Module):
    """A unit that calls another one, which is not its child, with what it was given."""

    def __init__(self, other: nn.Module, what: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.others, self.what = (other,), what

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.others[0](self.what(x)) @ self.weight
        return made


class Nested(nn.Module):
    """Its unit `b` is called twice: with what `a` made, and from inside of `outer`."""

    def __init__(self, what: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.outer = Calls(self.b, what)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.b(self.a(x)) + self.outer(x)
        return made


def problem_of(model: nn.Module, trusted: tuple[str, ...] = (TRUSTED,)) -> Problem:
    """As in a run: the model was recorded in a step of training."""
    inventory, graph = resolve_devices("cpu@speed=1,cpu@speed=1"), find_units(model)
    with Recording(model, graph) as recording:
        model(torch.randn(8, 4))
    profile = measure_model(recording, inventory, out_of_time=lambda: True)
    return Problem(graph=graph, inventory=inventory, profile=profile, constraints=Constraints(trusted=trusted))


def untrusted(problem: Problem) -> set[str]:
    """The units that may stand on a device that is not trusted."""
    return {name for name, rules in rules_for(problem).items() if all(OTHER in rule.devices for rule in rules)}


@pytest.mark.parametrize(
    "on",
    [
        lambda x: x,
        lambda x: x[:, :3],
        lambda x: x.clone(),
        lambda x: x.double(),
    ],
    ids=["itself", "a view", "a copy", "in another dtype"],
)
def test_what_a_unit_hands_on_of_the_batch_is_still_the_batch(on: Callable[[Tensor], Tensor]) -> None:
    assert untrusted(problem_of(Edges(on))) == set()


def test_what_a_unit_makes_of_the_batch_may_go_anywhere() -> None:
    """The layers have no gap between them, and what each one returns is its own work."""
    assert untrusted(problem_of(Edges(lambda x: x * 2.0))) == {"layers.1", "layers.2"}
    assert untrusted(problem_of(Ended())) == {"layers.2"}
    assert untrusted(problem_of(Three())) == {"b", "c"}


def test_what_code_without_parameters_makes_of_the_batch_in_a_chain_is_for_trusted_devices() -> None:
    assert untrusted(problem_of(Edges(lambda x: x, Swap()))) == set()


def test_a_unit_that_was_not_called_may_see_the_batch() -> None:
    problem = problem_of(Teacher())
    assert untrusted(problem) == {"b"}
    with pytest.raises(PlacementError, match=r"'c' may see the batch \(it was not called in the step that was record"):
        check_constraints({"a": TRUSTED, "b": OTHER, "c": OTHER}, problem)


@pytest.mark.parametrize("kind", [Batch, Graph], ids=["unknown", "dataclass"])
def test_a_unit_that_is_called_with_an_object_may_see_the_batch(kind: Callable[[Tensor], Any]) -> None:
    assert untrusted(problem_of(WithObject(kind))) == {"b"}


def test_it_is_said_that_nobody_can_look_into_an_object() -> None:
    problem = problem_of(WithObject(Batch))
    with pytest.raises(
        PlacementError, match=r"'of_object' may see the batch \(it is called with an object that nobody"
    ):
        check_constraints({"a": TRUSTED, "b": OTHER, "of_object": OTHER}, problem)


@pytest.mark.parametrize(
    ("what", "expected"),
    [(lambda x: x, set()), (lambda x: x[:, :], set()), (lambda x: x * 2.0, {"b"})],
    ids=["the batch", "a view of it", "its own work"],
)
def test_a_unit_that_another_one_calls_with_the_batch_sees_it(
    what: Callable[[Tensor], Tensor], expected: set[str]
) -> None:
    assert untrusted(problem_of(Nested(what))) == expected


def test_a_model_that_was_counted_on_shapes_alone_tells_the_same() -> None:
    model = Edges(lambda x: x)
    problem = problem_of(model)
    work = count_work(model, problem.graph, (torch.randn(8, 4),), rows=8, training=True)
    profile = Workload.from_dict(work.to_dict()).profile(problem.graph, problem.inventory)
    assert problem.profile is not None
    assert (profile.sees_batch, profile.out_of_sight) == (problem.profile.sees_batch, ())
    assert ModelProfile.from_dict(profile.to_dict()) == profile


def test_where_data_may_be_is_what_trusted_private_and_forbidden_say() -> None:
    """Pins protect no data; units that share a parameter share what is private."""
    model = Three()
    model.c.weight = model.b.weight
    rules = Constraints(trusted=("x",), private=("b",), forbidden=("z",), pins={"a": "x"})
    may = may_run(find_units(model), rules, ())
    assert [device for device in "xyz" if may("a", device)] == ["x", "y"]
    assert [device for device in "xyz" if may("b", device)] == ["x"]
    assert [device for device in "xyz" if may("c", device)] == ["x"]
    assert may_run(find_units(model), Constraints(), ("a",))("a", "z")
