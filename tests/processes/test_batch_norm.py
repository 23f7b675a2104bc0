"""Batch normalisation over the rows of three real processes against one process with all rows.

Run as a program, this file is one of the processes: `python test_batch_norm.py RANK FOLDER`.
"""

from __future__ import annotations

import copy
import os
import pickle
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import launch
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from lightning_hetero.devices import resolve_devices
from lightning_hetero.errors import HeteroError, UnsupportedError
from lightning_hetero.graph.find import find_units
from lightning_hetero.placement import ManualPolicy, Problem, make_plan
from lightning_hetero.runtime.engine.stepper import Stepper
from lightning_hetero.runtime.placed import Pipelining, PlacedModel
from lightning_hetero.runtime.processes.batch_norm import GlobalBatchNorm
from lightning_hetero.schedule import get_schedule
from lightning_hetero.testing import install_accelerator
from lightning_hetero.testing.accelerator import EmulatedAccelerator

PROCESSES = 3
EXACT = 1e-12
TIMEOUT_S = 60
STEPS = 3
Results = dict[str, Any]


# Models


class Activated(nn.BatchNorm2d):
    """Normalises and activates in a `forward` of its own, as BatchNormAct2d of timm does."""

    def forward(self, input: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        return functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.2, self.eps
        ).relu()


class Handmade(nn.BatchNorm1d):
    """Normalises by hand."""

    def forward(self, input: Tensor) -> Tensor:
        return (input - input.mean(0)) / input.std(0)


class Net(nn.Module):
    """Convolutions with a normalisation that is used twice. Input (rows, 3, 5, 5)."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d, **options: Any) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1), norm(4, **options)
        self.second, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)
        self.head = nn.BatchNorm1d(3, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = self.norm(self.second(x)).relu()
        return self.head(self.last(x.mean((2, 3))))  # type: ignore[no-any-return]

    def training_step(self, x: Tensor) -> Tensor:
        return self(x).pow(3).mean()  # type: ignore[no-any-return]


class Checkpointed(Net):
    """Runs its forward again in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[no-any-return]


def frozen(*names: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = Net()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(names))
        return model

    return make


def partly_evaluating() -> nn.Module:
    model = Net()
    model.norm.eval()
    return model


# Cases of parity


