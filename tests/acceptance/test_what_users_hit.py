"""What users of other tools hit, each shown here with the real Trainer to be right or refused.

Where another test shows it well already, it is not shown again:

====================================================  =====================================================
what                                                  where
====================================================  =====================================================
plans respect limits of memory; what does not fit     strategy/test_refusals: test_a_plan_that_does_not_fit_...,
                                                      test_a_model_larger_than_any_device_trains_on_several
fewer micro-batches alive, less memory                strategy/test_steps: test_no_more_micro_batches_are_alive_...
batch normalisation as in plain accumulation          strategy/test_steps: test_equal_to_plain_accumulation_bit_for_bit
deferred batch normalisation                          engine/test_batch_norm, acceptance/test_common_models
the same random numbers in every run                  engine/test_random, strategy/test_steps: test_dropout_is_...
a trial run leaves nothing behind                     engine/test_traps: test_a_trial_leaves_no_trace
manual optimization, penalties on gradients           strategy/test_micro_batches: test_manual_optimization_with_...,
                                                      strategy/test_parity: test_a_gan_with_manual_optimization_...
torch.func, jacobians, double backward                engine/test_odd_calls, engine/test_traps
self.x, self.log and counters in a step               strategy/test_steps: test_attributes_that_a_step_sets_...,
                                                      test_what_goes_from_one_micro_batch_to_the_next_goes_in_order
exceptions, interrupts, hangs, memory                 acceptance/test_failures, acceptance/test_signals
models that have to be cut                            acceptance/test_common_models
====================================================  =====================================================
"""

from __future__ import annotations

import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import Tensor, nn
from torch.autograd import grad as ask_for_gradients
from torch.utils.data import DataLoader, TensorDataset

from lightning_hetero.errors import PlacementError

ROUNDING = 1e-12
WHOLE_STEPS = {"micro_batching": "step"}
PLACES = ("emulated:0", "emulated:1", "emulated:2")


def rows(count: int = 22, size: int = 8, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (count,), generator=generator)


def loader(count: int = 22, batch_size: int = 8, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*rows(count)), batch_size=batch_size, **options)


def in_order(devices: str, pattern: str, *names: str) -> dict[str, str]:
    """Names to devices: `pattern` has a digit for each."""
    places = PLACES if "speed" in devices else tuple(devices.split(","))
    return {name: places[int(digit)] for name, digit in zip(names, pattern, strict=True)}


class Net(nn.Module):
    """Six layers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        for index in range(5):
            setattr(self, f"l{index}", nn.Linear(8, 8))
        self.l5 = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for index in range(5):
            x = torch.tanh(getattr(self, f"l{index}")(x))
        return self.l5(x)  # type: ignore[no-any-return]


class Classifier(pl.LightningModule):
    """A user's module around any network."""

    def __init__(self, net: nn.Module | None = None, optimizer: Any = torch.optim.SGD, lr: float = 0.1) -> None:
        super().__init__()
        self.net = (net or Net()).double()
        self.make_optimizer = optimizer
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters(), self.lr)


# 1-4, 6, 7: who works, and on what


