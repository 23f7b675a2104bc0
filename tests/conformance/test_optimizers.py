"""Optimizers, schedulers and gradients, over devices."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any
from unittest.mock import DEFAULT, patch

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn

from lightning_hetero.strategy.optimizers import state_factor
from lightning_hetero.testing.lightning_module import Classifier, data

LR = {"Adadelta": 1.0, "LBFGS": 0.1}
NEEDS_SOMETHING_ELSE = {"LBFGS", "SparseAdam", "Muon"}  # in tests of their own
WAYS: dict[str, dict[str, bool]] = {
    "foreach": {"foreach": True},
    "single": {"foreach": False},
    "fused": {"fused": True},
}


def optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    """All that torch.optim exports."""
    found = {name: cls for name, cls in vars(torch.optim).items() if inspect.isclass(cls)}
    return {name: cls for name, cls in found.items() if issubclass(cls, torch.optim.Optimizer) and name != "Optimizer"}


VARIANTS = [
    (name, way)
    for name, cls in optimizers().items()
    if name not in NEEDS_SOMETHING_ELSE
    for way, options in WAYS.items()
    if set(options) <= set(inspect.signature(cls).parameters)
]


@pytest.mark.feature("optimizers: every optimizer of torch.optim, also foreach and fused")
@pytest.mark.parametrize("devices", ["accelerator"], indirect=True)
@pytest.mark.parametrize(("name", "way"), VARIANTS)
def test_every_implementation_of_every_optimizer(name: str, way: str, both: Any) -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        return optimizers()[name](parameters, lr=LR.get(name, 1e-2), **WAYS[way])  # type: ignore[call-arg]

    both(lambda: Classifier("mlp", make), max_epochs=1, limit_train_batches=3).check_parity()


@pytest.mark.feature("optimizers: every optimizer of torch.optim, also foreach and fused")
def test_muon_of_matrices(both: Any) -> None:
    class Matrices(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.Muon([p for p in self.parameters() if p.dim() == 2], lr=1e-2)

    # It computes in bfloat16, where the sums of micro-batches may fall on the other side of a rounding.
    assert both(Matrices, strategy={"micro_batches": 1}).difference == 0.0


@pytest.mark.feature("optimizers: every optimizer of torch.optim, also foreach and fused")
def test_sparse_adam_of_embeddings(both: Any, devices: Any) -> None:
    class Sparse(Classifier):
        def __init__(self) -> None:
            super().__init__("tied_transformer")
            self.net = nn.Sequential(
                nn.Embedding(11, 8, sparse=True), nn.Flatten(), nn.Linear(48, 8), nn.Tanh(), nn.Linear(8, 4)
            ).double()
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            return [
                torch.optim.SparseAdam([self.net[0].weight], lr=1e-2),  # type: ignore[index]
                torch.optim.Adam(self.net[1:].parameters(), lr=1e-2),  # type: ignore[index]
            ]

    # The emulated accelerator has no sparse tensors.
    where = {"placement": {"net.0": devices.names[0], "": devices.names[1]}} if isinstance(devices.names, list) else {}
    both(
        Sparse,
        run=lambda trainer, model: trainer.fit(model, data("tied_transformer")),
        strategy=where,
        spread=not where,
    ).check_parity()


class Lion(torch.optim.Optimizer):
    """An optimizer of a third party, with state and arithmetic of its own."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["mean"] = torch.zeros_like(parameter)
                    state["seen"] = torch.zeros((), device=parameter.device)
                    state["history"] = []
                parameter.sub_((state["mean"] * 0.9 + parameter.grad * 0.1).sign(), alpha=group["lr"])
                state["mean"].lerp_(parameter.grad, 0.01)
                state["seen"] += 1
                state["history"].append(float(parameter.grad.norm()))
        return loss


