"""Blocks that keep their inputs only, and run again in the backward: the same numbers, bit for bit, and less memory."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import lightning_hetero.testing.policies  # noqa: F401  (registers round_robin)
from lightning_hetero.devices import resolve_devices
from lightning_hetero.errors import UnsupportedError
from lightning_hetero.graph.find import find_units
from lightning_hetero.placement import Problem, get_policy, make_plan
from lightning_hetero.plan import Plan
from lightning_hetero.runtime.engine.stepper import Stepper
from lightning_hetero.runtime.modes import activate, deactivate
from lightning_hetero.runtime.placed import Pipelining, PlacedModel
from lightning_hetero.schedule import get_schedule
from lightning_hetero.testing.accelerator import EmulatedAccelerator
from lightning_hetero.testing.cut_models import Applies, Twice
from lightning_hetero.testing.models import MODELS

EMULATED = "cpu@speed=1,cpu@speed=1,cpu@speed=1"


class Block(nn.Module):
    """Dropout and an in-place activation between two layers. Input (rows, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)
        self.drop, self.relu = nn.Dropout(0.3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(self.relu(self.a(x))))  # type: ignore[no-any-return]


class Blocks(nn.Module):
    """Three blocks with dropout between them. Input (rows, 8)."""

    def __init__(self, make: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make() for _ in range(3))
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.drop(block(x))
        return x


class Normalised(nn.Module):
    """A block that is normalised. Input (rows, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=None), nn.ReLU(inplace=True))
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(x))  # type: ignore[no-any-return]


class Again(Block):
    """A block that user code checkpoints inside."""

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return torch.tanh(inner)


class Structured(nn.Module):
    """Takes a tensor twice, in structures and by name, and gives it back. Input (rows, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, given: dict[str, Any], *, scale: Tensor) -> dict[str, Any]:
        x, (y, nothing) = given["x"], given["rest"]
        assert x is y
        assert nothing is None
        return {"x": torch.tanh(self.linear(x)) * scale, "given": x, "count": 3}


class TakesStructures(nn.Module):
    """Calls `Structured`. Input (rows, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Structured(), Structured()

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().sum(1, keepdim=True)
        for block in (self.a, self.b):
            x = block({"x": x, "rest": (x, None)}, scale=scale)["x"]
        return x


def frozen() -> nn.Module:
    model = Blocks()
    model.blocks[0].requires_grad_(False)
    model.blocks[2].a.requires_grad_(False)
    return model


def in_evaluation() -> nn.Module:
    return Blocks(Normalised).eval()


@dataclass(frozen=True)
class Case:
    """A model that makes it hard to run a block twice.

    Attributes:
        make: Makes it.
        no_split: Classes that stay whole.
        name: Of the model whose inputs it takes.
        around: What forward and loss run in.
    """

    make: Callable[[], nn.Module]
    no_split: tuple[str, ...] = ("Block",)
    name: str = "mlp"
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


CASES = {
    "dropout": Case(Blocks),
    "batch_norm": Case(lambda: Blocks(Normalised), ("Normalised",)),
    "batch_norm_evaluated": Case(in_evaluation, ("Normalised",)),
    "batch_norm_alone": Case(MODELS["convnet"][0], (), "convnet"),
    "autocast": Case(Blocks, around=lambda: torch.autocast("cpu", torch.bfloat16)),
    "tied": Case(MODELS["tied_transformer"][0], (), "tied_transformer"),
    "twice": Case(Twice, ()),
    "nested_checkpoint": Case(lambda: Blocks(Again), ("Again",)),
    "frozen": Case(frozen),
    "changes_its_input": Case(MODELS["in_place_residual"][0], (), "in_place_residual"),
    "same_tensor_thrice": Case(MODELS["attention"][0], (), "attention"),
    "recurrent": Case(MODELS["recurrent"][0], (), "recurrent"),
    "structures": Case(TakesStructures, ("Structured",)),
}


class Trained(nn.Module):
    """A model with the step of a trainer."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def training_step(self, x: Tensor) -> Tensor:
        return self(x).float().pow(2).mean()  # type: ignore[no-any-return]