@dataclass(frozen=True)
class Case:
    """A model, and who has which rows of its batches.

    Attributes:
        make: Makes the model.
        shape: Of a row.
        rows: Of each process; those after the last take no part.
        dtype: Of model and data.
        autocast: Whether to compute in bfloat16 where autocast does.
        evaluate: Whether the model is in evaluation mode from the beginning.
        needs_grad: Whether the input needs a gradient.
        offset: Added to the data.
        accelerated: Which process has an accelerator, the emulated one.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (3, 5, 5)
    rows: tuple[int, ...] = (2, 3, 5)
    dtype: torch.dtype = torch.float64
    autocast: bool = False
    evaluate: bool = False
    needs_grad: bool = True
    offset: float = 0.0
    accelerated: int | None = None

    def model(self) -> nn.Module:
        torch.manual_seed(1)
        model = self.make().to(self.dtype)
        with torch.no_grad():
            for parameter in model.parameters():  # weights of ones and biases of zeros hide mistakes
                parameter.copy_(torch.randn(parameter.shape) * 0.3 + 0.5)
        return model.eval() if self.evaluate else model

    def batch(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(sum(self.rows), *self.shape, generator=generator, dtype=torch.float64)
        return (x * 2 + self.offset + 0.3).to(self.dtype)


CASES: Mapping[str, Case] = {
    "1:3, rows of numbers": Case(lambda: nn.BatchNorm1d(4), (4,), (1, 3)),
    "2:3:5, rows of numbers": Case(lambda: nn.BatchNorm1d(4), (4,)),
    "sequences": Case(lambda: nn.BatchNorm1d(4), (4, 6), (1, 3)),
    "images": Case(lambda: nn.BatchNorm2d(3)),
    "volumes": Case(lambda: nn.BatchNorm3d(2), (2, 3, 2, 4), (1, 3)),
    "one row each": Case(lambda: nn.BatchNorm1d(4), (4,), (1, 1, 1)),
    "one without rows": Case(lambda: nn.BatchNorm1d(4), (4,), (2, 0, 3)),
    "cumulative average": Case(lambda: nn.BatchNorm1d(4, momentum=None), (4,)),
    "no weights": Case(lambda: nn.BatchNorm2d(3, affine=False)),
    "no running statistics": Case(lambda: Net(track_running_stats=False)),
    "evaluation without running statistics": Case(lambda: Net(track_running_stats=False), evaluate=True),
    "evaluation": Case(Net, evaluate=True),
    "network": Case(Net),
    "network, 1:3": Case(Net, rows=(1, 3)),
    "network of which a part evaluates": Case(partly_evaluating),
    "network, input without gradient": Case(Net, needs_grad=False),
    "input without gradient": Case(lambda: nn.BatchNorm2d(3), needs_grad=False),
    "frozen weights": Case(frozen("norm", "head")),
    "frozen bias": Case(frozen("norm.bias")),
    "frozen first layers": Case(frozen("first", "norm"), needs_grad=False),
    "checkpointed": Case(Checkpointed),
    "SyncBatchNorm": Case(lambda: Net(nn.SyncBatchNorm)),
    "forward of its own": Case(lambda: Net(Activated)),
    "float32": Case(Net, dtype=torch.float32),
    "bfloat16": Case(lambda: nn.BatchNorm2d(3), dtype=torch.bfloat16),
    "autocast": Case(
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), (4,), dtype=torch.float32, autocast=True
    ),
    "an accelerator beside CPUs": Case(Net, accelerated=1),
    "large mean": Case(lambda: nn.BatchNorm1d(4), (4,), offset=1e6),
}
# Beside float64: how far the numbers of one process and of several may be apart, by their own resolution.
TOLERANCE = {"float32": 2e-5, "bfloat16": 0.05, "autocast": 0.05, "large mean": 1e-8}


def train(model: nn.Module, case: Case, own: slice, device: str = "cpu") -> Results:
    """Some steps with some rows of every batch: all that has to be equal in the end, and an evaluation after it."""
    model.to(device)
    results: Results = {"outputs": [], "inputs": []}
    for step in range(STEPS):
        x = case.batch(step)[own].clone().to(device).requires_grad_(case.needs_grad)
        with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            output = model(x)
        target = (
            torch.linspace(-1, 1, output.shape[1], dtype=output.dtype).to(device).view(-1, *(1,) * (output.dim() - 2))
        )
        loss = (output - target).pow(3).sum() / sum(case.rows)
        if loss.requires_grad:
            loss.backward()
        results["outputs"].append(output.detach())
        results["inputs"].append(x.grad)
    results["gradients"] = {name: parameter.grad for name, parameter in model.named_parameters()}
    results["buffers"] = dict(model.named_buffers())
    results["evaluated"] = None
    if all(norm.track_running_stats for norm in model.modules() if isinstance(norm, _BatchNorm)):
        results["evaluated"] = model.eval()(case.batch(STEPS).to(device)).detach()
    return tree_map_only(Tensor, Tensor.cpu, results)  # type: ignore[no-any-return]


# What a process does


@dataclass
class Peer:
    """One of the processes.

    Attributes:
        rank: Of this process.
        groups: A group of two, and one of three.
    """

    rank: int
    groups: dict[int, Any]
    norms: GlobalBatchNorm | None = field(default=None)

    def attached(self, model: nn.Module, size: int = PROCESSES) -> nn.Module:
        if self.norms is not None:
            self.norms.detach()
        self.norms = GlobalBatchNorm(model, self.groups[size], self.rank, size)
        self.norms.attach()
        return model

    def parity(self, case: Case) -> Results | None:
        if self.rank >= len(case.rows):
            return None
        start = sum(case.rows[: self.rank])
        model = self.attached(case.model(), len(case.rows))
        device = "cpu"
        if case.accelerated == self.rank:
            device = install_accelerator("auto").devices[0]
        return train(model, case, slice(start, start + case.rows[self.rank]), device)

    def two(self) -> tuple[nn.Module, nn.Module]:
        model = nn.ModuleDict({"a": nn.BatchNorm1d(2), "b": nn.BatchNorm1d(3)})
        self.attached(model)
        return model["a"], model["b"]

    # Each of these fails; the text of the error is what is asked for.

    def other_module(self) -> None:
        a, b = self.two()
        a(torch.randn(2, 2)) if self.rank < 2 else b(torch.randn(2, 3))

    def other_number_of_calls(self) -> None:
        a, _ = self.two()
        a.train(self.rank != 0)(torch.randn(2, 2))
        a.train()(torch.randn(2, 2))
        assert self.norms is not None
        self.norms.attach()  # the next step, which the other processes do not reach
        a(torch.randn(2, 2))

    def other_order_of_backwards(self) -> None:
        a, b = self.two()
        outputs = [a(torch.randn(2, 2, requires_grad=True)), b(torch.randn(2, 3, requires_grad=True))]
        outputs[self.rank == 0].sum().backward()

    def backward_on_some(self) -> None:
        a, _ = self.two()
        a(torch.randn(2, 2, requires_grad=self.rank != 1))

    def gradient_of_gradient(self) -> None:
        a, _ = self.two()
        x = torch.randn(2, 2, requires_grad=True)
        torch.autograd.grad(a(x).pow(3).sum(), x, create_graph=True)

    def by_hand(self) -> None:
        self.attached(nn.Sequential(Handmade(2)))(torch.randn(2, 2))

    def other_channels(self) -> None:
        self.attached(nn.Sequential(nn.BatchNorm1d(2, affine=False, track_running_stats=False)))(torch.randn(2, 4))

    def too_few_values(self) -> None:
        self.two()[0](torch.randn(1 if self.rank == 1 else 0, 2))

    def gone(self) -> None:
        """The third process ends meanwhile. The last one of all."""
        a, _ = self.two()
        if self.rank < 2:
            a(torch.randn(2, 2))


FAILURES = (
    "other_module",
    "other_number_of_calls",
    "other_order_of_backwards",
    "backward_on_some",
    "gradient_of_gradient",
    "by_hand",
    "other_channels",
    "too_few_values",
    "gone",
)


def text_of_failure(run: Callable[[], object]) -> str | None:
    try:
        run()
    except HeteroError as error:
        return f"{type(error).__name__}: {error}"
    return None


# With the engine that drives the devices of a process

PLACED = Case(Net, rows=(4, 6, 7))


def place(model: nn.Module) -> PlacedModel:
    problem = Problem(graph=find_units(model, ()), inventory=resolve_devices("cpu@speed=1,cpu@speed=1"))
    where = {
        "first": "emulated:0",
        "norm": "emulated:0",
        "second": "emulated:1",
        "last": "emulated:1",
        "head": "emulated:1",
    }
    plan = make_plan(ManualPolicy(where), problem)
    placed = PlacedModel(model, plan, Pipelining(micro_batches=2, hang_timeout_s=30.0))
    placed.place()
    return placed


def placed_first(peer: Peer) -> Results | None:
    model = PLACED.model()
    placed = place(model)
    peer.attached(model)
    try:
        return train(model, PLACED, own_rows(peer))
    finally:
        assert peer.norms is not None
        peer.norms.detach()
        placed.release(torch.device("cpu"))


def attached_first(peer: Peer) -> Results | None:
    model = peer.attached(PLACED.model())
    placed = place(model)
    try:
        return train(model, PLACED, own_rows(peer))
    finally:
        placed.release(torch.device("cpu"))


def in_lanes(peer: Peer) -> str | None:
    """Micro-batches of a whole step: those of the first one after the other, those of the second in lanes."""
    model = PLACED.model()
    placed = place(model)
    peer.attached(model)
    assert placed.engine is not None
    assert peer.norms is not None
    stepper = Stepper(placed.engine, model, "training_step", get_schedule("1f1b"), (), ())
    batch = PLACED.batch(0)[own_rows(peer)]
    try:
        stepper.run((batch,), 1.0)
        return text_of_failure(lambda: stepper.run((batch,), 1.0))
    finally:
        stepper.close()
        peer.norms.detach()
        placed.release(torch.device("cpu"))


def own_rows(peer: Peer) -> slice:
    start = sum(PLACED.rows[: peer.rank])
    return slice(start, start + PLACED.rows[peer.rank])


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    wait = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES, timeout=wait)
    groups = {2: dist.new_group([0, 1], timeout=wait), 3: dist.new_group(timeout=wait)}
    peer = Peer(rank, groups)
    results: Results = {name: peer.parity(case) for name, case in CASES.items()}
    results["placed, then attached"] = placed_first(peer)
    results["attached, then placed"] = attached_first(peer)
    results["in_lanes"] = in_lanes(peer)
    for name in FAILURES:
        results[name] = text_of_failure(getattr(peer, name))
    torch.save(results, folder / f"{rank}.pt")


# What has to come out


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, accelerator: EmulatedAccelerator) -> list[Results]:
    """What the processes have found, by rank. The accelerator is one of theirs, too; here it gets built."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {"OMP_NUM_THREADS": "1"}
    programs = [launch.Forked([__file__, str(rank), str(folder)], environment) for rank in range(PROCESSES)]
    ended = launch.wait(programs, timeout_s=2 * TIMEOUT_S)
    assert [process.code for process in ended] == [0] * PROCESSES, "\n".join(process.text for process in ended)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


