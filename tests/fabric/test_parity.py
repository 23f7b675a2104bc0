"""The contract, for Fabric: a loop over several devices gives the numbers of one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from lightning_hetero.testing.fabric_loop import Run, loss_of, net, sgd, train
from lightning_hetero.testing.lightning_module import Classifier, adam, data
from lightning_hetero.testing.models import MODELS

PARITY = 1e-12  # in float64, of every number on one device and over several

MakeFabric = Callable[..., Fabric]


def check(one: Run, other: Run) -> None:
    """Both runs came to the same numbers, and the second was spread."""
    assert other.was_spread
    assert other.differs_from(one) <= PARITY


@pytest.mark.feature("Fabric: setup, setup_dataloaders, backward")
@pytest.mark.parametrize("name", MODELS)
def test_a_loop_gives_the_numbers_of_one_device(name: str, alone: MakeFabric, hostile: MakeFabric) -> None:
    check(train(alone(), name), train(hostile(), name))


def test_optimizers_with_state_keep_it_beside_their_parameters(alone: MakeFabric, hostile: MakeFabric) -> None:
    spread = train(hostile(), make_optimizer=adam)
    check(train(alone(), make_optimizer=adam), spread)
    for parameter, state in spread.optimizer.state.items():
        assert state["exp_avg"].device == parameter.device


@pytest.mark.feature("Fabric: clip_gradients by norm and by value")
@pytest.mark.parametrize(
    "limit", [{"max_norm": 0.05}, {"clip_val": 0.01}, {"max_norm": 0.05, "norm_type": "inf"}], ids=str
)
def test_gradients_are_clipped_as_on_one_device(limit: dict[str, Any], alone: MakeFabric, hostile: MakeFabric) -> None:
    norms: list[float] = []

    def clip(run: Run) -> None:
        norm = run.fabric.clip_gradients(run.model, run.optimizer, **limit)
        norms.append(0.0 if norm is None else norm.item())

    check(train(alone(), after_backward=clip), train(hostile(), after_backward=clip))
    assert norms[:5] == pytest.approx(norms[5:], abs=PARITY)


@pytest.mark.feature("Fabric: no_backward_sync")
def test_gradients_are_accumulated_as_on_one_device(alone: MakeFabric, hostile: MakeFabric) -> None:
    def accumulate(run: Run) -> Run:
        for index, batch in enumerate(run.fabric.setup_dataloaders(data())):
            is_last = index % 2 == 1
            with run.fabric.no_backward_sync(run.model, enabled=not is_last):
                run.fabric.backward(loss_of(run.model, batch) / 2)
            if is_last:
                run.optimizer.step()
                run.optimizer.zero_grad()
        return run

    check(accumulate(Run.of(alone(), net())), accumulate(Run.of(hostile(), net())))


@pytest.mark.feature("Fabric: several models and optimizers")
def test_two_models_with_an_optimizer_each_train_as_on_one_device(alone: MakeFabric, hostile: MakeFabric) -> None:
    def rivals(fabric: Any) -> tuple[Run, Run]:
        makers, judges = (
            Run.of(fabric, net()),
            Run.of(fabric, nn.Sequential(net(), nn.Tanh(), nn.Linear(4, 1).double())),
        )
        for batch, _ in fabric.setup_dataloaders(data()):
            makers.optimizer.zero_grad()
            made = torch.cat([makers.model(batch), makers.model(batch)], dim=1)
            fabric.backward(-judges.model(made).mean())
            makers.optimizer.step()
            judges.optimizer.zero_grad()
            fabric.backward(judges.model(made.detach()).mean() - judges.model(batch).mean())
            judges.optimizer.step()
        return makers, judges

    for one, other in zip(rivals(alone()), rivals(hostile()), strict=True):
        check(one, other)


@pytest.mark.feature("Fabric: LightningModules and their training_step")
def test_a_lightning_module_runs_its_own_steps(alone: MakeFabric, hostile: MakeFabric) -> None:
    class Silent(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return loss_of(self, batch)

    def fit(fabric: Any) -> Run:
        run = Run.of(fabric, Silent())
        assert isinstance(run.model.module, pl.LightningModule)
        assert run.model.module.device == fabric.device
        for index, batch in enumerate(fabric.setup_dataloaders(data())):
            loss = run.model.training_step(batch, index)
            run.optimizer.zero_grad()
            fabric.backward(loss)
            run.optimizer.step()
        return run

    check(fit(alone()), fit(hostile()))


def test_schedulers_go_through_setup(alone: MakeFabric, hostile: MakeFabric) -> None:
    def fit(fabric: Any) -> Run:
        model = net()
        optimizer = sgd(model.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        wrapped, wrapped_optimizer, scheduler = fabric.setup(model, optimizer, scheduler=scheduler)
        run = Run(fabric, wrapped, wrapped_optimizer, [])
        for _ in range(3):
            run.go_on(data())
            scheduler.step()
        return run

    check(fit(alone()), fit(hostile()))


def test_user_code_may_mix_parameters_of_several_devices(alone: MakeFabric, hostile: MakeFabric) -> None:
    def fit(fabric: Any) -> Run:
        run = Run.of(fabric, net())
        for batch in fabric.setup_dataloaders(data()):
            run.optimizer.zero_grad()
            penalty = sum(parameter.pow(2).sum() for parameter in run.model.parameters())
            fabric.backward(loss_of(run.model, batch) + 0.01 * penalty)
            run.optimizer.step()
        return run

    check(fit(alone()), fit(hostile()))


def test_evaluation_without_gradients_gives_the_outputs_of_one_device(alone: MakeFabric, hostile: MakeFabric) -> None:
    outputs = []
    for fabric in (alone(), hostile()):
        model = fabric.setup_module(net("convnet")).eval()
        with torch.no_grad():
            outputs += [model(batch[0]) for batch in fabric.setup_dataloaders(data("convnet"))]
        assert outputs[-1].device == fabric.device
    halves = outputs[: len(outputs) // 2], outputs[len(outputs) // 2 :]
    assert max((a.cpu() - b.cpu()).abs().max().item() for a, b in zip(*halves, strict=True)) <= PARITY


@pytest.mark.feature("Fabric: micro-batches, with the same results")
def test_calls_of_a_model_are_cut_into_micro_batches(hostile: MakeFabric, caplog: pytest.LogCaptureFixture) -> None:
    fabric = hostile(strategy={"micro_batches": 2})
    run = Run.of(fabric, net())
    run.go_on(data())  # the first calls are trials
    strategy: Any = fabric.strategy
    with caplog.at_level(logging.WARNING), strategy.recording(run.model) as recording:
        run.go_on(data())
    assert {action.micro_batch for action in recording.timeline.spans} == {0, 1}
    assert not caplog.records


@pytest.mark.feature("Fabric: activation checkpointing and rematerialization")
@pytest.mark.parametrize(
    "option", [{"rematerialize": True, "micro_batches": 2}, {"activation_checkpointing": True}], ids=str
)
def test_forwards_that_run_again_change_nothing(option: dict[str, Any], alone: MakeFabric, hostile: MakeFabric) -> None:
    check(train(alone()), train(hostile(strategy=option)))
