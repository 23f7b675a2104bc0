"""What users of Lightning asked for in its issue threads, each as they would write it now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_hetero import HeteroStrategy, InfeasiblePlanError
from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.lightning_module import Classifier, data, difference

PARITY = 1e-12
Make = Callable[..., pl.Trainer]


@pytest.fixture
def two(accelerator: EmulatedAccelerator) -> Any:
    """Two accelerators, without limits afterwards."""
    yield accelerator.devices[:2]
    accelerator.reset()


@pytest.fixture
def alike(plain: Make, quiet: dict[str, Any]) -> Any:
    """Trains twice, with and without the strategy; gives the strategy and the module that it trained."""

    def run(make: Callable[[], Any], batches: Any, **strategy: Any) -> tuple[HeteroStrategy, Any]:
        chosen = HeteroStrategy(verbose=False, **strategy)
        models = []
        for trainer in (plain(), pl.Trainer(**{**quiet, "max_epochs": 2, "strategy": chosen})):
            torch.manual_seed(0)
            models.append(make())
            trainer.fit(models[-1], batches)
        assert difference(*models) <= PARITY
        return chosen, models[-1]

    return run


def devices_of(strategy: Any, prefix: str) -> set[str]:
    return {device for unit, device in strategy.plan.device_of.items() if unit.startswith(prefix)}


@pytest.mark.feature("asked for: pipelines for unmodified modules, with the use of each device (17180)")
def test_a_pipeline_for_an_unmodified_module(alike: Any) -> None:
    strategy, _ = alike(Classifier, data(), devices="cpu@speed=1,cpu@speed=1", placement="even", micro_batches=2)
    assert strategy.plan.execution.micro_batches == 2
    assert len(strategy.plan.used) == 2


@pytest.mark.feature("asked for: GPUs of different memory are filled by their size (5847)")
@pytest.mark.feature("asked for: models that fit on no device train without code for it (50, 774)")
def test_a_model_larger_than_each_of_two_unequal_devices(quiet: dict[str, Any], accelerator: Any, two: Any) -> None:
    need = 4 * sum(p.numel() * p.element_size() for p in Classifier().parameters())  # gradients, and Adam's state
    limits = {two[0]: f"{int(0.35 * need)}B", two[1]: f"{int(0.9 * need)}B"}
    model = Classifier()
    for devices, fits in (([two[1]], False), (two, True)):
        memory = {device: limits[device] for device in devices}
        strategy = HeteroStrategy(devices=devices, memory=memory, placement="memory_first", verbose=False)
        trainer = pl.Trainer(**{**quiet, "max_epochs": 1, "strategy": strategy})
        if not fits:
            with pytest.raises(InfeasiblePlanError, match=r"needs .* which has"):
                trainer.fit(model, data())
            continue
        trainer.fit(model, data())
        assert strategy.plan is not None
        assert {device.name for device in strategy.plan.used} == set(two)
        for device in two:
            assert strategy.plan.need_of(device).total_bytes <= int(limits[device].removesuffix("B"))


class TeacherAndStudent(pl.LightningModule):
    """Two networks, two optimizers, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.teacher = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
        self.student = nn.Sequential(nn.Linear(8, 4)).double()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        teachers, students = self.optimizers()
        for optimizer, loss in (
            (teachers, functional.cross_entropy(self.teacher(x), y)),
            (students, (self.student(x) - self.teacher(x).detach()).square().mean()),
        ):
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(self.teacher.parameters(), 0.01), torch.optim.SGD(self.student.parameters(), 0.1)]


@pytest.mark.feature("asked for: two networks of one module on two devices, manual optimization (1486)")
def test_teacher_and_student(alike: Any, two: Any) -> None:
    strategy, _ = alike(
        TeacherAndStudent, data(), devices=["cpu", *two], placement={"teacher": two[0], "student": two[1]}
    )
    assert devices_of(strategy, "teacher") == {two[0]}
    assert devices_of(strategy, "student") == {two[1]}


