"""ExecuTorch programs. The package is no part of the extra "export": pip install executorch."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from lightning_hetero.export import TargetError
from lightning_hetero.export.targets.target import available_targets
from lightning_hetero.testing.models import MLP, ConvNet

is_here = find_spec("executorch") is not None
needs_it = pytest.mark.skipif(not is_here, reason="needs executorch")


@pytest.fixture(scope="module", autouse=True)
def imported() -> Iterator[None]:
    """Its first import sets an environment variable for OpenVINO."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENVINO_LIB_PATH", "")
        if is_here:
            available_targets()
        yield


@pytest.mark.skipif(is_here, reason="executorch is installed")
def test_without_the_package_the_message_says_what_to_install(take_away: Any) -> None:
    message = r"^target 'executorch:xnnpack' needs executorch: pip install executorch\. Available here: torch:cpu, "
    with pytest.raises(TargetError, match=message):
        take_away(MLP(), torch.rand(2, 8), targets="executorch:xnnpack")


@needs_it
@pytest.mark.parametrize("device", ["xnnpack", "portable"])
def test_a_chain_gives_the_same(take_away: Any, rng: Any, device: str) -> None:
    model, x = ConvNet().eval(), torch.rand(3, 1, 8, 8, generator=rng)
    targets = {"a": f"executorch:{device}", "b": "executorch"}
    manifest, runtime = take_away(model, x, targets=targets, placement={"": "a", "head": "b"}, dynamic_batch=False)
    batches = [torch.rand(3, 1, 8, 8, generator=rng) for _ in range(8)]

    assert [stage.files[0].name for stage in manifest.stages] == ["stage0.pte", "stage1.pte"]
    results = list(runtime.stream(batches))
    with ThreadPoolExecutor(4) as pool:
        again = list(pool.map(runtime, batches))
    for batch, result, other in zip(batches, results, again, strict=True):
        torch.testing.assert_close(result, model(batch).detach(), rtol=0, atol=1e-5)
        torch.testing.assert_close(other, result, rtol=0, atol=0)


@needs_it
def test_an_open_batch_and_unknown_backends_are_refused(take_away: Any) -> None:
    with pytest.raises(TargetError, match=r"^stage0: ExecuTorch plans the memory of a program for one size, so it"):
        take_away(MLP(), torch.rand(2, 8), targets="executorch")
    with pytest.raises(TargetError, match=r"^target 'executorch:gpu': this ExecuTorch has no such backend\. It has xn"):
        take_away(MLP(), torch.rand(2, 8), targets="executorch:gpu", dynamic_batch=False)
