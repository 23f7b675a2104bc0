"""Models that user code hands to torch's compilers and exporters while they are placed, as in `on_train_end`."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hetero.testing.accelerator import EmulatedAccelerator

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torchscript.*:DeprecationWarning", "ignore:.*torch.jit:DeprecationWarning"
)
EMULATED = "cpu@speed=1,cpu@speed=1"
Made = Callable[["Exported"], Any]


class Net(nn.Module):
    """Layers with a skip and a rule for whom to call, as TorchScript compiles it. Input (rows, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 8), nn.LayerNorm(8)
        self.rest = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        h = torch.relu(self.norm(self.first(x)))
        if scale > 1.0:
            h = self.rest(h) * scale
        return h + x


class Exported(pl.LightningModule):
    """Calls `make` with itself at the end of training."""

    def __init__(self, make: Made) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Net()
        self.example_input_array = torch.linspace(-1.0, 1.0, 8).reshape(2, 4)
        self.make = make
        self.made: Any = None

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.net(x)
        return made

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self(batch[0]).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_end(self) -> None:
        with torch.no_grad():
            self.made = self.make(self)


def x_of(module: Exported) -> Tensor:
    return module.example_input_array.to(module.device)  # type: ignore[union-attr]


def ran(script: Any, module: Exported) -> Tensor:
    """What a script makes, saved and loaded in between, as a deployment has it."""
    buffer = io.BytesIO()
    torch.jit.save(script, buffer)
    buffer.seek(0)
    made: Tensor = torch.jit.load(buffer)(x_of(module))
    return made


def to_torchscript(module: Exported) -> Tensor:
    return ran(module.to_torchscript(), module)


def script(module: Exported) -> Tensor:
    return ran(torch.jit.script(module.net), module)


def script_of_a_part(module: Exported) -> Tensor:
    part = torch.jit.script(nn.Sequential(module.net.first, module.net.rest))
    return ran(part, module)


def script_of_a_copy(module: Exported) -> Tensor:
    return ran(torch.jit.script(copy.deepcopy(module.net)), module)


def trace(module: Exported) -> Tensor:
    return ran(module.to_torchscript(method="trace"), module)


def export(module: Exported) -> Tensor:
    made: Tensor = torch.export.export(module.net, (x_of(module),)).module()(x_of(module))
    return made


def export_with_rows_left_open(module: Exported) -> Tensor:
    rows = torch.export.Dim("rows")
    program = torch.export.export(module.net, (x_of(module),), dynamic_shapes={"x": {0: rows}})
    made: Tensor = program.module()(torch.cat([x_of(module)] * 3))
    return made


def signature(module: Exported) -> Any:
    """Transformers asks so what a model takes."""
    forward = module.net.forward
    return str(inspect.signature(forward)), forward.__name__, forward.__doc__, inspect.getsource(forward)


MAKERS = (
    to_torchscript,
    script,
    script_of_a_part,
    script_of_a_copy,
    trace,
    export,
    export_with_rows_left_open,
    signature,
)


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """What plain Lightning makes, once for all."""
    return {}


def trained(trainer: pl.Trainer, make: Made) -> Exported:
    module = Exported(make)
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    trainer.fit(module, DataLoader(TensorDataset(x), batch_size=8))
    return module


@pytest.mark.feature(
    "compile: to_torchscript, torch.jit.script and torch.export in hooks of a run",
    note="What is scripted gets copies of tensors that are not on the root",
)
@pytest.mark.parametrize(("where", "micro_batches"), [("emulated", 2), ("accelerator", 1), ("root on accelerator", 2)])
@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_a_placed_model_is_exported_as_a_plain_one(
    make: Made,
    where: str,
    micro_batches: int,
    plain: Any,
    hetero: Any,
    accelerator: EmulatedAccelerator,
    expected: dict[str, Any],
) -> None:
    name = make.__name__
    if name not in expected:
        expected[name] = trained(plain(max_epochs=1), make).made
    devices = {
        "emulated": EMULATED,
        "accelerator": ["cpu", accelerator.devices[0]],
        "root on accelerator": [accelerator.devices[0], "cpu"],
    }[where]
    module = trained(hetero(devices, strategy={"micro_batches": micro_batches}, max_epochs=1), make)
    if isinstance(expected[name], Tensor):
        assert torch.allclose(module.made.cpu(), expected[name], rtol=0, atol=1e-6)
    else:
        assert module.made == expected[name]
    assert not [key for part in module.modules() for key in vars(part) if key == "__prepare_scriptable__"]


@pytest.mark.feature("compile: to_onnx in hooks of a run")
def test_to_onnx_makes_a_file_that_computes_the_same(
    plain: Any, hetero: Any, accelerator: EmulatedAccelerator, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    alone = trained(plain(max_epochs=1), lambda module: module(x_of(module)))
    devices = [accelerator.devices[0], "cpu"]
    module = trained(
        hetero(devices, strategy={"micro_batches": 2}, max_epochs=1), lambda module: module.eval().to_onnx(path)
    )
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    (made,) = session.run(None, {session.get_inputs()[0].name: x_of(module).cpu().numpy()})
    assert torch.allclose(torch.as_tensor(made), alone.made, rtol=0, atol=1e-6)
