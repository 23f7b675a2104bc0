"""The first steps of a run: watched, measured, and planned anew, without a change of results."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hetero.errors import InventoryError, PlacementError, UsageError
from lightning_hetero.placement import Placement, Problem
from lightning_hetero.plan import Plan
from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.lightning_module import Classifier, data, difference
from lightning_hetero.testing.models import MODELS

pytestmark = pytest.mark.usefixtures("devices_measured_once", "quick_measuring")  # no seconds are asserted
ROUNDING = 1e-9
ALWAYS = {"profile": "always"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class SpreadOnceMeasured:
    """One device until the model is measured, then a border at every unit."""

    name = "spread_once_measured"

    def place(self, problem: Problem) -> Placement:
        """Choose by whether there is a profile."""
        devices = [device.name for device in problem.inventory.trainable]
        count = 1 if problem.profile is None else len(devices)
        return Placement(device_of={name: devices[i % count] for i, name in enumerate(problem.graph.names)})


def run(hetero: Any, name: str = "mlp", strategy: dict[str, Any] | None = None, **options: Any) -> tuple[Any, Any]:
    """A run of two epochs whose plan may change on the way."""
    trainer = hetero(placement=options.pop("placement", SpreadOnceMeasured()), strategy=strategy or ALWAYS, **options)
    module = Classifier(name)
    trainer.fit(module, data(name), data(name))
    return trainer, module


@pytest.mark.parametrize("name", MODELS)
def test_a_plan_that_changes_on_the_way_changes_no_result(name: str, plain: Any, hetero: Any) -> None:
    alone = Classifier(name)
    plain().fit(alone, data(name), data(name))
    trainer, spread = run(hetero, name, {**ALWAYS, "micro_batches": 2})
    assert trainer.strategy.plan.forecast is not None or trainer.strategy.plan.policy == "spread_once_measured"
    assert len(spread.losses) == len(alone.losses)
    assert difference(alone, spread) <= ROUNDING


def test_a_run_that_has_to_be_repeatable_keeps_the_first_plan_and_says_why(
    hetero: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lightning_hetero.strategy.first_steps.WORTH_S", 0.0)
    try:
        with caplog.at_level(logging.INFO, logger="lightning_hetero"):
            trainer, _ = run(hetero, strategy={"profile": "auto"}, deterministic=True)
            asked, _ = run(hetero, deterministic=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert trainer.strategy.plan.forecast is None  # not measured
    assert "the first plan stays, as Trainer(deterministic=True) asks for the same numbers" in caplog.text
    assert asked.strategy.plan.forecast is not None


class Deep(pl.LightningModule):
    """Keeps far more activations than it has parameters. Input (rows, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.before = 0, 0  # of a layer, in all and before the last step
        torch.manual_seed(0)
        self.net = nn.Sequential(
            *(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Sigmoid(), nn.Tanh(), nn.Dropout(0.1)) for _ in range(6))
        )
        self.net.get_submodule("0.1").register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.before = self.calls
        return self.net(batch[0]).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def test_a_first_plan_whose_activations_do_not_fit_gives_way_to_activation_checkpointing(
    plain: Any, hetero: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def trained(trainer: Any) -> Deep:
        module = Deep()
        torch.manual_seed(1)
        trainer.fit(module, DataLoader(TensorDataset(torch.randn(16 * 1024, 32)), batch_size=1024))
        return module

    alone = trained(plain())
    trainer = hetero(devices="cpu@speed=1,mem=2MiB,cpu@speed=0.1,mem=64KiB", placement="auto", strategy=ALWAYS)
    with caplog.at_level(logging.INFO, logger="lightning_hetero"):
        again = trained(trainer)
    assert [stage.activation_checkpointing for stage in trainer.strategy.plan.stages] == [True]
    assert "the first plan is given up: with activations, it takes more memory than a device may give" in caplog.text
    assert (alone.calls - alone.before, again.calls - again.before) == (1, 2)
    assert difference(alone, again) == 0


def test_user_code_runs_no_more_often(hetero: Any) -> None:
    class Counting(Classifier):
        steps = 0

        def training_step(self, batch: Any, index: int) -> Tensor:
            self.steps += 1
            return super().training_step(batch, index)

    trainer = hetero(placement=SpreadOnceMeasured(), strategy=ALWAYS)
    module = Counting()
    trainer.fit(module, data(), data())
    assert module.steps == trainer.global_step


def test_the_state_of_the_optimizer_moves_along(plain: Any, hetero: Any) -> None:
    class LooksAtDevices(pl.Callback):
        def __init__(self) -> None:
            self.seen: set[str] = set()

        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any, **kwargs: Any) -> None:
            for optimizer in trainer.optimizers:
                for parameter, state in optimizer.state.items():
                    self.seen.add(str(parameter.device))
                    assert state["exp_avg"].device == parameter.device

    look = LooksAtDevices()
    run(hetero, callbacks=[look])
    assert len(look.seen) > 1


