"""What Fabric saves over several devices opens anywhere, and the other way round."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from lightning_hetero.errors import CheckpointError
from lightning_hetero.testing.fabric_loop import Run, net, train
from lightning_hetero.testing.lightning_module import adam, data, difference

PARITY = 1e-12

MakeFabric = Callable[..., Fabric]


def saved(run: Run, path: Path, **more: Any) -> Path:
    run.fabric.save(path, {"model": run.model, "optimizer": run.optimizer, "steps": len(run.losses), **more})
    return path


def resumed(fabric: Any, path: Path) -> Run:
    """A run that goes on where the saved one stopped, from other numbers."""
    run = Run.of(fabric, nn.Module.double(net().apply(_reset)), adam)
    state = {"model": run.model, "optimizer": run.optimizer, "steps": 0}
    assert fabric.load(path, state) == {}
    assert state["steps"] == 5
    return run.go_on(data())


def _reset(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.constant_(module.weight, 0.5)


@pytest.mark.feature("Fabric: save and load, portable to plain Fabric and to other placements")
@pytest.mark.parametrize("route", ["ours to plain", "plain to ours", "ours to another placement"])
def test_a_run_goes_on_elsewhere(route: str, alone: MakeFabric, hostile: MakeFabric, tmp_path: Path) -> None:
    source = alone() if route == "plain to ours" else hostile()
    options = {"strategy": {"placement": "even"}} if route == "ours to another placement" else {}
    target = alone() if route == "ours to plain" else hostile(**options)
    path = saved(train(source, make_optimizer=adam), tmp_path / "half.ckpt")
    whole = train(alone(), make_optimizer=adam)
    assert resumed(target, path).differs_from(Run(None, whole.go_on(data()).model, None, whole.losses[5:])) <= PARITY


@pytest.mark.feature("Fabric: checkpoints of CPU tensors that open with weights_only=True")
def test_every_tensor_of_a_checkpoint_is_on_the_cpu(hostile: MakeFabric, tmp_path: Path) -> None:
    run = train(hostile(), make_optimizer=adam)
    somewhere = next(iter(run.optimizer.state.values()))["exp_avg"]
    path = saved(run, tmp_path / "all.ckpt", beside=[somewhere])
    content = torch.load(path, weights_only=True)
    tensors = [*content["model"].values(), *content["beside"]]
    tensors += [value for state in content["optimizer"]["state"].values() for value in state.values()]
    assert len(tensors) == 6 + 1 + 18
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert list(content["model"]) == list(net().state_dict())


def test_a_filter_leaves_out_what_it_is_told_to(hostile: MakeFabric, tmp_path: Path) -> None:
    run = train(hostile())
    run.fabric.save(tmp_path / "some.ckpt", {"model": run.model}, filter={"model": lambda name, _: "bias" not in name})
    assert list(torch.load(tmp_path / "some.ckpt")["model"]) == ["first.weight", "second.weight", "third.weight"]


def test_a_raw_state_of_plain_torch_is_loaded(hostile: MakeFabric, tmp_path: Path) -> None:
    other = net().apply(_reset)
    torch.save(other.state_dict(), tmp_path / "raw.pt")
    run = train(hostile())
    run.fabric.load_raw(tmp_path / "raw.pt", run.model)
    assert difference(run.model, other) == 0.0


@pytest.mark.feature("Fabric: damaged checkpoints are refused")
def test_a_damaged_checkpoint_is_named_and_refused(hostile: MakeFabric, tmp_path: Path) -> None:
    run = train(hostile())
    path = saved(run, tmp_path / "model.ckpt")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    before = {name: value.cpu().clone() for name, value in run.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"model\.ckpt is damaged: .*Nothing of it was loaded\."):
        run.fabric.load(path, {"model": run.model})
    assert all(torch.equal(value.cpu(), before[name]) for name, value in run.model.state_dict().items())
