"""What a recording knows of a call: order, shapes, and who made what for whom."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_hetero.errors import ProfileError
from lightning_hetero.graph.find import find_units
from lightning_hetero.profile import Line
from lightning_hetero.profile.recording import Recording
from lightning_hetero.testing.models import MODELS, ConvNet, TiedTransformer

ROWS = 6
Record = Callable[..., Recording]
Look = Callable[[nn.Module], dict[str, Any]]


def ways(recording: Recording) -> set[tuple[str, str, bool]]:
    return {(flow.source, flow.target, flow.chained) for flow in recording.flows}


class UNet(nn.Module):
    """Two scales with a skip from the first to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Linear(8, 8)
        self.deep = nn.Linear(8, 8)
        self.up = nn.Bilinear(8, 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        return self.up(self.deep(skip), skip)  # type: ignore[no-any-return]


class ZigZag(nn.Module):
    """Calls one layer, another, and the first again."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.b(self.a(x)))  # type: ignore[no-any-return]


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Mean(nn.Module):
    """Takes and returns dicts, and takes words that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.block = Block()

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = self.embed(batch["ids"])
        return self.block(hidden, mask=batch["mask"], how="mean")  # type: ignore[no-any-return]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor, *, mask: Tensor, how: str) -> dict[str, Tensor]:
        assert how == "mean"
        return {"out": (x * self.weight * mask[..., None]).mean(1), "mask": mask}


def test_calls_are_listed_in_order_with_shapes(record: Record) -> None:
    recording = record(ZigZag(), torch.randn(ROWS, 8))

    assert [call.unit for call in recording.calls] == ["a", "b", "a"]
    assert [call.inputs[0].shape for call in recording.calls] == [(ROWS, 8)] * 3
    assert [call.inputs[0].requires_grad for call in recording.calls] == [False, True, True]
    assert [call.outputs[0].shape for call in recording.calls] == [(ROWS, 8)] * 3
    assert all(call.seconds > 0 for call in recording.calls)
    assert recording.rows == ROWS
    assert recording.own_code_s > 0
    assert not recording.shapes_only


def test_flows_of_zig_zag_calls(record: Record) -> None:
    assert ways(record(ZigZag(), torch.randn(ROWS, 8))) == {
        ("", "a", False),
        ("a", "b", False),
        ("b", "a", False),
        ("a", "", False),
    }


def test_a_skip_flows_past_the_units_between(record: Record) -> None:
    recording = record(UNet(), torch.randn(ROWS, 8))

    assert ways(recording) == {
        ("", "down", False),
        ("down", "deep", False),
        ("deep", "up", False),
        ("down", "up", False),
        ("up", "", False),
    }
    (skip,) = (flow for flow in recording.flows if (flow.source, flow.target) == ("down", "up"))
    assert skip.size_bytes == Line(0.0, 8 * 4)
    assert skip.has_gradient


def test_own_code_stands_between_the_layers_of_a_loop(record: Record) -> None:
    ends = {("", f"layers.{i}", False) for i in range(3)} | {(f"layers.{i}", "", False) for i in range(3)}

    assert ways(record(Loop(), torch.randn(ROWS, 8))) == ends


def test_in_a_sequential_tensors_go_straight_and_activations_stay_where_they_are(record: Record) -> None:
    recording = record(ConvNet(), torch.randn(ROWS, 1, 8, 8))

    assert ways(recording) == {
        ("", "features.0", False),
        ("features.0", "features.1", True),
        ("features.1", "features.3", True),  # through an in-place ReLU
        ("features.3", "features.4", True),
        ("features.4", "", True),
        ("", "head.1", False),  # the Flatten in front is told nothing of who computed before
        ("head.1", "head.3", True),
        ("head.3", "", True),
    }


def test_a_chain_of_chains_is_one_chain(record: Record) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.GELU()), nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 2))

    assert ways(record(model, torch.randn(ROWS, 8))) == {
        ("", "0.0", False),
        ("0.0", "1.0", True),
        ("1.0", "2", True),
        ("2", "", True),
    }


def test_a_module_with_code_of_its_own_breaks_the_chain(record: Record) -> None:
    model = nn.Sequential(nn.Linear(8, 8), UNet())

    assert ("0", "1.down", False) in ways(record(model, torch.randn(ROWS, 8)))