def test_a_project_needs_no_change_but_the_name_of_the_strategy(
    plain: Any, quiet: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HETERO_PLACEMENT", "even")
    monkeypatch.setenv("HETERO_MICRO_BATCHES", "4")
    models = []
    options = {"strategy": "hetero", "accelerator": "hetero", "devices": "cpu@speed=2,cpu@speed=1"}
    for trainer in (plain(), pl.Trainer(**quiet, **options)):
        torch.manual_seed(0)
        models.append(Classifier())
        trainer.fit(models[-1], loader(), loader(7, 7))
    assert len(trainer.strategy.plan.used) == 2
    assert {name for name, _ in models[1].named_parameters()} == {name for name, _ in models[0].named_parameters()}
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=ROUNDING)
    # As many micro-batches as were asked for: sums in another order than on one device.
    assert any(not torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


class Sleeps(torch.autograd.Function):
    """Takes its time, as an accelerator does, without the processor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        time.sleep(5e-3)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        time.sleep(5e-3)
        return gradient


class Slow(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return Sleeps.apply(super().forward(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", ["forward", "step"])
def test_no_device_waits_while_there_is_work_for_it(mode: str, hetero: Any, devices: str) -> None:
    """Both devices are at work at the same time, in forward and in backward."""
    spans: list[Any] = []

    class Looks(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            self.context = trainer.strategy.recording()
            self.recording = self.context.__enter__()

        def on_train_batch_end(self, *_: Any) -> None:
            self.context.__exit__(None, None, None)
            spans.append(self.recording.timeline.spans)

    net = nn.Sequential(Slow(), Slow(), nn.Linear(8, 4))
    where = in_order(devices, "011", "net.0", "net.1", "net.2")
    options = {"micro_batches": 8, "micro_batching": mode}
    hetero(devices=devices, placement=where, strategy=options, callbacks=[Looks()], max_epochs=1).fit(
        Classifier(net), loader(32, 16)
    )
    for op in "FB":
        first, second = ([s for s in spans[-1] if s.op == op and s.stage == stage] for stage in (0, 1))
        assert any(a.start_s < b.end_s and b.start_s < a.end_s for a in first for b in second)


def test_a_device_of_three_times_the_speed_gets_three_times_the_work(hetero: Any) -> None:
    trainer = hetero(devices="cpu@speed=3,cpu@speed=1", placement="proportional", max_epochs=1)
    trainer.fit(Classifier(nn.Sequential(*(nn.Linear(8, 8) for _ in range(8)))), loader())
    assert Counter(trainer.strategy.plan.device_of.values()) == {"emulated:0": 6, "emulated:1": 2}


@pytest.mark.usefixtures("devices_measured_once")
def test_a_device_that_does_not_pay_is_left_out_and_the_plan_says_so(
    hetero: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = {"profile": "always", "micro_batches": None}
    trainer = hetero(devices="cpu@speed=100,cpu@speed=1", placement="auto", strategy=options)
    trainer.fit(Classifier(), loader(80))
    plan = trainer.strategy.plan
    assert [device.name for device in plan.used] == ["emulated:0"]
    assert plan.forecast is not None
    assert "emulated:0" in " ".join(plan.notes)


# 9, 10, 15: what models do


class Crossing(nn.Module):
    """Skips over all devices."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Linear(8, 6), nn.Linear(6, 4), nn.Linear(4, 2)])
        self.up = nn.ModuleList([nn.Linear(2, 4), nn.Linear(8, 6), nn.Linear(12, 4)])

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for layer in self.down:
            x = torch.tanh(layer(x))
            skips.append(x)
        x = skips.pop()
        for layer in self.up:
            x = layer(x)
            if skips:
                x = torch.cat([x, skips.pop()], -1)
        return x


CROSSED = tuple(f"net.{side}.{index}" for side in ("down", "up") for index in range(3))


@pytest.mark.parametrize("pattern", ["012210", "210021"])
def test_skips_over_three_devices_are_equal_bit_for_bit(pattern: str, fit_both: Any, devices: str) -> None:
    runs = fit_both(
        lambda: Classifier(Crossing()),
        loader(24),
        loader(7, 7),
        their_train=loader(24, 2),
        theirs={"accumulate_grad_batches": 4},
        devices=devices,
        placement=in_order(devices, pattern, *CROSSED),
        strategy=WHOLE_STEPS,
    )
    runs.check_every_batch_was_cut()
    assert runs.difference == 0.0


@pytest.mark.parametrize("mode", ["forward", "step"])
@pytest.mark.parametrize("pattern", ["010101", "201102"])
def test_zigzag_placement(pattern: str, mode: str, fit_both: Any, devices: str) -> None:
    where = in_order(devices, pattern, *(f"net.l{index}" for index in range(6)))
    runs = fit_both(
        Classifier, loader(), loader(7, 7), devices=devices, placement=where, strategy={"micro_batching": mode}
    )
    runs.check_every_batch_was_cut()
    assert runs.difference <= ROUNDING


@pytest.mark.parametrize("mode", ["forward", "step"])
def test_a_layer_that_is_called_again_and_again(mode: str, fit_both: Any, devices: str) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = x + torch.tanh(self.b(torch.relu(self.a(x))))
            return self.head(self.a(x))  # type: ignore[no-any-return]

    runs = fit_both(lambda: Classifier(Shared()), loader(), devices=devices, strategy={"micro_batching": mode})
    runs.check_every_batch_was_cut()
    assert runs.difference <= ROUNDING


class Choosy(nn.Module):
    """Takes another way for some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.ways: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if x.sum() > 0:
            x = self.b(x)
        return self.c(x)  # type: ignore[no-any-return]


def test_a_decision_by_content_is_that_of_the_whole_batch(
    fit_both: Any, devices: str, caplog: pytest.LogCaptureFixture
) -> None:
    runs = fit_both(lambda: Classifier(Choosy()), loader(), loader(7, 7), devices=devices)
    assert "its code reads the content of a tensor (__bool__)" in caplog.text
    assert not any(batch.micro_batches for batch in (*runs.watch.train, *runs.watch.others))
    assert runs.difference <= ROUNDING
    assert runs.metrics_differ_by <= ROUNDING


def test_a_decision_by_content_in_whole_steps_is_that_of_accumulation(fit_both: Any, devices: str) -> None:
    runs = fit_both(
        lambda: Classifier(Choosy()),
        loader(24),
        their_train=loader(24, 2),
        theirs={"accumulate_grad_batches": 4},
        devices=devices,
        strategy=WHOLE_STEPS,
    )
    assert runs.watch.train[-1].micro_batches == {0, 1, 2, 3}
    assert runs.difference == 0.0


@dataclass
class State:
    """What goes from layer to layer."""

    hidden: Tensor
    mask: Tensor | None
    depth: int = 0


class Structured(nn.Module):
    """Hands dicts, None, numbers and dataclasses from part to part."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(
            self, state: State, info: dict[str, Any], *, scale: int = 1
        ) -> tuple[State, dict[str, Any], None, int]:
            assert state.depth == info["depth"]
            hidden = self.linear(state.hidden) * scale
            if state.mask is not None:
                hidden = hidden.masked_fill(state.mask, 0.0)
            info = {"depth": info["depth"] + 1, "last": [hidden, None], "name": info["name"], ("a", 1): state.hidden}
            return State(torch.tanh(hidden), state.mask, state.depth + 1), info, None, scale + 1

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Structured.Part() for _ in range(3)])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        state, info, scale = State(x, mask), {"depth": 0, "name": "x"}, 1
        for part in self.parts:
            state, info, nothing, scale = part(state, info, scale=scale)
            assert nothing is None
        assert scale == 4
        assert info["name"] == "x"
        return {"scores": self.head(state.hidden), "state": state, "info": info, "none": None, "count": scale}


