"""Which devices a Trainer means, however they are written."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator

from lightning_hetero.errors import InventoryError
from lightning_hetero.strategy.lightning_pytorch import HeteroAccelerator, HeteroStrategy
from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.lightning_module import Classifier, data


def names(trainer: pl.Trainer) -> tuple[str, ...]:
    strategy = trainer.strategy
    assert isinstance(strategy, HeteroStrategy)
    assert strategy.inventory is not None
    return strategy.inventory.names


def test_the_plain_name_takes_every_device_of_the_machine(
    quiet: dict[str, Any], accelerator: EmulatedAccelerator
) -> None:
    for options in ({}, {"accelerator": "auto", "devices": "auto"}, {"accelerator": "cpu", "devices": 1}):
        assert names(pl.Trainer(**quiet, strategy="hetero", **options)) == (*accelerator.devices, "cpu")


@pytest.mark.parametrize("form", ["text", "list", "mapping"])
def test_devices_of_the_trainer_and_of_the_strategy_mean_the_same(
    form: str, quiet: dict[str, Any], accelerator: EmulatedAccelerator
) -> None:
    wanted = ("cpu", accelerator.devices[1])
    devices: Any = {"text": ",".join(wanted), "list": list(wanted), "mapping": dict.fromkeys(wanted)}[form]
    by_trainer = pl.Trainer(**quiet, strategy="hetero", accelerator="hetero", devices=devices)
    by_strategy = pl.Trainer(**quiet, strategy=HeteroStrategy(devices=devices))
    assert names(by_trainer) == names(by_strategy) == wanted


def test_the_strategy_wins_over_the_trainer(quiet: dict[str, Any], accelerator: EmulatedAccelerator) -> None:
    strategy = HeteroStrategy(devices="cpu")
    assert names(pl.Trainer(**quiet, strategy=strategy, accelerator="hetero", devices=accelerator.devices[0])) == (
        "cpu",
    )


@pytest.mark.feature("programs: PL_TRAINER_STRATEGY=hetero, without a change of code")
def test_the_environment_gives_the_plain_name_its_options(
    quiet: dict[str, Any], accelerator: EmulatedAccelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PL_TRAINER_STRATEGY", "hetero")
    monkeypatch.setenv("HETERO_DEVICES", f"{accelerator.devices[0]},cpu")
    monkeypatch.setenv("HETERO_PLACEMENT", "even")
    trainer = pl.Trainer(**quiet, max_epochs=1)
    assert names(trainer) == (accelerator.devices[0], "cpu")
    trainer.fit(Classifier(), data())
    assert trainer.strategy.plan.policy == "even"


def test_lightnings_accelerator_is_kept_where_it_serves_the_root(
    quiet: dict[str, Any], accelerator: EmulatedAccelerator
) -> None:
    on_cpu = pl.Trainer(**quiet, strategy=HeteroStrategy(devices=["cpu", accelerator.devices[0]]))
    elsewhere = pl.Trainer(**quiet, strategy=HeteroStrategy(devices=[accelerator.devices[0], "cpu"]))
    assert isinstance(on_cpu.accelerator, CPUAccelerator)
    assert isinstance(elsewhere.accelerator, HeteroAccelerator)
    assert str(elsewhere.strategy.root_device) == accelerator.devices[0]


@pytest.mark.feature(
    "loops: trainer.num_devices and trainer.world_size",
    note="Those of one device; of all processes, if there are several.",
)
def test_to_lightning_the_strategy_has_one_device(quiet: dict[str, Any]) -> None:
    trainer = pl.Trainer(**quiet, strategy="hetero")
    assert (trainer.num_devices, trainer.world_size, trainer.num_nodes) == (1, 1, 1)
    assert trainer.is_global_zero
    assert trainer.strategy.parallel_devices is None


@pytest.mark.feature("guards: one HeteroStrategy object in one run after the other")
def test_one_strategy_serves_several_trainers(quiet: dict[str, Any]) -> None:
    strategy = HeteroStrategy(devices="cpu")
    for _ in range(2):
        pl.Trainer(**quiet, strategy=strategy, max_epochs=1).fit(Classifier(), data())


def test_memory_limits_are_kept(quiet: dict[str, Any]) -> None:
    trainer = pl.Trainer(**quiet, strategy=HeteroStrategy(devices="cpu", memory={"cpu": "1GiB"}))
    assert trainer.strategy.inventory["cpu"].memory_bytes == 1 << 30
    with pytest.raises(InventoryError, match="device 'gpu:7' is not available"):
        pl.Trainer(**quiet, strategy=HeteroStrategy(devices="cpu", memory={"gpu:7": "1GiB"}))


@pytest.mark.feature("programs: pytorch_lightning and lightning.pytorch")
def test_the_other_namespace_has_the_same_strategy(quiet: dict[str, Any]) -> None:
    import pytorch_lightning

    from lightning_hetero.strategy.pytorch_lightning import HeteroStrategy as Other

    trainer = pytorch_lightning.Trainer(**quiet, strategy="hetero")
    assert type(trainer.strategy) is Other
    assert isinstance(trainer.strategy, pytorch_lightning.strategies.SingleDeviceStrategy)


def test_the_root_is_the_current_device_during_a_run_and_no_longer(
    hetero: Any, accelerator: EmulatedAccelerator
) -> None:
    class Looks(Classifier):
        seen: list[int] = []  # noqa: RUF012

        def on_train_start(self) -> None:
            self.seen.append(module.current_device())

    first, second = accelerator.devices[:2]
    module = torch.get_device_module(first)
    assert module.current_device() == 0
    for devices in ([second, first, "cpu"], ["cpu", second], [first, "cpu"]):
        hetero(devices=devices, max_epochs=1).fit(Looks(), data())
        assert module.current_device() == 0
    assert Looks.seen == [1, 0, 0]
