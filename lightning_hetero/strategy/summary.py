"""Adds where layers are to the table that Lightning's ModelSummary prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from lightning_hetero.plan import Plan
from lightning_hetero.strategy._compat import Columns, alter_tables, has_own_table

COLUMN = "Params per Device"  # one that both of Lightning's tables know: sharding strategies fill it with one number


class DevicesInSummary:
    """While it is open, tables of Lightning's own summaries say how many parameters of a layer are on which device.

    Callbacks stay the same objects, and all other columns and names of layers as they were. Callbacks of users that
    print a table of their own are left alone, as they may count columns.

    Args:
        callbacks: Of the Trainer.
        plan: Gives the plan that is in effect when the table is made.
    """

    def __init__(self, callbacks: Iterable[Any], plan: Callable[[], Plan | None]) -> None:
        self._plan = plan
        self._undo = [alter_tables(one, self._with_devices) for one in callbacks if not has_own_table(one)]

    def close(self) -> None:
        """Leave the callbacks as they were."""
        for undo in self._undo:
            undo()

    def _with_devices(self, summary: Any, columns: Columns) -> Columns:
        plan = self._plan()
        titles = [title for title, _ in columns]
        if plan is None or len({plan.root, *plan.used}) < 2 or COLUMN in titles:
            return columns
        layers = dict(summary.named_modules)
        names = dict(columns)["Name"]
        cells = [params_per_device(layers[name], name, plan) if name in layers else "" for name in names]
        place = titles.index("Params") + 1
        return [*columns[:place], (COLUMN, cells), *columns[place:]]


def params_per_device(layer: nn.Module, name: str, plan: Plan) -> str:
    """How many parameters of a layer are on which device, such as "1.2 K cuda:0, 84 cpu".

    Args:
        layer: The layer.
        name: Its name in the model.
        plan: Where the units of the model are.
    """
    counts: Counter[str] = Counter()
    for parameter_name, parameter in layer.named_parameters(prefix=name):
        for device in _devices_of(parameter_name, plan):
            counts[device] += parameter.numel()
    return ", ".join(f"{_readable(count)} {device}" for device, count in counts.items())


def _devices_of(parameter: str, plan: Plan) -> Iterator[str]:
    """The devices that hold a parameter: those of the innermost unit around it; the root's, if it is in none."""
    unit = parameter
    while unit not in plan.device_of:
        unit, dot, _ = unit.rpartition(".")
        if not dot:
            yield plan.root.name
            return
    shares = plan.shares_of.get(unit)
    yield from [plan.device_of[unit]] if not shares else (share.device for share in shares)


def _readable(count: int) -> str:
    for factor, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= factor:
            return f"{count / factor:.1f} {letter}"
    return str(count)