@pytest.mark.parametrize("mode", ["forward", "step"])
@pytest.mark.parametrize("masked", [False, True])
def test_structures_none_and_numbers_between_parts(masked: bool, mode: str, fit_both: Any, devices: str) -> None:
    class Uses(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            result = self.net(x, (x > 1) if masked else None)
            assert result["count"] == 4
            assert result["none"] is None
            assert result["state"].depth == 3
            assert result["state"].hidden.shape == x.shape
            assert result["info"]["last"][1] is None
            return result["scores"] + result["info"]["last"][0][:, :4] * 0.1  # type: ignore[no-any-return]

    runs = fit_both(
        lambda: Uses(Structured()), loader(), loader(7, 7), devices=devices, strategy={"micro_batching": mode}
    )
    runs.check_every_batch_was_cut()
    assert runs.difference <= ROUNDING


# 11-14: what batches do


@pytest.mark.parametrize("mode", ["forward", "step"])
@pytest.mark.parametrize(("count", "size"), [(26, 10), (6, 3), (3, 1)])
def test_batches_that_do_not_divide_and_batches_smaller_than_micro_batches(
    count: int, size: int, mode: str, fit_both: Any, devices: str
) -> None:
    runs = fit_both(Classifier, loader(count, size), loader(7, 3), devices=devices, strategy={"micro_batching": mode})
    assert runs.difference <= ROUNDING
    assert runs.metrics_differ_by <= ROUNDING
    full = runs.watch.train[-2 if count % size else -1]
    assert len(full.micro_batches) == (min(4, size) if size > 1 else 0)  # of one row there is nothing to cut


@pytest.mark.parametrize("mode", ["forward", "step"])
def test_shapes_that_change_in_every_step(mode: str, fit_both: Any, devices: str) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.gru, self.head = nn.Embedding(11, 8), nn.GRU(8, 8, batch_first=True), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.gru(self.embed(x))[0].mean(1))  # type: ignore[no-any-return]

    torch.manual_seed(2)
    shapes = [(8, 3), (8, 9), (5, 4), (8, 1), (6, 7), (9, 2)]
    batches = [(torch.randint(11, shape), torch.randint(4, shape[:1])) for shape in shapes]
    data: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    runs = fit_both(lambda: Classifier(Reads()), data, data, devices=devices, strategy={"micro_batching": mode})
    runs.check_every_batch_was_cut()
    assert runs.difference <= ROUNDING
    assert runs.metrics_differ_by <= ROUNDING


