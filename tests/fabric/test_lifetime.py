"""Fabric never says that a run is over: what works for a model ends with the model, or when it is told to."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.fabric_loop import Run, loss_of, net, train
from lightning_hetero.testing.lightning_module import adam, data

MakeFabric = Callable[..., Fabric]
CUT = {"micro_batches": 2}


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "hetero" in thread.name]


def modes() -> int:
    return int(torch._C._len_torch_function_stack())


def ends(condition: Callable[[], bool], patience_s: float = 5.0) -> bool:
    """Whether something comes true by itself, in a collection of garbage.

    Autograd's thread of a device may be on its way out of the last backward, which it holds as long.
    """
    end_s = time.monotonic() + patience_s
    gc.collect()
    while not condition() and time.monotonic() < end_s:
        time.sleep(0.01)
        gc.collect()
    return condition()


@pytest.mark.feature("Fabric: nothing of a model outlives it")
def test_threads_modes_and_memory_end_with_the_model_while_fabric_lives_on(hostile: MakeFabric) -> None:
    fabric = hostile(strategy=CUT)
    run: Any = train(fabric, make_optimizer=adam)
    model = weakref.ref(run.model.module)
    assert threads()
    del run
    assert ends(lambda: model() is None)
    assert ends(lambda: not threads())
    assert modes() == 0
    assert train(fabric).was_spread


def test_a_model_goes_on_without_fabric_and_ends_by_itself(hostile: MakeFabric) -> None:
    model: Any = train(hostile(strategy=CUT)).model.module
    gc.collect()
    assert model(torch.ones(4, 8).double()).shape == (4, 4)
    del model
    assert ends(lambda: not threads())
    assert modes() == 0


@pytest.mark.feature("Fabric: fabric.strategy.teardown() gathers the models on the CPU")
def test_teardown_takes_everything_back_and_training_goes_on(alone: MakeFabric, hostile: MakeFabric) -> None:
    run = train(hostile(strategy=CUT), make_optimizer=adam)
    run.fabric.strategy.teardown()
    assert not threads()
    assert modes() == 0
    assert {parameter.device.type for parameter in run.model.parameters()} == {"cpu"}
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in run.model.module.modules())
    whole = train(alone(), make_optimizer=adam)
    for batch in data():
        for each in (run, whole):
            each.optimizer.zero_grad()
            each.fabric.backward(loss_of(each.model, batch))
            each.optimizer.step()
    assert run.differs_from(whole) <= 1e-12


def test_one_of_two_models_may_go(hostile: MakeFabric) -> None:
    fabric = hostile()
    stays = Run.of(fabric, net())
    before = modes()
    Run.of(fabric, net())
    gc.collect()
    assert modes() == before
    assert stays.go_on(data()).was_spread


def test_a_model_may_go_over_to_another_fabric(hostile: MakeFabric) -> None:
    model = net()
    first, second = hostile(), hostile(strategy={"placement": "even"})
    first.setup(model)
    second.to_device(model)
    assert second.strategy.plan_of(model).policy == "even"
    assert len(first.strategy._setups) == 0
    assert model(torch.ones(2, 8, device=second.device).double()).device == second.device


class Interrupted(nn.Module):
    """A module that the user stops by Ctrl-C in the middle of its forward, once."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)).double()
        self.parts[1].register_forward_pre_hook(self.stop)
        self.stopped = False

    def stop(self, *_: Any) -> None:
        if not self.stopped:
            self.stopped = True
            raise KeyboardInterrupt

    def forward(self, x: Tensor) -> Tensor:
        """The parts."""
        return self.parts(x)  # type: ignore[no-any-return]


def test_training_goes_on_after_an_interruption(hostile: MakeFabric, accelerator: EmulatedAccelerator) -> None:
    run = Run.of(hostile(strategy={"micro_batches": 1}), Interrupted())
    with pytest.raises(KeyboardInterrupt):
        run.go_on(data())
    run.go_on(data())
    assert len(run.losses) == 5
    assert run.model(torch.ones(2, 8, device=run.fabric.device).double()).device == run.fabric.device
