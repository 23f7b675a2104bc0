"""After a run there are no threads, no hooks and no memory of the GPU in use that were not there before."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric

from lightning_hetero import FabricStrategy
from lightning_hetero.testing.fabric_loop import train
from lightning_hetero.testing.lightning_module import Classifier, data

WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "forward": {"micro_batches": 4},
    "rematerialize": {"micro_batches": 4, "rematerialize": True},
    "step": {"micro_batches": 4, "micro_batching": "step"},
    "replicas": {"placement": {"": {"gpu": 3, "cpu": 1}}},
    "checkpointing": {"activation_checkpointing": True},
}


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if "hetero" in thread.name}


def options(way: str, gpu: Any) -> dict[str, Any]:
    strategy = dict(WAYS[way])
    if way == "replicas":
        strategy["placement"] = {"": {gpu.name: 3, "cpu": 1}}
    return strategy


@pytest.mark.parametrize("way", WAYS)
def test_a_trainer_gives_everything_back(way: str, places: list[str], gpu: Any, over: Any) -> None:
    def run() -> weakref.ref[Any]:
        model = Classifier("tied_transformer")
        trainer = over(places, strategy=options(way, gpu), max_epochs=1)
        trainer.fit(model, data("tied_transformer"), data("tied_transformer"))
        trainer.test(model, data("tied_transformer"), verbose=False)
        trainer.predict(model, data("tied_transformer"))
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        return weakref.ref(model)

    run()  # what torch keeps for good (workspaces of cuBLAS, say) is there now
    before = gpu.used_bytes()
    gone = [run() for _ in range(2)]
    assert gpu.used_bytes() == before, f"{gpu.used_bytes() - before} bytes of {gpu.name} stay in use"
    assert [reference() for reference in gone] == [None, None]
    assert not threads()


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_an_exception_in_a_step_gives_everything_back(
    micro_batches: int, places: list[str], gpu: Any, over: Any
) -> None:
    class Fails(Classifier):
        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 3:
                raise ValueError("the fourth batch")
            return loss

    def run() -> None:
        with pytest.raises(ValueError, match="the fourth batch"):
            over(places, strategy={"micro_batches": micro_batches}).fit(Fails(), data())

    run()
    before = gpu.used_bytes()
    run()
    assert gpu.used_bytes() == before, f"{gpu.used_bytes() - before} bytes of {gpu.name} stay in use"
    assert not threads()


def test_fabric_gives_everything_back_with_its_model(places: list[str], gpu: Any) -> None:
    def run() -> None:
        strategy = FabricStrategy(devices=places, placement="round_robin", micro_batches=4, verbose=False)
        train(Fabric(strategy=strategy))
        gc.collect()

    run()
    before = gpu.used_bytes()
    run()
    gc.collect()
    assert gpu.used_bytes() == before, f"{gpu.used_bytes() - before} bytes of {gpu.name} stay in use"
    # Nobody waits for the threads of a model that is gone: nobody knows whose thread it is that collects it.
    deadline_s = time.monotonic() + 10.0
    while threads() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not threads()
