"""One module, cut into stages in every way that its graph allows, gives what it gave whole."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_hetero
from lightning_hetero.devices import resolve_devices
from lightning_hetero.errors import PlacementError, UnsupportedError
from lightning_hetero.graph.find import find_units
from lightning_hetero.placement import Problem, get_policy, make_plan
from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.cut_models import Choosy, Hourglass, Twice
from lightning_hetero.testing.models import MLP, MODELS, Borrower, ConvNet, TiedTransformer


def by_units(model: nn.Module, *devices: str) -> dict[str, str]:
    """Neighbouring units on different devices, wherever they are free to be."""
    groups = find_units(model).groups
    return {unit.name: devices[i % len(devices)] for i, group in enumerate(groups) for unit in group}


def expected(model: nn.Module, *args: Any) -> Any:
    was_training = [module.training for module in model.modules()]
    with torch.no_grad():
        result = model.eval()(*args)
    for module, mode in zip(model.modules(), was_training, strict=True):
        module.training = mode
    return result


@pytest.mark.parametrize("name", ["mlp", "convnet", "tied_transformer", "attention", "borrower", "in_place_residual"])
def test_every_model_gives_the_same_in_stages_for_any_number_of_rows(name: str, take_away: Any, rng: Any) -> None:
    make, inputs = MODELS[name]
    model = make()
    example = inputs(4, rng)
    example = example.float() if example.is_floating_point() else example
    manifest, runtime = take_away(model, example, placement=by_units(model, "a", "b"))

    assert len(manifest.stages) > 1
    assert manifest.rows_independent
    for rows in (1, 7, 64):
        batch = inputs(rows, rng).to(example.dtype)
        torch.testing.assert_close(runtime(batch), expected(model, batch), rtol=1e-5, atol=1e-5)


def test_a_skip_goes_past_the_stages_between(take_away: Any, rng: Any) -> None:
    model = Hourglass()
    manifest, runtime = take_away(model, torch.rand(4, 8, generator=rng), placement={"": "a", "down.2": "b", "up": "b"})
    first, second = manifest.stages
    x = torch.rand(5, 8, generator=rng)

    assert (first.units, second.units) == (("down.0", "down.1"), ("down.2", "up.0", "up.1", "up.2"))
    assert len(first.outputs) == 2  # both levels, one of which is read two units later
    assert [value.name for value in second.inputs] == [value.name for value in first.outputs]
    torch.testing.assert_close(runtime(x), expected(model, x))


def test_a_layer_that_is_called_twice_has_a_stage_for_each_call(take_away: Any, rng: Any) -> None:
    model = Twice()
    manifest, runtime = take_away(model, torch.rand(4, 8, generator=rng), placement={"a": "a", "b": "b"})
    x = torch.rand(3, 8, generator=rng)

    assert [stage.units for stage in manifest.stages] == [("a",), ("b",), ("a",)]
    torch.testing.assert_close(runtime(x), expected(model, x))


def test_branches_that_take_turns_become_one_stage_each() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = (nn.ModuleList(nn.Linear(4, 4) for _ in range(3)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            y = x
            for left, right in zip(self.left, self.right, strict=True):
                x, y = left(x), right(y)
            return x + y

    from lightning_hetero.export.cut import cut
    from lightning_hetero.export.placed import device_names
    from lightning_hetero.export.trace import trace

    model = Branches()
    unit_of, device_of, root = device_names(model, {"left": "a", "right": "b"})
    pieces, _ = cut(trace(model, torch.rand(2, 4)).program, unit_of, device_of, root)

    assert [(piece.device, len(piece.units)) for piece in pieces] == [("a", 3), ("b", 3)]


def test_structures_come_back_as_they_were(take_away: Any, rng: Any) -> None:
    class Structures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(4, 4)

        def forward(self, batch: dict[str, Any], *, scale: float, flags: list[Any]) -> dict[str, Any]:
            hidden = self.a(batch["x"]) * scale + batch["shift"]
            return {"hidden": (hidden, [self.b(hidden)]), "flags": flags, "mode": "eval", "x": batch["x"]}

    model = Structures()
    call = {
        "batch": {"x": torch.rand(4, 8, generator=rng), "shift": torch.rand(4, 1, generator=rng)},
        "scale": 2.0,
        "flags": [None, 3],
    }
    _, runtime = take_away(model, call, placement={"a": "a", "b": "b"})
    call["batch"] = {"x": torch.rand(7, 8, generator=rng), "shift": torch.rand(7, 1, generator=rng)}
    found, wanted = runtime(**call), model(**call)

    assert list(found) == list(wanted)
    assert type(found["hidden"]) is tuple
    assert type(found["hidden"][1]) is list
    torch.testing.assert_close(found["hidden"][0], wanted["hidden"][0].detach())
    torch.testing.assert_close(found["hidden"][1][0], wanted["hidden"][1][0].detach())
    assert (found["flags"], found["mode"]) == ([None, 3], "eval")
    assert torch.equal(found["x"], call["batch"]["x"])


def test_a_plan_is_a_placement(take_away: Any, rng: Any) -> None:
    model = MLP()
    inventory = resolve_devices("cpu@speed=1,cpu@speed=1,cpu@speed=1")
    plan = make_plan(get_policy("even"), Problem(graph=find_units(model), inventory=inventory))
    manifest, _ = take_away(model, torch.rand(4, 8, generator=rng), placement=plan)

    assert [stage.source_device for stage in manifest.stages] == [stage.device for stage in plan.stages]
    assert [stage.units for stage in manifest.stages] == [stage.units for stage in plan.stages]


def test_a_plan_that_keeps_modules_whole_is_a_placement_too(take_away: Any, rng: Any) -> None:
    model = ConvNet()
    graph = find_units(model, "features")
    inventory = resolve_devices("cpu@speed=1,cpu@speed=1")
    plan = make_plan(get_policy("even"), Problem(graph=graph, inventory=inventory))
    x = torch.rand(4, 1, 8, 8, generator=rng)
    manifest, runtime = take_away(model, x, placement=plan)

    assert {unit for stage in manifest.stages for unit in stage.units} == {"features", "head.1", "head.3"}
    torch.testing.assert_close(runtime(x), expected(model, x), rtol=1e-5, atol=1e-5)


def test_the_plan_of_another_model_is_refused(take_away: Any) -> None:
    plan = make_plan(get_policy("single"), Problem(graph=find_units(ConvNet()), inventory=resolve_devices("cpu")))

    with pytest.raises(PlacementError, match=r"^the plan is not one for MLP: they differ in 'features\.0'"):
        take_away(MLP(), torch.rand(4, 8), placement=plan)


def test_a_device_map_that_leaves_units_out_is_refused(take_away: Any) -> None:
    with pytest.raises(PlacementError, match=r"^placement leaves out 'second', 'third'\. Add them, or a device for"):
        take_away(MLP(), torch.rand(4, 8), placement={"first": "a"})
    with pytest.raises(PlacementError, match=r"^placement: no unit is named 'frist'.*Did you mean 'first'"):
        take_away(MLP(), torch.rand(4, 8), placement={"": "a", "frist": "a"})


def test_parameters_on_accelerators_are_a_placement_and_stay_there(
    take_away: Any, rng: Any, accelerator: EmulatedAccelerator
) -> None:
    model = MLP()
    x = torch.rand(6, 8, generator=rng)
    wanted = expected(model, x)
    model.second.to(accelerator.devices[0])
    model.third.to(accelerator.devices[1])
    before = dict(model.named_parameters())
    manifest, runtime = take_away(model, torch.rand(4, 8, generator=rng))

    assert [stage.source_device for stage in manifest.stages] == ["cpu", *accelerator.devices[:2]]
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert model.training
    torch.testing.assert_close(runtime(x), wanted)


def test_tied_weights_are_in_every_stage_that_reads_them(take_away: Any, rng: Any) -> None:
    model = TiedTransformer()
    with torch.no_grad():
        model.embed.weight.mul_(2)
    tokens = torch.randint(0, 11, (4, 6), generator=rng)
    manifest, runtime = take_away(model, tokens, placement={"": "a", "blocks.1": "b"})

    assert [stage.source_device for stage in manifest.stages] == ["a", "b", "a"]
    torch.testing.assert_close(runtime(tokens), expected(model, tokens), rtol=1e-5, atol=1e-5)


def test_rows_that_depend_on_each_other_are_not_cut(take_away: Any, rng: Any) -> None:
    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(x - x.mean(0))

    model = Centred()
    # Equal rows: this example alone would not show it.
    manifest, runtime = take_away(model, torch.ones(4, 8), placement={"a": "a", "b": "b"})
    x = torch.rand(9, 8, generator=rng)

    assert not manifest.rows_independent
    torch.testing.assert_close(runtime(x), expected(model, x))


def test_a_result_without_rows_is_not_joined_from_parts(take_away: Any, rng: Any) -> None:
    class Mean(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mean()

    model = Mean()
    manifest, runtime = take_away(model, torch.rand(4, 8, generator=rng), placement={"": "a", "third": "b"})
    x = torch.rand(9, 8, generator=rng)

    assert not manifest.rows_independent
    torch.testing.assert_close(runtime(x), expected(model, x))


def test_a_fixed_batch_can_be_asked_for(take_away: Any, rng: Any) -> None:
    model = Borrower()
    x = torch.rand(1, 8, generator=rng)
    manifest, runtime = take_away(model, x, dynamic_batch=False)

    assert manifest.inputs[0].shape == (1, 8)
    torch.testing.assert_close(runtime(x), expected(model, x))


class Counted(MLP):
    """Says how many rows there were."""

    def forward(self, x: Tensor) -> tuple[Tensor, int]:  # type: ignore[override]
        return super().forward(x), x.shape[0]


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (Counted(), torch.rand(4, 8), r"^the result of Counted holds a number that follows the size of the batch\."),
        (
            MLP(),
            torch.rand(1, 8),
            r"^example_inputs of MLP have 1 rows, .* Give at least 2 rows, or pass dynamic_batch",
        ),
        (Choosy(), torch.rand(4, 8), r"^torch.export cannot capture Choosy with these example inputs: "),
        (MLP(), (torch.rand(4, 8), {3}), r"^example_inputs of MLP holds a set, which cannot be written down"),
    ],
    ids=["rows", "one row", "decides by values", "a set"],
)
def test_what_cannot_be_captured_is_said(take_away: Any, model: nn.Module, example: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        take_away(model, example)


def test_a_buffer_that_changes_in_eval_mode_is_refused(take_away: Any) -> None:
    class Counter(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return super().forward(x)

    with pytest.raises(UnsupportedError, match=r"^Counter changes its buffer 'calls' in eval mode\. An exported stage"):
        take_away(Counter(), torch.rand(4, 8))


def test_no_thread_is_left_by_a_call_without_pipeline(take_away: Any, rng: Any) -> None:
    _, runtime = take_away(MLP(), torch.rand(4, 8, generator=rng))
    runtime(torch.rand(4, 8, generator=rng))

    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hetero-export")]


def test_the_package_is_called_as_its_function(tmp_path: Any, rng: Any) -> None:
    x = torch.rand(4, 8, generator=rng)
    manifest = lightning_hetero.export(MLP(), tmp_path / "out", example_inputs=x)

    assert [stage.target for stage in manifest.stages] == ["torch:cpu"]
    assert lightning_hetero.HeteroRuntime(tmp_path / "out")(x).shape == (4, 4)
