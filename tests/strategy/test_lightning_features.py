"""What Lightning promises still holds while the model is spread over devices."""

from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    ModelPruning,
    ModelSummary,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn

from lightning_hetero.strategy.lightning_pytorch import HeteroStrategy
from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.lightning_module import Classifier, data, difference


@pytest.mark.feature("modules: self.device", note="The root device, in every hook.")
def test_self_device_is_the_root_in_every_hook_and_afterwards_the_cpu(
    hetero: Any, accelerator: EmulatedAccelerator
) -> None:
    root = accelerator.devices[0]

    class Looks(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.seen: set[str] = set()
            self.inner = pl.LightningModule()

        def look(self, *_: Any) -> None:
            self.seen |= {str(self.device), str(self.inner.device)}

        def setup(self, stage: str) -> None:
            self.look()

        def on_train_start(self) -> None:
            self.look()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.seen |= {str(t.device) for t in batch} | {str(self(batch[0]).device)}
            self.look()
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            self.look()
            return super().configure_optimizers()

    model = Looks()
    hetero(devices=[root, accelerator.devices[1], "cpu"]).fit(model, data())
    assert model.seen == {root}
    assert str(model.device) == "cpu"


@pytest.mark.feature("modules: trainer.init_module and configure_model")
def test_modules_are_built_on_the_cpu_not_whole_on_the_root(hetero: Any, accelerator: EmulatedAccelerator) -> None:
    class Late(Classifier):
        def configure_model(self) -> None:
            self.late = nn.Linear(3, 3)
            self.built_on = str(self.late.weight.device)

    trainer = hetero(devices=list(accelerator.devices[:2]), max_epochs=1)
    with trainer.init_module():
        assert nn.Linear(2, 2).weight.device.type == "cpu"
    model = Late()
    trainer.fit(model, data())
    assert model.built_on == "cpu"
    assert "late" in trainer.strategy.plan.device_of


@pytest.mark.feature("guards: moving modules in hooks")
def test_a_move_during_fit_is_ignored_and_self_device_stays(hetero: Any, plain: Any) -> None:
    class Moves(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.to("cpu")
            self.net.cpu()
            return super().training_step(batch, batch_idx)

    alone, spread = Moves(), Moves()
    plain().fit(alone, data())
    with pytest.warns(UserWarning, match="stays where the plan placed it"):
        hetero().fit(spread, data())
    assert difference(alone, spread) == 0.0


@pytest.mark.feature("modules: torchmetrics", note="On the root device.")
def test_metrics_live_on_the_root(hetero: Any, plain: Any) -> None:
    import torchmetrics

    class Measures(Classifier):
        def __init__(self) -> None:
            super().__init__("convnet")
            self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=4)

        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.accuracy(self(batch[0]), batch[1])
            self.log("accuracy", self.accuracy)

    results = []
    for make in (plain, hetero):
        trainer = make()
        trainer.fit(Measures(), data("convnet"), data("convnet"))
        results.append(trainer.callback_metrics["accuracy"].item())
    assert results[0] == results[1]


def test_stochastic_weight_averaging_with_batch_norm(hetero: Any, plain: Any) -> None:
    results = []
    for make in (plain, hetero):
        model = Classifier("convnet", lambda p: torch.optim.SGD(p, lr=0.1))
        make(max_epochs=5, callbacks=[StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2)]).fit(
            model, data("convnet")
        )
        results.append(model)
    assert difference(*results) == 0.0


def test_backbone_finetuning(hetero: Any, plain: Any) -> None:
    class Tuned(Classifier):
        def __init__(self) -> None:
            super().__init__("convnet")
            self.backbone = self.net.features

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.net.head.parameters(), lr=1e-2)

    results = []
    for make in (plain, hetero):
        model = Tuned()
        make(max_epochs=4, callbacks=[BackboneFinetuning(unfreeze_backbone_at_epoch=2, lambda_func=lambda e: 1.0)]).fit(
            model, data("convnet")
        )
        results.append(model)
    assert difference(*results) == 0.0


def test_local_pruning(hetero: Any, plain: Any) -> None:
    results = []
    for make in (plain, hetero):
        model = Classifier()
        # Without the lottery ticket: on the CPU, Lightning's reset hands out its copy of the first weights itself.
        pruning = ModelPruning(
            "l1_unstructured", use_global_unstructured=False, amount=0.3, use_lottery_ticket_hypothesis=False
        )
        make(callbacks=[pruning]).fit(model, data())
        results.append(model)
    assert difference(*results) == 0.0
    assert (results[1].net.first.weight == 0).any()


