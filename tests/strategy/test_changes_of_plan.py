"""A run changes its plan while user code holds graphs, parameters and optimizers. Results are those of one device."""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.optimizer import _global_optimizer_pre_hooks

from lightning_hetero.placement import Placement, Problem
from lightning_hetero.strategy.watch import Watch
from lightning_hetero.testing.lightning_module import Classifier, adam, data, difference

ROUNDING = 1e-12
EMULATED = "cpu@speed=2,cpu@speed=1,cpu@speed=1"
TURN = 4  # steps before each change of plan


class Rotating:
    """Unit by unit on the devices in turn, and on other ones whenever it is asked."""

    name = "rotating"

    def __init__(self) -> None:
        self.asked = 0

    def place(self, problem: Problem) -> Placement:
        """Begin one device further than before."""
        self.asked += 1
        devices = [device.name for device in problem.inventory.trainable]
        return Placement(
            device_of={name: devices[(i + self.asked) % len(devices)] for i, name in enumerate(problem.graph.names)}
        )


class TakesTurns(Watch):
    """In the place of the first steps: another plan every few steps."""

    def __init__(self, planning: Any, first: Any, factor: float, **options: Any) -> None:
        super().__init__(first)
        self._plan_anew = lambda: planning.with_optimizer(factor)
        self.steps = 0

    def border(self, module: nn.Module) -> Any:
        """Hand over the next plan when its turn comes."""
        self.steps += 1
        return self._plan_anew() if self.steps % TURN == 0 else None


@pytest.fixture
def rotating() -> Rotating:
    return Rotating()


@pytest.fixture
def turning(hetero: Any, rotating: Rotating, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes Trainers whose plan changes every few steps."""
    monkeypatch.setattr("lightning_hetero.strategy.core.FirstSteps", TakesTurns)
    monkeypatch.setattr("lightning_hetero.strategy.core.can_gain", lambda *_: True)
    return lambda **options: hetero(placement=rotating, max_epochs=1, **options)


class Net(Classifier):
    """Notes where its first weight is in each step."""

    def __init__(self, make_optimizer: Any = adam) -> None:
        super().__init__(make_optimizer=make_optimizer)
        self.places: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.places.append(str(next(self.parameters()).device))
        return super().training_step(batch, batch_idx)

    @property
    def has_moved(self) -> bool:
        return len(set(self.places)) > 1


def both(make: Callable[[], Net], plain: Any, turning: Any, **options: Any) -> Net:
    """Train on one device and with changes of plan, and compare. Returns the second one."""
    alone, turned = make(), make()
    plain(max_epochs=1).fit(alone, data(rows=96, batch_size=4))
    turning(**options).fit(turned, data(rows=96, batch_size=4))
    assert difference(alone, turned) <= ROUNDING
    return turned


class Sums(Net):
    """One backward for several batches."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.kept: list[Tensor] = []
        self.total: Any = 0

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.keep(super().training_step(batch, batch_idx))
        if batch_idx % 5 == 4:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.total + sum(self.kept))
            optimizer.step()
            self.kept.clear()
            self.total = 0

    def keep(self, loss: Tensor) -> None:
        self.total = self.total + loss


class SumsInAList(Sums):
    def keep(self, loss: Tensor) -> None:
        self.kept.append(loss)


@pytest.mark.parametrize("options", [{}, {"devices": EMULATED, "strategy": {"micro_batches": 2}}], ids=["whole", "cut"])
@pytest.mark.parametrize("make", [Sums, SumsInAList])
def test_a_plan_changes_between_two_backwards_and_not_between_a_forward_and_its_backward(
    make: type[Sums], options: dict[str, Any], plain: Any, turning: Any, rotating: Rotating
) -> None:
    turned = both(make, plain, turning, **options)
    assert rotating.asked > 2
    assert turned.has_moved or "devices" in options