def test_validation_with_another_batch_size_in_the_middle_of_an_epoch(fit_both: Any, devices: str) -> None:
    runs = fit_both(Classifier, loader(64, 32), loader(21, 7), devices=devices, val_check_interval=1)
    runs.check_every_batch_was_cut()
    assert runs.difference <= ROUNDING
    assert runs.metrics_differ_by <= ROUNDING


@pytest.mark.parametrize("mode", ["forward", "step"])
def test_outputs_meet_the_labels_of_their_own_rows(mode: str, hetero: Any, devices: str) -> None:
    """Whatever the delays, row i of the output belongs to row i of the labels."""
    seconds = random.Random(3)

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            time.sleep(seconds.random() * 3e-3)
            return x * (self.scale / self.scale.detach())

    class Checks(Classifier):
        checked = 0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, names = batch
            scores = self(x)
            assert torch.equal(scores.detach().cpu(), names.cpu()[:, None].expand_as(scores) * 1.0)
            return scores.mean()

    names = torch.arange(48, dtype=torch.float64)
    data = DataLoader(TensorDataset(names[:, None].expand(-1, 8).clone(), names), batch_size=16, shuffle=True)
    net = nn.Sequential(Late(), Late(), Late(), Late())
    hetero(devices=devices, placement="round_robin", strategy={"micro_batching": mode, "micro_batches": 8}).fit(
        Checks(net, lr=0.0), data
    )


# 16-20: what optimizers see


@pytest.mark.feature("optimizers: gradient accumulation")
@pytest.mark.parametrize("mode", ["forward", "step"])
@pytest.mark.parametrize("accumulate", [1, 2, 8])
def test_accumulation_of_gradients(accumulate: int, mode: str, fit_both: Any, devices: str) -> None:
    runs = fit_both(
        Classifier,
        loader(80),
        devices=devices,
        strategy={"micro_batching": mode},
        accumulate_grad_batches=accumulate,
    )
    runs.check_every_batch_was_cut()
    assert runs.trainer.global_step == runs.plain.global_step
    assert runs.difference <= ROUNDING


@pytest.mark.feature("optimizers: gradient clipping by norm")
@pytest.mark.parametrize("mode", ["forward", "step"])
@pytest.mark.parametrize(("value", "kind"), [(0.05, "norm"), (0.01, "value")])
def test_clipping_sees_the_gradients_of_all_devices(
    value: float, kind: str, mode: str, fit_both: Any, devices: str
) -> None:
    class Norms(Classifier):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            norms = [p.grad.norm().cpu() for p in self.parameters()]
            self.log("norm", torch.stack(norms).norm(), on_step=False, on_epoch=True)

    runs = fit_both(
        Norms,
        loader(),
        devices=devices,
        strategy={"micro_batching": mode},
        gradient_clip_val=value,
        gradient_clip_algorithm=kind,
    )
    runs.check_every_batch_was_cut()
    assert runs.difference <= ROUNDING
    assert float(runs.trainer.callback_metrics["norm"]) == pytest.approx(
        float(runs.plain.callback_metrics["norm"]), abs=1e-6
    )


