"""A model that was trained on a GPU and the CPU is taken away to both, and gives what torch gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_hetero.export import HeteroRuntime, export
from lightning_hetero.testing.lightning_module import Classifier, data

BOUND = 1e-5  # in float32, of outputs of size 1


class Single(Classifier):
    """In float32."""

    def __init__(self) -> None:
        super().__init__("mlp")
        self.float()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step([batch[0].float(), batch[1]], batch_idx)


CUDA = pytest.mark.cuda
SLOW = [pytest.mark.cuda, pytest.mark.slow]  # AOTInductor compiles


@pytest.mark.parametrize(
    ("gpu", "first", "second"),
    [
        pytest.param("cuda:0", "torch:cuda:0", "torch:cpu", marks=CUDA),
        pytest.param("cuda:0", "aoti:cuda:0", "torch:cpu", marks=SLOW),
        pytest.param("cuda:0", "torch:cpu", "aoti:cuda:0", marks=SLOW),
        # No compiler of torch knows the emulated accelerator, and its exported programs stay on the CPU.
        pytest.param("dev:0", "torch:cpu", "torchscript:cpu"),
    ],
    indirect=["gpu"],
)
@pytest.mark.filterwarnings("ignore:target 'torchscript'")
def test_trained_on_both_and_run_on_both(first: str, second: str, gpu: Any, over: Any, tmp_path: Path) -> None:
    model = Single()
    placement = {"net.first": gpu.name, "": "cpu"}
    trainer = over([gpu.name, "cpu"], strategy={"placement": placement}, max_epochs=1)
    trainer.fit(model, data())
    plan = trainer.strategy.plan
    assert [stage.device for stage in plan.stages] == [gpu.name, "cpu"]
    model.eval()
    example = torch.rand(2, 8)
    manifest = export(
        model, tmp_path / "it", example_inputs=example, placement=plan, targets={"stage0": first, "stage1": second}
    )
    assert [stage.target for stage in manifest.stages] == [first, second]
    with HeteroRuntime(tmp_path / "it") as runtime:
        for rows in (1, 7, 64):
            x = torch.rand(rows, 8)
            torch.testing.assert_close(runtime(x).cpu(), model(x).detach(), rtol=0, atol=BOUND)
