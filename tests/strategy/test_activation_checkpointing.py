"""Activation checkpointing in the Trainer: the numbers of a run without it, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_hetero.errors import UnsupportedError, UsageError
from lightning_hetero.plan import Plan
from lightning_hetero.plan.explain import explain
from lightning_hetero.runtime.activation_checkpointing import Checkpointed
from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.lightning_module import Classifier, data, difference

EMULATED = "cpu@speed=1,cpu@speed=1,cpu@speed=1"
WAYS: dict[str, dict[str, Any]] = {
    "connected": {"micro_batches": 1},
    "forward": {"micro_batches": 4, "batch_norm": "defer"},
    "step": {"micro_batches": 4, "micro_batching": "step"},
    "gpipe": {"micro_batches": 2, "micro_batching": "step", "schedule": "gpipe"},
}


class Dropping(Classifier):
    """Dropout in a block and between blocks; notes which blocks are checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 8)) for _ in range(3)
        ).double()
        self.checkpointed: set[str] = set()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.net:
            x = F.dropout(block(x), 0.1, self.training)
        return x[:, :4]

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def on_train_batch_end(self, *args: Any) -> None:
        forwards = {name: module.__dict__.get("forward") for name, module in self.named_modules()}
        self.checkpointed |= {name for name, forward in forwards.items() if isinstance(forward, Checkpointed)}


def run(module: Classifier, hetero: Any, name: str = "mlp", *, devices: Any = EMULATED, **options: Any) -> Any:
    """Train a module. Returns the trainer and the state of the random generator in the end."""
    strategy = {key: options.pop(key) for key in list(options) if key not in ("precision", "max_epochs")}
    trainer = hetero(devices=devices, strategy=strategy, **options)
    torch.manual_seed(3)
    trainer.fit(module, data(name), data(name))
    return trainer, torch.get_rng_state()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["convnet", "tied_transformer", "in_place_residual"])