class Tied(nn.Module):
    """The head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(x))))  # type: ignore[no-any-return]


class Predicts(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def tokens() -> DataLoader[Any]:
    return DataLoader(torch.randint(11, (24, 6), generator=torch.Generator().manual_seed(1)), batch_size=8)  # type: ignore[arg-type]


@pytest.mark.feature("modules: tied weights")
@pytest.mark.parametrize("mode", ["forward", "step"])
def test_tied_embeddings_stay_tied(mode: str, fit_both: Any, devices: str) -> None:
    """Six steps of AdamW, which divides by roots of gradients: rounding grows there."""
    where = in_order(devices, "101", "net.embed", "net.body", "net.head")
    runs = fit_both(
        lambda: Predicts(Tied(), torch.optim.AdamW, 1e-2),
        tokens(),
        devices=devices,
        placement=where,
        strategy={"micro_batching": mode},
    )
    runs.check_every_batch_was_cut()
    assert runs.spread.net.head.weight is runs.spread.net.embed.weight
    assert len(runs.trainer.optimizers[0].param_groups[0]["params"]) == 3
    assert runs.difference <= 1e-9


def test_tied_embeddings_on_two_devices_are_refused(hetero: Any, devices: str) -> None:
    where = in_order(devices, "012", "net.embed", "net.body", "net.head")
    with pytest.raises(PlacementError, match=r"'net.embed' on .* and 'net.head' on .* share a parameter, so they must"):
        hetero(devices=devices, placement=where).fit(Predicts(Tied()), tokens())


class Dropping(nn.Module):
    """Dropout inside of parts, between them, and as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3)) for _ in range(3))
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = self.drop(torch.tanh(part(x)))
        return self.head(F.dropout(x, 0.1, self.training))  # type: ignore[no-any-return]


def test_dropout_does_not_depend_on_how_many_micro_batches_are_under_way(hetero: Any, devices: str) -> None:
    """The same seed gives the same weights, in every schedule and at any speed."""
    weights = []
    for schedule in ("1f1b", "gpipe", "sequential", "1f1b"):
        pl.seed_everything(5, verbose=False)
        model = Classifier(Dropping())
        hetero(devices=devices, strategy={**WHOLE_STEPS, "schedule": schedule}).fit(model, loader())
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for other in weights for a, b in zip(weights[0], other, strict=True))


def test_dropout_does_not_depend_on_how_many_devices_the_cpu_plays(hetero: Any) -> None:
    """As many lanes as devices and one more are under way at once."""
    weights = []
    for devices in ("cpu@speed=1,cpu@speed=1", "cpu@speed=1,cpu@speed=1,cpu@speed=3", "cpu@speed=4,cpu@speed=1"):
        for again in (False, True):
            pl.seed_everything(5, verbose=False)
            model = Classifier(Dropping())
            options = {"micro_batches": 6, "rematerialize": again, "no_split": "Sequential"}
            hetero(devices=devices, placement="round_robin", strategy=options).fit(model, loader())
            weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for other in weights for a, b in zip(weights[0], other, strict=True))


@pytest.mark.parametrize("mode", ["forward", "step"])
@pytest.mark.parametrize("frozen", ["0", "345"])
def test_frozen_stages(frozen: str, mode: str, fit_both: Any, devices: str) -> None:
    class Partly(Classifier):
        def __init__(self) -> None:
            super().__init__()
            for digit in frozen:
                self.net.get_submodule(f"l{digit}").requires_grad_(False)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1, momentum=0.9)

    runs = fit_both(Partly, loader(), devices=devices, strategy={"micro_batching": mode})
    assert all(batch.micro_batches == {0, 1, 2, 3} for batch in runs.watch.train[3:])
    assert runs.difference <= ROUNDING
    assert all(runs.spread.net.get_submodule(f"l{digit}").weight.grad is None for digit in frozen)


@pytest.mark.feature("modules: frozen layers, and layers that are not used")
@pytest.mark.parametrize("mode", ["forward", "step"])
def test_a_backbone_that_thaws_on_the_way(mode: str, fit_both: Any, devices: str) -> None:
    class Tuned(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.ModuleList([self.net.l0, self.net.l1, self.net.l2])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)

    tuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda _: 1.0)
    runs = fit_both(
        Tuned, loader(), devices=devices, strategy={"micro_batching": mode}, callbacks=[tuning], max_epochs=3
    )
    assert all(batch.micro_batches == {0, 1, 2, 3} for batch in runs.watch.train[3:])
    assert runs.difference <= ROUNDING


