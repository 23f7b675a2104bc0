"""A checkpoint belongs to Lightning: where this package and its devices do not exist, it opens and resumes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from lightning_hetero.strategy.lightning_pytorch import HeteroStrategy
from lightning_hetero.testing.accelerator import EmulatedAccelerator

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]

# `None` in sys.modules makes every import of the name fail, as if nobody had installed it.
WITHOUT_US = """
import json, sys
sys.modules["lightning_hetero"] = None
import torch
import project_lightning_pytorch as project

def devices(obj):
    if isinstance(obj, torch.Tensor):
        return {str(obj.device)}
    values = obj.values() if isinstance(obj, dict) else obj if isinstance(obj, (list, tuple)) else ()
    return set().union(*map(devices, values))

saved = torch.load("hetero.ckpt", weights_only=True)
model = project.Net.load_from_checkpoint("hetero.ckpt")
resumed = project.train(max_epochs=4, ckpt_path="hetero.ckpt")
project.train(max_epochs=2, save_to="plain.ckpt")
print(json.dumps({
    "devices": sorted(devices(saved)),
    "width": model.net[0].out_features,
    "accelerator": torch._C._get_privateuse1_backend_name(),
    "ours": [name for name in sys.modules if name.startswith("lightning_hetero.")],
    "resumed": resumed,
}))
"""


@pytest.mark.feature("checkpoints: resuming in plain Lightning, and back")
def test_a_run_goes_on_where_the_package_is_not_installed_and_comes_back(
    project: Callable[[str], ModuleType], run_python: RunPython, tmp_path: Path, accelerator: EmulatedAccelerator
) -> None:
    module = project("lightning.pytorch")

    def hetero() -> HeteroStrategy:
        return HeteroStrategy(devices=["cpu", accelerator.devices[0]], placement="even", verbose=False)

    whole = module.train(max_epochs=4, accelerator="cpu")
    strategy = hetero()
    first_half = module.train(strategy=strategy, save_to=tmp_path / "hetero.ckpt")
    assert strategy.plan is not None
    assert {stage.device for stage in strategy.plan.stages} == {"cpu", accelerator.devices[0]}

    ran = run_python("-c", WITHOUT_US, TORCH_DEVICE_BACKEND_AUTOLOAD="0", PYTHONPATH="", OMP_NUM_THREADS="1")
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout.splitlines()[-1])
    assert (report["ours"], report["accelerator"]) == ([], "privateuseone")
    assert (report["devices"], report["width"]) == (["cpu"], 16)
    assert first_half + report["resumed"] == whole

    back = module.train(max_epochs=4, ckpt_path=tmp_path / "plain.ckpt", strategy=hetero())
    assert back == whole[10:]