class Keeps(Net):
    """Keeps losses as they are to the end of the epoch, and something else of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        self.weights: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx) + sum(0.1 * weight.square().sum() for weight in self.weights)
        self.kept.append(loss)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("mean", torch.stack(self.kept).mean())
        self.kept.clear()


class Clamps(Keeps):
    def on_fit_start(self) -> None:
        for parameter in self.parameters():
            parameter.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))


class Penalises(Keeps):
    def on_fit_start(self) -> None:
        self.weights = [parameter for parameter in self.parameters() if parameter.dim() > 1]


class Holds(Net):
    """Asks for its parameters by weak references."""

    def on_fit_start(self) -> None:
        self.references = [weakref.ref(parameter) for parameter in self.parameters()]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        for reference in self.references:
            weight: Any = reference()
            loss = loss + 0.1 * weight.square().sum()
        return loss


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (Clamps, "code of yours holds a graph with net.first.weight in it from one step to the next"),
        (Penalises, "code of yours holds a graph with net.first.weight in it from one step to the next"),
        (Holds, "something beside the model holds net.first.weight, such as a weak reference to it"),
    ],
)
def test_a_plan_stays_where_parameters_are_held_all_the_time_and_says_why(
    make: type[Net],
    why: str,
    plain: Any,
    turning: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("lightning_hetero.runtime.held._MOST_TRIES", 5)
    with caplog.at_level(logging.WARNING, logger="lightning_hetero"):
        turned = both(make, plain, turning)
    assert not turned.has_moved
    said = [record.message for record in caplog.records if "the present plan stays" in record.message]
    assert len(said) == 1
    assert why in said[0]


class PrunedAndRecurrent(Net):
    """Has tensors that hooks of torch make of parameters, and weak references that torch keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Unflatten(1, (1, 8)), First(8, 8), nn.Flatten(), nn.Linear(8, 4))
        prune.l1_unstructured(self.net[0], "weight", amount=0.5)
        self.net.double()
        self.net[0](torch.zeros(1, 8, dtype=torch.float64))


class First(nn.LSTM):
    """The first of its outputs only."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[0]  # type: ignore[no-any-return]


def test_what_torch_itself_holds_does_not_keep_a_plan(plain: Any, turning: Any) -> None:
    assert both(PrunedAndRecurrent, plain, turning).has_moved


class Lookahead(torch.optim.Optimizer):
    """Has the state of another one inside, and one of its own."""

    def __init__(self, parameters: Any) -> None:
        self.inner = torch.optim.Adam(parameters, lr=1e-2)
        self.param_groups, self.defaults = self.inner.param_groups, self.inner.defaults
        self.state: Any = defaultdict(dict)
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()

    def step(self, closure: Any = None) -> Any:
        loss = self.inner.step(closure)
        for parameter in self.param_groups[0]["params"]:
            slow = self.state[parameter].setdefault("slow", parameter.detach().clone())
            parameter.data.add_(slow).mul_(0.5)
            slow.copy_(parameter.data)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)


class Own(Net):
    """Steps an optimizer of its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(lambda _: None)
        self.automatic_optimization = False
        self.options = options

    def on_fit_start(self) -> None:
        self.own = torch.optim.Adam(self.parameters(), lr=1e-2, **self.options)

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        loss = super().training_step(batch, batch_idx)
        self.own.zero_grad()
        self.manual_backward(loss)
        self.own.step()


@pytest.mark.filterwarnings("ignore:.*returned `None`, this fit will run with no optimizer")
@pytest.mark.parametrize(
    "make",
    [
        partial(Net, torch.optim.ASGD),
        partial(Net, partial(torch.optim.ASGD, foreach=True)),
        partial(Net, Lookahead),
        Own,
        partial(Own, foreach=True),
        partial(Own, fused=True),
    ],
    ids=["ASGD", "ASGD foreach", "inside of another one", "own", "own foreach", "own fused"],
)
def test_the_state_of_any_optimizer_follows_its_parameter(make: Callable[[], Net], plain: Any, turning: Any) -> None:
    turned = both(make, plain, turning)
    assert turned.has_moved
    assert not _global_optimizer_pre_hooks  # it is looked at during a run only
    if isinstance(turned, Own):
        assert {t.device.type for state in turned.own.state.values() for t in state.values()} == {"cpu"}


def test_a_backward_after_the_run_of_what_was_cut_in_it_is_an_error_that_says_so(hetero: Any) -> None:
    class KeepsTheLast(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.last = super().training_step(batch, batch_idx)
            return self.last.detach().requires_grad_()

    module = KeepsTheLast()
    hetero(devices=EMULATED, strategy={"micro_batches": 2}, max_epochs=1).fit(module, data())
    with pytest.raises(RuntimeError, match="whose threads have ended since: the run is over"):
        module.last.backward()