def assert_same(parts: list[Results], case: Case, tolerance: float) -> None:
    """The parts of several processes make what one process has."""
    whole = train(case.model(), case, slice(None))

    def close(ours: Tensor, theirs: Tensor, what: str) -> None:
        assert ours.dtype == theirs.dtype, what
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda text: f"{what}: {text}")

    for step in range(STEPS):
        close(torch.cat([part["outputs"][step] for part in parts]), whole["outputs"][step], f"output of step {step}")
        if case.needs_grad:
            together = torch.cat([part["inputs"][step] for part in parts])
            close(together, whole["inputs"][step], f"gradient of the input of step {step}")
    for name, gradient in whole["gradients"].items():
        found = [part["gradients"][name] for part in parts]
        if gradient is None:
            assert found == [None] * len(parts), name
        else:
            close(torch.stack(found).sum(0), gradient, f"gradient of {name}")
    for part in parts:
        assert part["buffers"].keys() == whole["buffers"].keys()
        for name, buffer in whole["buffers"].items():
            close(part["buffers"][name], buffer, name)
        if whole["evaluated"] is not None:
            close(part["evaluated"], whole["evaluated"], "evaluation")


@pytest.mark.parametrize("name", CASES)
def test_several_processes_are_as_one(ranks: list[Results], name: str) -> None:
    case = CASES[name]
    assert_same([rank[name] for rank in ranks[: len(case.rows)]], case, TOLERANCE.get(name, EXACT))


