"""What a traced program asks of a processor: the operations of torch in it, and the dtypes that they compute with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lightning_hetero.export.cut import UnitOf, places

_NOTHING = {"alias", "clone", "detach"}
"""Operations that only matter to torch, such as what is left of dropout. Exporters leave them out."""
_SAME = {"_unsafe_view": "view"}


@dataclass(frozen=True, slots=True)
class Asked:
    """What some operations need.

    Attributes:
        operators: Their names: "conv2d", "relu".
        dtypes: The floating-point dtypes of what they compute: "float32".
    """

    operators: frozenset[str]
    dtypes: frozenset[str]


def asked_by(nodes: Iterable[fx.Node]) -> Asked:
    """What the nodes of a graph need."""
    operators, dtypes = set(), set()
    for node in nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target is not torch.ops.aten.sym_size.int:
            name = node.target.overloadpacket.__name__
            operators.add(_SAME.get(name, name))
            value = node.meta.get("val")
            results = [value] if isinstance(value, Tensor) else value if isinstance(value, (tuple, list)) else []
            dtypes |= {tensor.dtype for tensor in results if isinstance(tensor, Tensor)}
    floats = {str(dtype).removeprefix("torch.") for dtype in dtypes if dtype.is_floating_point}
    return Asked(frozenset(operators - _NOTHING), frozenset(floats))


def asked_by_units(program: fx.GraphModule, unit_of: UnitOf, units: Iterable[str]) -> Mapping[str, Asked]:
    """What each unit needs; operations outside of all units count with the one whose device they are cut to.

    Args:
        program: What `trace` gave.
        unit_of: The unit of a module.
        units: Names of all units; one without operations is not in the answer.
    """
    nodes: dict[str, list[fx.Node]] = {}
    names = {name: name for name in units}
    for node, unit in places(program, unit_of, names, "")[1].items():
        nodes.setdefault(unit, []).append(node)
    return {unit: asked_by(found) for unit, found in nodes.items() if unit}
