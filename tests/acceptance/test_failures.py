"""Failures while micro-batches run: the user's own exception, soon, with its place, and a next run that works."""

from __future__ import annotations

import gc
import re
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric

from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.lightning_module import difference

ROUNDING = 1e-12
UNEQUAL = "cpu@speed=2,cpu@speed=1,cpu@speed=1"
BAD_BATCH, BAD_ROW, BATCH = 4, 5, 8

pytestmark = pytest.mark.timeout(60)  # a hang is a failure of this test, not of the whole run


class MyError(Exception):
    """What user code raises."""


class MyExit(BaseException):
    """What user code raises that is no Exception."""


def data(bad: bool = True) -> DataLoader[Any]:
    """Six batches of eight; a row of the fifth is huge. Before, every way to run has been tried out."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6 * BATCH, 8, generator=generator, dtype=torch.float64)
    if bad:
        x[BAD_BATCH * BATCH + BAD_ROW] = 1e6
    return DataLoader(TensorDataset(x, torch.randint(4, (len(x),), generator=generator)), batch_size=BATCH)


def is_bad(x: Tensor) -> bool:
    """Whether the huge row is in it. Looks past modes of torch, so that nobody takes it for a decision by content."""
    with torch._C.DisableTorchFunction():
        return bool((x.detach().cpu().abs() > 1e3).any())


class Bad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, happen: Callable[[], Any]) -> Tensor:
        ctx.bad, ctx.happen = is_bad(x), happen
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.bad:
            ctx.happen()
        return gradient, None


class Part(nn.Module):
    """A stage in which something happens."""

    def __init__(self, place: str, happen: Callable[[], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.place, self.happen = place, happen

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.weight
        if self.place == "forward" and is_bad(x):
            self.happen()
        return Bad.apply(y, self.happen) if self.place == "backward" else y  # type: ignore[no-any-return]


class Fragile(Metric):
    """A metric that does not like huge values."""

    def __init__(self, happen: Callable[[], Any]) -> None:
        super().__init__()
        self.happen = happen
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x: Tensor) -> None:
        if is_bad(x):
            self.happen()
        self.total += x.sum()

    def compute(self) -> Tensor:
        return self.total


class Model(pl.LightningModule):
    """Fails at one of many places."""

    def __init__(self, place: str = "", happen: Callable[[], Any] = lambda: None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.place, self.happen = place, happen
        self.armed: list[bool] = []
        self.net = nn.Sequential(nn.Linear(8, 8), Part(place, happen), nn.Linear(8, 4)).double()
        if place == "metric":
            self.metric = Fragile(happen)
        middle = self.net[1]
        if place == "forward hook":
            middle.register_forward_hook(lambda module, args, output: self.check(args[0]))
        if place == "backward hook":
            middle.register_full_backward_hook(lambda module, into, out: self.happen() if self.armed else None)
        if place == "parameter hook":
            middle.weight.register_hook(lambda gradient: self.happen() if self.armed else None)

    def check(self, x: Tensor) -> None:
        if is_bad(x):
            self.happen()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        scores = self(x)
        if self.place == "metric":
            self.metric.update(scores)
        if self.place == "training_step" and is_bad(x):
            self.happen()
        return F.cross_entropy(scores, y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == BAD_BATCH:
            self.armed.append(True)

    def on_after_backward(self) -> None:
        if self.place == "on_after_backward":
            self.happen()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def raise_error() -> None:
    raise MyError("from user code")


def raise_exit() -> None:
    raise SystemExit(7)


def raise_my_exit() -> None:
    raise MyExit("from user code")


def raise_interrupt() -> None:
    raise KeyboardInterrupt


def check_the_next_run(plain: Any, hetero: Any, devices: str, options: dict[str, Any]) -> None:
    alone, spread = Model(), Model()
    plain().fit(alone, data(bad=False))
    hetero(devices=devices, placement="round_robin", strategy=options).fit(spread, data(bad=False))
    assert difference(alone, spread) <= ROUNDING


# (place, whether a note has to tell device and unit, whether a note has to tell the micro-batch; by mode)
PLACES = {
    "forward": {"forward": (True, True), "step": (True, True)},
    "backward": {"forward": (True, True), "step": (True, True)},
    # Modules with hooks of user code run whole in "forward".
    "forward hook": {"forward": (False, False), "step": (True, True)},
    "backward hook": {"forward": (False, False), "step": (True, True)},
    "parameter hook": {"forward": (False, False), "step": (False, False)},
    "training_step": {"forward": (False, False), "step": (False, True)},
    "metric": {"forward": (False, False), "step": (False, True)},
    "on_after_backward": {"forward": (False, False), "step": (False, False)},
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed")
@pytest.mark.parametrize("mode", ["forward", "step"])
@pytest.mark.parametrize("place", PLACES)
def test_an_exception_is_the_users_own_and_says_where_it_happened(
    place: str, mode: str, plain: Any, hetero: Any, devices: str
) -> None:
    options = {"micro_batching": mode}
    with pytest.raises(MyError, match="from user code") as caught:
        hetero(devices=devices, placement="round_robin", strategy=options).fit(Model(place, raise_error), data())
    assert "raise_error" in [entry.name for entry in caught.traceback]
    notes = getattr(caught.value, "__notes__", [])
    tells_device, tells_micro_batch = PLACES[place][mode]
    word = "backward" if "backward" in place else "forward"
    where = "Model" if mode == "forward" else "the training step"
    assert [note for note in notes if re.fullmatch(rf"{word} of net.1\S* on (cpu|dev:\d|emulated:\d)", note)] == (
        [note for note in notes if " on " in note] if tells_device else []
    )
    assert any(" of net.1" in note for note in notes) == tells_device
    numbers = [note for note in notes if re.fullmatch(rf"micro-batch \d of 4 in {where}", note)]
    assert len(numbers) == tells_micro_batch
    if "hook" not in place and tells_micro_batch:
        assert numbers == [f"micro-batch {BAD_ROW // 2} of 4 in {where}"]
    check_the_next_run(plain, hetero, devices, options)


@pytest.mark.parametrize("mode", ["forward", "step"])
@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize(("happen", "kind"), [(raise_exit, SystemExit), (raise_my_exit, MyExit)])
def test_what_is_no_exception_ends_the_run_too(
    happen: Any, kind: type[BaseException], place: str, mode: str, plain: Any, hetero: Any
) -> None:
    options = {"micro_batching": mode}
    with pytest.raises(kind) as caught:
        hetero(placement="round_robin", strategy=options).fit(Model(place, happen), data())
    assert happen.__name__ in [entry.name for entry in caught.traceback]
    if kind is SystemExit:
        assert caught.value.code == 7
    check_the_next_run(plain, hetero, UNEQUAL, options)


@pytest.fixture
def _usual_interrupts() -> Iterator[None]:
    """Lightning ignores SIGINT from the first one on."""
    usual = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, usual)


@pytest.mark.feature("loops: KeyboardInterrupt")
@pytest.mark.usefixtures("_usual_interrupts")
@pytest.mark.parametrize("mode", ["forward", "step"])
@pytest.mark.parametrize("place", ["forward", "backward", "training_step"])
def test_an_interrupt_from_within_is_the_exit_that_lightning_makes_of_it(
    place: str, mode: str, plain: Any, hetero: Any, devices: str
) -> None:
    options = {"micro_batching": mode}
    codes = []
    for trainer in (plain(), hetero(devices=devices, placement="round_robin", strategy=options)):
        with pytest.raises(SystemExit) as caught:
            trainer.fit(Model(place, raise_interrupt), data())
        codes.append(caught.value.code)
    assert codes == [1, 1]
    check_the_next_run(plain, hetero, devices, options)


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_a_rematerialized_run_fails_in_the_same_way(place: str, plain: Any, hetero: Any, devices: str) -> None:
    options = {"rematerialize": True}
    with pytest.raises(MyError, match="from user code") as caught:
        hetero(devices=devices, placement="round_robin", strategy=options).fit(Model(place, raise_error), data())
    assert f"micro-batch {BAD_ROW // 2} of 4 in Model" in caught.value.__notes__
    check_the_next_run(plain, hetero, devices, options)


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_failures_without_gradients(verb: str, plain: Any, hetero: Any, devices: str) -> None:
    class Infers(Model):
        test_step = Model.validation_step

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0])

    with pytest.raises(MyError, match="from user code") as caught:
        getattr(hetero(devices=devices, placement="round_robin"), verb)(Infers("forward", raise_error), data())
    assert f"micro-batch {BAD_ROW // 2} of 4 in Infers" in caught.value.__notes__
    check_the_next_run(plain, hetero, devices, {})


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_a_user_may_leave_a_bad_batch_out(place: str, fit_both: Any, devices: str) -> None:
    """The well-known way to survive one: catch the exception and go on with the next batch."""

    class Careful(Model):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            optimizer = self.optimizers()
            optimizer.zero_grad()
            try:
                self.manual_backward(super().training_step(batch, batch_idx))
            except MyError:
                optimizer.zero_grad()
                return
            optimizer.step()

    runs = fit_both(lambda: Careful(place, raise_error), data(), devices=devices, placement="round_robin")
    assert runs.difference <= ROUNDING
    assert runs.trainer.global_step == runs.plain.global_step == 10
    assert runs.watch.train[-1].micro_batches == {0, 1, 2, 3}


@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize("options", [{}, {"micro_batching": "step"}, {"rematerialize": True}], ids=str)
def test_nothing_is_kept_of_a_run_that_failed(
    options: dict[str, Any], place: str, hetero: Any, accelerator: EmulatedAccelerator
) -> None:
    """Parameters and activations on the accelerator are freed."""
    if accelerator.kind != "cpp":
        pytest.skip("counters of memory are those of the C++ backend")
    devices = ",".join(["cpu", *accelerator.devices[:2]])
    gc.collect()
    before = [accelerator.stats(index).used_bytes for index in range(2)]
    with pytest.raises(MyError):
        hetero(devices=devices, placement="round_robin", strategy=options).fit(Model(place, raise_error), data())
    gc.collect()
    assert [accelerator.stats(index).used_bytes for index in range(2)] == before


# Out of memory


class Wide(pl.LightningModule):
    """Activations are most of what it needs."""

    def __init__(self, batch_size: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.batch_size = batch_size
        self.net = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6)))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).pow(2).mean()  # type: ignore[no-any-return]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self(batch[0]).pow(2).mean(), prog_bar=False)

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])  # type: ignore[no-any-return]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.ones(4096, 8)), batch_size=self.batch_size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


LIMIT = 64 << 10
ROOTS = ["the CPU", "the accelerator"]


def capped(accelerator: EmulatedAccelerator, root: str) -> tuple[str, dict[str, str]]:
    """Two devices, the accelerator's with little memory; and where the layers go."""
    if accelerator.kind != "cpp":
        pytest.skip("limits of memory are those of the C++ backend")
    small = accelerator.devices[0]
    other = "cpu" if root == "the CPU" else accelerator.devices[1]
    gc.collect()
    # What other tests hold on to is none of this one's business.
    accelerator.configure(0, cap_bytes=accelerator.stats(0).used_bytes + LIMIT)
    first = (other, small) if root == "the CPU" else (small, other)
    return ",".join(first), {f"net.{index}": first[index // 3] for index in range(6)}


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("options", [{}, {"micro_batching": "step"}, {"rematerialize": True}], ids=str)
def test_out_of_memory_is_what_lightning_takes_it_for(
    options: dict[str, Any], root: str, hetero: Any, accelerator: EmulatedAccelerator
) -> None:
    devices, where = capped(accelerator, root)
    trainer = hetero(devices=devices, placement=where, strategy=options, max_epochs=1, num_sanity_val_steps=0)
    with pytest.raises(torch.OutOfMemoryError, match=f"{accelerator.devices[0]} is out of memory") as caught:
        trainer.fit(Wide(1024))
    assert is_oom_error(caught.value)
    assert caught.value.__notes__[-1].startswith("What helps, in the order of effort: a smaller batch;")


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_out_of_memory_without_gradients_too(verb: str, hetero: Any, accelerator: EmulatedAccelerator) -> None:
    devices, where = capped(accelerator, "the CPU")
    with pytest.raises(torch.OutOfMemoryError, match=f"{accelerator.devices[0]} is out of memory") as caught:
        getattr(hetero(devices=devices, placement=where), verb)(Wide(4096))
    assert is_oom_error(caught.value)
    assert caught.value.__notes__[-1].startswith("What helps, in the order of effort: a smaller batch;")


def test_a_batch_that_has_no_room_on_the_root_is_out_of_memory_too(
    hetero: Any, accelerator: EmulatedAccelerator
) -> None:
    devices, where = capped(accelerator, "the accelerator")
    trainer = hetero(devices=devices, placement=where, max_epochs=1, num_sanity_val_steps=0)
    with pytest.raises(torch.OutOfMemoryError, match=f"{accelerator.devices[0]} is out of memory") as caught:
        trainer.fit(Wide(4096))
    assert is_oom_error(caught.value)


@pytest.mark.parametrize(
    ("root", "options"),
    [
        *((root, {}) for root in ROOTS),
        ("the accelerator", {"micro_batching": "step"}),
        ("the accelerator", {"rematerialize": True}),
    ],
    ids=str,
)
def test_the_batch_size_finder_finds_a_size(
    options: dict[str, Any], root: str, hetero: Any, accelerator: EmulatedAccelerator
) -> None:
    devices, where = capped(accelerator, root)
    trainer = hetero(devices=devices, placement=where, strategy=options, max_epochs=1, num_sanity_val_steps=0)
    model = Wide()
    size = Tuner(trainer).scale_batch_size(model, mode="power", steps_per_trial=2, init_val=16, max_trials=9)
    assert size is not None
    assert 16 < size < 4096
    assert model.batch_size == size
    model.batch_size = size // 2  # at the very limit it depends on timing how much is alive at once
    trainer.fit(model)
    assert trainer.global_step == -(-4096 // (size // 2))


def test_no_thread_is_left_by_runs_that_fail(hetero: Any, devices: str) -> None:
    before = threading.active_count()
    for index in range(6):
        with pytest.raises(MyError):
            hetero(devices=devices, placement="round_robin").fit(
                Model(("forward", "backward")[index % 2], raise_error), data()
            )
    assert threading.active_count() == before