def test_gradients_that_are_being_accumulated_move_along(plain: Any, hetero: Any) -> None:
    alone = Classifier()
    plain(accumulate_grad_batches=3).fit(alone, data(), data())
    _, spread = run(hetero, accumulate_grad_batches=3)
    assert difference(alone, spread) <= ROUNDING


def test_the_measured_plan_has_a_forecast_and_is_saved(hetero: Any, tmp_path: Path) -> None:
    trainer, _ = run(hetero, placement="even", strategy=ALWAYS)
    plan = trainer.strategy.plan
    assert plan.forecast is not None
    assert plan.forecast.step_s > 0
    assert not plan.forecast.estimated


@pytest.mark.parametrize(
    "placement", ["measured", "auto", SpreadOnceMeasured()], ids=["measured", "auto", "once measured"]
)
def test_plans_take_turns_without_a_change_of_results_and_the_verdict_is_saved(
    placement: Any, plain: Any, hetero: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone, spread = Classifier(), Classifier()
    plain(max_epochs=1).fit(alone, data(rows=400))
    trainer = hetero(placement=placement, strategy=ALWAYS, max_epochs=1, logger=CSVLogger(tmp_path))
    with caplog.at_level(logging.INFO):
        trainer.fit(spread, data(rows=400))
    assert difference(alone, spread) <= ROUNDING
    saved = Plan.from_json((Path(str(trainer.log_dir)) / "hetero_plan.json").read_text())
    assert saved.device_of == trainer.strategy.plan.device_of
    assert saved.notes == trainer.strategy.plan.notes
    verdicts = [record.message for record in caplog.records if record.message.startswith("Tried with real steps: ")]
    assert len(verdicts) == (1 if any(note in verdicts for note in saved.notes) else 0)
    if not isinstance(placement, str):  # it has two plans, so they were compared
        assert saved.notes[-1] == verdicts[0]


def test_seconds_decide_nothing_where_memory_is_to_be_saved(hetero: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        trainer = hetero(placement=SpreadOnceMeasured(), strategy={**ALWAYS, "objective": "peak_memory"}, max_epochs=1)
        trainer.fit(Classifier(), data(rows=400))
    assert "planned anew" in caplog.text
    assert "Tried with real steps" not in caplog.text
    assert len(trainer.strategy.plan.used) > 1


def test_a_profile_is_kept_for_the_next_run(hetero: Any, tmp_path: Path) -> None:
    run(hetero, placement="even")
    folder = tmp_path / "cache" / "lightning_hetero" / "profiles"
    first = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    run(hetero, placement="even")
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == first
    assert len(first) == 1


@pytest.mark.parametrize("wanted", ["auto", "never"])
def test_a_short_run_is_not_worth_it(wanted: str, hetero: Any, tmp_path: Path) -> None:
    trainer, _ = run(hetero, strategy={"profile": wanted})
    assert trainer.strategy.plan.forecast is None
    assert len(trainer.strategy.plan.used) == 1
    assert not (tmp_path / "cache").exists()


def test_a_plan_file_is_obeyed(hetero: Any, tmp_path: Path) -> None:
    trainer, _ = run(hetero, placement="even", strategy={"micro_batches": 2})
    file = tmp_path / "plan.json"
    file.write_text(trainer.strategy.plan.to_json())
    again, _ = run(hetero, placement="single", strategy={"plan": file, **ALWAYS})
    assert again.strategy.plan.device_of == trainer.strategy.plan.device_of
    assert again.strategy.plan.execution == trainer.strategy.plan.execution
    assert again.strategy.plan.execution.micro_batches == 2


@pytest.mark.parametrize("objective", ["step_time", "peak_memory"])
def test_a_plan_that_its_optimizer_refuses_is_given_up(
    objective: str, hetero: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class WithLBFGS(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), max_iter=2)

    module = WithLBFGS()
    trainer = hetero(placement=SpreadOnceMeasured(), strategy={**ALWAYS, "objective": objective})
    with caplog.at_level(logging.WARNING):
        trainer.fit(module, data(), data())
    assert "cannot run, so it is left out: LBFGS joins all parameters into one vector" in caplog.text
    assert len(trainer.strategy.plan.used) == 1
    assert trainer.strategy.plan.forecast is not None  # known since the model was measured
    assert not trainer.strategy.plan.forecast.estimated


def test_a_policy_that_fails_on_the_profile_is_given_up(hetero: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Fails(SpreadOnceMeasured):
        def place(self, problem: Problem) -> Placement:
            if problem.profile is not None:
                raise ZeroDivisionError("by a policy")
            return super().place(problem)

    with caplog.at_level(logging.WARNING):
        trainer, module = run(hetero, placement=Fails())
    assert "no plan was made from measurements, so the first one stays: by a policy" in caplog.text
    assert len(module.losses) == trainer.global_step


def test_inputs_that_cannot_be_copied_do_not_stop_the_run(hetero: Any, caplog: pytest.LogCaptureFixture) -> None:
    class NoCopies:
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("not to be copied")

        def __copy__(self) -> Any:
            raise TypeError("not to be copied")

    class Odd(torch.nn.Linear):
        def forward(self, x: Tensor, extra: Any = None) -> Tensor:
            return super().forward(x)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Odd(8, 8), Odd(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x, NoCopies())), NoCopies())

    class OddClassifier(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net().double()

    module = OddClassifier()
    trainer = hetero(placement=SpreadOnceMeasured(), strategy=ALWAYS)
    trainer.fit(module, data(), data())
    assert len(module.losses) == trainer.global_step


def test_rules_hold_for_the_measured_plan_too(hetero: Any, accelerator: EmulatedAccelerator) -> None:
    first, second = accelerator.devices[:2]
    rules = {"pins": {"net.first": first}, "forbidden": [second]}
    trainer, _ = run(hetero, placement="even", strategy={"constraints": rules, **ALWAYS})
    assert trainer.strategy.plan.forecast is not None
    assert trainer.strategy.plan.device_of["net.first"] == first
    assert second not in trainer.strategy.plan.device_of.values()


def test_what_devices_do_during_a_run_can_be_recorded(hetero: Any) -> None:
    class Records(pl.Callback):
        busy: dict[str, float]

        def on_train_epoch_start(self, trainer: Any, pl_module: pl.LightningModule) -> None:
            self.block = trainer.strategy.recording()
            self.recording = self.block.__enter__()

        def on_train_epoch_end(self, trainer: Any, pl_module: pl.LightningModule) -> None:
            self.block.__exit__(None, None, None)

    records = Records()
    trainer = hetero(strategy={"micro_batches": 2}, max_epochs=1, callbacks=[records])
    trainer.fit(Classifier(), data())
    assert set(records.recording.timeline.devices) == set(trainer.strategy.plan.device_of.values())
    with pytest.raises(UsageError, match="no run is going on"), trainer.strategy.recording():
        pass


def test_words_that_are_not_known() -> None:
    from lightning_hetero import HeteroStrategy

    with pytest.raises(PlacementError, match="constraints: 'pin' is not known; it is a mapping of pins, together, "):
        HeteroStrategy(constraints={"pin": {}})
    with pytest.raises(PlacementError, match="constraints: trusted='cpu' has to be a list"):
        HeteroStrategy(constraints={"trusted": "cpu"})
    with pytest.raises(UsageError, match="objective='speed' is not known; it may be 'step_time' or "):
        HeteroStrategy(objective="speed")

    with pytest.raises(UsageError, match="profile='maybe' is not known; it may be 'auto' or 'always' or 'never'"):
        HeteroStrategy(profile="maybe")
    with pytest.raises(UsageError, match="rematerialize='sometimes' is not known; it may be True, False or 'auto'"):
        HeteroStrategy(rematerialize="sometimes")
    with pytest.raises(InventoryError, match=r"no_such_file\.json"):
        HeteroStrategy(device_profile="no_such_file.json")


@pytest.mark.parametrize("name", ["mlp", "convnet", "attention"])
def test_whole_steps_in_micro_batches_are_measured_as_whole_batches(
    name: str, plain: Any, hetero: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """One micro-batch is recorded, as the model must be called once, and what was seen counts for all of its rows."""

    class Quiet(Classifier):
        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

        def on_train_end(self) -> None:
            self.measured = getattr(self.trainer.strategy, "_measured", None)

    alone, spread = Quiet(name), Quiet(name)
    plain(accumulate_grad_batches=4, max_epochs=3).fit(alone, data(name, batch_size=2))
    trainer = hetero(strategy={**ALWAYS, "micro_batches": 4, "micro_batching": "step"}, max_epochs=3)
    trainer.fit(spread, data(name, batch_size=8))
    assert "run one after the other" not in caplog.text
    _, profile = spread.measured
    assert profile.rows == 8
    assert {unit.calls for unit in profile.units} == {1}
    assert difference(alone, spread) <= ROUNDING