def test_the_example_input_of_a_summary_runs_on_the_placed_model(hetero: Any) -> None:
    class WithExample(Classifier):
        example_input_array = torch.zeros(2, 8, dtype=torch.float64)

    hetero(callbacks=[ModelSummary(max_depth=3)], max_epochs=1).fit(WithExample(), data())


@pytest.mark.feature("loops: exceptions of user code", note="As they were raised; everything is gathered on the CPU.")
def test_an_exception_in_the_users_step_is_the_one_that_the_user_sees(hetero: Any, plain: Any) -> None:
    class Fails(Classifier):
        fails = True

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 2 and self.fails:
                raise KeyError("the user's own")
            return loss

    model = Fails()
    with pytest.raises(KeyError, match="the user's own"):
        hetero().fit(model, data())
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    model.fails = False
    alone = copy.deepcopy(model)
    hetero().fit(model, data())
    plain().fit(alone, data())
    assert difference(alone, model) == 0.0


@pytest.mark.feature("loops: inference mode in sanity check and validation")
def test_weights_used_in_validation_can_be_trained_afterwards(hetero: Any, plain: Any) -> None:
    results = []
    for make in (plain, hetero):
        model = Classifier("convnet")
        make(max_epochs=2, num_sanity_val_steps=2, val_check_interval=1).fit(model, data("convnet"), data("convnet"))
        results.append(model)
    assert difference(*results) == 0.0


@pytest.mark.feature("modules: torch.utils.checkpoint")
def test_activation_checkpointing_inside_and_across_units(hetero: Any, plain: Any) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            net = self.net
            hidden = checkpoint(lambda t: torch.relu(net.second(torch.relu(net.first(t)))), x, use_reentrant=False)
            output: Tensor = checkpoint(net.third, hidden, use_reentrant=False)
            return output

    results = []
    for make in (plain, hetero):
        model = Checkpointed()
        make().fit(model, data())
        results.append(model)
    assert difference(*results) == 0.0


