"""Stages on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_hetero.export import HeteroRuntime, export
from lightning_hetero.testing.models import MLP

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("place", ["cuda:0", "cuda"])
def test_a_stage_written_on_the_cpu_moves_to_a_gpu_when_it_is_opened(tmp_path: Any, rng: Any, place: str) -> None:
    model, x = MLP().eval(), torch.rand(7, 8, generator=rng)
    export(model, tmp_path / "out", example_inputs=x, placement={"": "a", "third": "b"})
    with HeteroRuntime(tmp_path / "out", {"stage0": f"torch:{place}"}) as runtime:
        found, on_the_gpu = runtime(x), runtime(x.cuda())
        (streamed,) = runtime.stream([x])

    assert (found.device.type, on_the_gpu.device.type) == ("cpu", "cuda")
    for result in (found, on_the_gpu.cpu(), streamed):
        torch.testing.assert_close(result, model(x).detach(), rtol=0, atol=1e-5)


def test_a_model_on_a_gpu_is_exported_from_there_and_to_there(tmp_path: Any, rng: Any) -> None:
    model, x = MLP().eval(), torch.rand(7, 8, generator=rng)
    wanted = model(x).detach()
    model.second.cuda()
    manifest = export(model, tmp_path / "out", example_inputs=x, targets="auto")

    assert [stage.target for stage in manifest.stages] == ["torch:cpu", "torch:cuda:0", "torch:cpu"]
    assert model.second.weight.is_cuda
    with HeteroRuntime(tmp_path / "out") as runtime:
        torch.testing.assert_close(runtime(x), wanted, rtol=0, atol=1e-5)