class Wide(pl.LightningModule):
    """An embedding, a backbone and a head with many classes."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(50, 8).double()
        self.backbone = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()).double()
        self.head = nn.Linear(8, 60).double()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        words, y = batch
        positions = torch.arange(words.shape[1]) / words.shape[1]  # made on the CPU, as a processor would
        x = self.emb(words) + positions[:, None]
        return functional.cross_entropy(self.head(self.backbone(x).mean(1)), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


def words() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(50, (24, 5), generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(60, (24,), generator=generator)), batch_size=8)


@pytest.mark.feature("asked for: backbone and head on devices by name, no .to() in user code (7160)")
@pytest.mark.feature("asked for: inputs made on the CPU inside of a step (20276, 7160)")
def test_backbone_and_head_by_name(alike: Any, two: Any) -> None:
    strategy, _ = alike(
        Wide, words(), devices=[*two, "cpu"], placement={"backbone": two[0], "head": two[1], "": two[0]}
    )
    assert devices_of(strategy, "head") == {two[1]}


@pytest.mark.feature("asked for: a large embedding stays on the CPU, the rest is placed (3698, 8035)")
def test_an_embedding_on_the_cpu(alike: Any, two: Any) -> None:
    strategy, _ = alike(Wide, words(), devices=[*two, "cpu"], placement={"emb": "cpu", "*": "auto"})
    assert devices_of(strategy, "emb") == {"cpu"}
    assert devices_of(strategy, "backbone") <= set(two)


class MovedByHand(Wide):
    """What users wrote who had no other way."""

    def on_fit_start(self) -> None:
        self.emb.cpu()


@pytest.mark.feature(
    "asked for: a module that user code moves in on_fit_start (3698)",
    note="it stays where the plan has it, with a warning that names placement={...}, which keeps it on the CPU",
)
def test_a_module_moved_by_hand(alike: Any, two: Any) -> None:
    with pytest.warns(UserWarning, match=r"Embedding stays where the plan placed it.*placement=\{"):
        alike(MovedByHand, words(), devices=[*two, "cpu"], placement="even")
    strategy, _ = alike(MovedByHand, words(), devices=[*two, "cpu"], placement={"emb": "cpu", "": two[0]})
    assert devices_of(strategy, "emb") == {"cpu"}


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.two(self.one(x).relu())).relu()


class ResNet(pl.LightningModule):
    """The tutorial's: two sequences of blocks, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.seq1 = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), Residual(6), Residual(6)).double()
        self.seq2 = nn.Sequential(Residual(6), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
        self.fc = nn.Linear(6, 4).double()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return functional.cross_entropy(self.fc(self.seq2(self.seq1(x))), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def pictures() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 3, 6, 6, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, torch.randint(4, (24,), generator=generator)), batch_size=8)


@pytest.mark.feature("asked for: split points by name, devices by Lightning (2618)")
@pytest.mark.feature("asked for: the ResNet of the model-parallel tutorial over two devices (2471, 5227, 4824)")
def test_the_tutorial(alike: Any, two: Any) -> None:
    strategy, _ = alike(ResNet, pictures(), devices=two, placement={"seq1": two[0], "seq2": two[1], "fc": two[1]})
    assert devices_of(strategy, "seq1") == {two[0]}
    assert devices_of(strategy, "seq2") == devices_of(strategy, "fc") == {two[1]}


@pytest.mark.feature("asked for: more rows for the larger GPU, with the gradients of one (15573, 16914)")
def test_shares_of_four_to_six(alike: Any) -> None:
    strategy, _ = alike(
        Classifier,
        data(rows=40, batch_size=10),
        devices="cpu@speed=1,cpu@speed=1",
        placement={"": {"emulated:0": 4, "emulated:1": 6}},
    )
    assert strategy.plan.execution.weights == pytest.approx((4, 6)) or strategy.plan.shares_of


class Sharded(pl.LightningModule):
    """Tables that the user has put on two devices."""

    def __init__(self, devices: list[str]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tables = nn.ModuleList(nn.Embedding(25, 4).double().to(device) for device in devices)
        self.head = nn.Linear(8, 60).double()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        words, y = batch
        rows = [table(words.to(table.weight.device) % 25).to(self.head.weight.device) for table in self.tables]
        return functional.cross_entropy(self.head(torch.cat(rows, -1).mean(1)), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)


@pytest.mark.feature("asked for: tables that user code has sharded over devices (11922)")
def test_tables_that_the_user_has_sharded(quiet: dict[str, Any], plain: Make, two: Any) -> None:
    alone, spread = Sharded(["cpu", "cpu"]), Sharded([*two])
    plain().fit(alone, words())
    strategy = HeteroStrategy(devices=["cpu", *two], verbose=False)
    where: list[str] = []

    class Look(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
            where.extend(str(table.weight.device) for table in module.tables)

    pl.Trainer(**{**quiet, "max_epochs": 2, "strategy": strategy, "callbacks": [Look()]}).fit(spread, words())

    assert where == [*two]
    assert difference(alone, spread) <= PARITY


@pytest.mark.feature("asked for: accelerators that Lightning does not know, alone and beside the CPU (20884, 19498)")
@pytest.mark.feature("asked for: CPU and another processor in one training (pytorch 29191, 4470)")
@pytest.mark.parametrize("beside", [[], ["cpu"]], ids=["alone", "beside the CPU"])
def test_a_device_type_that_lightning_does_not_know(
    beside: list[str], quiet: dict[str, Any], plain: Make, two: Any
) -> None:
    models = [Classifier(), Classifier()]
    plain().fit(models[0], data())
    trainer = pl.Trainer(
        **{**quiet, "max_epochs": 2},
        strategy=HeteroStrategy(placement="even", verbose=False),
        accelerator="hetero",
        devices=[*two, *beside],
    )
    trainer.fit(models[1], data())

    assert {device.name for device in trainer.strategy.plan.used} == {*two, *beside}  # type: ignore[attr-defined]
    assert difference(*models) <= PARITY
