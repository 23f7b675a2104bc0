"""Loops with Fabric over a GPU and the CPU give the numbers of either of them alone."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric

from lightning_hetero import FabricStrategy
from lightning_hetero.testing.fabric_loop import Run, net, train
from lightning_hetero.testing.lightning_module import data

BOUND = 1e-12  # in float64, with SGD


@pytest.fixture(autouse=True)
def _collect() -> Iterator[None]:
    """Fabric never says that a run is over: what a model holds goes with the model."""
    yield
    gc.collect()


@pytest.fixture
def singles(gpu: Any) -> list[Callable[..., Fabric]]:
    """Plain Fabric on the CPU, and on the GPU if it is a real one."""
    kinds = ["cpu", *(["cuda"] if gpu.is_real else [])]
    return [lambda kind=kind, **options: Fabric(accelerator=kind, devices=1, **options) for kind in kinds]


def over(places: Any, **strategy: Any) -> Fabric:
    """Ours, with a border at every unit."""
    chosen = {"placement": "round_robin", "verbose": False, "hang_timeout_s": 60.0, **strategy}
    return Fabric(strategy=FabricStrategy(devices=places, **chosen))


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("name", ["mlp", "convnet", "tied_transformer"])
def test_a_loop(name: str, micro_batches: int, places: list[str], singles: Any) -> None:
    spread = train(over(places, micro_batches=micro_batches), name)
    assert {stage.device for stage in spread.fabric.strategy.plan_of(spread.model).stages} == set(places)
    for fabric in singles:
        assert spread.differs_from(train(fabric(), name)) <= BOUND


def test_by_name_with_devices_of_the_accelerator(
    places: list[str], singles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HETERO_PLACEMENT", "round_robin")
    spread = train(Fabric(strategy="hetero", accelerator="hetero", devices=places))
    assert str(spread.fabric.device) == places[0]
    assert {str(parameter.device) for parameter in spread.model.parameters()} == set(places)
    for fabric in singles:
        assert spread.differs_from(train(fabric())) <= BOUND


def test_replicas(places: list[str], singles: Any) -> None:
    spread = train(over(places, placement={"": dict(zip(places, (3, 1), strict=True))}))
    for fabric in singles:
        assert spread.differs_from(train(fabric())) <= BOUND


def test_checkpoints_go_from_one_to_the_other(places: list[str], singles: Any, tmp_path: Any) -> None:
    spread = train(over(places))
    state = {"model": spread.model, "optimizer": spread.optimizer}
    spread.fabric.save(tmp_path / "it.ckpt", state)
    spread.go_on(data())
    for fabric in singles:
        run = Run.of(fabric(), net())
        run.fabric.load(tmp_path / "it.ckpt", {"model": run.model, "optimizer": run.optimizer})
        run.losses[:] = spread.losses[:5]
        assert spread.differs_from(run.go_on(data())) <= BOUND


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "16-true"])
def test_precision_is_entered_on_both(precision: str, places: list[str]) -> None:
    chosen = FabricStrategy(devices=places, placement="round_robin", verbose=False)
    fabric = Fabric(strategy=chosen, precision=precision)
    model = net().float()
    seen: set[tuple[str, torch.dtype]] = set()
    for layer in model.children():
        layer.register_forward_hook(lambda module, args, out: seen.add((out.device.type, out.dtype)))
    run = Run.of(fabric, model)
    for x, y in fabric.setup_dataloaders(data()):
        run.optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(run.model(x.float()), y)
        fabric.backward(loss)
        run.optimizer.step()
        run.losses.append(loss.item())
    half = torch.half if precision == "16-true" else torch.bfloat16
    assert seen == {(torch.device(place).type, half) for place in places}
    assert all(torch.tensor(run.losses).isfinite())