@contextmanager
def placed(
    model: nn.Module,
    *,
    on: str = EMULATED,
    no_split: tuple[str, ...] = (),
    checkpointed: bool | tuple[str, ...] = True,
    **options: Any,
) -> Iterator[PlacedModel]:
    """The model on devices, a border at every unit; as it was in the end."""
    problem = Problem(graph=find_units(model, no_split), inventory=resolve_devices(on))
    plan: Plan = make_plan(get_policy("round_robin"), problem)
    if checkpointed:
        names = plan.inventory.names if checkpointed is True else checkpointed
        plan = plan.with_checkpointing([unit for unit, device in plan.device_of.items() if device in names])
    found = PlacedModel(model, plan, Pipelining(hang_timeout_s=30.0, **options))
    found.place()
    mode = found.reconciler()
    if mode is not None:
        activate(mode)
    try:
        yield found
    finally:
        if mode is not None:
            deactivate(mode)
        found.release(torch.device("cpu"))


def trained(case: Case, way: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[list[Tensor], int]:
    """Everything that three steps leave behind, random generator included, and how many calls were cut."""
    torch.manual_seed(0)
    net = case.make()
    model = Trained(net if case.around is not nullcontext else net.to(dtype))
    x = MODELS[case.name][1](10, torch.Generator().manual_seed(3))
    x = x.to(dtype) if x.is_floating_point() and case.around is nullcontext else x
    x = x.float() if x.is_floating_point() and case.around is not nullcontext else x
    x = x.requires_grad_(x.is_floating_point() and way != "step")
    kind, _, count = way.partition(" ")
    options = {"micro_batches": int(count or 4), "defers_batch_norm": kind == "forward", **options}
    with placed(model, no_split=case.no_split, **options) as found:
        run: Callable[[], Tensor | None] = lambda: model.training_step(x)  # noqa: E731
        stepper = None
        if kind == "step":
            assert found.engine is not None
            stepper = Stepper(found.engine, model, "training_step", get_schedule("1f1b"), (), ())
            run = lambda: stepper.run((x,), 1.0).loss  # noqa: E731
        torch.manual_seed(5)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            with case.around():
                loss = run()
            assert loss is not None
            loss.backward()
            optimizer.step()
        if stepper is not None:
            stepper.close()
        after = torch.get_rng_state()
        gradients = [p.grad for p in (x, *model.parameters()) if p.grad is not None]
        left = [each.detach().cpu().clone() for each in (*model.state_dict().values(), *gradients)]
        return [*left, after], found.engine.cut_calls if found.engine is not None else 0


@pytest.mark.parametrize("way", ["connected 1", "forward 2", "forward 4", "step 4"])
@pytest.mark.parametrize("name", CASES)
def test_equal_bit_for_bit_to_keeping_activations(name: str, way: str) -> None:
    (kept, cut), (again, cut_again) = (trained(CASES[name], way, checkpointed=flag) for flag in (False, True))
    assert len(kept) == len(again)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    assert cut == cut_again == (0 if way == "connected 1" or (name, way[:4]) == ("changes_its_input", "forw") else 3)


@pytest.mark.parametrize("way", ["connected 1", "forward 4", "step 4"])
@pytest.mark.parametrize("name", ["dropout", "batch_norm", "tied", "structures", "changes_its_input"])
def test_on_accelerators(name: str, way: str, accelerator: EmulatedAccelerator) -> None:
    """The code runs again in autograd's thread of the device, which knows nothing of the modes of user code."""
    on = ",".join(["cpu", *accelerator.devices[:2]])
    (kept, _), (again, _) = (trained(CASES[name], way, checkpointed=flag, on=on) for flag in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_twenty_runs_in_lanes_are_equal_bit_for_bit() -> None:
    runs = [trained(CASES["dropout"], "forward 4")[0] for _ in range(20)]
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


class Counts(TorchFunctionMode):
    """Counts calls of `linear`, whoever makes them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is F.linear
        return func(*args, **(kwargs or {}))


def linears(model: nn.Module, x: Tensor) -> int:
    """How many calls of `linear` a forward and its backward make, the trial apart."""
    model(x).sum().backward()
    with Counts() as counts:
        loss = model(x).sum()
    loss.backward()  # modes are those of the forward, wherever the block runs again
    return counts.count


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_blocks_run_again_on_the_devices_that_are_named_and_on_no_others(micro_batches: int) -> None:
    x = torch.randn(8, 8)
    found = []
    for devices in ((), ("emulated:0",), ("emulated:0", "emulated:2")):
        options = {"no_split": ("Block",), "micro_batches": micro_batches}
        with placed(Blocks(), checkpointed=devices, **options) as each:
            found.append(linears(each.module, x))
    assert found == [6 * micro_batches, 8 * micro_batches, 10 * micro_batches]


def test_nothing_runs_again_where_nothing_is_recorded() -> None:
    with placed(Blocks(), no_split=("Block",)) as each, Counts() as counts:
        with torch.no_grad():
            each.module(torch.randn(4, 8))
        with torch.inference_mode():
            each.module(torch.randn(4, 8))
    assert counts.count == 12


def test_activations_are_gone_after_the_forward() -> None:
    kept: list[weakref.ref[Tensor]] = []

    class Watched(Block):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.a(x))
            kept.append(weakref.ref(hidden.untyped_storage()))  # type: ignore[arg-type]
            return self.b(hidden)  # type: ignore[no-any-return]

    for flag in (False, True):
        kept.clear()
        with placed(Blocks(Watched), no_split=("Watched",), checkpointed=flag) as each:
            output = each.module(torch.randn(4, 8))
            gc.collect()
            assert [ref() is None for ref in kept] == [flag] * 3
            del output


def test_the_module_has_its_own_forward_before_and_after() -> None:
    model = Blocks()
    with placed(model, no_split=("Block",)):
        assert all("forward" in block.__dict__ for block in model.blocks)
        copied = copy.deepcopy(model)
        assert all(block.forward.__self__ is block for block in copied.blocks)  # a method of the copy, as in any module
    assert not any("forward" in block.__dict__ for block in model.blocks)


def test_a_backward_may_be_repeated() -> None:
    found = []
    for flag in (False, True):
        torch.manual_seed(1)
        with placed(Blocks(), no_split=("Block",), checkpointed=flag, micro_batches=4) as each:
            loss = each.module(torch.randn(8, 8)).pow(2).sum()
            loss.backward(retain_graph=True)
            loss.backward()
            found.append([p.grad.clone() for p in each.module.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Loops(nn.Module):
    """Gives each layer a function of the loop's variables."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Applies() for _ in range(3))
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        count, scales = 0, [1.0]
        for number, layer in enumerate(self.layers):

            def counts(z: Tensor) -> Tensor:
                nonlocal count
                count += 1
                return torch.tanh(z * (number + 1)) * (count % 2 + 1)  # noqa: B023

            def scaled(scales: list[float], z: Tensor) -> Tensor:
                return counts(z) * scales[0]

            x = layer(x, functools.partial(scaled, scales))
            scales[0] += 1.0
        return x


@pytest.mark.parametrize("options", [{}, {"micro_batches": 4}], ids=["connected", "forward"])
def test_functions_that_a_module_is_given_are_those_of_the_call(options: dict[str, Any]) -> None:
    found = []
    for flag in (False, True):
        torch.manual_seed(1)
        with placed(Loops().double(), no_split=("Applies",), checkpointed=flag, **options) as each:
            loss = each.module(torch.randn(8, 8, dtype=torch.float64)).pow(2).sum()
            loss.backward(retain_graph=True)
            loss.backward()
            found.append([p.grad.clone() for p in each.module.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("anomalies", [False, True])
def test_a_gradient_may_be_differentiated_again(anomalies: bool) -> None:
    found = []
    for flag in (False, True):
        torch.manual_seed(1)
        with (
            placed(Blocks(), no_split=("Block",), checkpointed=flag) as each,
            torch.autograd.set_detect_anomaly(anomalies),
        ):
            x = torch.randn(8, 8, requires_grad=True)
            (gradient,) = torch.autograd.grad(each.module(x).pow(2).sum(), x, create_graph=True)
            gradient.pow(2).sum().backward()
            found.append([p.grad.clone() for p in (x, *each.module.parameters()) if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_functional_calls_are_what_they_are_without() -> None:
    from torch.func import functional_call, grad

    found = []
    for flag in (False, True):
        torch.manual_seed(1)
        with placed(Blocks(Normalised).eval(), no_split=("Normalised",), checkpointed=flag) as each:
            x = torch.randn(8, 8)
            weights = {name: p.detach() for name, p in each.module.named_parameters()}
            loss = lambda w, module=each.module, x=x: functional_call(module, w, (x,)).pow(2).sum()  # noqa: E731
            once = grad(loss)(weights)
            stepped = {name: (weights[name] - 0.1 * once[name]).requires_grad_() for name in weights}
            loss(stepped).backward()
            found.append([*once.values(), *(p.grad for p in stepped.values())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_user_code_may_checkpoint_the_whole_model_around() -> None:
    found = []
    for flag in (False, True):
        torch.manual_seed(1)
        with placed(Blocks(), no_split=("Block",), checkpointed=flag, micro_batches=2) as each:
            checkpoint(each.module, torch.randn(8, 8), use_reentrant=False).pow(2).sum().backward()
            found.append([p.grad.clone() for p in each.module.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_with_rematerialization_it_holds_within_the_second_run() -> None:
    """Which the strategy does not offer, because three forwards are more than two."""
    results = [
        trained(CASES[name], "forward 4", rematerialize=True, checkpointed=flag)[0]
        for name in ("dropout", "batch_norm")
        for flag in (False, True)
    ]
    for kept, again in (results[:2], results[2:]):
        assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_modes_of_modules_are_those_of_the_forward() -> None:
    found = []
    for flag in (False, True):
        torch.manual_seed(1)
        with placed(Blocks(Normalised), no_split=("Normalised",), checkpointed=flag) as each:
            loss = each.module(torch.randn(8, 8)).pow(2).sum()
            each.module.eval()
            loss.backward()
            assert not any(part.training for part in each.module.modules())
            found.append([p.grad.clone() for p in each.module.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_hooks_of_a_block_run_once_and_those_inside_of_it_again() -> None:
    calls: list[str] = []
    model = Blocks()
    model.blocks[0].register_forward_hook(lambda *_: calls.append("block"))
    model.blocks[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    model.blocks[0].a.register_forward_hook(lambda *_: calls.append("inner"))
    with placed(model, no_split=("Block",)):
        model(torch.randn(4, 8, requires_grad=True)).sum().backward()
    assert sorted(calls) == ["backward", "block", "inner", "inner"]


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_layer_drop_by_the_generator_of_the_host(micro_batches: int, accelerator: EmulatedAccelerator) -> None:
    """A block on an accelerator that draws on the CPU, in connected mode: such a region is not cut."""

    class Skips(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(torch.rand((), device="cpu")) < 0.5 else super().forward(x)

    found = []
    for flag in (False, True):
        torch.manual_seed(0)
        model = Blocks(Skips)
        on = ",".join(["cpu", *accelerator.devices[:2]])
        options = {"on": on, "no_split": ("Skips",), "checkpointed": flag, "micro_batches": micro_batches}
        with placed(model, **options) as each:
            torch.manual_seed(7)
            for _ in range(4):
                model(torch.randn(4, 8)).pow(2).sum().backward()
            if micro_batches > 1:
                assert each.engine is not None
                assert each.engine.cut_calls == 0
            found.append([*(p.grad.cpu() for p in model.parameters() if p.grad is not None), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_block_on_an_accelerator_that_draws_on_the_host_runs_in_no_lane(accelerator: EmulatedAccelerator) -> None:
    class Noisy(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.rand((), device="cpu").to(x.device)  # type: ignore[no-any-return]

    model, name = Trained(Blocks(Noisy)), accelerator.devices[0]
    with placed(model, on=f"cpu,{name}", no_split=("Noisy",), micro_batches=2) as each:
        assert each.engine is not None
        stepper = Stepper(each.engine, model, "training_step", get_schedule("1f1b"), (), ())
        stepper.run((torch.randn(8, 8),), 1.0)  # one after the other
        assert any(f"draws random numbers on cpu, but is on {name}" in reason for reason in each.engine.reasons)
        stepper.run((torch.randn(8, 8),), 1.0)
        stepper.close()


# Memory


class Wide(nn.Module):
    """A block that needs much more for a moment than it takes and returns. Input (rows, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(torch.sigmoid(torch.tanh(self.a(x)))))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("micro_batches", "share"), [(1, 0.45), (4, 0.35)], ids=["connected", "forward"])
def test_the_peak_on_accelerators_falls(micro_batches: int, share: float, accelerator: EmulatedAccelerator) -> None:
    if accelerator.kind != "cpp":
        pytest.skip("the backend that needs no compiler does not see what kernels allocate")
    peaks = []
    for flag in (False, True):
        model = nn.Sequential(*(Wide() for _ in range(12)))
        names = accelerator.devices[:2]
        options = {"no_split": ("Wide",), "checkpointed": flag, "micro_batches": micro_batches}
        with placed(model, on=",".join(names), **options):
            x = torch.randn(512, 64)
            model(x.to(names[0])).sum().backward()  # the trial, too
            gc.collect()
            accelerator.reset()
            held = [accelerator.stats(index).used_bytes for index in (0, 1)]
            model(x.to(names[0])).sum().backward()
            peaks.append([accelerator.stats(index).peak_bytes - held[index] for index in (0, 1)])
    kept, again = peaks
    assert all(b < share * a for a, b in zip(kept, again, strict=True)), (kept, again)


def test_a_whole_network_on_one_device_runs_again_layer_by_layer(accelerator: EmulatedAccelerator) -> None:
    if accelerator.kind != "cpp":
        pytest.skip("the backend that needs no compiler does not see what kernels allocate")
    peaks = []
    for flag in (False, True):
        model = Trained(nn.Sequential(*(Wide() for _ in range(12))))
        with placed(model, on=accelerator.devices[0], checkpointed=flag) as each:
            assert len(each.layout.blocks) == 1
            held = accelerator.stats(0).used_bytes
            accelerator.reset()
            model(torch.randn(512, 64, device=accelerator.devices[0])).sum().backward()
            peaks.append(accelerator.stats(0).peak_bytes - held)
    assert peaks[1] < 0.25 * peaks[0], peaks


# Errors


def test_an_exception_in_the_second_run_is_that_of_the_code() -> None:
    class Fails(Block):
        def forward(self, x: Tensor) -> Tensor:
            if torch._C._current_graph_task_id() != -1:
                raise KeyError("only the second time")
            return super().forward(x)

    for micro_batches in (1, 4):
        with placed(Blocks(Fails), no_split=("Fails",), micro_batches=micro_batches) as each:
            loss = each.module(torch.randn(8, 8)).sum()
            with pytest.raises(KeyError, match="only the second time") as caught:
                loss.backward()
            note = "forward of blocks.2, run again for the backward (activation checkpointing)"
            assert note in caught.value.__notes__
            with torch.no_grad():
                each.module(torch.randn(8, 8))


@pytest.mark.parametrize(
    ("change", "what"),
    [(lambda model, x: x.add_(1), "an input"), (lambda model, x: model.blocks[0].a.weight.add_(1), "a parameter")],
)
def test_what_was_changed_between_forward_and_backward_is_refused(change: Any, what: str) -> None:
    with placed(Blocks(), no_split=("Block",)) as each:
        each.module(torch.randn(8, 8)).sum().backward()  # of the first call, inputs are copied
        x = torch.randn(8, 8)
        loss = each.module(x).sum()
        with torch.no_grad():
            change(each.module, x)
        with pytest.raises(RuntimeError, match=f"^{what} of blocks.0 was changed after the call, but the backward has"):
            loss.backward()


def test_a_block_with_a_state_that_its_forward_depends_on_is_refused() -> None:
    class Norm(Block):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.utils.parametrizations.spectral_norm(self.a)

    with placed(Blocks(Norm), no_split=("Norm",)) as each:
        message = (
            r"blocks.0 cannot be checkpointed: the forward of _SpectralNorm in it changes a buffer in place "
            r"\(_u, _v\), so a second run would compute something else. Leave its device, emulated:1, out of "
            r"activation_checkpointing."
        )
        with pytest.raises(UnsupportedError, match=message):
            each.module(torch.randn(8, 8))


def test_a_block_that_begins_to_change_its_input_is_refused() -> None:
    class Begins(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.relu_() if self.relu.inplace else x)

    model = Blocks(Begins)
    for block in model.blocks:
        block.relu.inplace = False
    with placed(model, no_split=("Begins",)) as each:
        each.module(torch.randn(8, 8)).sum().backward()
        model.blocks[0].relu.inplace = True
        message = (
            "blocks.0 changes its input in place, which it did not do in its first call, so its forward cannot be run "
            "again. Leave its device, emulated:1, out of activation_checkpointing."
        )
        with pytest.raises(UnsupportedError, match=message):
            each.module(torch.randn(8, 8))


def test_torchscript_keeps_its_activations(caplog: pytest.LogCaptureFixture) -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scripted = torch.jit.script(nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.scripted(x))  # type: ignore[no-any-return]

    with placed(Blocks(Part), no_split=("Part",)) as each:
        each.module(torch.randn(4, 8)).sum().backward()
    assert "blocks.0 keeps its activations: TorchScript does not run the same code twice." in caplog.messages
