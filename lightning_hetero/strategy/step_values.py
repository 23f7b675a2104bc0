"""What a metric that is logged itself has for the step: its value of the whole batch, not of the last micro-batch."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.wrappers.abstract import WrapperMetric

from lightning_hetero.runtime.engine.step import weighted
from lightning_hetero.runtime.frames import HERE


@dataclass
class _Calls:
    """Calls of one metric in the step that is under way.

    Attributes:
        metric: The metric.
        values: What they returned, in the order of micro-batches.
        twin: Has had all of them, and nothing else; None if it was not wanted, or could not be made.
    """

    metric: Metric
    values: list[Any] = field(default_factory=list)
    twin: Metric | None = None


class StepValues:
    """Computes metrics over all micro-batches of a step.

    `self.log("f1", self.f1)` logs, for the step, what the last call of the metric returned: here, the value of the last
    micro-batch. So a copy of the metric is updated along, and computed once. As that costs a second `update`, only
    those metrics get one that are logged in this way; which those are, the first step shows.
    """

    def __init__(self) -> None:
        self._calls: dict[int, _Calls] = {}
        self._twins: dict[int, Metric] = {}
        self._unwanted: set[int] = set()
        self._known: dict[int, weakref.ref[Metric]] = {}  # whose these are: an `id` may be that of another one later
        self._logged: set[int] = set()
        self._is_open = False

    @contextmanager
    def of_step(self) -> Iterator[StepValues]:
        """Within the block, one step is under way, and is then logged."""
        self._is_open = True
        try:
            yield self
        finally:
            self._is_open = False
            for key, calls in self._calls.items():
                self._settle(key, calls)
            self._calls, self._logged = {}, set()

    def note(self, metric: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], value: Any) -> None:
        """A micro-batch has called a metric. They come in order, each in a thread of its own."""
        if not self._is_open or not isinstance(metric, Metric):
            return
        calls = self._calls.get(id(metric))
        if calls is None:
            self._forget_others(metric)
            calls = self._calls[id(metric)] = _Calls(metric, twin=self._twin(metric))
        calls.values.append(_detached(value))
        if calls.twin is not None:
            given = dict(kwargs)
            if isinstance(metric, MeanMetric) and is_one_number(args, kwargs):
                given["weight"] = HERE.part_of_batch
            calls.twin.update(*_detached(args), **_detached(given))

    def put(self, metric: Metric, rows: Sequence[int]) -> None:
        """Let a metric have its value of the whole batch as that of its last call, which loggers are given.

        Where it was called more than once for a micro-batch, or not for each, it keeps what it has. Where there is no
        copy, scalars are averaged by rows.

        Args:
            metric: The metric.
            rows: Of the micro-batches that have logged it.
        """
        calls = self._calls.get(id(metric))
        self._logged.add(id(metric))
        last: Any = vars(metric)
        if calls is None or len(calls.values) != len(rows) or last["_forward_cache"] is None:
            return
        if calls.twin is not None:
            last["_forward_cache"] = calls.twin.compute()
        elif all(isinstance(v, Tensor) and v.dim() == 0 and v.is_floating_point() for v in calls.values):
            last["_forward_cache"] = weighted(calls.values, rows)

    def _twin(self, metric: Metric) -> Metric | None:
        # A wrapper may draw random numbers, and one that is exchanged on the step has met the other processes.
        if id(metric) in self._unwanted or isinstance(metric, WrapperMetric) or metric.dist_sync_on_step:
            return None
        twin = self._twins.get(id(metric))
        if twin is None:
            try:
                twin = copy.deepcopy(metric)
            except RuntimeError:  # it holds tensors with a graph
                return None
            twin.reset()
            twin.distributed_available_fn = _never  # the value of a step is that of this process
            self._twins[id(metric)] = twin
        return twin

    def _forget_others(self, metric: Metric) -> None:
        known = self._known.get(id(metric))
        if known is None or known() is not metric:
            self._known[id(metric)] = weakref.ref(metric)
            self._twins.pop(id(metric), None)
            self._unwanted.discard(id(metric))

    def _settle(self, key: int, calls: _Calls) -> None:
        if key in self._logged:
            self._unwanted.discard(key)
            if calls.twin is not None:
                calls.twin.reset()
        else:
            self._unwanted.add(key)
            self._twins.pop(key, None)


def is_one_number(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a `MeanMetric` is given one number, and no weight for it."""
    value = args[0] if args else kwargs.get("value")
    return len(args) < 2 and kwargs.get("weight") is None and value is not None and torch.as_tensor(value).dim() == 0


def _detached(value: Any) -> Any:
    return apply_to_collection(value, Tensor, Tensor.detach)


def _never() -> bool:
    return False