# 23, 24: what people hang on modules


class Counts(Classifier):
    """Counts the calls of everything that can be hooked."""

    def __init__(self, kinds: str) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        counts = self.counts
        for name, module in [("net", self.net), *((f"net.{n}", m) for n, m in self.net.named_children())]:
            inner = "inner" if name != "net" else "outer"
            if f"{inner} forward" in kinds:
                module.register_forward_pre_hook(lambda *_, n=name: counts.update([f"{n} before"]))
                module.register_forward_hook(lambda *_, n=name: counts.update([f"{n} after"]))
            if f"{inner} backward" in kinds:
                module.register_full_backward_hook(lambda *_, n=name: counts.update([f"{n} backward"]))
        if "parameters" in kinds or "all" in kinds:
            for name, parameter in self.named_parameters():
                parameter.register_hook(lambda _, n=name: counts.update([f"{n} gradient"]))
                parameter.register_post_accumulate_grad_hook(lambda _, n=name: counts.update([f"{n} accumulated"]))

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer.register_step_pre_hook(lambda *_: self.counts.update(["step"]))
        return optimizer

    def on_before_zero_grad(self, *_: Any) -> None:
        self.counts["on_before_zero_grad"] += 1

    def on_before_backward(self, *_: Any) -> None:
        self.counts["on_before_backward"] += 1

    def on_after_backward(self) -> None:
        self.counts["on_after_backward"] += 1
        assert all(p.grad is not None for p in self.parameters())

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.counts["on_before_optimizer_step"] += 1


@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed")
@pytest.mark.parametrize(
    "kinds",
    [
        "",
        "parameters",
        "outer forward",
        "outer backward",
        "inner forward",
        "inner backward",
        "inner forward, parameters",
    ],
)
def test_hooks_are_called_as_often_as_on_one_device(kinds: str, fit_both: Any, devices: str) -> None:
    runs = fit_both(lambda: Counts(kinds), loader(24), loader(7, 7), devices=devices, max_epochs=1)
    assert runs.spread.counts == runs.alone.counts
    assert runs.difference <= ROUNDING
    if "inner" not in kinds:
        runs.check_every_batch_was_cut()


@pytest.mark.parametrize("kinds", ["", "parameters"])
def test_hooks_in_whole_steps_are_called_once_for_a_batch(kinds: str, fit_both: Any, devices: str) -> None:
    runs = fit_both(lambda: Counts(kinds), loader(24), devices=devices, max_epochs=1, strategy=WHOLE_STEPS)
    assert runs.spread.counts == runs.alone.counts
    assert runs.difference <= ROUNDING


class Compiled(Classifier):
    """Two stages of which torch.compile has made one piece each."""

    def __init__(self, backend: str, way: str) -> None:
        super().__init__(nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)), nn.Linear(8, 4)))
        for index in (0, 2):
            if way == "function":
                self.net[index] = torch.compile(self.net[index], backend=backend)  # type: ignore[index, operator]
            else:
                self.net[index].compile(backend=backend)  # type: ignore[index]