@pytest.mark.parametrize("order", ["placed, then attached", "attached, then placed"])
def test_a_model_over_several_devices_of_each_process(ranks: list[Results], order: str) -> None:
    assert_same([rank[order] for rank in ranks], PLACED, EXACT)


def test_a_process_that_has_fewer_rows_knows_the_rows_of_all(ranks: list[Results]) -> None:
    """The parity above is not that of a batch normalisation which each process does alone."""
    case = CASES["2:3:5, rows of numbers"]
    alone = train(case.model(), case, slice(0, 2))
    found = ranks[0]["2:3:5, rows of numbers"]
    assert not torch.allclose(found["outputs"][0], alone["outputs"][0], atol=0.1)
    assert not torch.allclose(found["gradients"]["weight"], alone["gradients"]["weight"], atol=1e-3)


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        (
            "other_module",
            (
                "ProcessError: the processes are not at the same batch normalisation: process 0 is in the forward of a",
                "process 1 is in the forward of a",
                "process 2 is in the forward of b",
                "in the same order",
            ),
        ),
        (
            "other_number_of_calls",
            ("process 0 is in the forward of a (step 1, call 1,", "process 2 is in the forward of a (step 0, call 1,"),
        ),
        ("other_order_of_backwards", ("process 0 is in the backward of b", "process 1 is in the backward of a")),
        ("backward_on_some", ("process 1 is in the forward of a", "whose input needs no gradient")),
        ("gradient_of_gradient", ("UnsupportedError: the gradient of a gradient through a", "create_graph=True")),
        ("by_hand", ("UnsupportedError: 0 (Handmade)", "without torch.nn.functional.batch_norm")),
        ("other_channels", ("UnsupportedError: 0 is for 2 channels, and its input has 4",)),
        ("too_few_values", ("UnsupportedError: a got fewer than two values per channel",)),
        ("in_lanes", ("UnsupportedError: norm normalises by the whole batch", 'batch_norm="whole"')),
    ],
)
def test_every_process_says_what_is_wrong(ranks: list[Results], name: str, texts: tuple[str, ...]) -> None:
    for rank in ranks:
        for text in texts:
            assert text in rank[name]


