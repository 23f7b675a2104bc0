"""Signals, hangs and the end of the interpreter, in processes of their own, compared with plain Lightning."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

Ending = tuple[int | None, list[str]]  # exit status, None if there is none; and what was printed

PROGRAM = """
import logging, signal, sys, threading, time, warnings

warnings.simplefilter("ignore")
import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning_hetero import HeteroStrategy

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
what = sys.argv[1]


class Sleeps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, part):
        ctx.hangs = what.endswith("backward") and bool((x.abs() > 1e3).any())
        time.sleep(0.01)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        if ctx.hangs:
            threading.Event().wait()
        time.sleep(0.01)
        return gradient, None


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        with torch._C.DisableTorchFunction():
            stuck = what.startswith("hang") and not what.endswith("backward") and bool((x > 1e3).any())
        if stuck:
            print("stuck", flush=True)
            threading.Event().wait()
        return Sleeps.apply(self.linear(x), self)


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(Part(), Part(), Part())

    def training_step(self, batch, batch_idx):
        if batch_idx == 6:
            print("ready", flush=True)
        return self.net(batch[0]).tanh().pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def on_exception(self, exception):
        print("on_exception", type(exception).__name__, flush=True)


class Says(pl.Callback):
    def on_exception(self, trainer, module, exception):
        print("exception", type(exception).__name__, flush=True)

    def teardown(self, *args, **kwargs):
        print("teardown", flush=True)


options = {"strategy": "auto", "accelerator": "cpu", "devices": 1}
if what != "plain":
    mode = "step" if what.endswith("step") else "forward"
    options = {
        "strategy": HeteroStrategy(
            devices="cpu@speed=1,cpu@speed=1,cpu@speed=1", placement="even", micro_batches=4, micro_batching=mode,
            verbose=False, hang_timeout_s=1.0 if what.startswith("hang") else 60.0,
        )
    }
x = torch.randn(800 if what in ("hang forward", "hang step") else 24000, 8)
if what.startswith("hang"):
    x[52] = 1e6  # in the seventh batch
batches = 8 if what.endswith("to the end") else len(x) // 8
trainer = pl.Trainer(
    **options, max_epochs=1, limit_train_batches=batches, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, callbacks=[Says()],
)
trainer.fit(Model(), DataLoader(TensorDataset(x), batch_size=8))
left = [t.name for t in threading.enumerate() if "hetero" in t.name]
print("end", trainer.state.status.value, left, flush=True)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


@contextmanager
def running(program: Path, root: Path, what: str) -> Iterator[subprocess.Popen[str]]:
    """The program in the middle of its training; killed at the end, should it still run."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    environment.pop("LIGHTNING_HETERO_AUTOREGISTER", None)
    process = subprocess.Popen(
        [sys.executable, str(program), what],
        env=environment,
        cwd=program.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    try:
        yield process
    finally:
        process.kill()
        watchdog.cancel()
        watchdog.join()
        process.communicate()


def signalled(process: subprocess.Popen[str], number: int) -> Ending:
    """The exit status after a signal in the middle of training, and what was printed after it."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "ready":
            break
    process.send_signal(number)
    try:
        printed, _ = process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        return None, []
    return process.returncode, [
        line for line in printed.splitlines() if line.startswith(("exception", "end", "teardown"))
    ]


@pytest.fixture(scope="module")
def of_plain_lightning(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, int], Ending]:
    """How plain Lightning ends on a signal; asked once for each."""
    path = tmp_path_factory.mktemp("plain") / "program.py"
    path.write_text(PROGRAM)

    @cache
    def ask(root: Path, number: int) -> Ending:
        with running(path, root, "plain") as process:
            return signalled(process, number)

    return ask


@pytest.mark.feature("loops: signals")
@pytest.mark.parametrize(
    ("what", "number"),
    [("forward", signal.SIGINT), ("forward", signal.SIGTERM), ("step", signal.SIGINT)],
    ids=["forward, SIGINT", "forward, SIGTERM", "step, SIGINT"],
)
def test_a_signal_ends_the_program_as_it_ends_plain_lightning(
    what: str, number: int, program: Path, of_plain_lightning: Any, pytestconfig: pytest.Config
) -> None:
    root = pytestconfig.rootpath
    status, printed = of_plain_lightning(root, number)
    assert status is not None
    assert printed[0].startswith("exception")
    assert not any(line.startswith("end") for line in printed)
    with running(program, root, what) as process:
        assert signalled(process, number) == (status, printed)


def test_the_interpreter_ends_after_a_run(program: Path, pytestconfig: pytest.Config) -> None:
    with running(program, pytestconfig.rootpath, "forward to the end") as process:
        printed, _ = process.communicate(timeout=40)
    assert printed.splitlines()[-1] == "end finished []"
    assert process.returncode == 0


@pytest.mark.parametrize("where", ["forward", "in the first steps", "in the first steps, backward"])
def test_a_device_that_never_answers_ends_the_program_with_an_error(
    where: str, program: Path, pytestconfig: pytest.Config
) -> None:
    """The limit for a call is a second. Whoever is still there long after the error is stuck itself."""
    with running(program, pytestconfig.rootpath, f"hang {where}") as process:
        assert process.stdout is not None
        assert "exception HangError" in map(str.strip, process.stdout)  # reads as far as that, or to the end
        try:
            _, errors = process.communicate(timeout=8)
        except subprocess.TimeoutExpired:
            pytest.fail("the program goes on for more than 8 s after its HangError")
    assert f"has not ended after {1 if where == 'forward' else 1.5:g} s" in errors
    assert "(most recent call first)" in errors  # the stacks of all threads
    assert process.returncode == 1
