"""What Lightning sees of a training step in micro-batches: one output, and one call of `self.log` for each name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from numbers import Integral, Number, Real
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_hetero.errors import UnsupportedError
from lightning_hetero.runtime.engine.notes import Noted
from lightning_hetero.runtime.engine.step import weighted
from lightning_hetero.runtime.engine.stepper import StepResult
from lightning_hetero.strategy.step_values import StepValues

RECORDED = ("log",)
"""Methods of a LightningModule that micro-batches note, and that are called once for the batch."""

_REDUCTIONS = {
    "mean": "mean", "avg": "mean", "sum": "sum", "min": "min", "max": "max",
    torch.mean: "mean", torch.sum: "sum", torch.min: "min", torch.max: "max", min: "min", max: "max", sum: "sum",
}  # fmt: skip


def replay(module: Any, result: StepResult, values: StepValues) -> None:
    """Call `module.log` with the values of all micro-batches merged.

    Means get the weight of rows, sums are added up, and so on by the reduction of each name. So what is logged on the
    step is that of the whole batch, and what is logged on the epoch counts every row once.

    Args:
        module: The module.
        result: What the step did.
        values: Of metrics, for the whole batch.

    Raises:
        UnsupportedError: A name has a reduction that cannot be merged.
    """
    merged: dict[tuple[str, int], list[tuple[int, Noted]]] = {}
    for index, notes in enumerate(result.notes):
        seen: dict[str, int] = {}
        for note in notes:
            name = str(note.kwargs["name"] if "name" in note.kwargs else note.args[0])
            seen[name] = seen.get(name, 0) + 1
            merged.setdefault((name, seen[name]), []).append((index, note))
    for (name, _), entries in merged.items():
        _log(module, name, entries, result.rows, values)


def _log(
    module: Any, name: str, entries: Sequence[tuple[int, Noted]], rows: Sequence[int], of_batch: StepValues
) -> None:
    calls = [_arguments(module, note) for _, note in entries]
    options = {key: value for key, value in calls[0].items() if key not in ("name", "value", "batch_size")}
    weights, batch_size = _weights([call.get("batch_size") for call in calls], [rows[index] for index, _ in entries])
    values = [call["value"] for call in calls]
    if not all(isinstance(value, (Number, Tensor)) for value in values):
        metric = values[0]  # which has been updated already
        if isinstance(metric, Metric) and options.get("on_step") is not False:
            of_batch.put(metric, [rows[index] for index, _ in entries])
        module.log(name, metric, **options)
        return
    reduction = _REDUCTIONS.get(options.get("reduce_fx", "mean"))
    tensors = [value if isinstance(value, Tensor) else torch.tensor(_plain(value)) for value in values]
    if reduction == "mean":
        is_one = not any(isinstance(value, Tensor) for value in values) and len(set(values)) == 1
        value = _exact(tensors[0]) if is_one else _mean(tensors, weights)
    elif reduction == "sum":
        value = torch.stack(tensors).sum(0)
    elif reduction in ("min", "max"):
        value = torch.stack(tensors).amin(0) if reduction == "min" else torch.stack(tensors).amax(0)
    else:
        raise UnsupportedError(
            f"self.log({name!r}, reduce_fx={options['reduce_fx']!r}) in micro-batches: known reductions are mean, sum, "
            "min and max. Set micro_batching='forward', which logs once for the whole batch."
        )
    module.log(name, value, **options, batch_size=batch_size)


def _weights(given: Sequence[Any], rows: Sequence[int]) -> tuple[Sequence[float], int]:
    """What each micro-batch counts in a mean, and what the batch counts in an epoch.

    Args:
        given: The `batch_size` that each of them was logged with, or None.
        rows: The rows of each.
    """
    sizes = [count if size is None else float(size) for size, count in zip(given, rows, strict=True)]
    # The same whatever the rows, and no number of rows: a constant, such as the batch size of the loader, which says
    # nothing about micro-batches. Where all have the same rows it may be a number of tokens, which are added up.
    is_constant = len(set(sizes)) == 1 and len(set(rows)) > 1 and (sizes[0] == 1 or sizes[0] > max(rows))
    return rows if is_constant or not sum(sizes) else sizes, int(sum(sizes))


def _mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean with weights."""
    exact = list(map(_exact, values))
    total = exact[0] * weights[0]
    for value, weight in zip(exact[1:], weights[1:], strict=True):
        total = total + value * weight
    return total / sum(weights)


