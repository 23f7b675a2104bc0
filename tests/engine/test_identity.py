"""What is one tensor on one device is one tensor for code in lanes, and for those who call it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hetero.devices import resolve_devices
from lightning_hetero.errors import UnsupportedError
from lightning_hetero.runtime.engine.stepper import Stepper
from lightning_hetero.runtime.engine.tree import Tree
from lightning_hetero.schedule import get_schedule
from lightning_hetero.testing.cut_models import Between

EXACT = 1e-12
WRITTEN = "a tensor that shares memory with an output of encoder is changed in place"
BOTH_WAYS = pytest.mark.parametrize("rematerialize", [False, True])


def rows(count: int = 10, seed: int = 3) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def square(model: nn.Module) -> Tensor:
    return model(rows()).pow(2).mean()  # type: ignore[no-any-return]


def same(found: Tensor | None, expected: Tensor | None) -> bool:
    assert found is not None
    assert expected is not None
    return torch.allclose(found.cpu(), expected, rtol=0, atol=EXACT)


def train(both: Any, loss: Callable[[Any], Tensor], calls: int = 2) -> None:
    """Two steps, of which so many calls are cut."""
    for _ in range(2):
        both.step(loss)
        assert both.relative_difference < EXACT
    assert both.calls == calls


class Attends(nn.Module):
    """Attends to itself if the context is the very input."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.cross, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        h = self.own(x) if context[0] is x else self.cross(context[0]) + x
        if context[-1] is not context[0]:
            h = h * context[-1]
        return self.out(torch.tanh(h))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Returns its last state, and what `also` makes of it and of the input."""

    def __init__(self, also: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(8, 8), nn.Parameter(torch.ones(8))
        self.also = also

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.linear(x + 1)) * self.scale  # neither x nor h is needed for a gradient
        return h, self.also(h, x)


class Net(nn.Module):
    """A function between an encoder, which may come second, and two heads."""

    def __init__(
        self, also: Callable[[Tensor, Tensor], Any], between: Callable[..., Any], *, encoder_first: bool = True
    ) -> None:
        super().__init__()
        self.first = nn.Identity() if encoder_first else nn.Linear(8, 8)
        self.encoder, self.head, self.side = Encoder(also), nn.Linear(8, 4), nn.LazyLinear(4)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        h, side = self.between(*self.encoder(x), x)
        return self.head(h) + self.side(side)  # type: ignore[no-any-return]


def net(also: Callable[[Tensor, Tensor], Any], between: Callable[..., Any], *, encoder_first: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = Net(also, between, encoder_first=encoder_first).double()
    with torch.no_grad():
        model(rows())  # its last layer gets its size
    return model


def tripled(h: Tensor, side: Any, x: Tensor) -> Any:
    h.mul_(3)
    return h, side[-1] if isinstance(side, list) else side


# Inputs of a region


@BOTH_WAYS
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_a_tensor_that_is_passed_twice_is_one_tensor(pair: Any, rematerialize: bool, needs_gradient: bool) -> None:
    both = pair(Attends().double(), rematerialize=rematerialize)
    found: list[Tensor] = []

    def loss(model: nn.Module) -> Tensor:
        x = rows().requires_grad_(needs_gradient)
        found.append(x)
        return model(x, x).pow(2).mean()  # type: ignore[no-any-return]

    train(both, loss)
    if needs_gradient:
        assert same(found[0].grad, found[1].grad)


def test_a_part_too_gets_it_as_one_tensor(pair: Any) -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.attends = nn.Linear(8, 8), Attends()

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.attends(x, x)  # type: ignore[no-any-return]

    train(pair(Inside().double(), no_split=("Attends",)), square)


def test_which_of_the_inputs_are_one_tensor_may_change_from_call_to_call(pair: Any) -> None:
    both = pair(Attends().double())
    x, y = rows(), rows(seed=4)
    for given in ((x, x, y), (x, y, y), (x, y, x)):
        both.step(lambda model, given=given: model(*given).pow(2).mean())
        assert both.relative_difference < EXACT
    assert both.calls == 3


def test_rows_that_are_coupled_only_if_two_inputs_are_one_tensor(pair: Any) -> None:
    both = pair(Between(lambda model, h, x, y, z: h * z - (h * z).mean(0) if y is z else h * x).double())
    x, y = rows(), rows(seed=4)
    for given in ((x, x, y), (x, y, y), (x, x, y)):
        both.step(lambda model, given=given: model(rows(), *given).pow(2).mean())
        assert both.relative_difference < EXACT
    assert both.calls == 2


@pytest.mark.parametrize("value", [2.0, True, "half", None])
def test_an_attribute_of_an_input_is_there(pair: Any, value: Any) -> None:
    def scaled(model: Any, h: Tensor, x: Tensor) -> Tensor:
        return h * {2.0: 2.0, True: 3.0, "half": 0.5, None: 4.0}[getattr(x, "scale", 2.0)]

    both = pair(Between(scaled).double())

    def loss(model: nn.Module) -> Tensor:
        x = rows(seed=4)
        x.scale = value  # type: ignore[attr-defined]
        return model(rows(), x).pow(2).mean()  # type: ignore[no-any-return]

    train(both, loss)
    both.step(lambda model: model(rows(), rows(seed=4)).pow(2).mean())
    assert both.relative_difference < EXACT


def test_an_attribute_decides_whether_rows_are_coupled(pair: Any) -> None:
    both = pair(Between(lambda model, h, x: h - h.mean(0) if getattr(x, "centred", False) else h + x).double())
    for centred in (False, True, False):
        x = rows(seed=4)
        x.centred = centred  # type: ignore[attr-defined]
        both.step(lambda model, x=x: model(rows(), x).pow(2).mean())
        assert both.relative_difference < EXACT
    assert both.calls == 2


def test_an_input_with_an_attribute_that_holds_a_tensor_is_not_cut(pair: Any) -> None:
    both = pair(Between(lambda model, h, x: h * getattr(x, "weights", 1.0)).double())
    for weighted in (False, True, False):
        x = rows(seed=4)
        if weighted:
            x.weights = rows(seed=5)  # type: ignore[attr-defined]
        both.step(lambda model, x=x: model(rows(), x).pow(2).mean())
        assert both.relative_difference < EXACT
    assert both.calls == 2


# Outputs of a region


class States(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Any]:
        h = torch.tanh(self.a(x))
        last = self.b(h)
        last.kind = "last"
        return {"last": last, "states": (h, last), "mask": mask, "x": x}


@BOTH_WAYS
def test_an_output_in_two_places_is_one_tensor(pair: Any, rematerialize: bool) -> None:
    both = pair(States().double(), rematerialize=rematerialize)

    def loss(model: nn.Module) -> Tensor:
        out = model(rows(), torch.ones(10, 1, dtype=torch.float64))
        assert out["last"] is out["states"][-1]
        assert out["last"].kind == "last"
        out["last"][:, :4] = 0
        return out["states"][-1].pow(2).mean() + out["states"][0].mean()  # type: ignore[no-any-return]

    train(both, loss)


@BOTH_WAYS
def test_an_input_that_is_handed_through_comes_back_as_the_tensor_that_was_given(
    pair: Any, rematerialize: bool
) -> None:
    both = pair(States().double(), rematerialize=rematerialize)
    found: list[Tensor] = []

    def loss(model: nn.Module) -> Tensor:
        x, mask = rows().requires_grad_(), torch.ones(10, 1, dtype=torch.float64)
        found.append(x)
        out = model(x, mask)
        assert out["x"] is x
        assert out["mask"] is mask
        if not rematerialize:  # which needs the inputs as they were, and says so
            out["mask"][5:] = 0
        return (out["last"] * mask).pow(2).mean() + (out["x"] * mask).pow(3).mean()  # type: ignore[no-any-return]

    train(both, loss)
    assert same(found[0].grad, found[1].grad)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_identities_without_gradients(pair: Any, mode: Callable[[], Any]) -> None:
    both = pair(States().double())
    x, mask = rows(), torch.ones(10, 1, dtype=torch.float64)
    with mode():
        out = both.model(x, mask)
        assert (out["x"], out["mask"]) == (x, mask)
        assert out["last"] is out["states"][-1]
        assert same(out["last"], both.alone(x, mask)["last"])
    assert both.calls == 1


# Outputs of parts


@BOTH_WAYS
@pytest.mark.parametrize("encoder_first", [True, False])  # so that it is on the device of user code, or on another
def test_a_part_returns_one_tensor_in_two_places(pair: Any, rematerialize: bool, encoder_first: bool) -> None:
    model = net(lambda h, x: [h], tripled, encoder_first=encoder_first)
    train(pair(model, rematerialize=rematerialize, no_split=("Encoder",)), square)


def test_a_part_returns_one_tensor_in_two_places_without_gradients(pair: Any) -> None:
    both = pair(net(lambda h, x: [h], tripled, encoder_first=False), no_split=("Encoder",))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert same(both.model(rows()), both.alone(rows()))
    assert both.calls == 2


def test_replicas_return_one_tensor_in_two_places(pair: Any, devices: str) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = Encoder(lambda h, x: [h])

        def forward(self, x: Tensor) -> Any:
            return self.encoder(x)

    def loss(model: nn.Module) -> Tensor:
        h, states = model(rows())
        assert states[-1] is h
        h.mul_(3)
        return states[-1].pow(2).mean()  # type: ignore[no-any-return]

    both = pair(Outer().double(), {"": dict.fromkeys(resolve_devices(devices).names, 1)})
    train(both, loss)


SHARING = [
    pytest.param(lambda h, x: h[:, :4], tripled, id="a view of another output"),
    pytest.param(lambda h, x: h.view_as(h), tripled, id="all of another output"),
    pytest.param(lambda h, x: x.unsqueeze(1).squeeze(1), lambda h, y, x: (h, y.mul_(3) + x), id="a view of an input"),
    pytest.param(lambda h, x: x[:, 2:], lambda h, y, x: (h + x.mul_(3), y), id="of an input that is changed"),
]


SHARED = pytest.mark.parametrize(("also", "between"), SHARING)


@pytest.fixture
def on_own(devices: str) -> dict[str, str]:
    """The encoder on the device of user code, so that nothing is copied around it."""
    own, other = resolve_devices(devices).names[:2]
    return {"first": own, "encoder": own, "head": other, "side": other}


@SHARED
def test_tensors_that_share_memory_and_are_changed_in_place_are_not_cut(
    pair: Any, on_own: dict[str, str], also: Any, between: Any
) -> None:
    both = pair(net(also, between, encoder_first=False), on_own)
    both.step(square)
    assert both.relative_difference < EXACT
    both.step(square)
    assert both.relative_difference < EXACT
    assert both.calls == 1  # the one that found out, and ran whole in the end
    assert both.engine.reasons == [f"Net is not cut into micro-batches, because {WRITTEN}"]


@SHARED
def test_without_a_change_in_place_they_are_cut(pair: Any, also: Any, between: Any) -> None:
    model = net(also, lambda h, y, x: (h * 3 + x.mean(1, keepdim=True), y * 2), encoder_first=False)
    train(pair(model, no_split=("Encoder",)), square)


def test_a_change_of_one_that_shares_no_memory_is_cut(pair: Any) -> None:
    model = net(lambda h, x: h[:, :4] * 1, lambda h, y, x: (h.mul_(3), y), encoder_first=False)
    train(pair(model, no_split=("Encoder",)), square)


def test_a_forward_that_is_run_again_finds_out_in_the_backward(pair: Any, on_own: dict[str, str]) -> None:
    both = pair(net(lambda h, x: h[:, :4], tripled, encoder_first=False), on_own, rematerialize=True)
    with pytest.raises(RuntimeError, match=f"the backward of Net cannot be cut, because {WRITTEN}"):
        both.step(square)
    both.step(square)
    assert both.relative_difference < EXACT
    assert both.calls == 1


def test_a_whole_step_in_lanes_that_changes_shared_memory_is_refused(pair: Any, on_own: dict[str, str]) -> None:
    class Step(Net):
        def training_step(self, x: Tensor) -> Tensor:
            return self(x).pow(2).mean()  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Step(lambda h, x: h[:, :4], tripled, encoder_first=False).double()
    with torch.no_grad():
        model(rows())
    both = pair(model, on_own)
    stepper = Stepper(both.engine, both.model, "training_step", get_schedule("1f1b"), (), ())
    try:
        stepper.run((rows(),), 1.0)  # a rehearsal, without lanes
        with pytest.raises(UnsupportedError, match=WRITTEN):
            stepper.run((rows(),), 1.0)
    finally:
        stepper.close()


# How structures are taken apart


def test_a_tensor_is_taken_out_of_a_structure_once() -> None:
    x, y = rows(2), rows(3)
    tree = Tree(({"x": x, "pair": (x, y)}, [y], x))
    assert [id(tensor) for tensor in tree.tensors] == [id(x), id(y)]
    first, items, last = tree.build([y, x])
    assert first["x"] is first["pair"][0] is last is y
    assert first["pair"][1] is items[0] is x


def test_where_tensors_stand_again_is_part_of_what_a_structure_is() -> None:
    x, y = rows(2), rows(2)
    assert len({str((tree.form, tree.values)) for tree in map(Tree, ((x, x, y), (x, y, y), (x, y, x)))}) == 3
