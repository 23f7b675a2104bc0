"""Precision is what was asked for, on every device; what cannot be is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision, Precision
from torch import Tensor

from lightning_hetero.errors import UnsupportedError
from lightning_hetero.strategy.grad_scaler import DeviceGradScaler
from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.lightning_module import Classifier, data, difference

# What Lightning's own scaler says where there is no CUDA; ours takes its place.
no_cuda = pytest.mark.filterwarnings("ignore:.*GradScaler is enabled, but CUDA is not available")
on_accelerators = pytest.mark.parametrize("devices", ["accelerator"], indirect=True)
IN_FP16 = {"precision": "16-mixed", "accelerator": "hetero"}  # with its own accelerator for the CPU it takes bfloat16


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def fused_adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2, fused=True)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


class Single(Classifier):
    """In float32; the gradients of batch `overflows` are infinite, in one layer only."""

    def __init__(self, make_optimizer: Any = adam, overflows: int | None = None) -> None:
        super().__init__("mlp", make_optimizer)
        self.float()
        self.overflows = overflows

    def step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        # Device types differ in which losses they compute in float32 by themselves.
        loss = F.cross_entropy(self(batch[0].to(self.net.first.weight.dtype)).float(), batch[1])
        return loss * self.net.third.bias.sum().exp() * 1e38 * 1e38 if batch_idx == self.overflows else loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.step(batch, batch_idx)


def by_hand(model: Single, epochs: int = 2) -> torch.amp.GradScaler:
    """Train in half precision as torch's manual tells it, on the CPU."""
    optimizer, scaler = model.make_optimizer(model.parameters()), torch.amp.GradScaler("cpu")
    for _ in range(epochs):
        for index, batch in enumerate(data()):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.half, cache_enabled=False):
                loss = model.step(batch, index)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    return scaler


@no_cuda
@on_accelerators
@pytest.mark.feature("precision: 16-mixed", note="Gradients may be scaled over devices of several kinds.")
@pytest.mark.parametrize("root", ["cpu", "accelerator"])
@pytest.mark.parametrize("make_optimizer", [adam, fused_adam])
def test_scaled_gradients_over_two_kinds_of_devices(
    make_optimizer: Any, root: str, hostile: Any, accelerator: EmulatedAccelerator
) -> None:
    places = ["cpu", *accelerator.devices[:2]] if root == "cpu" else [*accelerator.devices[:2], "cpu"]
    alone, spread = Single(make_optimizer), Single(make_optimizer)
    by_hand(alone)
    trainer = hostile(strategy={"devices": places}, **IN_FP16)
    trainer.fit(spread, data())
    assert len(trainer.strategy.plan.torch_devices) == 3
    assert isinstance(trainer.precision_plugin.scaler, DeviceGradScaler)
    assert difference(alone, spread) == 0.0


@no_cuda
@on_accelerators
@pytest.mark.feature("precision: 16-mixed", note="Gradients may be scaled over devices of several kinds.")
@pytest.mark.parametrize("make_optimizer", [adam, fused_adam])
def test_a_step_with_infinite_gradients_is_left_out_on_all_devices(make_optimizer: Any, hostile: Any) -> None:
    alone, spread = Single(make_optimizer, overflows=3), Single(make_optimizer, overflows=3)
    scaler = by_hand(alone)
    trainer = hostile(**IN_FP16)
    trainer.fit(spread, data())
    assert trainer.precision_plugin.scaler.get_scale() == scaler.get_scale() == 2.0**14
    assert difference(alone, spread) == 0.0
    assert all(parameter.isfinite().all() for parameter in spread.parameters())


@no_cuda
@on_accelerators
@pytest.mark.feature("precision: 16-mixed", note="Gradients may be scaled over devices of several kinds.")
@pytest.mark.parametrize("options", [{}, {"micro_batching": "step"}, {"rematerialize": True}], ids=str)
def test_scaled_gradients_in_micro_batches(options: dict[str, Any], hostile: Any) -> None:
    trained = []
    for strategy in ({}, {"micro_batches": 2, **options}):
        trained.append(Single(sgd))
        hostile(strategy=strategy, gradient_clip_val=0.5, accumulate_grad_batches=2, **IN_FP16).fit(trained[-1], data())
    # Sums of two micro-batches are rounded once more: six steps of 0.1, gradients of at most 0.5.
    assert difference(*trained) <= 6 * 0.1 * 0.5 * torch.finfo(torch.half).eps


