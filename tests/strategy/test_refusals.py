"""What cannot work is refused before training, in words that say what to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from lightning_hetero.errors import (
    InfeasiblePlanError,
    InventoryError,
    PlacementError,
    PlanFileError,
    UnsupportedError,
    UsageError,
)
from lightning_hetero.plan import Plan
from lightning_hetero.plan.forecast import DeviceForecast, Forecast
from lightning_hetero.strategy.lightning_pytorch import HeteroStrategy
from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.lightning_module import Classifier, data, difference


@pytest.mark.feature("optimizers: LBFGS over several devices", "refused", "With placement='single' it works.")
def test_lbfgs_over_several_devices(hetero: Any) -> None:
    model = Classifier("mlp", lambda p: torch.optim.LBFGS(p))
    with pytest.raises(UnsupportedError, match=r"LBFGS joins all parameters into one vector.*placement='single'"):
        hetero().fit(model, data())
    assert model.losses == []


@pytest.mark.feature("optimizers: LBFGS over the layers of one device", note="The others may be anywhere.")
@pytest.mark.parametrize("layer", [None, "first", "second", "third"])
def test_lbfgs_on_one_device_works(layer: str | None, plain: Any, hetero: Any) -> None:
    class Partly(Classifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            trained = self.net if layer is None else getattr(self.net, layer)
            return torch.optim.LBFGS(trained.parameters(), max_iter=2)

    alone, other = Partly(), Partly()
    plain(max_epochs=1).fit(alone, data())
    trainer = hetero(placement="single" if layer is None else "round_robin", max_epochs=1)
    trainer.fit(other, data())
    assert len(trainer.strategy.plan.used) == (1 if layer is None else 3)
    assert difference(alone, other) <= 1e-12


@pytest.mark.feature("optimizers: capturable=True with parameters on the CPU", "refused")
def test_capturable_optimizers_with_parameters_on_the_cpu(hetero: Any) -> None:
    model = Classifier("mlp", lambda p: torch.optim.Adam(p, capturable=True))
    with pytest.raises(UnsupportedError, match=r"Adam\(capturable=True\) is for CUDA graphs"):
        hetero().fit(model, data())


@pytest.mark.feature("callbacks: WeightAveraging, EMAWeightAveraging")
@pytest.mark.parametrize("place", [None, "cpu"])
def test_a_copy_of_the_model_that_does_not_fit_beside_the_plan_is_announced(
    place: str | None, accelerator: EmulatedAccelerator, hetero: Any, caplog: pytest.LogCaptureFixture
) -> None:
    devices = [*accelerator.devices[:2], "cpu"]
    for limit in ("4KiB", "1MiB"):
        caplog.clear()
        callback = EMAWeightAveraging(decay=0.9, device=place)
        hetero(devices=devices, strategy={"memory": {devices[0]: limit}}, callbacks=[callback]).fit(
            Classifier(), data()
        )
        said = f"EMAWeightAveraging keeps a copy of the whole model, 3.79 KiB, on {devices[0]}, where the plan leaves"
        assert (said in caplog.text) == (limit == "4KiB" and place is None)
        assert ("Give it a device with more memory, such as device='cpu'." in caplog.text) == (said in caplog.text)


@pytest.mark.feature(
    "devices: models larger than all of them", "refused", "With a table of what is needed and what there is."
)
def test_a_plan_that_does_not_fit_is_refused_before_training_with_a_table(hetero: Any) -> None:
    model = Classifier()
    with pytest.raises(InfeasiblePlanError, match=r"(?s)needed +limit.*too much"):
        hetero(placement="even", strategy={"memory": {"cpu": "1KiB"}}).fit(model, data())
    assert model.losses == []


def test_the_state_of_the_real_optimizer_decides_not_that_of_adam(hetero: Any) -> None:
    """The model needs 9.0 KiB with SGD and 18 KiB with Adam."""
    limits = {"memory": {"cpu": "10KiB"}}
    model = Classifier("mlp", lambda p: torch.optim.SGD(p, lr=0.1))
    trainer = hetero(devices="cpu", placement="auto", strategy=limits)
    trainer.fit(model, data())
    assert trainer.strategy.plan.optimizer_factor == 0.0
    with pytest.raises(InfeasiblePlanError, match="an optimizer with less state, such as SGD"):
        hetero(devices="cpu", placement="auto", strategy=limits).fit(Classifier(), data())


@pytest.mark.feature("devices: models larger than each of them")
def test_a_model_larger_than_any_device_trains_on_several(
    hetero: Any, plain: Any, accelerator: EmulatedAccelerator
) -> None:
    limits = {"memory": {"cpu": "12KiB", accelerator.devices[0]: "12KiB"}}
    alone, spread = Classifier(), Classifier()
    plain().fit(alone, data())
    trainer = hetero(devices=["cpu", accelerator.devices[0]], placement="auto", strategy=limits)
    trainer.fit(spread, data())
    assert len(trainer.strategy.plan.used) == 2
    assert spread.losses == alone.losses


@pytest.mark.feature("guards: num_nodes without a launcher", "refused", "torchrun and SLURM work.")
def test_several_nodes_without_a_launcher(quiet: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"Trainer\(num_nodes=2, strategy='hetero'\).*the only process.*torchrun"):
        pl.Trainer(**quiet, strategy="hetero", num_nodes=2)


@pytest.mark.feature("guards: processes of an unknown launcher", "refused")
def test_several_processes_of_an_unknown_launcher(quiet: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"WORLD_SIZE=2.*no launcher.*cannot find each other.*torchrun"):
        pl.Trainer(**quiet, strategy="hetero")


@pytest.mark.feature("guards: accelerator='hetero' without the strategy", "refused")
def test_the_accelerator_without_the_strategy(quiet: dict[str, Any], accelerator: EmulatedAccelerator) -> None:
    for devices in ("cpu", ["cpu", accelerator.devices[0]]):
        trainer = pl.Trainer(**quiet, accelerator="hetero", devices=devices, max_epochs=1)
        with pytest.raises(UsageError, match=r"needs strategy=\"hetero\""):
            trainer.fit(Classifier(), data())


@pytest.mark.feature("guards: unknown policies and plan files", "refused")
def test_unknown_devices_policies_and_files(quiet: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match="unknown placement policy 'fastest'"):
        HeteroStrategy(placement="fastest")
    with pytest.raises(PlacementError, match="is neither the name of a policy"):
        HeteroStrategy(placement=3)  # type: ignore[arg-type]
    with pytest.raises(InventoryError, match="cuda:99"):
        pl.Trainer(**quiet, strategy=HeteroStrategy(devices="cuda:99"))
    with pytest.raises(InventoryError, match="cuda:99"):
        pl.Trainer(**quiet, strategy="hetero", accelerator="hetero", devices="cuda:99")
    trainer = pl.Trainer(**quiet, strategy=HeteroStrategy(plan=tmp_path / "none.json"), max_epochs=1)
    with pytest.raises(PlanFileError, match=r"none.json' cannot be read"):
        trainer.fit(Classifier(), data())


@pytest.mark.feature("guards: plan files of another model or of other devices", "refused")
def test_a_plan_of_another_model_or_other_devices(hetero: Any, tmp_path: Path) -> None:
    trainer = hetero(max_epochs=1)
    trainer.fit(Classifier(), data())
    path = tmp_path / "plan.json"
    path.write_text(trainer.strategy.plan.to_json())
    with pytest.raises(PlacementError, match=r"made for another model: 'net\.\w+' is a unit of one of the two only"):
        hetero(strategy={"plan": path}).fit(Classifier("recurrent"), data("recurrent"))
    with pytest.raises(PlacementError, match=r"the plan uses .*, which this run does not have: cpu"):
        hetero(devices="cpu", strategy={"plan": path}).fit(Classifier(), data())

    wider = Classifier()
    first = next(module for module in wider.net.modules() if isinstance(module, nn.Linear))
    first.weight = nn.Parameter(torch.cat([first.weight, first.weight]))
    with pytest.raises(PlacementError, match=r"made for another model: its stage with 'net\.\w+' has \d+ parameters"):
        hetero(strategy={"plan": path}).fit(wider, data())


def test_a_plan_that_was_predicted_to_need_more_than_there_is_here_says_so(
    hetero: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = hetero(max_epochs=1)
    trainer.fit(Classifier(), data())
    plan: Plan = trainer.strategy.plan
    name = plan.used[-1].name
    device = DeviceForecast(device=name, busy_s=1.0, transfer_s=0.0, memory_bytes=1 << 60, limit_bytes=1 << 61)
    path = tmp_path / "plan.json"
    path.write_text(
        replace(plan, forecast=Forecast(step_s=1.0, devices=(device,), bottleneck="", estimated=True)).to_json()
    )
    again = hetero(max_epochs=1, strategy={"plan": path})
    again.fit(Classifier(), data())
    text = f"it was predicted to need 1024 PiB on {name}, which has "
    assert text in " ".join(again.strategy.plan.notes)
    assert text in caplog.text


@pytest.mark.feature("modules: parameters on the meta device", "refused")
def test_parameters_without_values(hetero: Any) -> None:
    class Meta(Classifier):
        def __init__(self) -> None:
            super().__init__()
            with torch.device("meta"):
                self.net.second = nn.Linear(16, 16)

    with pytest.raises(PlacementError, match=r"Linear.weight is on the meta device"):
        hetero().fit(Meta(), data())
