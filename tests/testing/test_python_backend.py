"""The Python backend in processes of its own: the suite of every backend, a run of Lightning, and its limits."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_hetero.testing import cpp_build

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(params=["cpp", "python"])
def kind(request: pytest.FixtureRequest) -> str:
    missing = None if request.param == "python" or cpp_build.is_built() else cpp_build.what_is_missing()
    if missing:
        pytest.skip(f"the C++ backend cannot be built here: this machine lacks {missing}")
    return str(request.param)


@pytest.mark.slow
def test_it_passes_the_suite_of_every_backend(
    run_python: RunPython, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    suite = pytestconfig.rootpath / "tests" / "testing" / "either"
    no_compiler = {"CXX": "no-such-compiler", cpp_build.CACHE_VARIABLE: str(tmp_path / "cache")}
    run = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", str(suite), **no_compiler)
    assert run.returncode == 0, run.stdout[-4000:]
    summary = run.stdout.splitlines()[-1]
    passed = re.fullmatch(r"(\d+) passed in .*", summary)  # none failed, none was skipped
    assert passed, summary
    assert int(passed[1]) > 400


FIT = """
import json, logging, sys, warnings
import lightning.pytorch as pl
import torch
from lightning_hetero import HeteroStrategy
from lightning_hetero.demos.digits import DigitsCNN, DigitsDataModule
from lightning_hetero.testing import install_accelerator

torch.set_num_threads(1)
warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
accelerator = install_accelerator(sys.argv[1])

class Losses(pl.Callback):
    def __init__(self):
        self.seen = []
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen.append(outputs["loss"].item())

def run(**options):
    pl.seed_everything(1, verbose=False)
    losses, model, data = Losses(), DigitsCNN(width=8), DigitsDataModule()
    trainer = pl.Trainer(
        max_epochs=2, limit_train_batches=10, limit_val_batches=1, precision="64-true", callbacks=[losses],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options,
    )
    trainer.fit(model, data)
    return trainer, losses.seen, [value.double().cpu() for value in model.state_dict().values()]

_, expected, alone = run(accelerator="cpu", devices=1)
trainer, found, spread = run(strategy=HeteroStrategy(devices=["dev:0", "cpu"], placement="even", verbose=False))
stats = accelerator.stats(0)
print(json.dumps({
    "kind": accelerator.kind,
    "devices": sorted(device.name for device in trainer.strategy.plan.used),
    "losses": len(found),
    "equal losses": found == expected,
    "learnt": found[-1] < found[0],
    "difference": max((a - b).abs().max().item() for a, b in zip(alone, spread)),
    "crossed": [stats.h2d_bytes > 0, stats.d2h_bytes > 0],
}))
"""


def test_the_trainer_gives_the_results_of_the_cpu_bit_for_bit(run_python: RunPython) -> None:
    """The digits over dev:0 and the CPU, against the CPU alone."""
    run = run_python("-c", FIT, "python")
    assert run.returncode == 0, run.stderr[-4000:]
    assert json.loads(run.stdout.splitlines()[-1]) == {
        "kind": "python",
        "devices": ["cpu", "dev:0"],
        "losses": 20,
        "equal losses": True,
        "learnt": True,
        "difference": 0.0,
        "crossed": [True, True],
    }


LAZY = """
import sys, torch, torch._lazy, torch._lazy.ts_backend
torch._lazy.ts_backend.init()
from lightning_hetero.testing import install_accelerator
devices = install_accelerator(sys.argv[1]).devices

torch.manual_seed(0)
weights = [torch.randn(4, 4, dtype=torch.float64) for _ in range(3)]
x = torch.randn(5, 4, dtype=torch.float64)

def gradients(*places):
    moved, hidden = [], x
    for weight, place in zip(weights, places):
        moved.append(weight.to(place).detach().requires_grad_())
        hidden = torch.nn.functional.linear(hidden.to(place), moved[-1]).tanh()
    hidden.cpu().square().sum().backward()
    return [weight.grad.cpu() for weight in moved]

expected = gradients("cpu", "cpu", "cpu")
for places in ((devices[0], "lazy", devices[1]), ("lazy", devices[1], "cpu"), (devices[1], "cpu", "lazy")):
    pairs = zip(gradients(*places), expected)  # `lazy` compiles, and so rounds as it likes
    print([torch.allclose(*pair, rtol=0, atol=1e-12) for pair in pairs])
"""


def test_tensors_travel_to_and_from_a_third_device_type(run_python: RunPython, kind: str) -> None:
    """Neither type knows the memory of the other, so copies go through the host."""
    run = run_python("-c", LAZY, kind)
    assert run.stdout == "[True, True, True]\n" * 3, run.stderr[-2000:]


LIMITS = """
import torch
from lightning_hetero.testing import install_accelerator
install_accelerator("python")

def attempt(name, work):
    try:
        print(name, work())
    except Exception as error:
        print(name, type(error).__name__)

attempt("pinned memory", lambda: torch.ones(2).pin_memory())
attempt("generator", lambda: torch.Generator(device="dev"))
attempt("generator of the cpu", lambda: torch.rand(2, device="dev", generator=torch.Generator()).device)
attempt("memory statistics", lambda: torch.accelerator.memory_allocated(0))
attempt("memory statistics of torch.dev", lambda: torch.dev.memory_allocated(0))
attempt("synchronize", lambda: torch.accelerator.synchronize())
torch.accelerator.set_device_index(1)
attempt("device of torch.accelerator", lambda: torch.empty(1, device="dev").device)
torch.dev.set_device(1)
attempt("device of torch.dev", lambda: torch.empty(1, device="dev").device)
attempt("to without a number", lambda: torch.ones(1).to("dev").device)
attempt("out", lambda: torch.add(torch.ones(9, device="dev:0"), 1, out=torch.ones(2, device="dev:0").resize_(0)))
"""


def test_its_limits_are_those_that_it_tells(run_python: RunPython) -> None:
    """If one of these works some day, say so in the docstring of `python_backend`."""
    assert run_python("-c", LIMITS).stdout.splitlines() == [
        "pinned memory NotImplementedError",
        "generator NotImplementedError",
        "generator of the cpu dev:0",
        "memory statistics RuntimeError",
        "memory statistics of torch.dev 0",
        "synchronize RuntimeError",
        "device of torch.accelerator dev:0",
        "device of torch.dev dev:1",
        "to without a number dev:0",
        "out RuntimeError",
    ]
