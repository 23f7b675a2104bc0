"""After `close`, and after a failure, the module is as it was: no hook, no guard, no foreign part, on the CPU."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hetero import ModelParallel, ModelParallelConfig, UnsupportedError
from lightning_hetero.errors import PlacementError, UsageError
from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.models import MLP, MODELS

NAMES = ["convnet", "tied_transformer", "borrower"]
PLACES: dict[str, dict[str, Any]] = {
    "devices": {"device_ids": [0, "cpu", 1], "placement": "round_robin"},
    "emulated": {"device_ids": ["cpu@speed=1", "cpu@speed=0.9,threads=1"]},
}


def traces(model: nn.Module) -> dict[str, Any]:
    """Everything that placing changes on a module and below it, by name."""
    return {
        name: (
            type(module),
            module.__dict__.keys() - {"__overloads__"},  # torch.jit.script's own note
            {key: [*hooks.values()] for key, hooks in module.__dict__.items() if key.endswith("_hooks")},
            len(module._forward_pre_hooks_with_kwargs) + len(module._forward_hooks_always_called),
            module.training,
            [str(tensor.device) for tensor in (*module.parameters(), *module.buffers())],
        )
        for name, module in model.named_modules()
    }


def seen(module: nn.Module, args: Any, output: Any) -> None:
    """A hook of user code."""


@pytest.mark.parametrize("torchscript", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_behind(name: str, place: str, torchscript: bool, spread: Any) -> None:
    module = MODELS[name][0]().double()
    module.register_forward_hook(seen)
    before, parts = traces(module), [*module.modules()]
    model = spread(module, torchscript=torchscript, **PLACES[place])
    assert traces(module) != before
    model(MODELS[name][1](4, torch.Generator())).sum().backward()
    assert model.close() is module
    assert traces(module) == before
    assert all(now is then for now, then in zip(module.modules(), parts, strict=True))


def test_the_context_manager_closes_on_the_way_out_of_an_error_too(accelerator: EmulatedAccelerator) -> None:
    module = MLP()
    before = traces(module)
    config = ModelParallelConfig(model=module, device_ids=["cpu", 0])
    with pytest.raises(RuntimeError, match="cannot be multiplied"), ModelParallel(config) as model:
        model(torch.ones(2, 3))
    assert traces(module) == before


def test_a_closed_one_refuses_to_run_and_its_module_runs_by_itself(spread: Any) -> None:
    model = spread(MLP(), device_ids=[0, "cpu"])
    with torch.no_grad():
        expected = model(torch.ones(2, 8))
        assert model.close() is model.close() is model.module
        with pytest.raises(UsageError) as caught:
            model(torch.ones(2, 8))
        assert str(caught.value) == "this ModelParallel is closed; its module runs by itself again: use `.module`"
        assert torch.equal(model.module(torch.ones(2, 8)), expected.cpu())


def test_it_can_be_spread_again_elsewhere(spread: Any) -> None:
    module = MLP()
    for devices in ([0, "cpu"], ["cpu", 1], [1]):
        model = spread(module, device_ids=devices)
        model(torch.ones(2, 8)).sum().backward()
        model.close()


def test_an_exception_of_user_code_passes_and_the_next_call_works(spread: Any) -> None:
    class Fails(MLP):
        fails = True

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            if self.fails:
                raise KeyError("of the user")
            return self.third(self.second(x))  # type: ignore[no-any-return]

    module = Fails()
    model = spread(module, device_ids=["cpu", 0, 1])
    with pytest.raises(KeyError, match="of the user"):
        model(torch.ones(2, 8))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        model(torch.ones(2, 3))
    module.fails = False
    assert torch.equal(model(torch.ones(2, 8)), model(torch.ones(2, 8)))


def test_a_move_by_user_code_is_ignored_and_a_change_of_dtype_is_not(spread: Any) -> None:
    model = spread(MLP(), device_ids=["cpu", 0, 1])
    with pytest.warns(UserWarning, match="stays where the plan placed it: a move to cpu was ignored"):
        model.to("cpu")
    model.double()
    assert {(str(p.device), p.dtype) for p in model.parameters()} == {
        (place, torch.float64) for place in ("cpu", "dev:0", "dev:1")
    }


class Unscriptable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        try:
            return x * self.weight
        finally:
            pass


@pytest.mark.parametrize(
    ("make_part", "message"),
    [
        (Unscriptable, r"cannot compile a part of Sequential: try blocks aren't supported(?s:.*)leave torchscript out"),
        (
            lambda: nn.LSTM(8, 8),
            r"compiles '1', a LSTM, only as a part of another module\. Put a module of your own around it and name "
            r"that in no_split, or leave torchscript out\.",
        ),
    ],
    ids=["code", "overloaded forward"],
)
def test_a_part_that_torchscript_cannot_compile_is_named_and_everything_put_back(
    make_part: Any, message: str, spread: Any
) -> None:
    module = nn.Sequential(nn.Linear(8, 8), make_part())
    before = traces(module)
    with pytest.raises(UnsupportedError, match=rf"^torchscript=True: torch\.jit\.script {message}"):
        spread(module, device_ids=[0, "cpu"], torchscript=True)
    assert traces(module) == before


def test_the_way_out_for_an_lstm_that_the_message_shows(spread: Any) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0]  # type: ignore[no-any-return]

    module, x = nn.Sequential(nn.Linear(8, 8), Around()).double(), torch.ones(3, 2, 8, dtype=torch.float64)
    expected = module(x).detach()
    model = spread(module, device_ids=["cpu", 0], torchscript=True, no_split="Around")
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_a_parameter_without_values_is_refused_and_the_others_are_put_back(spread: Any) -> None:
    with torch.device("meta"):
        empty = nn.Linear(8, 8)
    module = nn.Sequential(nn.Linear(8, 8), empty)
    before = traces(module)
    with pytest.raises(PlacementError, match=r"Linear\.weight is on the meta device"):
        spread(module, device_ids=[0, "cpu"])
    assert traces(module) == before


def test_memory_that_runs_out_while_placing_leaves_the_module_where_it_was(
    spread: Any, accelerator: EmulatedAccelerator
) -> None:
    module = MLP()
    before = traces(module)
    accelerator.configure(1, cap_bytes=64 << 10)
    try:
        gc.collect()  # what other tests have left
        taken = accelerator.stats(1).used_bytes
        somebody_elses = torch.empty((63 << 10) - taken, dtype=torch.int8, device="dev:1")
        with pytest.raises(torch.OutOfMemoryError):
            spread(module, device_ids=[0, 1], placement={"first": 0, "": 1}, memory={1: 64 << 10})
        del somebody_elses
    finally:
        accelerator.reset()
    assert traces(module) == before


HELD = (
    r"^third\.weight: torch did not let these parameters move and stay the same objects, because something still "
    r"holds them, such as the graph of a forward without backward\. An optimizer that was made before trains the old "
    r"ones, so make a new one\.$"
)


def test_a_parameter_that_a_graph_holds_when_it_is_placed_becomes_a_new_object_with_a_warning(spread: Any) -> None:
    module = MLP()
    old, graph = module.third.weight, module(torch.ones(2, 8))
    with pytest.warns(UserWarning, match=HELD):
        model = spread(module, device_ids=["cpu", 0])
    assert model.module.third.weight is not old
    assert graph.requires_grad


def test_so_does_one_that_a_graph_holds_when_it_is_gathered(spread: Any) -> None:
    model = spread(MLP(), device_ids=["cpu", 0])
    old, graph = model.module.third.weight, model(torch.ones(2, 8))
    with pytest.warns(UserWarning, match=HELD) as caught:
        model.close()
    assert model.module.third.weight is not old
    assert caught[0].filename == __file__  # it points at the call of `close`
    assert graph.requires_grad