def test_every_model_trains_to_the_same_weights(name: str, way: str, hetero: Any) -> None:
    kept, again = Classifier(name), Classifier(name)
    for module, flag in ((kept, False), (again, True)):
        run(module, hetero, name, activation_checkpointing=flag, **WAYS[way])
    assert difference(kept, again) == 0.0
    assert again.losses == kept.losses


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
@pytest.mark.parametrize("way", WAYS)
def test_dropout_draws_the_same_and_leaves_the_generator_as_it_would_be(way: str, precision: str, hetero: Any) -> None:
    found = []
    for flag in (False, True):
        module = Dropping()
        options = {"no_split": ["Sequential"], "activation_checkpointing": flag, "precision": precision}
        _, state = run(module, hetero, **options, **WAYS[way])
        assert module.checkpointed == ({"net.0", "net.1", "net.2"} if flag else set())
        found.append([*(p.detach().clone() for p in module.parameters()), state])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_on_accelerators(way: str, hetero: Any, accelerator: EmulatedAccelerator) -> None:
    found = []
    for flag in (False, True):
        module = Dropping()
        places = [accelerator.devices[0], "cpu", accelerator.devices[1]]
        run(module, hetero, devices=places, no_split=["Sequential"], activation_checkpointing=flag, **WAYS[way])
        found.append([p.detach().clone() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_list_names_devices(hetero: Any) -> None:
    module = Dropping()
    options = {"no_split": ["Sequential"], "activation_checkpointing": ["emulated:2", "emulated:0"], "max_epochs": 1}
    trainer, _ = run(module, hetero, **options)
    plan = trainer.strategy.plan
    on = {unit for unit, device in plan.device_of.items() if device in ("emulated:0", "emulated:2")}
    assert module.checkpointed == set(plan.checkpointed) == on
    assert len(on) == 2
    assert explain(plan).count(", recomputed") == 2


def test_a_plan_file_carries_it_unless_something_else_is_said(hetero: Any, tmp_path: Path) -> None:
    options = {"no_split": ["Sequential"], "max_epochs": 1}
    trainer, _ = run(Dropping(), hetero, activation_checkpointing=["emulated:1"], **options)
    path = tmp_path / "plan.json"
    path.write_text(trainer.strategy.plan.to_json())
    (first,) = Plan.from_json(path.read_text()).checkpointed
    for said, expected in ((None, {first}), (False, set()), (True, {"net.0", "net.1", "net.2"})):
        module = Dropping()
        run(module, hetero, plan=path, activation_checkpointing=said, **options)
        assert module.checkpointed == expected


def test_a_plan_of_an_earlier_release_has_none(hetero: Any) -> None:
    trainer, _ = run(Dropping(), hetero, activation_checkpointing=True, max_epochs=1)
    record = json.loads(trainer.strategy.plan.to_json())
    for stage in record["stages"]:
        del stage["activation_checkpointing"]
    assert trainer.strategy.plan.checkpointed
    assert Plan.from_dict(record).checkpointed == ()


@pytest.mark.parametrize("given", ["cuda:0", 3, [0], {"cpu": True}, 1.0])
def test_a_wrong_type_is_refused(given: Any, hetero: Any) -> None:
    message = r"is not known; it may be True, False or a list of names of devices, such as \['cuda:0'\]"
    with pytest.raises(UsageError, match=message) as caught:
        hetero(strategy={"activation_checkpointing": given})
    assert str(caught.value).startswith(f"activation_checkpointing={given!r} ")


def test_a_device_that_is_not_there_is_refused_before_a_run(hetero: Any) -> None:
    message = (
        "activation_checkpointing names 'emulated:7', which is not among the devices of this run: "
        "emulated:0, emulated:1, emulated:2"
    )
    with pytest.raises(UsageError, match=message):
        hetero(devices=EMULATED, strategy={"activation_checkpointing": ["emulated:0", "emulated:7"]})


@pytest.mark.parametrize(("rematerialize", "word"), [(True, "True"), ("auto", "'auto'")])
def test_running_forwards_again_in_two_ways_is_refused(rematerialize: Any, word: str, hetero: Any) -> None:
    message = (
        f"rematerialize={word} runs the forward of every micro-batch again in the backward, and "
        "activation_checkpointing that of each module on its device: both would run it three times. Take one of them."
    )
    with pytest.raises(UsageError, match=message):
        hetero(strategy={"activation_checkpointing": True, "rematerialize": rematerialize, "micro_batches": 4})
    hetero(strategy={"activation_checkpointing": [], "rematerialize": rematerialize, "micro_batches": 4})


def test_a_plan_file_with_it_and_rematerialization_is_refused(hetero: Any, tmp_path: Path) -> None:
    trainer, _ = run(Dropping(), hetero, activation_checkpointing=True, max_epochs=1)
    path = tmp_path / "plan.json"
    path.write_text(trainer.strategy.plan.to_json())
    with pytest.raises(UsageError, match="both would run it three times"):
        run(Dropping(), hetero, plan=path, rematerialize=True, micro_batches=4)


def test_an_exception_in_the_second_run_ends_the_fit_and_the_next_one_works(hetero: Any) -> None:
    class Fails(nn.Module):
        broken = True

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            if self.broken and torch._C._current_graph_task_id() != -1:
                raise ZeroDivisionError("only the second time")
            return torch.tanh(self.linear(x))

    for options in WAYS.values():
        Fails.broken = True
        module = Dropping()
        module.net = nn.ModuleList(Fails() for _ in range(3)).double()
        with pytest.raises(ZeroDivisionError, match="only the second time"):
            run(module, hetero, no_split=["Fails"], activation_checkpointing=True, **options)
        Fails.broken = False
        run(module, hetero, no_split=["Fails"], activation_checkpointing=True, **options)


def test_replicas_are_refused(hetero: Any) -> None:
    """They would keep their activations."""
    shares = {"": {"emulated:0": 2, "emulated:1": 1}}
    trainer = hetero(devices=EMULATED, placement=shares, strategy={"activation_checkpointing": True})
    with pytest.raises(UnsupportedError, match=r"has replicas, which keep their .* Leave out activation_checkpointing"):
        trainer.fit(Dropping(), data("mlp"))


def test_noise_that_torch_saves_before_it_fills_it_is_there_in_the_second_run(plain: Any, hetero: Any) -> None:
    """A second run that ends where the last tensor was saved would leave that of RReLU unfilled."""

    class Leaky(Classifier):
        def __init__(self) -> None:
            super().__init__("mlp")
            torch.manual_seed(0)
            layers = [nn.Sequential(nn.Linear(8, 8), nn.RReLU()) for _ in range(3)]
            self.net = nn.Sequential(*layers, nn.Linear(8, 4)).double()

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

    def fit(trainer: Any) -> Leaky:
        torch.manual_seed(1)
        module = Leaky()
        trainer.fit(module, data())
        return module

    alone = fit(plain())
    spread = fit(hetero(devices=EMULATED, placement="even", strategy={"activation_checkpointing": True}))
    assert difference(alone, spread) == 0.0