@pytest.mark.feature("compile: torch.compile of submodules")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
@pytest.mark.parametrize("mode", ["forward", "step"])
@pytest.mark.parametrize("way", ["function", "method"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_stages(backend: str, way: str, mode: str, fit_both: Any) -> None:
    torch._dynamo.reset()
    where = {"net.0": PLACES[0], "net.1": PLACES[0], "net.2": PLACES[1], "net.3": PLACES[1]}
    runs = fit_both(
        lambda: Compiled(backend, way), loader(24), loader(7, 7), placement=where, strategy={"micro_batching": mode}
    )
    runs.check_every_batch_was_cut()
    assert runs.difference <= ROUNDING
    assert runs.metrics_differ_by <= ROUNDING


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_the_compiler_sees_what_users_compile_and_nothing_else(hetero: Any) -> None:
    """Not the clocks of devices that the CPU plays: what they know changes while others compile."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    hetero(max_epochs=1).fit(Compiled("eager", "method"), loader(24))
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_settings_of_the_compiler_reach_the_devices(hetero: Any) -> None:
    seen: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(torch._dynamo.config.recompile_limit)
        return graph.forward

    model = Classifier(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)))
    model.net[0] = torch.compile(model.net[0], backend=backend)  # type: ignore[index, operator, call-overload]
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=77):
        hetero(max_epochs=1).fit(model, loader(24))
    assert set(seen) == {77}


class InBf16(nn.Module):
    """Refuses to compute in anything else."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        assert y.dtype == torch.bfloat16
        return torch.tanh(y)


@pytest.mark.feature("precision: bf16-mixed")
@pytest.mark.parametrize("mode", ["forward", "step"])
def test_mixed_precision_reaches_every_device(mode: str, fit_both: Any, devices: str) -> None:
    class Mixed(Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(*(InBf16() for _ in range(3)), nn.Linear(8, 4)))
            self.float()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step([batch[0].float(), batch[1]], batch_idx)

    runs = fit_both(Mixed, loader(24), devices=devices, strategy={"micro_batching": mode}, precision="bf16-mixed")
    runs.check_every_batch_was_cut()
    assert {p.dtype for p in runs.spread.parameters()} == {torch.float32}
    # bf16 has 8 bits; six steps of 0.1 with gradients below 1.
    assert 0.0 < runs.difference < 6 * 0.1 * 2**-7
    assert runs.metrics_differ_by < 2**-7


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("options", [{}, {"rematerialize": True}, WHOLE_STEPS], ids=str)
def test_a_device_that_compiles_does_not_disturb_the_others(options: dict[str, Any], hetero: Any) -> None:
    """Every task stays on its device, and dropout is repeatable, while another device is busy with the compiler."""
    names: queue.SimpleQueue[str] = queue.SimpleQueue()  # which is no state that a trial would see

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            names.put(threading.current_thread().name.rstrip("0123456789"))
            return F.dropout(self.linear(x), 0.2)

    def slowly(graph: Any, inputs: Any) -> Any:
        time.sleep(0.05)
        return graph.forward

    def run() -> list[Tensor]:
        torch._dynamo.reset()
        pl.seed_everything(3, verbose=False)
        net = nn.Sequential(Watched(), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 4))
        net[1] = torch.compile(net[1], backend=slowly)  # type: ignore[index, operator, call-overload]
        model = Classifier(net)
        where = {f"net.{index}": place for index, place in enumerate(PLACES)}
        hetero(placement=where, strategy={"micro_batches": 8, **options}, max_epochs=1).fit(model, loader(40, 16))
        return [p.detach().clone() for p in model.parameters()]

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert {names.get() for _ in range(names.qsize())} <= {"MainThread", "hetero-worker-emulated:"}


# What parts leave behind in their arguments


@dataclass
class Notes:
    """A structure that parts write into."""

    total: Any = 0.0


class Kinds:
    """Ways to hand something on: what the caller makes, what a part does with it, what the caller finds."""

    @staticmethod
    def make(kind: str) -> Any:
        return {"list": list, "dict": dict, "dataclass": Notes}[kind]()

    @staticmethod
    def add(notes: Any, value: Tensor) -> None:
        if isinstance(notes, list):
            notes.append(value)
        elif isinstance(notes, dict):
            notes[f"layer {len(notes)}"] = value
        else:
            notes.total = notes.total + value

    @staticmethod
    def found(notes: Any, x: Tensor) -> Tensor:
        """One value for each row."""
        nothing = torch.zeros(len(x), dtype=x.dtype)
        if isinstance(notes, Notes):
            return nothing + notes.total
        return sum(notes if isinstance(notes, list) else notes.values(), start=nothing)


class Expert(nn.Module):
    """A part with a loss of its own, which it leaves with its caller."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, notes: Any) -> Tensor:
        y = torch.tanh(self.linear(x))
        Kinds.add(notes, y.pow(2).mean(1))
        return y


class Experts(nn.Module):
    """A mixture whose parts write their losses into what it hands them, or into what it was handed."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c, self.head = Expert(), Expert(), Expert(), nn.Linear(8, 4)

    def forward(self, x: Tensor, notes: Any = None) -> tuple[Tensor, Tensor]:
        mine = Kinds.make(self.kind) if notes is None else notes
        x = self.c(self.b(self.a(x, mine), mine), mine)
        return self.head(x), Kinds.found(mine, x)


class WithLosses(Classifier):
    def __init__(self, kind: str, whose: str) -> None:
        super().__init__(Experts(kind))
        self.kind, self.whose = kind, whose

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        if self.whose == "the model's":
            scores, extra = self.net(x)
        else:
            notes = Kinds.make(self.kind)
            scores, _ = self.net(x, notes)
            extra = Kinds.found(notes, x)
        return F.cross_entropy(scores, y) + extra.mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))


