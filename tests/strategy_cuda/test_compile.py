"""torch.compile for stages on a GPU and on the CPU: with the compiler of torch where there is a real GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from lightning_hetero.runtime.compiled import Compiled
from lightning_hetero.testing.fabric_loop import sgd
from lightning_hetero.testing.lightning_module import Classifier, data, difference

BOUND = 1e-12  # in float64, with SGD
SHORT = {"max_epochs": 1, "limit_train_batches": 3}
# The compiler of torch knows real GPUs only, and takes its time.
ON_BOTH = pytest.mark.parametrize(
    ("gpu", "backend"),
    [
        pytest.param("cuda:0", "aot_eager", marks=pytest.mark.cuda),
        pytest.param("dev:0", "aot_eager"),
        pytest.param("cuda:0", "inductor", marks=[pytest.mark.cuda, pytest.mark.slow]),
    ],
    indirect=["gpu"],
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # dynamo looks at it
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),  # the compiler's own
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton"),
    pytest.mark.filterwarnings("ignore:.*TensorFloat32 tensor cores.*available but not enabled"),
]


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Two(Classifier):
    """A layer for each device."""

    def __init__(self) -> None:
        super().__init__("mlp", sgd)
        self.net = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.Tanh()), nn.Linear(16, 4)).double()

    def on_train_epoch_end(self) -> None:
        forwards = (module.__dict__.get("forward") for module in self.modules())
        self.compiled = sum(isinstance(forward, Compiled) for forward in forwards)


@ON_BOTH
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_each_stage_in_one_piece(
    micro_batches: int, backend: str, gpu: Any, over: Any, alone: Any, caplog: pytest.LogCaptureFixture
) -> None:
    spread = Two()
    strategy: dict[str, Any] = {"placement": {"net.0": gpu.name, "net.1": "cpu"}, "micro_batches": micro_batches}
    strategy["compile"] = "stage" if backend == "inductor" else {"backend": backend}
    over([gpu.name, "cpu"], strategy=strategy, **SHORT).fit(spread, data())
    assert spread.compiled == 2, caplog.text
    for where in (gpu, "cpu"):
        single = Two()
        alone(where, **SHORT).fit(single, data())
        assert difference(spread, single) <= BOUND, where


@ON_BOTH
def test_a_submodule_that_the_user_has_compiled(backend: str, gpu: Any, over: Any, alone: Any) -> None:
    def make() -> Classifier:
        model = Two()
        model.net[0] = torch.compile(model.net[0], backend=backend)  # type: ignore[assignment]
        return model

    spread, single = make(), Two()
    over([gpu.name, "cpu"], **SHORT).fit(spread, data())
    alone(gpu, **SHORT).fit(single, data())
    assert difference(spread, single) <= BOUND