class Joins(Lion):
    """Joins all gradients into one vector, as LARS, Shampoo or a clipping of one's own may do."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else torch.enable_grad()(closure)()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.cat([p.grad.flatten() for p in parameters]).norm()
        for parameter in parameters:
            self.state[parameter]["mean"] = parameter.grad.clone()
            parameter.sub_(parameter.grad / norm, alpha=1e-2)
        return loss


@pytest.mark.feature("optimizers: of third parties, with state for each parameter")
def test_an_optimizer_of_a_third_party(both: Any) -> None:
    both(lambda: Classifier("mlp", lambda p: Lion(p, lr=1e-3))).check_parity()


@pytest.mark.feature(
    "optimizers: of third parties, joining all parameters into one tensor",
    note="What they join moves to one device at every step.",
)
def test_an_optimizer_that_joins_parameters(both: Any) -> None:
    both(lambda: Classifier("mlp", lambda p: Joins(p, lr=1e-2))).check_parity()


CLIPPING = {
    "norm": pytest.param(
        {"gradient_clip_val": 0.1}, marks=pytest.mark.feature("optimizers: gradient clipping by norm")
    ),
    "value": pytest.param(
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        marks=pytest.mark.feature("optimizers: gradient clipping by value"),
    ),
}


@pytest.mark.parametrize("options", CLIPPING.values(), ids=CLIPPING)
def test_clipping(options: dict[str, Any], both: Any) -> None:
    both(Classifier, **options).check_parity()


@pytest.mark.feature("optimizers: configure_gradient_clipping overridden")
@pytest.mark.parametrize("foreach", [None, True])
def test_clipping_of_ones_own(foreach: bool | None, both: Any) -> None:
    class Clips(Classifier):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            if self.current_epoch == 0:
                self.clip_gradients(optimizer, gradient_clip_val=0.2, gradient_clip_algorithm="norm")
            else:
                norm = nn.utils.clip_grad_norm_(self.parameters(), 0.1, foreach=foreach)
                self.log("norm", norm)

    both(Clips).check_parity()


@pytest.mark.feature("optimizers: logging grad_norm")
def test_grad_norm(both: Any) -> None:
    class Looks(Classifier):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.log_dict(grad_norm(self.net, norm_type=2))

    runs = both(Looks)
    runs.check_parity()
    assert len(runs.spread.trainer.callback_metrics) == 8  # six parameters, their total, the loss


@pytest.mark.feature("optimizers: gradient accumulation")
@pytest.mark.parametrize("callback", [False, True])
def test_accumulation(callback: bool, both: Any) -> None:
    if callback:
        both(Classifier, callbacks=lambda: [GradientAccumulationScheduler({0: 2, 1: 3})]).check_parity()
    else:
        both(Classifier, accumulate_grad_batches=2).check_parity()


def one_cycle(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20)


def warm_up(optimizer: Any) -> Any:
    schedulers = torch.optim.lr_scheduler
    parts = [schedulers.LinearLR(optimizer, 0.1, total_iters=3), schedulers.CosineAnnealingLR(optimizer, 7)]
    return schedulers.SequentialLR(optimizer, parts, milestones=[3])


def step(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


def averaged(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)


@pytest.mark.feature("optimizers: schedulers of steps and epochs, of any frequency, on a plateau, with warm-up")
@pytest.mark.parametrize(
    "config",
    [
        {"scheduler": step},
        {"scheduler": step, "interval": "step", "frequency": 3},
        {"scheduler": step, "interval": "epoch", "frequency": 2},
        {"scheduler": one_cycle, "interval": "step"},
        {"scheduler": warm_up, "interval": "step"},
        {"scheduler": averaged, "monitor": "loss", "interval": "step"},
        {"scheduler": averaged, "monitor": "val_loss"},
    ],
    ids=lambda config: "-".join(getattr(value, "__name__", str(value)) for value in config.values()),
)
def test_schedulers(config: dict[str, Any], both: Any) -> None:
    class Scheduled(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.rates: list[float] = []

        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return {"optimizer": optimizer, "lr_scheduler": {**config, "scheduler": config["scheduler"](optimizer)}}

        def on_train_batch_end(self, *_: Any) -> None:
            self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    runs = both(Scheduled, run=lambda trainer, model: trainer.fit(model, data(), data()), max_epochs=4)
    runs.check_parity()
    assert runs.spread.model.rates == runs.alone.model.rates
    assert len(set(runs.spread.model.rates)) > 1


@pytest.mark.feature("optimizers: optimizer_step, optimizer_zero_grad and lr_scheduler_step overridden")
def test_hooks_of_optimizers(both: Any) -> None:
    class Hooks(Classifier):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * min(1.0, (self.trainer.global_step + 1) / 5)
            optimizer.step(closure=closure)

        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            optimizer.zero_grad(set_to_none=False)

        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            scheduler.step()

        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [step(optimizer)]

    both(Hooks).check_parity()


@pytest.mark.feature("optimizers: over parameters made in configure_model")
def test_parameters_made_in_configure_model(both: Any) -> None:
    class Late(Classifier):
        def configure_model(self) -> None:
            if not hasattr(self, "late"):
                self.late = nn.Linear(4, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.late(super().forward(x))  # type: ignore[no-any-return]

    both(Late).check_parity()


@pytest.mark.feature("optimizers: none at all")
@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_no_optimizer(both: Any) -> None:
    class Without(Classifier):
        def configure_optimizers(self) -> Any:
            return None

    both(Without).check_parity()


@pytest.mark.feature("optimizers: training_step that returns None")
def test_steps_that_are_left_out(both: Any) -> None:
    class Skips(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx % 2 else loss

    both(Skips).check_parity()


class Manual(Classifier):
    """Two optimizers, each with half of the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD([*self.net.first.parameters(), *self.net.third.parameters()], lr=0.1, momentum=0.5),
            torch.optim.Adam(self.net.second.parameters(), lr=1e-2),
        ]