@pytest.mark.feature("modules: gradients of gradients")
def test_double_backward_through_borders(hetero: Any, plain: Any) -> None:
    class Penalised(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            x = batch[0].requires_grad_()
            output = self(x)
            (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
            return F.cross_entropy(output, batch[1]) + slope.pow(2).mean()

    results = []
    for make in (plain, hetero):
        model = Penalised()
        make().fit(model, data())
        results.append(model)
    assert difference(*results) < 1e-14


@pytest.mark.feature("modules: user code that mixes weights of several devices")
def test_user_code_may_read_weights_directly(hetero: Any, plain: Any) -> None:
    class Reads(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            loss = loss + 1e-3 * sum(p.abs().sum() for p in self.parameters())
            return loss + 1e-3 * (self.net.first.weight @ self.net.second.weight[:8]).pow(2).sum()

        def on_train_batch_end(self, *_: Any) -> None:
            with torch.no_grad():
                self.net.third.weight.add_(self.net.second.weight[:4], alpha=1e-3)

    results = []
    for make in (plain, hetero):
        model = Reads()
        make().fit(model, data())
        results.append(model)
    assert difference(*results) < 1e-14


@pytest.mark.feature("compile: torch.compile of submodules")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
def test_submodules_may_be_compiled(hetero: Any, plain: Any) -> None:
    class Compiled(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net.second = torch.compile(self.net.second, backend="eager")

    results = []
    for make in (plain, hetero):
        model = Compiled()
        trainer = make()
        trainer.fit(model, data())
        results.append(model)
    assert difference(*results) == 0.0
    assert "net.second" in trainer.strategy.plan.device_of


@pytest.mark.feature("compile: TorchScript submodules")
def test_scripted_submodules_are_units(hetero: Any, plain: Any) -> None:
    class Scripted(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net.second = torch.jit.script(self.net.second)

    results = []
    for make in (plain, hetero):
        model = Scripted()
        make().fit(model, data())
        results.append(model)
    assert difference(*results) == 0.0


@pytest.mark.feature("modules: spread over devices by the user", note="Left as placed.")
def test_a_model_that_the_user_spread_over_devices_is_left_where_it_is(
    hetero: Any, accelerator: EmulatedAccelerator
) -> None:
    class Spread(Classifier):
        def configure_model(self) -> None:
            self.net.second.to(accelerator.devices[1])

    trainer = hetero(placement="auto")
    model = Spread()
    trainer.fit(model, data())
    assert trainer.strategy.plan.device_of == {
        "net.first": "cpu",
        "net.second": accelerator.devices[1],
        "net.third": "cpu",
    }
    assert "left there" in trainer.strategy.plan.notes[0]


@pytest.mark.feature("modules: with hf_device_map", note="Left as placed.")
def test_modules_that_accelerate_has_spread_are_left_alone(hetero: Any, accelerator: EmulatedAccelerator) -> None:
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8).double().to(accelerator.devices[1])
            self.hf_device_map = {"": 1}

        def forward(self, x: Tensor) -> Tensor:  # as its hooks would do it
            return self.layer(x.to(accelerator.devices[1])).to(x.device)  # type: ignore[no-any-return]

    class Uses(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.foreign = Foreign()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.foreign(x))

        def on_train_start(self) -> None:
            self.where = str(self.foreign.layer.weight.device)

    model = Uses()
    hetero(max_epochs=1).fit(model, data())
    assert model.where == accelerator.devices[1]


def test_the_batch_size_finder_understands_out_of_memory_of_any_device(
    hetero: Any, accelerator: EmulatedAccelerator
) -> None:
    class Sized(Classifier):
        batch_size = 2
        val_dataloader = validation_step = None

        def train_dataloader(self) -> Any:
            return data(rows=512, batch_size=self.batch_size)

    gc.collect()
    accelerator.configure(0, cap_bytes=accelerator.stats(0).used_bytes + 60_000)  # others may keep something there
    model = Sized()
    trainer = hetero(devices=["cpu", accelerator.devices[0]], max_epochs=1, limit_val_batches=0)
    size = Tuner(trainer).scale_batch_size(model, mode="power", steps_per_trial=1, max_trials=8)
    assert 2 <= size < 256


def test_the_learning_rate_finder_leaves_the_model_as_it_was(hetero: Any, plain: Any) -> None:
    class Rated(Classifier):
        lr = 1e-2

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=self.lr)

    results = []
    for make in (plain, hetero):
        model, trainer = Rated(), make()
        found = Tuner(trainer).lr_find(model, data(), num_training=20)
        trainer.fit(model, data())
        results.append((model, found.suggestion()))
    assert results[0][1] == results[1][1]
    assert difference(results[0][0], results[1][0]) == 0.0


@pytest.mark.feature("modules: deepcopy and pickle of HeteroStrategy")
def test_the_strategy_can_be_copied_and_pickled_before_and_after_a_run(hetero: Any, quiet: dict[str, Any]) -> None:
    strategy = HeteroStrategy(placement="even", verbose=False)
    for twin in (copy.deepcopy(strategy), pickle.loads(pickle.dumps(strategy))):
        model = Classifier()
        trainer = pl.Trainer(**quiet, strategy=twin, max_epochs=1)
        trainer.fit(model, data())
        pickle.loads(pickle.dumps(trainer.strategy))
        copy.deepcopy(trainer.strategy)


@pytest.mark.feature("modules: losses with buffers")
def test_parameter_free_modules_and_losses_train(hetero: Any, plain: Any) -> None:
    class Weighted(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.criterion = nn.CrossEntropyLoss(weight=torch.arange(1.0, 5.0, dtype=torch.float64))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss: Tensor = self.criterion(self(batch[0]), batch[1])
            return loss

    results = []
    for make in (plain, hetero):
        model = Weighted()
        make().fit(model, data())
        results.append(model)
    assert difference(*results) == 0.0


@pytest.mark.feature("modules: without parameters")
def test_a_module_without_parameters_can_predict(hetero: Any) -> None:
    class Bare(pl.LightningModule):
        def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return batch[0] * 2

    assert len(hetero().predict(Bare(), data())) == 5


def test_the_plan_is_saved_beside_the_logs(hetero: Any, tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    from lightning_hetero.plan import Plan

    trainer = hetero(logger=CSVLogger(tmp_path, name="runs"), max_epochs=1)
    trainer.fit(Classifier(), data())
    path = Path(trainer.log_dir) / "hetero_plan.json"
    assert Plan.from_json(path.read_text()) == trainer.strategy.plan
    assert not list(path.parent.glob(".hetero*"))

    again = hetero(strategy={"plan": path}, placement=None, max_epochs=1)
    again.fit(Classifier(), data())
    assert again.strategy.plan.device_of == trainer.strategy.plan.device_of
    assert again.strategy.plan.notes == ("The placement was read from a plan file.",)


def test_the_plan_table_is_printed_once(
    quiet: dict[str, Any], accelerator: EmulatedAccelerator, capsys: pytest.CaptureFixture[str]
) -> None:
    strategy = HeteroStrategy(devices=["cpu", accelerator.devices[0]], placement="even")
    trainer = pl.Trainer(**quiet, strategy=strategy, max_epochs=1)
    model = Classifier()
    trainer.fit(model, data(), data())
    trainer.test(model, data(), verbose=False)
    printed = capsys.readouterr().out
    assert printed.count("Plan by policy 'even'") == 1
    assert printed.count("net.first") == 1
    assert accelerator.devices[0] in printed
    assert "Units are shared out evenly over 2 of 2 devices" in printed
