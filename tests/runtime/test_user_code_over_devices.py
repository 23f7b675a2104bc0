"""Whatever function of torch user code calls with tensors of several devices has the result of one device, or raises.

Nothing that a function writes to its arguments is lost.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.checkpoint import checkpoint

from lightning_hetero.runtime.assignments import kept_beside
from lightning_hetero.testing.accelerator import EmulatedAccelerator

Place = Callable[..., Any]
DOUBLES = {"dtype": torch.float64}


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)).double()


def spread(model: nn.Module, place: Place, accelerator: EmulatedAccelerator, turn: int = 0) -> Any:
    devices = ["cpu", *accelerator.devices[:2]]
    return place(model, {str(number): devices[(number + turn) % 3] for number in range(3)})


def values(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().cpu().clone() for tensor in tensors]


def agree(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return all(torch.equal(one.cpu(), other.cpu()) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "function",
    [
        lambda h, w: torch.einsum("bd,kd->bk", h, w),
        lambda h, w: torch.einsum("bd,kd,d->bk", [h, w, w[0]]),
        lambda h, w: torch.cdist(h, w),
        lambda h, w: torch.tensordot(h, w, dims=([1], [1])),
        lambda h, w: torch.block_diag(h, w),
        lambda h, w: torch.cartesian_prod(h[:, 0], w[:, 0]),
        lambda h, w: torch.meshgrid(h[:, 0], w[:, 0], indexing="ij")[1],
        lambda h, w: F.dropout(h, 0.5) @ w.T,
        lambda h, w: checkpoint(lambda a, b: a @ b.T, h, w, use_reentrant=False),
        lambda h, w: checkpoint(lambda a, b: torch.einsum("bd,kd->bk", a, b), h, w, use_reentrant=False),
    ],
    ids=["einsum", "list", "cdist", "tensordot", "block_diag", "cartesian", "meshgrid", "dropout", "again", "both"],
)
@pytest.mark.parametrize("turn", [0, 1])
def test_functions_that_torch_has_in_python_have_the_results_and_gradients_of_one_device(
    function: Callable[[Tensor, Tensor], Tensor], turn: int, place: Place, accelerator: EmulatedAccelerator
) -> None:
    model, x = layers(), torch.randn(4, 3, **DOUBLES)
    twin = copy.deepcopy(model)
    spread(model, place, accelerator, turn)
    losses = []
    for each in (model, twin):
        torch.manual_seed(3)
        losses.append(function(each[0](x), each[2].weight).sin().sum())
        losses[-1].backward()
    assert agree([losses[0]], [losses[1]])
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.allclose(one.grad.cpu(), other.grad, rtol=1e-13, atol=1e-14)


def test_backward_takes_its_arguments_also_where_devices_were_mixed(
    place: Place, accelerator: EmulatedAccelerator
) -> None:
    model = layers()
    spread(model, place, accelerator)
    outputs = model[0].weight @ model[2].weight
    outputs.backward(torch.ones_like(outputs), retain_graph=True)
    torch.autograd.backward([outputs], [torch.ones_like(outputs)], inputs=[model[0].weight])
    expected = 2 * torch.ones(3, 3, **DOUBLES) @ model[2].weight.detach().cpu().T
    assert agree([model[0].weight.grad], [expected])


def changed(call: Callable[..., Any], arguments: Sequence[Any], place_of: Callable[[int], str]) -> list[Tensor] | None:
    """What the arguments hold after a call, with tensors and lists put over devices; None if torch refuses."""

    def put(value: Any, start: int) -> Any:
        if isinstance(value, list):
            return [put(item, start + number) for number, item in enumerate(value)]
        return value.clone().to(place_of(start)) if isinstance(value, Tensor) else value

    placed = [put(value, number) for number, value in enumerate(arguments)]
    try:
        call(*placed)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError, AttributeError):
        return None
    flat = [item for value in placed for item in (value if isinstance(value, list) else [value])]
    return values([item for item in flat if isinstance(item, Tensor)])


def calls(kind: str) -> list[tuple[str, Callable[..., Any]]]:
    """All operators of torch that write to an argument of one kind."""
    if kind == "in place":
        return [(name, getattr(Tensor, name)) for name in dir(Tensor) if name.endswith("_") and name[0] != "_"]
    if kind == "overload":
        names = ("add_", "addcmul_", "copy_", "index_add_", "lerp_", "masked_fill_", "mul_")
        return [(name, getattr(torch.ops.aten, name)) for name in names]
    if kind == "out":
        functions = [(name, getattr(torch, name)) for name in dir(torch) if not name.startswith("_")]
        functions = [(name, function) for name, function in functions if "out=" in str(function.__doc__)]
        return [(name, lambda out, *rest, f=function: f(*rest, out=out)) for name, function in functions]
    return [(name, getattr(torch, name)) for name in dir(torch) if name.startswith(("_foreach", "_fused", "_amp"))]


A, B, C = (torch.rand(3, 3, generator=torch.Generator().manual_seed(seed), **DOUBLES) + 0.1 for seed in range(3))
INDEX, MASK, ZERO = torch.tensor([0, 2, 1]), torch.eye(3, dtype=torch.bool), torch.tensor(2.0, **DOUBLES)
LISTS = ([A, B, C], [B, C, A], [C, A, B])
ARGUMENTS: dict[str, list[list[Any]]] = {
    "in place": [
        *([A, B], [A, B, C], [A, B, 0.5], [A, B[0]], [A, 0, INDEX, B], [A, 0, INDEX.expand(3, 3), B], [A, MASK, B]),
        *([A, MASK, ZERO], [A, 0, INDEX, B, "mean"], [A, B, MASK], [A[0], B, C[0]], [A[0], B[0]], [A[0], INDEX, B[0]]),
        *([A[None], B[None], C[None]], [INDEX, INDEX], [MASK, MASK], [A, 0, INDEX, 0.5]),
    ],
    "out": [
        *([A, B, C], [A, B, C, A], [A, B, 0.5, C], [A[0], B, C[0]], [[A, INDEX], B, 0], [A, [B, C]], [A, MASK, B, C]),
        *([A, B, 0, INDEX], [[A, B], C, C], [A[0], B[0], C[0]], [MASK, A, B], [[A, B[0]], C, 0]),
    ],
    "list": [
        *([LISTS[0], LISTS[1]], [LISTS[0], LISTS[1], LISTS[2]], [LISTS[0], LISTS[1], 0.5], [LISTS[0], ZERO]),
        *(
            [LISTS[0], LISTS[1], LISTS[2], [0.1, 0.2, 0.3]],
            [LISTS[0], ZERO, ZERO],
            [LISTS[0], LISTS[1], LISTS[2], ZERO],
        ),
    ],
}
ARGUMENTS["overload"] = ARGUMENTS["in place"]


@pytest.mark.filterwarnings("ignore")  # of operators that are old, new, or do not like the arguments
@pytest.mark.parametrize("kind", ["in place", "overload", "out", "list"])
def test_no_operator_of_torch_loses_what_it_writes(kind: str, place: Place, accelerator: EmulatedAccelerator) -> None:
    spread(layers(), place, accelerator)
    devices = ["cpu", *accelerator.devices[:2]]
    tried, done, wrong = 0, 0, []
    for name, call in calls(kind):
        for arguments in ARGUMENTS[kind]:
            torch.manual_seed(0)
            expected = changed(call, arguments, lambda _: "cpu")
            again = expected and changed(call, arguments, lambda _: "cpu")
            if not expected or not again or not agree(expected, again):
                continue  # it takes other arguments, or random numbers
            for turn in range(3):
                found = changed(call, arguments, lambda number, turn=turn: devices[(number + turn) % 3])
                tried, done = tried + 1, done + (found is not None)
                if found is not None and not agree(found, expected):
                    wrong.append(name)
            break
    assert not wrong
    assert done > 0.8 * tried > 10


@pytest.mark.parametrize("add", [torch._foreach_add_, torch.ops.aten._foreach_add_.List], ids=["torch", "overload"])
def test_lists_whose_members_are_apart_are_gone_through_once(
    add: Callable[..., Any], place: Place, accelerator: EmulatedAccelerator
) -> None:
    spread(layers(), place, accelerator)
    one, two = accelerator.devices[:2]
    shadows = [torch.full((2,), 1.0), torch.full((2,), 2.0, device=one), torch.full((2,), 3.0)]
    weights = [torch.full((2,), 10.0), torch.full((2,), 20.0, device=two), torch.full((2,), 30.0)]
    add(shadows, weights, alpha=0.5)
    assert [float(shadow[0]) for shadow in shadows] == [6.0, 12.0, 18.0]
    assert [str(shadow.device) for shadow in shadows] == ["cpu", one, "cpu"]
    assert [float(new[0]) for new in torch._foreach_sub(shadows, weights)] == [-4.0, -8.0, -12.0]


def test_lists_with_weights_that_want_gradients_are_refused_as_by_torch(
    place: Place, accelerator: EmulatedAccelerator
) -> None:
    spread(layers(), place, accelerator)
    leaves = [torch.ones(2, requires_grad=True), torch.ones(2, device=accelerator.devices[0])]
    with pytest.raises(RuntimeError):
        torch._foreach_add_(leaves, [torch.ones(2), torch.ones(2)])
    assert agree(leaves, [torch.ones(2), torch.ones(2)])


def test_a_fused_optimizer_with_its_state_elsewhere_is_refused(place: Place, accelerator: EmulatedAccelerator) -> None:
    spread(layers(), place, accelerator)
    weight = nn.Parameter(torch.ones(3, device=accelerator.devices[0]))
    optimizer = torch.optim.Adam([weight], lr=0.1, fused=True)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    before = values([weight])
    state = optimizer.state[weight]
    for name in ("exp_avg", "exp_avg_sq", "step"):
        state[name] = state[name].cpu()
    with pytest.raises(RuntimeError, match="same device"):
        optimizer.step()
    assert agree(before, values([weight]))


def test_vectors_of_parameters_are_joined_and_split_again(place: Place, accelerator: EmulatedAccelerator) -> None:
    model = layers()
    twin = copy.deepcopy(model)
    placed = spread(model, place, accelerator)
    where = [parameter.device for parameter in model.parameters()]
    for each in (model, twin):
        vector = parameters_to_vector(each.parameters())
        vector.norm().backward()
        vector_to_parameters(vector.detach() * 0.9, each.parameters())
    assert vector.device.type == "cpu"
    assert [parameter.device for parameter in model.parameters()] == where
    assert agree([*model.parameters()], [*twin.parameters()])
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(one.grad.cpu(), other.grad, rtol=1e-13)
    assert placed.spans_devices


def test_vectors_of_parameters_of_several_devices_are_refused_where_nothing_is_placed(
    accelerator: EmulatedAccelerator,
) -> None:
    with pytest.raises(TypeError, match="different devices"):
        parameters_to_vector([torch.ones(2), torch.ones(2, device=accelerator.devices[0])])


@pytest.mark.parametrize("number", [0, 1])
def test_what_is_assigned_to_the_data_of_a_parameter_goes_to_its_device(
    number: int, place: Place, accelerator: EmulatedAccelerator
) -> None:
    model = layers()
    spread(model, place, accelerator)
    weight, device = model[number].weight, model[number].weight.device
    with kept_beside(lambda: model):
        weight.data = torch.full((3, 3), 2.0, **DOUBLES, device=accelerator.devices[1])
    assert weight.device == device
    assert agree([weight], [torch.full((3, 3), 2.0, **DOUBLES)])


def test_a_part_of_a_vector_is_not_copied_in_silence(place: Place, accelerator: EmulatedAccelerator) -> None:
    model, flat = layers(), torch.zeros(18, **DOUBLES)
    spread(model, place, accelerator)
    try:
        model[1].weight.data = flat[:9].view(3, 3)
    except RuntimeError:
        return  # as torch does between devices that store tensors differently
    flat.add_(1)
    assert agree([model[1].weight], [torch.ones(3, 3, **DOUBLES)])