class Toggles(Manual):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            with optimizer.toggle_model(sync_grad=True):
                self.manual_backward(self.loss(batch))
                self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
                optimizer.step()
                optimizer.zero_grad()
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self) -> Any:
        both = super().configure_optimizers()
        return both, [step(optimizer) for optimizer in both]


class KeepsGraphs(Manual):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        first, second = self.optimizers()
        loss = self.loss(batch)
        self.manual_backward(loss, retain_graph=True)
        self.manual_backward(loss, retain_graph=True)
        self.manual_backward(loss)
        first.step()
        second.step()
        first.zero_grad()
        second.zero_grad()


class Closures(Manual):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():

            def closure(optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
                return loss

            optimizer.step(closure=closure)


class Accumulates(Manual):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.manual_backward(self.loss(batch) / 2)
        if batch_idx % 2:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()


MANUAL = [
    pytest.param(Toggles, marks=pytest.mark.feature("optimizers: several, toggled, with clipping and schedulers")),
    pytest.param(KeepsGraphs, marks=pytest.mark.feature("optimizers: several backwards through one graph")),
    pytest.param(Closures, marks=pytest.mark.feature("optimizers: closures of one's own")),
    pytest.param(Accumulates, marks=pytest.mark.feature("optimizers: gradient accumulation")),
]


@pytest.mark.parametrize("module", MANUAL)
def test_manual_optimization(module: Any, both: Any) -> None:
    runs = both(module)
    runs.check_parity()
    assert runs.spread.trainer.global_step == runs.alone.trainer.global_step


@pytest.mark.feature("optimizers: several backwards through one graph")
def test_every_backward_is_one_call_of_lightnings_strategy(hostile: Any) -> None:
    trainer = hostile()
    with patch.object(Strategy, "backward", wraps=trainer.strategy.backward) as backward:
        trainer.fit(KeepsGraphs(), data())
    assert backward.call_count == 3 * 10


STATES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in optimizers() if name not in NEEDS_SOMETHING_ELSE | {"Adafactor"}),
    ("SGD", {"momentum": 0.9}),
    ("Adam", {"amsgrad": True}),
    ("AdamW", {"amsgrad": True}),
    ("RMSprop", {"centered": True}),
    ("RMSprop", {"centered": True, "momentum": 0.5}),
]


@pytest.mark.feature("optimizers: every optimizer of torch.optim, also foreach and fused")
@pytest.mark.parametrize(("name", "options"), STATES)
def test_the_memory_of_an_optimizer_is_known(name: str, options: dict[str, Any]) -> None:
    parameter = nn.Parameter(torch.zeros(4, 4))
    parameter.grad = torch.ones(4, 4)
    optimizer = optimizers()[name]([parameter], lr=0.1, **options)  # type: ignore[call-arg]
    expected = state_factor([optimizer])
    optimizer.step()
    state = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor) and value.dim() > 0]
    assert sum(value.numel() for value in state) / parameter.numel() == expected


@pytest.mark.feature("optimizers: steps are counted as ever", note="No step but those of the user.")
def test_no_step_that_nobody_asked_for(hostile: Any) -> None:
    trainer = hostile()
    with (
        patch.multiple(torch.optim.SGD, step=DEFAULT, zero_grad=DEFAULT) as sgd,
        patch.multiple(torch.optim.Adam, step=DEFAULT, zero_grad=DEFAULT) as adam,
    ):
        trainer.fit(KeepsGraphs(), data())
    for calls in (sgd, adam):
        assert (calls["step"].call_count, calls["zero_grad"].call_count) == (10, 10)


@pytest.mark.feature("optimizers: steps are counted as ever", note="No step but those of the user.")
def test_steps_of_a_class_of_ones_own(both: Any) -> None:
    class Counts(torch.optim.SGD):
        steps = 0

        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            Counts.steps += 1
            return super().step(closure)

    both(lambda: Classifier("mlp", lambda p: Counts(p, lr=0.1))).check_parity()
    assert Counts.steps == 20  # ten on each side
