"""Cuts a traced program where the device changes: each piece is a graph of its own.

Values that skip pieces (residuals, the skips of a U-Net) are outputs of one piece and inputs of any later ones.
A parameter that several pieces read is stored with each of them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lightning_hetero.export.trace import PREFIX, size_of

UnitOf = Callable[[str], "str | None"]
"""Name of a module, at any depth, to that of the unit around it; None outside of all units."""


@dataclass(frozen=True)
class Piece:
    """Operations that run one after the other on one device.

    Attributes:
        device: Its name.
        units: The units that have operations here, in order.
        inputs: Names of the values that it takes: "input0" is a tensor of the arguments, others are of pieces before.
        outputs: Names of the values that it gives.
        dims: Size of each dimension of every input and output: a number, or a symbol.
        graph: Takes and gives the values as tuples.
    """

    device: str
    units: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dims: dict[str, tuple[Any, ...]]
    graph: fx.GraphModule


def cut(
    program: fx.GraphModule, unit_of: UnitOf, device_of: Mapping[str, str], root: str
) -> tuple[list[Piece], tuple[str, ...]]:
    """Cut a program, and name its results.

    Operations outside of all units stay where their latest argument is computed, or else where their first reader is.
    Operations are moved in front of others that they do not depend on if that saves a border.

    Args:
        program: What `trace` gave.
        unit_of: The unit of a module.
        device_of: Name of the device of each unit.
        root: Name of the device for a program without units.
    """
    names = _names(program.graph)
    units, devices = places(program, unit_of, device_of, root)
    runs = list(_runs(list(units), devices))
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    results = [node for node in output.args[0] if isinstance(node, fx.Node)]
    if not runs:  # a module that only hands its arguments on
        runs = [[]]
    made = {node: index for index, run in enumerate(runs) for node in run}
    wanted: list[list[fx.Node]] = [[] for _ in runs]
    needs = [_needs(run) for run in runs]
    for node in dict.fromkeys([*(node for need in needs for node in need), *results]):
        home = made.get(node, 0 if node.op == "get_attr" else None)  # nobody makes arguments
        if home is not None:
            wanted[home].append(node)
    pieces = [
        _piece(program, run, need, give, names, devices[run[0]] if run else root, units)
        for run, need, give in zip(runs, needs, wanted, strict=True)
    ]
    return pieces, tuple(names[node] for node in results)


def places(
    program: fx.GraphModule, unit_of: UnitOf, device_of: Mapping[str, str], root: str
) -> tuple[dict[fx.Node, str | None], dict[fx.Node, str]]:
    """The unit, or None, and the device of every operation that computes tensors, in order; see `cut`."""
    work = [node for node in program.graph.nodes if _is_tensor_work(node)]
    units = {node: _unit(node, unit_of) for node in work}
    return units, _devices(work, {node: device_of[unit] for node, unit in units.items() if unit is not None}, root)


def _names(graph: fx.Graph) -> dict[fx.Node, str]:
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    return {node: node.name for node in graph.nodes} | {node: f"input{i}" for i, node in enumerate(placeholders)}


def _is_tensor_work(node: fx.Node) -> bool:
    """Whether it computes tensors. Sizes are computed again wherever they are needed, and assertions are left out."""
    return node.op == "call_function" and isinstance(node.meta.get("val"), (Tensor, tuple, list))


def _unit(node: fx.Node, unit_of: UnitOf) -> str | None:
    stack = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(list(stack.values())):
        if path.startswith(f"{PREFIX}."):
            unit = unit_of(path.removeprefix(f"{PREFIX}."))
            if unit is not None:
                return unit
    return None


def _sources(node: fx.Node) -> Iterator[fx.Node]:
    """The tensors that an operation needs, also those of whose size it needs a number."""
    for argument in node.all_input_nodes:
        if argument.op in ("placeholder", "get_attr") or _is_tensor_work(argument):
            yield argument
        else:
            yield from _sources(argument)


def _devices(work: list[fx.Node], known: dict[fx.Node, str], root: str) -> dict[fx.Node, str]:
    devices = dict(known)
    order = {node: index for index, node in enumerate(work)}
    for node in work:
        before = [argument for argument in _sources(node) if argument in devices]
        if node.target is operator.getitem and before:
            devices[node] = devices[before[0]]
        elif node not in devices and before:
            devices[node] = devices[max(before, key=order.__getitem__)]
    for node in reversed(work):  # positions and masks, made of nothing but sizes; arguments before the first unit
        if node not in devices:
            readers = sorted((user for user in node.users if user in devices), key=order.__getitem__)
            devices[node] = devices[readers[0]] if readers else root
    return devices


def _runs(work: list[fx.Node], devices: dict[fx.Node, str]) -> Iterator[list[fx.Node]]:
    """Deal the operations into runs on one device, each as long as what is ready allows."""
    waiting = {node: {source for source in _sources(node) if source in devices} for node in work}
    while waiting:
        ready = next(node for node in work if node in waiting and not waiting[node])
        device = devices[ready]
        run: dict[fx.Node, None] = {}
        for node in work:  # in order, so one pass finds all that becomes ready on the way
            if node in waiting and devices[node] == device and waiting[node] <= run.keys():
                run[node] = None
                del waiting[node]
        for needed in waiting.values():
            needed.difference_update(run)
        yield list(run)


def _needs(run: list[fx.Node]) -> list[fx.Node]:
    """The values from elsewhere that a run takes."""
    here, sizes = {*run}, []
    needed: dict[fx.Node, None] = {}
    for node in run:
        for argument in node.all_input_nodes:
            if argument.op == "placeholder" or _is_tensor_work(argument):
                needed[argument] = None
            elif argument.op != "get_attr":
                sizes.append(argument)
    elsewhere = {node: None for node in needed if node not in here}
    while sizes:
        node = sizes.pop()
        for argument in node.all_input_nodes:
            if argument.op != "placeholder" and not _is_tensor_work(argument):
                sizes.append(argument)
            elif argument not in here and _same_size(node, elsewhere) is None:
                elsewhere[argument] = None
    return list(elsewhere)


def _same_size(node: fx.Node, tensors: Any) -> tuple[fx.Node, int] | None:
    """A dimension of one of the tensors with the size for which a node asks, so that no other has to be sent for it."""
    if node.target is not torch.ops.aten.sym_size.int:
        return None
    wanted = node.meta["val"]
    for tensor in tensors:
        for dim, size in enumerate(tensor.meta["val"].shape):
            if isinstance(size, torch.SymInt) and size.node.expr == wanted.node.expr:
                return tensor, dim
    return None


def _piece(
    program: fx.GraphModule,
    run: list[fx.Node],
    needs: list[fx.Node],
    gives: list[fx.Node],
    names: dict[fx.Node, str],
    device: str,
    units: dict[fx.Node, str | None],
) -> Piece:
    graph = fx.Graph()
    copies = {node: graph.placeholder(names[node]) for node in needs}
    for node, placeholder in copies.items():
        placeholder.meta = {"val": node.meta["val"]}

    def copy(node: fx.Node) -> fx.Node:
        if node not in copies:
            same = _same_size(node, needs)
            if same is not None:
                copies[node] = graph.call_function(torch.ops.aten.sym_size.int, (copies[same[0]], same[1]))
                copies[node].meta = {"val": node.meta["val"]}
            else:
                for argument in node.all_input_nodes:
                    copy(argument)
                copies[node] = graph.node_copy(node, copies.__getitem__)
        return copies[node]

    for node in run:
        copy(node)
    graph.output(tuple(copy(node) for node in gives))
    here = dict.fromkeys(unit for node in run if (unit := units[node]) is not None)
    return Piece(
        device=device,
        units=tuple(here),
        inputs=tuple(names[node] for node in needs),
        outputs=tuple(names[node] for node in gives),
        dims={names[node]: tuple(map(size_of, _shape(program, node))) for node in [*needs, *gives]},
        graph=fx.GraphModule(program, graph),
    )


def _shape(program: fx.GraphModule, node: fx.Node) -> Any:
    value = node.meta.get("val")
    if value is None:  # a parameter handed out as it is
        value = operator.attrgetter(str(node.target))(program)
    return value.shape
