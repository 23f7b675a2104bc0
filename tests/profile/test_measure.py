"""What a measured profile says; never how long something took."""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from lightning_hetero.devices import DeviceSpec, Inventory, resolve_devices
from lightning_hetero.errors import InventoryError, ProfileError
from lightning_hetero.graph.find import find_units
from lightning_hetero.profile import Curve, ModelProfile
from lightning_hetero.profile.benches import Basis, Bench, bases
from lightning_hetero.profile.measure import measure_model, row_counts
from lightning_hetero.profile.recording import Recording
from lightning_hetero.testing import EmulatedAccelerator
from lightning_hetero.testing.models import MODELS

Record = Callable[..., Recording]
ROWS = 8


def chain(width: int = 4, layers: int = 3) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def rows_of(curve: Curve) -> list[int]:
    return [rows for rows, _ in curve.points]


@pytest.fixture
def small(accelerator: EmulatedAccelerator) -> Iterator[EmulatedAccelerator]:
    """An accelerator that tests may limit."""
    accelerator.reset()
    yield accelerator
    accelerator.reset()


@pytest.mark.parametrize("name", MODELS)
def test_every_unit_has_curves_on_every_device(name: str, record: Record, cpus: Inventory) -> None:
    make, draw = MODELS[name]
    model = make().double()
    graph = find_units(model)
    recording = record(model, draw(ROWS, torch.Generator().manual_seed(0)))
    profile = measure_model(recording, cpus, call_overhead_s=1e-4)

    assert profile.model == graph.fingerprint
    assert profile.rows == ROWS
    assert {unit.name for unit in profile.units} == set(graph.names)
    assert profile.devices == cpus.names
    assert profile.notes == ()
    assert not profile.estimated
    assert profile.call_overhead_s == 1e-4
    for unit in profile.units:
        for device in cpus.names:
            assert rows_of(unit.forward_s[device])[-1] == ROWS
            assert all(seconds > 0 for _, seconds in unit.forward_s[device].points)
            assert all(seconds > 0 for _, seconds in unit.backward_s[device].points)
    assert profile.own_code.forward_s["emulated:0"](ROWS) > 0
    assert profile.own_code.backward_s["emulated:0"](4) == profile.own_code.forward_s["emulated:0"](4)
    assert ModelProfile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile


def test_emulated_devices_are_the_cpu_at_their_pace(record: Record) -> None:
    inventory = resolve_devices("cpu@speed=2,cpu@speed=1,cpu@speed=0.5")
    profile = measure_model(record(chain(), torch.randn(ROWS, 4)), inventory)

    for unit in profile.units:
        for curves in (unit.forward_s, unit.backward_s):
            fast, slow, slower = (curves[name] for name in inventory.names)
            assert slower == slow.scaled(2.0)
            # Slow ones take what it usually takes, and the fastest, which is the CPU itself, the median.
            assert all(slow(rows) <= fast.scaled(2.0)(rows) for rows in rows_of(slow))
            assert slow(ROWS) > 0
    assert len(set(profile.optimizer_s_per_byte.values())) == 1  # optimizers are not slowed down
    assert set(profile.gradient_sum_s_per_byte) == set(inventory.names)
    assert min(*profile.optimizer_s_per_byte.values(), *profile.gradient_sum_s_per_byte.values()) > 0
    assert profile.own_code.forward_s["emulated:2"] == profile.own_code.forward_s["emulated:1"]


def test_threads_of_emulated_devices_are_set_while_they_are_measured(record: Record) -> None:
    class Asks(nn.Linear):
        seen: set[int] = set()  # noqa: RUF012 (a copy of the unit must see the same set)

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add(torch.get_num_threads())
            return super().forward(x)

    recording = record(nn.Sequential(Asks(4, 4)), torch.randn(ROWS, 4))
    Asks.seen.clear()
    measure_model(recording, resolve_devices("cpu@speed=1,threads=1;cpu@speed=1,threads=2".replace(";", ",")))

    assert Asks.seen == {1, 2}
    assert torch.get_num_threads() == 1


def test_equal_units_are_measured_once(record: Record) -> None:
    profile = measure_model(record(chain(), torch.randn(ROWS, 4)), resolve_devices("cpu"))

    # The first one's input needs no gradient, so its backward is another one.
    first, second, third = profile.units
    assert second.forward_s == third.forward_s
    assert second.backward_s == third.backward_s
    assert first.forward_s != second.forward_s


