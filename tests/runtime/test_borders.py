"""What crosses the border of a placed module, and what the code on both sides sees."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_hetero.runtime import frames
from lightning_hetero.runtime.borders import EnterBlock
from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.models import InPlaceResidual


class Seen(nn.Module):
    """A layer that tells on which devices its inputs arrived."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.devices: list[str] = []

    def forward(self, x: Tensor, *args: Any, scale: Any = None, **kwargs: Any) -> Any:
        self.devices.append(str(x.device))
        if scale is not None:
            x = x * scale["by"]
        return {"y": self.layer(x), "same": x, "n": 1}


class Caller(nn.Module):
    """User code between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Seen()
        self.b = Seen()
        self.between: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        out = self.a(x, scale={"by": torch.ones(2)})
        self.between.append(str(out["y"].device))
        return self.b(out["y"])["y"]


def test_inputs_arrive_on_the_modules_device_and_outputs_on_the_root(
    place: Any, accelerator: EmulatedAccelerator
) -> None:
    one, two = accelerator.devices[:2]
    model = Caller()
    place(model, {"a": one, "b": two})
    assert model(torch.ones(3, 2)).device.type == "cpu"
    assert (model.a.devices, model.b.devices, model.between) == ([one], [two], ["cpu"])


def test_a_chain_hands_outputs_straight_to_the_next_part(place: Any, accelerator: EmulatedAccelerator) -> None:
    one, two = accelerator.devices[:2]
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4))
    place(model, {"0": one, "2": one, "3": two})
    accelerator.reset()
    with torch.no_grad():
        y = model(torch.ones(2, 4))
    activation = 2 * 4 * 4
    first, second = accelerator.stats(0), accelerator.stats(1)
    assert (first.h2d_bytes, first.d2h_bytes, second.h2d_bytes) == (activation, 0, 0)
    assert (second.d2h_bytes, y.device.type) == (activation, "cpu")
    assert first.d2d_bytes + second.d2d_bytes == activation


def test_a_module_that_hands_its_input_through_returns_the_very_tensor(
    place: Any, accelerator: EmulatedAccelerator
) -> None:
    model = nn.ModuleDict({"a": Seen()})
    place(model, {"a": accelerator.devices[0]})
    x = torch.ones(1, 2)
    assert model["a"](x)["same"] is x


def test_changes_in_place_are_seen_by_who_passed_the_tensor(place: Any, accelerator: EmulatedAccelerator) -> None:
    torch.manual_seed(0)
    model = InPlaceResidual()
    twin = copy.deepcopy(model)
    place(model, {"before": "cpu", "block": accelerator.devices[0], "after": "cpu"})
    x = torch.randn(4, 8)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(x), twin(x))
    model(x).sum().backward()
    twin(x).sum().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours.grad is not None
        assert torch.equal(ours.grad.cpu(), theirs.grad)


def test_one_tensor_passed_twice_arrives_as_one(place: Any, accelerator: EmulatedAccelerator) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, x: Tensor, y: Tensor) -> bool:
            return x is y

    model = nn.ModuleDict({"a": Twice()})
    place(model, {"a": accelerator.devices[0]})
    x = torch.ones(1, 1)
    assert model["a"](x, x)
    assert not model["a"](x, torch.ones(1, 1))


def test_an_exception_inside_leaves_no_frame_behind(place: Any, accelerator: EmulatedAccelerator) -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("user's own")

    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(Fails(), nn.Linear(1, 1)))
    place(model, {"0": "cpu", "1.0": accelerator.devices[0], "1.1": accelerator.devices[1]})
    with pytest.raises(KeyError, match="user's own"):
        model(torch.ones(1, 1))
    assert frames.top() is None


def test_hooks_of_user_code_fire_once_and_see_the_modules_device(place: Any, accelerator: EmulatedAccelerator) -> None:
    device = accelerator.devices[0]
    model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    seen: list[tuple[str, str]] = []
    model["a"].register_forward_pre_hook(lambda m, args: seen.append(("pre", str(args[0].device))))
    model["a"].register_forward_hook(lambda m, args, out: seen.append(("post", str(out.device))))
    model["a"].register_full_backward_hook(lambda m, gi, go: seen.append(("backward", str(go[0].device))))
    place(model, {"a": device})
    model["a"](torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert [name for name, _ in seen] == ["pre", "post", "backward"]
    assert [where for _, where in seen[:2]] == [device, device]


def test_a_copy_of_a_placed_module_works_and_can_be_moved(place: Any, accelerator: EmulatedAccelerator) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    place(model, {"0": accelerator.devices[0], "1": "cpu"})
    x = torch.ones(1, 2)
    twin = copy.deepcopy(model)
    assert twin[0].weight.device == model[0].weight.device
    assert torch.equal(twin(x), model(x))
    twin.to("cpu")
    assert {p.device.type for p in twin.parameters()} == {"cpu"}
    assert torch.equal(twin(x), model(x))
    assert not any(isinstance(hook, EnterBlock) for hook in twin[0]._forward_pre_hooks.values())
    assert str(model[0].weight.device) == accelerator.devices[0]
    assert pickle.loads(pickle.dumps(model))[1].weight.device.type == "cpu"


def test_release_leaves_nothing_on_the_module(place: Any, accelerator: EmulatedAccelerator) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    before = [dict(vars(module)) for module in model.modules()]
    placed = place(model, {"0": accelerator.devices[0], "1.0": "cpu", "1.1": accelerator.devices[1]})
    placed.release(torch.device("cpu"))
    for module, attributes in zip(model.modules(), before, strict=True):
        assert vars(module).keys() == attributes.keys()
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._forward_hooks_always_called)
        assert not any(hooks)
        assert not module._forward_pre_hooks_with_kwargs
    buffer = io.BytesIO()
    torch.save(model, buffer)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_over_devices_repeats_their_dropout(
    place: Any, accelerator: EmulatedAccelerator, reentrant: bool
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
            self.second = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))  # type: ignore[no-any-return]

    devices = accelerator.devices
    model = Net().double()
    place(model, {"first": devices[0], "second": devices[1]})
    x = torch.randn(16, 8, dtype=torch.float64, requires_grad=True)
    y = checkpoint(model, x, use_reentrant=reentrant)
    y.sum().backward()
    # Each output is bias plus weights times inputs, doubled, or zero where it was dropped.
    kept = (y != 0).sum(0).cpu()
    assert torch.equal(model.second[0].bias.grad.cpu(), 2.0 * kept)
    assert 0 < int(kept.sum()) < y.numel()


def test_an_interrupt_inside_leaves_no_frame_behind(place: Any, accelerator: EmulatedAccelerator) -> None:
    class Interrupted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    model = nn.Sequential(nn.Linear(2, 2), Interrupted())
    placed = place(model, {"0": "cpu", "1": accelerator.devices[0]})
    with pytest.raises(KeyboardInterrupt), frames.balanced():
        model(torch.randn(3, 2))
    assert frames.top() is None
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(3, 2))
    placed.release(torch.device("cpu"))
    assert frames.top() is None


class TwoPlaces(nn.Module):
    """Returns its states, the last of which is its output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        h = self.layer(x)
        return h, [x, h]


class Doubles(nn.Module):
    """Changes one of them in place, and uses the other."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = TwoPlaces(), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h, states = self.encoder(x)
        h.mul_(2)
        return self.head(states[-1])  # type: ignore[no-any-return]


def test_a_tensor_that_is_returned_in_two_places_stays_one(place: Any, accelerator: EmulatedAccelerator) -> None:
    one, two = accelerator.devices[:2]
    model = Doubles().double()
    alone = copy.deepcopy(model)
    place(model, {"encoder": one, "head": two})
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).view(3, 2)
    for net in (model, alone):
        net(x).pow(2).sum().backward()
    for mine, its in zip(model.parameters(), alone.parameters(), strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad.cpu(), its.grad, rtol=0, atol=1e-14)