@pytest.mark.parametrize("mode", ["whole", "forward", "step"])
@pytest.mark.parametrize(
    ("kind", "whose"),
    [("list", "the model's"), ("dict", "the model's"), ("dataclass", "the model's"), ("list", "the step's")],
)
def test_what_parts_write_into_an_argument_reaches_the_caller(
    kind: str, whose: str, mode: str, fit_both: Any, devices: str
) -> None:
    options = {"micro_batches": 1} if mode == "whole" else {"micro_batching": mode}
    runs = fit_both(
        lambda: WithLosses(kind, whose),
        loader(),
        loader(7, 7),
        devices=devices,
        placement="round_robin",
        strategy=options,
        watched=mode != "whole",
    )
    assert runs.difference <= ROUNDING
    assert runs.metrics_differ_by <= ROUNDING


# Gradients between the outputs of a model


class Features(nn.Module):
    """Returns scores, and the features that they were made of."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.tanh(self.a(x))
        return self.head(torch.tanh(self.b(features))), features


@pytest.mark.parametrize("way", ["retain_grad", "register_hook"])
def test_gradients_of_scores_that_reach_the_features_beside_them(way: str, fit_both: Any, devices: str) -> None:
    """As class activation maps need them: an error, and no wrong number."""

    class Penalised(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            scores, features = self.net(x)
            if way == "retain_grad":
                features.retain_grad()
            else:
                features.register_hook(lambda gradient: gradient)
            return F.cross_entropy(scores, y)

    text = "the gradient of an output of net is asked for by a hook or retain_grad"
    with pytest.raises(RuntimeError, match=text):
        fit_both(lambda: Penalised(Features()), loader(), devices=devices)


def slope_of(loss: Tensor, features: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad(loss, features, retain_graph=True)
    return slope


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "torch.autograd.grad": lambda loss, features: torch.autograd.grad(loss, features, retain_graph=True)[0],
    "imported": lambda loss, features: ask_for_gradients(loss, features, retain_graph=True)[0],
    "in a helper": lambda loss, features: slope_of(loss, features),
}


@pytest.mark.parametrize("sees_both", [False, True])
@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
def test_gradients_by_the_features_that_stand_beside_scores(
    way: Callable[[Tensor, Tensor], Tensor],
    sees_both: bool,
    fit_both: Any,
    devices: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As penalties on features need them. Cut, one of a loss that sees both would have its direct part alone."""

    class Penalised(Classifier):
        slope_of = staticmethod(way)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            scores, features = self.net(x)
            loss = F.cross_entropy(scores, y) + (features.square().mean() if sees_both else 0.0)
            return loss * (1 + self.slope_of(loss, features).abs().sum())

    runs = fit_both(lambda: Penalised(Features()), loader(), devices=devices, watched=False)
    assert runs.difference <= ROUNDING
    assert "one of its outputs is made of another" in caplog.text


def test_a_rule_for_larger_batches_than_the_first(fit_both: Any, devices: str) -> None:
    """Nothing but the number of rows decides, and the first batches are too small."""

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x - x.mean(0) if len(x) > 9 else x)))  # type: ignore[no-any-return]

    x, y = rows(56)
    batches = [(x[i : i + 8], y[i : i + 8]) for i in (0, 8, 16, 24)] + [(x[32:], y[32:])] * 2
    data: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    runs = fit_both(lambda: Classifier(Centred()), data, devices=devices)
    assert runs.difference <= ROUNDING
