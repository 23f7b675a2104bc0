"""Who watches a run by mocks in the place of Lightning's own methods sees what he would see on one device."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from lightning_hetero.strategy.lightning_pytorch import HeteroStrategy
from lightning_hetero.testing.lightning_module import Classifier, data, difference


class Asks(pl.Callback):
    """Asks the strategy how often its backward was called, as Lightning's own tests do."""

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.calls = trainer.strategy.backward.call_count  # type: ignore[attr-defined]


def test_a_mock_around_backward_is_called_once_a_step_and_can_be_asked(plain: Any, hetero: Any) -> None:
    sides = []
    for make in (plain, hetero):
        callback, model = Asks(), Classifier()
        trainer = make(callbacks=[callback])
        with mock.patch.object(Strategy, "backward", wraps=trainer.strategy.backward) as watched:
            trainer.fit(model, data())
        assert callback.calls == watched.call_count == trainer.global_step
        sides.append(model)
    assert difference(*sides) <= 1e-12


def test_a_mock_that_wraps_nothing_takes_the_place(hetero: Any) -> None:
    model = Classifier()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with mock.patch.object(Strategy, "backward") as instead:
        hetero(max_steps=3).fit(model, data())
    assert instead.call_count == 3
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_functions_in_the_place_of_lightnings_and_methods_of_subclasses_run_too(plain: Any, hetero: Any) -> None:
    calls: list[str] = []
    original = Strategy.backward

    def patched(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        calls.append("patched")
        return original(self, *args, **kwargs)

    class Own(HeteroStrategy):
        def backward(self, *args: Any, **kwargs: Any) -> Any:
            calls.append("own")
            return super().backward(*args, **kwargs)

    alone, spread = Classifier(), Classifier()
    plain(max_steps=2).fit(alone, data())
    trainer = hetero(max_steps=2)
    chosen = Own(devices="cpu@speed=1,cpu@speed=1", placement="round_robin", verbose=False)
    with mock.patch.object(Strategy, "backward", patched):
        hetero(strategy=None, max_steps=2).fit(Classifier(), data())
        assert calls == ["patched"] * 2
        calls.clear()
        trainer = pl.Trainer(strategy=chosen, max_steps=2, logger=False, enable_checkpointing=False)
        trainer.fit(spread, data())
    assert calls == ["own", "patched"] * 2
    assert difference(alone, spread) <= 1e-12


class Traced:
    """What tracers put in the place of a method: no function, but it becomes a method as one does."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.calls = 0

    def __get__(self, instance: Any, owner: type) -> Any:
        return self if instance is None else partial(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.function(*args, **kwargs)


def test_a_tracer_around_lightnings_method_sees_each_call_and_changes_nothing(plain: Any, hetero: Any) -> None:
    alone, spread = Classifier(), Classifier()
    plain(max_steps=3).fit(alone, data())
    traced = Traced(Strategy.backward)
    with mock.patch.object(Strategy, "backward", traced):
        hetero(max_steps=3).fit(spread, data())
    assert traced.calls == 3
    assert difference(alone, spread) <= 1e-12