def test_a_unit_called_twice_costs_twice(record: Record) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.once = nn.Linear(4, 4)
            self.twice = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x.requires_grad_()
            return self.twice(self.once(x)) + self.twice(x)  # type: ignore[no-any-return]

    profile = measure_model(record(Twice(), torch.randn(ROWS, 4)), resolve_devices("cpu"))

    assert profile["twice"].calls == 2
    assert profile["twice"].forward_s["cpu"] == profile["once"].forward_s["cpu"].scaled(2.0)
    assert profile["twice"].saved_bytes == profile["once"].saved_bytes


def test_calls_of_other_sizes_count_by_their_elements(record: Record) -> None:
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 1)
            self.other = nn.Conv1d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.other(x).sum() + self.conv(x).sum() + self.conv(x[..., :4]).sum()  # type: ignore[no-any-return]

    profile = measure_model(record(Scales(), torch.randn(ROWS, 1, 8)), resolve_devices("cpu"))

    assert profile["conv"].forward_s["cpu"] == profile["other"].forward_s["cpu"].scaled(1.5)


def test_saved_bytes_are_what_autograd_keeps_beyond_weights_and_inputs(record: Record, cpus: Inventory) -> None:
    class Kept(nn.Module):
        """Autograd keeps the input and the weight of the product, and what tanh returns, once."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 16))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.weight).tanh().view(-1, 4, 4)

    model = nn.Sequential(nn.Linear(4, 4), Kept())
    profile = measure_model(record(model, torch.randn(ROWS, 4)), cpus)

    assert profile["0"].saved_bytes(ROWS) == 0
    assert (profile["1"].saved_bytes.fixed, profile["1"].saved_bytes.per_row) == (0, 16 * 4)
    assert (profile["1"].temporary_bytes.fixed, profile["1"].temporary_bytes.per_row) == (0, 16 * 4)


def test_own_code_keeps_what_units_hand_to_it(record: Record) -> None:
    recording = record(MODELS["mlp"][0](), torch.randn(ROWS, 8))
    profile = measure_model(recording, resolve_devices("cpu"))

    assert profile.own_code.saved_bytes(ROWS) == ROWS * (16 + 16 + 4) * 4


def test_temporary_bytes_come_from_the_allocator_where_there_is_one(record: Record, small: EmulatedAccelerator) -> None:
    class Wide(nn.Linear):
        """Needs 64 times its output for a moment."""

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                moment = x.repeat(1, 64).sum()
            return super().forward(x) + moment

    profile = measure_model(record(nn.Sequential(Wide(4, 4)), torch.randn(ROWS, 4)), resolve_devices(small.devices[0]))

    assert profile["0"].temporary_bytes.per_row >= 64 * 4 * 4


def test_a_frozen_unit_on_raw_data_has_no_backward(record: Record) -> None:
    model = chain()
    model[0].requires_grad_(False)
    profile = measure_model(record(model, torch.randn(ROWS, 4)), resolve_devices("cpu"))

    assert profile["0"].backward_s["cpu"](ROWS) == 0.0
    assert profile["1"].backward_s["cpu"](ROWS) > 0.0


def test_a_frozen_unit_passes_gradients_on(record: Record) -> None:
    model = chain()
    model[1].requires_grad_(False)
    profile = measure_model(record(model, torch.randn(ROWS, 4)), resolve_devices("cpu"))

    assert profile["1"].backward_s["cpu"](ROWS) > 0.0


def test_without_training_nothing_goes_backward(record: Record, cpus: Inventory) -> None:
    profile = measure_model(record(chain(), torch.randn(ROWS, 4)), cpus, training=False)

    assert all(unit.backward_s == {} and unit.saved_bytes(ROWS) == 0 for unit in profile.units)
    assert profile.own_code.backward_s == {}
    assert profile.optimizer_s_per_byte == {}
    assert profile["0"].forward_s["emulated:0"](ROWS) > 0


@pytest.mark.parametrize(
    ("rows", "counts"),
    [(1, (1,)), (2, (1, 2)), (3, (1, 3)), (8, (1, 2, 4, 8)), (64, (1, 8, 16, 32, 64)), (100, (1, 12, 25, 50, 100))],
)
def test_the_numbers_of_rows_are_those_of_micro_batches(rows: int, counts: tuple[int, ...]) -> None:
    assert row_counts(rows) == counts


@pytest.mark.parametrize("rows", [1, 3, 8, 20])
def test_more_or_fewer_rows_than_were_seen(rows: int, record: Record) -> None:
    profile = measure_model(record(chain(), torch.randn(ROWS, 4)), resolve_devices("cpu"), rows=rows)

    assert profile.rows == rows
    assert rows_of(profile["0"].forward_s["cpu"]) == list(row_counts(rows))
    assert profile.notes == ()


def test_what_does_not_depend_on_the_rows_is_flat(record: Record) -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Embedding(5, 4)
            self.net = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x + self.position(torch.arange(5)))  # type: ignore[no-any-return]

    recording = record(Positions(), torch.randn(ROWS, 5, 4), rows=ROWS)
    curve = measure_model(recording, resolve_devices("cpu"))["position"].forward_s["cpu"]

    assert curve(1) == pytest.approx(curve(1000)) == pytest.approx(curve(ROWS))
    assert curve(ROWS) > 0


def test_a_mask_as_long_as_the_batch_is_not_cut(record: Record) -> None:
    """Rows and time are both 8, so the mask (8, 8) looks as if it had the rows in dim 0."""
    model = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(ROWS)
    whole = nn.ModuleDict({"layer": model})
    graph = find_units(whole)
    with Recording(whole, graph) as recording:
        whole["layer"](torch.randn(ROWS, ROWS, 4), src_mask=mask)
    profile = measure_model(recording, resolve_devices("cpu"))

    assert rows_of(profile["layer"].forward_s["cpu"]) == [1, 2, 4, 8]
    assert profile.notes == ()


def test_batch_norm_cannot_train_on_one_row_and_has_the_rest_of_its_curve(record: Record) -> None:
    profile = measure_model(record(nn.Sequential(nn.BatchNorm1d(4)), torch.randn(ROWS, 4)), resolve_devices("cpu"))

    assert rows_of(profile["0"].forward_s["cpu"]) == [2, 4, 8]
    assert profile.notes == ()


def test_a_packed_sequence_is_measured_whole(record: Record) -> None:
    model = nn.ModuleDict({"gru": nn.GRU(4, 4)})
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(5, ROWS, 4), torch.arange(ROWS, 0, -1).clamp(max=5))
    with Recording(model, find_units(model), rows=ROWS) as recording:
        model["gru"](packed)
    profile = measure_model(recording, resolve_devices("cpu"))

    assert profile["gru"].forward_s["cpu"](ROWS) > 0
    assert profile.notes == ()


def test_autocast_of_the_call_is_repeated(record: Record) -> None:
    class Looks(nn.Linear):
        seen: set[torch.dtype] = set()  # noqa: RUF012

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            self.seen.add(out.dtype)
            return out

    model = nn.Sequential(Looks(4, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recording = record(model, torch.randn(ROWS, 4))
    Looks.seen.clear()
    measure_model(recording, resolve_devices("cpu"))

    assert Looks.seen == {torch.bfloat16}


class Shy(nn.Module):
    """Runs within its model only."""

    ready = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            raise RuntimeError("not outside of my model")
        return x @ self.weight[0]


def test_a_unit_that_cannot_run_alone_is_estimated_by_its_bytes(
    record: Record, cpus: Inventory, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = record(nn.Sequential(nn.Linear(4, 4, bias=False), Shy()), torch.randn(ROWS, 4))
    monkeypatch.setattr(Shy, "ready", False)
    profile = measure_model(recording, cpus)

    assert profile["1"].forward_s["emulated:0"] == profile["0"].forward_s["emulated:0"].scaled(2.0)
    assert profile["1"].saved_bytes.per_row == 16
    assert profile.notes == (
        "Unit '1' could not run alone on cpu and is estimated there: RuntimeError: not outside of my model",
    )


def test_when_no_unit_can_run_alone_sizes_must_do(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = record(nn.Sequential(Shy(), Shy()), torch.randn(ROWS, 4))
    monkeypatch.setattr(Shy, "ready", False)
    profile = measure_model(recording, resolve_devices("cpu"))

    assert profile.estimated
    assert profile.devices == ("cpu",)
    assert profile.flows == recording.flows
    assert profile.notes[0] == "All seconds are estimates from the sizes of parameters; nothing was run."
    assert "not outside of my model" in profile.notes[1]


def test_time_that_runs_out_leaves_estimates(record: Record) -> None:
    asked: list[None] = []

    def out_of_time() -> bool:
        asked.append(None)
        return len(asked) > 1

    profile = measure_model(record(chain(), torch.randn(ROWS, 4)), resolve_devices("cpu"), out_of_time=out_of_time)

    assert profile.devices == ("cpu",)
    assert profile["1"].forward_s == profile["0"].forward_s
    assert profile.notes == ("Unit '1' (and 1 like it) is estimated on cpu: there was no time left to measure it.",)


def test_a_budget_of_nothing_measures_nothing(record: Record) -> None:
    profile = measure_model(record(chain(), torch.randn(ROWS, 4)), resolve_devices("cpu"), budget_s=0.0)

    assert profile.estimated
    assert profile.devices == ("cpu",)


def test_a_model_larger_than_every_device(record: Record, small: EmulatedAccelerator) -> None:
    model = chain(width=64, layers=6)
    recording = record(model, torch.randn(ROWS, 64))
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    gc.collect()  # what other tests have left on the devices
    caps = [small.stats(index).used_bytes + model_bytes // 2 for index in range(small.device_count)]
    for index, cap_bytes in enumerate(caps):  # room for two layers with their gradients
        small.configure(index, cap_bytes=cap_bytes)
    profile = measure_model(recording, resolve_devices(",".join(small.devices)))

    assert profile.devices == small.devices
    assert profile.notes == ()
    assert all(small.stats(index).peak_bytes <= cap_bytes for index, cap_bytes in enumerate(caps))


def test_a_unit_larger_than_a_device_is_estimated_there(record: Record, small: EmulatedAccelerator) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4096), nn.Linear(4096, 8))
    recording = record(model, torch.randn(ROWS, 8))
    small.configure(0, cap_bytes=64 * 1024)
    profile = measure_model(recording, resolve_devices(f"cpu,{small.devices[0]}"))

    assert set(profile.devices) == {"cpu", small.devices[0]}
    assert [note.partition(":0 and is estimated there: OutOfMemoryError: ")[0] for note in profile.notes] == [
        "Unit '1' could not run alone on dev",
        "Unit '2' could not run alone on dev",
    ]
    # Both large units compare to the CPU as the small one does.
    ratio = [profile[name].forward_s[small.devices[0]](ROWS) / profile[name].forward_s["cpu"](ROWS) for name in "12"]
    assert ratio[0] == pytest.approx(ratio[1])


def test_a_device_with_room_for_few_rows_has_the_lower_part_of_the_curve(
    record: Record, small: EmulatedAccelerator
) -> None:
    recording = record(nn.Sequential(nn.Linear(4, 4096)), torch.randn(64, 4))
    small.configure(0, cap_bytes=600 * 1024)
    profile = measure_model(recording, resolve_devices(small.devices[0]))
    measured = rows_of(profile["0"].forward_s[small.devices[0]])

    assert measured[0] == 1
    assert 1 < measured[-1] < 64


def elsewhere(name: str, **more: Any) -> DeviceSpec:
    return DeviceSpec(name=name, kind="hpu", torch_device=name, memory_bytes=2**34, **more)


def test_devices_that_are_not_here_follow_from_the_cpu(record: Record) -> None:
    inventory = resolve_devices("cpu")
    inventory = replace(inventory, devices=(*inventory.devices, elsewhere("hpu:7", speed=4.0)))
    profile = measure_model(record(chain(), torch.randn(ROWS, 4)), inventory)

    assert profile.estimated
    assert profile.notes == ("Not on this machine, so estimated from its CPU: hpu:7.",)
    for unit in profile.units:
        assert unit.forward_s["hpu:7"] == unit.forward_s["cpu"].scaled(0.25)


def test_data_sheets_come_before_speeds() -> None:
    sheet = {"flops_per_s": (("float32", 1e15), ("bfloat16", 4e15)), "launch_s": 0.5, "memory_bytes_per_s": 7e9}
    gpu = elsewhere("hpu:7", speed=4.0, measured="data sheet", **sheet)
    cpu = replace(resolve_devices("cpu").root, flops_per_s=(("float32", 1e12),))
    alone = bases(Inventory(devices=(gpu,)), training=True)["hpu:7"]
    beside = {d: bases(Inventory(devices=(cpu, gpu)), training=True, dtype=d) for d in ("float32", "bfloat16")}

    assert alone.estimated
    assert alone.bench == Bench("cpu")
    assert 0 < alone.factor < 1  # no CPU of this world comes near
    assert beside["float32"]["hpu:7"].factor == 1e12 / 1e15
    assert beside["bfloat16"]["hpu:7"].factor == 1e12 / 4e15
    assert beside["float32"]["hpu:7"].curve(Curve(((1, 0.0), (2, 0.0))), calls=3).points == ((1, 1.5), (2, 1.5))
    assert beside["float32"]["hpu:7"].optimizer_s_per_byte == 1e-9
    assert beside["float32"]["cpu"] == Basis(Bench("cpu"))


def test_a_basis_scales_and_adds() -> None:
    assert Basis(Bench(), 2.0, 0.25).curve(Curve(((1, 1.0),)), calls=2) == Curve(((1, 2.5),))


def test_what_cannot_train_is_left_out_of_training(record: Record) -> None:
    cpu = resolve_devices("cpu")
    fpga = DeviceSpec(name="fpga", kind="fpga", torch_device=None, trainable=False, memory_bytes=2**20, speed=2.0)
    inventory = replace(cpu, devices=(*cpu.devices, fpga))
    recording = record(chain(), torch.randn(ROWS, 4))

    assert measure_model(recording, inventory).devices == ("cpu",)
    assert measure_model(recording, inventory, training=False).devices == ("cpu", "fpga")


def test_a_training_step_of_lightning_is_recorded_with_its_loss() -> None:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = chain()

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            x, y = batch
            return nn.functional.mse_loss(self.net(x), y)

    module = Module()
    with Recording(module, find_units(module)) as recording:
        loss = module.training_step((torch.randn(ROWS, 4), torch.randn(ROWS, 4)), 0)
    loss.backward()
    profile = measure_model(recording, resolve_devices("cpu"))

    assert [unit.name for unit in profile.units] == ["net.0", "net.1", "net.2"]
    assert profile.notes == ()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
def test_scripted_and_compiled_units_are_measured() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(4, 4))
    compiled = torch.compile(nn.Linear(4, 4), backend="eager")
    model = nn.ModuleList([scripted, compiled])
    with Recording(model, find_units(model)) as recording:
        compiled(scripted(torch.randn(ROWS, 4)))
    profile = measure_model(recording, resolve_devices("cpu"))

    assert [unit.name for unit in profile.units] == list(find_units(model).names)
    assert profile.notes == ()


def test_what_cannot_be_measured() -> None:
    model = chain().to("meta")
    with Recording(model, find_units(model)) as recording:
        model(torch.empty(ROWS, 4, device="meta"))
    with pytest.raises(ProfileError, match=r"shapes without values .* use `estimate_profile`"):
        measure_model(recording, resolve_devices("cpu"))
    with pytest.raises(ProfileError, match="rows must be at least 1, got 0"):
        measure_model(recording, resolve_devices("cpu"), rows=0)
    unfinished = Recording(model, find_units(model))
    with pytest.raises(ProfileError, match="this recording of Sequential is not complete"):
        measure_model(unfinished, resolve_devices("cpu"))


def test_an_inventory_that_cannot_train(record: Record) -> None:
    fpga = DeviceSpec(name="fpga", kind="fpga", torch_device=None, trainable=False, memory_bytes=2**20)
    with pytest.raises(InventoryError, match="none of the devices can train: fpga"):
        measure_model(record(chain(), torch.randn(ROWS, 4)), Inventory(devices=(fpga,)))


@pytest.mark.cuda
def test_a_real_accelerator(record: Record) -> None:
    inventory = resolve_devices("cpu,cuda:0")
    model = MODELS["convnet"][0]()
    before = torch.cuda.get_rng_state(0).tolist()
    profile = measure_model(record(model, torch.randn(ROWS, 1, 8, 8)), inventory)

    assert set(profile.devices) == {"cpu", "cuda:0"}
    assert profile.notes == ()
    assert torch.cuda.get_rng_state(0).tolist() == before
