"""Trusted devices in a run: what user code does after the plan was made does not bring the batch elsewhere."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hetero.errors import PlacementError
from lightning_hetero.placement import Placement, Problem
from lightning_hetero.placement.constraints import rules_for
from lightning_hetero.runtime.confinement import Confinement
from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.lightning_module import difference

pytestmark = pytest.mark.usefixtures("devices_measured_once", "quick_measuring")
ROUNDING = 1e-12
EMULATED = "cpu@speed=1,cpu@speed=1"
Use = Callable[["Chain", Tensor], Tensor]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class AsFarAwayAsItMay:
    """The last device that the rules leave to a unit."""

    name = "as_far_away_as_it_may"

    def place(self, problem: Problem) -> Placement:
        names = [device.name for device in problem.candidates]
        rules = rules_for(problem)
        may = {
            unit: [name for name in names if all(name in rule.devices for rule in rules[unit])]
            for unit in problem.graph.names
        }
        return Placement(device_of={unit: devices[-1] for unit, devices in may.items()})


def as_trained(model: Chain, x: Tensor) -> Tensor:
    made: Tensor = model.c(model.b(model.a(x)))
    return made


class Chain(pl.LightningModule):
    """Three layers, each fed by the one before in training; `in_validation` and `later` may do otherwise."""

    def __init__(self, in_validation: Use = as_trained, later: Use = as_trained) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(4, 4).double() for _ in range(3))
        self.in_validation, self.later = in_validation, later
        self.validated: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return (self.later if self.global_step >= 8 else as_trained)(self, x)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        made: Tensor = self(batch[0])
        return made.square().mean()

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.validated.append(self.in_validation(self, batch[0]).detach().clone())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(batches: int = 12) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8 * batches, 4, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x), batch_size=8)


Run = Callable[..., Any]


@pytest.fixture(params=["emulated", "accelerator"])
def run(request: pytest.FixtureRequest, hetero: Any, accelerator: EmulatedAccelerator) -> Run:
    """Trains, and says on which devices units are that are not trusted."""
    devices = EMULATED if request.param == "emulated" else ["cpu", accelerator.devices[0]]
    root = "emulated:0" if request.param == "emulated" else "cpu"

    def fit(module: Chain, micro_batches: int = 1, **options: Any) -> set[str]:
        strategy = {
            "profile": "always",
            "constraints": {"trusted": [root]},
            "micro_batches": micro_batches,
            "objective": "peak_memory",  # so no clock decides for the first plan
        }
        trainer = hetero(
            devices, AsFarAwayAsItMay(), strategy, **{"max_epochs": 1, "num_sanity_val_steps": 0, **options}
        )
        trainer.fit(module, loader(), loader(2))
        return {unit for unit, device in trainer.strategy.plan.device_of.items() if device != root}

    return fit


def test_what_sees_work_of_others_only_may_go_anywhere(run: Run, plain: Any) -> None:
    """So the other tests here have something to find."""
    alone, spread = Chain(), Chain()
    plain(max_epochs=1).fit(alone, loader(), loader(2))
    assert run(spread) == {"b", "c"}
    assert difference(alone, spread) <= ROUNDING


USES: Mapping[str, Use] = MappingProxyType(
    {
        "itself": lambda model, x: model.c(model.b(x)),
        "a view": lambda model, x: model.c(model.b(x[2:].view(-1, 4))),
        "by name": lambda model, x: model.c(model.b(input=x)),
    }
)


@pytest.mark.parametrize("use", USES.values(), ids=list(USES))
def test_a_unit_that_gets_the_batch_in_the_validation_before_training_stays_trusted(
    use: Use, run: Run, plain: Any
) -> None:
    alone, spread = Chain(use), Chain(use)
    plain(max_epochs=1, num_sanity_val_steps=1).fit(alone, loader(), loader(2))
    assert run(spread, num_sanity_val_steps=1) == {"c"}
    assert difference(alone, spread) <= ROUNDING
    assert all(torch.allclose(*pair) for pair in zip(alone.validated, spread.validated, strict=True))


TEXT = (
    r"'(b|c)' on '\S+' was about to be called with a part of the batch, which only trusted devices \(\S+\) may have\. "
    r"It was not in the steps for which the plan was made, .* Nothing was copied\. Pin the module: constraints="
)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("use", USES.values(), ids=list(USES))
def test_a_unit_that_gets_the_batch_in_validation_only_ends_the_run_before_anything_leaves(
    use: Use, micro_batches: int, run: Run
) -> None:
    module = Chain(in_validation=use)
    with pytest.raises(PlacementError, match=TEXT):
        run(module, micro_batches)
    assert module.validated == []


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_unit_that_gets_the_batch_from_some_step_on_ends_the_run_too(micro_batches: int, run: Run) -> None:
    module = Chain(later=lambda model, x: model.c(model.a(x)) + model.c(x))
    with pytest.raises(PlacementError, match=TEXT):
        run(module, micro_batches)
    assert module.global_step == 8


def test_a_batch_that_a_hook_changes_in_place_is_still_the_batch(run: Run) -> None:
    class Augmented(Chain):
        def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
            return [batch[0].mul_(2.0) if self.training else batch[0] * 2.0]

    for later, in_validation in ((True, False), (False, True)):
        use = (lambda model, x: model.c(x), as_trained)
        with pytest.raises(PlacementError, match=TEXT):
            run(Augmented(use[not in_validation], use[not later]))


def test_a_unit_that_works_in_place_hands_on_its_own_work(run: Run, plain: Any) -> None:
    class InPlace(Chain):
        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.c(self.a(x))
            return made

    class Adds(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(self.bias)

    def module() -> Chain:
        chain = InPlace()
        chain.a = Adds(4, 4).double()
        chain.a.weight.requires_grad_(False)
        return chain

    torch.manual_seed(0)
    alone = module()
    spread = copy.deepcopy(alone)
    plain(max_epochs=1).fit(alone, loader(), loader(2))
    assert run(spread) == {"c"}
    assert difference(alone, spread) <= ROUNDING


def test_what_own_code_makes_of_the_batch_in_validation_is_not_seen(run: Run) -> None:
    """As the documentation says: only the batch itself is known then."""
    module = Chain(in_validation=lambda model, x: model.c(x * 2.0))
    assert run(module) == {"b", "c"}
    assert len(module.validated) == 2


# Confinement by itself


class Slots:
    __slots__ = ("x",)

    def __init__(self, x: Tensor) -> None:
        self.x = x


class Plain:
    def __init__(self, x: Tensor) -> None:
        self.inner = {"x": [x]}


@pytest.mark.parametrize(
    "around", [lambda x: x, lambda x: (x,), lambda x: {"x": {x}}, Slots, Plain, lambda x: MappingProxyType({1: x[1:]})]
)
def test_the_batch_is_found_in_any_object(around: Callable[[Tensor], Any]) -> None:
    confinement, x = Confinement(["cpu"]), torch.ones(4, 4)
    confinement.watch([{"x": x}])
    assert confinement.holds(around(x))
    assert not confinement.holds(around(x.clone()))


def test_what_was_changed_in_place_is_no_longer_the_batch_until_a_step_gets_it() -> None:
    confinement, x = Confinement(["cpu"]), torch.ones(4, 4)
    confinement.watch(x)
    x.mul_(2.0)
    assert not confinement.holds(x)
    confinement.watch(x)
    assert confinement.holds(x[1:].detach())


def test_memory_that_is_used_again_is_not_taken_for_a_batch_that_is_gone() -> None:
    confinement = Confinement(["cpu"])
    for _ in range(50):
        confinement.watch(torch.ones(1000))
        assert not confinement.holds([torch.ones(1000) for _ in range(4)])
    assert len(confinement._memory) <= 2


def test_an_argument_that_leads_to_itself_has_an_end() -> None:
    confinement, circle = Confinement(["cpu"]), Plain(torch.ones(2))
    circle.inner["circle"] = circle  # type: ignore[assignment]
    confinement.watch(torch.ones(2))
    assert not confinement.holds(circle)


def test_tensors_without_memory_of_their_own_are_no_error() -> None:
    confinement = Confinement(["cpu"])
    sparse = torch.eye(3).to_sparse()
    confinement.watch([sparse, torch.ones(2, device="meta")])
    assert not confinement.holds([sparse, torch.ones(2)])


@pytest.mark.parametrize("how", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_knows_the_devices_and_no_batch(how: Callable[[Confinement], Confinement]) -> None:
    confinement, x = Confinement(["cpu"]), torch.ones(4)
    confinement.watch(x)
    twin = how(confinement)
    twin.check("unit", "elsewhere", x)
    with pytest.raises(PlacementError, match="'unit' on 'elsewhere'"):
        confinement.check("unit", "elsewhere", x)
