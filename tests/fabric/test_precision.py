"""Precision plugins of Fabric, over several devices and kinds of devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_hetero.errors import UnsupportedError
from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.fabric_loop import Run, loss_of, net, train
from lightning_hetero.testing.lightning_module import data

MakeFabric = Callable[..., Fabric]
WHOLE = {"micro_batches": 1}  # in low precision, sums over parts of a batch are rounded differently


def dtypes_inside(model: nn.Module, x: Tensor) -> set[torch.dtype]:
    """What the layers of a model really compute in."""
    seen: set[torch.dtype] = set()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [layer.register_forward_hook(lambda module, args, output: seen.add(output.dtype)) for layer in layers]
    model(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    ("precision", "inside"),
    [
        pytest.param("64-true", torch.float64, marks=pytest.mark.feature("Fabric: precision 64-true")),
        pytest.param("32-true", torch.float32, marks=pytest.mark.feature("Fabric: precision 32-true")),
        pytest.param("bf16-true", torch.bfloat16, marks=pytest.mark.feature("Fabric: precision bf16-true")),
        pytest.param("16-true", torch.float16, marks=pytest.mark.feature("Fabric: precision 16-true")),
        pytest.param("bf16-mixed", torch.bfloat16, marks=pytest.mark.feature("Fabric: precision bf16-mixed")),
    ],
)
def test_whole_batches_give_the_very_numbers_of_one_device(
    precision: Any, inside: torch.dtype, alone: MakeFabric, hostile: MakeFabric
) -> None:
    runs = []
    for fabric in (alone(precision=precision), hostile(strategy=WHOLE, precision=precision)):
        run = Run.of(fabric, net().float())
        for x, y in fabric.setup_dataloaders(data()):
            run.optimizer.zero_grad()
            x = x.float()
            loss = loss_of(run.model, [x, y])
            fabric.backward(loss)
            run.optimizer.step()
            run.losses.append(loss.item())
            assert dtypes_inside(run.model, x) == {inside}
        runs.append(run)
    assert runs[1].was_spread
    assert runs[1].differs_from(runs[0]) == 0.0


@pytest.mark.feature("Fabric: precision 16-mixed, with gradient clipping")
def test_scaled_gradients_are_unscaled_over_all_devices(alone: MakeFabric, hostile: MakeFabric) -> None:
    def half(fabric: MakeFabric, **options: Any) -> Run:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        norms: list[float] = []

        def clip(run: Run) -> None:
            norms.append(float(run.fabric.clip_gradients(run.model, run.optimizer, max_norm=0.1)))

        run = Run.of(fabric(plugins=plugin, **options), net().float()).go_on(data(), clip)
        assert run.fabric._precision.scaler.get_scale() == 2.0**10
        assert max(norms) < 10.0  # a norm of scaled gradients would be a thousand times that
        return run

    spread = half(hostile, strategy=WHOLE)
    assert spread.was_spread
    assert spread.differs_from(half(alone)) <= 1e-6


def test_an_infinite_gradient_on_any_device_skips_the_step(hostile: MakeFabric) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
    run = Run.of(hostile(plugins=plugin), net().float())
    before = {name: value.cpu().clone() for name, value in run.model.state_dict().items()}

    def spoil(run: Run) -> None:
        run.model.module.first.weight.grad.fill_(float("inf"))

    run.go_on(data(rows=8), spoil)
    assert all(torch.equal(value.cpu(), before[name]) for name, value in run.model.state_dict().items())
    assert run.fabric._precision.scaler.get_scale() == 2.0**9


@pytest.mark.feature("Fabric: autocast")
def test_autocast_of_user_code_holds_on_every_kind_of_device(
    hostile: MakeFabric, accelerator: EmulatedAccelerator
) -> None:
    fabric = hostile(precision="bf16-mixed")
    model = fabric.setup(net().float())
    x = fabric.to_device(torch.ones(2, 8))
    with fabric.autocast():
        assert torch.mm(x, x.t()).dtype == torch.bfloat16
        assert dtypes_inside(model.module, x) == {torch.bfloat16}


def test_a_plugin_of_ones_own_class_that_would_leave_devices_out_is_refused(
    accelerator: EmulatedAccelerator, alone: MakeFabric
) -> None:
    class Own(MixedPrecision):
        pass

    from lightning_hetero import FabricStrategy

    strategy = FabricStrategy(devices=["cpu", accelerator.devices[0]], placement="round_robin", verbose=False)
    with pytest.raises(UnsupportedError, match="Own enters autocast for 'cpu' devices only"):
        train(Fabric(strategy=strategy, plugins=Own("bf16-mixed", "cpu")))