def _exact(value: Tensor) -> Tensor:
    """In a dtype in which sums of many are as exact as those of Lightning's."""
    return value if value.is_floating_point() and value.element_size() > 2 else value.float()


def _plain(value: Any) -> float | complex:
    """A number of Python: NumPy has others."""
    return float(value) if isinstance(value, Real) else complex(value)


def _arguments(module: Any, note: Noted) -> dict[str, Any]:
    names = ["name", "value", *list(inspect.signature(module.log).parameters)[2:]]
    return {**dict(zip(names, note.args, strict=False)), **note.kwargs}


def merged_output(result: StepResult) -> Any:
    """What `training_step` returns for the whole batch: the loss, and what stood beside it.

    Tensors, arrays and lists with the rows of their micro-batch are joined, scalars with a fraction are averaged by
    rows, dicts and tuples, and lists that have the same length whatever the rows, are merged item by item. Other
    values, and what may be either, are those of the last micro-batch, as if it had overwritten the others.
    """
    last = result.outputs[-1]
    if not isinstance(last, Mapping):
        return result.loss
    output = {
        key: _merge([output[key] for output in result.outputs], result.rows)
        for key in last
        if key != "loss" and all(isinstance(output, Mapping) and key in output for output in result.outputs)
    }
    return {**output, "loss": result.loss}


def _merge(values: Sequence[Any], rows: Sequence[int]) -> Any:
    last = values[-1]
    if not all(type(value) is type(last) for value in values):
        return last
    if isinstance(last, Tensor):
        return _merged_tensors(values, rows)
    if isinstance(last, (dict, list, tuple)):
        return _merged_items(values, rows)
    if isinstance(last, Real) and not isinstance(last, Integral):
        same = all(value == last for value in values)
        return last if same else sum(value * (count / sum(rows)) for value, count in zip(values, rows, strict=True))
    if type(last).__name__ == "ndarray" and _have_rows(values, rows):
        import numpy as np

        return np.concatenate(values)
    return last


def _merged_tensors(values: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    if _have_rows(values, rows):
        return torch.cat(list(values))
    if all(value.dim() == 0 and value.is_floating_point() for value in values):
        return weighted(values, rows)
    return values[-1]


def _have_rows(values: Sequence[Any], rows: Sequence[int]) -> bool:
    return all(value.ndim > 0 and value.shape[0] == count for value, count in zip(values, rows, strict=True))


def _merged_items(values: Sequence[Any], rows: Sequence[int]) -> Any:
    last = values[-1]
    if type(last) is dict:
        same = all(value.keys() == last.keys() for value in values)
        return {key: _merge([value[key] for value in values], rows) for key in last} if same else last
    is_of_rows = type(last) is list and [len(value) for value in values] == list(rows)
    columns = list(zip(*values, strict=False))
    has_tensors_of_rows = any(isinstance(column[-1], Tensor) and _are_rows(column, rows) for column in columns)
    if is_of_rows:
        return last if has_tensors_of_rows else [item for value in values for item in value]
    if type(last) not in (list, tuple) or any(len(value) != len(last) for value in values):
        return last
    return type(last)(_merge(column, rows) for column in columns)


def _are_rows(values: Sequence[Any], rows: Sequence[int]) -> bool:
    return all(isinstance(value, Tensor) for value in values) and _have_rows(values, rows)
