"""The contract: a loop over a spread module gives the numbers of the same loop over the module itself."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from lightning_hetero.testing.lightning_module import adam, difference
from lightning_hetero.testing.models import MODELS

PLACES: dict[str, dict[str, Any]] = {
    "cpu first": {"device_ids": ["cpu", 0, 1], "placement": "round_robin"},
    "accelerator first": {"device_ids": [0, "cpu"], "placement": "round_robin"},
    "emulated": {"device_ids": ["cpu@speed=1", "cpu@speed=0.9,threads=1"]},
}
SCRIPTABLE = sorted(MODELS.keys() - {"recurrent"})  # TorchScript cannot run an nn.LSTM by itself


def fresh(name: str = "mlp") -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]().double()


def batch(name: str = "mlp") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return MODELS[name][1](8, generator), torch.randint(4, (8,), generator=generator)


def train(model: nn.Module, name: str = "mlp", optimizer: torch.optim.Optimizer | None = None) -> list[float]:
    """Ten steps of a plain loop; gives the losses."""
    x, y = batch(name)
    optimizer = optimizer or adam(model.parameters())
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        scores = model(x).flatten(1)[:, :4]
        loss = F.cross_entropy(scores, y.to(scores.device))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore:.*torch did not let these parameters move:UserWarning")  # scripted, from "dev"
@pytest.mark.parametrize("torchscript", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_micro_batches_change_the_order_of_sums_only(place: str, torchscript: bool, spread: Any) -> None:
    for name in SCRIPTABLE:
        alone, apart = fresh(name), fresh(name)
        model = spread(apart, **PLACES[place], micro_batches=4, torchscript=torchscript)
        assert train(model, name) == pytest.approx(train(alone, name), abs=1e-9)
        model.close()
        assert difference(apart, alone) <= 1e-9


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", MODELS)
def test_ten_steps_of_adam_give_the_parameters_of_the_unplaced_model(name: str, place: str, spread: Any) -> None:
    alone, apart = fresh(name), fresh(name)
    parameters = [*apart.parameters()]
    model = spread(apart, **PLACES[place])
    assert len(model.plan.stages) > 1
    assert train(model, name) == train(alone, name)
    assert difference(apart, alone) == 0.0
    assert difference(model.close(), alone) == 0.0
    assert all(now is then for now, then in zip(apart.parameters(), parameters, strict=True))


@pytest.mark.parametrize("place", ["cpu first", "emulated"])
@pytest.mark.parametrize("name", SCRIPTABLE)
def test_so_do_ten_steps_with_the_parts_compiled_by_torchscript(name: str, place: str, spread: Any) -> None:
    alone, apart = fresh(name), fresh(name)
    parameters = [*apart.parameters()]
    model = spread(apart, torchscript=True, **PLACES[place])
    assert any(isinstance(module, torch.jit.ScriptModule) for module in apart.modules())
    assert train(model, name) == train(alone, name)
    assert difference(model.close(), alone) == 0.0
    assert all(now is then for now, then in zip(apart.parameters(), parameters, strict=True))


@pytest.mark.parametrize("made", ["before", "after"])
def test_an_optimizer_may_be_made_before_or_after(made: str, spread: Any) -> None:
    alone, apart = fresh(), fresh()
    optimizer = adam(apart.parameters())
    model = spread(apart, **PLACES["cpu first"])
    train(model, optimizer=optimizer if made == "before" else adam(model.parameters()))
    train(alone)
    assert difference(apart, alone) == 0.0


@pytest.mark.parametrize("torchscript", [False, True])
def test_training_goes_on_with_one_optimizer_through_placing_and_closing(torchscript: bool, spread: Any) -> None:
    alone, apart = fresh("convnet"), fresh("convnet")
    optimizers = adam(alone.parameters()), adam(apart.parameters())

    def move_state() -> None:  # as the docstring of ModelParallel says
        optimizers[1].load_state_dict(optimizers[1].state_dict())

    train(apart, "convnet", optimizers[1])
    model = spread(apart, torchscript=torchscript, **PLACES["cpu first"])
    move_state()
    train(model, "convnet", optimizers[1])
    model.close()
    move_state()
    train(apart, "convnet", optimizers[1])
    for _ in range(3):
        train(alone, "convnet", optimizers[0])
    assert difference(apart, alone) == 0.0


@pytest.mark.parametrize("torchscript", [False, True])
def test_parameters_stay_the_same_objects_and_state_keeps_its_names(torchscript: bool, spread: Any) -> None:
    module = fresh("convnet")
    parameters, names = [*module.parameters()], [*module.state_dict()]
    model = spread(module, torchscript=torchscript, **PLACES["cpu first"])
    assert {str(parameter.device) for parameter in parameters} == {"cpu", "dev:0", "dev:1"}
    assert [*model.module.state_dict()] == names
    assert [*model.state_dict()] == [f"module.{name}" for name in names]
    for _ in range(2):
        assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
        train(model, "convnet")
        model.close()
        model = spread(module, **PLACES["accelerator first"])


def test_a_state_saved_when_spread_loads_into_the_module_and_back(spread: Any) -> None:
    trained, other = fresh("convnet"), fresh("convnet")
    model = spread(trained, **PLACES["cpu first"])
    train(model, "convnet")
    file = io.BytesIO()
    torch.save(model.module.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True, map_location="cpu")
    other.load_state_dict(state)
    assert difference(other, trained) == 0.0

    again = spread(fresh("convnet"), **PLACES["accelerator first"])
    again.module.load_state_dict(state)
    x, _ = batch("convnet")
    assert torch.equal(again.eval()(x).cpu(), other.eval()(x))


def test_evaluation_gives_the_numbers_of_the_unplaced_model(spread: Any) -> None:
    alone, apart = fresh("convnet"), fresh("convnet")
    model = spread(apart, **PLACES["cpu first"])
    train(model, "convnet")
    train(alone, "convnet")
    x, _ = batch("convnet")
    expected = alone.eval()(x)
    model.eval()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            output = model(x)
        assert torch.equal(output, expected)
        assert not output.requires_grad
    model.train()
    train(model, "convnet")  # what inference has touched can still be trained


def test_clipped_gradients_and_their_norm_are_those_of_the_unplaced_model(spread: Any) -> None:
    norms = []
    alone, apart = fresh(), fresh()
    for model in (alone, spread(apart, **PLACES["cpu first"])):
        model(batch()[0]).square().sum().backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
    assert norms[0] == norms[1]
    assert all(torch.equal(a.grad, b.grad.cpu()) for a, b in zip(alone.parameters(), apart.parameters(), strict=True))


class Structured(nn.Module):
    """Takes and gives tensors inside of other things."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.left, self.right = (nn.Linear(8, 8).double() for _ in range(3))

    def forward(self, inputs: dict[str, Tensor], *, scale: Tensor, count: int = 2) -> dict[str, Any]:
        hidden = self.stem(inputs["x"]) * scale
        return {"sides": (self.left(hidden), [self.right(hidden)]), "count": count, "given": scale}