class Sub(nn.Sequential):
    """A Sequential whose forward is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x))  # type: ignore[no-any-return]


def test_a_sequential_with_another_forward_is_no_chain(record: Record) -> None:
    assert ("0", "1", False) in ways(record(Sub(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(ROWS, 8)))


def test_what_own_code_changed_in_place_comes_from_own_code(record: Record) -> None:
    class InPlace(ZigZag):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).mul_(2))  # type: ignore[no-any-return]

    assert ways(record(InPlace(), torch.randn(ROWS, 8))) == {
        ("", "a", False),
        ("a", "", False),
        ("", "b", False),
        ("b", "", False),
    }


def test_dicts_keywords_and_words_are_understood(record: Record) -> None:
    batch = {"ids": torch.randint(5, (ROWS, 3)), "mask": torch.ones(ROWS, 3)}
    recording = record(Mean(), batch)

    assert [[spec.shape for spec in call.inputs] for call in recording.calls] == [
        [(ROWS, 3)],
        [(ROWS, 3, 8), (ROWS, 3)],
    ]
    assert [spec.shape for spec in recording.calls[1].outputs] == [(ROWS, 8), (ROWS, 3)]
    sample = recording.samples[recording.sort_of["block"]]
    assert sample.kwargs["how"] == "mean"
    assert sample.kwargs["mask"] is not batch["mask"]


def test_one_tensor_passed_three_times_flows_once(record: Record) -> None:
    model = MODELS["attention"][0]()
    (flow,) = (f for f in record(model, torch.randn(ROWS, 5, 8)).flows if f.target == "attention")

    assert flow.size_bytes == Line(0.0, 5 * 8 * 4)


def test_states_of_an_lstm_grow_with_the_rows_in_dim_1(record: Record) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.LSTM(8, 8, num_layers=2, batch_first=True)
            self.two = nn.LSTM(8, 8, num_layers=2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out, state = self.one(x)
            return self.two(out, state)[0]  # type: ignore[no-any-return]

    (flow,) = (f for f in record(Both(), torch.randn(ROWS, 5, 8)).flows if (f.source, f.target) == ("one", "two"))

    assert flow.size_bytes == Line(0.0, (5 * 8 + 2 * 2 * 8) * 4)


def test_equal_units_share_one_sample(record: Record) -> None:
    recording = record(TiedTransformer(), torch.randint(11, (ROWS, 6)))

    assert len({recording.sort_of[f"blocks.{i}"] for i in range(3)}) == 1
    assert len(recording.samples) == 4


def test_a_sample_is_what_the_unit_was_given_and_not_what_became_of_it(record: Record) -> None:
    class Overwrites(ZigZag):
        def forward(self, x: Tensor) -> Tensor:
            out = self.a(x)
            x.zero_()
            return out  # type: ignore[no-any-return]

    with torch.no_grad():
        recording = record(Overwrites(), torch.ones(ROWS, 8))

    assert torch.equal(recording.samples[recording.sort_of["a"]].args[0], torch.ones(ROWS, 8))


def test_rows_are_those_given_or_the_most_frequent(record: Record) -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Embedding(5, 8)
            self.one = nn.Linear(8, 8)
            self.two = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x + self.position(torch.arange(5))))  # type: ignore[no-any-return]

    x = torch.randn(ROWS, 5, 8)

    assert record(Positions(), x).rows == ROWS
    assert record(Positions(), x, rows=3).rows == 3


@pytest.mark.parametrize("name", MODELS)
def test_recording_changes_nothing(name: str, look: Look) -> None:
    make, draw = MODELS[name]
    torch.manual_seed(2)
    model = make().double()
    alone = copy.deepcopy(model)
    x = draw(ROWS, torch.Generator().manual_seed(0))
    before = look(model)
    expected = alone(x)

    with Recording(model, find_units(model)) as recording:
        output = model(x)

    after = look(model)
    assert recording.calls
    assert torch.equal(output, expected)
    assert output.requires_grad
    assert after["values"] == look(alone)["values"]  # BatchNorm counts the user's own call
    assert {**after, "values": 0} == {**before, "values": 0}


def test_hooks_go_away_when_the_user_code_raises(look: Look) -> None:
    model = ZigZag()
    x = torch.randn(ROWS, 7)
    before = look(model)
    recording = Recording(model, find_units(model))

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), recording:
        model(x)

    assert look(model) == before
    with pytest.raises(ProfileError, match="this recording of ZigZag is not complete: the code inside raised an error"):
        _ = recording.rows


def test_an_error_that_user_code_catches_does_no_harm(record: Record) -> None:
    class Tries(ZigZag):
        def forward(self, x: Tensor) -> Tensor:
            with suppress(RuntimeError):
                self.a(x[:, :3])
            return self.b(x)  # type: ignore[no-any-return]

    assert [call.unit for call in record(Tries(), torch.randn(ROWS, 8)).calls] == ["a", "b"]


def test_hooks_of_user_code_stay_and_run_once(record: Record) -> None:
    model = ZigZag()
    seen: list[Any] = []
    handle = model.b.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    record(model, torch.randn(ROWS, 8))

    assert seen == [(ROWS, 8)]
    assert list(model.b._forward_hooks) == [handle.id]


def test_the_batch_is_not_kept_alive() -> None:
    model = ZigZag()
    x = torch.randn(ROWS, 8)
    gone = weakref.ref(x)
    with Recording(model, find_units(model)) as recording:
        output = model(x)
    of_output = weakref.ref(output)
    del x, output
    gc.collect()

    assert gone() is None
    assert of_output() is None
    assert recording.calls


def test_what_a_recording_cannot_tell() -> None:
    model = ZigZag()
    with Recording(model, find_units(model)) as recording, pytest.raises(ProfileError, match="its block has not ended"):
        _ = recording.flows
    with pytest.raises(ProfileError, match="no unit of ZigZag was called while it was recorded; call the model inside"):
        _ = recording.rows
    with pytest.raises(ProfileError, match="a Recording records once; make a new one"), recording:
        pass
    with pytest.raises(ProfileError, match="rows must be at least 1, got 0"):
        Recording(model, find_units(model), rows=0)


def test_a_recording_of_a_model_on_meta_has_shapes() -> None:
    model = MODELS["convnet"][0]().to("meta")
    with Recording(model, find_units(model)) as recording:
        model(torch.empty(ROWS, 1, 8, 8, device="meta"))

    assert recording.shapes_only
    assert [call.outputs[0].shape for call in recording.calls][-1] == (ROWS, 4)
