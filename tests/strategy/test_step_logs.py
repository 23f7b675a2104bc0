"""What micro-batches of whole steps log, and what they set where their own `self` is not."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_hetero.errors import UnsupportedError
from lightning_hetero.testing.lightning_module import Classifier, data

STEPS = {"strategy": {"micro_batches": 4, "micro_batching": "step"}}
EMULATED = "cpu@speed=1,cpu@speed=1,cpu@speed=1"


class Steps(Classifier):
    """Logs what is asked for."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.write(x, loss)
        return loss

    def write(self, x: Tensor, loss: Tensor) -> None:
        raise NotImplementedError


class Watch(pl.Callback):
    """Keeps what has been logged by the end of each batch, and what progress bars show."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.shown: set[str] = set()

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.steps.append({key: float(value) for key, value in trainer.callback_metrics.items()})
        self.shown |= trainer.progress_bar_metrics.keys()


def logged(
    kind: type[Steps], plain: Any, hetero: Any, rows: int = 26, batch_size: int = 10, **options: Any
) -> tuple[Watch, Watch]:
    """What plain Lightning logs, and what micro-batches log; by default for 26 rows, in batches of 10, 10 and 6."""
    watches = Watch(), Watch()
    plain(callbacks=[watches[0]], max_epochs=2, **options).fit(kind(), data(rows=rows, batch_size=batch_size))
    hetero(devices=EMULATED, callbacks=[watches[1]], max_epochs=2, **options, **STEPS).fit(
        kind(), data(rows=rows, batch_size=batch_size)
    )
    return watches


def assert_equal(watches: tuple[Watch, Watch], bound: float = 1e-6) -> None:
    theirs, ours = watches
    assert len(ours.steps) == len(theirs.steps)
    for step, other in zip(ours.steps, theirs.steps, strict=True):
        assert step.keys() == other.keys()
        assert step == pytest.approx(other, abs=bound)
    assert ours.shown == theirs.shown


def test_what_is_logged_is_what_it_was_at_that_moment(plain: Any, hetero: Any) -> None:
    class Goes(Steps):
        def write(self, x: Tensor, loss: Tensor) -> None:
            value = loss.detach().clone()
            self.log("before", value, on_step=True, on_epoch=True)
            value += 7  # in place
            self.log("after", value, on_step=True, on_epoch=True)

    assert_equal(logged(Goes, plain, hetero))


def test_options_by_position(plain: Any, hetero: Any) -> None:
    class Positions(Steps):
        def write(self, x: Tensor, loss: Tensor) -> None:
            self.log("value", loss, True, False, True, True)  # prog_bar, logger, on_step, on_epoch

    watches = logged(Positions, plain, hetero, enable_progress_bar=False)
    assert_equal(watches)
    assert "value_step" in watches[1].shown
    assert "value_epoch" in watches[1].steps[-1]


@pytest.mark.parametrize("size", [1, 10, 64])
def test_a_constant_batch_size_leaves_the_weights_to_rows(plain: Any, hetero: Any, size: int) -> None:
    class Constant(Steps):
        def write(self, x: Tensor, loss: Tensor) -> None:
            self.log("value", loss, batch_size=size, on_step=True, on_epoch=True)

    assert_equal(logged(Constant, plain, hetero))


@pytest.mark.parametrize(("rows", "batch_size"), [(26, 10), (30, 8), (28, 8)])  # parts that are alike, and are not
def test_numbers_of_tokens_are_added_up(plain: Any, hetero: Any, rows: int, batch_size: int) -> None:
    class Tokens(Steps):
        def write(self, x: Tensor, loss: Tensor) -> None:
            self.log("value", loss, batch_size=x.numel(), on_step=True, on_epoch=True)

    assert_equal(logged(Tokens, plain, hetero, rows, batch_size))


def test_rows_that_do_not_count_in_one_part(plain: Any, hetero: Any) -> None:
    class Some(Steps):
        def write(self, x: Tensor, loss: Tensor) -> None:
            valid = x[:, 0] > 0.4
            mean = x[valid].mean() if bool(valid.any()) else x.sum() * 0
            self.log("value", mean, batch_size=int(valid.sum()), on_step=True, on_epoch=True)

    assert_equal(logged(Some, plain, hetero))


def test_constants_and_numbers_of_python_stay_what_they_are(plain: Any, hetero: Any) -> None:
    class Constants(Steps):
        def write(self, x: Tensor, loss: Tensor) -> None:
            self.log("one", torch.ones((), dtype=torch.float64), on_step=True, on_epoch=True)
            self.log("step", float(self.global_step), on_step=True, on_epoch=False)
            self.log("tenth", 0.1, on_step=True, on_epoch=False)

    theirs, ours = logged(Constants, plain, hetero, precision="64-true")
    assert ours.steps == theirs.steps
    assert ours.steps[-1]["tenth"] == 0.1


def test_what_a_hook_sets_on_the_module_itself_is_refused(hetero: Any) -> None:
    """Micro-batches would read what another one has left there, or nothing."""

    class Hooked(Steps):
        def __init__(self) -> None:
            super().__init__()
            self.net.register_forward_hook(self._keep)

        def _keep(self, module: Any, args: Any, output: Tensor) -> None:
            self.features = output.detach()

        def write(self, x: Tensor, loss: Tensor) -> None:
            pass

    with pytest.raises(UnsupportedError, match=r"self\.features is set in training_step by another way than through"):
        hetero(devices=EMULATED, **STEPS).fit(Hooked(), data(rows=16, batch_size=8))


def test_what_is_set_on_the_class_is_refused(hetero: Any) -> None:
    class Classy(Steps):
        count = 0

        def write(self, x: Tensor, loss: Tensor) -> None:
            type(self).count += 1

    with pytest.raises(UnsupportedError, match=r"type\(self\)\.count is set in training_step"):
        hetero(devices=EMULATED, **STEPS).fit(Classy(), data(rows=16, batch_size=8))


def test_what_is_set_past_setattr_is_there_afterwards(plain: Any, hetero: Any) -> None:
    class Past(Steps):
        def __init__(self) -> None:
            super().__init__()
            self.__dict__["count"] = 0

        def write(self, x: Tensor, loss: Tensor) -> None:
            self.__dict__["count"] += len(x)

    module = Past()
    hetero(devices=EMULATED, **STEPS, max_epochs=2).fit(module, data(rows=16, batch_size=8))
    assert module.__dict__["count"] == 32