def test_a_process_that_is_gone_is_missed(ranks: list[Results]) -> None:
    assert ranks[2]["gone"] is None
    for rank in (0, 1):
        text = ranks[rank]["gone"]
        assert f"ProcessError: process {rank} of 3 got no answer in the forward of a (step 0, call 0" in text
        assert "The error of torch: " in text


# Without other processes


def test_detach_restores_everything() -> None:
    model = Net(nn.SyncBatchNorm)
    model.head.forward = own = lambda x: x  # type: ignore[method-assign]
    before = [dict(module.__dict__) for module in model.modules()]
    names = list(model.state_dict())
    norms = GlobalBatchNorm(model, None, 0, 2)
    for _ in range(2):
        norms.attach()
        assert "forward" in model.norm.__dict__
        assert type(model.norm) is nn.SyncBatchNorm
        assert list(model.state_dict()) == names
    norms.detach()
    assert [dict(module.__dict__) for module in model.modules()] == before
    assert model.head.forward is own
    norms.detach()


def test_copies_and_pickles_are_ordinary() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    norms = GlobalBatchNorm(model, None, 0, 2)
    norms.attach()
    x = torch.randn(5, 2)
    expected = nn.BatchNorm1d(2)(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
    norms.detach()


def test_one_process_needs_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    norms = GlobalBatchNorm(model, None, 0, 1)
    norms.attach()
    assert "forward" not in model[0].__dict__
    assert norms.needs_all_ranks is None


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2)), "1"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval(), nn.BatchNorm1d(2)), "2"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval(), None),
        (lambda: nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False)).eval(), "1"),
        (lambda: nn.BatchNorm1d(2), "BatchNorm1d"),
        (lambda: nn.Linear(2, 2), None),
    ],
)
def test_names_the_module_that_needs_rows_of_all(model: Callable[[], nn.Module], name: str | None) -> None:
    assert GlobalBatchNorm(model(), None, 0, 2).needs_all_ranks == name


def test_a_lazy_module_has_to_know_its_channels() -> None:
    model = nn.Sequential(nn.LazyBatchNorm1d())
    norms = GlobalBatchNorm(model, None, 0, 2)
    with pytest.raises(
        UnsupportedError, match=r"0 \(LazyBatchNorm1d\) does not know its number of channels.*Run a batch"
    ):
        norms.attach()
    assert "forward" not in model[0].__dict__
    model(torch.randn(3, 2))
    norms.attach()
    norms.detach()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # peers are gone already: nothing to say goodbye to