def sides(result: dict[str, Any]) -> tuple[Tensor, Tensor]:
    left, (right,) = result["sides"]
    return left, right


@pytest.mark.parametrize("root", ["cpu", "dev:0"])
def test_inputs_come_from_anywhere_and_outputs_are_on_the_first_device_whatever_holds_them(
    root: str, spread: Any
) -> None:
    x, scale = batch()[0], torch.full((8,), 0.5, dtype=torch.float64)
    alone = Structured()({"x": x}, scale=scale)
    model = spread(Structured(), device_ids=[root, "dev:1"], placement="round_robin")
    for place in ("cpu", "dev:0", "dev:1"):
        result = model({"x": x.to(place)}, scale=scale, count=3)
        assert result["count"] == 3
        assert result["given"] is scale or root != "cpu"
        for output, expected in zip(sides(result), sides(alone), strict=True):
            assert str(output.device) == str(model.output_device) == root
            assert torch.equal(output.cpu(), expected)
        sum(side.sum() for side in sides(result)).backward()


def test_copies_work_by_themselves_and_leave_the_original_alone(spread: Any) -> None:
    model = spread(fresh(), **PLACES["cpu first"])
    x, _ = batch()
    expected = model(x).detach()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x).detach(), expected)
        train(twin)
        assert {parameter.device.type for parameter in twin.close().parameters()} == {"cpu"}
    assert torch.equal(model(x).detach(), expected)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu", "dev"}


def test_a_moving_average_of_the_weights_is_that_of_the_unplaced_model(spread: Any) -> None:
    results = []
    for model in (fresh(), spread(fresh(), **PLACES["cpu first"])):
        # With a function of its own, because torch's default computes by another formula for accelerators.
        average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.9))
        for _ in range(3):
            train(model)
            average.update_parameters(model)
        results.append(average(batch()[0]).detach())
    assert torch.equal(*results)