@no_cuda
@on_accelerators
@pytest.mark.feature("precision: 16-mixed", note="Gradients may be scaled over devices of several kinds.")
def test_settings_of_a_users_scaler_and_its_state_are_kept(hostile: Any, tmp_path: Path) -> None:
    def trainer() -> Any:
        theirs = MixedPrecision("16-mixed", "cuda", torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=4))
        return hostile(plugins=[theirs], accelerator="hetero")

    first = trainer()
    first.fit(Single(), data())
    assert first.precision_plugin.scaler.get_scale() == 64.0 * 2 * 2  # ten steps
    path = tmp_path / "scaled.ckpt"
    first.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)[MixedPrecision.__qualname__]  # where plain Lightning looks for it
    assert saved["scale"] == 256.0
    second = trainer()
    second.fit_loop.max_epochs = 3
    second.fit(Single(), data(), ckpt_path=path)
    assert second.precision_plugin.scaler.get_scale() == 64.0 * 2 * 2 * 2  # fifteen


@no_cuda
@on_accelerators
@pytest.mark.feature(
    "precision: 16-mixed with a scaler class of your own", "refused", "Over devices of one kind it works."
)
def test_a_scaler_of_another_class(hostile: Any) -> None:
    class Own(torch.amp.GradScaler):
        pass

    plugin = MixedPrecision("16-mixed", "cpu", Own("cpu"))
    trainer = hostile(plugins=[plugin], accelerator="hetero")
    with pytest.raises(UnsupportedError, match=r"with a Own of your own: .* do not wait .*between cpu and dev"):
        trainer.fit(Single(), data())


@pytest.mark.feature("precision: 16-true")
@pytest.mark.feature("precision: bf16-true")
@pytest.mark.parametrize(("precision", "dtype"), [("16-true", torch.half), ("bf16-true", torch.bfloat16)])
def test_half_weights(precision: str, dtype: torch.dtype, both: Any) -> None:
    runs = both(lambda: Single(sgd), precision=precision)
    assert {p.dtype for p in runs.spread.model.parameters()} == {dtype}
    assert isinstance(runs.spread.trainer.precision_plugin, HalfPrecision)
    if runs.spread.trainer.strategy.plan.execution.micro_batches == 1:
        assert runs.difference == 0.0
    else:  # gradients are sums of two, which are rounded once more; they are below 1, ten steps of 0.1
        assert runs.difference <= 10 * 0.1 * torch.finfo(dtype).eps


class OnlyItsOwnAutocast(MixedPrecision):
    """A plugin of a user."""


@on_accelerators
@pytest.mark.feature(
    "precision: a MixedPrecision class of your own",
    "refused",
    "On kinds of devices that it does not name; the model would run in float32 there.",
)
def test_a_mixed_precision_plugin_for_one_kind_of_device(hostile: Any) -> None:
    trainer = hostile(plugins=[OnlyItsOwnAutocast("bf16-mixed", "cpu")])
    with pytest.raises(UnsupportedError, match=r"OnlyItsOwnAutocast enters autocast for 'cpu' devices only.*float32"):
        trainer.fit(Single(), data())


@pytest.mark.feature("precision: plugins of your own")
def test_a_plugin_of_a_user(both: Any) -> None:
    class Counts(Precision):
        steps = 0

        def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
            self.steps += 1
            return super().optimizer_step(*args, **kwargs)

    runs = both(Classifier, plugins=[Counts()])
    runs.check_parity()
    assert runs.spread.trainer.precision_plugin.steps == 20  # ten on each side


def foreign(name: str) -> Precision:
    """A plugin that goes by the name of one whose packages are rarely there."""
    plugin: Precision = type(name, (Precision,), {})()
    return plugin


@pytest.mark.parametrize(
    ("name", "says"),
    [
        pytest.param(
            "TransformerEnginePrecision",
            r"run on CUDA devices only, and the plan uses .*cpu.*precision='bf16-mixed'",
            marks=pytest.mark.feature("precision: transformer-engine", "refused", "Unless all devices are CUDA's."),
        ),
        pytest.param(
            "BitsandbytesPrecision",
            r"run on CUDA devices only, and the plan uses .*cpu.*precision='bf16-mixed'",
            marks=pytest.mark.feature("precision: bitsandbytes", "refused", "Unless all devices are CUDA's."),
        ),
        pytest.param(
            "FSDPPrecision",
            r"belongs to another strategy. Use Trainer\(precision=...\)",
            marks=pytest.mark.feature("precision: plugins of FSDP, DeepSpeed and XLA", "refused"),
        ),
    ],
)
def test_plugins_that_need_something_else(name: str, says: str, hostile: Any) -> None:
    with pytest.raises(UnsupportedError, match=f"{name} .*{says}"):
        hostile(plugins=[foreign(name)]).fit(Classifier(), data())
